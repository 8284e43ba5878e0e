//! Reading: nothing is used before it was checked. Also which checkpoints there are, and which may go.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::{SafeTensors, tensor::Metadata};

use crate::{
    CheckpointError, Dtype, FileEntry, FileSystem, MANIFEST_NAME, Manifest, OwnedTensor,
    disk::{Disk, io_error},
    manifest::MAX_MANIFEST_BYTES,
    parse_step_name, step_name,
    tensor::{DIGESTS_KEY, StateDigest, is_tensor_name},
};

/// A checkpoint with a valid manifest, whose files are there with the right lengths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its folder.
    pub folder: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// One checkpoint folder, usable or not.
#[derive(Debug)]
pub struct Entry {
    /// The step in the folder's name.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
    /// Its manifest if the checkpoint is complete (digests not verified), else why it cannot be used.
    pub state: Result<Manifest, CheckpointError>,
}

/// The newest usable checkpoint.
#[derive(Debug)]
pub struct Newest {
    /// The checkpoint; all its digests have been verified.
    pub checkpoint: Checkpoint,
    /// What it holds: it was read to be verified.
    pub tensors: BTreeMap<String, OwnedTensor>,
    /// Newer ones that cannot be used, newest first, with the reason: worth a warning.
    pub rejected: Vec<(PathBuf, CheckpointError)>,
}

/// Opens one checkpoint folder: reads its manifest and looks at the lengths of its files. No digest is
/// verified yet.
///
/// # Errors
/// `NoManifest`, everything of [`Manifest::parse`], `MissingFile`, `FileLength`, `StepMismatch`, `Io`.
pub fn open(checkpoint_dir: &Path) -> Result<Checkpoint, CheckpointError> {
    let path = checkpoint_dir.join(MANIFEST_NAME);
    let opened = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => CheckpointError::NoManifest { folder: checkpoint_dir.into() },
        _ => io_error("open", &path)(error),
    };
    // Opening a pipe would wait for its other end. A folder is refused by the system.
    let about = fs::metadata(&path).map_err(opened)?;
    if !about.is_file() && !about.is_dir() {
        return Err(CheckpointError::ManifestSyntax { path, problem: "it is no file".into() });
    }
    let file = File::open(&path).map_err(opened)?;
    let mut json = Vec::new();
    // One byte more than allowed, for the parser to refuse.
    file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut json).map_err(io_error("read", &path))?;
    let manifest = Manifest::parse(&json, &path)?;
    for entry in &manifest.files {
        check_length(&checkpoint_dir.join(&entry.name), entry)?;
    }
    let name = checkpoint_dir.file_name().unwrap_or_default().to_string_lossy();
    if let Some(folder_step) = parse_step_name(name.trim_start_matches(".old-"))
        && folder_step != manifest.meta.step
    {
        let manifest_step = manifest.meta.step;
        return Err(CheckpointError::StepMismatch {
            folder: checkpoint_dir.into(),
            folder_step,
            manifest_step,
        });
    }
    Ok(Checkpoint { folder: checkpoint_dir.into(), manifest })
}

fn check_length(path: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => CheckpointError::MissingFile { path: path.into() },
        _ => io_error("look at", path)(error),
    })?;
    if !metadata.is_file() {
        return Err(CheckpointError::MissingFile { path: path.into() });
    }
    if metadata.len() != entry.bytes {
        let (expected, found) = (entry.bytes, metadata.len());
        return Err(CheckpointError::FileLength { path: path.into(), expected, found });
    }
    Ok(())
}

impl Checkpoint {
    /// Reads all tensors. Each file's digest and the digest of the whole state are verified before anything
    /// is handed out.
    ///
    /// # Errors
    /// `FileAltered`, `FileLength`, `MissingFile`, `Safetensors`, `UnsupportedDtype`, `TensorName`,
    /// `DuplicateTensor`, `StateDigest`, `OutOfMemory`, `Io`.
    pub fn load(&self) -> Result<BTreeMap<String, OwnedTensor>, CheckpointError> {
        let mut state = BTreeMap::new();
        let mut digest = StateDigest::default();
        for entry in &self.manifest.files {
            for (name, tensor, hash) in self.read_file(entry)? {
                digest.add(&name, tensor.dtype, &tensor.shape, hash);
                if state.insert(name.clone(), tensor).is_some() {
                    return Err(CheckpointError::DuplicateTensor { path: self.folder.clone(), name });
                }
            }
        }
        self.check_state(digest)?;
        Ok(state)
    }

