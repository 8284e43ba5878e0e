//! Writing tar shards, and the index that goes with them.
//!
//! ```text
//! OUT/00000.tar   KEY.jpg | KEY.png, then KEY.cls when labelled; KEY is the sample's number, eight digits or more
//! OUT/00001.tar   …
//! OUT/index.json  written last
//! ```
//! `index.json`, version 1: `format` ("mentee-shards"), `version`, `classes` (names), and `shards`, each with `file`,
//! `bytes`, `blake3` (hex, of the whole file) and, for each sample in order, `offsets` (of the image's first byte in
//! the shard), `lengths` (bytes) and `labels` (null when there is none).
//!
//! Everything is written into a hidden sibling of OUT, synced, and renamed: OUT is there complete or not at all.
//! The same samples give the same bytes: headers carry no time, owner or host.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::decode::encode_png;
use crate::error::DataError;
use crate::source::{Encoding, Source};
use crate::tar::{BLOCK, numbered_key};

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
    /// The label of each.
    pub labels: Vec<Option<u32>>,
}

impl Index {
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
            if shard.offsets.len() != shard.lengths.len() || shard.offsets.len() != shard.labels.len() {
                return Err(bad(format!("{}: offsets, lengths and labels differ in number", shard.file)));
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

/// What [`write_shards`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Samples.
    pub samples: u64,
    /// Shards.
    pub shards: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// [`Index::digest`].
    pub digest: String,
}

/// Writes every sample of `source` into tar shards of about `shard_bytes` in the folder `out`, which must be new or
/// empty. JPEG and PNG files are copied as they are; raw pixels become PNG. `progress` hears (done, total).
///
/// # Errors
/// [`DataError`]: `out` holds something, a sample cannot be read or is no JPEG or PNG, the disk refuses. Nothing is
/// left at `out` then.
pub fn write_shards(
    source: &dyn Source,
    out: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, DataError> {
    let mut writer = ShardWriter::create(out, shard_bytes, source.classes())?;
    let total = source.len();
    let mut bytes = Vec::new();
    for index in 0..total {
        match source.read_into(index, &mut bytes)? {
            Encoding::File => {}
            Encoding::Raw { width, height } => {
                bytes = encode_png(width, height, &bytes)
                    .map_err(|reason| DataError::BadSample { sample: source.key(index), reason })?;
            }
        }
        writer.add(&bytes, source.label(index)).map_err(|error| match error {
            DataError::BadSample { reason, .. } => DataError::BadSample { sample: source.key(index), reason },
            other => other,
        })?;
        if (index + 1) % 128 == 0 {
            progress(index + 1, total);
        }
    }
    progress(total, total);
    writer.finish()
}

/// Writes shards sample by sample; dropped before [`ShardWriter::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct ShardWriter {
    out: PathBuf,
    partial: PathBuf,
    shard_bytes: u64,
    shard: Option<Open>,
    index: Index,
    samples: u64,
    finished: bool,
}

/// The shard being written.
#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    entry: IndexShard,
}

impl Open {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.file.write_all(bytes).map_err(|e| DataError::io("write", &self.path, &e))?;
        self.hasher.update(bytes);
        self.entry.bytes += bytes.len() as u64;
        Ok(())
    }

    /// One member: header, data, padding. Returns where its data starts.
    fn member(&mut self, name: &str, data: &[u8]) -> Result<u64, DataError> {
        self.write(&header(name, data.len() as u64))?;
        let offset = self.entry.bytes;
        self.write(data)?;
        let padding = data.len().next_multiple_of(BLOCK as usize) - data.len();
        self.write(&[0u8; BLOCK as usize][..padding])?;
        Ok(offset)
    }
}

