//! The system calls that decide whether a checkpoint survives a crash, behind one door.
//!
//! All changes to the disk go through [`Disk`], which asks a [`Probe`] first. In use nothing is asked; a test
//! cuts the power before the n-th change and then looks at what a reader finds.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use crate::CheckpointError;

/// Allows or refuses the next change to the disk.
pub(crate) trait Probe {
    fn before_change(&mut self) -> io::Result<()>;
}

/// The probe in use.
pub(crate) struct NoProbe;

impl Probe for NoProbe {
    fn before_change(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The file system, as far as a writer needs it.
pub(crate) struct Disk<'a> {
    pub(crate) probe: &'a mut dyn Probe,
}

impl Disk<'_> {
    fn change<R>(
        &mut self,
        action: &'static str,
        path: &Path,
        work: impl FnOnce() -> io::Result<R>,
    ) -> Result<R, CheckpointError> {
        self.probe.before_change().and_then(|()| work()).map_err(|source| CheckpointError::Io {
            action,
            path: path.into(),
            source,
        })
    }

    /// Creates a folder and its missing parents.
    pub(crate) fn create_folders(&mut self, path: &Path) -> Result<(), CheckpointError> {
        self.change("create folder", path, || fs::create_dir_all(path))
    }

    /// Creates a folder that is empty: leftovers of the same name go.
    pub(crate) fn create_empty_folder(&mut self, path: &Path) -> Result<(), CheckpointError> {
        if path.exists() {
            self.remove_folder(path)?;
        }
        self.change("create folder", path, || fs::create_dir(path))
    }

    /// Creates a new file.
    pub(crate) fn create(&mut self, path: &Path) -> Result<File, CheckpointError> {
        self.change("create", path, || File::create_new(path))
    }

    /// Writes all of `bytes`.
    pub(crate) fn write(
        &mut self,
        file: &mut File,
        bytes: &[u8],
        path: &Path,
    ) -> Result<(), CheckpointError> {
        self.change("write", path, || file.write_all(bytes))
    }

    /// Waits until a file's content is on the disk.
    pub(crate) fn sync(&mut self, file: &File, path: &Path) -> Result<(), CheckpointError> {
        self.change("sync", path, || file.sync_all())
    }

    /// Waits until a folder's list of names is on the disk.
    pub(crate) fn sync_folder(&mut self, path: &Path) -> Result<(), CheckpointError> {
        self.change("sync folder", path, || File::open(path)?.sync_all())
    }

    /// Gives a folder a name that no other has.
    pub(crate) fn rename(&mut self, from: &Path, to: &Path) -> Result<(), CheckpointError> {
        self.change("rename to", to, || fs::rename(from, to))
    }

    /// Swaps two folders in one step; `false` if this file system cannot.
    pub(crate) fn exchange(&mut self, a: &Path, b: &Path) -> Result<bool, CheckpointError> {
        self.change("exchange", b, || exchange(a, b))
    }

    /// Removes a folder with its content.
    pub(crate) fn remove_folder(&mut self, path: &Path) -> Result<(), CheckpointError> {
        self.change("remove", path, || fs::remove_dir_all(path))
    }
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    use std::{ffi::CString, os::unix::ffi::OsStrExt};

    let a = CString::new(a.as_os_str().as_bytes())?;
    let b = CString::new(b.as_os_str().as_bytes())?;
    // SAFETY: both paths are zero-terminated and live over the call; the call takes nothing else by
    // reference.
    let status = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if status == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // The kernel or the file system does not know the call.
        Some(libc::ENOSYS | libc::EINVAL | libc::ENOTSUP) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(not(target_os = "linux"))]
fn exchange(_a: &Path, _b: &Path) -> io::Result<bool> {
    Ok(false)
}
