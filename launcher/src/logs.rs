//! Logs: the supervisor's own, and `mentee logs`, which merges those of all processes by time.
//!
//! Every process writes `RUN/logs/<who>.jsonl`, one JSON object an event, as tracing-subscriber's JSON format has it:
//! `timestamp` (RFC 3339, UTC), `level`, `target`, `message` and the other fields, in `fields` or beside them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use mentee_config::complain;
use serde_json::Value;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::rundir::RunDir;
use crate::slurm::{self, Record};
use crate::status::{State, Status};

/// Where the coordinator's decisions go.
const COORDINATOR: &str = "mentee::coordinator";
/// Where an event comes from: in the file, but not worth a person's line.
const PLACE: &[&str] = &["span", "spans", "filename", "line_number", "threadName", "threadId"];
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
        // Its own complaint of a full disk would go to stderr by `eprintln!`, which panics when that is full too.
        let layer =
            tracing_subscriber::fmt::layer().json().log_internal_errors(false).with_writer(Mutex::new(file));
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
#[command(after_help = "Of a run that failed, the reason comes first.

Examples:
  mentee logs runs/try-3 --follow
  mentee logs runs/try-3 --rank 5 --level warn
  mentee logs runs/try-3 --json | jq 'select(.level == \"ERROR\")'")]
pub struct LogsArgs {
    /// A run directory
    pub run: PathBuf,
    /// Only this rank
    #[arg(long, value_name = "R")]
    pub rank: Option<u32>,
    /// Only events of this level and above
    #[arg(long, value_enum, default_value = "info")]
    pub level: Level,
    /// Only events of this part of the program and what is in it, as mentee_worker::train
    #[arg(long, value_name = "TARGET")]
    pub target: Option<String>,
    /// Only the last N of what is there
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<usize>,
    /// Go on as more is written, until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
    /// The lines as they stand in the files, one JSON object each, with `who` added: for jq
    #[arg(long)]
    pub json: bool,
}

