//! Every way in which a checkpoint cannot be written or used. The messages name the file and both values that
//! disagree.

use std::{io, path::PathBuf};

/// Why a checkpoint could not be written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A checkpoint folder without its manifest: it was never complete, or somebody removed the file.
    #[error("{}: no manifest.json, so this checkpoint is not complete", folder.display())]
    NoManifest {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// The manifest is longer than any that this format allows.
    #[error("{}: {bytes} bytes, more than the {limit} a manifest may have", path.display())]
    ManifestTooLarge {
        /// The manifest.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest allowed.
        limit: u64,
    },
    /// The manifest is not the JSON that the format asks for: cut, or not written by this program.
    #[error("{}: not a checkpoint manifest: {problem}", path.display())]
    ManifestSyntax {
        /// The manifest.
        path: PathBuf,
        /// The parser's account, with line and column.
        problem: String,
    },
    /// The manifest belongs to a format version that this program does not know.
    #[error("{}: format version {found}, but this program reads versions up to {supported}; use the mentee that wrote it", path.display())]
    UnsupportedVersion {
        /// The manifest.
        path: PathBuf,
        /// The version in the file.
        found: u64,
        /// The newest version this program reads.
        supported: u64,
    },
    /// The manifest was changed after it was written.
    #[error("{}: altered: its content has the digest {found}, but it says {expected}", path.display())]
    ManifestAltered {
        /// The manifest.
        path: PathBuf,
        /// The digest it holds.
        expected: String,
        /// The digest of what it holds.
        found: String,
    },
    /// The folder's name and its manifest disagree on the step: the folder was renamed or copied over.
    #[error("{}: the folder is for step {folder_step}, but its manifest is for step {manifest_step}", folder.display())]
    StepMismatch {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The step in its name.
        folder_step: u64,
        /// The step in its manifest.
        manifest_step: u64,
    },
    /// A file name that could point out of the checkpoint folder or clash with the manifest.
    #[error("{}: {name:?} is no file name for tensors (letters, digits, '-', '_' and '.', ending in .safetensors)", path.display())]
    FileName {
        /// The manifest, or the checkpoint to be written.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The same file is listed twice.
    #[error("{}: lists {name} twice", path.display())]
    DuplicateFile {
        /// The manifest, or the checkpoint to be written.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A file that the manifest lists is not there.
    #[error("{}: missing, although the manifest lists it", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
    },
    /// A file is shorter or longer than the manifest says.
    #[error("{}: {found} bytes, but the manifest says {expected}", path.display())]
    FileLength {
        /// The file.
        path: PathBuf,
        /// The length in the manifest.
        expected: u64,
        /// Its length on disk.
        found: u64,
    },
    /// A file's bytes are not those that were written.
    #[error("{}: altered: digest {found}, but the manifest says {expected}", path.display())]
    FileAltered {
        /// The file.
        path: PathBuf,
        /// The digest in the manifest.
        expected: String,
        /// The digest of its bytes.
        found: String,
    },
    /// A rank has written its file, but the one that commits does not see it so.
    #[error(
        "{}: its rank has written it, but the rank that completes the checkpoint does not see it; the run directory must lie on a file system that all machines share",
        path.display()
    )]
    ShareNotSeen {
        /// The file.
        path: PathBuf,
    },
    /// A tensor is not the one whose digest its file's header holds.
    #[error("{}: tensor {name} is not the one whose digest the file's header holds", path.display())]
    TensorAltered {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A file is too large for this machine's memory.
    #[error("{}: no memory for its {bytes} bytes", path.display())]
    OutOfMemory {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A file is intact but is not safetensors.
    #[error("{}: not a safetensors file: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's account.
        problem: String,
    },
    /// A tensor has an element type that checkpoints do not use.
    #[error("{}: tensor {name} has the type {dtype}, which checkpoints do not use", path.display())]
    UnsupportedDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor name that the format does not allow.
    #[error("{}: {name:?} is no name for a tensor (1 to 512 bytes, no control characters, not __metadata__)", path.display())]
    TensorName {
        /// The file, or the checkpoint to be written.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// Two tensors share a name.
    #[error("{}: tensor {name} is there twice", path.display())]
    DuplicateTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor's bytes do not fit its shape.
    #[error("{}: tensor {name} of shape {shape:?} and type {dtype} has {bytes} bytes", path.display())]
    TensorSize {
        /// The checkpoint to be written.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: &'static str,
        /// The number of bytes given.
        bytes: usize,
    },
    /// The files are intact, but together they do not hold the state that the manifest describes.
    #[error("{}: the state has the digest {found}, but the manifest says {expected}", folder.display())]
    StateDigest {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The digest in the manifest.
        expected: String,
        /// The digest of the tensors.
        found: String,
    },
    /// Checkpoints are there, and none of them can be used.
    #[error(
        "{}: none of the {} checkpoints can be used ({}){}",
        folder.display(),
        reasons.len(),
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        if self.is_passing() { "" } else { "; restore one from a copy, or start in a new run directory" }
    )]
    NoneUsable {
        /// The folder of the checkpoints.
        folder: PathBuf,
        /// Why, newest first.
        reasons: Vec<CheckpointError>,
    },
}

impl CheckpointError {
    /// Whether the system refused something that it may grant another time. The checkpoints may be intact.
    pub fn is_passing(&self) -> bool {
        match self {
            CheckpointError::Io { .. } | CheckpointError::OutOfMemory { .. } => true,
            CheckpointError::NoneUsable { reasons, .. } => reasons.iter().all(Self::is_passing),
            _ => false,
        }
    }

    /// Whether there is no room for it: the disk, a quota or a limit on a file's size.
    pub fn is_no_room(&self) -> bool {
        let too_large = |source: &io::Error| source.kind() == io::ErrorKind::FileTooLarge;
        self.is_full() || matches!(self, CheckpointError::Io { source, .. } if too_large(source))
    }

    /// Whether the disk or a quota is full, where others can make room while a process waits.
    pub fn is_full(&self) -> bool {
        let CheckpointError::Io { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}
