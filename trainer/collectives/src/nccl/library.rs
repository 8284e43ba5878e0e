//! Finds libnccl and looks its functions up.
//!
//! The copy that is already in the process comes first: libtorch's CUDA part brings its own, and two copies in one
//! process would fight over the same devices. The others matter where nothing has loaded it yet.

use std::{
    env,
    ffi::{CStr, OsStr, c_int, c_void},
    fmt,
    path::{Path, PathBuf},
};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use super::ffi::{Comm, Functions, ResultCode, SUCCESS, UNIQUE_ID_BYTES, UniqueId};

/// The name the library has for the loader, and as a file.
const NAME: &str = "libnccl.so.2";
/// Names the library to load when none is in the process yet: a path.
const VARIABLE: &str = "MENTEE_NCCL";
/// The oldest version that is accepted: the first whose non-blocking communicators can be started, finished and aborted
/// as [`super::Communicator`] does it.
pub const OLDEST: Version = Version(21800);

/// A version as NCCL codes it: `2.28.9` is 22809.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Versions up to 2.8 had one digit less.
        let unit = if self.0 < 10_000 { 1000 } else { 10_000 };
        write!(f, "{}.{}.{}", self.0 / unit, self.0 % unit / 100, self.0 % 100)
    }
}

/// Where the library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Another part of the program, libtorch most likely, had loaded it.
    InProcess,
    /// `MENTEE_NCCL` names it.
    Variable,
    /// In one of the folders that the caller named.
    Folder,
    /// On the loader's own path.
    System,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Found::InProcess => "already in the process",
            Found::Variable => "named by MENTEE_NCCL",
            Found::Folder => "found beside libtorch",
            Found::System => "found on the loader's path",
        })
    }
}

/// Where to look, in this order.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// Take the copy that this process has loaded already.
    pub in_process: bool,
    /// Then this file; what is wrong with it is an error, and nothing else is tried.
    pub file: Option<PathBuf>,
    /// Then `libnccl.so.2` in these folders.
    pub folders: Vec<PathBuf>,
    /// Then what the loader finds by itself (`LD_LIBRARY_PATH`, the system's folders).
    pub system: bool,
}

impl Search {
    /// Everywhere, with the file that `MENTEE_NCCL` names and the caller's folders, such as the `nvidia/nccl/lib` beside
    /// a libtorch that was installed as a Python package.
    pub fn everywhere(folders: &[PathBuf]) -> Search {
        let file = env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        Search { in_process: true, file, folders: folders.to_vec(), system: true }
    }
}

/// Why there is no library to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LibraryError {
    /// None was found.
    #[error("no NCCL library: tried {}; set MENTEE_NCCL to the path of a libnccl.so.2, {OLDEST} or newer", tried.join(", "))]
    NotFound {
        /// What was tried, and what came of it.
        tried: Vec<String>,
    },
    /// `MENTEE_NCCL` names something that cannot be loaded.
    #[error("MENTEE_NCCL={}: {reason}; let it name a libnccl.so.2, {OLDEST} or newer", path.display())]
    Named {
        /// Its value.
        path: PathBuf,
        /// The loader's account.
        reason: String,
    },
    /// A library was found, but not one that can be used.
    #[error("{}: NCCL {version} is too old; {OLDEST} or newer is needed", path.display())]
    TooOld {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: Version,
    },
    /// The library lacks a function.
    #[error("{}: no function {function}; is it NCCL, {OLDEST} or newer?", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The first function that is missing.
        function: &'static str,
    },
    /// The library does not say its version.
    #[error("{}: ncclGetVersion returned error {code}", path.display())]
    NoVersion {
        /// The file.
        path: PathBuf,
        /// What it returned.
        code: i32,
    },
}

/// The NCCL library of this process. It stays loaded until the process ends: it has threads of its own.
pub struct Library {
    pub(super) functions: Functions,
    path: PathBuf,
    version: Version,
    found: Found,
}

impl Library {
    /// Finds and opens the library, looking [everywhere](Search::everywhere).
    ///
    /// # Errors
    /// See [`LibraryError`].
    pub fn open(folders: &[PathBuf]) -> Result<Library, LibraryError> {
        Library::open_by(&Search::everywhere(folders))
    }

