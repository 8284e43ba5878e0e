//! The run directory: made on the first start, checked on every other, and one run's at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mentee_cluster::server;
use mentee_config::{Recipe, complain};

use crate::error::WorkerError;

/// Where a run of this recipe lives unless the user says otherwise.
pub fn default_path(recipe: &Recipe) -> PathBuf {
    Path::new("runs").join(&recipe.run.name)
}

/// Checks that `run_dir` is new or a run of this recipe; nothing is changed.
pub fn check(run_dir: &Path, recipe: &Recipe) -> Result<(), WorkerError> {
    let path = run_dir.join("plan.toml");
    if !path.exists() {
        return Ok(());
    }
    let plan = Recipe::from_plan(&path)?;
    match recipe.first_difference(&plan) {
        Some(difference) => Err(WorkerError::OtherRecipe { run_dir: run_dir.to_owned(), difference }),
        None => Ok(()),
    }
}

/// Rank 0: makes the directory and writes `plan.toml`, anew where a key that may change in a run has changed.
pub fn create(run_dir: &Path, recipe: &Recipe) -> Result<(), WorkerError> {
    std::fs::create_dir_all(run_dir).map_err(WorkerError::io("create", run_dir))?;
    let path = run_dir.join("plan.toml");
    let text = recipe.to_toml();
    if std::fs::read_to_string(&path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let partial = run_dir.join(format!(".plan.toml.{}", std::process::id()));
    let write = || {
        let mut file = std::fs::File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    write().map_err(WorkerError::io("write", &path))
}

/// How long a process that was killed may take to be gone.
const GOING: Duration = Duration::from_secs(2);

/// Rank 0 of a run without a supervisor, before anything is written: the directory is this process's as long as it lives, by
/// the lock that a supervisor takes too.
pub fn lock(run_dir: &Path) -> Result<(), WorkerError> {
    std::fs::create_dir_all(run_dir).map_err(WorkerError::io("create", run_dir))?;
    let path = run_dir.join(".lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(WorkerError::io("open", &path))?;
    let begin = Instant::now();
    while let Err(error) = try_lock(&file) {
        if error.kind() != ErrorKind::WouldBlock {
            // A file system without locks is no reason not to train.
            complain!("warning: {}: cannot be locked ({error}); start no second run there", path.display());
            return Ok(());
        }
        if begin.elapsed() > GOING {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let holder = Some(holder.trim()).filter(|holder| !holder.is_empty()).unwrap_or("another run");
            return Err(WorkerError::Usage(format!(
                "{} is in use by {holder}: wait for it, stop it, or give another --run-dir",
                run_dir.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    // For whoever is refused: nothing but that line depends on it.
    let _ = file.set_len(0);
    let _ = file.write_all(format!("process {} on {}\n", std::process::id(), server::hostname()).as_bytes());
    std::mem::forget(file); // the lock ends with the process
    Ok(())
}

fn try_lock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file`.
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
