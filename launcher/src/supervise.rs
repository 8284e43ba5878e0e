//! What the supervisor decides: [`Supervisor::handle_event`] takes one event and returns actions; it knows no
//! process, socket or clock. The loop that feeds it is in `run.rs`.
//!
//! ```text
//!  the workers' process ends ─┐
//!  signals to the supervisor ─┤                               ┌─► Start, RequestStop, Terminate, Kill
//!  coordinator's outputs ─────┼─► handle_event(now, event) ───┤
//!  the one timer is due ──────┘                               └─► Arm, RecordRestart, Say, Finish
//! ```
//!
//! The gang lives together: a failed collective cannot be repaired from inside, so when one rank fails all are ended
//! and, while the budget lasts, started again from the last complete checkpoint. What a restart cannot help (a bad
//! recipe, bad data, no usable checkpoint, divergence) ends the run at once with its own exit code.

use std::collections::BTreeMap;
use std::time::Duration;

use mentee_cluster::{Output, Pace, Phase, Stall, StallKind, WorkerEvent};
use mentee_config::exit_code::{CHECKPOINT, DATA, DIVERGED, DONE, FAILED, PREEMPTED, RANK_FAILED, USAGE};

/// Exit codes that another start cannot change.
const FINAL: [i32; 4] = [USAGE, DATA, CHECKPOINT, DIVERGED];

/// After the first signal: time to reach a step boundary and write a checkpoint.
const STOP_GRACE: Duration = Duration::from_secs(60);
/// After one rank failed: the others usually end by themselves, with the more useful messages.
const END_GRACE: Duration = Duration::from_secs(5);
/// After one rank vanished: the others wait for it in a collective and have little to say.
const LOST_GRACE: Duration = Duration::from_secs(1);
/// After every rank said it is finished: time to leave MPI and exit.
const EXIT_GRACE: Duration = Duration::from_secs(30);
/// After SIGTERM, before SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// After the process has ended: its ranks' last words may still be on their way through the sockets.
const SETTLE: Duration = Duration::from_millis(300);
/// The same when all that is known is that ranks missed another: the cause is still to come, of a machine whose last
/// packets are late.
const SETTLE_LONGER: Duration = Duration::from_secs(2);
/// So many steps are waited for after the first signal, where they take longer than that: the one under way, and the next.
const STOP_STEPS: u32 = 3;
/// Schedulers send SIGTERM twice at once (Slurm does); only a later one means impatience.
const REPEAT: Duration = Duration::from_secs(2);
/// `timeout` sends its signal to the process and to its group: faster than anyone presses Ctrl-C twice.
const SAME_INTERRUPT: Duration = Duration::from_millis(250);
/// Failures on one node before it is left out.
const NODE_FAILURES: u32 = 2;
/// Before the first restart; doubled each time.
const BACKOFF: Duration = Duration::from_millis(500);
/// Upper bound of the above.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Before the first try after Slurm could not start the workers; doubled each time, up to the bound above. Slurm itself takes minutes
/// (`SlurmdTimeout`, 300 s by default) to see that a node is gone; then it puts the job back into the queue.
const LAUNCH_BACKOFF: Duration = Duration::from_secs(5);
/// Such tries, ten minutes in all.
const LAUNCHES: u32 = 22;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
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
        launch: Option<Launch>,
    },
}

/// Slurm's word that a step was not started: a node or the controller does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Launch {
    /// The node, where it is one.
    pub node: Option<String>,
    /// The line.
    pub said: String,
}

impl Launch {
    /// From a line of srun's; none for any other. What another try would not change, as a step that asks for too much, is no
    /// such line.
    pub fn of(line: &str) -> Option<Launch> {
        let said = line.strip_prefix("srun: error: ")?;
        let node = said
            .starts_with("Task launch for ")
            .then(|| said.split_once("failed on node ")?.1.split(':').next().map(str::to_owned))
            .flatten();
        let of_the_controller = ["Unable to contact slurm controller", "Zero Bytes were transmitted"];
        let is_one = node.is_some()
            || said.starts_with("Application launch failed: Communication")
            || of_the_controller.iter().any(|words| said.contains(words));
        is_one.then(|| Launch { node, said: said.trim().to_owned() })
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

/// How a rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Failing {
    /// By itself, with its own word.
    #[default]
    Own,
    /// Its process ended without a word.
    Vanished,
    /// It does not go on; it was ended for that.
    Stalled,
    /// Because another rank was gone or late: it is no cause itself.
    Follows,
}

/// Who failed, where, and how.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Culprit {
    /// The rank, when known.
    pub rank: Option<u32>,
    /// Its machine.
    pub host: Option<String>,
    /// Steps it had completed.
    pub step: Option<u64>,
    /// What it was doing.
    pub phase: Option<Phase>,
    /// In words, one line.
    pub cause: String,
    /// The exit code it announced.
    pub exit_code: Option<i32>,
    /// How it failed.
    pub kind: Failing,
}

impl Culprit {
    /// How much it explains. A failure that follows from another rank's gives way to that, and everything to one
    /// that names the code the run is to end with: whatever the order in which they are heard, since a rank's last
    /// word may overtake the end of another's connection.
    fn weight(&self) -> u8 {
        match self.exit_code {
            _ if self.kind == Failing::Follows => 0,
            Some(code) if FINAL.contains(&code) => 2,
            _ => 1,
        }
    }
}

impl std::fmt::Display for Culprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank}")?,
            None => f.write_str("the workers")?,
        }
        if let Some(host) = &self.host {
            write!(f, " on {host}")?;
        }
        if let Some(step) = self.step {
            write!(f, " at step {step}")?;
        }
        if let Some(phase) = self.phase {
            write!(f, " ({phase})")?;
        }
        write!(f, ": {}", self.cause)
    }
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// `longer`: it has been longer once.
    Settling {
        exit: Exit,
        longer: bool,
    },
    Waiting,
    Over,
}

