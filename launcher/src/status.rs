//! `RUN/status.json`, which the supervisor keeps, and `mentee status`, which reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use mentee_checkpoint as checkpoint;
use mentee_cluster::words::clock;
use mentee_cluster::{Hello, Phase, Progress, StepTimes};
use mentee_config::replace::write_often;
use mentee_config::{counted, show};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::printable::{printable, printable_json};
use crate::rundir::{RunDir, unix_time};
use crate::slurm::{self, Jobs, Known, Record};
use crate::submit::Sweep;

/// A supervisor writes every second; what is older than so many seconds is no news.
const FRESH_S: f64 = 10.0;
/// A network file system may show another machine what was there a minute ago; after so many seconds it is silence.
const SILENT_S: f64 = 90.0;

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

impl State {
    /// Whether a supervisor is at work on it.
    pub fn is_alive(self) -> bool {
        matches!(self, State::Starting | State::Running | State::Stopping | State::Restarting)
    }

    /// One word, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Restarting => "restarting",
            State::Done => "done",
            State::Preempted => "preempted",
            State::Failed => "failed",
            State::Interrupted => "interrupted",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())?;
        if matches!(self, State::Preempted | State::Interrupted) {
            f.write_str(" (the same command continues it)")?;
        }
        Ok(())
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
    /// Seconds since 1970 when the ranks of this start were told to go; 0 before.
    #[serde(default)]
    pub going_since: f64,
    /// How often this supervisor has started the gang again.
    #[serde(default)]
    pub restarts: u32,
    /// The newest evaluation it was told of, percent.
    #[serde(default)]
    pub knn_top1: Option<f64>,
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
    /// Of a rank that holds up the others: its own work a step by the median rank's.
    #[serde(default)]
    pub times_slower: Option<f64>,
    /// Where they went.
    #[serde(default)]
    pub times: Option<StepTimes>,
    /// Memory of its process, MiB.
    #[serde(default)]
    pub rss_mb: Option<f64>,
}

impl Rank {
    /// A rank that has just said hello.
    pub fn new(hello: Hello) -> Rank {
        Rank {
            host: hello.host,
            pid: hello.pid,
            step: 0,
            phase: Phase::Starting,
            step_ms: None,
            times_slower: None,
            times: None,
            rss_mb: None,
        }
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
            going_since: 0.0,
            restarts: 0,
            knn_top1: None,
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
        if let Err(error) = write_often(&run.status(), &text) {
            tracing::warn!("cannot write {}: {error}", run.status().display());
        }
    }

    /// Reads it, and corrects the state when the supervisor is gone without a word.
    pub fn read(run: &RunDir) -> Option<Status> {
        let mut status: Status = serde_json::from_slice(&std::fs::read(run.status()).ok()?).ok()?;
        // The lock is not always visible from another machine, and some file systems have none; a fresh status is, and a process.
        let here = status.host == mentee_cluster::server::hostname();
        let is_gone = here && !Path::new(&format!("/proc/{}", status.pid)).exists();
        let is_old = unix_time() - status.updated > FRESH_S;
        if status.state.is_alive() && !run.is_locked() && (is_gone || is_old) {
            status.state = State::Interrupted;
        }
        Some(status)
    }

    /// In words, how long a supervisor that should be at work has been silent; `now` in seconds since 1970.
    fn silence(&self, now: f64) -> Option<String> {
        let silent = Some(now - self.updated).filter(|&s| self.state.is_alive() && s > SILENT_S)?;
        let silent = Duration::try_from_secs_f64(silent).ok()?;
        let here = self.host == mentee_cluster::server::hostname();
        let clocks = if here { "" } else { ", or the clocks of the two machines differ" };
        Some(format!(
            "nothing new for {}: its supervisor (process {} on {}) is stopped, or its disk does not answer{clocks}",
            clock(silent),
            self.pid,
            printable(&self.host)
        ))
    }
}

/// A submitted run's job and what Slurm says of it.
fn slurm_job(run: &RunDir, ask: impl FnOnce(&str) -> Known) -> Option<(Record, Known)> {
    let record = Record::read(run)?;
    let job = ask(&record.job);
    Some((record, job))
}

/// The same for programs.
fn slurm_json(slurm: Option<&(Record, Known)>) -> serde_json::Value {
    match slurm {
        None => serde_json::json!({ "record": null, "job": null }),
        Some((record, Ok(job))) => serde_json::json!({ "record": record, "job": job }),
        Some((record, Err(why))) => serde_json::json!({ "record": record, "job": null, "error": why }),
    }
}

/// The job in words.
fn describe(record: &Record, job: &Known) -> String {
    let known = slurm::describe(job);
    let returns = record
        .requeues
        .last()
        .map_or(String::new(), |last| format!(", put back by its supervisor at step {}", last.step));
    printable(&format!("job {}: {known}{returns}", record.job))
}

