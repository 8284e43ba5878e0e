//! Tar shards with WebDataset names: members that share a key up to the first dot are one sample.
//!
//! ```text
//! 00000.tar   00000000.jpg  00000000.cls  00000001.png  00000001.cls  …
//! ```
//! The image is the member whose extension is exactly that of an image (`jpg`, `png` and so on); `.cls` holds the label as decimal digits;
//! other members are passed over. With an `index.json` beside the shards (see [`crate::shard`]) nothing is scanned;
//! without one the headers are read once, at 512 bytes a member.
//!
//! The headers understood are ustar, GNU (long names, base-256 sizes) and pax (`path`, `size`). A member's name is a
//! key for messages and never a path that is opened; links, devices and folders are passed over; sizes are checked
//! against the file.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::decode::is_image_name;
use crate::error::{DataError, shown};
use crate::folder::is_foreign;
use crate::index::{INDEX_FILE, Index, IndexShard};
use crate::kept_open::KeptOpen;
use crate::listing::is_file;
use crate::listing::{Names, sorted_entries};
use crate::partial::is_unfinished;
use crate::passed_over::{PassedOver, image_patterns};
use crate::source::{Encoding, MAX_CLASSES, Source};

/// Size of a tar block: headers are one, data is padded to a multiple.
pub(crate) const BLOCK: u64 = 512;

/// The longest long name or pax header that is read, bytes.
const MAX_EXTENDED: u64 = 1 << 20;

const NO_LABEL: u32 = u32::MAX;

/// Receives what is wrong: an error to stop there, or nothing to go on.
pub(crate) type OnProblem<'a> = &'a mut dyn FnMut(DataError) -> Result<(), DataError>;

/// See the module.
#[derive(Debug)]
pub(crate) struct TarShards {
    shards: Vec<Shard>,
    /// Of every sample: where its image starts in its shard, its length, its label (or [`NO_LABEL`]).
    offsets: Vec<u64>,
    lengths: Vec<u32>,
    labels: Vec<u32>,
    keys: Keys,
    classes: Vec<String>,
    /// Every label has a name in the index.
    named: bool,
    digest: String,
    /// What was done to the images, by the index.
    changed: Option<String>,
    /// Members that are no images and no labels, where members were looked at.
    passed: PassedOver,
    /// What was opened.
    path: PathBuf,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: Option<KeptOpen>,
    first: u64,
    /// By the index, when there is one.
    blake3: Option<String>,
    /// Of its images, by an index that has any.
    crc32c: Vec<u32>,
}

#[derive(Debug)]
enum Keys {
    /// As scanned.
    Named(Names),
    /// As `mentee shard` writes them: the sample's number.
    Numbered,
}

/// The key under which `mentee shard` stores sample `index`.
pub(crate) fn numbered_key(index: u64) -> String {
    format!("{index:08}")
}

fn tar_files(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for path in sorted_entries(dir)?.into_iter().map(|entry| entry.path()) {
        if path.extension().is_some_and(|e| e == "tar") && is_file(&path)? {
            files.push(path);
        }
    }
    Ok(files)
}

/// Whether a folder holds tar shards.
pub(crate) fn is_here(dir: &Path) -> bool {
    Index::is_at(&dir.join(INDEX_FILE)) || tar_files(dir).is_ok_and(|files| !files.is_empty())
}

/// One of the tar files in a folder without an index of ours, which would say that they are what is meant.
pub(crate) fn one_without_index(dir: &Path) -> Option<PathBuf> {
    if Index::is_at(&dir.join(INDEX_FILE)) {
        return None;
    }
    tar_files(dir).ok()?.into_iter().next()
}

