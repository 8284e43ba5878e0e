//! One JSON line an event in `RUN/logs/rank-00000.jsonl`; warnings also on the terminal, for people.
//!
//! A log of [`MAX_BYTES`] becomes `rank-00000.1.jsonl`, that one `rank-00000.2.jsonl`, and so on up to [`KEPT`].

use std::fmt::{Debug, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::error::WorkerError;
use crate::times;

/// Where the coordinator's decisions go.
const COORDINATOR: &str = "mentee::coordinator";
/// At this size a log is put aside.
const MAX_BYTES: u64 = 16 << 20;
/// So many logs that were put aside are kept.
const KEPT: u32 = 3;

/// Starts logging for this process; `RUST_LOG` filters the file, `info` by default. Warnings reach the terminal from
/// every rank when a supervisor reads them, which shows those that many ranks give once; else from rank 0 alone. What
/// the coordinator decides goes to a file of its own on the rank that `hosts` it.
pub fn start(run_dir: &Path, rank: u32, supervised: bool, hosts: bool) -> Result<(), WorkerError> {
    let folder = run_dir.join("logs");
    std::fs::create_dir_all(&folder).map_err(WorkerError::io("create", &folder))?;
    let open = |name: &str| {
        let path = folder.join(name);
        Rotating::open(&path, MAX_BYTES).map(Mutex::new).map_err(WorkerError::io("open", path))
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // What `mentee monitor` and `mentee report` read is always there.
    let times = format!("{}=debug", times::TARGET).parse().expect("a constant directive");
    // A layer's own complaint of a full disk would go to stderr by `eprintln!`, which panics when that is full too.
    let to_file = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .log_internal_errors(false)
        .with_writer(open(&format!("rank-{rank:05}.jsonl"))?)
        .with_filter(filter.add_directive(times))
        .with_filter(filter_fn(move |event| !hosts || event.target() != COORDINATOR));
    let of_coordinator = if hosts { Some(open("coordinator.jsonl")?) } else { None }.map(|file| {
        let wanted = |event: &Metadata<'_>| event.target() == COORDINATOR && *event.level() <= Level::INFO;
        tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .log_internal_errors(false)
            .with_writer(file)
            .with_filter(filter_fn(wanted))
    });
    let told = supervised || rank == 0;
    // What ends the process is said by `main`, on one line that starts with `error: `.
    let to_terminal = tracing_subscriber::fmt::layer()
        .event_format(Terse { rank })
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_filter(filter_fn(move |event| told && *event.level() == Level::WARN));
    // Fails only when logging was started before in this process.
    let _ = tracing_subscriber::registry().with(to_file).with(of_coordinator).with(to_terminal).try_init();
    Ok(())
}

/// A log that is put aside when it is large.
struct Rotating {
    path: PathBuf,
    file: File,
    bytes: u64,
    max_bytes: u64,
}

impl Rotating {
    fn open(path: &Path, max_bytes: u64) -> std::io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, bytes, max_bytes })
    }

    /// `rank-00000.jsonl` → `rank-00000.N.jsonl`.
    fn aside(&self, number: u32) -> PathBuf {
        self.path.with_extension(format!("{number}.jsonl"))
    }

    fn rotate(&mut self) -> std::io::Result<()> {
        for number in (1..KEPT).rev() {
            // The older ones may not exist yet.
            let _ = std::fs::rename(self.aside(number), self.aside(number + 1));
        }
        std::fs::rename(&self.path, self.aside(1))?;
        *self = Self::open(&self.path, self.max_bytes)?;
        Ok(())
    }
}

impl Write for Rotating {
    /// One event a call.
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.max_bytes {
            // Better a long log than none.
            let _ = self.rotate();
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// `warning: rank 3: skipped a damaged image step=17 sample=5`.
struct Terse {
    rank: u32,
}

impl<S, N> FormatEvent<S, N> for Terse
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut text = Text::default();
        event.record(&mut text);
        writeln!(writer, "warning: rank {}: {}{}", self.rank, text.message, text.fields)
    }
}

/// An event's words, all on one line.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}").replace('\n', " ");
        match field.name() {
            "message" => self.message = value,
            name => {
                let _ = write!(self.fields, " {name}={value}");
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_put_aside_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank-00000.jsonl");
        let mut log = Rotating::open(&path, 10).unwrap();
        for line in ["first\n", "second\n", "third\n", "fourth\n", "fifth\n", "a\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        assert_eq!(text("rank-00000.jsonl"), "fifth\na\n");
        assert_eq!(text("rank-00000.1.jsonl"), "fourth\n");
        assert_eq!(text("rank-00000.2.jsonl"), "third\n");
        assert_eq!(text("rank-00000.3.jsonl"), "second\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "the first is gone");
        drop(log);
        Rotating::open(&path, 10).unwrap().write_all(b"sixth\n").unwrap();
        assert_eq!(text("rank-00000.1.jsonl"), "fifth\na\n", "the size counts across starts");
    }
}
