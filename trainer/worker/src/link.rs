//! This rank's link to its coordinator: the supervisor's when `mentee run` started it; rank 0's own when a bare
//! `mpirun` or `srun` did; none for a single process started by hand.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use mentee_cluster::{
    Agreement, CoordinatorAddress, CoordinatorHandle, Hello, Identity, Link, Phase, Progress, Shares,
    WorkerEvent, server,
};
use mentee_collectives::Collectives;

use crate::error::WorkerError;

/// All ranks must have said hello by then: loading libraries over a cold network file system takes a while.
const RENDEZVOUS: Duration = Duration::from_secs(300);
/// How often progress is printed when nobody else shows it.
const PRINT_EVERY: Duration = Duration::from_secs(2);

/// Reports to whoever watches this rank.
pub struct Reporter {
    link: Option<Link>,
    hosted: Option<CoordinatorHandle>,
    /// When progress was last printed; none when a supervisor shows it or another rank prints it.
    printed: Option<Instant>,
    start: Instant,
    first_step: Option<u64>,
    now: Progress,
}

impl Reporter {
    /// Connects, or hosts the coordinator that the other ranks connect to.
    pub fn connect(
        identity: &Identity,
        collectives: &dyn Collectives,
        plan_hash: &str,
        data_digest: &str,
    ) -> Result<Self, WorkerError> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let supervisor = CoordinatorAddress::from_env(&|name| std::env::var(name).ok());
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
                    };
                    let one_machine = identity.local_size == identity.world_size;
                    let interface = if one_machine { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
                    let handle = server::start_thread(IpAddr::V4(interface), agreement).map_err(io)?;
                    message = serde_json::to_vec(&handle.address)
                        .map_err(|error| WorkerError::Failed(error.to_string()))?;
                    hosted = Some(handle);
                }
                let all = collectives
                    .all_gather(&message)
                    .map_err(|source| WorkerError::Collective { step: 0, source })?;
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
                Some(Link::connect(&address, hello, RENDEZVOUS)?.0)
            }
            None => None,
        };
        let prints = supervisor.is_none() && identity.rank == 0;
        let start = Instant::now();
        let printed = prints.then_some(start);
        Ok(Self { link, hosted, printed, start, first_step: None, now: Progress::default() })
    }

    /// The way by which checkpoints are committed; the first call gets it, if there is a coordinator.
    pub fn shares(&mut self) -> Option<Shares> {
        self.link.as_mut()?.shares()
    }

    /// What this rank does now.
    pub fn phase(&mut self, phase: Phase) {
        self.now.phase = phase;
        if let Some(link) = &self.link {
            link.phase(phase);
        }
    }

    /// A step is done.
    pub fn step(&mut self, progress: Progress) {
        self.now = progress.clone();
        self.print(&progress);
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
        if let (Some(_), WorkerEvent::Eval { knn_top1, knn_random_init, knn_raw_pixels, protocol, .. }) =
            (self.printed, &event)
        {
            let floor = |value: &Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.1} %"));
            println!(
                "kNN {knn_top1:.1} % · random init {} · raw pixels {} · {protocol}",
                floor(knn_random_init),
                floor(knn_raw_pixels)
            );
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
    pub fn stop_reason(&self) -> Option<String> {
        self.link.as_ref().and_then(Link::stop_reason).map(|reason| reason.to_string())
    }

    /// The last word of a rank that fails: what happened, unless another rank says it.
    pub fn failed(mut self, error: &WorkerError) {
        let (step, phase) = (self.now.step, self.now.phase);
        let (message, exit_code) = (error.to_string(), error.exit_code());
        tracing::error!(step, %phase, "{message}");
        self.event(if error.is_silent() {
            WorkerEvent::Finished { exit_code }
        } else {
            WorkerEvent::Failed { step, phase, message, exit_code }
        });
        self.close();
    }

    /// Delivers what is queued and hangs up.
    pub fn close(self) {
        if let Some(link) = self.link {
            link.close();
        }
    }

    fn print(&mut self, progress: &Progress) {
        let done = progress.step;
        let first = *self.first_step.get_or_insert(done.saturating_sub(1));
        let Some(printed) = &mut self.printed else { return };
        if printed.elapsed() < PRINT_EVERY && done < progress.total_steps {
            return;
        }
        *printed = Instant::now();
        let per_step = self.start.elapsed().as_secs_f64() / (done - first).max(1) as f64;
        let left = (progress.total_steps - done) as f64 * per_step;
        println!(
            "epoch {}/{} · step {done}/{} · loss {:.4} · {:.0} images/s · {} left",
            (progress.epoch + 1).min(progress.epochs),
            progress.epochs,
            progress.total_steps,
            progress.loss.unwrap_or(f64::NAN),
            progress.images_per_s.unwrap_or(0.0),
            human(left),
        );
    }
}

fn human(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}