/// Decides; see the module's text.
#[derive(Debug)]
pub struct Supervisor {
    max_restarts: u32,
    direct: bool,
    state: State,
    generation: u32,
    restarts: u32,
    /// There is a checkpoint to go on from.
    has_checkpoint: bool,
    stop: Option<(Duration, StopSignal)>,
    /// How long a step takes in this start of the gang, as far as it is known.
    step_time: Duration,
    /// How long the ranks were given to stop.
    stop_grace: Duration,
    /// The workers have been told to end.
    ending: bool,
    /// The coordinator speaks of this start of the gang, no more of the last.
    in_step: bool,
    culprit: Option<Culprit>,
    finished: Option<i32>,
    hosts: BTreeMap<u32, String>,
    /// Machines that workers may still be started on.
    nodes: usize,
    failures: BTreeMap<String, u32>,
    /// Starts on end that Slurm did not bring about.
    launches: u32,
}

impl Supervisor {
    /// A run that may start its workers again `max_restarts` times; returns its first actions too. `direct`: the
    /// supervised process is the worker itself, so its exit code is the worker's; `mpirun` mixes those of all ranks
    /// with signal numbers, and is believed only when no rank has spoken. `nodes`: machines of an allocation, of which
    /// those that fail twice may be left out; 1 when there is no choice.
    pub fn new(max_restarts: u32, direct: bool, nodes: usize) -> (Supervisor, Vec<Action>) {
        let supervisor = Supervisor {
            max_restarts,
            direct,
            state: State::Running,
            generation: 0,
            restarts: 0,
            has_checkpoint: false,
            stop: None,
            step_time: Duration::ZERO,
            stop_grace: STOP_GRACE,
            ending: false,
            in_step: true,
            culprit: None,
            finished: None,
            hosts: BTreeMap::new(),
            nodes,
            failures: BTreeMap::new(),
            launches: 0,
        };
        (supervisor, vec![Action::Start { generation: 0 }])
    }

    /// The run goes on from a checkpoint, from its first start on.
    pub fn goes_on(&mut self) {
        self.has_checkpoint = true;
    }

