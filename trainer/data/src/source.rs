//! Where samples come from: random access to encoded or raw images, whatever the format on disk.
//!
//! | format | what it looks like | file |
//! |---|---|---|
//! | tar shards | `*.tar` with WebDataset names, `index.json` when written by `mentee shard` | `tar.rs` |
//! | image folder | `class/…/image.jpg` | `folder.rs` |
//! | CIFAR binary | `data_batch_*.bin`, `test_batch.bin`; `train.bin`, `test.bin` | `cifar.rs` |
//! | IDX | `train-images-idx3-ubyte[.gz]`, … | `idx.rs` |

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mentee_config::recipe::{DataFormat, DataOrder};

use crate::decode::{CropBox, DecodeError, Decoder, PlanarImage, RgbImage, is_deep};
use crate::error::{DataError, shown};
use crate::order::Order;
use crate::{cifar, folder, idx, tar};

/// How the bytes of a sample stand for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// A JPEG, PNG, WebP or PPM file.
    File,
    /// `[height, width, 3]` pixels.
    Raw {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
}

/// One sample as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// What the bytes are.
    pub encoding: Encoding,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Samples by index, from any thread.
pub trait Source: Send + Sync {
    /// Number of samples.
    fn len(&self) -> u64;

    /// No samples. (Opening refuses such a set.)
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads sample `index` (below [`Self::len`]) into `buffer`, replacing what it held.
    ///
    /// # Errors
    /// [`DataError`] naming the file when it cannot be read.
    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError>;

    /// Reads sample `index`.
    ///
    /// # Errors
    /// As [`Self::read_into`].
    fn read(&self, index: u64) -> Result<Sample, DataError> {
        let mut bytes = Vec::new();
        let encoding = self.read_into(index, &mut bytes)?;
        Ok(Sample { encoding, bytes })
    }

    /// The class of sample `index`, an index into [`Self::classes`] where those are named.
    fn label(&self, index: u64) -> Option<u32>;

    /// Where sample `index` is, for messages: `shard.tar:key`, or a file's path.
    fn key(&self, index: u64) -> String;

    /// Names of the classes; empty when unlabelled.
    fn classes(&self) -> &[String];

    /// Whether every label has a name that the set itself gives it, and that means the same class in another set. The
    /// numbers of IDX, CIFAR and plain tar files are labels and no names.
    fn names_classes(&self) -> bool {
        false
    }

    /// Identifies the data set (hex): a digest of names, sizes and labels, not of the images themselves.
    fn digest(&self) -> String;

    /// Bytes of the images as stored, and the number of files they are in.
    fn stored(&self) -> (u64, u64);

    /// A line that says which files lie among the images and are not read; none when there are no such.
    fn passed_over(&self) -> Option<String> {
        None
    }

    /// Numbers of samples that are stored together, in the order of their indices: what is best read in one go. Sets
    /// without shards are cut into runs of a thousand.
    fn shards(&self) -> Vec<u64> {
        let (whole, rest) = (self.len() / 1000, self.len() % 1000);
        std::iter::repeat_n(1000, whole as usize).chain((rest > 0).then_some(rest)).collect()
    }
}

/// The order in which a run with these settings visits the samples of `source`.
#[must_use]
pub fn order(source: &dyn Source, order: DataOrder, seed: u64, global_batch: u64) -> Order {
    match order {
        DataOrder::Global => Order::new(seed, source.len(), global_batch),
        DataOrder::Windowed => Order::windowed(seed, &source.shards(), global_batch),
    }
}

/// Memory of one thread that reads samples: used again from sample to sample.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    decoder: Decoder,
}

impl Reader {
    /// Reads sample `index` and decodes the part of it that `choose` asks for, given width and height, into `planes`.
    ///
    /// # Errors
    /// [`DataError::BadSample`] for a damaged one, [`DataError::Io`] for an unreadable file; both name the sample.
    pub fn part(
        &mut self,
        source: &dyn Source,
        index: u64,
        choose: impl FnOnce(u32, u32) -> CropBox,
        planes: &mut PlanarImage,
    ) -> Result<(), DataError> {
        self.with(source, index, |decoder, encoding, bytes| {
            let opened = decoder.open(encoding, bytes)?;
            let part = choose(opened.width, opened.height);
            opened.part(part, planes)
        })
    }

    /// Reads and decodes sample `index` into `image`.
    ///
    /// # Errors
    /// As [`Self::part`].
    pub fn whole(&mut self, source: &dyn Source, index: u64, image: &mut RgbImage) -> Result<(), DataError> {
        self.with(source, index, |decoder, encoding, bytes| decoder.decode(encoding, bytes, image))
    }

