//! IDX, the format of MNIST and Fashion-MNIST (<http://yann.lecun.com/exdb/mnist/>), gzipped or not.
//!
//! ```text
//! images  00 00 08 03, count, rows, columns (big-endian u32), count · rows · columns bytes of gray
//! labels  00 00 08 01, count,                                 count bytes
//! ```
//! Names: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, `t10k-…` for the test part; a dot instead of the
//! last dash, and `.gz`, are accepted. Gray becomes RGB by repetition. The whole set is held in memory: it is small
//! by nature (MNIST: 47 MB).

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::source::{Encoding, Source, Split};

/// The largest file that is read, bytes after decompression: a bound against gzip bombs.
const MAX_BYTES: u64 = 4 << 30;

/// See the module.
#[derive(Debug)]
pub(crate) struct Idx {
    path: PathBuf,
    gray: Vec<u8>,
    labels: Vec<u8>,
    rows: u32,
    columns: u32,
    classes: Vec<String>,
    digest: String,
}

fn find(dir: &Path, part: &str, what: &str) -> Option<PathBuf> {
    let dimensions = if what == "images" { 3 } else { 1 };
    ["-", "."]
        .iter()
        .flat_map(|dash| ["", ".gz"].map(|gz| format!("{part}-{what}{dash}idx{dimensions}-ubyte{gz}")))
        .map(|name| dir.join(name))
        .find(|path| path.is_file())
}

/// Whether a folder holds MNIST-like files.
pub(crate) fn is_here(dir: &Path) -> bool {
    has(dir, Split::Train) || has(dir, Split::Eval)
}

/// Whether a folder holds images of one split.
pub(crate) fn has(dir: &Path, split: Split) -> bool {
    find(dir, part_name(split), "images").is_some()
}

fn part_name(split: Split) -> &'static str {
    match split {
        Split::Train => "train",
        Split::Eval => "t10k",
    }
}

impl Idx {
    /// Opens one split, or (`None`) whichever is there, training first.
    pub(crate) fn open(dir: &Path, split: Option<Split>) -> Result<Self, DataError> {
        let both = [Split::Train, Split::Eval];
        let parts: Vec<_> =
            both.into_iter().filter(|&each| split.is_none_or(|it| it == each)).map(part_name).collect();
        let found = parts.iter().find_map(|part| Some((part, find(dir, part, "images")?)));
        let Some((part, path)) = found else {
            return Err(DataError::NoImages {
                path: dir.to_owned(),
                seen: String::new(),
                looked_for: parts
                    .iter()
                    .map(|part| format!("{part}-images-idx3-ubyte[.gz]"))
                    .collect::<Vec<_>>()
                    .join(" or "),
            });
        };
        let (sizes, gray) = parse(&path, 3)?;
        let [count, rows, columns] = sizes[..] else {
            return Err(DataError::bad_file(&path, "not three dimensions: this is no IDX image file"));
        };
        if count == 0 || rows == 0 || columns == 0 {
            return Err(DataError::bad_file(
                &path,
                format!("{count} images of {rows} x {columns}: nothing to use"),
            ));
        }
        let labels = match find(dir, part, "labels") {
            None => Vec::new(),
            Some(path) => {
                let (sizes, labels) = parse(&path, 1)?;
                if sizes[0] != count {
                    return Err(DataError::bad_file(
                        &path,
                        format!("{} labels for {count} images: they are not of one set", sizes[0]),
                    ));
                }
                labels
            }
        };
        let num_classes = labels.iter().max().map_or(0, |&label| usize::from(label) + 1);
        let mut hasher = blake3::Hasher::new();
        for size in sizes {
            hasher.update(&size.to_le_bytes());
        }
        hasher.update(&labels);
        Ok(Self {
            path,
            gray,
            labels,
            rows,
            columns,
            classes: (0..num_classes).map(|i| i.to_string()).collect(),
            digest: hasher.finalize().to_hex().to_string(),
        })
    }

    fn image_bytes(&self) -> usize {
        self.rows as usize * self.columns as usize
    }
}

/// The dimensions of an IDX file of unsigned bytes, and its data.
fn parse(path: &Path, dimensions: u8) -> Result<(Vec<u32>, Vec<u8>), DataError> {
    let mut file = File::open(path).map_err(|e| DataError::io("open", path, &e))?;
    let mut bytes = Vec::new();
    let read = if path.extension().is_some_and(|e| e == "gz") {
        flate2::read::MultiGzDecoder::new(file).take(MAX_BYTES + 1).read_to_end(&mut bytes)
    } else {
        file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut bytes)
    };
    read.map_err(|e| DataError::io("read", path, &e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(DataError::bad_file(
            path,
            format!("more than {MAX_BYTES} bytes: too large for an IDX set"),
        ));
    }
    let header = 4 + 4 * usize::from(dimensions);
    if bytes.len() < header || bytes[..4] != [0, 0, 8, dimensions] {
        return Err(DataError::bad_file(
            path,
            format!("does not start with 00 00 08 {dimensions:02x}: not an IDX file of bytes, or truncated"),
        ));
    }
    let sizes: Vec<u32> =
        bytes[4..header].chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]])).collect();
    let wanted = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(u64::from(size)));
    let found = (bytes.len() - header) as u64;
    if wanted != Some(found) {
        let shape = sizes.iter().map(u32::to_string).collect::<Vec<_>>().join(" x ");
        return Err(DataError::bad_file(path, format!("{found} bytes of data for {shape}: truncated?")));
    }
    bytes.drain(..header);
    Ok((sizes, bytes))
}

impl Source for Idx {
    fn len(&self) -> u64 {
        (self.gray.len() / self.image_bytes()) as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        let start = index as usize * self.image_bytes();
        buffer.clear();
        buffer.extend(self.gray[start..start + self.image_bytes()].iter().flat_map(|&gray| [gray; 3]));
        Ok(Encoding::Raw { width: self.columns, height: self.rows })
    }

    fn label(&self, index: u64) -> Option<u32> {
        self.labels.get(index as usize).map(|&label| u32::from(label))
    }

    fn key(&self, index: u64) -> String {
        format!("{}:{index}", self.path.display())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn stored(&self) -> (u64, u64) {
        (self.gray.len() as u64, 1)
    }
}
