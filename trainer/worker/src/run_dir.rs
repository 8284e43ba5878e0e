//! The run directory: made on the first start, checked on every other, and one run's at a time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mentee_cluster::{Lock, LockError};
use mentee_config::replace::write_if_other;
use mentee_config::{Recipe, complain};

use crate::error::WorkerError;

/// Where a run of this recipe lives unless the user says otherwise.
pub fn default_path(recipe: &Recipe) -> PathBuf {
    Path::new("runs").join(&recipe.run.name)
}

/// The folder of a run's checkpoints.
pub fn checkpoints(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// Checks that `run_dir` is new or a run of this recipe; nothing is changed.
pub fn check(run_dir: &Path, recipe: &Recipe) -> Result<(), WorkerError> {
    match recipe.difference_to_run(run_dir)? {
        Some(difference) => Err(WorkerError::OtherRecipe { run_dir: run_dir.to_owned(), difference }),
        None => Ok(()),
    }
}

/// Rank 0: makes the directory and writes `plan.toml`, anew where a key that may change in a run has changed.
pub fn create(run_dir: &Path, recipe: &Recipe) -> Result<(), WorkerError> {
    std::fs::create_dir_all(run_dir).map_err(WorkerError::io("create", run_dir))?;
    let path = run_dir.join("plan.toml");
    write_if_other(&path, recipe.to_toml().as_bytes()).map_err(WorkerError::io("write", &path))
}

/// How long a process that was killed may take to be gone.
const GOING: Duration = Duration::from_secs(2);

/// Rank 0 of a run without a supervisor, before anything is written: the directory is this process's as long as it lives, by
/// the lock that a supervisor takes too.
pub fn lock(run_dir: &Path) -> Result<(), WorkerError> {
    let lock = Lock::take(run_dir, GOING).map_err(|error| match error {
        LockError::Held { .. } => WorkerError::Usage(error.to_string()),
        LockError::Io { .. } => WorkerError::Failed(error.to_string()),
    })?;
    if let Some(warning) = &lock.warning {
        complain!("{warning}");
    }
    lock.keep();
    Ok(())
}
