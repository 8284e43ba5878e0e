//! Logs: the supervisor's own, and `mentee logs`, which merges those of all processes by time.
//!
//! Every process writes `RUN/logs/<who>.jsonl`, one JSON object an event, as tracing-subscriber's JSON format has it:
//! `timestamp` (RFC 3339, UTC), `level`, `target`, `message` and the other fields, in `fields` or beside them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;

use crate::failure::Failure;
use crate::rundir::RunDir;
use crate::slurm::{self, Record};

/// Where the coordinator's decisions go.
const COORDINATOR: &str = "mentee::coordinator";
/// Where an event comes from: in the file, but not worth a person's line.
const PLACE: &[&str] = &["target", "span", "spans", "filename", "line_number", "threadName", "threadId"];
/// How often `--follow` looks for more.
const FOLLOW_EVERY: Duration = Duration::from_millis(300);

/// From here on, this process logs to `RUN/logs/launcher.jsonl`, the coordinator in it to `coordinator.jsonl`. A log
/// that cannot be opened is left out: it must not keep a run from starting.
pub fn write_here(run: &RunDir) {
    let layer = |name: &str, coordinator: bool| {
        let file = OpenOptions::new().create(true).append(true).open(run.logs().join(name)).ok()?;
        let wanted = move |event: &tracing::Metadata<'_>| {
            *event.level() <= tracing::Level::INFO && (event.target() == COORDINATOR) == coordinator
        };
        let layer = tracing_subscriber::fmt::layer().json().with_writer(Mutex::new(file));
        Some(layer.with_filter(filter_fn(wanted)).boxed())
    };
    let layers: Vec<_> =
        [layer("launcher.jsonl", false), layer("coordinator.jsonl", true)].into_iter().flatten().collect();
    // Only the first call of a process counts, and a process has one run.
    let _ = tracing_subscriber::registry().with(layers).try_init();
}

/// How grave an event is; a filter shows its own level and above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Level {
    /// everything
    Trace,
    /// for developers
    Debug,
    /// what happens
    Info,
    /// what may be wrong
    Warn,
    /// what is wrong
    Error,
}

impl Level {
    fn parse(text: &str) -> Option<Level> {
        <Level as clap::ValueEnum>::from_str(text, true).ok()
    }
}

/// `mentee logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// A run directory
    pub run: PathBuf,
    /// Only this rank
    #[arg(long, value_name = "R")]
    pub rank: Option<u32>,
    /// Only events of this level and above
    #[arg(long, value_enum, default_value = "info")]
    pub level: Level,
    /// Go on as more is written, until Ctrl-C
    #[arg(long)]
    pub follow: bool,
}

/// One event of a log.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    time: String,
    level: Option<Level>,
    who: String,
    text: String,
}

impl Entry {
    /// A line that is no JSON object is shown as it is, at the time of the one before it.
    fn parse(who: &str, line: &str, last_time: &str) -> Entry {
        let Ok(Value::Object(mut object)) = serde_json::from_str::<Value>(line) else {
            return Entry {
                time: last_time.into(),
                level: None,
                who: who.into(),
                text: line.trim_end().into(),
            };
        };
        let mut take = |key: &str| match object.remove(key) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        let time = take("timestamp");
        let level = Level::parse(&take("level"));
        let time = if time.is_empty() { last_time.to_owned() } else { time };
        let mut fields = match object.remove("fields") {
            Some(Value::Object(fields)) => fields,
            _ => object.into_iter().filter(|(name, _)| !PLACE.contains(&name.as_str())).collect(),
        };
        let mut text = match fields.remove("message") {
            Some(Value::String(message)) => message,
            _ => String::new(),
        };
        for (name, value) in fields {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!(" {name}={value}"));
        }
        Entry { time, level, who: who.into(), text: text.trim_start().to_owned() }
    }

    fn show(&self, colour: bool) -> String {
        let (name, code) = match self.level {
            Some(Level::Error) => ("ERROR", "31"),
            Some(Level::Warn) => (" WARN", "33"),
            Some(Level::Info) => (" INFO", "32"),
            Some(Level::Debug) => ("DEBUG", "34"),
            Some(Level::Trace) => ("TRACE", "35"),
            None => ("     ", "0"),
        };
        let level = if colour { format!("\x1b[{code}m{name}\x1b[0m") } else { name.to_owned() };
        // To the millisecond; the date is in the file.
        let time = self.time.get(11..23).unwrap_or(&self.time);
        format!("{time:<12} {level} {:<11} {}", self.who, self.text)
    }
}

/// A log file that is read as it grows.
#[derive(Debug, Default)]
struct Tailed {
    offset: u64,
    partial: Vec<u8>,
    last_time: String,
}

