//! This rank's link to its coordinator: the supervisor's when `mentee run` started it; rank 0's own when a bare
//! `mpirun` or `srun` did; none for a single process started by hand.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mentee_cluster::words::{self, Lines};
use mentee_cluster::{
    Agreement, CoordinatorAddress, CoordinatorHandle, Hello, LastWords, Link, Phase, Progress, Shares,
    StepTimes, StopReason, WorkerEvent, coordinator::STALL, server,
};
use mentee_collectives::mpi;
use mentee_config::{exit_code, say};

use crate::error::{self, WorkerError};
use crate::lane::Communication;
use crate::times::{self, Clock};
use crate::waits::Waits;
use crate::world::World;

/// All ranks must have said hello by then: loading libraries over a cold network file system takes a while.
const RENDEZVOUS: Duration = Duration::from_secs(300);
/// The coordinator must have taken in by then why this process ends at once.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Ranks that wait for the same one give up about as long after each other.
const OTHERS_FIRST: Duration = Duration::from_secs(1);

/// Reports to whoever watches this rank.
pub struct Reporter {
    link: Option<Link>,
    hosted: Option<CoordinatorHandle>,
    /// None when a supervisor shows progress, or another rank prints it.
    words: Option<Lines>,
    now: Progress,
    clock: Clock,
    waits: Arc<Waits>,
    /// When the step began, and what had been waited for then: calls to other ranks, the device.
    began: (Instant, [Duration; 2]),
    /// The failure that ends this rank has been told.
    has_failed: bool,
}

impl Reporter {
    /// Connects, or hosts the coordinator that the other ranks connect to.
    pub fn connect(world: &World, plan_hash: &str, data_digest: &str) -> Result<Self, WorkerError> {
        let World { identity, collectives, waits, .. } = world;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let supervisor = supervisor();
        let mut hosted = None;
        let address = match &supervisor {
            Some(address) => Some(address.clone()),
            None if identity.world_size == 1 => None,
            None => {
                let mut message = Vec::new();
                if identity.rank == 0 {
                    let io = |error| WorkerError::Failed(format!("cannot host the coordinator: {error}"));
                    let agreement = Agreement {
                        token: server::fresh_token().map_err(io)?,
                        world_size: identity.world_size,
                        plan_hash: Some(plan_hash.to_owned()),
                        version: version.clone(),
                        stall: STALL,
                    };
                    server::allow_open_files(identity.world_size).map_err(io)?;
                    let one_machine = identity.local_size == identity.world_size;
                    let interface = one_machine.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
                    let handle = server::start_thread(interface, agreement).map_err(io)?;
                    message = serde_json::to_vec(&handle.address)
                        .map_err(|error| WorkerError::Failed(error.to_string()))?;
                    hosted = Some(handle);
                }
                let all = collectives.all_gather(&message)?;
                let address = serde_json::from_slice(&all[0]).map_err(|error| {
                    WorkerError::Failed(format!("rank 0 sent no coordinator address: {error}"))
                })?;
                Some(address)
            }
        };
        let link = match address {
            Some(address) => {
                let hello = Hello {
                    rank: identity.rank,
                    world_size: identity.world_size,
                    host: server::hostname(),
                    pid: std::process::id(),
                    plan_hash: plan_hash.to_owned(),
                    data_digest: data_digest.to_owned(),
                    version,
                };
                Some(Link::connect_with(&address, hello, RENDEZVOUS, waits.vitals.clone())?.0)
            }
            None => None,
        };
        if let Some(link) = &link {
            speak_at_the_end(link.last_words());
        }
        let prints = supervisor.is_none() && identity.rank == 0;
        let start = Instant::now();
        let words = prints.then(|| Lines::new(start));
        let clock = Clock::new(start);
        let (now, waits, began) = (Progress::default(), waits.clone(), (start, [Duration::ZERO; 2]));
        Ok(Self { link, hosted, words, now, clock, waits, began, has_failed: false })
    }

    /// Whether `mentee run` started this rank, and passes on what it prints.
    pub fn is_supervised() -> bool {
        supervisor().is_some()
    }

    /// Where this rank's time went: means over the `steps` since the last call.
    pub fn take_times(&mut self, steps: u32) -> StepTimes {
        self.clock.take(Instant::now(), self.waits.total(), steps)
    }

    /// The way by which checkpoints are committed; the first call gets it, if there is a coordinator.
    pub fn shares(&mut self) -> Option<Shares> {
        self.link.as_mut()?.shares()
    }

    /// What this rank does now.
    pub fn phase(&mut self, phase: Phase) {
        self.now.phase = phase;
        self.clock.enter(Instant::now(), self.waits.total(), phase);
        if let Some(link) = &self.link {
            link.phase(phase);
        }
    }

    /// `done` steps were done before this start.
    pub fn resumed(&self, done: u64) {
        self.waits.vitals.step(done);
        if let Some(link) = &self.link {
            link.news();
        }
    }