impl LogsArgs {
    fn shows(&self, entry: &Entry) -> bool {
        let within = |target: &String| {
            entry
                .target
                .strip_prefix(target.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        entry.level.is_none_or(|level| level >= self.level) && self.target.as_ref().is_none_or(within)
    }
}

/// One event of a log.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// RFC 3339, UTC; of a line without one, that of the line before it.
    pub time: String,
    /// None for lines that are no events.
    pub level: Option<Level>,
    /// `rank 3`, `launcher`, `coordinator`.
    pub who: String,
    /// The module it is from.
    pub target: String,
    /// Its message.
    pub message: String,
    /// Everything else, ` name=value` each.
    pub details: String,
    /// The line.
    raw: String,
}

impl Entry {
    /// A line that is no JSON object is shown as it is, at the time of the one before it.
    fn parse(who: &str, line: &str, last_time: &str) -> Entry {
        let mut entry = Entry {
            time: last_time.into(),
            level: None,
            who: who.into(),
            target: String::new(),
            message: line.trim_end().into(),
            details: String::new(),
            raw: line.trim_end().into(),
        };
        let Ok(Value::Object(mut object)) = serde_json::from_str::<Value>(line) else { return entry };
        let mut take = |key: &str| match object.remove(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        if let Some(time) = take("timestamp").filter(|time| !time.is_empty()) {
            entry.time = time;
        }
        entry.level = take("level").and_then(|level| Level::parse(&level));
        entry.target = take("target").unwrap_or_default();
        let mut fields = match object.remove("fields") {
            Some(Value::Object(fields)) => fields,
            _ => object.into_iter().filter(|(name, _)| !PLACE.contains(&name.as_str())).collect(),
        };
        entry.message = match fields.remove("message") {
            Some(Value::String(message)) => message,
            _ => String::new(),
        };
        for (name, value) in fields {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = write!(entry.details, " {name}={value}");
        }
        entry
    }

    /// Message and details.
    pub fn text(&self) -> String {
        format!("{}{}", self.message, self.details).trim_start().to_owned()
    }

    /// One of its numbers.
    pub fn number(&self, key: &str) -> Option<f64> {
        serde_json::from_str::<Value>(&self.raw).ok()?.get(key)?.as_f64()
    }

    /// Its time of day, to the millisecond; the date is in the file.
    fn clock(&self) -> &str {
        self.time.get(11..23).unwrap_or(&self.time)
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
        if !colour {
            return format!("{:<12} {name} {:<11} {}", self.clock(), self.who, self.text());
        }
        format!(
            "\x1b[2m{:<12}\x1b[0m \x1b[{code}m{name}\x1b[0m {:<11} {}\x1b[2m{}\x1b[0m",
            self.clock(),
            self.who,
            self.message,
            self.details
        )
    }

    /// As it stands in the file, and whose it is.
    fn json(&self) -> String {
        let mut object = match serde_json::from_str(&self.raw) {
            Ok(Value::Object(object)) => object,
            _ => [("message".to_owned(), Value::from(self.raw.as_str()))].into_iter().collect(),
        };
        object.insert("who".into(), self.who.as_str().into());
        Value::Object(object).to_string()
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
    /// One whose first read leaves out all but about the last `bytes`.
    fn from_end(path: &Path, bytes: u64) -> Tailed {
        let length = fs::metadata(path).map_or(0, |data| data.len());
        Tailed { offset: length.saturating_sub(bytes), ..Tailed::default() }
    }

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

/// One log file and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct LogFile {
    rank: Option<u32>,
    who: String,
    path: PathBuf,
    /// How often it was put aside; 0 for the one that is being written.
    aside: u32,
}

impl LogFile {
    /// `launcher.jsonl`, `rank-00003.jsonl`, `rank-00003.2.jsonl`.
    fn parse(path: PathBuf) -> Option<LogFile> {
        let mut parts = path.file_name()?.to_str()?.strip_suffix(".jsonl")?.split('.');
        let name = parts.next()?;
        let aside = parts.next().map_or(Some(0), |number| number.parse().ok())?;
        let rank = name.strip_prefix("rank-").and_then(|rank| rank.parse::<u32>().ok());
        let who = rank.map_or(name.to_owned(), |rank| format!("rank {rank}"));
        Some(LogFile { rank, who, path, aside })
    }

    /// Keeps its identity when it is put aside under another name.
    fn identity(&self) -> Option<(u64, u64)> {
        fs::metadata(&self.path).ok().map(|data| (data.dev(), data.ino()))
    }
}

/// The log files of a run that a filter by rank leaves, oldest first.
fn files(run: &RunDir, rank: Option<u32>) -> Result<Vec<LogFile>, Failure> {
    let folder = run.logs();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", &folder, &error)),
    };
    let mut files: Vec<LogFile> = entries
        .filter_map(|entry| LogFile::parse(entry.ok()?.path()))
        .filter(|file| rank.is_none() || rank == file.rank)
        .collect();
    files.sort_by(|a, b| (a.rank, &a.who, b.aside).cmp(&(b.rank, &b.who, a.aside)));
    Ok(files)
}

/// The logs of a run, merged by time, as they grow.
#[derive(Debug, Default)]
pub struct Reader {
    tailed: BTreeMap<(u64, u64), Tailed>,
    rank: Option<u32>,
    /// How much of the end of each file the first look takes; none: all of it.
    last_bytes: Option<u64>,
}

impl Reader {
    /// Of all processes or of one rank, from the beginning.
    pub fn new(rank: Option<u32>) -> Reader {
        Reader { rank, ..Reader::default() }
    }

    /// Of all processes, from about so many bytes before the end of each log.
    pub fn of_the_end(bytes: u64) -> Reader {
        Reader { last_bytes: Some(bytes), ..Reader::default() }
    }