/// Refuses a single file that is no tar file, by what it is instead. One that is named like a tar file is left to be read, unless
/// it is packed.
pub(crate) fn refuse_other(path: &Path) -> Result<(), DataError> {
    let mut start = Vec::with_capacity(BLOCK as usize);
    File::open(path)
        .and_then(|file| file.take(BLOCK).read_to_end(&mut start))
        .map_err(|e| DataError::io("read", path, &e))?;
    if start.as_slice().try_into().is_ok_and(is_header) {
        return Ok(());
    }
    const UNPACK: &str =
        "unpack it first and give the folder (a tar file can be given when it is not compressed)";
    let packed = match &start[..] {
        [0x1F, 0x8B, ..] => Some("gzip"),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => Some("zip"),
        [0xFD, b'7', b'z', b'X', b'Z', ..] => Some("xz"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Some("zstd"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some("bzip2"),
        [b'7', b'z', 0xBC, 0xAF, ..] => Some("7z"),
        [b'R', b'a', b'r', b'!', ..] => Some("rar"),
        _ => None,
    };
    let reason = match (packed, path.extension().and_then(|e| e.to_str()).unwrap_or_default()) {
        (Some(format), _) => format!("packed ({format}): {UNPACK}"),
        (None, extension) if extension.eq_ignore_ascii_case("tar") => return Ok(()),
        (None, extension) if is_image_name(extension) => {
            "a single image: give the folder that it is in".to_owned()
        }
        _ => "not a tar file: give a folder of images, or a tar file".to_owned(),
    };
    Err(DataError::bad_file(path, reason))
}

impl TarShards {
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        Self::open_reporting(path, &mut Err)
    }

    /// Opens a folder of shards or one tar file; what is wrong goes to `problem`, which may let it pass.
    pub(crate) fn open_reporting(path: &Path, problem: OnProblem<'_>) -> Result<Self, DataError> {
        if is_unfinished(path) {
            return Err(DataError::bad_file(
                path,
                "shards are still being moved here, or their writer was stopped: run the same `mentee shard` again",
            ));
        }
        let index = path.join(INDEX_FILE);
        let mut shards = if is_file(&index)? {
            Self::from_index(path, &Index::load(&index)?, problem)?
        } else {
            Self::from_headers(path, problem)?
        };
        shards.path = path.to_owned();
        if shards.offsets.is_empty() {
            return Err(DataError::NoImages {
                path: path.to_owned(),
                seen: shards.passed.list().map_or(String::new(), |list| format!(", but members {list}")),
                looked_for: format!(
                    "*.tar with members named {}; a KEY ends at the first dot",
                    image_patterns().replace('*', "KEY")
                ),
            });
        }
        Ok(shards)
    }

    fn empty() -> Self {
        Self {
            shards: Vec::new(),
            offsets: Vec::new(),
            lengths: Vec::new(),
            labels: Vec::new(),
            keys: Keys::Numbered,
            classes: Vec::new(),
            named: false,
            digest: String::new(),
            changed: None,
            passed: PassedOver::default(),
            path: PathBuf::new(),
        }
    }

    fn push_shard(&mut self, path: PathBuf, file: File, entry: Option<&IndexShard>) {
        let file = KeptOpen::new(file);
        let first = self.offsets.len() as u64;
        let (blake3, crc32c) = entry.map(|entry| (entry.blake3.clone(), entry.crc32c.clone())).unzip();
        self.shards.push(Shard { path, file, first, blake3, crc32c: crc32c.unwrap_or_default() });
    }

    fn from_index(dir: &Path, index: &Index, problem: OnProblem<'_>) -> Result<Self, DataError> {
        let mut set = Self::empty();
        set.classes.clone_from(&index.classes);
        set.digest = index.digest();
        set.changed.clone_from(&index.changed);
        for shard in &index.shards {
            let path = dir.join(&shard.file);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) => {
                    problem(DataError::io("open", &path, &e))?;
                    continue;
                }
            };
            let size = file.metadata().map_err(|e| DataError::io("read", &path, &e))?.len();
            if size != shard.bytes {
                problem(DataError::bad_file(
                    &path,
                    format!(
                        "{size} bytes, {} in {INDEX_FILE}: truncated or replaced; write the shards again",
                        shard.bytes
                    ),
                ))?;
            }
            set.push_shard(path, file, Some(shard));
            set.offsets.extend(&shard.offsets);
            set.lengths.extend(&shard.lengths);
            set.labels.extend(shard.labels.iter().map(|label| label.unwrap_or(NO_LABEL)));
        }
        let named = |&label: &u32| label == NO_LABEL || (label as usize) < set.classes.len();
        set.named = !set.classes.is_empty() && set.labels.iter().all(named);
        Ok(set)
    }

    fn from_headers(path: &Path, problem: OnProblem<'_>) -> Result<Self, DataError> {
        let files = if path.is_dir() { tar_files(path)? } else { vec![path.to_owned()] };
        let mut set = Self::empty();
        let mut keys = Names::default();
        let mut hasher = blake3::Hasher::new();
        for path in files {
            let file = File::open(&path).map_err(|e| DataError::io("open", &path, &e))?;
            let reader = file.try_clone().map_err(|e| DataError::io("open", &path, &e))?;
            set.push_shard(path.clone(), file, None);
            let from = set.offsets.len();
            if let Err(error) = set.scan(&path, reader, &mut keys) {
                problem(error)?;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            for i in from..set.offsets.len() {
                hasher.update(&(keys.get(i).len() as u64).to_le_bytes());
                hasher.update(keys.get(i).as_bytes());
                hasher.update(&set.lengths[i].to_le_bytes());
                hasher.update(&set.labels[i].to_le_bytes());
            }
        }
        let most = set.labels.iter().filter(|&&label| label != NO_LABEL).max();
        set.classes = (0..most.map_or(0, |&label| label + 1)).map(|i| i.to_string()).collect();
        set.keys = Keys::Named(keys);
        set.digest = hasher.finalize().to_hex().to_string();
        Ok(set)
    }

    /// Adds the samples of one tar file.
    fn scan(&mut self, path: &Path, file: File, keys: &mut Names) -> Result<(), DataError> {
        let mut members = Members::new(path, file)?;
        let mut sample = Grouped::default();
        while let Some(member) = members.next()? {
            let (key, extension) = split_name(&member.name);
            if key != sample.key {
                self.close(&mut sample, keys);
                sample.key = key.to_owned();
            }
            if is_image_name(extension) && sample.image.is_none() {
                let length =
                    u32::try_from(member.size).ok().filter(|&length| length < u32::MAX).ok_or_else(|| {
                        DataError::bad_file(
                            path,
                            format!("member {}: an image of {} bytes", member.name, member.size),
                        )
                    })?;
                sample.image = Some((member.offset, length));
            } else if extension.eq_ignore_ascii_case("cls") {
                sample.label = Some(members.read_label(&member)?);
            } else if !member.name.split('/').any(is_foreign) {
                self.passed.note(&member.name);
            }
        }
        self.close(&mut sample, keys);
        Ok(())
    }

    fn close(&mut self, sample: &mut Grouped, keys: &mut Names) {
        if let Some((offset, length)) = sample.image {
            keys.push(&sample.key);
            self.offsets.push(offset);
            self.lengths.push(length);
            self.labels.push(sample.label.unwrap_or(NO_LABEL));
        }
        *sample = Grouped::default();
    }

    fn shard_of(&self, index: u64) -> &Shard {
        &self.shards[self.shards.partition_point(|shard| shard.first <= index) - 1]
    }

    /// Compares every shard with its digest in the index; without an index there is nothing to compare.
    pub(crate) fn verify_shards(&self, problem: OnProblem<'_>) -> Result<(), DataError> {
        for shard in &self.shards {
            let Some(expected) = &shard.blake3 else { continue };
            let mut hasher = blake3::Hasher::new();
            let hashed = File::open(&shard.path).and_then(|file| hasher.update_reader(file).map(|_| ()));
            if let Err(e) = hashed {
                problem(DataError::io("read", &shard.path, &e))?;
            } else if hasher.finalize().to_hex().as_str() != expected {
                problem(DataError::bad_file(
                    &shard.path,
                    format!(
                        "its bytes do not match the digest in {INDEX_FILE}: altered; write the shards again"
                    ),
                ))?;
            }
        }
        Ok(())
    }
}

