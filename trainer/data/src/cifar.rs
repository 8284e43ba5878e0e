//! CIFAR in its binary form (<https://www.cs.toronto.edu/~kriz/cifar.html>, "Binary version").
//!
//! ```text
//! CIFAR-10   data_batch_1.bin … data_batch_5.bin, test_batch.bin   record: label, 3072 bytes
//! CIFAR-100  train.bin, test.bin                                   record: coarse label, fine label, 3072 bytes
//! ```
//! The 3072 bytes are the red, then the green, then the blue plane of 32 x 32, rows from top to bottom. CIFAR-100's
//! labels here are the fine ones. Class names come from `batches.meta.txt` or `fine_label_names.txt` when there.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::source::{Encoding, Source, Split};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

/// See the module.
#[derive(Debug)]
pub(crate) struct Cifar {
    files: Vec<Batch>,
    /// Label bytes before the pixels: 1 (CIFAR-10) or 2 (CIFAR-100, the second counts).
    label_bytes: usize,
    labels: Vec<u8>,
    classes: Vec<String>,
    digest: String,
}

#[derive(Debug)]
struct Batch {
    path: PathBuf,
    file: File,
    first: u64,
}

fn wanted(name: &str, split: Option<Split>) -> bool {
    let train = name == "train.bin"
        || name
            .strip_prefix("data_batch_")
            .and_then(|rest| rest.strip_suffix(".bin"))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    let test = name == "test_batch.bin" || name == "test.bin";
    match split {
        None => train || test,
        Some(Split::Train) => train,
        Some(Split::Eval) => test,
    }
}

/// Whether a folder holds CIFAR's binary files.
pub(crate) fn is_here(dir: &Path) -> bool {
    ["data_batch_1.bin", "test_batch.bin", "train.bin", "test.bin"]
        .iter()
        .any(|name| dir.join(name).is_file())
}

/// Whether a folder holds files of one split.
pub(crate) fn has(dir: &Path, split: Split) -> bool {
    let is_wanted =
        |entry: fs::DirEntry| entry.file_name().to_str().is_some_and(|name| wanted(name, Some(split)));
    fs::read_dir(dir).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(is_wanted)))
}

impl Cifar {
    /// Opens the files of one split, or (`None`) of both: training, then test.
    pub(crate) fn open(dir: &Path, split: Option<Split>) -> Result<Self, DataError> {
        let entries = crate::listing::sorted_entries(dir)?;
        let names: Vec<String> = entries
            .iter()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| wanted(name, split))
            .collect();
        if names.is_empty() {
            return Err(DataError::NoImages {
                path: dir.to_owned(),
                seen: String::new(),
                looked_for: match split {
                    Some(Split::Eval) => "test_batch.bin or test.bin",
                    _ => "data_batch_*.bin or train.bin",
                }
                .to_owned(),
            });
        }
        let hundred = names.iter().any(|name| name == "train.bin" || name == "test.bin");
        if hundred && names.iter().any(|name| name.contains("batch")) {
            return Err(DataError::bad_file(
                dir,
                "files of CIFAR-10 and of CIFAR-100 together: separate them",
            ));
        }
        let label_bytes = if hundred { 2 } else { 1 };
        let class_names = dir.join(if hundred { "fine_label_names.txt" } else { "batches.meta.txt" });
        let num_classes = if hundred { 100 } else { 10 };
        let mut classes: Vec<String> = fs::read_to_string(class_names)
            .map(|text| {
                text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
            })
            .unwrap_or_default();
        if classes.len() != num_classes {
            classes = (0..num_classes).map(|i| i.to_string()).collect();
        }

        let record = label_bytes + 3 * PLANE;
        let mut cifar =
            Self { files: Vec::new(), label_bytes, labels: Vec::new(), classes, digest: String::new() };
        let mut hasher = blake3::Hasher::new();
        for name in names {
            let path = dir.join(&name);
            // Labels are spread over the file, so all of it passes by; only they stay.
            let bytes = fs::read(&path).map_err(|e| DataError::io("read", &path, &e))?;
            if bytes.is_empty() || bytes.len() % record != 0 {
                return Err(DataError::bad_file(
                    &path,
                    format!(
                        "{} bytes is not a whole number of {record}-byte records: truncated?",
                        bytes.len()
                    ),
                ));
            }
            let file = File::open(&path).map_err(|e| DataError::io("open", &path, &e))?;
            let first = cifar.labels.len() as u64;
            for (i, record) in bytes.chunks_exact(record).enumerate() {
                let label = record[label_bytes - 1];
                if usize::from(label) >= num_classes {
                    return Err(DataError::bad_file(
                        &path,
                        format!(
                            "record {i} has label {label}, of {num_classes} classes: not CIFAR, or damaged"
                        ),
                    ));
                }
                cifar.labels.push(label);
            }
            hasher.update(name.as_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            cifar.files.push(Batch { path, file, first });
        }
        hasher.update(&cifar.labels);
        cifar.digest = hasher.finalize().to_hex().to_string();
        Ok(cifar)
    }

    fn locate(&self, index: u64) -> (&Batch, u64) {
        let batch = &self.files[self.files.partition_point(|batch| batch.first <= index) - 1];
        (batch, index - batch.first)
    }
}

impl Source for Cifar {
    fn len(&self) -> u64 {
        self.labels.len() as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        let (batch, record) = self.locate(index);
        let mut planes = [0u8; 3 * PLANE];
        let offset = record * (self.label_bytes + 3 * PLANE) as u64 + self.label_bytes as u64;
        batch.file.read_exact_at(&mut planes, offset).map_err(|e| DataError::io("read", &batch.path, &e))?;
        buffer.clear();
        buffer.extend((0..PLANE).flat_map(|i| [planes[i], planes[PLANE + i], planes[2 * PLANE + i]]));
        Ok(Encoding::Raw { width: SIDE as u32, height: SIDE as u32 })
    }

    fn label(&self, index: u64) -> Option<u32> {
        Some(u32::from(self.labels[index as usize]))
    }

    fn key(&self, index: u64) -> String {
        let (batch, record) = self.locate(index);
        format!("{}:{record}", batch.path.display())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn stored(&self) -> (u64, u64) {
        (self.len() * (self.label_bytes + 3 * PLANE) as u64, self.files.len() as u64)
    }
}
