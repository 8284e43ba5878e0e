//! Logs: the supervisor's own, and `mentee logs`, which merges those of all processes by time.
//!
//! Every process writes `RUN/logs/<who>.jsonl`, one JSON object an event, as tracing-subscriber's JSON format has it:
//! `timestamp` (RFC 3339, UTC), `level`, `target`, `message` and the other fields, in `fields` or beside them.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use mentee_config::complain;
use mentee_config::say::Results;
use serde::Deserialize;
use serde_json::{Map, Value};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;

use crate::failure::Failure;
use crate::limits;
use crate::metrics::Metrics;
use crate::printable::{on_a_terminal, printable, printable_json, printable_lines};
use crate::rundir::RunDir;
use crate::slurm::{self, Record};
use crate::status::{State, Status};

/// Where the coordinator's decisions go.
const COORDINATOR: &str = "mentee::coordinator";
/// Where an event comes from: in the file, but not worth a person's line.
const PLACE: &[&str] = &["span", "spans", "filename", "line_number", "threadName", "threadId"];
/// Of a log's end, for the last words of a rank.
const TAIL_BYTES: u64 = 64 << 10;
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
        let layer = tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .log_internal_errors(false)
            .with_writer(Mutex::new(file));
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
#[command(after_help = "Of a run that failed, the reason comes first. Times are in UTC.

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
    fn shows(&self, level: Option<Level>, target: &str) -> bool {
        let within = |wanted: &String| {
            let rest = target.strip_prefix(wanted.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        level.is_none_or(|level| level >= self.level) && self.target.as_ref().is_none_or(within)
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
    /// Everything else.
    fields: Map<String, Value>,
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
            fields: Map::new(),
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
        entry.fields = fields;
        entry
    }

    /// Everything but the message, ` name=value` each.
    fn details(&self) -> String {
        let mut details = String::new();
        for (name, value) in &self.fields {
            let _ = match value {
                Value::String(text) => write!(details, " {name}={text}"),
                value => write!(details, " {name}={value}"),
            };
        }
        details
    }

    /// Message and details.
    pub fn text(&self) -> String {
        format!("{}{}", self.message, self.details()).trim_start().to_owned()
    }

    /// One of its numbers.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.fields.get(key)?.as_f64()
    }

    /// Its day and time of day, to the millisecond: a run takes days, or goes on after some.
    fn clock(&self) -> String {
        match (self.time.get(..10), self.time.get(11..23)) {
            (Some(day), Some(time)) => format!("{day} {time}"),
            _ => self.time.clone(),
        }
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
        let clock = printable(&self.clock());
        // Of one log alone, nobody need be named.
        let who = if self.who.is_empty() { String::new() } else { format!("{:<11} ", printable(&self.who)) };
        if !colour {
            return format!("{clock:<23} {name} {who}{}", printable_lines(&self.text()));
        }
        format!(
            "\x1b[2m{clock:<23}\x1b[0m \x1b[{code}m{name}\x1b[0m {who}{}\x1b[2m{}\x1b[0m",
            printable_lines(&self.message),
            printable_lines(&self.details())
        )
    }

    /// As it stands in the file, and whose it is.
    fn json(&self) -> String {
        let mut object = match serde_json::from_str(&self.raw) {
            Ok(Value::Object(object)) => object,
            _ => [("message".to_owned(), Value::from(self.raw.as_str()))].into_iter().collect(),
        };
        object.insert("who".into(), self.who.as_str().into());
        printable_json(&Value::Object(object).to_string())
    }
}

/// What decides whether a line is shown, read without the rest of it.
#[derive(Deserialize)]
#[serde(default)]
struct Head<'a> {
    #[serde(borrow)]
    timestamp: Cow<'a, str>,
    #[serde(borrow)]
    level: Cow<'a, str>,
    #[serde(borrow)]
    target: Cow<'a, str>,
}

impl Default for Head<'_> {
    fn default() -> Self {
        Head { timestamp: "".into(), level: "".into(), target: "".into() }
    }
}

/// A log file that is read as it grows.
#[derive(Debug, Default)]
struct Tailed {
    offset: u64,
    partial: Vec<u8>,
    last_time: String,
    /// It begins in the middle of a line, which is passed over.
    torn: bool,
}