    /// Whether the sample that was read last is stored with 16 bits a channel.
    pub(crate) fn was_deep(&self) -> bool {
        is_deep(&self.bytes)
    }

    /// Reads sample `index` and leaves it encoded.
    pub(crate) fn bytes(&mut self, source: &dyn Source, index: u64) -> Result<(), DataError> {
        source.read_into(index, &mut self.bytes).map(|_| ())
    }

    fn with(
        &mut self,
        source: &dyn Source,
        index: u64,
        decode: impl FnOnce(&mut Decoder, Encoding, &[u8]) -> Result<(), DecodeError>,
    ) -> Result<(), DataError> {
        let encoding = source.read_into(index, &mut self.bytes)?;
        let (decoder, bytes) = (&mut self.decoder, &self.bytes);
        // A decoder that panics on hostile bytes must not take the run's threads down without a name.
        let decoded =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| decode(decoder, encoding, bytes)));
        let reason = match decoded {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => {
                // Whatever state it was left in.
                self.decoder = Decoder::default();
                DecodeError::Damaged { format: "image", reason: "the decoder panicked".to_owned() }
            }
        };
        Err(DataError::BadSample { sample: source.key(index), reason: reason.to_string() })
    }
}

/// Which part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Eval,
}

/// Opens everything at `path` as one data set; see [`open_split`] for sets divided into train and test.
///
/// # Errors
/// [`DataError`]: no such path, no image in it, an unreadable or malformed file.
pub fn open(path: &Path, format: DataFormat) -> Result<Arc<dyn Source>, DataError> {
    let (path, format) = resolve(path, format)?;
    open_as(&path, format, None)
}

/// Opens the training or the held-out part of the data set at `path`; `None` when it has no held-out part.
///
/// A folder is divided when it holds one of [`TRAIN`] and one of [`HELD_OUT`], or one of [`TRAIN`] and no other folder with
/// images; its held-out part is the first of those that is there. For a path that is itself named so the held-out part is looked
/// for beside it. Upper and lower case are the same. CIFAR and IDX files are divided by their names. Any other path is all
/// training.
///
/// # Errors
/// As [`open`].
pub fn open_split(
    path: &Path,
    format: DataFormat,
    split: Split,
) -> Result<Option<Arc<dyn Source>>, DataError> {
    let (base, train) = split_base(path)?;
    let Some(train) = train else {
        let (path, format) = resolve(path, format)?;
        let by_name = matches!(format, DataFormat::Cifar | DataFormat::Idx);
        return match split {
            Split::Train => open_as(&path, format, by_name.then_some(Split::Train)).map(Some),
            Split::Eval if by_name => match open_as(&path, format, Some(Split::Eval)) {
                Ok(source) => Ok(Some(source)),
                Err(DataError::NoImages { .. }) => Ok(None),
                Err(error) => Err(error),
            },
            Split::Eval => Ok(None),
        };
    };
    match split {
        Split::Train => open(&train, format).map(Some),
        Split::Eval => held_out(&base)?.first().map(|dir| open(dir, format)).transpose(),
    }
}

/// The held-out folders of the data set at `path` but the first, which is [`open_split`]'s: those that neither training nor
/// evaluation sees.
pub fn more_held_out(path: &Path) -> Vec<PathBuf> {
    // What cannot be told here was an error of `open_split` already.
    match split_base(path) {
        Ok((base, Some(_))) => held_out(&base).unwrap_or_default().into_iter().skip(1).collect(),
        _ => Vec::new(),
    }
}

/// What the training part may be called, the first that is there.
pub const TRAIN: [&str; 2] = ["train", "training"];

/// What the held-out part beside it may be called, the first that is there.
pub const HELD_OUT: [&str; 5] = ["test", "testing", "val", "valid", "validation"];

/// What parts are called as well; nothing is done with them but to ask.
const LIKE_PARTS: [&str; 4] = ["trainval", "dev", "eval", "evaluation"];

/// The folders of `base` that are held out.
fn held_out(base: &Path) -> Result<Vec<PathBuf>, DataError> {
    folders_named(base, &HELD_OUT)
}