    /// Takes one event at time `now` (since any fixed moment) and says what to do.
    pub fn handle_event(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            _ if self.state == State::Over => Vec::new(),
            Event::Coordinator(output) => self.output(output),
            Event::Signal(signal) => self.signal(now, signal),
            Event::Exited(exit) if self.state == State::Running => {
                self.state = State::Settling { exit, longer: false };
                vec![Action::Arm(Timer::Settle, SETTLE)]
            }
            Event::Exited(_) => Vec::new(),
            Event::Due(timer) => self.due(timer),
            Event::Settled { said, launch } => match self.state {
                State::Settling { exit, longer } => match launch.filter(|_| self.waits_for_slurm()) {
                    Some(launch) => self.launch_again(exit, launch),
                    None => self.judge(exit, said, longer),
                },
                _ => Vec::new(),
            },
        }
    }

    fn output(&mut self, output: Output) -> Vec<Action> {
        if let Output::Gathering { generation } = output {
            self.in_step = generation == self.generation;
            return Vec::new();
        }
        if !self.in_step || self.state == State::Waiting {
            return Vec::new(); // last words of a gang that has been judged
        }
        match output {
            Output::Go { ranks, .. } => {
                self.launches = 0;
                self.hosts = ranks.into_iter().map(|hello| (hello.rank, hello.host)).collect();
                Vec::new()
            }
            Output::Event { rank, event: WorkerEvent::Failed { step, phase, message, exit_code, peers } } => {
                // Of one other rank that was waited for, that one is to be looked at.
                let (named, phase, cause) = match peers.as_deref() {
                    Some(&[peer]) => (peer, None, format!("rank {rank} missed it: {message}")),
                    _ => (rank, Some(phase), message),
                };
                let culprit = Culprit {
                    rank: Some(named),
                    host: self.hosts.get(&named).cloned(),
                    step: Some(step),
                    phase,
                    cause,
                    exit_code: Some(exit_code),
                    kind: if peers.is_some() { Failing::Follows } else { Failing::Own },
                };
                self.blame(culprit, END_GRACE)
            }
            Output::Lost { rank, host, step, phase, why: _ } => {
                let culprit = Culprit {
                    rank: Some(rank),
                    host: Some(host),
                    step: Some(step),
                    phase: Some(phase),
                    cause: "its process ended without a word".into(),
                    exit_code: None,
                    kind: Failing::Vanished,
                };
                self.blame(culprit, LOST_GRACE)
            }
            Output::Stalled { stall, host } => self.stalled(&stall, host),
            Output::Pace { pace, host } => vec![Action::Say(describe_pace(&pace, &host))],
            Output::Refused { rank, reason, ours: true, exit_code } => {
                let culprit = Culprit {
                    rank: Some(rank),
                    cause: reason,
                    exit_code: Some(exit_code),
                    ..Culprit::default()
                };
                self.blame(culprit, Duration::ZERO)
            }
            Output::Missing { ranks } => {
                let ranks: Vec<String> = ranks.iter().map(u32::to_string).collect();
                let cause = format!("rank {} never came", ranks.join(", "));
                self.blame(Culprit { cause, ..Culprit::default() }, Duration::ZERO)
            }
            Output::AllFinished { exit_code } => {
                self.finished = Some(exit_code);
                if self.state == State::Running {
                    vec![Action::Arm(Timer::End, EXIT_GRACE)]
                } else {
                    Vec::new()
                }
            }
            Output::Progress { progress, .. } => {
                if let Some(time) = progress.step_ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok())
                {
                    self.step_time = time;
                }
                Vec::new()
            }
            Output::Event { event: WorkerEvent::Checkpoint { .. }, .. } => {
                self.has_checkpoint = true;
                Vec::new()
            }
            Output::Gathering { .. } | Output::Event { .. } | Output::Refused { ours: false, .. } => {
                Vec::new()
            }
        }
    }

    /// What stands still is killed: it has nothing to say, and those that wait for it cannot hear.
    fn stalled(&mut self, stall: &Stall, host: String) -> Vec<Action> {
        if self.culprit.is_some() || self.state != State::Running {
            return Vec::new(); // it ends already
        }
        let seconds = stall.lasted.as_secs();
        let cause = match stall.kind {
            StallKind::Silent => {
                format!("stalled: no sign of life for {seconds} s, it is stopped or cut off")
            }
            StallKind::Stuck => format!("stalled: it lives, but has not gone on for {seconds} s"),
            StallKind::AllWait => {
                format!(
                    "stalled: every rank has waited for another for {seconds} s, this one is furthest behind"
                )
            }
        };
        self.culprit = Some(Culprit {
            rank: Some(stall.rank),
            host: Some(host),
            step: Some(stall.step),
            phase: Some(stall.phase),
            cause,
            exit_code: None,
            kind: Failing::Stalled,
        });
        self.ending = true;
        vec![Action::Kill, Action::Arm(Timer::Kill, KILL_GRACE)]
    }

    /// Of failures that explain as much, the first is the cause: the rest follow from it.
    fn blame(&mut self, culprit: Culprit, grace: Duration) -> Vec<Action> {
        let known = self.culprit.as_ref().map(Culprit::weight);
        let better = known.is_none_or(|known| culprit.weight() > known);
        // When the cause is known, nothing more is waited for than after it alone.
        let arms = better && known.unwrap_or(0) == 0 && !self.ending;
        if better {
            self.culprit = Some(culprit);
        }
        if self.state != State::Running || !arms {
            return Vec::new();
        }
        vec![Action::Arm(Timer::End, grace)]
    }

    fn signal(&mut self, now: Duration, signal: StopSignal) -> Vec<Action> {
        let name = signal.name();
        match self.stop {
            None => {
                self.stop = Some((now, signal));
                self.stop_grace = STOP_GRACE.max(self.step_time.saturating_mul(STOP_STEPS));
                match self.state {
                    State::Waiting => self.finish(PREEMPTED, None),
                    State::Running if self.ending || self.culprit.is_some() => {
                        vec![Action::Say(format!(
                            "{name}: the ranks are ending already and are not started again"
                        ))]
                    }
                    State::Running => vec![
                        Action::RequestStop { reason: name.into() },
                        Action::Arm(Timer::End, self.stop_grace),
                        Action::Say(format!(
                            "{name}: the ranks stop at the next step with a checkpoint (once more: kill them)"
                        )),
                    ],
                    State::Settling { .. } | State::Over => Vec::new(),
                }
            }
            // The warning was first, and the scheduler's own end comes later: no sign of impatience.
            Some((_, StopSignal::Warning)) => {
                self.stop = Some((now, signal));
                Vec::new()
            }
            Some((first, _)) if now.saturating_sub(first) < repeat(signal) => Vec::new(),
            Some(_) if signal == StopSignal::Warning => Vec::new(),
            Some(_) if self.state == State::Running => vec![
                Action::Say(format!("{name} again: the workers are killed; the last checkpoint stands")),
                Action::Kill,
                Action::Arm(Timer::Kill, KILL_GRACE),
            ],
            Some(_) => Vec::new(),
        }
    }

    fn due(&mut self, timer: Timer) -> Vec<Action> {
        match (timer, self.state) {
            (Timer::End, State::Running) => {
                self.ending = true;
                let mut actions = vec![Action::Terminate, Action::Arm(Timer::Kill, KILL_GRACE)];
                if self.stop.is_some() && self.culprit.is_none() && self.finished.is_none() {
                    let line = format!(
                        "no stop within {} s: the workers are ended; the last checkpoint stands",
                        self.stop_grace.as_secs()
                    );
                    actions.insert(0, Action::Say(line));
                }
                actions
            }
            (Timer::Kill, State::Running) => vec![Action::Kill, Action::Arm(Timer::Kill, KILL_GRACE)],
            (Timer::Backoff, State::Waiting) => {
                self.state = State::Running;
                (self.in_step, self.ending) = (false, false);
                (self.culprit, self.finished) = (None, None);
                self.step_time = Duration::ZERO;
                self.hosts.clear();
                vec![Action::Start { generation: self.generation }]
            }
            _ => Vec::new(),
        }
    }

    /// The workers are gone and all that they had to say is known.
    fn judge(&mut self, exit: Exit, said: Option<String>, longer: bool) -> Vec<Action> {
        if !longer && self.culprit.as_ref().is_some_and(|culprit| culprit.kind == Failing::Follows) {
            self.state = State::Settling { exit, longer: true };
            return vec![Action::Arm(Timer::Settle, SETTLE_LONGER)];
        }
        let mut culprit = self.culprit.take();
        if let Some(code) =
            culprit.as_ref().and_then(|culprit| culprit.exit_code).filter(|code| FINAL.contains(code))
        {
            return self.finish(code, culprit);
        }
        let code = match (self.finished, exit) {
            (Some(code), _) | (None, Exit::Code(code)) => Some(code),
            (None, Exit::Signal(_)) => None,
        };
        // A worker that ends by its own decision says why; then the code is a code and no signal's number.
        let its_own = self.direct || self.finished.is_some() || said.is_some();
        if let (Some(culprit), Some(cause)) = (&mut culprit, &said)
            && culprit.exit_code.is_none()
            && culprit.kind != Failing::Stalled
            && !is_anothers(cause, culprit.rank)
            && code.is_some_and(|code| code == FAILED || FINAL.contains(&code))
        {
            culprit.cause.clone_from(cause);
            culprit.exit_code = code;
        }
        match code {
            Some(code @ (DONE | PREEMPTED)) if culprit.is_none() || self.finished.is_some() => {
                return self.finish(code, None);
            }
            Some(code) if FINAL.contains(&code) && its_own => {
                let cause = culprit.or_else(|| Some(Culprit { cause: said?, ..Culprit::default() }));
                return self.finish(code, cause);
            }
            _ => {}
        }
        if self.stop.is_some() {
            // What ended because it was ended has nothing to say.
            return self.finish(PREEMPTED, culprit.filter(|culprit| culprit.exit_code.is_some()));
        }
        let mut culprit = culprit.unwrap_or_default();
        if culprit.cause.is_empty() {
            culprit.cause = said.unwrap_or_else(|| exit.to_string());
        } else if culprit.exit_code.is_none() && culprit.kind == Failing::Vanished {
            let whose = if self.direct { "" } else { "its launcher: " };
            culprit.cause = format!("{} ({whose}{exit})", culprit.cause);
        }
        if self.restarts >= self.max_restarts {
            return self.finish(RANK_FAILED, Some(culprit));
        }
        let wait = (BACKOFF * 2u32.saturating_pow(self.restarts)).min(MAX_BACKOFF);
        self.restarts += 1;
        let line = format!(
            "{culprit}; restart {} of {} from {} in {:.1} s",
            self.restarts,
            self.max_restarts,
            if self.has_checkpoint {
                "the last checkpoint"
            } else {
                "step 0, as there is no checkpoint yet,"
            },
            wait.as_secs_f64()
        );
        self.start_again(line, culprit, wait)
    }

    /// After `wait`, and without the culprit's machine where that failed twice and there is another.
    fn start_again(&mut self, line: String, culprit: Culprit, wait: Duration) -> Vec<Action> {
        self.generation += 1;
        self.state = State::Waiting;
        let bad = culprit
            .host
            .clone()
            .filter(|host| culprit.kind != Failing::Follows && self.failed_too_often(host));
        let mut actions =
            vec![Action::Say(line), Action::RecordRestart { generation: self.generation, culprit }];
        if let Some(host) = bad {
            self.nodes -= 1;
            actions.push(Action::LeaveOut { host });
        }
        actions.push(Action::Arm(Timer::Backoff, wait));
        actions
    }

    /// Whether the workers were not started for a reason that may pass: no rank's failure, of which there is a number.
    fn waits_for_slurm(&self) -> bool {
        self.hosts.is_empty() && self.stop.is_none() && self.launches < LAUNCHES
    }

    fn launch_again(&mut self, exit: Exit, launch: Launch) -> Vec<Action> {
        let wait = (LAUNCH_BACKOFF * 2u32.saturating_pow(self.launches)).min(MAX_BACKOFF);
        self.launches += 1;
        let culprit = Culprit {
            cause: format!("not started ({exit}): {}", launch.said),
            host: launch.node,
            ..Culprit::default()
        };
        let line = format!("{culprit}; another try in {} s, which counts as no restart", wait.as_secs());
        self.start_again(line, culprit, wait)
    }

    /// Counts a failure against its machine; whether it is to be left out now, and there is another.
    fn failed_too_often(&mut self, host: &str) -> bool {
        let failures = self.failures.entry(host.to_owned()).or_default();
        *failures += 1;
        *failures == NODE_FAILURES && self.nodes > 1
    }

    fn finish(&mut self, exit_code: i32, culprit: Option<Culprit>) -> Vec<Action> {
        self.state = State::Over;
        vec![Action::Finish(Outcome { exit_code, culprit })]
    }
}

