//! Writing: everything aside, on the disk, and only then under its name. Specified in FORMAT.md, "Commit".

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    CheckpointError, FileEntry, FileSystem, LocalDisk, MANIFEST_NAME, Manifest, Meta, NewFile, Tensor,
    disk::{Disk, io_error},
    manifest::check_file_names,
    read::{Described, tensor_digests},
    step_name,
    tensor::{DIGESTS_KEY, StateDigest, is_tensor_name},
};

/// Tensors are handed to the system in parts of this size, so that the file's digest sees each part while it is in the
/// cache.
const PART_BYTES: usize = 1 << 20;

/// Writes the checkpoint of `meta.step` and returns its folder: for a process that has the whole state.
///
/// `files` are the names of the files with their tensors; tensor names are unique over all of them. The bytes
/// are streamed: no copy of the state is made. A checkpoint of the same step that is already there is
/// replaced, and stays until the new one is complete.
///
/// # Errors
/// `FileName`, `DuplicateFile`, `TensorName`, `DuplicateTensor` or `TensorSize` before anything is written;
/// `Io` when the disk refuses (full, read-only). Older checkpoints are untouched and the unfinished one is
/// removed, as far as the disk allows.
pub fn write(
    checkpoints_dir: &Path,
    meta: &Meta,
    files: &[(String, Vec<Tensor<'_>>)],
) -> Result<PathBuf, CheckpointError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = checkpoints_dir.join(step_name(meta.step));
    check_file_names(files.iter().map(|(name, _)| name.as_str()), &folder)?;
    check(files.iter().flat_map(|(_, tensors)| tensors), &folder)?;
    let attempt = format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let staging = Staging::open(&LocalDisk, checkpoints_dir, meta.step, &attempt)?;
    let entries: Result<_, _> = files.iter().map(|(name, tensors)| staging.write(name, tensors)).collect();
    match entries {
        Ok(entries) => Ok(staging.commit(meta, entries)?.folder),
        Err(error) => {
            staging.abandon();
            Err(error)
        }
    }
}

/// A checkpoint on its way: a folder aside, into which every rank writes its file, until one of them commits it.
///
/// The folder's name holds the step and an attempt's name, which must differ from that of any other start of the run:
/// a process that outlived its start cannot write into the checkpoint of another.
#[derive(Debug)]
pub struct Staging<'d> {
    disk: Disk<'d>,
    checkpoints_dir: PathBuf,
    aside: PathBuf,
    step: u64,
}

/// A checkpoint that is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Its folder.
    pub folder: PathBuf,
    /// The digest of all tensors.
    pub state_digest: String,
}