/// The folders of `base` that have one of these names in upper or lower case, in the order of the names, as it is written here
/// first. A link that leads nowhere is an error: without it the set would be another.
fn folders_named(base: &Path, names: &[&str]) -> Result<Vec<PathBuf>, DataError> {
    let listed = if base.as_os_str().is_empty() { Path::new(".") } else { base };
    let there: Vec<String> = match fs::read_dir(listed) {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect(),
        // One may be allowed to enter a folder and not to list it.
        Err(_) => names.iter().map(|&name| name.to_owned()).filter(|name| base.join(name).is_dir()).collect(),
    };
    let place = |name: &String| names.iter().position(|known| known.eq_ignore_ascii_case(name));
    let mut found: Vec<_> = there.into_iter().filter_map(|name| Some((place(&name)?, name))).collect();
    found.sort_by_key(|(place, name)| (*place, name != names[*place], name.clone()));
    let mut folders = Vec::new();
    for (_, name) in found {
        let path = base.join(name);
        if folder::about(&path)?.is_some_and(|about| about.is_dir()) {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// The folder that is divided, and its training part; the latter `None` when nothing is divided.
fn split_base(path: &Path) -> Result<(PathBuf, Option<PathBuf>), DataError> {
    if let Some(train) = folders_named(path, &TRAIN)?.into_iter().next() {
        // Else "train" may be a class among others.
        let is_class = |entry: fs::DirEntry| {
            let name = entry.file_name();
            train.file_name() != Some(&*name)
                && !folder::is_foreign(&name.to_string_lossy())
                && entry.path().is_dir()
                && folder::an_image(&entry.path(), 1).is_some()
        };
        let is_alone = || !fs::read_dir(path).is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(is_class)));
        if !held_out(path)?.is_empty() || is_alone() {
            return Ok((path.to_owned(), Some(train)));
        }
    }
    let is_train = |name: &std::ffi::OsStr| TRAIN.iter().any(|train| name.eq_ignore_ascii_case(train));
    if path.file_name().is_some_and(is_train)
        && path.is_dir()
        && let Some(parent) = path.parent()
    {
        return Ok((parent.to_owned(), Some(path.to_owned())));
    }
    Ok((path.to_owned(), None))
}

/// The word for a part of a set that a folder is named by: of `Val` and `val2017` it is "val".
fn part_word(name: &str) -> Option<&'static str> {
    let word = name.trim_end_matches(|c: char| c.is_ascii_digit() || "-_. ".contains(c));
    TRAIN.into_iter().chain(HELD_OUT).chain(LIKE_PARTS).find(|known| known.eq_ignore_ascii_case(word))
}

/// Refuses to take folders for classes that are parts of a divided set by all that can be seen. One class may well be called
/// "train", as a vehicle, or "test": two such names, or one alone, are no chance.
pub(crate) fn refuse_parts_as_classes(root: &Path, classes: &[String]) -> Result<(), DataError> {
    let parts = |names: &[String]| {
        let words: Vec<_> = names.iter().filter_map(|name| Some((part_word(name)?, name.clone()))).collect();
        let first = words.first().cloned();
        first.and_then(|(word, one)| Some((one, words.into_iter().find(|(other, _)| *other != word)?.1)))
    };
    let understood = "`train` or `training`, beside `test`, `testing`, `val`, `valid` or `validation`";
    if let Some((one, other)) = parts(classes) {
        return Err(DataError::bad_file(
            root,
            format!(
                "`{one}` and `{other}` are named like parts of a set and would be classes: name the parts as is \
                 understood ({understood}) or give the one to train on; classes need other names"
            ),
        ));
    }
    let [only] = classes else { return Ok(()) };
    let folder = root.join(only);
    let give = format!("give `{}`", shown(&folder));
    if part_word(only).is_some() {
        return Err(DataError::bad_file(
            root,
            format!(
                "its only folder with images, `{only}`, is named like a part of a set and would be a class: {give}"
            ),
        ));
    }
    // A folder too many around the set, as archives bring it along.
    let within = folder::folders_with_images(&folder);
    let divided = match (&within.folders[..], parts(&within.folders)) {
        _ if within.own => None,
        (_, Some((one, other))) => Some(format!("`{one}` and `{other}`")),
        ([one], None) if TRAIN.iter().any(|train| one.eq_ignore_ascii_case(train)) => {
            Some(format!("`{one}`"))
        }
        _ => None,
    };
    match divided {
        None => Ok(()),
        Some(parts) => Err(DataError::bad_file(
            root,
            format!(
                "its only folder with images, `{only}`, holds a divided set ({parts}) and would be one class: {give}"
            ),
        )),
    }
}

/// One part of a data set.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    pub(crate) format: DataFormat,
    /// Which files in `path`; `None`: all.
    pub(crate) split: Option<Split>,
}

