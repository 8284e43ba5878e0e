//! A run directory: where its files are, and who may write to it.
//!
//! ```text
//! RUN/plan.toml  metrics.jsonl  logs/*.jsonl  logs/worker-output.log  checkpoints/step-…/  views.png  report.html
//! RUN/submit.sbatch  slurm.json  logs/slurm.log     of a run that `mentee submit` handed to Slurm
//! RUN/status.json   where the run stands, kept by the supervisor (see `status.rs`)
//! RUN/.lock         held by the supervisor as long as it lives
//! ```

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mentee_cluster::{Lock, LockError};
use mentee_config::replace::is_left_of;
use mentee_config::{Recipe, complain, counted};

use crate::failure::Failure;

/// The longest name that Linux has, bytes (`NAME_MAX`).
const LONGEST_NAME: usize = 255;
/// The longest path that Linux takes (`PATH_MAX`, with the zero behind it), without room for what lies in a run directory.
const LONGEST_PATH: usize = 4096 - 256;

/// A path that may lead nowhere yet, absolute and with its symbolic links resolved.
///
/// # Errors
/// The system's, where there is no current directory.
pub fn resolved(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let whole = path.ancestors().find_map(|there| {
        let mut whole = fs::canonicalize(there).ok()?;
        whole.extend(path.strip_prefix(there).ok()?); // joined, nothing would leave a slash at the end
        Some(whole)
    });
    Ok(whole.unwrap_or(path))
}

/// A run directory, by its absolute path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// One that may not exist yet; touches nothing.
    ///
    /// # Errors
    /// [`Failure`] with exit code 2 for an empty path, a file's, one that is too long, or one that is not UTF-8.
    pub fn at(path: &Path) -> Result<RunDir, Failure> {
        // So that one directory has one name in process lists, before it is made and after.
        let path = resolved(path)
            .map_err(|error| Failure::usage(format!("--run-dir {}: {error}", path.display())))?;
        let refuse = |why: &str| Err(Failure::usage(format!("--run-dir {}: {why}", path.display())));
        if path.to_str().is_none() {
            return refuse("its path must be UTF-8: give another");
        }
        if path.metadata().is_ok_and(|it| !it.is_dir()) {
            return refuse("is a file: give a folder");
        }
        let too_long = |error: io::Error| error.raw_os_error() == Some(libc::ENAMETOOLONG);
        if path.as_os_str().len() > LONGEST_PATH
            || path.iter().any(|name| name.len() > LONGEST_NAME)
            || path.metadata().is_err_and(too_long)
        {
            return refuse("is too long a name for a file system: give a shorter one");
        }
        Ok(RunDir(path))
    }

    /// One that must hold a run.
    ///
    /// # Errors
    /// [`Failure`] with exit code 2 when there is none.
    pub fn existing(path: &Path) -> Result<RunDir, Failure> {
        if path.is_file() {
            return Err(Failure::usage(format!(
                "{} is a file: give the folder of `mentee run --run-dir`",
                path.display()
            )));
        }
        let dir = RunDir::at(path)?;
        if dir.plan().is_file() || dir.metrics().is_file() || dir.checkpoints().is_dir() {
            return Ok(dir);
        }
        if let Some(runs) = runs_of_sweep(&dir.0) {
            let path = path.display();
            return Err(Failure::usage(format!(
                "{path} is a sweep of {}: name one, e.g. {path}/0, or `mentee report {path}/[0-9]*` to compare",
                counted(runs, "run")
            )));
        }
        Err(Failure::usage(format!(
            "{} is no run directory (no plan.toml in it): give the folder of `mentee run --run-dir`",
            path.display()
        )))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The resolved recipe.
    pub fn plan(&self) -> PathBuf {
        self.0.join("plan.toml")
    }

    /// One JSON object a logged step.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// Logs of all processes.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// What the workers wrote to stdout and stderr.
    pub fn worker_output(&self) -> PathBuf {
        self.logs().join("worker-output.log")
    }

    /// The log of one rank.
    pub fn rank_log(&self, rank: u32) -> PathBuf {
        self.logs().join(format!("rank-{rank:05}.jsonl"))
    }

    /// Checkpoints, one folder each.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// Where the run stands.
    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }

    /// Which Slurm job it is, of a run that was submitted.
    pub fn slurm(&self) -> PathBuf {
        self.0.join("slurm.json")
    }

    /// What was submitted.
    pub fn script(&self) -> PathBuf {
        self.0.join("submit.sbatch")
    }

    /// What Slurm and the supervisor wrote, of a run that was submitted.
    pub fn slurm_output(&self) -> PathBuf {
        self.logs().join("slurm.log")
    }

    /// The step of the newest checkpoint; 0 when there is none.
    pub fn newest_step(&self) -> u64 {
        let entries = mentee_checkpoint::list(&self.checkpoints()).unwrap_or_default();
        entries.iter().filter(|entry| entry.state.is_ok()).map(|entry| entry.step).max().unwrap_or(0)
    }

    /// The self-contained page.
    pub fn report(&self) -> PathBuf {
        self.0.join("report.html")
    }

    /// Example views, written by rank 0.
    pub fn views(&self) -> PathBuf {
        self.0.join("views.png")
    }

    /// Refuses a directory that holds the run of another recipe, or the recipe's images.
    ///
    /// # Errors
    /// [`Failure`] with exit code 2 that names the first difference.
    pub fn check_recipe(&self, recipe: &Recipe) -> Result<(), Failure> {
        if fs::canonicalize(&recipe.data.path).is_ok_and(|images| images == self.0) {
            return Err(Failure::usage(format!(
                "--run-dir {}: is data.path, the folder of the images: give another",
                self.0.display()
            )));
        }
        match recipe.difference_to_run(&self.0)? {
            None => Ok(()),
            Some(difference) => Err(Failure::usage(format!(
                "{} holds a run of another recipe ({difference}): give another --run-dir, or the recipe it was started \
                 with",
                self.0.display()
            ))),
        }
    }

    /// Makes the folders and takes the lock, whose holder may take `patience` to be gone. The directory belongs to this process
    /// as long as the lock lives.
    ///
    /// # Errors
    /// [`Failure`] when another supervisor holds it, or the system refuses.
    pub fn lock(&self, patience: Duration) -> Result<Lock, Failure> {
        let lock = match Lock::take(&self.0, Duration::ZERO) {
            Err(LockError::Held { run_dir, holder }) if !patience.is_zero() => {
                let (run_dir, seconds) = (run_dir.display(), patience.as_secs());
                complain!("{run_dir} is still in use by {holder}: waiting for it, for {seconds} s at most");
                Lock::take(&self.0, patience)
            }
            taken => taken,
        };
        let lock = lock.map_err(|error| match error {
            LockError::Held { .. } => Failure::usage(error.to_string()),
            LockError::Io { .. } => Failure::failed(error.to_string()),
        })?;
        self.sweep();
        if let Some(warning) = &lock.warning {
            complain!("{warning}");
        }
        fs::create_dir_all(self.logs()).map_err(|error| Failure::io("create", &self.logs(), &error))?;
        Ok(lock)
    }

    /// Removes what `write_atomically` left of supervisors that were killed.
    fn sweep(&self) {
        let written = [self.plan(), self.status(), self.slurm(), self.script(), self.report()];
        let is_left = |name: &str| {
            let names = written.iter().filter_map(|path| path.file_name()?.to_str());
            names.into_iter().any(|of| is_left_of(name, of))
        };
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(is_left) {
                let _ = fs::remove_file(entry.path()); // it takes room and does no other harm
            }
        }
    }

    /// Whether a supervisor is at work here.
    pub fn is_locked(&self) -> bool {
        Lock::is_held(&self.0)
    }

    /// Appends one line to `metrics.jsonl`, also behind a line that a killed worker left unfinished.
    ///
    /// # Errors
    /// The system's.
    pub fn append_metric(&self, line: &serde_json::Value) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(self.metrics())?;
        let mut text = String::new();
        if file.seek(SeekFrom::End(0))? > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                text.push('\n');
            }
        }
        text.push_str(&line.to_string());
        text.push('\n');
        file.write_all(text.as_bytes())
    }
}

