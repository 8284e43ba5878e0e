//! The system calls that decide whether a checkpoint survives a crash, behind one door.
//!
//! Whatever a writer changes goes through a [`FileSystem`]. In use that is [`LocalDisk`]; the tests put one in its place
//! that fails at the n-th call, or that keeps account of what a power cut would leave (`tests/crash.rs`).

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use crate::CheckpointError;

/// The changes that a writer makes to a file system. None of them is on the disk before it was synced.
pub trait FileSystem: fmt::Debug + Send + Sync {
    /// Creates a folder and its missing parents; those that are there stay.
    ///
    /// # Errors
    /// The system's; so in all of these.
    fn create_folders(&self, path: &Path) -> io::Result<()>;

    /// Creates a file that must not be there.
    ///
    /// # Errors
    /// As above.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;

    /// Waits until a folder's list of names is on the disk.
    ///
    /// # Errors
    /// As above.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// Gives a folder a name that no other has.
    ///
    /// # Errors
    /// As above.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Swaps two folders in one step; `false` if this file system cannot.
    ///
    /// # Errors
    /// As above.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool>;

    /// Removes a folder with its content.
    ///
    /// # Errors
    /// As above.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
}

/// A file that is being written, from its start to its end.
pub trait NewFile {
    /// Adds all of `bytes`.
    ///
    /// # Errors
    /// The system's; some of the bytes may have been added.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Waits until the content is on the disk; the file's name in its folder need not be.
    ///
    /// # Errors
    /// The system's; what is on the disk then is unknown.
    fn sync(&mut self) -> io::Result<()>;
}

/// The machine's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalDisk;

impl FileSystem for LocalDisk {
    fn create_folders(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        Ok(Box::new(File::create_new(path)?))
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        exchange(a, b)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

impl NewFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// A file system whose errors say what was tried, and on which path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disk<'d>(pub(crate) &'d dyn FileSystem);

impl Disk<'_> {
    pub(crate) fn create_folders(self, path: &Path) -> Result<(), CheckpointError> {
        self.0.create_folders(path).map_err(io_error("create folder", path))
    }

    pub(crate) fn create(self, path: &Path) -> Result<Box<dyn NewFile>, CheckpointError> {
        self.0.create(path).map_err(io_error("create", path))
    }

    pub(crate) fn sync_folder(self, path: &Path) -> Result<(), CheckpointError> {
        self.0.sync_folder(path).map_err(io_error("sync folder", path))
    }

    pub(crate) fn rename(self, from: &Path, to: &Path) -> Result<(), CheckpointError> {
        self.0.rename(from, to).map_err(io_error("rename to", to))
    }

    pub(crate) fn exchange(self, a: &Path, b: &Path) -> Result<bool, CheckpointError> {
        self.0.exchange(a, b).map_err(io_error("exchange", b))
    }

    pub(crate) fn remove_folder(self, path: &Path) -> Result<(), CheckpointError> {
        self.0.remove_folder(path).map_err(io_error("remove", path))
    }
}

/// For `map_err` on what the system refuses.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { action, path, source }
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