    /// A step begins, with the wait for its data.
    pub fn begin_step(&mut self) {
        self.began = (Instant::now(), [self.waits.total(), self.waits.device()]);
        self.phase(Phase::DataWait);
    }

    /// The sums of gradients are done.
    pub fn reduced(&mut self, communication: Communication) {
        self.clock.was_backward(Instant::now(), self.waits.total(), communication.device);
    }

    /// Time since the step began that this rank waited neither for others nor for its device; with the sums of its gradients.
    pub fn own_time(&self, communication: Communication) -> Duration {
        let (began, [calls, _]) = self.began;
        let calls = self.waits.total().saturating_sub(calls);
        began.elapsed().saturating_sub(calls + self.device_wait(communication) + communication.exposed)
    }

    fn device_wait(&self, communication: Communication) -> Duration {
        let (_, [_, device]) = self.began;
        self.waits.device().saturating_sub(device) + communication.device
    }

    /// Step number `done` is done, of which this rank waited so long for data.
    pub fn end_step(&mut self, done: u64, data_wait: Duration, communication: Communication) {
        let (own, device) = (self.own_time(communication), self.device_wait(communication));
        self.waits.vitals.worked(own, data_wait, device);
        self.waits.vitals.step(done);
        if let Some(link) = &self.link {
            link.news();
        }
    }

    /// A step is to be shown.
    pub fn step(&mut self, progress: Progress) {
        self.now = progress.clone();
        self.print(&progress);
        self.log_times(&progress);
        if let Some(link) = &self.link {
            link.report(progress);
        }
        // Nobody but this rank's own terminal listens to a coordinator hosted here.
        if let Some(handle) = &mut self.hosted {
            while handle.events.try_recv().is_some() {}
        }
    }

    /// Something that must not be lost.
    pub fn event(&mut self, event: WorkerEvent) {
        if let Some(line) = words::evaluated(&event).filter(|_| self.words.is_some()) {
            say!("{line}");
        }
        if let Some(link) = &self.link {
            link.event(event);
        }
    }

    /// Whether the supervisor asks for an end, or is gone.
    pub fn stop_requested(&self) -> bool {
        self.link.as_ref().is_some_and(Link::stop_requested)
    }

    /// Why, for the log.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.link.as_ref().and_then(Link::stop_reason)
    }

    /// Tells what ends this rank, unless another rank says it; once.
    pub fn fails(&mut self, error: &WorkerError) {
        if std::mem::replace(&mut self.has_failed, true) {
            return;
        }
        let (step, phase) = (self.waits.vitals.steps(), self.now.phase);
        let (message, exit_code, peers) = (error.to_string(), error.exit_code(), error.peers());
        if error.is_silent() {
            tracing::info!(step, %phase, "ends: {message}");
        } else {
            tracing::error!(step, %phase, "{message}");
        }
        self.event(if error.is_silent() {
            WorkerEvent::Finished { exit_code }
        } else {
            WorkerEvent::Failed { step, phase, message, exit_code, peers }
        });
    }

    /// The last word of a rank that fails.
    pub fn failed(mut self, error: &WorkerError) {
        self.fails(error);
        self.close();
    }

    /// Delivers what is queued and hangs up.
    pub fn close(self) {
        if let Some(link) = self.link {
            link.close();
        }
    }

    /// Every few seconds and at the end, for `mentee monitor` and `mentee report`.
    fn log_times(&mut self, progress: &Progress) {
        let last = progress.step == progress.total_steps;
        let Some((steps, times)) = self.clock.due(Instant::now(), last) else { return };
        tracing::debug!(
            target: times::TARGET,
            step = progress.step,
            total_steps = progress.total_steps,
            steps,
            step_ms = progress.step_ms,
            data_wait_ms = times.data_wait_ms,
            forward_ms = times.forward_ms,
            backward_ms = times.backward_ms,
            comm_ms = times.comm_ms,
            update_ms = times.update_ms,
            rss_mb = progress.rss_mb,
            "where time went"
        );
    }

    fn print(&mut self, progress: &Progress) {
        let Some(words) = &mut self.words else { return };
        let (now, progress) = (Instant::now(), Progress { logged: progress.step, ..progress.clone() });
        words.note(now, &progress);
        if let Some(line) = words.due(now, &progress) {
            say!("{line}");
        }
    }
}

/// A wait for other ranks that MPI ends together with the process reaches no [`Reporter::failed`].
fn speak_at_the_end(link: LastWords) {
    mpi::set_last_words(move |kind, line| {
        let failed = |step, phase| {
            let message = format!("step {step}: {line}");
            tracing::error!(step, %phase, "{message}");
            WorkerEvent::Failed {
                step,
                phase,
                message,
                exit_code: exit_code::FAILED,
                peers: error::missed(kind),
            }
        };
        link.say(failed, LAST_WORDS);
        // Others that wait for the same rank are to say so too: of those that end without a word one would be blamed.
        std::thread::sleep(OTHERS_FIRST);
    });
}

fn supervisor() -> Option<CoordinatorAddress> {
    CoordinatorAddress::from_env(&|name| std::env::var(name).ok())
}