/// A straggler in words.
fn describe_pace(pace: &Pace, host: &str) -> String {
    let Pace { rank, step, own_ms, data_ms, median_ms, slow } = pace;
    if *slow {
        format!(
            "rank {rank} on {host} holds up the others since about step {step}: {own_ms:.0} ms of its own a step \
             ({data_ms:.0} ms of it waiting for data), the median rank {median_ms:.0} ms"
        )
    } else {
        format!("rank {rank} on {host} keeps up again at step {step}: {own_ms:.0} ms of its own a step")
    }
}

/// How soon after the first signal this one is no second one.
fn repeat(signal: StopSignal) -> Duration {
    if signal == StopSignal::Interrupt { SAME_INTERRUPT } else { REPEAT }
}

/// Whether a worker's line (`rank 3: …`) is the word of another rank than this one.
fn is_anothers(line: &str, rank: Option<u32>) -> bool {
    let speaker = line.strip_prefix("rank ").and_then(|rest| rest.split_once(':'));
    speaker.and_then(|(number, _)| number.parse().ok()).is_some_and(|speaker: u32| Some(speaker) != rank)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mentee_cluster::{Hello, Progress};

    fn hello(rank: u32) -> Hello {
        Hello {
            rank,
            world_size: 2,
            host: format!("host{rank}"),
            pid: 1,
            plan_hash: "p".into(),
            data_digest: "d".into(),
            version: "0".into(),
        }
    }

    fn go() -> Event {
        Event::Coordinator(Output::Go { generation: 0, ranks: vec![hello(0), hello(1)] })
    }

    fn failed(rank: u32, exit_code: i32) -> Event {
        let message = format!("rank {rank} says {exit_code}");
        let event = WorkerEvent::Failed { step: 8, phase: Phase::Update, message, exit_code, peers: None };
        Event::Coordinator(Output::Event { rank, event })
    }

    fn missed(rank: u32, peers: &[u32]) -> Event {
        let message = format!("rank {rank} waited in vain");
        let peers = Some(peers.to_vec());
        let event = WorkerEvent::Failed { step: 8, phase: Phase::Reduce, message, exit_code: 1, peers };
        Event::Coordinator(Output::Event { rank, event })
    }

    fn gathering(generation: u32) -> Event {
        Event::Coordinator(Output::Gathering { generation })
    }

    fn lost(rank: u32) -> Event {
        let host = format!("host{rank}");
        Event::Coordinator(Output::Lost { rank, host, step: 7, phase: Phase::Backward, why: "x".into() })
    }

    fn refused(exit_code: i32) -> Event {
        Event::Coordinator(Output::Refused { rank: 1, reason: "no".into(), ours: true, exit_code })
    }

    fn finished(exit_code: i32) -> Event {
        Event::Coordinator(Output::AllFinished { exit_code })
    }

    fn run(max_restarts: u32, events: Vec<Event>) -> Vec<Action> {
        let (mut supervisor, mut actions) = Supervisor::new(max_restarts, false, 1);
        for (second, event) in events.into_iter().enumerate() {
            actions.extend(supervisor.handle_event(Duration::from_secs(10 * second as u64), event));
        }
        actions
    }

    fn end(actions: &[Action]) -> Option<(i32, Option<&Culprit>)> {
        match actions.last() {
            Some(Action::Finish(outcome)) => Some((outcome.exit_code, outcome.culprit.as_ref())),
            _ => None,
        }
    }

    const SETTLED: Event = Event::Settled { said: None, launch: None };
    const KILLED: Event = Event::Exited(Exit::Signal(libc::SIGKILL));

    /// Events without any restart left, and the exit code they end with.
    #[test]
    fn how_a_run_ends() {
        let exited = |code| Event::Exited(Exit::Code(code));
        let interrupt = Event::Signal(StopSignal::Interrupt);
        let said = Event::Settled { said: Some("what was wrong".into()), launch: None };
        let table: Vec<(&str, Vec<Event>, i32)> = vec![
            ("all is well", vec![go(), finished(0), exited(0), SETTLED], 0),
            ("last words after the end of the process", vec![go(), exited(0), finished(0), SETTLED], 0),
            ("a worker that knows no coordinator", vec![exited(0), SETTLED], 0),
            ("mpirun stumbles after all ranks finished", vec![go(), finished(0), exited(9), SETTLED], 0),
            ("bad recipe, before hello", vec![exited(2), said.clone()], 2),
            (
                "bad data, after hello but without a message",
                vec![go(), lost(0), lost(1), exited(3), said.clone()],
                3,
            ),
            ("a crash by a signal whose number looks like a code", vec![go(), exited(4), SETTLED], 5),
            (
                "bad data, said by the rank, mpirun adds its own code",
                vec![go(), failed(1, 3), exited(15), SETTLED],
                3,
            ),
            ("no usable checkpoint", vec![exited(4), said.clone()], 4),
            ("diverged", vec![go(), failed(0, 6), failed(1, 1), exited(6), SETTLED], 6),
            (
                "diverged, but the other rank's broken connection came first",
                vec![go(), lost(1), failed(0, 6), exited(6), SETTLED],
                6,
            ),
            ("a crash", vec![go(), lost(1), KILLED, SETTLED], 5),
            ("a crash whose mpirun says 2", vec![go(), lost(1), exited(2), SETTLED], 5),
            ("a failure of its own", vec![go(), failed(1, 1), exited(1), SETTLED], 5),
            ("exit 0 of mpirun although a rank was lost", vec![go(), lost(1), exited(0), SETTLED], 5),
            ("refused", vec![refused(2), exited(1), SETTLED], 2),
            ("refused: it sees other data", vec![refused(3), exited(1), SETTLED], 3),
            ("preempted by someone else", vec![go(), finished(75), exited(75), SETTLED], 75),
            ("stopped", vec![go(), interrupt.clone(), finished(75), exited(75), SETTLED], 75),
            (
                "stopped, but it was done already",
                vec![go(), interrupt.clone(), finished(0), exited(0), SETTLED],
                0,
            ),
            ("stopped, then killed", vec![go(), interrupt.clone(), interrupt.clone(), KILLED, SETTLED], 75),
            ("a rank crashes while stopping", vec![go(), interrupt.clone(), lost(0), exited(1), SETTLED], 75),
            ("a signal while the dust settles", vec![go(), lost(0), exited(1), interrupt, SETTLED], 75),
        ];
        for (name, events, code) in table {
            let actions = run(0, events);
            assert_eq!(end(&actions).map(|(code, _)| code), Some(code), "{name}: {actions:?}");
        }
    }

    #[test]
    fn the_exit_code_of_a_single_worker_is_its_own() {
        let end = |direct| {
            let (mut supervisor, _) = Supervisor::new(0, direct, 1);
            let mut actions = Vec::new();
            for event in [go(), lost(0), Event::Exited(Exit::Code(DIVERGED)), SETTLED] {
                actions.extend(supervisor.handle_event(Duration::ZERO, event));
            }
            end(&actions).map(|(code, _)| code)
        };
        assert_eq!(end(true), Some(DIVERGED));
        assert_eq!(end(false), Some(RANK_FAILED), "mpirun's 6 may be an abort");
    }

    #[test]
    fn a_crash_is_restarted_until_the_budget_is_spent() {
        let crash =
            |generation| [gathering(generation), go(), lost(1), KILLED, SETTLED, Event::Due(Timer::Backoff)];
        let actions = run(2, (0..3).flat_map(crash).collect());
        let starts: Vec<u32> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Start { generation } => Some(*generation),
                _ => None,
            })
            .collect();
        assert_eq!(starts, [0, 1, 2]);
        let waits: Vec<Duration> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Arm(Timer::Backoff, wait) => Some(*wait),
                _ => None,
            })
            .collect();
        assert_eq!(waits, [BACKOFF, 2 * BACKOFF]);
        let (code, culprit) = end(&actions).expect("over");
        assert_eq!(code, RANK_FAILED);
        assert_eq!(
            culprit.expect("named").to_string(),
            "rank 1 on host1 at step 7 (backward): its process ended without a word (its launcher: killed (SIGKILL))"
        );
        assert_eq!(actions.iter().filter(|action| matches!(action, Action::RecordRestart { .. })).count(), 2);
    }

    #[test]
    fn the_first_failure_is_the_cause() {
        let actions =
            run(0, vec![go(), failed(1, 1), failed(0, 1), lost(0), Event::Exited(Exit::Code(1)), SETTLED]);
        let (_, culprit) = end(&actions).expect("over");
        assert_eq!(culprit.expect("named").to_string(), "rank 1 on host1 at step 8 (update): rank 1 says 1");
    }

    /// Every order in which three ranks' last words can be heard, before and after the end of their launcher.
    #[test]
    fn the_cause_is_named_whatever_the_order_of_last_words() {
        let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let killed = [lost(1), missed(0, &[]), missed(2, &[1])];
        let failed_by_itself = [failed(1, 1), missed(0, &[]), missed(2, &[1])];
        let diverged = [failed(1, DIVERGED), missed(0, &[]), lost(2)];
        let table: [(&str, [Event; 3], &str); 3] = [
            ("killed", killed, "rank 1 on host1 at step 7 (backward): its process ended without a word"),
            ("failed", failed_by_itself, "rank 1 on host1 at step 8 (update): rank 1 says 1"),
            ("diverged", diverged, "rank 1 on host1 at step 8 (update): rank 1 says 6"),
        ];
        for (name, words, expected) in table {
            for order in orders {
                for heard_before in 0..=3 {
                    let mut events: Vec<Event> = order.iter().map(|&n| words[n].clone()).collect();
                    events.insert(heard_before, Event::Exited(Exit::Code(1)));
                    events.insert(0, go());
                    events.extend([SETTLED, SETTLED]);
                    let actions = run(0, events);
                    let (_, culprit) = end(&actions).expect("over");
                    let said = culprit.expect("named").to_string();
                    assert!(said.starts_with(expected), "{name}, {order:?}, {heard_before} before: {said}");
                }
            }
        }
    }

    #[test]
    fn a_rank_that_missed_another_is_no_cause_and_no_mark_against_its_machine() {
        // The cause is waited for a little longer than usual, once.
        let actions = run(0, vec![go(), missed(0, &[]), Event::Exited(Exit::Code(1)), SETTLED]);
        assert_eq!(actions.last(), Some(&Action::Arm(Timer::Settle, SETTLE_LONGER)));
        let actions = run(0, vec![go(), missed(0, &[]), Event::Exited(Exit::Code(1)), SETTLED, SETTLED]);
        let (_, culprit) = end(&actions).expect("over");
        let alone = "rank 0 on host0 at step 8 (reduce): rank 0 waited in vain";
        assert_eq!(culprit.expect("named").to_string(), alone);
        let actions = run(0, vec![go(), missed(0, &[1]), Event::Exited(Exit::Code(1)), SETTLED, SETTLED]);
        let (_, culprit) = end(&actions).expect("over");
        let absent = "rank 1 on host1 at step 8: rank 0 missed it: rank 0 waited in vain";
        assert_eq!(culprit.expect("named").to_string(), absent);

        let (mut supervisor, mut actions) = Supervisor::new(9, false, 2);
        for generation in 0..4 {
            let crash = [
                gathering(generation),
                go(),
                missed(0, &[]),
                Event::Exited(Exit::Code(1)),
                SETTLED,
                SETTLED,
                Event::Due(Timer::Backoff),
            ];
            for event in crash {
                actions.extend(supervisor.handle_event(Duration::ZERO, event));
            }
        }
        assert!(!actions.iter().any(|action| matches!(action, Action::LeaveOut { .. })), "{actions:?}");
    }

    #[test]
    fn once_the_cause_is_known_no_more_is_waited_for_than_after_it_alone() {
        let grace = |events: Vec<Event>| match run(0, events).last() {
            Some(Action::Arm(Timer::End, grace)) => *grace,
            other => panic!("{other:?}"),
        };
        assert_eq!(grace(vec![go(), missed(0, &[])]), END_GRACE);
        assert_eq!(grace(vec![go(), missed(0, &[]), lost(1)]), LOST_GRACE);
        assert_eq!(grace(vec![go(), lost(1), missed(0, &[])]), LOST_GRACE);
        // What has been told to end is not told again later.
        let actions = run(0, vec![go(), missed(0, &[]), Event::Due(Timer::End), lost(1)]);
        assert_eq!(actions.last(), Some(&Action::Arm(Timer::Kill, KILL_GRACE)));
    }

    #[test]
    fn what_stands_still_is_killed_named_and_started_again() {
        let stalled = |kind| {
            let (rank, step, phase) = (1, 7, Phase::Backward);
            let stall = Stall { rank, step, phase, kind, lasted: Duration::from_secs(61) };
            Event::Coordinator(Output::Stalled { stall, host: "host1".into() })
        };
        // The others' ends follow from being killed.
        let actions =
            run(1, vec![go(), stalled(StallKind::Stuck), missed(0, &[]), lost(1), lost(0), KILLED, SETTLED]);
        assert_eq!(actions[1..3], [Action::Kill, Action::Arm(Timer::Kill, KILL_GRACE)]);
        let named = actions.iter().find_map(|action| match action {
            Action::RecordRestart { culprit, .. } => Some(culprit.to_string()),
            _ => None,
        });
        assert_eq!(
            named.as_deref(),
            Some("rank 1 on host1 at step 7 (backward): stalled: it lives, but has not gone on for 61 s")
        );
        let ends = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
        assert_eq!(ends, 0, "SIGKILL is not followed by anything milder");
        // A gang that ends already is left to end.
        let actions = run(1, vec![go(), lost(0), stalled(StallKind::Silent)]);
        assert_eq!(actions.last(), Some(&Action::Arm(Timer::End, LOST_GRACE)));
    }

    #[test]
    fn last_words_of_a_gang_that_was_judged_are_not_the_next_ones() {
        for late in [lost(0), missed(0, &[1]), finished(75), failed(0, 3)] {
            let (mut supervisor, _) = Supervisor::new(9, false, 2);
            let mut actions = Vec::new();
            for event in [
                go(),
                lost(1),
                KILLED,
                SETTLED,
                late.clone(),
                Event::Due(Timer::Backoff),
                late.clone(),
                gathering(1),
                go(),
                lost(1),
                KILLED,
                SETTLED,
            ] {
                actions.extend(supervisor.handle_event(Duration::ZERO, event));
            }
            let reasons: Vec<Option<u32>> = actions
                .iter()
                .filter_map(|action| match action {
                    Action::RecordRestart { culprit, .. } => Some(culprit.rank),
                    _ => None,
                })
                .collect();
            assert_eq!(reasons, [Some(1), Some(1)], "{late:?}: {actions:?}");
            let ends = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
            assert_eq!(ends, 2, "{late:?}: both gangs are ended");
            assert!(actions.contains(&Action::LeaveOut { host: "host1".into() }), "{late:?}");
        }
    }

    #[test]
    fn what_a_worker_said_is_better_than_that_it_went() {
        let said = |text: &str| Event::Settled { said: Some(text.into()), launch: None };
        let actions = run(0, vec![go(), lost(1), Event::Exited(Exit::Code(1)), said("disk full")]);
        let (_, culprit) = end(&actions).expect("over");
        assert_eq!(culprit.expect("named").to_string(), "rank 1 on host1 at step 7 (backward): disk full");
        let actions =
            run(0, vec![go(), lost(1), Event::Exited(Exit::Code(1)), said("rank 0: step 8: waited for 1")]);
        let (_, culprit) = end(&actions).expect("over");
        assert!(culprit.expect("named").cause.starts_with("its process ended without a word"));
        // Of a rank that was killed, another's complaint is no explanation.
        let actions = run(0, vec![go(), lost(1), Event::Exited(Exit::Code(9)), said("peer lost")]);
        let (_, culprit) = end(&actions).expect("over");
        assert!(culprit.expect("named").cause.starts_with("its process ended without a word"));
    }

    #[test]
    fn a_gang_that_does_not_end_is_ended() {
        let actions = run(0, vec![go(), lost(1), lost(0), Event::Due(Timer::End), Event::Due(Timer::Kill)]);
        let expected = [
            Action::Start { generation: 0 },
            Action::Arm(Timer::End, LOST_GRACE),
            Action::Terminate,
            Action::Arm(Timer::Kill, KILL_GRACE),
            Action::Kill,
            Action::Arm(Timer::Kill, KILL_GRACE),
        ];
        assert_eq!(actions, expected);
    }

    #[test]
    fn a_stop_is_asked_for_once_and_then_enforced() {
        let actions = run(3, vec![go(), Event::Signal(StopSignal::Terminate), Event::Due(Timer::End)]);
        assert!(actions.contains(&Action::RequestStop { reason: "SIGTERM".into() }));
        assert!(actions.ends_with(&[Action::Terminate, Action::Arm(Timer::Kill, KILL_GRACE)]), "{actions:?}");
    }

    #[test]
    fn a_restart_says_whether_there_is_something_to_go_on_from() {
        let saved = WorkerEvent::Checkpoint { step: 3, path: String::new(), digest: String::new() };
        let saved = Event::Coordinator(Output::Event { rank: 0, event: saved });
        let said = |events: Vec<Event>| {
            let says = |action| match action {
                Action::Say(line) if line.contains("restart 1 of 1") => Some(line),
                _ => None,
            };
            run(1, events).into_iter().find_map(says).expect("a restart")
        };
        let line = said(vec![go(), lost(1), KILLED, SETTLED]);
        assert!(
            line.contains("restart 1 of 1 from step 0, as there is no checkpoint yet, in 0.5 s"),
            "{line}"
        );
        let line = said(vec![go(), saved, lost(1), KILLED, SETTLED]);
        assert!(line.contains("restart 1 of 1 from the last checkpoint in 0.5 s"), "{line}");
    }

    #[test]
    fn a_stop_waits_for_steps_that_take_long() {
        let grace = |step_ms: f64| {
            let progress = Progress { step: 7, step_ms: Some(step_ms), ..Progress::default() };
            let events = vec![
                go(),
                Event::Coordinator(Output::Progress { rank: 0, progress }),
                Event::Signal(StopSignal::Warning),
            ];
            let arms = run(3, events).into_iter().find_map(|action| match action {
                Action::Arm(Timer::End, grace) => Some(grace),
                _ => None,
            });
            arms.expect("a time limit")
        };
        assert_eq!(grace(2_000.0), STOP_GRACE);
        assert_eq!(grace(100_000.0), Duration::from_secs(300));
        assert_eq!(grace(f64::INFINITY), STOP_GRACE);
        assert_eq!(grace(1e22), Duration::MAX);
    }

    #[test]
    fn a_schedulers_double_sigterm_is_one() {
        let (mut supervisor, _) = Supervisor::new(0, false, 1);
        let mut send = |milliseconds, signal| {
            supervisor.handle_event(Duration::from_millis(milliseconds), Event::Signal(signal))
        };
        assert!(!send(0, StopSignal::Terminate).is_empty());
        assert!(send(100, StopSignal::Terminate).is_empty());
        assert!(send(2500, StopSignal::Terminate).contains(&Action::Kill));
        let (mut supervisor, _) = Supervisor::new(0, false, 1);
        assert!(!supervisor.handle_event(Duration::ZERO, Event::Signal(StopSignal::Interrupt)).is_empty());
        let again = supervisor.handle_event(Duration::from_millis(300), Event::Signal(StopSignal::Interrupt));
        assert!(again.contains(&Action::Kill), "a person pressing Ctrl-C twice means it");
        // `timeout` signals the process and then its group.
        let (mut supervisor, _) = Supervisor::new(0, false, 1);
        supervisor.handle_event(Duration::ZERO, Event::Signal(StopSignal::Interrupt));
        let twice = supervisor.handle_event(Duration::from_millis(2), Event::Signal(StopSignal::Interrupt));
        assert_eq!(twice, []);
    }

    #[test]
    fn a_schedulers_end_after_its_warning_is_no_impatience() {
        let warned =
            |more: Vec<Event>| run(3, [vec![go(), Event::Signal(StopSignal::Warning)], more].concat());
        let term = Event::Signal(StopSignal::Terminate);
        // The events of `run` come ten seconds apart.
        let actions = warned(vec![term.clone()]);
        assert!(actions.contains(&Action::RequestStop { reason: "SIGUSR1".into() }));
        assert!(!actions.contains(&Action::Kill), "preemption: SIGUSR1, then SIGTERM: {actions:?}");
        assert!(warned(vec![term.clone(), term.clone()]).contains(&Action::Kill), "SIGTERM twice");
        let again = Event::Signal(StopSignal::Warning);
        assert!(!run(3, vec![go(), term, again.clone(), again]).contains(&Action::Kill), "a late warning");
    }

    #[test]
    fn a_machine_that_failed_twice_is_left_out_while_there_is_another() {
        let crashes = |nodes: usize, ranks: &[u32]| {
            let (mut supervisor, mut actions) = Supervisor::new(9, false, nodes);
            for (generation, &rank) in ranks.iter().enumerate() {
                let gathering = gathering(generation as u32);
                for event in [gathering, go(), lost(rank), KILLED, SETTLED, Event::Due(Timer::Backoff)] {
                    actions.extend(supervisor.handle_event(Duration::ZERO, event));
                }
            }
            let starts = actions.iter().filter(|action| matches!(action, Action::Start { .. })).count();
            assert_eq!(starts, 1 + ranks.len());
            actions
                .into_iter()
                .filter_map(|action| match action {
                    Action::LeaveOut { host } => Some(host),
                    _ => None,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(crashes(2, &[1, 0]), [""; 0], "once each");
        assert_eq!(crashes(2, &[1, 0, 1]), ["host1"]);
        assert_eq!(crashes(2, &[1, 1, 1, 0, 0]), ["host1"], "never the last one");
        assert_eq!(crashes(3, &[1, 1, 0, 0]), ["host1", "host0"]);
        assert_eq!(crashes(1, &[1, 1, 1]), [""; 0]);
    }

    #[test]
    fn a_stop_while_waiting_to_restart_ends_at_once() {
        let actions = run(
            3,
            vec![
                go(),
                lost(1),
                KILLED,
                SETTLED,
                Event::Signal(StopSignal::Interrupt),
                Event::Due(Timer::Backoff),
            ],
        );
        assert_eq!(end(&actions), Some((PREEMPTED, None)));
    }

    #[test]
    fn a_last_checkpoint_that_fails_is_told() {
        let stop = Event::Signal(StopSignal::Interrupt);
        let actions = run(3, vec![go(), stop, failed(1, 1), Event::Exited(Exit::Code(1)), SETTLED]);
        let Some((exit_code, culprit)) = end(&actions) else { panic!("it ends: {actions:?}") };
        assert_eq!(exit_code, PREEMPTED, "the same command continues it");
        assert!(culprit.is_some_and(|culprit| culprit.cause.contains("rank 1 says 1")));
    }

    #[test]
    fn a_stop_of_ranks_that_are_ending_gives_them_no_more_time() {
        let actions = run(3, vec![go(), lost(1), Event::Signal(StopSignal::Interrupt)]);
        let times = actions.iter().filter(|action| matches!(action, Action::Arm(Timer::End, _))).count();
        assert_eq!(times, 1, "{actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, Action::RequestStop { .. })));
    }

    #[test]
    fn late_events_of_a_finished_run_do_nothing() {
        let mut events = vec![go(), finished(0), Event::Exited(Exit::Code(0)), SETTLED];
        let over = run(0, events.clone()).len();
        events.extend([
            lost(0),
            failed(1, 3),
            KILLED,
            SETTLED,
            Event::Signal(StopSignal::HangUp),
            Event::Due(Timer::Kill),
        ]);
        assert_eq!(run(0, events).len(), over);
    }

    #[test]
    fn what_slurm_did_not_start_is_tried_again_and_costs_no_restart() {
        let line =
            "srun: error: Task launch for StepId=15.3 failed on node n2: Communication connection failure";
        let launch = Launch::of(line).expect("a launch that failed");
        assert_eq!(launch.node.as_deref(), Some("n2"));
        let controller = "srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)";
        assert_eq!(Launch::of(controller).expect("the controller").node, None);
        for other in [
            "error: Task launch for StepId=15.3 failed on node n2: x",
            "srun: error: n2: task 1: Killed",
            "srun: error: Unable to create step for job 15: Requested node configuration is not available",
        ] {
            assert_eq!(Launch::of(other), None, "{other}");
        }

        let (mut supervisor, _) = Supervisor::new(1, false, 2);
        let mut fail = |launch: &Launch| {
            supervisor.handle_event(Duration::ZERO, Event::Exited(Exit::Code(1)));
            let settled = Event::Settled { said: None, launch: Some(launch.clone()) };
            let actions = supervisor.handle_event(Duration::ZERO, settled);
            supervisor.handle_event(Duration::ZERO, Event::Due(Timer::Backoff));
            actions
        };
        let first = fail(&launch);
        let said = "the workers on n2: not started (exit code 1): Task launch for StepId=15.3 failed on node n2: \
                    Communication connection failure; another try in 5 s, which counts as no restart";
        assert!(matches!(&first[0], Action::Say(line) if line == said), "{first:?}");
        assert!(!first.iter().any(|action| matches!(action, Action::LeaveOut { .. })));
        let second = fail(&launch);
        assert!(second.contains(&Action::LeaveOut { host: "n2".into() }), "{second:?}");
        assert!(second.contains(&Action::Arm(Timer::Backoff, 2 * LAUNCH_BACKOFF)));
        let controller = Launch::of(controller).expect("the controller");
        for _ in 2..LAUNCHES {
            assert!(fail(&controller).iter().any(|action| matches!(action, Action::Arm(Timer::Backoff, _))));
        }
        // Then they count, of which one is allowed.
        assert!(matches!(&fail(&controller)[0], Action::Say(line) if line.contains("restart 1 of 1")));
        assert!(matches!(&fail(&controller)[0], Action::Finish(outcome) if outcome.exit_code == RANK_FAILED));
    }

    #[test]
    fn a_launch_that_failed_later_is_a_ranks_failure() {
        let (mut supervisor, _) = Supervisor::new(3, false, 2);
        let launch = Launch { node: Some("n2".into()), said: "x".into() };
        let mut events = |events: Vec<Event>| {
            events
                .into_iter()
                .flat_map(|event| supervisor.handle_event(Duration::ZERO, event))
                .collect::<Vec<_>>()
        };
        let settled = Event::Settled { said: None, launch: Some(launch) };
        let actions = events(vec![go(), lost(1), Event::Exited(Exit::Code(1)), settled]);
        assert!(
            actions
                .iter()
                .any(|action| matches!(action, Action::Say(line) if line.contains("restart 1 of 3")))
        );
    }
}