    /// What is new since the last call; with `all` also unfinished last lines.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn more(&mut self, run: &RunDir, all: bool) -> Result<Vec<Entry>, Failure> {
        let mut entries = Vec::new();
        for file in files(run, self.rank)? {
            // A file that has just been put aside is found under its new name, now or next time.
            let Some(identity) = file.identity() else { continue };
            let tailed = self.tailed.entry(identity).or_insert_with(|| match self.last_bytes {
                Some(bytes) => Tailed::from_end(&file.path, bytes),
                None => Tailed::default(),
            });
            match tailed.more(&file.path, &file.who, all) {
                Ok(more) => entries.extend(more),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::io("read", &file.path, &error)),
            }
        }
        // Stable: lines of one file with the same time keep their order.
        entries.sort_by(|a, b| a.time.cmp(&b.time));
        Ok(entries)
    }
}

/// Why a run failed, cause before consequences: what made each restart necessary, what ended it, and the ranks' first
/// error after the last start. Empty for a run that did not fail.
pub fn causes(status: Option<&Status>, metrics: &Metrics, entries: &[Entry]) -> Vec<String> {
    let Some(status) = status.filter(|status| status.state == State::Failed) else { return Vec::new() };
    let mut lines = Vec::new();
    for restart in metrics.restarts() {
        let reason = restart.text("reason").unwrap_or("unknown");
        lines.push(format!("restarted from step {}: {reason}", restart.step));
    }
    let code = status.exit_code.map_or(String::new(), |code| format!(" with exit code {code}"));
    lines.push(format!("failed{code}: {}", status.error.as_deref().unwrap_or("no reason is known")));
    let of_rank = |entry: &&Entry| entry.who.starts_with("rank ");
    let mut last_start =
        entries.iter().filter(|entry| entry.who == "launcher" && entry.message.starts_with("started "));
    let last_start = last_start.next_back().map_or("", |entry| entry.time.as_str());
    let first = entries.iter().filter(of_rank).filter(|entry| entry.time.as_str() >= last_start);
    if let Some(first) =
        first.filter(|entry| entry.level == Some(Level::Error)).min_by_key(|entry| &entry.time)
    {
        lines.push(format!("first error of a rank: {} {}: {}", first.clock(), first.who, first.text()));
    }
    lines
}

