//! The folder that a set of shards is written in, and how it gets to its place.
//!
//! ```text
//! OUT is new               .OUT.partial   beside it; becomes OUT when all is written
//! OUT is an empty folder   OUT/.partial   its files move up when all are written, the index last
//! …/journal.jsonl          the job, then the entry of each finished shard, a line each; locked by who writes
//! ```
//! A folder that is there is kept, not replaced: it may be where a disk is mounted, where a link leads, or have rights of its
//! own. Until the index is there a reader refuses it ([`is_unfinished`]).
//!
//! A writer that stops leaves all of this; the next one of the same job takes the finished shards over.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::DataError;
use crate::index::{INDEX_FILE, IndexShard};
use crate::listing::sorted_entries;

/// Name of the folder within an `OUT` that was there.
const WITHIN: &str = ".partial";

/// Name of the journal within the folder of what is being written.
const JOURNAL: &str = "journal.jsonl";

/// Whether shards are being moved into `dir`, or a writer was stopped while it did that.
pub(crate) fn is_unfinished(dir: &Path) -> bool {
    !dir.join(INDEX_FILE).is_file() && dir.join(WITHIN).join(JOURNAL).is_file()
}

/// See the module. It belongs to this process as long as this lives.
#[derive(Debug)]
pub(crate) struct Partial {
    /// Where the set goes, links resolved.
    out: PathBuf,
    dir: PathBuf,
    /// `dir` lies in `out`, which was there.
    inside: bool,
    /// Locked.
    journal: File,
    published: bool,
}

impl Partial {
    /// Takes the folder for a set at `given`, which must be new or empty, and the shards that an earlier writer of the
    /// same `job` had finished (`None`: none are taken over).
    ///
    /// # Errors
    /// [`DataError`] when `given` holds something or cannot be a folder, when another writer is at work, or the disk
    /// refuses.
    pub(crate) fn take(given: &Path, job: Option<&str>) -> Result<(Self, Vec<IndexShard>), DataError> {
        let name = given.file_name().ok_or_else(|| {
            DataError::bad_file(given, "not a name for a new folder: give one like data/shards")
        })?;
        let (out, there) = target(&given.with_file_name(name))?;
        let name = out.file_name().unwrap_or(name).to_string_lossy();
        let beside = out.with_file_name(format!(".{name}.partial"));
        let within = out.join(WITHIN);
        // Shards in OUT can be those of a writer that was stopped while it moved them.
        refuse_filled(given, within.is_dir())?;

        // Beside a folder that is there when an earlier writer began before it was.
        let inside = there && !beside.is_dir();
        let dir = if inside { within.clone() } else { beside };
        fs::create_dir_all(&dir).map_err(|e| DataError::io("create", &dir, &e))?;
        let journal = lock(&dir)?;
        let mut partial = Self { out, dir, inside, journal, published: false };
        if there && !inside {
            fs::rename(&partial.dir, &within).map_err(|e| partial.unmoved(&within, &e))?;
            (partial.dir, partial.inside) = (within, true);
        }

        let (done, held) = partial.finished(job)?;
        // Again: another writer may have ended just now.
        if let Err(error) = refuse_filled(given, false) {
            partial.discard_if_new();
            return Err(error);
        }
        partial.clean(&done)?;
        let path = partial.dir.join(JOURNAL);
        let cut = partial.journal.set_len(held).and_then(|()| partial.journal.seek(SeekFrom::End(0)));
        cut.map_err(|e| DataError::io("write", &path, &e))?;
        if let (0, Some(job)) = (held, job) {
            partial.note(&job)?;
        }
        Ok((partial, done))
    }

    /// Where the shards are written.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The shards that the journal says are finished, if it is of the same job: up to the first that is not as it
    /// says. With them, how many bytes of the journal hold.
    fn finished(&mut self, job: Option<&str>) -> Result<(Vec<IndexShard>, u64), DataError> {
        let (mut done, mut held) = (Vec::new(), 0);
        let Some(job) = job else { return Ok((done, held)) };
        let mut text = Vec::new();
        let read = self.journal.read_to_end(&mut text);
        read.map_err(|e| DataError::io("read", &self.dir.join(JOURNAL), &e))?;
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').take_while(|line| line.ends_with(b"\n"));
        let Some(first) = lines.next() else { return Ok((done, held)) };
        if serde_json::from_slice::<String>(first).ok().as_deref() != Some(job) {
            return Ok((done, held));
        }
        held = first.len() as u64;
        for line in lines {
            let Ok(shard) = serde_json::from_slice::<IndexShard>(line) else { break };
            if shard.file != format!("{:05}.tar", done.len()) {
                break;
            }
            let is_whole = |path: &Path| fs::metadata(path).is_ok_and(|file| file.len() == shard.bytes);
            let (path, moved) = (self.dir.join(&shard.file), self.out.join(&shard.file));
            if self.inside && !path.exists() && is_whole(&moved) {
                // The writer was stopped while it moved them.
                fs::rename(&moved, &path).map_err(|e| DataError::io("rename", &moved, &e))?;
            }
            if !is_whole(&path) {
                break;
            }
            held += line.len() as u64;
            done.push(shard);
        }
        Ok((done, held))
    }

