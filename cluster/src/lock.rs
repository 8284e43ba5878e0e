//! One run at a time in a run directory: the lock that its supervisor holds, or rank 0 of a run that has none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::server;

/// How often a holder that is on its way out is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// A run directory that is this process's as long as this value lives, or the process.
#[derive(Debug)]
#[must_use = "the directory is another's as soon as this is dropped"]
pub struct Lock {
    _file: File,
    path: PathBuf,
    /// What this process wrote into it.
    line: String,
    /// A line to say where nothing keeps others out: a file system that has no locks is no reason not to train.
    pub warning: Option<String>,
}

/// Why a directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another run is in it.
    #[error("{} is in use by {holder}: wait for it, stop it, or give another --run-dir", .run_dir.display())]
    Held {
        /// The directory.
        run_dir: PathBuf,
        /// Its process and machine.
        holder: String,
    },
    /// The system's.
    #[error("cannot open {}: {source}", .path.display())]
    Io {
        /// The lock's file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

fn file_of(run_dir: &Path) -> PathBuf {
    run_dir.join(".lock")
}

impl Lock {
    /// Takes the lock of `run_dir`, which is made if it is missing. A holder may take `patience` to be gone.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn take(run_dir: &Path, patience: Duration) -> Result<Self, LockError> {
        let path = file_of(run_dir);
        let open = || {
            fs::create_dir_all(run_dir)?;
            let mut options = OpenOptions::new();
            let file = open_itself(options.read(true).write(true).create(true).truncate(false), &path)?;
            match file.metadata()?.is_file() {
                true => Ok(file),
                false => Err(io::Error::other("is no file: remove it")),
            }
        };
        let mut file = open().map_err(|source| LockError::Io { path: path.clone(), source })?;
        let line = format!("process {} on {}\n", std::process::id(), server::hostname());
        let begin = Instant::now();
        while let Err(error) = flock(&file, libc::LOCK_EX) {
            if error.kind() != ErrorKind::WouldBlock {
                let run_dir = run_dir.display();
                let warning =
                    format!("warning: {run_dir}: cannot be locked ({error}); start no second run there");
                return Ok(Self { _file: file, path, line, warning: Some(warning) });
            }
            if begin.elapsed() >= patience {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = Some(holder.trim()).filter(|holder| !holder.is_empty()).unwrap_or("another run");
                return Err(LockError::Held { run_dir: run_dir.to_owned(), holder: holder.to_owned() });
            }
            std::thread::sleep(LOOK);
        }
        // For whoever is refused: nothing but that line depends on it.
        let _ = file.set_len(0);
        let _ = file.write_all(line.as_bytes());
        Ok(Self { _file: file, path, line, warning: None })
    }

    /// Whether the directory was removed since, `witness` being another file that it always holds, or made again by another
    /// run: the lock is of a file that is no more. (The lock's file alone may have been tidied away.)
    pub fn is_lost(&self, witness: &Path) -> bool {
        match fs::read_to_string(&self.path) {
            // Empty: it found no room, or another is about to write.
            Ok(line) => !line.is_empty() && line != self.line && self.warning.is_none(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fs::metadata(witness).is_err_and(|error| error.kind() == ErrorKind::NotFound)
            }
            Err(_) => false,
        }
    }

    /// Whether another process holds it.
    pub fn is_held(run_dir: &Path) -> bool {
        let Ok(file) = open_itself(OpenOptions::new().read(true), &file_of(run_dir)) else { return false };
        // A shared lock taken here ends with `file`.
        flock(&file, libc::LOCK_SH).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Keeps it as long as the process lives.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

/// What is there under that name: not what a link leads to, which is another's to write to, and not waiting for the other end of a
/// pipe.
fn open_itself(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let opened = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other("is a symbolic link, which is not followed: remove it"),
        _ => error,
    })
}

fn flock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file`.
    match unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_holders_at_a_time_and_the_other_is_told_whose() {
        let run_dir = std::env::temp_dir().join(format!("mentee-lock-{}", std::process::id()));
        assert!(!Lock::is_held(&run_dir));
        let lock = Lock::take(&run_dir, Duration::ZERO).unwrap();
        assert!(lock.warning.is_none());
        assert!(Lock::is_held(&run_dir));
        // flock belongs to an open file, not to a process: a second one is refused here too.
        let refused = Lock::take(&run_dir, Duration::ZERO).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains(&format!("in use by process {} on", std::process::id())), "{said}");

        let waiting = {
            let run_dir = run_dir.clone();
            std::thread::spawn(move || Lock::take(&run_dir, Duration::from_secs(60)))
        };
        std::thread::sleep(Duration::from_millis(20));
        drop(lock);
        let lock = waiting.join().unwrap().unwrap();
        let plan = run_dir.join("plan.toml");
        fs::write(&plan, "").unwrap();
        assert!(Lock::is_held(&run_dir) && !lock.is_lost(&plan));
        fs::remove_file(file_of(&run_dir)).unwrap();
        assert!(!lock.is_lost(&plan), "tidied away");
        // Removed, and made again by another.
        fs::remove_dir_all(&run_dir).unwrap();
        assert!(lock.is_lost(&plan));
        let another = Lock::take(&run_dir, Duration::ZERO).unwrap();
        fs::write(file_of(&run_dir), "process 1 on elsewhere\n").unwrap();
        assert!(lock.is_lost(&plan) && another.is_lost(&plan));
        drop((lock, another));
        assert!(!Lock::is_held(&run_dir));
        fs::remove_dir_all(&run_dir).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let run_dir = std::env::temp_dir().join(format!("mentee-lock-link-{}", std::process::id()));
        fs::create_dir_all(&run_dir).unwrap();
        let another = run_dir.join("another");
        fs::write(&another, "what must stay").unwrap();
        std::os::unix::fs::symlink(&another, file_of(&run_dir)).unwrap();
        let error = Lock::take(&run_dir, Duration::ZERO).unwrap_err().to_string();
        let path = file_of(&run_dir).display().to_string();
        let said = format!("cannot open {path}: is a symbolic link, which is not followed: remove it");
        assert_eq!(error, said);
        assert!(!Lock::is_held(&run_dir));
        assert_eq!(fs::read_to_string(&another).unwrap(), "what must stay");
        fs::remove_dir_all(&run_dir).unwrap();
    }

    #[test]
    fn what_cannot_be_made_is_named() {
        let below = std::env::temp_dir().join(format!("mentee-lock-file-{}", std::process::id()));
        fs::write(&below, "a file").unwrap();
        let error = Lock::take(&below.join("run"), Duration::ZERO).unwrap_err();
        assert!(error.to_string().starts_with("cannot open "), "{error}");
        fs::remove_file(&below).unwrap();
    }
}