/// How many runs a sweep's folder has; none when it is no sweep's.
fn runs_of_sweep(folder: &Path) -> Option<u64> {
    let sweep: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("sweep.json")).ok()?).ok()?;
    Some(sweep["variants"].as_array()?.len() as u64)
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_name_before_it_is_made_and_after() {
        let folder = tempfile::tempdir().expect("a folder");
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        fs::create_dir(&real).expect("made");
        std::os::unix::fs::symlink(&real, &link).expect("linked");
        let before = RunDir::at(&link.join("runs/x")).expect("a path");
        fs::create_dir_all(before.path()).expect("made");
        let after = RunDir::at(&link.join("runs/x")).expect("a path");
        assert_eq!(after.path().as_os_str(), before.path().as_os_str());
        assert_eq!(before.path(), fs::canonicalize(&real).unwrap().join("runs/x"));
        fs::write(real.join("file"), "").expect("written");
        let refused = RunDir::at(&link.join("file")).expect_err("a file");
        assert_eq!(refused.exit_code, 2, "{refused}");
    }

    #[test]
    fn a_sweep_is_told_from_what_holds_no_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let refused = || RunDir::existing(folder.path()).expect_err("no run");
        assert!(refused().line.contains("is no run directory"), "{}", refused());
        fs::write(folder.path().join("sweep.json"), "{\"job\":\"7\",\"variants\":[[\"a=1\"],[\"a=2\"]]}")
            .unwrap();
        let path = folder.path().display();
        let line = format!(
            "{path} is a sweep of 2 runs: name one, e.g. {path}/0, or `mentee report {path}/[0-9]*` to compare"
        );
        assert_eq!((refused().exit_code, refused().line), (2, line));
    }

    #[test]
    fn the_folder_of_the_images_is_no_run_directory() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut recipe = Recipe::load("demo", &[]).expect("built in");
        recipe.data.path = folder.path().to_owned();
        let refused = RunDir::at(folder.path()).unwrap().check_recipe(&recipe).expect_err("the images'");
        assert_eq!(refused.exit_code, 2);
        assert!(RunDir::at(&folder.path().join("runs/first")).unwrap().check_recipe(&recipe).is_ok());
    }

    #[test]
    fn a_lock_that_is_given_up_in_time_is_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = RunDir::at(folder.path()).unwrap();
        let held = dir.lock(Duration::ZERO).expect("free");
        assert_eq!(dir.lock(Duration::ZERO).map(drop).expect_err("held").exit_code, 2);
        let gives_up = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(held);
        });
        assert!(dir.lock(Duration::from_secs(60)).is_ok());
        gives_up.join().expect("dropped");
    }

    #[test]
    fn a_lock_sweeps_what_killed_supervisors_left() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["plan.toml.77.tmp", "status.json.8.tmp", "plan.toml.x.tmp", "mine.77.tmp"] {
            fs::write(folder.path().join(name), "").expect("written");
        }
        let _lock = RunDir::at(folder.path()).unwrap().lock(Duration::ZERO).expect("free");
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.retain(|name| name.to_string_lossy().ends_with(".tmp"));
        left.sort();
        assert_eq!(left, ["mine.77.tmp", "plan.toml.x.tmp"]);
    }
}