impl ShardWriter {
    /// Begins a set of shards of about `shard_bytes` each at `out`, which must be new or an empty folder.
    ///
    /// # Errors
    /// [`DataError`] when `out` holds something or the disk refuses.
    pub fn create(out: &Path, shard_bytes: u64, classes: &[String]) -> Result<Self, DataError> {
        match fs::read_dir(out).map(|mut entries| entries.next().is_some()) {
            Ok(true) => return Err(DataError::OutputExists { path: out.to_owned() }),
            Ok(false) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(DataError::io("list", out, &e)),
        }
        let name = out.file_name().ok_or_else(|| {
            DataError::bad_file(out, "not a name for a new folder: give one like data/shards")
        })?;
        let partial = out.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        // Left by a writer that was killed.
        match fs::remove_dir_all(&partial) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(DataError::io("remove", &partial, &e));
            }
            _ => {}
        }
        fs::create_dir_all(&partial).map_err(|e| DataError::io("create", &partial, &e))?;
        Ok(Self {
            out: out.to_owned(),
            partial,
            shard_bytes,
            shard: None,
            index: Index {
                format: FORMAT.to_owned(),
                version: VERSION,
                classes: classes.to_vec(),
                shards: Vec::new(),
            },
            samples: 0,
            finished: false,
        })
    }

    /// Adds one sample: a JPEG or PNG file and its label.
    ///
    /// # Errors
    /// [`DataError`] when it is neither, or the disk refuses.
    pub fn add(&mut self, image: &[u8], label: Option<u32>) -> Result<(), DataError> {
        let key = numbered_key(self.samples);
        let extension = match image {
            [0xFF, 0xD8, ..] => "jpg",
            [0x89, b'P', b'N', b'G', ..] => "png",
            _ => {
                return Err(DataError::BadSample {
                    sample: key,
                    reason: if image.is_empty() { "the file is empty" } else { "neither JPEG nor PNG" }
                        .to_owned(),
                });
            }
        };
        let length = u32::try_from(image.len()).map_err(|_| DataError::BadSample {
            sample: key.clone(),
            reason: format!("{} bytes: an image must be below 4 GiB", image.len()),
        })?;
        if self.shard.as_ref().is_some_and(|shard| shard.entry.bytes + u64::from(length) > self.shard_bytes) {
            self.close_shard()?;
        }
        let mut shard = match self.shard.take() {
            Some(shard) => shard,
            None => self.open_shard()?,
        };
        let offset = shard.member(&format!("{key}.{extension}"), image)?;
        if let Some(label) = label {
            shard.member(&format!("{key}.cls"), label.to_string().as_bytes())?;
        }
        shard.entry.offsets.push(offset);
        shard.entry.lengths.push(length);
        shard.entry.labels.push(label);
        self.shard = Some(shard);
        self.samples += 1;
        Ok(())
    }

    fn open_shard(&self) -> Result<Open, DataError> {
        let file_name = format!("{:05}.tar", self.index.shards.len());
        let path = self.partial.join(&file_name);
        let file = File::create(&path).map_err(|e| DataError::io("create", &path, &e))?;
        Ok(Open {
            path,
            file: BufWriter::with_capacity(1 << 18, file),
            hasher: blake3::Hasher::new(),
            entry: IndexShard {
                file: file_name,
                bytes: 0,
                blake3: String::new(),
                offsets: Vec::new(),
                lengths: Vec::new(),
                labels: Vec::new(),
            },
        })
    }

    fn close_shard(&mut self) -> Result<(), DataError> {
        let Some(mut shard) = self.shard.take() else { return Ok(()) };
        // The end of a tar: two zero blocks.
        shard.write(&[0u8; 2 * BLOCK as usize])?;
        let synced = shard.file.flush().and_then(|()| shard.file.get_ref().sync_all());
        synced.map_err(|e| DataError::io("write", &shard.path, &e))?;
        shard.entry.blake3 = shard.hasher.finalize().to_hex().to_string();
        self.index.shards.push(shard.entry);
        Ok(())
    }

    /// Writes the index and moves the whole set to its place.
    ///
    /// # Errors
    /// [`DataError`] when nothing was added or the disk refuses.
    pub fn finish(mut self) -> Result<Written, DataError> {
        self.close_shard()?;
        if self.samples == 0 {
            return Err(DataError::bad_file(&self.out, "no samples were given: nothing to write"));
        }
        let path = self.partial.join(INDEX_FILE);
        let io = |e: std::io::Error| DataError::io("write", &path, &e);
        let json = serde_json::to_vec(&self.index).map_err(|e| io(e.into()))?;
        let mut file = File::create(&path).map_err(io)?;
        file.write_all(&json).and_then(|()| file.sync_all()).map_err(io)?;
        sync_dir(&self.partial)?;
        fs::rename(&self.partial, &self.out).map_err(|e| DataError::io("rename to", &self.out, &e))?;
        self.finished = true;
        sync_dir(self.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        Ok(Written {
            samples: self.samples,
            shards: self.index.shards.len() as u64,
            bytes: self.index.shards.iter().map(|shard| shard.bytes).sum(),
            digest: self.index.digest(),
        })
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: the next writer to the same place removes it too.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn sync_dir(dir: &Path) -> Result<(), DataError> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(|e| DataError::io("sync", dir, &e))
}

/// A ustar header of a regular file: mode 644, no owner, no time. `name` is at most 100 bytes.
fn header(name: &str, size: u64) -> [u8; BLOCK as usize] {
    let mut header = [0u8; BLOCK as usize];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