impl Tailed {
    /// The whole lines that are new since the last call; with `all` also an unfinished last one.
    fn more(&mut self, path: &Path, who: &str, all: bool) -> std::io::Result<Vec<Entry>> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() < self.offset {
            *self = Tailed::default();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let read = file.read_to_end(&mut self.partial)?;
        self.offset += read as u64;
        let whole = match self.partial.iter().rposition(|&byte| byte == b'\n') {
            _ if all => self.partial.len(),
            Some(last) => last + 1,
            None => 0,
        };
        let bytes: Vec<u8> = self.partial.drain(..whole).collect();
        let mut entries = Vec::new();
        for line in String::from_utf8_lossy(&bytes).lines().filter(|line| !line.trim().is_empty()) {
            let entry = Entry::parse(who, line, &self.last_time);
            self.last_time.clone_from(&entry.time);
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// The log files of a run that a filter by rank leaves, with the name of whose they are.
fn files(run: &RunDir, rank: Option<u32>) -> Result<Vec<(String, PathBuf)>, Failure> {
    let folder = run.logs();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", &folder, &error)),
    };
    let mut files: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path)))
        .filter(|(who, _)| rank.is_none_or(|rank| *who == format!("rank-{rank:05}")))
        .map(|(who, path)| {
            let short = who.strip_prefix("rank-").and_then(|rank| rank.parse::<u32>().ok());
            (short.map_or(who, |rank| format!("rank {rank}")), path)
        })
        .collect();
    files.sort();
    Ok(files)
}

/// `mentee logs RUN [--rank R] [--level L] [--follow]`.
///
/// # Errors
/// When there is no run, or no such rank.
pub fn command(args: &LogsArgs) -> Result<(), Failure> {
    let run = RunDir::existing(&args.run)?;
    let colour = std::io::stdout().is_terminal();
    let mut tailed: BTreeMap<PathBuf, Tailed> = BTreeMap::new();
    if let Some(record) = Record::read(&run) {
        // Not among the lines, which others may read on.
        let job = slurm::query(&record.job);
        let known = job.map_or("no longer known to Slurm".to_owned(), |job| job.to_string());
        eprintln!("job {}: {known}; its own output is {}", record.job, run.slurm_output().display());
    }
    if !args.follow && files(&run, args.rank)?.is_empty() {
        let whose = args.rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
        return Err(Failure::failed(format!("no log{whose} in {}", run.logs().display())));
    }
    loop {
        let mut entries = Vec::new();
        for (who, path) in files(&run, args.rank)? {
            let file = tailed.entry(path.clone()).or_default();
            let more =
                file.more(&path, &who, !args.follow).map_err(|error| Failure::io("read", &path, &error))?;
            entries.extend(more);
        }
        // Stable: lines of one file with the same time keep their order.
        entries.sort_by(|a, b| a.time.cmp(&b.time));
        let mut out = std::io::stdout().lock();
        for entry in entries.iter().filter(|entry| entry.level.is_none_or(|level| level >= args.level)) {
            if writeln!(out, "{}", entry.show(colour)).is_err() {
                return Ok(()); // the reader has seen enough (`| head`)
            }
        }
        if !args.follow {
            return Ok(());
        }
        let _ = out.flush();
        drop(out);
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// The last lines of one log, for people; empty when there is none.
pub fn tail(path: &Path, lines: usize) -> Vec<String> {
    let entries = Tailed::default().more(path, "", true).unwrap_or_default();
    entries[entries.len().saturating_sub(lines)..].iter().map(|entry| entry.show(false)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_tracing_are_read() {
        let line = r#"{"timestamp":"2026-01-02T03:04:05.678901Z","level":"WARN","fields":{"message":"slow","rank":3,"why":"disk"},"target":"x"}"#;
        let entry = Entry::parse("rank 3", line, "");
        assert_eq!(entry.level, Some(Level::Warn));
        assert_eq!(entry.show(false), "03:04:05.678  WARN rank 3      slow rank=3 why=disk");
        let line = r#"{"timestamp":"2026-01-02T03:04:05.678901Z","level":"INFO","message":"checkpoint","step":8,"target":"x"}"#;
        assert_eq!(
            Entry::parse("rank 0", line, "").show(false),
            "03:04:05.678  INFO rank 0      checkpoint step=8"
        );
        let noise = Entry::parse("rank 3", "Segmentation fault", &entry.time);
        assert_eq!(noise.show(false), "03:04:05.678       rank 3      Segmentation fault");
    }

    #[test]
    fn growing_files_are_read_line_by_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let mut tailed = Tailed::default();
        fs::write(&path, "one\ntw").expect("written");
        let texts = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.text).collect::<Vec<_>>();
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["one"]);
        fs::write(&path, "one\ntwo\n").expect("written");
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["two"]);
        fs::write(&path, "new\n").expect("written");
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["new"], "the file was replaced");
    }
}