/// `mentee logs RUN [--rank R] [--level L] [--target T] [--lines N] [--follow] [--json]`.
///
/// # Errors
/// When there is no run, or no such rank.
pub fn command(args: &LogsArgs) -> Result<(), Failure> {
    let run = RunDir::existing(&args.run)?;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if let Some(record) = Record::read(&run) {
        // Not among the lines, which others may read on.
        let job = slurm::query(&record.job);
        let known = job.map_or("no longer known to Slurm".to_owned(), |job| job.to_string());
        complain!("job {}: {known}; its own output is {}", record.job, run.slurm_output().display());
    }
    if !args.follow && files(&run, args.rank)?.is_empty() {
        let whose = args.rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
        return Err(Failure::failed(format!("no log{whose} in {}", run.logs().display())));
    }
    let mut reader = Reader::new(args.rank);
    let mut first = true;
    loop {
        let entries = reader.more(&run, !args.follow)?;
        let mut lines = Vec::new();
        if first && !args.json {
            let causes = causes(Status::read(&run).as_ref(), &Metrics::read(&run.metrics())?, &entries);
            let (on, off) = if colour { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
            lines.extend(causes.iter().map(|line| format!("{on}{line}{off}")));
            if !causes.is_empty() {
                lines.push(String::new());
            }
        }
        let shown: Vec<&Entry> = entries.iter().filter(|entry| args.shows(entry)).collect();
        let skipped = args.lines.filter(|_| first).map_or(0, |last| shown.len().saturating_sub(last));
        lines.extend(
            shown[skipped..].iter().map(|entry| if args.json { entry.json() } else { entry.show(colour) }),
        );
        first = false;
        let mut out = std::io::stdout().lock();
        for line in lines {
            if writeln!(out, "{line}").is_err() {
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
    let entries: Vec<Entry> =
        entries.into_iter().filter(|entry| entry.level.is_none_or(|level| level >= Level::Info)).collect();
    entries[entries.len().saturating_sub(lines)..].iter().map(|entry| entry.show(false)).collect()
}

/// Seconds since 1970 of a time in RFC 3339, as the logs have it: UTC.
pub fn unix_seconds(time: &str) -> Option<f64> {
    let number = |range: std::ops::Range<usize>| time.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let of_day = number(11..13)? * 3600 + number(14..16)? * 60;
    let seconds: f64 = time.get(17..)?.strip_suffix('Z')?.parse().ok()?;
    // Days from the civil calendar: years begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 1
        - 719_468;
    Some((days * 86_400 + of_day) as f64 + seconds)
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
        let texts = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.message).collect::<Vec<_>>();
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["one"]);
        fs::write(&path, "one\ntwo\n").expect("written");
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["two"]);
        fs::write(&path, "new\n").expect("written");
        assert_eq!(texts(tailed.more(&path, "", false).expect("read")), ["new"], "the file was replaced");
    }

    #[test]
    fn times_are_seconds_since_1970() {
        let table = [
            ("1970-01-01T00:00:00Z", 0.0),
            ("2000-02-29T12:30:15.5Z", 951_827_415.5),
            ("2026-11-25T21:28:03.000001Z", 1_795_642_083.000_001),
            ("2100-03-01T00:00:00Z", 4_107_542_400.0),
        ];
        for (text, seconds) in table {
            assert_eq!(unix_seconds(text), Some(seconds), "{text}");
        }
        assert_eq!(unix_seconds("yesterday"), None);
    }

    #[test]
    fn a_log_that_is_put_aside_is_neither_lost_nor_read_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        fs::create_dir(run.logs()).expect("made");
        let line = |second: u32| {
            format!(
                "{{\"timestamp\":\"2026-01-02T03:04:{second:02}Z\",\"level\":\"INFO\",\"message\":\"{second}\"}}\n"
            )
        };
        let seen = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.message).collect::<Vec<_>>();
        let log = run.rank_log(3);
        fs::write(&log, line(1)).expect("written");
        let mut reader = Reader::new(Some(3));
        assert_eq!(seen(reader.more(&run, false).expect("read")), ["1"]);
        fs::write(&log, line(1) + &line(2)).expect("written");
        fs::rename(&log, log.with_extension("1.jsonl")).expect("renamed");
        fs::write(&log, line(3)).expect("written");
        fs::write(run.rank_log(4), line(4)).expect("written");
        assert_eq!(seen(reader.more(&run, false).expect("read")), ["2", "3"]);
        assert_eq!(seen(Reader::new(None).more(&run, false).expect("read")), ["1", "2", "3", "4"]);
    }

    #[test]
    fn filters_by_level_and_target() {
        let args = LogsArgs {
            run: PathBuf::new(),
            rank: None,
            level: Level::Warn,
            target: Some("mentee_worker::eval".into()),
            lines: None,
            follow: false,
            json: false,
        };
        let table = [
            ("WARN", "mentee_worker::eval", true),
            ("ERROR", "mentee_worker::eval::knn", true),
            ("INFO", "mentee_worker::eval", false),
            ("WARN", "mentee_worker::evaluation", false),
            ("WARN", "mentee_worker", false),
        ];
        for (level, target, shown) in table {
            let line = format!("{{\"level\":\"{level}\",\"target\":\"{target}\",\"message\":\"x\"}}");
            assert_eq!(args.shows(&Entry::parse("rank 0", &line, "")), shown, "{line}");
        }
    }
}
