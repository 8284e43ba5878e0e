//! `RUN/status.json`, which the supervisor keeps, and `mentee status`, which reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use mentee_checkpoint as checkpoint;
use mentee_cluster::{Hello, Phase, Progress};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::progress::clock;
use crate::rundir::{RunDir, unix_time, write_atomically};

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The workers are on their way.
    Starting,
    /// Training.
    Running,
    /// Asked to stop, writing a checkpoint.
    Stopping,
    /// Failed, about to start again.
    Restarting,
    /// Finished.
    Done,
    /// Stopped on request; the same command continues it.
    Preempted,
    /// Ended with an error.
    Failed,
    /// Its supervisor is gone without a word; the same command continues it.
    Interrupted,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Restarting => "restarting",
            State::Done => "done",
            State::Preempted => "preempted (the same command continues it)",
            State::Failed => "failed",
            State::Interrupted => "interrupted (the same command continues it)",
        })
    }
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// Name in the recipe.
    pub name: String,
    /// The supervisor's machine.
    pub host: String,
    /// The supervisor's process id there.
    pub pid: u32,
    /// Workers.
    pub workers: u32,
    /// Which start of the gang this is, from 0.
    pub generation: u32,
    /// Rank 0's newest state.
    pub progress: Progress,
    /// Seconds left at the present rate.
    pub eta_s: Option<f64>,
    /// Seconds since 1970 of the last change.
    pub updated: f64,
    /// The supervisor's exit code once it has one.
    pub exit_code: Option<i32>,
    /// Why it failed.
    pub error: Option<String>,
    /// Every rank.
    pub ranks: BTreeMap<u32, Rank>,
}

/// Where a rank stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rank {
    /// Its machine.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// Steps completed.
    pub step: u64,
    /// What it is doing.
    pub phase: Phase,
    /// Milliseconds of its last step.
    pub step_ms: Option<f64>,
}

impl Rank {
    /// A rank that has just said hello.
    pub fn new(hello: Hello) -> Rank {
        Rank { host: hello.host, pid: hello.pid, step: 0, phase: Phase::Starting, step_ms: None }
    }
}

impl Status {
    /// A run that starts.
    pub fn new(name: &str, workers: u32) -> Status {
        Status {
            state: State::Starting,
            name: name.to_owned(),
            host: mentee_cluster::server::hostname(),
            pid: std::process::id(),
            workers,
            generation: 0,
            progress: Progress::default(),
            eta_s: None,
            updated: unix_time(),
            exit_code: None,
            error: None,
            ranks: BTreeMap::new(),
        }
    }

    /// Writes it down; losing one is harmless, the next comes within a second.
    pub fn write(&mut self, run: &RunDir) {
        self.updated = unix_time();
        let text = serde_json::to_vec_pretty(self).expect("a status is JSON");
        if let Err(error) = write_atomically(&run.status(), &text) {
            tracing::warn!("cannot write {}: {error}", run.status().display());
        }
    }

    /// Reads it, and corrects the state when the supervisor is gone without a word.
    pub fn read(run: &RunDir) -> Option<Status> {
        let mut status: Status = serde_json::from_slice(&std::fs::read(run.status()).ok()?).ok()?;
        let alive =
            matches!(status.state, State::Starting | State::Running | State::Stopping | State::Restarting);
        // The lock is not always visible from another machine; a fresh status is.
        let here = status.host == mentee_cluster::server::hostname();
        if alive && !run.is_locked() && (here || unix_time() - status.updated > 10.0) {
            status.state = State::Interrupted;
        }
        Some(status)
    }
}

/// `mentee status RUN [--json]`.
///
/// # Errors
/// When there is no run.
pub fn command(path: &Path, json: bool) -> Result<(), Failure> {
    let run = RunDir::existing(path)?;
    let status = Status::read(&run);
    let metrics = Metrics::read(&run.metrics())?;
    let checkpoints: Vec<u64> = checkpoint::list(&run.checkpoints())?
        .into_iter()
        .filter(|entry| entry.state.is_ok())
        .map(|entry| entry.step)
        .collect();
    if json {
        let value = serde_json::json!({
            "run_dir": run.path(),
            "status": status,
            "last_train": metrics.last_train(),
            "last_eval": metrics.last_eval(),
            "restarts": metrics.restarts().len(),
            "checkpoints": checkpoints,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!("{}", run.path().display());
    match &status {
        None => println!("  started without a supervisor (no status.json); from its metrics:"),
        Some(status) => {
            println!("  {}: {}", status.name, status.state);
            if let Some(error) = &status.error {
                println!("  error: {error}");
            }
        }
    }
    if let Some(train) = metrics.last_train() {
        let number = |key: &str| train.number(key).map_or("?".into(), |value| format!("{value:.4}"));
        let total = status.as_ref().map(|status| status.progress.total_steps).filter(|&total| total > 0);
        let total = total.map_or(String::new(), |total| format!("/{total}"));
        println!("  step {}{total}, loss {}, z_std {}", train.step, number("loss"), number("z_std"));
    }
    if let Some(status) = status.as_ref().filter(|status| status.state == State::Running) {
        if let Some(rate) = status.progress.images_per_s {
            println!("  {rate:.0} images/s");
        }
        if let Some(left) = status.eta_s.and_then(|left| Duration::try_from_secs_f64(left).ok()) {
            println!("  {} to go", clock(left));
        }
        for (rank, at) in &status.ranks {
            println!("  rank {rank} on {} (process {}): step {}, {}", at.host, at.pid, at.step, at.phase);
        }
    }
    if let Some(eval) = metrics.last_eval() {
        for line in eval.table() {
            println!("  {line}");
        }
    }
    match checkpoints.last() {
        Some(step) => println!("  {} checkpoints, the newest at step {step}", checkpoints.len()),
        None => println!("  no checkpoint yet"),
    }
    if !metrics.restarts().is_empty() {
        println!("  {} restarts", metrics.restarts().len());
    }
    Ok(())
}
