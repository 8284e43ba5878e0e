//! The manifest: what a checkpoint consists of. Specified in FORMAT.md, "Manifest".

use std::{collections::HashSet, path::Path};

use serde::{Deserialize, Serialize};

use crate::CheckpointError;

/// The newest format version that this crate writes. It reads this one and those before.
pub const VERSION: u64 = 3;
/// Where there is nothing that this version does not know.
const VERSION_WITHOUT_COUNTS: u64 = 2;
/// The manifest's file name.
pub const MANIFEST_NAME: &str = "manifest.json";

const FORMAT: &str = "mentee-checkpoint";
/// A manifest holds a plan of a few KiB and some 200 bytes a file: room for 65,536 ranks.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// What training needs besides tensors to go on, and what tells whether it may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// Optimizer steps done; the run continues with the step of this number, counted from 0.
    pub step: u64,
    /// The epoch of that step, counted from 0.
    pub epoch: u64,
    /// The number of ranks that trained it.
    pub world_size: u32,
    /// The digest of everything in the plan that decides the numbers.
    pub plan_hash: String,
    /// The whole resolved recipe, as TOML.
    pub plan_toml: String,
    /// The digest of the data set's index.
    pub data_digest: String,
    /// The version of the program that wrote the checkpoint.
    pub mentee_version: String,
    /// What goes on being counted.
    #[serde(default, skip_serializing_if = "Counts::are_zero")]
    pub counts: Counts,
}

/// What a run counts over several steps, so that it comes to the same wherever it was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Steps on end in which the projections looked collapsed.
    pub collapsed_steps: u64,
    /// Views that the online probe has told right since its accuracy was last logged,
    pub online_correct: u64,
    /// of so many.
    pub online_views: u64,
}

impl Counts {
    fn are_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// One file of tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the checkpoint folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The BLAKE3 digest of its bytes, as 64 hexadecimal digits.
    pub blake3: String,
}

/// A valid manifest: file names cannot leave the folder, and the content is the one that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The format version.
    pub version: u64,
    /// What training needs besides tensors.
    pub meta: Meta,
    /// The files of tensors.
    pub files: Vec<FileEntry>,
    /// The digest of all tensors, independent of how they are split over files.
    pub state_digest: String,
}

/// The manifest as it is in the file. The order of the fields is the order in which they are hashed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u64,
    meta: Meta,
    files: Vec<FileEntry>,
    state_digest: String,
    manifest_digest: String,
}

/// As much of a manifest as all versions share.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u64,
}

impl Document {
    /// The digest of the compact form, with an empty `manifest_digest`.
    fn digest(&self) -> String {
        let unsigned = Document {
            format: self.format.clone(),
            version: self.version,
            meta: self.meta.clone(),
            files: self.files.clone(),
            state_digest: self.state_digest.clone(),
            manifest_digest: String::new(),
        };
        // Strings, unsigned integers and lists of them: nothing that serde_json refuses.
        let json = serde_json::to_vec(&unsigned).unwrap_or_default();
        blake3::hash(&json).to_hex().to_string()
    }
}

impl Manifest {
    /// The lowest version that can say what is in `meta`: who does not know a version refuses it with its number.
    pub(crate) fn version_of(meta: &Meta) -> u64 {
        if meta.counts.are_zero() { VERSION_WITHOUT_COUNTS } else { VERSION }
    }

    /// Reads a manifest. `path` is for messages.
    ///
    /// # Errors
    /// `ManifestTooLarge`, `ManifestSyntax`, `UnsupportedVersion`, `FileName`, `DuplicateFile` or
    /// `ManifestAltered`.
    pub fn parse(json: &[u8], path: &Path) -> Result<Manifest, CheckpointError> {
        if json.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(CheckpointError::ManifestTooLarge {
                path: path.into(),
                bytes: json.len() as u64,
                limit: MAX_MANIFEST_BYTES,
            });
        }
        let syntax = |problem: String| CheckpointError::ManifestSyntax { path: path.into(), problem };
        let header: Header = serde_json::from_slice(json).map_err(|error| syntax(error.to_string()))?;
        if header.format != FORMAT {
            return Err(syntax(format!("its format is {:?}, not {FORMAT:?}", header.format)));
        }
        if !(1..=VERSION).contains(&header.version) {
            return Err(CheckpointError::UnsupportedVersion {
                path: path.into(),
                found: header.version,
                supported: VERSION,
            });
        }
        let document: Document = serde_json::from_slice(json).map_err(|error| syntax(error.to_string()))?;
        let found = document.digest();
        if found != document.manifest_digest {
            let expected = document.manifest_digest;
            return Err(CheckpointError::ManifestAltered { path: path.into(), expected, found });
        }
        check_file_names(document.files.iter().map(|file| file.name.as_str()), path)?;
        let Document { version, meta, files, state_digest, .. } = document;
        Ok(Manifest { version, meta, files, state_digest })
    }

    /// The manifest as the bytes of its file.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut document = Document {
            format: FORMAT.into(),
            version: self.version,
            meta: self.meta.clone(),
            files: self.files.clone(),
            state_digest: self.state_digest.clone(),
            manifest_digest: String::new(),
        };
        document.manifest_digest = document.digest();
        // As above: nothing that serde_json refuses.
        let mut json = serde_json::to_vec_pretty(&document).unwrap_or_default();
        json.push(b'\n');
        json
    }
}

/// Names that stay inside their folder on every system, each once.
pub(crate) fn check_file_names<'a>(
    names: impl Iterator<Item = &'a str>,
    path: &Path,
) -> Result<(), CheckpointError> {
    let mut seen = HashSet::new();
    for name in names {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let stem = name.strip_suffix(".safetensors").unwrap_or("");
        if !plain || stem.is_empty() || stem.starts_with('.') || name.len() > 255 {
            return Err(CheckpointError::FileName { path: path.into(), name: name.into() });
        }
        if !seen.insert(name) {
            return Err(CheckpointError::DuplicateFile { path: path.into(), name: name.into() });
        }
    }
    Ok(())
}