/// `mentee status RUN [--json]`, also of a directory with the runs of an array.
///
/// # Errors
/// When there is no run.
pub fn command(path: &Path, json: bool) -> Result<(), Failure> {
    if let Some(sweep) = Sweep::read(path) {
        return table(path, &sweep, json);
    }
    let run = RunDir::existing(path)?;
    let slurm = slurm_job(&run, slurm::query);
    let status = Status::read(&run);
    let metrics = Metrics::read_without_steps(&run.metrics())?;
    let checkpoints: Vec<u64> = checkpoint::list(&run.checkpoints())?
        .into_iter()
        .filter(|entry| entry.state.is_ok())
        .map(|entry| entry.step)
        .collect();
    if json {
        let value = serde_json::json!({
            "run_dir": run.path(),
            "slurm": slurm.as_ref().map(|slurm| slurm_json(Some(slurm))),
            "status": status,
            "last_train": metrics.last_train(),
            "last_eval": metrics.eval_to_show(u64::MAX),
            "restarts": metrics.restarts().len(),
            "checkpoints": checkpoints,
        });
        show!("{}", printable_json(&format!("{value:#}")));
        return Ok(());
    }
    show!("{}", printable(&run.path().display().to_string()));
    if let Some((record, job)) = &slurm {
        show!("  {}", describe(record, job));
    }
    match &status {
        None if slurm.is_some() => show!("  has not started yet"),
        None => show!("  started without a supervisor (no status.json); from its metrics:"),
        Some(status) => {
            show!("  {}: {}", printable(&status.name), status.state);
            if let Some(error) = &status.error {
                show!("  error: {}", printable(error));
            }
            if let Some(silence) = status.silence(unix_time()) {
                show!("  {silence}");
            }
        }
    }
    if let Some(train) = metrics.last_train() {
        let number = |key: &str| train.number(key).map_or("?".into(), |value| format!("{value:.4}"));
        let total = status.as_ref().map(|status| status.progress.total_steps).filter(|&total| total > 0);
        let total = total.map_or(String::new(), |total| format!("/{total}"));
        show!("  step {}{total}, loss {}, z_std {}", train.step, number("loss"), number("z_std"));
    }
    if let Some(status) = status.as_ref().filter(|status| status.state == State::Running) {
        if let Some(rate) = status.progress.images_per_s {
            show!("  {rate:.0} images/s");
        }
        if let Some(left) = status.eta_s.and_then(|left| Duration::try_from_secs_f64(left).ok()) {
            show!("  {} to go", clock(left));
        }
        for (rank, at) in &status.ranks {
            let slow = at.times_slower.map_or(String::new(), |times| {
                format!(", holds up the others: {times:.1} times the median's own work")
            });
            let host = printable(&at.host);
            show!("  rank {rank} on {host} (process {}): step {}, {}{slow}", at.pid, at.step, at.phase);
        }
    }
    if let Some(eval) = metrics.eval_to_show(u64::MAX) {
        let on = printable(&eval.on());
        if !on.is_empty() || metrics.last_train().is_none_or(|train| train.step != eval.step) {
            show!("  evaluation of step {}{on}:", eval.step);
        }
        for line in eval.table() {
            show!("  {line}");
        }
    }
    match checkpoints.last() {
        Some(step) => {
            show!("  {}, the newest at step {step}", counted(checkpoints.len() as u64, "checkpoint"))
        }
        None => show!("  no checkpoint yet"),
    }
    if !metrics.restarts().is_empty() {
        show!("  {}", counted(metrics.restarts().len() as u64, "restart"));
    }
    Ok(())
}

/// One line for each run of an array.
fn table(folder: &Path, sweep: &Sweep, json: bool) -> Result<(), Failure> {
    let mut rows = vec![["run", "job", "state", "step", "loss", "set"].map(str::to_owned)];
    let mut values = Vec::new();
    let mut jobs = Jobs::default();
    for (index, sets) in sweep.variants.iter().enumerate() {
        let run = RunDir::at(&folder.join(index.to_string()))?;
        let (status, slurm) = (Status::read(&run), slurm_job(&run, |job| jobs.query(job)));
        let metrics = Metrics::read_without_steps(&run.metrics())?;
        let job = slurm.as_ref().and_then(|(_, job)| job.as_ref().ok()?.as_ref());
        let state = match (&status, job) {
            // A job that waits says more than what the run was doing when it last stopped.
            (_, Some(job)) if job.state == "PENDING" => job.to_string(),
            (Some(status), _) => {
                let words = status.state.to_string();
                words.split(" (").next().unwrap_or_default().to_owned()
            }
            (None, Some(job)) => job.to_string(),
            (None, None) => "not started".to_owned(),
        };
        let train = metrics.last_train();
        let total = status.as_ref().map_or(0, |status| status.progress.total_steps);
        let step = train.map_or("-".to_owned(), |line| match total {
            0 => line.step.to_string(),
            total => format!("{}/{total}", line.step),
        });
        let loss = train.and_then(|line| line.number("loss"));
        let loss = loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let name = slurm.as_ref().map_or("-".to_owned(), |(record, _)| record.job.clone());
        values.push(serde_json::json!({
            "run_dir": run.path(),
            "sets": sets,
            "slurm": slurm_json(slurm.as_ref()),
            "status": status,
            "last_train": train,
            "last_eval": metrics.eval_to_show(u64::MAX),
        }));
        let row = [index.to_string(), name, state, step, loss, sets.join(" ")];
        rows.push(row.map(|cell| printable(&cell)));
    }
    if json {
        show!("{}", printable_json(&format!("{:#}", serde_json::Value::Array(values))));
        return Ok(());
    }
    let runs = counted(sweep.variants.len() as u64, "run");
    show!("{}: {runs}", printable(&folder.display().to_string()));
    let widths: [usize; 6] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        show!("  {}", cells.join("  ").trim_end());
    }
    if let Some(why) = jobs.failed() {
        show!("  Slurm could not be asked ({})", printable(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_that_is_silent_is_told_unless_it_has_ended() {
        let mut status = Status::new("x", 1);
        (status.updated, status.pid, status.host) = (1000.0, 7, "here".into());
        assert_eq!(status.silence(1080.0), None);
        let silence = status.silence(1200.0).expect("long");
        assert!(
            silence.starts_with("nothing new for 3:20: its supervisor (process 7 on here) is"),
            "{silence}"
        );
        status.state = State::Done;
        assert_eq!(status.silence(1200.0), None);
    }
}
