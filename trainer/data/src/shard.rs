//! Writing tar shards, and the index that goes with them.
//!
//! ```text
//! OUT/00000.tar   KEY.jpg (.png, .webp, .tif, .bmp, .ppm, .pgm), then KEY.cls when labelled; KEY is the sample's number, eight digits or more
//! OUT/00001.tar   …
//! OUT/index.json  written last
//! ```
//! `index.json`, version 1: `format` ("mentee-shards"), `version`, `classes` (names), and `shards`, each with `file`,
//! `bytes`, `blake3` (hex, of the whole file) and, for each sample in order, `offsets` (of the image's first byte in
//! the shard), `lengths` (bytes), `crc32c` (of its bytes: held against them at every reading; left out by earlier versions) and
//! `labels` (null when there is none); and `changed` when the images are not those that were given but made from them (null when they
//! are): such a set is another data set, by its digest too.
//!
//! Everything is written into a hidden folder, synced, and moved: OUT is there complete or not at all (`partial.rs`).
//! Shards that were finished there stay when the writer is killed or cannot move them, and are taken over by the next that
//! does the same. One writer at a time: another to the same OUT is refused.
//! The same samples give the same bytes, however many threads: headers carry no time, owner or host.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::decode::{Format, Reading, RgbImage};
use crate::error::DataError;
pub use crate::index::{INDEX_FILE, Index, IndexShard};
use crate::partial::Partial;
use crate::reader::Reader;
use crate::source::Source;
use crate::tar::{BLOCK, TarShards, numbered_key};

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

/// How [`write_shards_with`] goes about it.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardOptions {
    /// Size of a shard, about, bytes.
    pub shard_bytes: u64,
    /// Threads that read, decode and encode; 0 counts as 1.
    pub threads: usize,
    /// How deep and many-banded images are taken; those are stored as PNG where others are as they are.
    pub reading: Reading,
    /// What is stored.
    pub store: Store,
}

impl ShardOptions {
    /// What is done to the images, for the index, behind what was done before they came to `source`.
    #[must_use]
    pub fn changed_with(&self, source: &dyn Source) -> Option<String> {
        let own = self.reading.changed().into_iter().chain(self.store.changed());
        let words: Vec<String> = source.changed().into_iter().chain(own).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }
}

/// What is stored of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Image files as they are, but for what a [`Reading`] changes; that and raw pixels as PNG.
    AsIs,
    /// JPEG, made anew.
    Jpeg {
        /// Larger images are shrunk until their shorter side is this, pixels (bicubic, antialiased).
        shorter_side: Option<u32>,
        /// 1 to 100.
        quality: u8,
    },
    /// Pixels without compression (PPM): nothing to decode; for images of a few pixels.
    Raw {
        /// As of [`Store::Jpeg`].
        shorter_side: Option<u32>,
    },
}

impl Store {
    /// What is done to the images, for the index.
    #[must_use]
    pub fn changed(self) -> Option<String> {
        let smaller = |side: Option<u32>| {
            side.map_or(String::new(), |side| format!(", shorter side at most {side} pixels"))
        };
        match self {
            Self::AsIs => None,
            Self::Jpeg { shorter_side, quality } => {
                Some(format!("JPEG of quality {quality}, 4:2:0{}", smaller(shorter_side)))
            }
            Self::Raw { shorter_side } => Some(format!("raw pixels{}", smaller(shorter_side))),
        }
    }
}