    /// Verifies all digests, holding one file in memory at a time.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn verify(&self) -> Result<(), CheckpointError> {
        let mut digest = StateDigest::default();
        for entry in &self.manifest.files {
            for (name, tensor, hash) in self.read_file(entry)? {
                digest.add(&name, tensor.dtype, &tensor.shape, hash);
            }
        }
        self.check_state(digest)
    }

    /// Verifies every file's digest, that is all bytes, a small part in memory at a time.
    fn verify_files(&self) -> Result<(), CheckpointError> {
        self.manifest.files.iter().try_for_each(|entry| {
            let path = self.folder.join(&entry.name);
            check_length(&path, entry)?;
            let mut digest = blake3::Hasher::new();
            File::open(&path)
                .and_then(|file| digest.update_reader(file).map(drop))
                .map_err(io_error("read", &path))?;
            check_digest(&path, entry, &digest.finalize())
        })
    }

    fn check_state(&self, digest: StateDigest) -> Result<(), CheckpointError> {
        let (expected, found) = (self.manifest.state_digest.clone(), digest.finish());
        if expected == found {
            Ok(())
        } else {
            Err(CheckpointError::StateDigest { folder: self.folder.clone(), expected, found })
        }
    }

    /// Reads one file, verifies it, and only then looks into it; each tensor with its digest.
    fn read_file(
        &self,
        entry: &FileEntry,
    ) -> Result<Vec<(String, OwnedTensor, blake3::Hash)>, CheckpointError> {
        let path = self.folder.join(&entry.name);
        let bytes = Arc::new(read_verified(&path, entry)?);
        let broken = |error: safetensors::SafeTensorError| CheckpointError::Safetensors {
            path: path.clone(),
            problem: error.to_string(),
        };
        let (header_bytes, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let data_start = 8 + header_bytes;
        let infos = metadata.tensors();
        let mut tensors = Vec::with_capacity(infos.len());
        for name in metadata.offset_keys() {
            let info = infos[&name];
            if !is_tensor_name(&name) {
                return Err(CheckpointError::TensorName { path, name });
            }
            let Some(dtype) = Dtype::from_safetensors(info.dtype) else {
                return Err(CheckpointError::UnsupportedDtype { path, name, dtype: info.dtype.to_string() });
            };
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let tensor = OwnedTensor { dtype, shape: info.shape.clone(), file: Arc::clone(&bytes), range };
            let hash = blake3::hash(tensor.bytes());
            tensors.push((name, tensor, hash));
        }
        if self.manifest.version >= 2 {
            let expected = header_digests(&path, &metadata)?;
            if let Some(((name, ..), _)) =
                tensors.iter().zip(expected).find(|((_, _, found), (_, expected))| found != expected)
            {
                return Err(CheckpointError::TensorAltered { path, name: name.clone() });
            }
        }
        Ok(tensors)
    }
}

/// The digests that a file's header holds of its tensors.
fn header_digests(path: &Path, metadata: &Metadata) -> Result<Vec<(String, blake3::Hash)>, CheckpointError> {
    let problem = |problem: String| CheckpointError::Safetensors { path: path.into(), problem };
    let names = metadata.offset_keys();
    let text = metadata.metadata().as_ref().and_then(|map| map.get(DIGESTS_KEY));
    let text = text.ok_or_else(|| problem(format!("its header has no digests under {DIGESTS_KEY:?}")))?;
    if !text.is_ascii() || text.len() != 64 * names.len() {
        return Err(problem(format!("its header has no {} digests of 64 digits", names.len())));
    }
    let hashes = (0..names.len()).map(|n| blake3::Hash::from_hex(&text[64 * n..64 * (n + 1)]));
    names
        .into_iter()
        .zip(hashes)
        .map(|(name, hash)| Ok((name, hash.map_err(|error| problem(error.to_string()))?)))
        .collect()
}

/// A tensor as its file's header describes it.
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) digest: blake3::Hash,
}