    /// Removes what an earlier writer left that is not taken over.
    fn clean(&self, done: &[IndexShard]) -> Result<(), DataError> {
        for entry in sorted_entries(&self.dir)? {
            let (name, path) = (entry.file_name(), entry.path());
            if name == JOURNAL || done.iter().any(|shard| name == shard.file.as_str()) {
                continue;
            }
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|e| DataError::io("remove", &path, &e))?;
        }
        Ok(())
    }

    /// Writes one line into the journal.
    pub(crate) fn note(&mut self, line: &impl Serialize) -> Result<(), DataError> {
        let path = self.dir.join(JOURNAL);
        let io = |e: io::Error| DataError::io("write", &path, &e);
        let mut text = serde_json::to_vec(line).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        self.journal.write_all(&text).and_then(|()| self.journal.sync_data()).map_err(io)
    }

    /// Moves the set, which is complete and synced, to its place: these shards and the index.
    ///
    /// # Errors
    /// [`DataError::Unmoved`] when that fails: everything stays, for the next writer of the same job.
    pub(crate) fn publish(&mut self, shards: &[IndexShard]) -> Result<(), DataError> {
        sync_dir(&self.dir).map_err(|e| self.unmoved(&self.out, &e))?;
        if self.inside {
            let shards = shards.iter().map(|shard| shard.file.as_str());
            for file in shards.chain([INDEX_FILE]) {
                if file == INDEX_FILE {
                    sync_dir(&self.out).map_err(|e| self.unmoved(&self.out, &e))?;
                }
                let moved = fs::rename(self.dir.join(file), self.out.join(file));
                moved.map_err(|e| self.unmoved(&self.out, &e))?;
            }
        } else {
            fs::rename(&self.dir, &self.out).map_err(|e| self.unmoved(&self.out, &e))?;
        }
        self.published = true;
        // Best effort: nobody reads either of them any more.
        let _ =
            if self.inside { fs::remove_dir_all(&self.dir) } else { fs::remove_file(self.out.join(JOURNAL)) };
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let last = if self.inside { &self.out } else { parent.unwrap_or(Path::new(".")) };
        sync_dir(last).map_err(|e| DataError::io("sync", last, &e))
    }

    fn unmoved(&self, to: &Path, error: &io::Error) -> DataError {
        DataError::Unmoved { from: self.dir.clone(), to: to.to_owned(), reason: error.to_string() }
    }

    /// Removes everything that has not been published.
    pub(crate) fn discard(&self) {
        if !self.published {
            // Best effort: the next writer to the same place removes it too.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    /// Removes the folder if nothing was ever written in it.
    fn discard_if_new(&self) {
        if self.journal.metadata().is_ok_and(|journal| journal.len() == 0) {
            let _ = fs::remove_file(self.dir.join(JOURNAL));
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Where `given` leads, and whether a folder is there.
fn target(given: &Path) -> Result<(PathBuf, bool), DataError> {
    match fs::canonicalize(given) {
        Ok(out) if out.is_dir() => Ok((out, true)),
        Ok(_) => Err(DataError::bad_file(given, "a file, not a folder: choose another name")),
        Err(e) if e.kind() == ErrorKind::NotFound && given.is_symlink() => Err(DataError::bad_file(
            given,
            "a link to a folder that is not there: make that folder, or remove the link",
        )),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok((given.to_owned(), false)),
        Err(e) => Err(DataError::io("open", given, &e)),
    }
}

/// Refuses a folder that holds anything but what is being written (and what a new disk has); shards pass when
/// `shards_may`.
fn refuse_filled(out: &Path, shards_may: bool) -> Result<(), DataError> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(DataError::io("list", out, &e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| DataError::io("list", out, &e))?.file_name();
        let is_shard = Path::new(&name).extension().is_some_and(|extension| extension == "tar");
        if name != WITHIN && name != "lost+found" && !(shards_may && is_shard) {
            return Err(DataError::OutputExists { path: out.to_owned() });
        }
    }
    Ok(())
}

/// Opens the journal in `dir` for this process alone.
fn lock(dir: &Path) -> Result<File, DataError> {
    let path = dir.join(JOURNAL);
    let io = |e: io::Error| DataError::io("open", &path, &e);
    let in_use = || DataError::InUse { path: dir.to_owned() };
    let journal =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
    // SAFETY: the descriptor is open as long as `journal`.
    let refused = unsafe { libc::flock(journal.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0;
    // Any other refusal: a file system without locks, where one has to see to it oneself.
    if refused && io::Error::last_os_error().kind() == ErrorKind::WouldBlock {
        return Err(in_use());
    }
    // Another writer may have ended, and moved or removed it, between the two calls.
    let id = |file: fs::Metadata| (file.dev(), file.ino());
    let there = fs::metadata(&path).map(id).map_err(|_| in_use())?;
    if there != id(journal.metadata().map_err(io)?) {
        return Err(in_use());
    }
    Ok(journal)
}

/// Makes the names in a folder last. There are file systems that cannot, and need not be asked.
fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir).and_then(|file| file.sync_all()) {
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}