/// Writes every sample of `source` as it is into tar shards of about `shard_bytes` in the folder `out`, which must be
/// new or empty. `progress` hears (done, total).
///
/// # Errors
/// As [`write_shards_with`].
pub fn write_shards(
    source: &dyn Source,
    out: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, DataError> {
    write_shards_with(
        source,
        out,
        &ShardOptions { shard_bytes, threads: 1, reading: Reading::default(), store: Store::AsIs },
        progress,
    )
}

/// Samples that a thread prepares at a time.
const PIECE: u64 = 32;

/// Writes every sample of `source` into tar shards in the folder `out`, which must be new or empty. `progress` hears
/// (done, total), from the start: with what an earlier writer of the same had finished.
///
/// # Errors
/// [`DataError`]: `out` holds something, another writer is at work there, a sample cannot be read or is no image, the
/// disk refuses. No set is at `out` then; finished shards are kept in a hidden folder, for the next try.
pub fn write_shards_with(
    source: &dyn Source,
    out: &Path,
    options: &ShardOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, DataError> {
    write(source, out, options, None, progress)
}

/// Writes one part of a divided set as [`write_shards_with`] does, and notes beside it what it was made of. `None` when
/// such a note says that `out` is this very part, complete: the other parts remain to be written. [`forget_part`] removes
/// the note.
///
/// # Errors
/// As [`write_shards_with`].
pub fn write_part(
    source: &dyn Source,
    out: &Path,
    options: &ShardOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<Written>, DataError> {
    let note = note_of(out);
    if let Ok(noted) = fs::read_to_string(&note)
        && let Ok(there) = TarShards::open(out)
        && noted == note_text(&job(source, options), &there.digest())
    {
        return Ok(None);
    }
    write(source, out, options, Some(note), progress).map(Some)
}

/// Removes the note of [`write_part`]: all parts are there.
pub fn forget_part(out: &Path) {
    // Best effort: it takes no room, and says nothing false.
    let _ = fs::remove_file(note_of(out));
}

/// Where the note on a part is: `.train.done` beside `train`.
fn note_of(out: &Path) -> PathBuf {
    out.with_file_name(format!(".{}.done", out.file_name().unwrap_or_default().to_string_lossy()))
}

fn note_text(job: &str, digest: &str) -> String {
    format!("{job}\n{digest}\n")
}

/// Everything that decides what is written.
fn job(source: &dyn Source, options: &ShardOptions) -> String {
    let reading = options.reading.changed().map_or(String::new(), |reading| format!(" {reading}"));
    format!("{} {} {:?}{reading}", source.digest(), options.shard_bytes, options.store)
}

fn write(
    source: &dyn Source,
    out: &Path,
    options: &ShardOptions,
    note: Option<PathBuf>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, DataError> {
    let job = job(source, options);
    let mut writer = ShardWriter::begin(out, options.shard_bytes, source.classes(), Some(job))?;
    writer.note = note;
    writer.index.changed = options.changed_with(source);
    let total = source.len();
    let first = writer.samples;
    progress(first, total);
    let threads = options.threads.max(1);
    std::thread::scope(|scope| {
        // Piece i comes from thread i % threads: in order, without a thread running ahead of the writer.
        let (senders, pieces): (Vec<_>, Vec<_>) =
            (0..threads).map(|_| std::sync::mpsc::sync_channel::<Piece>(1)).unzip();
        for (thread, sender) in senders.into_iter().enumerate() {
            let run = move || {
                let mut work = Prepare::new(options);
                let starts = (first..total).step_by(PIECE as usize).skip(thread).step_by(threads);
                for start in starts {
                    let mut piece = Piece::default();
                    for index in start..(start + PIECE).min(total) {
                        match work.sample(source, index) {
                            Ok(bytes) => piece.samples.push((index, bytes)),
                            Err(error) => {
                                piece.failed = Some(error);
                                break;
                            }
                        }
                    }
                    let failed = piece.failed.is_some();
                    // The writer has given up when it no longer listens.
                    if sender.send(piece).is_err() || failed {
                        return;
                    }
                }
            };
            std::thread::Builder::new()
                .spawn_scoped(scope, run)
                .map_err(|error| DataError::Thread { thread, reason: error.to_string() })?;
        }
        for turn in 0..(total - first).div_ceil(PIECE) {
            let piece = pieces[turn as usize % threads].recv().map_err(|_| DataError::Thread {
                thread: turn as usize % threads,
                reason: "it ended early".to_owned(),
            })?;
            for (index, bytes) in &piece.samples {
                writer.add(bytes, source.label(*index)).map_err(|error| match error {
                    DataError::BadSample { reason, .. } => {
                        DataError::BadSample { sample: source.key(*index), reason }
                    }
                    other => other,
                })?;
            }
            if let Some(error) = piece.failed {
                return Err(error);
            }
            progress(first + ((turn + 1) * PIECE).min(total - first), total);
        }
        Ok(())
    })?;
    writer.finish()
}

/// Some samples in order, each with its bytes as they are stored, and what came in the place of the next one.
#[derive(Default)]
struct Piece {
    samples: Vec<(u64, Vec<u8>)>,
    failed: Option<DataError>,
}

/// Memory of one thread that prepares samples.
struct Prepare {
    store: Store,
    reader: Reader,
    image: RgbImage,
    smaller: Vec<u8>,
    resizer: fast_image_resize::Resizer,
}

impl Prepare {
    fn new(options: &ShardOptions) -> Self {
        Self {
            store: options.store,
            reader: Reader::new(options.reading),
            image: RgbImage::default(),
            smaller: Vec::new(),
            resizer: fast_image_resize::Resizer::new(),
        }
    }

    fn sample(&mut self, source: &dyn Source, index: u64) -> Result<Vec<u8>, DataError> {
        let bad = |reason: String| DataError::BadSample { sample: source.key(index), reason };
        let side = match self.store {
            Store::AsIs => return self.reader.file(source, index),
            Store::Jpeg { shorter_side, .. } | Store::Raw { shorter_side } => shorter_side,
        };
        self.reader.whole(source, index, &mut self.image)?;
        if let Some(side) = side {
            self.shrink(side);
        }
        let RgbImage { width, height, data } = &self.image;
        match self.store {
            Store::Jpeg { quality, .. } => {
                let mut bytes = Vec::new();
                let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, quality);
                encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
                encoder.set_optimized_huffman_tables(true);
                let (Ok(w), Ok(h)) = (u16::try_from(*width), u16::try_from(*height)) else {
                    return Err(bad(format!("{width} x {height} pixels: a JPEG has at most 65,535 a side")));
                };
                encoder
                    .encode(data, w, h, jpeg_encoder::ColorType::Rgb)
                    .map_err(|error| bad(error.to_string()))?;
                Ok(bytes)
            }
            _ => {
                let mut bytes = format!("P6\n{width} {height}\n255\n").into_bytes();
                bytes.extend_from_slice(data);
                Ok(bytes)
            }
        }
    }

    /// Shrinks the image until its shorter side is `side`.
    fn shrink(&mut self, side: u32) {
        use fast_image_resize::images::{TypedImage, TypedImageRef};
        use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, pixels::U8x3};
        let RgbImage { width, height, data } = &mut self.image;
        let short = (*width).min(*height);
        if short <= side {
            return;
        }
        let scaled = |length: u32| {
            ((u64::from(length) * u64::from(side) + u64::from(short) / 2) / u64::from(short)).max(1) as u32
        };
        let (w, h) = (scaled(*width), scaled(*height));
        self.smaller.resize(w as usize * h as usize * 3, 0);
        let from = TypedImageRef::<U8x3>::from_buffer(*width, *height, data)
            .expect("an RgbImage holds width · height · 3 bytes");
        let mut to = TypedImage::<U8x3>::from_buffer(w, h, &mut self.smaller).expect("sized for it");
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
        self.resizer.resize_typed(&from, &mut to, &options).expect("both have pixels");
        std::mem::swap(data, &mut self.smaller);
        (*width, *height) = (w, h);
    }
}

/// Writes shards sample by sample; dropped before [`ShardWriter::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct ShardWriter {
    out: PathBuf,
    partial: Partial,
    shard_bytes: u64,
    shard: Option<Open>,
    index: Index,
    samples: u64,
    /// What is done; `None`: nothing is kept when this is dropped.
    job: Option<String>,
    /// Where it is noted that the set is complete.
    note: Option<PathBuf>,
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
    /// [`DataError`] when `out` holds something, another writer is at work there, or the disk refuses.
    pub fn create(out: &Path, shard_bytes: u64, classes: &[String]) -> Result<Self, DataError> {
        Self::begin(out, shard_bytes, classes, None)
    }

    /// As [`Self::create`], taking over the shards that an earlier writer of the same `job` had finished; what this one
    /// finishes stays for the next.
    fn begin(
        out: &Path,
        shard_bytes: u64,
        classes: &[String],
        job: Option<String>,
    ) -> Result<Self, DataError> {
        let (partial, done) = Partial::take(out, job.as_deref())?;
        Ok(Self {
            out: out.to_owned(),
            partial,
            shard_bytes,
            shard: None,
            samples: done.iter().map(|shard| shard.offsets.len() as u64).sum(),
            index: Index::new(classes.to_vec(), done),
            job,
            note: None,
        })
    }

    /// Adds one sample: an image file and its label.
    ///
    /// # Errors
    /// [`DataError`] when it is none, or the disk refuses.
    pub fn add(&mut self, image: &[u8], label: Option<u32>) -> Result<(), DataError> {
        let key = numbered_key(self.samples);
        let format = Format::of(image)
            .map_err(|error| DataError::BadSample { sample: key.clone(), reason: error.to_string() })?;
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
        let offset = shard.member(&format!("{key}.{}", format.extension()), image)?;
        if let Some(label) = label {
            shard.member(&format!("{key}.cls"), label.to_string().as_bytes())?;
        }
        shard.entry.offsets.push(offset);
        shard.entry.lengths.push(length);
        shard.entry.crc32c.push(crc32c::crc32c(image));
        shard.entry.labels.push(label);
        self.shard = Some(shard);
        self.samples += 1;
        Ok(())
    }

    fn open_shard(&self) -> Result<Open, DataError> {
        let file_name = format!("{:05}.tar", self.index.shards.len());
        let path = self.partial.dir().join(&file_name);
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
                crc32c: Vec::new(),
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
        if self.job.is_some() {
            self.partial.note(&shard.entry)?;
        }
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
        let path = self.partial.dir().join(INDEX_FILE);
        let json = serde_json::to_vec(&self.index).map_err(|e| DataError::io("write", &path, &e.into()))?;
        write_synced(&path, &json)?;
        let digest = self.index.digest();
        if let (Some(note), Some(job)) = (&self.note, &self.job) {
            write_synced(note, note_text(job, &digest).as_bytes())?;
        }
        self.partial.publish(&self.index.shards)?;
        Ok(Written {
            samples: self.samples,
            shards: self.index.shards.len() as u64,
            bytes: self.index.shards.iter().map(|shard| shard.bytes).sum(),
            digest,
        })
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        let kept = self.job.is_some() && !self.index.shards.is_empty();
        if !kept {
            self.partial.discard();
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|e| DataError::io("write", path, &e))
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