/// What the header of a file that a rank has just written says of its tensors.
pub(crate) fn tensor_digests(folder: &Path, entry: &FileEntry) -> Result<Vec<Described>, CheckpointError> {
    let path = folder.join(&entry.name);
    check_length(&path, entry).map_err(|_| CheckpointError::ShareNotSeen { path: path.clone() })?;
    let broken = |problem: String| CheckpointError::Safetensors { path: path.clone(), problem };
    let mut file = File::open(&path).map_err(io_error("open", &path))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io_error("read", &path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_MANIFEST_BYTES.min(entry.bytes) {
        return Err(broken(format!("a header of {length} bytes")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io_error("read", &path))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| broken(error.to_string()))?;
    let infos = metadata.tensors();
    header_digests(&path, &metadata)?
        .into_iter()
        .map(|(name, digest)| {
            let info = infos[&name];
            let dtype = Dtype::from_safetensors(info.dtype)
                .ok_or_else(|| broken(format!("tensor {name} has the type {}", info.dtype)))?;
            Ok(Described { name, dtype, shape: info.shape.clone(), digest })
        })
        .collect()
}

/// The file's bytes, if they are those of the manifest.
fn read_verified(path: &Path, entry: &FileEntry) -> Result<Vec<u8>, CheckpointError> {
    // Before memory is reserved: the length that the manifest claims is that of a real file.
    check_length(path, entry)?;
    let mut bytes = Vec::new();
    let len = usize::try_from(entry.bytes).ok().filter(|len| bytes.try_reserve_exact(*len).is_ok());
    if len.is_none() {
        return Err(CheckpointError::OutOfMemory { path: path.into(), bytes: entry.bytes });
    }
    let file = File::open(path).map_err(io_error("open", path))?;
    // Bounded even if the file grows meanwhile.
    file.take(entry.bytes).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    check_digest(path, entry, &blake3::hash(&bytes))?;
    Ok(bytes)
}

fn check_digest(path: &Path, entry: &FileEntry, found: &blake3::Hash) -> Result<(), CheckpointError> {
    let (expected, found) = (entry.blake3.clone(), found.to_hex().to_string());
    if expected == found {
        Ok(())
    } else {
        Err(CheckpointError::FileAltered { path: path.into(), expected, found })
    }
}

/// All checkpoints of a run, oldest first, each with its manifest or the reason why it cannot be used. A
/// folder that does not exist holds none. Temporary folders are not listed.
///
/// # Errors
/// `Io` if the folder cannot be read.
pub fn list(checkpoints_dir: &Path) -> Result<Vec<Entry>, CheckpointError> {
    let mut folders = BTreeMap::new();
    let mut set_aside = Vec::new();
    for name in names(checkpoints_dir)? {
        let path = checkpoints_dir.join(&name);
        if let Some(step) = parse_step_name(&name).filter(|_| may_be_folder(&path)) {
            folders.insert(step, path);
        } else if let Some(step) = name.strip_prefix(".old-").and_then(parse_step_name) {
            set_aside.push((step, path));
        }
    }
    // A replacement that was cut between its two renames: the old checkpoint is the one there is.
    for (step, path) in set_aside {
        folders.entry(step).or_insert(path);
    }
    Ok(folders
        .into_iter()
        .map(|(step, path)| Entry { step, state: open(&path).map(|checkpoint| checkpoint.manifest), path })
        .collect())
}

/// In one line, why a run in `run_dir` with these checkpoints cannot go on with the images at `path`, whose digest is `images`; none
/// when they are those that the newest was made of, or when there is none.
#[must_use]
pub fn refusal_of_images(entries: &[Entry], images: &str, path: &Path, run_dir: &Path) -> Option<String> {
    let newest = entries.iter().rev().find_map(|entry| entry.state.as_ref().ok())?;
    let was = &newest.meta.data_digest;
    (was != images).then(|| {
        format!(
            "{}: the images at {} are not those of this run's checkpoint (data digest {images}, was {was}); restore data.path, or \
             choose another --run-dir",
            run_dir.display(),
            path.display()
        )
    })
}

/// In one line, why nothing else may be written to `path`: it lies in a checkpoint, which it would spoil.
#[must_use]
pub fn refusal_to_write(path: &Path) -> Option<String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.join(MANIFEST_NAME).exists().then(|| {
        format!("{}: lies in a checkpoint, which it would spoil: write it elsewhere", path.display())
    })
}

/// What cannot be looked at counts: to pass over a checkpoint without a word would begin the run anew.
fn may_be_folder(path: &Path) -> bool {
    !fs::metadata(path).is_ok_and(|it| !it.is_dir())
}

fn names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        // A name that is not UTF-8 is none of ours.
        names.extend(entry.map_err(io_error("list", folder))?.file_name().into_string().ok());
    }
    Ok(names)
}