/// The parts of the data set at `path` as [`open_split`] sees them, training first; one when nothing is divided.
pub(crate) fn parts(path: &Path, format: DataFormat) -> Result<Vec<Part>, DataError> {
    let part = |path: &Path| -> Result<Part, DataError> {
        let (path, format) = resolve(path, format)?;
        Ok(Part { path, format, split: None })
    };
    let train = match split_base(path)? {
        (base, Some(train)) if base == path => train,
        // `train` itself, whatever is beside it.
        (_, Some(train)) => return Ok(vec![part(&train)?]),
        (_, None) => {
            let whole = part(path)?;
            let here = [Split::Train, Split::Eval].into_iter().filter(|&split| match whole.format {
                DataFormat::Cifar => cifar::has(&whole.path, split),
                DataFormat::Idx => idx::has(&whole.path, split),
                _ => false,
            });
            let by_name: Vec<_> = here.map(|split| Part { split: Some(split), ..whole.clone() }).collect();
            return Ok(if by_name.is_empty() { vec![whole] } else { by_name });
        }
    };
    std::iter::once(train).chain(held_out(path)?).map(|folder| part(&folder)).collect()
}

/// The path that really holds the files, and their format.
pub(crate) fn resolve(path: &Path, format: DataFormat) -> Result<(PathBuf, DataFormat), DataError> {
    match fs::metadata(path) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::Missing { key: "data.path".to_owned(), path: path.to_owned() });
        }
        Err(e) => return Err(DataError::io("open", path, &e)),
    }
    if path.is_file() {
        let format = if format == DataFormat::Auto { DataFormat::Tar } else { format };
        if format == DataFormat::Tar {
            tar::refuse_other(path)?;
        }
        return Ok((path.to_owned(), format));
    }
    // The folders these sets unpack to.
    let nested = ["", "cifar-10-batches-bin", "cifar-100-binary", "raw", "MNIST/raw", "FashionMNIST/raw"];
    for dir in nested.map(|sub| if sub.is_empty() { path.to_owned() } else { path.join(sub) }) {
        let found = match format {
            DataFormat::Auto if tar::is_here(&dir) => {
                refuse_mixed(&dir)?;
                DataFormat::Tar
            }
            DataFormat::Auto | DataFormat::Cifar if cifar::is_here(&dir) => DataFormat::Cifar,
            DataFormat::Auto | DataFormat::Idx if idx::is_here(&dir) => DataFormat::Idx,
            _ => continue,
        };
        return Ok((dir, found));
    }
    Ok((path.to_owned(), if format == DataFormat::Auto { DataFormat::Folder } else { format }))
}

/// Refuses tar files that lie beside images: which of them are the data set cannot be told by looking.
fn refuse_mixed(dir: &Path) -> Result<(), DataError> {
    let Some(tar) = tar::one_without_index(dir) else { return Ok(()) };
    let Some(image) = folder::an_image(dir, 0) else { return Ok(()) };
    let name = |path: &Path| path.strip_prefix(dir).unwrap_or(path).display().to_string();
    Err(DataError::bad_file(
        dir,
        format!(
            "tar files (`{}`) beside images (`{}`): say which are meant with data.format (--format of a command), \
             \"tar\" or \"folder\", or move the others away",
            name(&tar),
            name(&image)
        ),
    ))
}

pub(crate) fn open_as(
    path: &Path,
    format: DataFormat,
    split: Option<Split>,
) -> Result<Arc<dyn Source>, DataError> {
    Ok(match format {
        DataFormat::Tar => Arc::new(tar::TarShards::open(path)?),
        DataFormat::Cifar => Arc::new(cifar::Cifar::open(path, split)?),
        DataFormat::Idx => Arc::new(idx::Idx::open(path, split)?),
        DataFormat::Folder | DataFormat::Auto => Arc::new(folder::ImageFolder::open(path)?),
    })
}

/// Names of the entries of a folder, sorted by bytes.
pub(crate) fn sorted_entries(dir: &Path) -> Result<Vec<fs::DirEntry>, DataError> {
    let mut entries = fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| DataError::io("list", dir, &e))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// How the names of images end that can be decoded.
pub(crate) const IMAGE_NAMES: [&str; 5] = ["jpg", "jpeg", "png", "webp", "ppm"];

/// Whether a file name ends like an image that can be decoded.
pub(crate) fn is_image_name(extension: &str) -> bool {
    IMAGE_NAMES.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Texts one after the other in one buffer: 8 bytes of overhead each.
#[derive(Debug, Default)]
pub(crate) struct Names {
    text: String,
    ends: Vec<u64>,
}

impl Names {
    pub(crate) fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(self.text.len() as u64);
    }

    pub(crate) fn get(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.text[start as usize..self.ends[index] as usize]
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}
