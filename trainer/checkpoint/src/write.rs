//! Writing: everything aside, on the disk, and only then under its name. Specified in FORMAT.md, "Commit".

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    CheckpointError, FileEntry, MANIFEST_NAME, Manifest, Meta, Tensor,
    disk::{Disk, NoProbe, Probe},
    manifest::check_file_names,
    step_name,
    tensor::{StateDigest, is_tensor_name},
};

/// Folders that this process is writing at the moment: not leftovers.
static IN_PROGRESS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Tensors are handed to the system in parts of this size, so that both digests see each part while it is in the cache.
const PART_BYTES: usize = 1 << 20;

/// Writes the checkpoint of `meta.step` and returns its folder.
///
/// `files` are the names of the files with their tensors; tensor names are unique over all of them. The bytes are streamed: no copy
/// of the state is made. A checkpoint of the same step that is already there is replaced, and stays until the new one is complete.
///
/// # Errors
/// `FileName`, `DuplicateFile`, `TensorName`, `DuplicateTensor` or `TensorSize` before anything is written; `Io` when the disk refuses
/// (full, read-only). Older checkpoints are untouched and the unfinished one is removed, as far as the disk allows.
pub fn write(
    checkpoints_dir: &Path,
    meta: &Meta,
    files: &[(String, Vec<Tensor<'_>>)],
) -> Result<PathBuf, CheckpointError> {
    write_with(checkpoints_dir, meta, files, &mut NoProbe)
}

pub(crate) fn write_with(
    checkpoints_dir: &Path,
    meta: &Meta,
    files: &[(String, Vec<Tensor<'_>>)],
    probe: &mut dyn Probe,
) -> Result<PathBuf, CheckpointError> {
    let folder = checkpoints_dir.join(step_name(meta.step));
    check(files, &folder)?;
    let mut disk = Disk { probe };
    if !checkpoints_dir.is_dir() {
        disk.create_folders(checkpoints_dir)?;
        if let Some(parent) = checkpoints_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_folder(parent)?;
        }
    }
    let aside = Aside::new(checkpoints_dir, meta.step);
    let result = stage(&aside.path, meta, files, &mut disk)
        .and_then(|()| commit(checkpoints_dir, &aside.path, &folder, &mut disk));
    if result.is_err() && aside.path.exists() {
        // The first error is the one to report; what remains is swept by `retain`.
        let _ = disk.remove_folder(&aside.path);
    }
    result.map(|()| folder)
}

/// Refuses what a reader would refuse.
fn check(files: &[(String, Vec<Tensor<'_>>)], folder: &Path) -> Result<(), CheckpointError> {
    check_file_names(files.iter().map(|(name, _)| name.as_str()), folder)?;
    let mut names = HashSet::new();
    for tensor in files.iter().flat_map(|(_, tensors)| tensors) {
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

/// Writes all files into the folder `aside` and makes them durable, the manifest last.
fn stage(
    aside: &Path,
    meta: &Meta,
    files: &[(String, Vec<Tensor<'_>>)],
    disk: &mut Disk<'_>,
) -> Result<(), CheckpointError> {
    disk.create_empty_folder(aside)?;
    let mut state = StateDigest::default();
    let mut entries = Vec::with_capacity(files.len());
    for (name, tensors) in files {
        entries.push(write_file(aside, name, tensors, &mut state, disk)?);
    }
    let manifest = Manifest { meta: meta.clone(), files: entries, state_digest: state.finish() };
    let path = aside.join(MANIFEST_NAME);
    let mut file = disk.create(&path)?;
    disk.write(&mut file, &manifest.to_json(), &path)?;
    disk.sync(&file, &path)?;
    disk.sync_folder(aside)
}

/// Brings the complete folder `aside` under its final name.
fn commit(
    checkpoints_dir: &Path,
    aside: &Path,
    folder: &Path,
    disk: &mut Disk<'_>,
) -> Result<(), CheckpointError> {
    if !folder.exists() {
        disk.rename(aside, folder)?;
        return disk.sync_folder(checkpoints_dir);
    }
    let old = if disk.exchange(aside, folder)? {
        aside.to_owned()
    } else {
        // Two renames. A reader that finds only the first one done takes the old checkpoint under the name it has then.
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let old = checkpoints_dir.join(format!(".old-{name}"));
        if old.exists() {
            disk.remove_folder(&old)?;
        }
        disk.rename(folder, &old)?;
        disk.rename(aside, folder)?;
        old
    };
    disk.sync_folder(checkpoints_dir)?;
    // The new checkpoint counts from here on, so that a failure to remove the old one is none of writing.
    let _ = disk.remove_folder(&old);
    Ok(())
}

/// Writes one safetensors file and returns its entry in the manifest.
fn write_file(
    aside: &Path,
    name: &str,
    tensors: &[Tensor<'_>],
    state: &mut StateDigest,
    disk: &mut Disk<'_>,
) -> Result<FileEntry, CheckpointError> {
    let path = aside.join(name);
    // The order that safetensors prescribes: largest alignment first, then by name.
    let mut ordered: Vec<&Tensor<'_>> = tensors.iter().collect();
    ordered.sort_by(|a, b| {
        b.dtype.to_safetensors().cmp(&a.dtype.to_safetensors()).then_with(|| a.name.cmp(&b.name))
    });
    let header =
        header(&ordered).map_err(|problem| CheckpointError::Safetensors { path: path.clone(), problem })?;

    let mut file = Hashing { file: disk.create(&path)?, digest: blake3::Hasher::new(), bytes: 0 };
    file.write(&header, disk, &path)?;
    for tensor in ordered {
        for part in tensor.bytes.chunks(PART_BYTES) {
            file.write(part, disk, &path)?;
        }
        state.add(&tensor.name, tensor.dtype, &tensor.shape, &tensor.bytes);
    }
    disk.sync(&file.file, &path)?;
    Ok(FileEntry {
        name: name.to_owned(),
        bytes: file.bytes,
        blake3: file.digest.finalize().to_hex().to_string(),
    })
}

/// Length and JSON header of a safetensors file for tensors in this order.
fn header(tensors: &[&Tensor<'_>]) -> Result<Vec<u8>, String> {
    let mut end = 0usize;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes.len();
        let info = safetensors::tensor::TensorInfo {
            dtype: tensor.dtype.to_safetensors(),
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        (tensor.name.clone(), info)
    });
    let metadata =
        safetensors::tensor::Metadata::new(None, infos.collect()).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// A file with the digest of what was written so far.
struct Hashing {
    file: File,
    digest: blake3::Hasher,
    bytes: u64,
}

impl Hashing {
    fn write(&mut self, bytes: &[u8], disk: &mut Disk<'_>, path: &Path) -> Result<(), CheckpointError> {
        disk.write(&mut self.file, bytes, path)?;
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// A folder to write in, with a name that no reader looks at; announced while it is in use.
struct Aside {
    path: PathBuf,
}

impl Aside {
    fn new(checkpoints_dir: &Path, step: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (name, id) = (step_name(step), process::id());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = checkpoints_dir.join(format!(".tmp-{name}-{id}-{count}"));
        IN_PROGRESS.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Aside { path }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        IN_PROGRESS.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.path);
    }
}

/// Whether this process is writing this folder.
pub(crate) fn is_in_progress(path: &Path) -> bool {
    IN_PROGRESS.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|p| p == path)
}