/// The members of one sample seen so far.
#[derive(Debug, Default)]
struct Grouped {
    key: String,
    image: Option<(u64, u32)>,
    label: Option<u32>,
}

/// WebDataset's rule: the key is everything up to the first dot of the last path component.
fn split_name(name: &str) -> (&str, &str) {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[base..].find('.') {
        Some(dot) => (&name[..base + dot], &name[base + dot + 1..]),
        None => (name, ""),
    }
}

impl Source for TarShards {
    fn len(&self) -> u64 {
        self.offsets.len() as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        let shard = self.shard_of(index);
        let (offset, length) = (self.offsets[index as usize], self.lengths[index as usize] as usize);
        buffer.resize(length, 0);
        let read = match &shard.file {
            Some(kept) => kept.file().read_exact_at(buffer, offset),
            None => File::open(&shard.path).and_then(|file| file.read_exact_at(buffer, offset)),
        };
        read.map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => DataError::BadSample {
                sample: self.key(index),
                reason: "lies beyond the end of its shard".to_owned(),
            },
            _ => DataError::io("read", &shard.path, &e),
        })?;
        let written = shard.crc32c.get((index - shard.first) as usize);
        if written.is_some_and(|&written| crc32c::crc32c(buffer) != written) {
            let reason = "altered since its shard was written".to_owned();
            return Err(DataError::BadSample { sample: self.key(index), reason });
        }
        Ok(Encoding::File)
    }

    fn label(&self, index: u64) -> Option<u32> {
        Some(self.labels[index as usize]).filter(|&label| label != NO_LABEL)
    }

    fn key(&self, index: u64) -> String {
        let shard = self.shard_of(index).path.display();
        match &self.keys {
            Keys::Named(names) => format!("{shard}:{}", names.get(index as usize)),
            Keys::Numbered => format!("{shard}:{}", numbered_key(index)),
        }
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn names_classes(&self) -> bool {
        self.named
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn shards(&self) -> Vec<u64> {
        let ends = self.shards.iter().skip(1).map(|shard| shard.first).chain([self.len()]);
        self.shards.iter().zip(ends).map(|(shard, end)| end - shard.first).collect()
    }

    fn stored(&self) -> (u64, u64) {
        (self.lengths.iter().map(|&length| u64::from(length)).sum(), self.shards.len() as u64)
    }

    fn changed(&self) -> Option<String> {
        self.changed.clone()
    }

    fn passed_over(&self) -> Option<String> {
        let list = self.passed.list()?;
        let read =
            "read are a KEY's first image (KEY.jpg and so on) and its KEY.cls; a KEY ends at the first dot";
        Some(format!("passed over in {}: members {list} ({read})", shown(&self.path)))
    }
}

/// A regular file in a tar.
#[derive(Debug)]
struct Member {
    name: String,
    offset: u64,
    size: u64,
}

/// The regular files of a tar, in order. Nothing is trusted: see the module.
struct Members<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    /// Where the reader stands.
    at: u64,
    /// Where the next header is.
    next: u64,
    end: u64,
}

