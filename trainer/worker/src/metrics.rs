//! `RUN/metrics.jsonl`: one JSON object a line, appended by rank 0. Keys are a contract (README, "A run directory").

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::WorkerError;
use crate::reducer::Communication;

/// One logged step.
#[derive(Debug, Clone, Serialize)]
pub struct TrainLine {
    pub kind: &'static str,
    /// Updates done, this one included.
    pub step: u64,
    /// Epochs begun before this update, from 0.
    pub epoch: u64,
    /// Seconds since 1970.
    pub time: f64,
    pub loss: f64,
    pub lr: f64,
    pub tau: f64,
    pub grad_norm: f64,
    pub z_std: f64,
    /// Over all ranks, since the last line.
    pub images_per_s: f64,
    /// Means since the last line.
    pub step_ms: f64,
    pub data_wait_ms: f64,
    /// Summing gradients over ranks.
    pub comm_total_ms: f64,
    /// The part of it that training waited for.
    pub comm_exposed_ms: f64,
    pub world_size: u32,
    /// Memory of rank 0.
    pub rss_mb: f64,
}

/// One evaluation, percent.
#[derive(Debug, Clone, Serialize)]
pub struct EvalLine {
    pub kind: &'static str,
    pub step: u64,
    pub epoch: u64,
    pub time: f64,
    pub knn_top1: f64,
    pub knn_random_init: f64,
    pub knn_raw_pixels: f64,
    pub protocol: String,
}

/// One checkpoint written.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointLine {
    pub kind: &'static str,
    pub step: u64,
    pub epoch: u64,
    pub time: f64,
    /// Of all state.
    pub digest: String,
    /// From the copy to the commit, beside training.
    pub write_ms: f64,
    /// What training waited for: the checkpoint before this one,
    pub wait_ms: f64,
    /// and the copy.
    pub copy_ms: f64,
}

/// What is kept for a disk that is full at the moment, as it may be while a checkpoint is being written; more is an error.
const MAX_PENDING_BYTES: usize = 1 << 20;

/// The file, on rank 0; nothing on the others.
#[derive(Debug)]
pub struct Metrics {
    file: Option<(File, PathBuf)>,
    /// Not written yet.
    pending: Vec<u8>,
}

impl Metrics {
    /// Appends to the run's file. A line that a crash cut in half is ended first, so that it spoils no other.
    pub fn open(run_dir: &Path, rank: u32) -> Result<Self, WorkerError> {
        if rank != 0 {
            return Ok(Self { file: None, pending: Vec::new() });
        }
        let path = run_dir.join("metrics.jsonl");
        let torn = std::fs::read(&path).is_ok_and(|text| text.last().is_some_and(|&byte| byte != b'\n'));
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(WorkerError::io("open", &path))?;
        if torn {
            file.write_all(b"\n").map_err(WorkerError::io("write", &path))?;
        }
        Ok(Self { file: Some((file, path)), pending: Vec::new() })
    }

    /// Writes one line at once, or with a later one if there is no room for it now.
    pub fn write(&mut self, line: &impl Serialize) -> Result<(), WorkerError> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        serde_json::to_writer(&mut self.pending, line)
            .map_err(|error| WorkerError::Failed(error.to_string()))?;
        self.pending.push(b'\n');
        while !self.pending.is_empty() {
            match file.write(&self.pending) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_no_room(&error) && self.pending.len() < MAX_PENDING_BYTES => break,
                Err(error) => return Err(WorkerError::io("write", &*path)(error)),
            }
        }
        Ok(())
    }
}

fn is_no_room(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Sums over the steps between two lines.
#[derive(Debug, Default)]
pub struct Meter {
    steps: u32,
    step: Duration,
    data_wait: Duration,
    communication: Communication,
}

/// Means over the steps between two lines, milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    pub step_ms: f64,
    pub data_wait_ms: f64,
    pub comm_total_ms: f64,
    pub comm_exposed_ms: f64,
}

impl Meter {
    /// Adds one step.
    pub fn add(&mut self, step: Duration, data_wait: Duration, communication: Communication) {
        self.steps += 1;
        self.step += step;
        self.data_wait += data_wait;
        self.communication.total += communication.total;
        self.communication.exposed += communication.exposed;
    }

    /// Takes the means and starts anew.
    pub fn take(&mut self) -> Means {
        let mean = |total: Duration| total.as_secs_f64() * 1e3 / f64::from(self.steps.max(1));
        let means = Means {
            step_ms: mean(self.step),
            data_wait_ms: mean(self.data_wait),
            comm_total_ms: mean(self.communication.total),
            comm_exposed_ms: mean(self.communication.exposed),
        };
        *self = Self::default();
        means
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// Memory in use by this process, MiB (0 where /proc does not say).
pub fn rss_mb() -> f64 {
    status_kib("VmRSS:") / 1024.0
}

/// The most memory this process has used, MiB.
pub fn peak_rss_mb() -> f64 {
    status_kib("VmHWM:") / 1024.0
}

fn status_kib(key: &str) -> f64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
        })
        .unwrap_or(0.0)
}