impl<'d> Staging<'d> {
    /// The folder aside for the checkpoint of `step`; made, if no other rank has yet.
    ///
    /// # Errors
    /// `Io`.
    pub fn open(
        disk: &'d dyn FileSystem,
        checkpoints_dir: &Path,
        step: u64,
        attempt: &str,
    ) -> Result<Self, CheckpointError> {
        let disk = Disk(disk);
        if !checkpoints_dir.is_dir() {
            disk.create_folders(checkpoints_dir)?;
            if let Some(parent) = checkpoints_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                disk.sync_folder(parent)?;
            }
        }
        let aside = checkpoints_dir.join(format!(".tmp-{}-{attempt}", step_name(step)));
        disk.create_folders(&aside)?;
        Ok(Staging { disk, checkpoints_dir: checkpoints_dir.to_owned(), aside, step })
    }

    /// Writes one file and makes it durable, with its name. The names of files and tensors must be unique over all
    /// ranks: that of a rank's file is [`file_name`](crate::file_name).
    ///
    /// # Errors
    /// `FileName`, `TensorName`, `DuplicateTensor` or `TensorSize` before anything is written; `Io`.
    pub fn write(&self, name: &str, tensors: &[Tensor<'_>]) -> Result<FileEntry, CheckpointError> {
        let path = self.aside.join(name);
        check_file_names([name].into_iter(), &self.aside)?;
        check(tensors.iter(), &self.aside)?;
        // The order that safetensors prescribes: largest alignment first, then by name.
        let mut ordered: Vec<&Tensor<'_>> = tensors.iter().collect();
        ordered.sort_by(|a, b| {
            b.dtype.to_safetensors().cmp(&a.dtype.to_safetensors()).then_with(|| a.name.cmp(&b.name))
        });
        let header = header(&ordered)
            .map_err(|problem| CheckpointError::Safetensors { path: path.clone(), problem })?;

        let mut file = Hashing::create(self.disk, &path)?;
        file.write(&header)?;
        for part in ordered.iter().flat_map(|tensor| tensor.bytes.chunks(PART_BYTES)) {
            file.write(part)?;
        }
        let (bytes, blake3) = file.finish()?;
        self.disk.sync_folder(&self.aside)?;
        Ok(FileEntry { name: name.to_owned(), bytes, blake3 })
    }

    /// Writes the manifest of all ranks' files and brings the folder under its final name. One rank does this, after
    /// every rank has written its file.
    ///
    /// # Errors
    /// `ShareNotSeen` when another rank's file is not there, or not as it says; `DuplicateTensor`, `Safetensors`; `Io`.
    /// The folder aside is removed then, unless the checkpoint may already stand under its name.
    pub fn commit(self, meta: &Meta, files: Vec<FileEntry>) -> Result<Committed, CheckpointError> {
        assert_eq!(meta.step, self.step, "a folder holds the checkpoint of its step");
        match self.complete(meta, files) {
            Ok(state_digest) => Ok(Committed { folder: self.publish()?, state_digest }),
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    /// Gives the attempt up: removes the folder, as far as the disk allows. What remains is removed by
    /// [`clean`](crate::clean) at the next start. No rank may be writing into the folder any more.
    pub fn abandon(self) {
        // Whoever gives up has a reason to report, and it is not this one.
        let _ = self.disk.remove_folder(&self.aside);
    }

    /// Adds the manifest; the digest of the state.
    fn complete(&self, meta: &Meta, files: Vec<FileEntry>) -> Result<String, CheckpointError> {
        check_file_names(files.iter().map(|file| file.name.as_str()), &self.aside)?;
        let (mut state, mut names) = (StateDigest::default(), HashSet::new());
        for entry in &files {
            for Described { name, dtype, shape, digest } in tensor_digests(&self.aside, entry)? {
                state.add(&name, dtype, &shape, digest);
                if let Some(name) = names.replace(name) {
                    return Err(CheckpointError::DuplicateTensor { path: self.aside.clone(), name });
                }
            }
        }
        let state_digest = state.finish();
        let manifest = Manifest {
            version: Manifest::version_of(meta),
            meta: meta.clone(),
            files,
            state_digest: state_digest.clone(),
        };
        let path = self.aside.join(MANIFEST_NAME);
        let mut file = Hashing::create(self.disk, &path)?;
        file.write(&manifest.to_json())?;
        file.finish()?;
        self.disk.sync_folder(&self.aside)?;
        Ok(state_digest)
    }

    /// Brings the complete folder aside under its final name.
    fn publish(self) -> Result<PathBuf, CheckpointError> {
        let (disk, checkpoints_dir) = (self.disk, self.checkpoints_dir.clone());
        let name = step_name(self.step);
        let folder = checkpoints_dir.join(&name);
        if !folder.exists() {
            if let Err(error) = disk.rename(&self.aside, &folder) {
                self.abandon();
                return Err(error);
            }
            disk.sync_folder(&checkpoints_dir)?;
            return Ok(folder);
        }
        let old = match disk.exchange(&self.aside, &folder) {
            Err(error) => {
                self.abandon();
                return Err(error);
            }
            // From here on the folder aside holds the old checkpoint, which stays until the disk knows of the new one.
            Ok(true) => self.aside,
            Ok(false) => {
                // Two renames. A reader that finds only the first one done takes the old checkpoint under the name it
                // has then.
                let old = checkpoints_dir.join(format!(".old-{name}"));
                if old.exists() {
                    disk.remove_folder(&old)?;
                }
                disk.rename(&folder, &old)?;
                disk.rename(&self.aside, &folder)?;
                old
            }
        };
        disk.sync_folder(&checkpoints_dir)?;
        // The new checkpoint counts from here on, so that a failure to remove the old one is none of writing.
        let _ = disk.remove_folder(&old);
        Ok(folder)
    }
}

/// Refuses what a reader would refuse.
fn check<'t>(tensors: impl Iterator<Item = &'t Tensor<'t>>, folder: &Path) -> Result<(), CheckpointError> {
    let mut names = HashSet::new();
    for tensor in tensors {
        let (path, name) = (folder.to_owned(), tensor.name.clone());
        if !is_tensor_name(&tensor.name) {
            return Err(CheckpointError::TensorName { path, name });
        }
        if !names.insert(&tensor.name) {
            return Err(CheckpointError::DuplicateTensor { path, name });
        }
        if !tensor.fits() {
            let (shape, dtype) = (tensor.shape.clone(), tensor.dtype.name());
            return Err(CheckpointError::TensorSize { path, name, shape, dtype, bytes: tensor.bytes.len() });
        }
    }
    Ok(())
}

/// Length and JSON header of a safetensors file for tensors in this order, with their digests.
fn header(tensors: &[&Tensor<'_>]) -> Result<Vec<u8>, String> {
    let mut end = 0usize;
    let mut digests = String::with_capacity(64 * tensors.len());
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes.len();
        digests.push_str(&blake3::hash(&tensor.bytes).to_hex());
        let info = safetensors::tensor::TensorInfo {
            dtype: tensor.dtype.to_safetensors(),
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        (tensor.name.clone(), info)
    });
    let infos = infos.collect();
    // One key, so that the order of a hash map does not show in the bytes.
    let digests = [(DIGESTS_KEY.to_owned(), digests)].into();
    let metadata =
        safetensors::tensor::Metadata::new(Some(digests), infos).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// A file with the digest of what was written so far.
struct Hashing<'p> {
    file: Box<dyn NewFile>,
    path: &'p Path,
    digest: blake3::Hasher,
    bytes: u64,
}

impl<'p> Hashing<'p> {
    fn create(disk: Disk<'_>, path: &'p Path) -> Result<Self, CheckpointError> {
        Ok(Self { file: disk.create(path)?, path, digest: blake3::Hasher::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write(bytes).map_err(io_error("write", self.path))?;
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Makes the content durable; its length and digest.
    fn finish(mut self) -> Result<(u64, String), CheckpointError> {
        self.file.sync().map_err(io_error("sync", self.path))?;
        Ok((self.bytes, self.digest.finalize().to_hex().to_string()))
    }
}
