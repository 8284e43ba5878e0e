//! The testkit: real processes of `mentee` and `mentee-worker` on recipes small enough for a few seconds a run.
//!
//! Everything panics on failure with what a reader needs to see; nothing here is of use outside tests.

pub mod guide;
pub mod process;
pub mod recipe;
pub mod run_dir;
pub mod slurm;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_path_buf()
}

/// Held by a test that trains: two of them at once would fight for the cores and take longer than in turn.
pub fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A folder that goes when the value does.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("mentee-test-").tempdir().expect("a temporary folder")
}