/// The newest checkpoint whose digests all verify, read once; `None` if there is no checkpoint at all.
///
/// # Errors
/// `NoneUsable` if there are checkpoints and none is intact: starting over silently would lose the run. `Io`
/// if the folder cannot be read.
pub fn newest(checkpoints_dir: &Path) -> Result<Option<Newest>, CheckpointError> {
    let mut rejected = Vec::new();
    for Entry { path, state, .. } in list(checkpoints_dir)?.into_iter().rev() {
        let loaded = state.and_then(|manifest| {
            let checkpoint = Checkpoint { folder: path.clone(), manifest };
            checkpoint.load().map(|tensors| (checkpoint, tensors))
        });
        match loaded {
            Ok((checkpoint, tensors)) => return Ok(Some(Newest { checkpoint, tensors, rejected })),
            // This machine's trouble, and no reason to go back to an older one.
            Err(error @ CheckpointError::OutOfMemory { .. }) => return Err(error),
            Err(reason) => rejected.push((path, reason)),
        }
    }
    if rejected.is_empty() {
        return Ok(None);
    }
    let reasons = rejected.into_iter().map(|(_, reason)| reason).collect();
    Err(CheckpointError::NoneUsable { folder: checkpoints_dir.into(), reasons })
}

/// Removes the oldest complete checkpoints until `keep` are left; returns those removed.
///
/// The newest complete one always stays (`keep` of 0 counts as 1). Nothing is removed unless one of those
/// that stay has been verified down to its last byte. Checkpoints that cannot be used are neither counted nor
/// removed: someone may want to look at them. Only the process that commits into the folder may call this.
///
/// # Errors
/// `Io` if the folder cannot be read or changed.
pub fn retain(
    disk: &dyn FileSystem,
    checkpoints_dir: &Path,
    keep: u64,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let disk = Disk(disk);
    let keep = usize::try_from(keep).unwrap_or(usize::MAX).max(1);
    // No manifest is read while there are no more folders than may stay: they would be read again after every commit.
    if names(checkpoints_dir)?.len() <= keep {
        return Ok(Vec::new());
    }
    let mut complete: Vec<Checkpoint> = list(checkpoints_dir)?
        .into_iter()
        .filter_map(|entry| Some(Checkpoint { folder: entry.path, manifest: entry.state.ok()? }))
        .collect();
    if complete.len() <= keep {
        return Ok(Vec::new());
    }
    let stay = complete.split_off(complete.len() - keep);
    if !stay.iter().rev().any(|checkpoint| checkpoint.verify_files().is_ok()) {
        return Ok(Vec::new());
    }
    let (mut removed, mut doomed) = (Vec::new(), Vec::new());
    for checkpoint in complete {
        // First out of sight, and that on the disk, so that a crash leaves no half checkpoint under a name that counts.
        let name = checkpoint.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let aside = checkpoints_dir.join(format!(".tmp-removed-{}", name.trim_start_matches('.')));
        if aside.exists() {
            disk.remove_folder(&aside)?;
        }
        disk.rename(&checkpoint.folder, &aside)?;
        doomed.push(aside);
        removed.push(checkpoint.folder);
    }
    disk.sync_folder(checkpoints_dir)?;
    doomed.iter().try_for_each(|aside| disk.remove_folder(aside))?;
    Ok(removed)
}

/// Removes what crashes left behind: folders of checkpoints that were not committed. Brings a checkpoint that was set
/// aside back under its name or, if the one that replaces it is complete, removes it.
///
/// One process calls this, at the start of a run, before any rank reads or writes a checkpoint.
///
/// Returns what kept it from removing a folder, which takes room and does no other harm: a process that holds a file
/// there open over a network, for one.
///
/// # Errors
/// `Io` if the folder cannot be read, or a name in it not be changed.
pub fn clean(disk: &dyn FileSystem, checkpoints_dir: &Path) -> Result<Vec<CheckpointError>, CheckpointError> {
    let disk = Disk(disk);
    let mut left = Vec::new();
    let names = names(checkpoints_dir)?;
    if names.iter().any(|name| name.starts_with('.')) {
        // What was renamed last may stand on the disk under the name of a checkpoint still.
        disk.sync_folder(checkpoints_dir)?;
    }
    for name in names {
        let path = checkpoints_dir.join(&name);
        if name.starts_with(".tmp-") {
            left.extend(disk.remove_folder(&path).err());
        } else if let Some(step) = name.strip_prefix(".old-").and_then(parse_step_name) {
            let folder = checkpoints_dir.join(step_name(step));
            if !folder.exists() {
                disk.rename(&path, &folder)?;
                disk.sync_folder(checkpoints_dir)?;
            } else if open(&folder).is_ok_and(|checkpoint| checkpoint.verify().is_ok()) {
                left.extend(disk.remove_folder(&path).err());
            }
        }
    }
    Ok(left)
}