impl Tailed {
    /// One whose first read leaves out all but about the last `bytes`.
    fn from_end(path: &Path, bytes: u64) -> Tailed {
        let length = fs::metadata(path).map_or(0, |data| data.len());
        let offset = length.saturating_sub(bytes);
        Tailed { offset, torn: offset > 0, ..Tailed::default() }
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
        let mut bytes: Vec<u8> = self.partial.drain(..whole).collect();
        if self.torn && whole > 0 {
            let end = bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| end + 1);
            bytes.drain(..end);
            self.torn = false;
        }
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
pub struct LogFile {
    /// None of what is no rank's.
    pub rank: Option<u32>,
    /// As [`Entry::who`].
    pub who: String,
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

/// The log of one process from its beginning, through the files that were put aside, a line at a time.
struct Stream {
    run: RunDir,
    /// Still to be read, the oldest last.
    files: Vec<(LogFile, Option<(u64, u64)>)>,
    who: String,
    open: Option<BufReader<File>>,
    identity: Option<(u64, u64)>,
    /// Also an unfinished last line.
    all: bool,
    line: Vec<u8>,
    offset: u64,
    last_time: String,
    /// How far each file was read.
    read: Vec<((u64, u64), Tailed)>,
}

impl Stream {
    /// One for each process of which `wanted` holds.
    fn of(run: &RunDir, all: bool, wanted: impl Fn(&LogFile) -> bool) -> Result<Vec<Stream>, Failure> {
        let mut streams: Vec<Stream> = Vec::new();
        for file in files(run, None)?.into_iter().filter(wanted) {
            let identity = file.identity();
            match streams.last_mut().filter(|stream| stream.who == file.who) {
                Some(stream) => stream.files.insert(0, (file, identity)),
                None => streams.push(Stream {
                    run: run.clone(),
                    who: file.who.clone(),
                    files: vec![(file, identity)],
                    open: None,
                    identity: None,
                    all,
                    line: Vec::new(),
                    offset: 0,
                    last_time: String::new(),
                    read: Vec::new(),
                }),
            }
        }
        Ok(streams)
    }

    /// The next line for which `wanted` holds, as an event.
    fn next(&mut self, wanted: impl Fn(&str) -> Wanted) -> Result<Option<Entry>, Failure> {
        while self.next_line()? {
            let line = String::from_utf8_lossy(&self.line);
            if line.trim().is_empty() {
                continue;
            }
            match wanted(&line) {
                Wanted::No { time: Some(time) } => self.last_time = time,
                Wanted::No { time: None } => {}
                Wanted::Yes => {
                    let entry = Entry::parse(&self.who, &line, &self.last_time);
                    self.last_time.clone_from(&entry.time);
                    return Ok(Some(entry));
                }
            }
        }
        Ok(None)
    }

    fn next_line(&mut self) -> Result<bool, Failure> {
        loop {
            let Some(open) = &mut self.open else {
                let Some((file, identity)) = self.files.pop() else { return Ok(false) };
                self.open_file(&file, identity)?;
                continue;
            };
            self.line.clear();
            let read = open.read_until(b'\n', &mut self.line);
            let read = read.map_err(|error| Failure::io("read", &self.run.logs(), &error))? as u64;
            if read > 0 && (self.all || self.line.ends_with(b"\n")) {
                self.offset += read;
                return Ok(true);
            }
            self.open = None;
            let left = Tailed { offset: self.offset, last_time: self.last_time.clone(), ..Tailed::default() };
            self.read.extend(self.identity.map(|identity| (identity, left)));
        }
    }