impl<'a> Members<'a> {
    fn new(path: &'a Path, file: File) -> Result<Self, DataError> {
        let end = file.metadata().map_err(|e| DataError::io("read", path, &e))?.len();
        let mut reader = BufReader::with_capacity(1 << 16, file);
        reader.rewind().map_err(|e| DataError::io("read", path, &e))?;
        Ok(Self { path, reader, at: 0, next: 0, end })
    }

    fn bad(&self, reason: impl std::fmt::Display) -> DataError {
        DataError::bad_file(self.path, format!("tar header at byte {}: {reason}", self.next))
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), DataError> {
        let io = |e: std::io::Error| DataError::io("read", self.path, &e);
        self.reader.seek_relative(offset as i64 - self.at as i64).map_err(io)?;
        self.at = offset;
        self.reader.read_exact(buffer).map_err(io)?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Member>, DataError> {
        let mut long_name: Option<String> = None;
        let mut long_size: Option<u64> = None;
        loop {
            if self.next >= self.end {
                // Some writers leave out the two zero blocks; cut exactly between members looks the same.
                return Ok(None);
            }
            if self.end - self.next < BLOCK {
                return Err(self.bad("the file ends within a header: truncated"));
            }
            let mut header = [0u8; BLOCK as usize];
            self.read_at(self.next, &mut header)?;
            if header.iter().all(|&b| b == 0) {
                return Ok(None);
            }
            if !is_header(&header) {
                return Err(self.bad("checksum does not match: damaged, or not a tar file"));
            }
            let kind = header[156];
            let mut size = number(&header[124..136]).ok_or_else(|| self.bad("unreadable size"))?;
            // A pax size is that of the member it precedes.
            if let (Some(pax), b'0' | 0 | b'7') = (long_size, kind) {
                size = pax;
            }
            let data = self.next + BLOCK;
            let after = size
                .checked_next_multiple_of(BLOCK)
                .and_then(|padded| padded.checked_add(data))
                .ok_or_else(|| self.bad("impossible size"))?;
            if size > self.end - data {
                return Err(
                    self.bad(format!("a member of {size} bytes, {} are left: truncated", self.end - data))
                );
            }
            match kind {
                b'L' | b'x' => {
                    if size > MAX_EXTENDED {
                        return Err(self.bad(format!("a name of {size} bytes")));
                    }
                    let mut bytes = vec![0u8; size as usize];
                    self.read_at(data, &mut bytes)?;
                    if kind == b'L' {
                        long_name = Some(text(&bytes));
                    } else {
                        let (path, size) = pax(&bytes).ok_or_else(|| self.bad("malformed pax header"))?;
                        long_name = path.or(long_name);
                        long_size = size.or(long_size);
                    }
                }
                b'0' | 0 | b'7' => {
                    let name = long_name.take().unwrap_or_else(|| header_name(&header));
                    self.next = after;
                    return Ok(Some(Member { name, offset: data, size }));
                }
                // Long link names and global headers belong to what follows or to nothing; folders, links and
                // devices hold no image.
                b'K' | b'g' => {}
                _ => {
                    long_name = None;
                    long_size = None;
                }
            }
            self.next = after;
        }
    }

    fn read_label(&mut self, member: &Member) -> Result<u32, DataError> {
        let bad = |text: &str| DataError::bad_file(self.path, format!("member {}: {text}", member.name));
        if member.size > 32 {
            return Err(bad(&format!("{} bytes is no label", member.size)));
        }
        let mut bytes = vec![0u8; member.size as usize];
        self.read_at(member.offset, &mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        match text.trim().parse::<u32>() {
            Ok(label) if label < MAX_CLASSES => Ok(label),
            _ => Err(DataError::bad_file(
                self.path,
                format!(
                    "member {}: label `{}` is not a whole number from 0 to {}",
                    member.name,
                    text.trim().escape_debug(),
                    MAX_CLASSES - 1
                ),
            )),
        }
    }
}

/// Whether a header's checksum is that of its bytes, those of the checksum itself taken as spaces.
fn is_header(header: &[u8; BLOCK as usize]) -> bool {
    let sum: u64 = header.iter().map(|&b| u64::from(b)).sum::<u64>()
        - header[148..156].iter().map(|&b| u64::from(b)).sum::<u64>()
        + 8 * u64::from(b' ');
    number(&header[148..156]) == Some(sum)
}

/// Octal digits with spaces or NUL around, or GNU's base-256 when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        if field[0] != 0x80 {
            return None; // negative, or beyond 2^64
        }
        // Of any length: a checksum's field is shorter than the number could be.
        return field[1..].iter().try_fold(0u64, |value, &b| Some(value.checked_mul(256)? | u64::from(b)));
    }
    let digits = field.split(|&b| b == 0).next().unwrap_or_default().trim_ascii();
    if digits.is_empty() {
        return Some(0);
    }
    digits.iter().try_fold(0u64, |value, &b| match b {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(b - b'0')),
        _ => None,
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
}

fn header_name(header: &[u8]) -> String {
    let name = text(&header[..100]);
    let prefix = if &header[257..263] == b"ustar\0" { text(&header[345..500]) } else { String::new() };
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

/// `path` and `size` of a pax header: records of "LENGTH KEY=VALUE\n".
fn pax(mut bytes: &[u8]) -> Option<(Option<String>, Option<u64>)> {
    let (mut path, mut size) = (None, None);
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|&b| b == b' ')?;
        let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
        let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&b| b == b'=')?;
        let value = &record[equals + 1..];
        match &record[..equals] {
            b"path" => path = Some(text(value)),
            b"size" => size = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
            _ => {}
        }
        bytes = &bytes[length..];
    }
    Some((path, size))
}
