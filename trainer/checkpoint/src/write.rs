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

/// Tensors are handed to the system in parts of this size, so that both digests see each part while it is in
/// the cache.
const PART_BYTES: usize = 1 << 20;

/// Writes the checkpoint of `meta.step` and returns its folder.
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
        // Two renames. A reader that finds only the first one done takes the old checkpoint under the name it
        // has then.
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

#[cfg(test)]
mod tests {
    use std::{fs, io};

    use tempfile::TempDir;

    use super::*;
    use crate::{Dtype, list, newest, retain};

    /// Refuses every change from the `left`-th on: what a reader sees afterwards is what a power cut leaves,
    /// up to writes that the disk had not finished.
    struct Cut {
        left: usize,
    }

    impl Probe for Cut {
        fn before_change(&mut self) -> io::Result<()> {
            self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("power cut"))?;
            Ok(())
        }
    }

    fn meta(step: u64) -> Meta {
        Meta {
            step,
            epoch: 0,
            world_size: 1,
            plan_hash: "p".into(),
            plan_toml: String::new(),
            data_digest: "d".into(),
            mentee_version: "0.1.0".into(),
        }
    }

    /// Writes a checkpoint of two files whose bytes are all `value`.
    fn write_value(
        folder: &Path,
        step: u64,
        value: u8,
        probe: &mut dyn Probe,
    ) -> Result<PathBuf, CheckpointError> {
        let bytes = vec![value; PART_BYTES + 5];
        let large = vec![Tensor::new("student.w", Dtype::U8, &[bytes.len()], &bytes)];
        let small = vec![Tensor::new("teacher.w", Dtype::U8, &[3], &bytes[..3])];
        let files = [("a.safetensors".into(), large), ("b.safetensors".into(), small)];
        write_with(folder, &meta(step), &files, probe)
    }

    fn newest_value(folder: &Path) -> Option<(u64, u8)> {
        let found = newest(folder).unwrap()?;
        let state = found.checkpoint.load().unwrap();
        let value = state["teacher.w"].bytes()[0];
        assert!(state.values().all(|tensor| tensor.bytes().iter().all(|b| *b == value)));
        Some((found.checkpoint.manifest.meta.step, value))
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_cut_before_any_change_leaves_the_newest_complete_checkpoint_usable() {
        let mut outcomes = Vec::new();
        for left in 0.. {
            let run = TempDir::new().unwrap();
            let folder = run.path().join("checkpoints");
            write_value(&folder, 10, 1, &mut NoProbe).unwrap();
            let result = write_value(&folder, 20, 2, &mut Cut { left });
            let seen = newest_value(&folder);
            outcomes.push(seen);
            assert!(seen == Some((10, 1)) || seen == Some((20, 2)), "{left}: {seen:?}");
            // Nothing that a crash left is in the way of the next attempt, or stays.
            write_value(&folder, 20, 3, &mut NoProbe).unwrap();
            retain(&folder, 2).unwrap();
            assert_eq!(names(&folder), ["step-00000010", "step-00000020"]);
            assert_eq!(newest_value(&folder), Some((20, 3)));
            if result.is_ok() {
                break;
            }
        }
        // The folder; files of 5 and 4 changes (create, header, one part a MiB, sync); the manifest, 3; sync,
        // rename, sync.
        assert_eq!(outcomes.len(), 17);
        assert_eq!(outcomes.iter().filter(|seen| **seen == Some((20, 2))).count(), 2);
    }

    #[test]
    fn a_cut_while_replacing_leaves_the_old_or_the_new_one() {
        for left in 0.. {
            let run = TempDir::new().unwrap();
            write_value(run.path(), 20, 1, &mut NoProbe).unwrap();
            let done = write_value(run.path(), 20, 2, &mut Cut { left }).is_ok();
            let seen = newest_value(run.path());
            assert!(seen == Some((20, 1)) || seen == Some((20, 2)), "{left}: {seen:?}");
            if done && seen == Some((20, 2)) {
                assert!(left > 10);
                break;
            }
        }
    }

    #[test]
    fn a_replacement_cut_between_two_renames_is_found_and_finished() {
        // What the path for file systems without an atomic exchange leaves behind.
        let run = TempDir::new().unwrap();
        let folder = write_value(run.path(), 20, 1, &mut NoProbe).unwrap();
        let old = run.path().join(".old-step-00000020");
        fs::rename(&folder, &old).unwrap();
        assert_eq!(newest_value(run.path()), Some((20, 1)));
        retain(run.path(), 1).unwrap();
        assert_eq!(names(run.path()), ["step-00000020"]);
        // Cut after the second rename.
        fs::rename(&folder, &old).unwrap();
        write_value(run.path(), 20, 2, &mut NoProbe).unwrap();
        assert_eq!(newest_value(run.path()), Some((20, 2)));
        retain(run.path(), 1).unwrap();
        assert_eq!(names(run.path()), ["step-00000020"]);
    }

    #[test]
    fn an_error_leaves_nothing_behind() {
        /// Fails once and then works, as a disk that is full for a moment.
        struct Once {
            left: usize,
        }
        impl Probe for Once {
            fn before_change(&mut self) -> io::Result<()> {
                self.left = self.left.wrapping_sub(1);
                if self.left == usize::MAX { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            }
        }
        let run = TempDir::new().unwrap();
        write_value(run.path(), 10, 1, &mut NoProbe).unwrap();
        // Every change up to the rename.
        for left in 0..=14 {
            let error = write_value(run.path(), 20, 2, &mut Once { left }).unwrap_err();
            assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
            assert_eq!(names(run.path()), ["step-00000010"], "{left}");
        }
    }

    #[test]
    fn the_same_step_again_replaces_it() {
        let run = TempDir::new().unwrap();
        for value in [1, 1, 2] {
            write_value(run.path(), 5, value, &mut NoProbe).unwrap();
            assert_eq!(newest_value(run.path()), Some((5, value)));
            assert_eq!(names(run.path()), ["step-00000005"]);
        }
    }

    #[test]
    fn what_a_reader_would_refuse_is_not_written() {
        let run = TempDir::new().unwrap();
        let folder = run.path().join("checkpoints");
        let tensor = |name: &str| Tensor::new(name, Dtype::U8, &[1], &[0]);
        let refused = |files: &[(String, Vec<Tensor<'_>>)]| {
            let error = write(&folder, &meta(1), files).unwrap_err();
            assert!(!folder.exists());
            error
        };
        let error = refused(&[("../x.safetensors".into(), vec![tensor("t")])]);
        assert!(matches!(error, CheckpointError::FileName { .. }), "{error}");
        let error = refused(&[("x.safetensors".into(), vec![]), ("x.safetensors".into(), vec![])]);
        assert!(matches!(error, CheckpointError::DuplicateFile { .. }), "{error}");
        let error = refused(&[
            ("x.safetensors".into(), vec![tensor("t")]),
            ("y.safetensors".into(), vec![tensor("t")]),
        ]);
        assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
        for name in ["", "__metadata__", "a\nb"] {
            let error = refused(&[("x.safetensors".into(), vec![tensor(name)])]);
            assert!(matches!(error, CheckpointError::TensorName { .. }), "{error}");
        }
        let error = refused(&[("x.safetensors".into(), vec![Tensor::new("t", Dtype::F32, &[2], &[0; 4])])]);
        let text = format!(
            "{}: tensor t of shape [2] and type F32 has 4 bytes",
            folder.join("step-00000001").display()
        );
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn retention_keeps_the_newest_and_never_trusts_a_damaged_one() {
        let run = TempDir::new().unwrap();
        for step in [1, 2, 3, 4, 5] {
            write_value(run.path(), step, step as u8, &mut NoProbe).unwrap();
        }
        fs::create_dir(run.path().join(".tmp-step-00000006-1-0")).unwrap();
        fs::remove_file(run.path().join("step-00000004/manifest.json")).unwrap();
        let removed = retain(run.path(), 2).unwrap();
        assert_eq!(removed, [run.path().join("step-00000001"), run.path().join("step-00000002")]);
        assert_eq!(names(run.path()), ["step-00000003", "step-00000004", "step-00000005"]);
        let states: Vec<bool> = list(run.path()).unwrap().iter().map(|entry| entry.state.is_ok()).collect();
        assert_eq!(states, [true, false, true]);
        // The newest is damaged in its bytes, which only its digest shows: the older one must stay.
        let file = run.path().join("step-00000005/a.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(retain(run.path(), 1).unwrap().is_empty());
        let found = newest(run.path()).unwrap().unwrap();
        assert_eq!(found.checkpoint.manifest.meta.step, 3);
        assert!(matches!(found.rejected[0].1, CheckpointError::FileAltered { .. }));
        assert!(matches!(found.rejected[1].1, CheckpointError::NoManifest { .. }));
        // Zero still keeps one.
        write_value(run.path(), 6, 6, &mut NoProbe).unwrap();
        retain(run.path(), 0).unwrap();
        assert_eq!(newest_value(run.path()), Some((6, 6)));
    }

    #[test]
    fn no_folder_means_no_checkpoint() {
        let run = TempDir::new().unwrap();
        let folder = run.path().join("checkpoints");
        assert!(newest(&folder).unwrap().is_none());
        assert!(list(&folder).unwrap().is_empty());
        assert!(retain(&folder, 3).unwrap().is_empty());
    }
}
