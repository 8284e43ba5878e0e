//! One JSON line an event in `RUN/logs/rank-00000.jsonl`; warnings of rank 0 also on the terminal.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::error::WorkerError;

/// Starts logging for this process; `RUST_LOG` filters, `info` by default.
pub fn start(run_dir: &Path, rank: u32) -> Result<(), WorkerError> {
    let folder = run_dir.join("logs");
    std::fs::create_dir_all(&folder).map_err(WorkerError::io("create", &folder))?;
    let path = folder.join(format!("rank-{rank:05}.jsonl"));
    let file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(WorkerError::io("open", &path))?;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let to_file = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_writer(Mutex::new(file))
        .with_filter(filter);
    let terminal_level = if rank == 0 { LevelFilter::WARN } else { LevelFilter::OFF };
    let to_terminal = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_writer(std::io::stderr)
        .with_filter(terminal_level);
    // Fails only when logging was started before in this process.
    let _ = tracing_subscriber::registry().with(to_file).with(to_terminal).try_init();
    Ok(())
}
