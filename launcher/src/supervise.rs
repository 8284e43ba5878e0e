//! What the supervisor decides: [`Supervisor::handle_event`] takes one event and returns actions; it knows no
//! process, socket or clock. The loop that feeds it is in `shell.rs`.
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

mod culprit;
mod event;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use mentee_cluster::{Output, Pace, Stall, StallKind, WorkerEvent};
use mentee_config::exit_code::{DONE, FAILED, PREEMPTED, RANK_FAILED};

use culprit::FINAL;
pub use culprit::{Culprit, Failing};
pub use event::{Action, Event, Exit, LaunchFailure, Outcome, StopSignal, Timer};

/// After the first signal: time to reach a step boundary and write a checkpoint, at least and unless told otherwise.
pub const STOP_GRACE: Duration = Duration::from_secs(60);
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
const MAX_FAILED_LAUNCHES: u32 = 22;

/// What is said beside a failure when the kernel has ended a process for want of memory.
const OUT_OF_MEMORY: &str = "; the memory limit was reached: the kernel ended a process (oom_kill): ask for more memory (--mem of \
                             Slurm), or lower schedule.global_batch or parallel.decode_threads";

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
    /// What a stop may take at least.
    pub least_stop_grace: Duration,
    /// The workers have been told to end.
    ending: bool,
    /// The coordinator speaks of this start of the gang, no more of the last.
    hears_this_generation: bool,
    culprit: Option<Culprit>,
    finished: Option<i32>,
    hosts: BTreeMap<u32, String>,
    /// Machines that workers may still be started on.
    nodes: usize,
    failures: BTreeMap<String, u32>,
    /// Starts on end that Slurm did not bring about.
    failed_launches: u32,
}

