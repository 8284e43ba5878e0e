//! The index of a folder of shards, `index.json`; its form stands in `shard.rs`, which writes it.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::source::MAX_CLASSES;

/// Name of the index within a folder of shards.
pub const INDEX_FILE: &str = "index.json";

const FORMAT: &str = "mentee-shards";
const VERSION: u32 = 1;

/// The index of a folder of shards; see the module for its JSON form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    format: String,
    version: u32,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// How the images were made from those given; `None`: they are those given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<String>,
    /// The shards, in sample order.
    pub shards: Vec<IndexShard>,
}

/// One shard of an [`Index`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IndexShard {
    /// Its name within the folder.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Digest of all its bytes, hex.
    pub blake3: String,
    /// Where each image starts, bytes from the start of the shard.
    pub offsets: Vec<u64>,
    /// How long each image is, bytes.
    pub lengths: Vec<u32>,
    /// CRC-32C of each image; none of a set that was written before there were any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crc32c: Vec<u32>,
    /// The label of each.
    pub labels: Vec<Option<u32>>,
}

impl Index {
    /// Of the shards that are there so far.
    pub(crate) fn new(classes: Vec<String>, shards: Vec<IndexShard>) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, classes, changed: None, shards }
    }

    /// Whether the file at `path` begins like an index of ours: other programs call theirs `index.json` too.
    pub(crate) fn is_at(path: &Path) -> bool {
        let mut start = Vec::new();
        let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start));
        read.is_ok() && String::from_utf8_lossy(&start).contains(FORMAT)
    }

    /// Reads and checks an index (not the shards).
    ///
    /// # Errors
    /// [`DataError`] when it cannot be read, is of another version, or contradicts itself.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let text = fs::read(path).map_err(|e| DataError::io("read", path, &e))?;
        let bad = |reason: String| {
            DataError::bad_file(
                path,
                format!("{reason}; write the shards again, or remove the file to read the headers"),
            )
        };
        let index: Self =
            serde_json::from_slice(&text).map_err(|e| bad(format!("not an index of shards: {e}")))?;
        if index.format != FORMAT || index.version != VERSION {
            return Err(bad(format!(
                "format {} version {}, this program reads {FORMAT} version {VERSION}",
                index.format.escape_debug(),
                index.version
            )));
        }
        for shard in &index.shards {
            let file = Path::new(&shard.file);
            if file.file_name() != Some(file.as_os_str()) {
                return Err(bad(format!(
                    "shard name `{}` is not a plain file name",
                    shard.file.escape_debug()
                )));
            }
            let count = shard.offsets.len();
            if count != shard.lengths.len() || count != shard.labels.len() {
                return Err(bad(format!("{}: offsets, lengths and labels differ in number", shard.file)));
            }
            if !shard.crc32c.is_empty() && count != shard.crc32c.len() {
                return Err(bad(format!(
                    "{}: {} checksums of {count} images",
                    shard.file,
                    shard.crc32c.len()
                )));
            }
            if let Some(label) = shard.labels.iter().flatten().find(|&&label| label >= MAX_CLASSES) {
                let most = MAX_CLASSES - 1;
                return Err(bad(format!(
                    "{}: label {label}, and {most} is the largest there may be",
                    shard.file
                )));
            }
            let outside = shard.offsets.iter().zip(&shard.lengths).any(|(&offset, &length)| {
                offset.checked_add(u64::from(length)).is_none_or(|end| end > shard.bytes)
            });
            if outside {
                return Err(bad(format!("{}: an image beyond the end of the shard", shard.file)));
            }
        }
        Ok(index)
    }

    /// Identifies the data set (hex): names, sizes, digests and labels of everything in it.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut text = |s: &str| {
            hasher.update(&(s.len() as u64).to_le_bytes());
            hasher.update(s.as_bytes());
        };
        self.classes.iter().for_each(|class| text(class));
        self.changed.iter().for_each(|changed| text(changed));
        for shard in &self.shards {
            text(&shard.file);
            text(&shard.blake3);
        }
        for shard in &self.shards {
            hasher.update(&shard.bytes.to_le_bytes());
            for label in &shard.labels {
                hasher.update(&label.unwrap_or(u32::MAX).to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}