    /// Finds and opens the library.
    ///
    /// # Errors
    /// See [`LibraryError`].
    pub fn open_by(search: &Search) -> Result<Library, LibraryError> {
        let mut tried = Vec::new();
        if search.in_process {
            // SAFETY: RTLD_NOLOAD loads nothing, so no initialiser runs.
            match unsafe { Handle::open(Some(NAME), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NOLOAD) } {
                Ok(handle) => return Library::take(handle, None, Found::InProcess),
                Err(_) => tried.push(format!("{NAME} in this process (not loaded)")),
            }
        }
        match &search.file {
            Some(path) => {
                let handle = load(path.as_os_str())
                    .map_err(|reason| LibraryError::Named { path: path.clone(), reason })?;
                return Library::take(handle, Some(path), Found::Variable);
            }
            None => tried.push(format!("{VARIABLE} (not set)")),
        }
        for path in search.folders.iter().map(|folder| folder.join(NAME)) {
            if !path.exists() {
                tried.push(format!("{} (no such file)", path.display()));
                continue;
            }
            match load(path.as_os_str()) {
                Ok(handle) => return Library::take(handle, Some(&path), Found::Folder),
                Err(reason) => tried.push(format!("{} ({reason})", path.display())),
            }
        }
        if search.system {
            match load(OsStr::new(NAME)) {
                Ok(handle) => return Library::take(handle, None, Found::System),
                Err(_) => tried.push(format!("{NAME} on the loader's path (not found)")),
            }
        }
        Err(LibraryError::NotFound { tried })
    }

    /// Looks the functions up and the version over. `handle` is never closed again.
    fn take(handle: Handle, asked: Option<&Path>, found: Found) -> Result<Library, LibraryError> {
        let handle = std::mem::ManuallyDrop::new(handle);
        // Where it lies is known once a function of it is.
        // SAFETY: the symbol is only asked for its address.
        let place = unsafe { handle.get::<*const c_void>(b"ncclGetVersion\0") }
            .ok()
            .and_then(|symbol| file_of(symbol.as_raw_ptr()));
        let path = place.or_else(|| asked.map(Path::to_owned)).unwrap_or_else(|| PathBuf::from(NAME));
        // SAFETY: the library has NCCL's name, or the user says that it is NCCL; it is never closed.
        let functions = unsafe { Functions::load(&handle) }
            .map_err(|function| LibraryError::Missing { path: path.clone(), function })?;
        let mut version: c_int = 0;
        // SAFETY: writes one int.
        let code = unsafe { (functions.get_version)(&raw mut version) };
        if code != SUCCESS {
            return Err(LibraryError::NoVersion { path, code });
        }
        let version = Version(version);
        if version < OLDEST {
            return Err(LibraryError::TooOld { path, version });
        }
        Ok(Library { functions, path, version, found })
    }

    /// The file it was loaded from, as the loader knows it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How it was found.
    pub fn found(&self) -> Found {
        self.found
    }

    /// A new id, by which the ranks of one communicator find one another.
    pub(super) fn unique_id(&self) -> Result<UniqueId, ResultCode> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes one id.
        match unsafe { (self.functions.get_unique_id)(&raw mut id) } {
            SUCCESS => Ok(id),
            code => Err(code),
        }
    }

    /// The library's own words for a result.
    pub(super) fn text(&self, code: ResultCode) -> String {
        // SAFETY: returns a constant string for any code.
        unsafe { owned((self.functions.get_error_string)(code)) }
    }

    /// The library's account of its last error, on one line.
    pub(super) fn last_error(&self, comm: Comm) -> String {
        // SAFETY: a communicator of this library or null; returns a string that the library keeps.
        let text = unsafe { owned((self.functions.get_last_error)(comm)) };
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("path", &self.path)
            .field("version", &self.version)
            .field("found", &self.found)
            .finish_non_exhaustive()
    }
}

/// "NCCL 2.28.9, /…/libnccl.so.2 (already in the process)".
impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {}, {} ({})", self.version, self.path.display(), self.found)
    }
}

fn load(name: &OsStr) -> Result<Handle, String> {
    // SAFETY: runs the initialisers of a library that the user, or the folder beside libtorch, names as NCCL.
    unsafe { Handle::open(Some(name), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| error.to_string())
}

/// The file that an address of a loaded library belongs to.
fn file_of(address: *const c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all fields may be zero.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: fills `info`; any address is allowed.
    if unsafe { libc::dladdr(address, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a string of the loader that lives as long as the library, which is never closed.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}

/// # Safety
/// `text` is null or a C string that lives during this call.
unsafe fn owned(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as this function's.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nccl_writes_them() {
        for (code, text) in
            [(22809, "2.28.9"), (21800, "2.18.0"), (23007, "2.30.7"), (21005, "2.10.5"), (2804, "2.8.4")]
        {
            assert_eq!(Version(code).to_string(), text);
        }
        assert!(Version(2804) < OLDEST && Version(21701) < OLDEST && Version(21801) >= OLDEST);
    }
}
