//! `RUN/metrics.jsonl`: one JSON object a line, appended by rank 0. Keys are a contract (docs/monitoring.md,
//! "The numbers"). The numbers of every line go to TensorBoard too.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use crate::append::Appended;
use crate::error::WorkerError;
use crate::lane::Communication;
use crate::tensorboard::EventFile;

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
    /// Accuracy of the online probe since the last line, percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online_top1: Option<f64>,
    /// Over all ranks, since the last line.
    pub images_per_s: f64,
    /// Means since the last line.
    pub step_ms: f64,
    pub data_wait_ms: f64,
    /// Summing gradients over ranks.
    pub comm_total_ms: f64,
    /// The part of it that training waited for.
    pub comm_exposed_ms: f64,
    /// Where rank 0's time went; see `StepTimes`.
    pub forward_ms: f64,
    pub backward_ms: f64,
    pub comm_ms: f64,
    pub update_ms: f64,
    pub world_size: u32,
    /// Memory of rank 0.
    pub rss_mb: f64,
}

/// One evaluation, percent; what was not measured is left out.
#[derive(Debug, Clone, Serialize)]
pub struct EvalLine {
    pub kind: &'static str,
    pub step: u64,
    pub epoch: u64,
    pub time: f64,
    /// Where the images are, if they are not the run's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub knn_top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub knn_random_init: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub knn_raw_pixels: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub knn_grid: Vec<GridPoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear_top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear_random_init: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear_raw_pixels: Option<f64>,
    /// Singular values of the bank's features over the largest, falling, at most 128.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub spectrum: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective_rank: Option<f64>,
    pub protocol: String,
}

/// kNN under one setting, percent.
#[derive(Debug, Clone, Serialize)]
pub struct GridPoint {
    pub k: u64,
    pub temperature: f64,
    pub knn_top1: f64,
    pub knn_random_init: f64,
    pub knn_raw_pixels: f64,
}

impl EvalLine {
    /// With nothing measured yet.
    pub fn new(step: u64, epoch: u64) -> Self {
        Self {
            kind: "eval",
            step,
            epoch,
            time: now(),
            data: None,
            knn_top1: None,
            knn_random_init: None,
            knn_raw_pixels: None,
            knn_grid: Vec::new(),
            linear_top1: None,
            linear_random_init: None,
            linear_raw_pixels: None,
            spectrum: Vec::new(),
            effective_rank: None,
            protocol: String::new(),
        }
    }

    /// Adds what one of the numbers means.
    pub fn add_protocol(&mut self, what: &str) {
        if !self.protocol.is_empty() {
            self.protocol.push_str(" | ");
        }
        self.protocol.push_str(what);
    }
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

/// The files, on rank 0; nothing on the others.
#[derive(Debug)]
pub struct Metrics {
    files: Option<(Appended, EventFile)>,
}

impl Metrics {
    /// Appends to the run's file. A line that a crash cut in half is ended first, so that it spoils no other.
    /// `next_step`: updates done so far.
    pub fn open(run_dir: &Path, rank: u32, next_step: u64) -> Result<Self, WorkerError> {
        if rank != 0 {
            return Ok(Self { files: None });
        }
        let path = run_dir.join("metrics.jsonl");
        let file = open(&path)?;
        let events = EventFile::create(run_dir, now(), next_step + 1)?;
        Ok(Self { files: Some((Appended::new(file, path), events)) })
    }

    /// Writes one line at once, or with a later one if there is no room for it now.
    pub fn write(&mut self, line: &impl Serialize) -> Result<(), WorkerError> {
        let Some((file, events)) = &mut self.files else { return Ok(()) };
        let failed = |error: serde_json::Error| WorkerError::Failed(error.to_string());
        let mut text = serde_json::to_string(line).map_err(failed)?;
        text.push('\n');
        // With its directory, most likely, which may be another run's by now: nothing more of this one may go there.
        file.check_is_there()?;
        file.write(text.as_bytes())?;
        match serde_json::to_value(line).map_err(failed)? {
            Value::Object(object) => events.write(&object),
            _ => Ok(()),
        }
    }

