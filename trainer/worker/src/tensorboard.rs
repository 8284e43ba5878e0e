//! `RUN/tensorboard/`: the numbers of `metrics.jsonl` as TensorBoard reads them.
//!
//! An event file is a sequence of records (TensorFlow's TFRecord), each one `Event` message:
//!
//! ```text
//! u64 length | u32 masked CRC-32C of the length | the message | u32 masked CRC-32C of the message       little endian
//! mask(crc) = rotate_right(crc, 15) + 0xa282ead8
//!
//! Event     1 wall_time: double   2 step: int64   3 file_version: string   5 summary: Summary   7 session_log: SessionLog
//! Summary   1 value: repeated { 1 tag: string   2 simple_value: float }
//! SessionLog  1 status: enum (1 = START)
//! ```
//!
//! Every start of a run opens a file of its own, and begins it with a session that starts at its first step: TensorBoard
//! then drops what earlier files hold from that step on, since those steps run again.

use std::fs::OpenOptions;
use std::path::Path;

use mentee_cluster::server;
use serde_json::{Map, Value};

use crate::append::Appended;
use crate::error::WorkerError;

/// What a train line says of training; everything else it says is about speed.
const OF_TRAINING: [&str; 7] = ["loss", "lr", "tau", "grad_norm", "z_std", "epoch", "online_top1"];
/// What places a line on the axes.
const PLACE: [&str; 3] = ["kind", "step", "time"];

/// One event file.
#[derive(Debug)]
pub struct EventFile {
    file: Appended,
}

impl EventFile {
    /// Opens a file for a start of the run that begins at `time` (seconds since 1970) with `first_step`.
    pub fn create(run_dir: &Path, time: f64, first_step: u64) -> Result<Self, WorkerError> {
        let folder = run_dir.join("tensorboard");
        std::fs::create_dir_all(&folder).map_err(WorkerError::io("create", &folder))?;
        // TensorBoard reads the files of a folder in the order of their names: the time, to the microsecond, comes first.
        let (host, process) = (server::hostname(), std::process::id());
        let path = folder.join(format!("events.out.tfevents.{time:017.6}.{host}.{process}"));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.map_err(WorkerError::io("create", &path))?;
        let mut this = Self { file: Appended::new(file, path) };
        let mut version = Message::default();
        version.double(1, time);
        version.bytes(3, b"brain.Event:2");
        let mut session = Message::default();
        session.double(1, time);
        session.integer(2, first_step);
        let mut status = Message::default();
        status.integer(1, 1);
        session.bytes(7, &status.0);
        this.file.write(&[record(&version.0), record(&session.0)].concat())?;
        Ok(this)
    }

    /// Writes the numbers of one line of `metrics.jsonl`, at once and whole: a reader that watches the file, and a crash, see
    /// complete records.
    pub fn write(&mut self, line: &Map<String, Value>) -> Result<(), WorkerError> {
        match event(line) {
            Some(event) => self.file.write(&record(&event)),
            None => Ok(()),
        }
    }
}

/// The `Event` of a line; none when it holds no number or no step.
fn event(line: &Map<String, Value>) -> Option<Vec<u8>> {
    let kind = line.get("kind")?.as_str()?;
    let mut summary = Message::default();
    for (key, value) in line.iter().filter(|(key, _)| !PLACE.contains(&key.as_str())) {
        let Some(number) = value.as_f64() else { continue };
        let group = match kind {
            "train" if !OF_TRAINING.contains(&key.as_str()) => "speed",
            kind => kind,
        };
        let mut value = Message::default();
        value.bytes(1, format!("{group}/{key}").as_bytes());
        value.float(2, number as f32);
        summary.bytes(1, &value.0);
    }
    if summary.0.is_empty() {
        return None;
    }
    let mut event = Message::default();
    event.double(1, line.get("time").and_then(Value::as_f64).unwrap_or(0.0));
    event.integer(2, line.get("step")?.as_u64()?);
    event.bytes(5, &summary.0);
    Some(event.0)
}

/// A Protocol Buffers message in the making (protobuf.dev, "Encoding").
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.varint(field << 3 | wire_type);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
}

/// A message in its frame.
fn record(message: &[u8]) -> Vec<u8> {
    let masked =
        |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that TensorBoard's own writer produced for the same event
    /// (`tensorboard.summary.writer.record_writer.RecordWriter`, `event_pb2.Event`).
    #[test]
    fn bytes_are_those_of_tensorboards_own_writer() {
        let line =
            serde_json::json!({ "kind": "train", "step": 300, "time": 1.5, "loss": 0.25, "step_ms": 3 });
        let Value::Object(line) = line else { unreachable!("an object") };
        let hex: String = record(&event(&line).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, EXPECTED);
    }

    const EXPECTED: &str = "3700000000000000e7e8ca5909000000000000f83f10ac022a290a110a0a747261696e2f6c6f7373150000803e0a140a0d73706565642f737465705f6d731500004040bee75956";

    #[test]
    fn the_probes_accuracy_is_no_speed() {
        let line = serde_json::json!({ "kind": "train", "step": 3, "time": 1.0, "online_top1": 12.5 });
        let event = event(line.as_object().unwrap()).unwrap();
        assert!(String::from_utf8_lossy(&event).contains("train/online_top1"));
    }

    #[test]
    fn a_line_without_numbers_is_no_event() {
        let line = serde_json::json!({ "kind": "note", "step": 3, "time": 1.0, "text": "x" });
        assert_eq!(event(line.as_object().unwrap()), None);
    }

    #[test]
    fn later_starts_sort_behind_earlier_ones() {
        let folder = tempfile::tempdir().unwrap();
        for (start, first_step) in [(1_700_000_000.25, 1), (1_700_000_000.5, 4), (1_700_000_001.0, 4)] {
            EventFile::create(folder.path(), start, first_step).unwrap();
        }
        let mut names: Vec<String> = std::fs::read_dir(folder.path().join("tensorboard"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert!(
            names[0].contains("1700000000.250000") && names[1].contains("1700000000.500000"),
            "{names:?}"
        );
    }
}