    /// One that was put aside since it was listed is found under its new name; one that is gone is passed over.
    fn open_file(&mut self, file: &LogFile, identity: Option<(u64, u64)>) -> Result<(), Failure> {
        let path = if identity.is_none() || file.identity() == identity {
            file.path.clone()
        } else {
            let moved = files(&self.run, file.rank)?.into_iter().find(|other| other.identity() == identity);
            let Some(moved) = moved else { return Ok(()) };
            moved.path
        };
        match File::open(&path) {
            Ok(opened) => self.open = Some(BufReader::with_capacity(64 << 10, opened)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::io("read", &path, &error)),
        }
        (self.identity, self.offset) = (identity, 0);
        Ok(())
    }
}

/// Whether a line is worth its parsing.
enum Wanted {
    Yes,
    No { time: Option<String> },
}

/// Takes every event whose line holds `part`, process by process, in logs of which `wanted` holds. One line is in memory at
/// a time: the logs of many ranks are gigabytes.
///
/// # Errors
/// When a log cannot be read.
pub fn each(
    run: &RunDir,
    part: &str,
    wanted: impl Fn(&LogFile) -> bool,
    mut take: impl FnMut(Entry),
) -> Result<(), Failure> {
    for mut stream in Stream::of(run, true, wanted)? {
        while let Some(entry) =
            stream.next(|line| if line.contains(part) { Wanted::Yes } else { Wanted::No { time: None } })?
        {
            take(entry);
        }
    }
    Ok(())
}

/// Gives `show` what `args` want of the logs as they stand, merged by time, until it says that it is enough; returns how far
/// each file was read.
fn merged(
    run: &RunDir,
    args: &LogsArgs,
    mut show: impl FnMut(Entry),
) -> Result<BTreeMap<(u64, u64), Tailed>, Failure> {
    let mut streams = Stream::of(run, !args.follow, |file| args.rank.is_none() || args.rank == file.rank)?;
    // One file of each process is open; where that many are not allowed, opening says so.
    let _ = limits::allow_open_files(streams.len() as u64 + 64);
    let wanted = |line: &str| match serde_json::from_str::<Head<'_>>(line) {
        Ok(head) if !args.shows(Level::parse(&head.level), &head.target) => {
            Wanted::No { time: Some(head.timestamp.into_owned()).filter(|time| !time.is_empty()) }
        }
        Err(_) if !args.shows(None, "") => Wanted::No { time: None },
        _ => Wanted::Yes,
    };
    // The next event of each stream; of the same time, that of the first.
    let mut next: Vec<Option<Entry>> = Vec::new();
    let mut order = BinaryHeap::new();
    for (index, stream) in streams.iter_mut().enumerate() {
        let entry = stream.next(wanted)?;
        order.extend(entry.as_ref().map(|entry| Reverse((entry.time.clone(), index))));
        next.push(entry);
    }
    while let Some(Reverse((_, index))) = order.pop() {
        let following = streams[index].next(wanted)?;
        order.extend(following.as_ref().map(|entry| Reverse((entry.time.clone(), index))));
        let Some(entry) = std::mem::replace(&mut next[index], following) else { continue };
        // Parsed whole, a line may turn out to be another.
        if args.shows(entry.level, &entry.target) {
            show(entry);
        }
    }
    Ok(streams.into_iter().flat_map(|stream| stream.read).collect())
}

/// Why a run failed, cause before consequences: what made each restart necessary, what ended it, and the ranks' first
/// error after the last start. Empty for a run that did not fail.
///
/// # Errors
/// When a log cannot be read.
pub fn causes(run: &RunDir, status: Option<&Status>) -> Result<Vec<String>, Failure> {
    let Some(status) = status.filter(|status| status.state == State::Failed) else { return Ok(Vec::new()) };
    let mut lines = Vec::new();
    for restart in Metrics::read_without_steps(&run.metrics())?.restarts() {
        let reason = restart.text("reason").unwrap_or("unknown");
        lines.push(format!("restarted from step {}: {reason}", restart.step));
    }
    let code = status.exit_code.map_or(String::new(), |code| format!(" with exit code {code}"));
    lines.push(format!("failed{code}: {}", status.error.as_deref().unwrap_or("no reason is known")));
    // Of all processes, whatever is shown of the rest: another rank's error may be the cause.
    let mut last_start = String::new();
    each(
        run,
        "started ",
        |file| file.who == "launcher",
        |entry| {
            if entry.message.starts_with("started ") && entry.time > last_start {
                last_start = entry.time;
            }
        },
    )?;
    let mut first: Option<Entry> = None;
    each(
        run,
        "ERROR",
        |file| file.rank.is_some(),
        |entry| {
            let earlier = first.as_ref().is_none_or(|first| entry.time < first.time);
            if entry.level == Some(Level::Error) && entry.time >= last_start && earlier {
                first = Some(entry);
            }
        },
    )?;
    if let Some(first) = first {
        lines.push(format!("first error of a rank: {} {}: {}", first.clock(), first.who, first.text()));
    }
    Ok(lines)
}

/// `mentee logs RUN [--rank R] [--level L] [--target T] [--lines N] [--follow] [--json]`.
///
/// # Errors
/// When there is no run, or no such rank.
pub fn command(args: &LogsArgs) -> Result<(), Failure> {
    let run = RunDir::existing(&args.run)?;
    let colour = on_a_terminal() && std::env::var_os("NO_COLOR").is_none();
    if let Some(record) = Record::read(&run) {
        // Not among the lines, which others may read on.
        let known = slurm::describe(&slurm::query(&record.job));
        let line = format!("job {}: {known}; its own output is {}", record.job, run.slurm_output().display());
        complain!("{}", printable(&line));
    }
    if !args.follow && files(&run, args.rank)?.is_empty() {
        return Err(Failure::failed(no_log(&run, args.rank)?));
    }
    let mut out = Results::new();
    let shown = |entry: &Entry| if args.json { entry.json() } else { entry.show(colour) };
    if !args.json {
        let causes = causes(&run, Status::read(&run).as_ref())?;
        let (on, off) = if colour { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
        for line in &causes {
            out.line(format_args!("{on}{}{off}", printable_lines(line)));
        }
        if !causes.is_empty() {
            out.line(format_args!(""));
        }
    }
    let mut last = VecDeque::new();
    let tailed = merged(&run, args, |entry| {
        let Some(count) = args.lines else {
            return out.line(format_args!("{}", shown(&entry)));
        };
        if last.len() == count {
            last.pop_front();
        }
        if count > 0 {
            last.push_back(entry);
        }
    })?;
    for entry in &last {
        out.line(format_args!("{}", shown(entry)));
    }
    out.flush();
    if !args.follow {
        return Ok(());
    }
    let mut reader = Reader { tailed, rank: args.rank, last_bytes: None };
    loop {
        std::thread::sleep(FOLLOW_EVERY);
        for entry in reader.more(&run, false)? {
            if args.shows(entry.level, &entry.target) {
                out.line(format_args!("{}", shown(&entry)));
            }
        }
        out.flush();
    }
}

/// Why there is nothing to show, in a line.
fn no_log(run: &RunDir, rank: Option<u32>) -> Result<String, Failure> {
    let whose = rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
    let last = files(run, None)?.iter().filter_map(|file| file.rank).max();
    let why =
        last.map_or("no rank has started yet".into(), |last| format!("the last rank with one is {last}"));
    Ok(format!("no log{whose} in {}: {why}", run.logs().display()))
}

/// The last lines of one log, for people; empty when there is none.
pub fn tail(path: &Path, lines: usize) -> Vec<String> {
    let entries = Tailed::from_end(path, TAIL_BYTES).more(path, "", true).unwrap_or_default();
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

/// Year, month and day of a time in seconds since 1970: UTC.
pub fn date(seconds: f64) -> (i64, i64, i64) {
    // Of years that begin in March, in eras of 400 years; the way back from [`unix_seconds`].
    let days = (seconds / 86_400.0).floor() as i64 + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    (400 * era + year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_tracing_are_read() {
        let line = r#"{"timestamp":"2026-01-02T03:04:05.678901Z","level":"WARN","fields":{"message":"slow","rank":3,"why":"disk"},"target":"x"}"#;
        let entry = Entry::parse("rank 3", line, "");
        assert_eq!(entry.level, Some(Level::Warn));
        assert_eq!(entry.show(false), "2026-01-02 03:04:05.678  WARN rank 3      slow rank=3 why=disk");
        let line = r#"{"timestamp":"2026-01-02T03:04:05.678901Z","level":"INFO","message":"checkpoint","step":8,"target":"x"}"#;
        assert_eq!(
            Entry::parse("rank 0", line, "").show(false),
            "2026-01-02 03:04:05.678  INFO rank 0      checkpoint step=8"
        );
        assert_eq!(Entry::parse("", line, "").show(false), "2026-01-02 03:04:05.678  INFO checkpoint step=8");
        let noise = Entry::parse("rank 3", "Segmentation fault", &entry.time);
        assert_eq!(noise.show(false), "2026-01-02 03:04:05.678       rank 3      Segmentation fault");
    }

    #[test]
    fn what_a_log_holds_steers_no_terminal() {
        let line = "{\"timestamp\":\"\\u001b[2J\",\"level\":\"WARN\",\"message\":\"a\\u001b[31mb\\n\\tc\",\"why\":\"\u{9b}1m\"}";
        let entry = Entry::parse("x\x1b", line, "");
        assert_eq!(
            entry.show(false),
            "\\x1b[2J                  WARN x\\x1b       a\\x1b[31mb\n    \tc why=\\x9b1m"
        );
        let coloured = entry.show(true);
        assert!(coloured.contains("a\\x1b[31mb") && coloured.contains("why=\\x9b1m"), "{coloured:?}");
        assert!(!entry.json().chars().any(char::is_control), "{:?}", entry.json());
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
            let (year, month, day) = date(seconds);
            assert_eq!(format!("{year:04}-{month:02}-{day:02}"), text[..10]);
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
        let mut reader = Reader { rank: Some(3), ..Reader::default() };
        assert_eq!(seen(reader.more(&run, false).expect("read")), ["1"]);
        fs::write(&log, line(1) + &line(2)).expect("written");
        fs::rename(&log, log.with_extension("1.jsonl")).expect("renamed");
        fs::write(&log, line(3)).expect("written");
        fs::write(run.rank_log(4), line(4)).expect("written");
        assert_eq!(seen(reader.more(&run, false).expect("read")), ["2", "3"]);
        assert_eq!(seen(Reader::default().more(&run, false).expect("read")), ["1", "2", "3", "4"]);

        // The same from the beginning, a line at a time, and on from there.
        fs::write(run.logs().join("launcher.jsonl"), line(2) + "half a li").expect("written");
        let mut args = args(None, None);
        args.follow = true;
        let mut all = Vec::new();
        let tailed = merged(&run, &args, |entry| {
            all.push(format!("{}: {}", entry.who, entry.message));
        });
        assert_eq!(all, ["rank 3: 1", "launcher: 2", "rank 3: 2", "rank 3: 3", "rank 4: 4"]);
        let mut reader = Reader { tailed: tailed.expect("read"), ..Reader::default() };
        fs::write(&log, line(3) + &line(5)).expect("written");
        fs::write(run.logs().join("launcher.jsonl"), line(2) + "half a line\n").expect("written");
        assert_eq!(seen(reader.more(&run, false).expect("read")), ["half a line", "5"]);
        args.rank = Some(4);
        let mut of_four = Vec::new();
        merged(&run, &args, |entry| of_four.push(entry.message)).expect("read");
        assert_eq!(of_four, ["4"]);
    }

    fn args(level: Option<Level>, target: Option<&str>) -> LogsArgs {
        LogsArgs {
            run: PathBuf::new(),
            rank: None,
            level: level.unwrap_or(Level::Info),
            target: target.map(str::to_owned),
            lines: None,
            follow: false,
            json: false,
        }
    }

    #[test]
    fn the_first_error_is_looked_for_in_all_logs_after_the_last_start() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        fs::create_dir(run.logs()).expect("made");
        let line = |second: u32, level: &str, message: &str| {
            format!(
                "{{\"timestamp\":\"2026-01-02T03:04:{second:02}Z\",\"level\":\"{level}\",\"message\":\"{message}\"}}\n"
            )
        };
        // As older versions wrote it: fields in `fields`.
        let started = |second: u32| {
            format!(
                "{{\"timestamp\":\"2026-01-02T03:04:{second:02}Z\",\"level\":\"INFO\",\
                 \"fields\":{{\"message\":\"started /bin/w\",\"generation\":1}},\"target\":\"x\"}}\n"
            )
        };
        fs::write(run.logs().join("launcher.jsonl"), started(0) + &started(20)).expect("written");
        fs::write(run.rank_log(0), line(5, "ERROR", "of the last start") + &line(30, "ERROR", "follows"))
            .expect("written");
        fs::write(run.rank_log(1), line(1, "INFO", "no ERROR") + &line(25, "ERROR", "the cause"))
            .expect("written");
        let mut status = Status::new("run", 2);
        (status.state, status.exit_code, status.error) = (State::Failed, Some(1), Some("why".into()));
        let causes = causes(&run, Some(&status)).expect("read");
        assert_eq!(
            causes,
            ["failed with exit code 1: why", "first error of a rank: 2026-01-02T03:04:25Z rank 1: the cause"]
        );
        let entry = Entry::parse("launcher", &started(0), "");
        assert_eq!(
            (entry.number("generation"), entry.text().as_str()),
            (Some(1.0), "started /bin/w generation=1")
        );
    }

    #[test]
    fn a_rank_without_a_log_is_told_who_has_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        let none = no_log(&run, None).expect("looked");
        assert!(none.starts_with("no log in ") && none.ends_with("/logs: no rank has started yet"), "{none}");
        fs::create_dir(run.logs()).expect("made");
        fs::write(run.rank_log(3), "").expect("written");
        let none = no_log(&run, Some(5)).expect("looked");
        assert!(
            none.starts_with("no log of rank 5 in ") && none.ends_with("the last rank with one is 3"),
            "{none}"
        );
    }

    #[test]
    fn filters_by_level_and_target() {
        let args = args(Some(Level::Warn), Some("mentee_worker::eval"));
        let table = [
            ("WARN", "mentee_worker::eval", true),
            ("ERROR", "mentee_worker::eval::knn", true),
            ("INFO", "mentee_worker::eval", false),
            ("WARN", "mentee_worker::evaluation", false),
            ("WARN", "mentee_worker", false),
        ];
        for (level, target, shown) in table {
            let line = format!("{{\"level\":\"{level}\",\"target\":\"{target}\",\"message\":\"x\"}}");
            let entry = Entry::parse("rank 0", &line, "");
            assert_eq!(args.shows(entry.level, &entry.target), shown, "{line}");
        }
    }
}