    /// All lines are in the run's file now, or it is an error.
    pub fn finish(&mut self) -> Result<(), WorkerError> {
        self.files.as_mut().map_or(Ok(()), |(file, _)| file.finish())
    }
}

/// Adds a line to the metrics at `path`, when no run is under way there.
pub fn append(path: &Path, line: &str) -> Result<(), WorkerError> {
    open(path)?.write_all(format!("{line}\n").as_bytes()).map_err(WorkerError::io("write", path))
}

/// For appending; a line that a crash cut in half is ended.
fn open(path: &Path) -> Result<File, WorkerError> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(path)
        .map_err(WorkerError::io("open", path))?;
    let mut last = [b'\n'];
    let _ = file.seek(SeekFrom::End(-1)).and_then(|_| file.read(&mut last)); // an empty file has none
    if last != *b"\n" {
        file.write_all(b"\n").map_err(WorkerError::io("write", path))?;
    }
    Ok(file)
}

/// Whether the run has an evaluation of `step`. What cannot be read as a line is none.
pub fn has_eval(run_dir: &Path, step: u64) -> Result<bool, WorkerError> {
    let path = run_dir.join("metrics.jsonl");
    let is_it = |line: &[u8]| {
        let line: Value = serde_json::from_slice(line).unwrap_or_default();
        line["kind"] == "eval"
            && line["step"] == step
            && line.get("knn_top1").is_some()
            && line.get("data").is_none()
    };
    // A run of a million steps has hundreds of megabytes of other lines.
    let mut lines = BufReader::new(File::open(&path).map_err(WorkerError::io("open", &path))?);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).map_err(WorkerError::io("read", &path))? > 0 {
        if line.windows(6).any(|word| word == b"\"eval\"") && is_it(&line) {
            return Ok(true);
        }
        line.clear();
    }
    Ok(false)
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
    /// How many steps they are of.
    pub steps: u32,
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
            steps: self.steps,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_stands_in_the_table_for_readers() {
        let page = include_str!("../../../docs/monitoring.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        let documented: Vec<&str> =
            rows.flat_map(|keys| keys.split("`, `")).map(|key| key.trim_end_matches('`')).collect();
        let train = TrainLine {
            kind: "train",
            step: 1,
            epoch: 0,
            time: now(),
            loss: 1.0,
            lr: 0.1,
            tau: 0.9,
            grad_norm: 1.0,
            z_std: 1.0,
            online_top1: Some(1.0),
            images_per_s: 1.0,
            step_ms: 1.0,
            data_wait_ms: 1.0,
            comm_total_ms: 1.0,
            comm_exposed_ms: 1.0,
            forward_ms: 1.0,
            backward_ms: 1.0,
            comm_ms: 1.0,
            update_ms: 1.0,
            world_size: 1,
            rss_mb: 1.0,
        };
        let floors =
            |k| GridPoint { k, temperature: 0.1, knn_top1: 1.0, knn_random_init: 1.0, knn_raw_pixels: 1.0 };
        let eval = EvalLine {
            knn_top1: Some(1.0),
            knn_random_init: Some(1.0),
            knn_raw_pixels: Some(1.0),
            knn_grid: vec![floors(1)],
            linear_top1: Some(1.0),
            linear_random_init: Some(1.0),
            linear_raw_pixels: Some(1.0),
            spectrum: vec![1.0],
            effective_rank: Some(1.0),
            ..EvalLine::new(1, 0)
        };
        let checkpoint = CheckpointLine {
            kind: "checkpoint",
            step: 1,
            epoch: 0,
            time: now(),
            digest: String::new(),
            write_ms: 1.0,
            wait_ms: 1.0,
            copy_ms: 1.0,
        };
        let lines =
            [serde_json::to_value(train), serde_json::to_value(eval), serde_json::to_value(checkpoint)];
        for line in lines {
            for key in line.unwrap().as_object().unwrap().keys() {
                assert!(documented.contains(&key.as_str()), "{key}: {documented:?}");
            }
        }
    }

    #[test]
    fn a_torn_line_is_ended_and_an_evaluation_is_found_among_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        append(&path, r#"{"kind":"eval","step":8,"linear_top1":50.0}"#).unwrap();
        append(&path, r#"{"kind":"train","step":8,"knn_top1":"\"eval\""}"#).unwrap();
        assert!(!has_eval(dir.path(), 8).unwrap());
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + r#"{"kind":"eval","st"#).unwrap();
        append(&path, r#"{"kind":"eval","step":8,"data":"other","knn_top1":50.0}"#).unwrap();
        assert!(!has_eval(dir.path(), 8).unwrap(), "of other images");
        append(&path, r#"{"kind":"eval","step":8,"knn_top1":50.0}"#).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
        assert!(has_eval(dir.path(), 8).unwrap() && !has_eval(dir.path(), 7).unwrap());
    }
}