impl Supervisor {
    /// A run that may start its workers again `max_restarts` times; returns its first actions too. `direct`: the
    /// supervised process is the worker itself, so its exit code is the worker's; `mpirun` mixes those of all ranks
    /// with signal numbers, and is believed only when no rank has spoken. `nodes`: machines of an allocation, of which
    /// those that fail twice may be left out; 1 when there is no choice. `has_checkpoint`: the run goes on from one, from its
    /// first start on.
    pub fn new(
        max_restarts: u32,
        direct: bool,
        nodes: usize,
        has_checkpoint: bool,
    ) -> (Supervisor, Vec<Action>) {
        let supervisor = Supervisor {
            max_restarts,
            direct,
            state: State::Running,
            generation: 0,
            restarts: 0,
            has_checkpoint,
            stop: None,
            step_time: Duration::ZERO,
            stop_grace: STOP_GRACE,
            least_stop_grace: STOP_GRACE,
            ending: false,
            hears_this_generation: true,
            culprit: None,
            finished: None,
            hosts: BTreeMap::new(),
            nodes,
            failures: BTreeMap::new(),
            failed_launches: 0,
        };
        (supervisor, vec![Action::Start { generation: 0 }])
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
            Event::Settled { said, launch_failure, out_of_memory } => match self.state {
                State::Settling { exit, longer } => match launch_failure.filter(|_| self.waits_for_slurm()) {
                    Some(failure) => self.launch_again(exit, failure),
                    None if !longer && self.cause_is_to_come() => {
                        self.state = State::Settling { exit, longer: true };
                        vec![Action::Arm(Timer::Settle, SETTLE_LONGER)]
                    }
                    None => self.judge(exit, said, out_of_memory),
                },
                _ => Vec::new(),
            },
        }
    }

    fn output(&mut self, output: Output) -> Vec<Action> {
        if let Output::Gathering { generation } = output {
            self.hears_this_generation = generation == self.generation;
            return Vec::new();
        }
        if !self.hears_this_generation || self.state == State::Waiting {
            return Vec::new(); // last words of a gang that has been judged
        }
        match output {
            Output::Go { ranks, .. } => {
                self.failed_launches = 0;
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
                self.stop_grace = self.least_stop_grace.max(self.step_time.saturating_mul(STOP_STEPS));
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
                (self.hears_this_generation, self.ending) = (false, false);
                (self.culprit, self.finished) = (None, None);
                self.step_time = Duration::ZERO;
                self.hosts.clear();
                vec![Action::Start { generation: self.generation }]
            }
            _ => Vec::new(),
        }
    }

    /// All that is known is that ranks missed another.
    fn cause_is_to_come(&self) -> bool {
        self.culprit.as_ref().is_some_and(|culprit| culprit.kind == Failing::Follows)
    }

    /// The workers are gone and all that they had to say is known.
    fn judge(&mut self, exit: Exit, said: Option<String>, out_of_memory: bool) -> Vec<Action> {
        let code = match (self.finished, exit) {
            (Some(code), _) | (None, Exit::Code(code)) => Some(code),
            (None, Exit::Signal(_)) => None,
        };
        let said = said.as_deref();
        let culprit = self.culprit.take().map(|culprit| with_word(culprit, said, code));
        if let Some(Outcome { exit_code, culprit }) = self.end_of_run(culprit.as_ref(), said, code) {
            return self.finish(exit_code, culprit);
        }
        let culprit = self.with_exit(culprit.unwrap_or_default(), said, exit, out_of_memory);
        if self.restarts < self.max_restarts {
            self.restart(culprit)
        } else {
            self.finish(RANK_FAILED, Some(culprit))
        }
    }

    /// How the run ends, where no other start is to follow, whatever number of them is left.
    fn end_of_run(
        &self,
        culprit: Option<&Culprit>,
        said: Option<&str>,
        code: Option<i32>,
    ) -> Option<Outcome> {
        let with = |exit_code, culprit: Option<&Culprit>| Outcome { exit_code, culprit: culprit.cloned() };
        let announced = culprit.and_then(|culprit| culprit.exit_code).filter(|code| FINAL.contains(code));
        if let Some(code) = announced {
            return Some(with(code, culprit));
        }
        // A worker that ends by its own decision says why; then the code is a code and no signal's number.
        let its_own = self.direct || self.finished.is_some() || said.is_some();
        match code {
            Some(code @ (DONE | PREEMPTED)) if culprit.is_none() || self.finished.is_some() => {
                Some(with(code, None))
            }
            Some(code) if FINAL.contains(&code) && its_own => {
                let word = said.map(|said| Culprit { cause: said.to_owned(), ..Culprit::default() });
                Some(with(code, culprit.or(word.as_ref())))
            }
            // What ended because it was ended has nothing to say.
            _ if self.stop.is_some() => {
                Some(with(PREEMPTED, culprit.filter(|culprit| culprit.exit_code.is_some())))
            }
            _ => None,
        }
    }

    /// The culprit with what the end of the workers' process says of it.
    fn with_exit(
        &self,
        mut culprit: Culprit,
        said: Option<&str>,
        exit: Exit,
        out_of_memory: bool,
    ) -> Culprit {
        let exit = if self.direct { exit.to_string() } else { exit.of_a_launcher() };
        if culprit.cause.is_empty() {
            culprit.cause = said.map_or(exit, str::to_owned);
        } else if culprit.exit_code.is_none() && culprit.kind == Failing::Vanished {
            let whose = if self.direct { "" } else { "its launcher: " };
            culprit.cause = format!("{} ({whose}{exit})", culprit.cause);
        }
        if out_of_memory {
            culprit.cause.push_str(OUT_OF_MEMORY);
        }
        culprit
    }

    fn restart(&mut self, culprit: Culprit) -> Vec<Action> {
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
        let host = culprit.host.clone().filter(|_| culprit.kind != Failing::Follows);
        if let Some(host) = &host {
            *self.failures.entry(host.clone()).or_default() += 1;
        }
        let bad = host.filter(|host| self.is_to_be_left_out(host));
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
        self.hosts.is_empty() && self.stop.is_none() && self.failed_launches < MAX_FAILED_LAUNCHES
    }

    fn launch_again(&mut self, exit: Exit, failure: LaunchFailure) -> Vec<Action> {
        let wait = (LAUNCH_BACKOFF * 2u32.saturating_pow(self.failed_launches)).min(MAX_BACKOFF);
        self.failed_launches += 1;
        let culprit = Culprit {
            cause: format!("not started ({exit}): {}", failure.said),
            host: failure.node,
            ..Culprit::default()
        };
        let line = format!("{culprit}; another try in {} s, which counts as no restart", wait.as_secs());
        self.start_again(line, culprit, wait)
    }

    /// Whether a machine has just failed once too often, and there is another.
    fn is_to_be_left_out(&self, host: &str) -> bool {
        self.failures.get(host) == Some(&NODE_FAILURES) && self.nodes > 1
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

/// The culprit with the workers' own word of what was wrong, where it gave none itself and that is no other rank's complaint.
fn with_word(mut culprit: Culprit, said: Option<&str>, code: Option<i32>) -> Culprit {
    if let Some(cause) = said
        && culprit.exit_code.is_none()
        && culprit.kind != Failing::Stalled
        && !is_anothers(cause, culprit.rank)
        && code.is_some_and(|code| code == FAILED || FINAL.contains(&code))
    {
        cause.clone_into(&mut culprit.cause);
        culprit.exit_code = code;
    }
    culprit
}

/// Whether a worker's line (`rank 3: …`) is the word of another rank than this one.
fn is_anothers(line: &str, rank: Option<u32>) -> bool {
    let speaker = line.strip_prefix("rank ").and_then(|rest| rest.split_once(':'));
    speaker.and_then(|(number, _)| number.parse().ok()).is_some_and(|speaker: u32| Some(speaker) != rank)
}
