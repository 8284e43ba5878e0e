//! What happens to the supervisor, and what it has the shell do.

use std::time::Duration;

use mentee_cluster::Output;

use super::culprit::Culprit;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl Exit {
    /// Of `mpirun` or `srun`, which end with their ranks' exit code or with the number of the signal that ended one, as it is or
    /// behind 128.
    pub fn of_a_launcher(self) -> String {
        let Exit::Code(code) = self else { return self.to_string() };
        match signal_name(code).or_else(|| signal_name(code - 128)) {
            Some(name) => format!("{self}, as of {name}"),
            None => self.to_string(),
        }
    }
}

/// Of the signals that end programs by an error of theirs or for want of something; not those whose numbers are exit codes
/// of programs in general, as 1 and 2.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        _ => return None,
    })
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(libc::SIGKILL) => f.write_str("killed (SIGKILL)"),
            Exit::Signal(libc::SIGTERM) => f.write_str("terminated (SIGTERM)"),
            Exit::Signal(libc::SIGSEGV) => f.write_str("crashed (SIGSEGV)"),
            Exit::Signal(libc::SIGABRT) => f.write_str("aborted (SIGABRT)"),
            Exit::Signal(libc::SIGBUS) => f.write_str("crashed (SIGBUS)"),
            Exit::Signal(signal) => write!(f, "ended by signal {signal}"),
        }
    }
}

/// The signals that ask for a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// Ctrl-C.
    Interrupt,
    /// A scheduler, or `kill`.
    Terminate,
    /// The terminal is gone.
    HangUp,
    /// SIGUSR1, a scheduler's warning: the time limit is near, or another job needs the place.
    Warning,
}

impl StopSignal {
    /// As `kill -l` has it.
    pub fn name(self) -> &'static str {
        match self {
            StopSignal::Interrupt => "SIGINT",
            StopSignal::Terminate => "SIGTERM",
            StopSignal::HangUp => "SIGHUP",
            StopSignal::Warning => "SIGUSR1",
        }
    }
}

/// What the one timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// A requested stop takes too long, or what is left of a failed gang does not end.
    End,
    /// SIGTERM was not enough.
    Kill,
    /// The ranks' last words have had their time.
    Settle,
    /// Start again.
    Backoff,
}

/// What happens to the supervisor.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The coordinator has something to say.
    Coordinator(Output),
    /// The process that stands for all workers (the one worker, `mpirun` or `srun`) ended.
    Exited(Exit),
    /// The supervisor got a signal.
    Signal(StopSignal),
    /// The timer is due.
    Due(Timer),
    /// [`Timer::Settle`] is due.
    Settled {
        /// The first `error: …` line that a worker of this start wrote, without the prefix.
        said: Option<String>,
        /// The launcher's own word that it could not start them.
        launch_failure: Option<LaunchFailure>,
        /// The kernel has ended a process here for want of memory since this start.
        out_of_memory: bool,
    },
}

/// Slurm's word that a step was not started: a node or the controller does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LaunchFailure {
    /// The node, where it is one.
    pub node: Option<String>,
    /// The line.
    pub said: String,
}

impl LaunchFailure {
    /// From a line of srun's; none for any other. What another try would not change, as a step that asks for too much, is no
    /// such line.
    pub fn of(line: &str) -> Option<LaunchFailure> {
        let said = line.strip_prefix("srun: error: ")?;
        let node = said
            .starts_with("Task launch for ")
            .then(|| said.split_once("failed on node ")?.1.split(':').next().map(str::to_owned))
            .flatten();
        let of_the_controller = ["Unable to contact slurm controller", "Zero Bytes were transmitted"];
        let is_one = node.is_some()
            || said.starts_with("Application launch failed: Communication")
            || of_the_controller.iter().any(|words| said.contains(words));
        is_one.then(|| LaunchFailure { node, said: said.trim().to_owned() })
    }
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Start the workers.
    Start {
        /// Which start this is, from 0.
        generation: u32,
    },
    /// Have every rank checkpoint and stop at a step boundary.
    RequestStop {
        /// Why.
        reason: String,
    },
    /// SIGTERM to the workers' process.
    Terminate,
    /// SIGKILL to all of the workers.
    Kill,
    /// Set the timer; replaces what it was set to.
    Arm(Timer, Duration),
    /// No workers on this machine from the next start on.
    LeaveOut {
        /// By the name its ranks gave.
        host: String,
    },
    /// Write the restart down in `metrics.jsonl`.
    RecordRestart {
        /// Which start is to come.
        generation: u32,
        /// What made it necessary.
        culprit: Culprit,
    },
    /// Tell the user.
    Say(String),
    /// The run is over.
    Finish(Outcome),
}

/// How the run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The supervisor's exit code.
    pub exit_code: i32,
    /// What the ranks said of it, or why the budget is spent; `None` when it ended well or only the captured output
    /// can tell.
    pub culprit: Option<Culprit>,
}
