//! A folder of images: `ROOT/class/…/image.jpg`, or images without classes.
//!
//! Labels are the sub-folders of the root, sorted by name (torchvision's `ImageFolder`). A root that holds images of
//! its own, and no sub-folder with any, is unlabelled. Within a class files are taken in the order of their paths.
//! Names that start with a dot, `__MACOSX` and `lost+found` are passed over, and run directories, whose example views are no images of
//! the set; names that end otherwise than images do too, but counted.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mentee_config::counted;

use crate::decode::{FORMATS, is_image_name};
use crate::error::{DataError, shown};
use crate::listing::{Names, sorted_entries};
use crate::passed_over::{PassedOver, extension, image_patterns};
use crate::source::{Encoding, Source};

/// Folders within folders that are followed; a link that leads back to its parent ends here.
const MAX_DEPTH: usize = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct ImageFolder {
    root: PathBuf,
    /// Paths relative to the root, in sample order.
    files: Names,
    /// First sample of each class and, last, their number; empty when unlabelled.
    starts: Vec<u64>,
    classes: Vec<String>,
    bytes: u64,
    digest: String,
    passed: PassedOver,
}

impl ImageFolder {
    pub(crate) fn open(root: &Path) -> Result<Self, DataError> {
        if !root.is_dir() {
            return Err(DataError::bad_file(
                root,
                "not a folder: an image folder was asked for (data.format)",
            ));
        }
        let mut found = Found::default();
        let mut classes = Vec::new();
        let mut starts = Vec::new();
        let mut own = Vec::new();
        for entry in sorted_entries(root)? {
            let name = entry.file_name();
            if is_foreign(&name.to_string_lossy()) {
                continue;
            }
            let Some(about) = about(&entry.path())? else { continue };
            let name = utf8_name(&entry, &about)?;
            if about.is_dir() {
                if is_run(&entry.path()) {
                    continue;
                }
                let before = found.files.len();
                found.walk(&entry.path(), &name, 1)?;
                if found.files.len() > before {
                    classes.push(name);
                    starts.push(before as u64);
                }
            } else if is_image(&name) {
                own.push((name, entry.path(), about));
            } else {
                found.pass(&name, &about);
            }
        }
        if classes.is_empty() {
            for (name, path, about) in own {
                found.add(&name, &path, &about)?;
            }
        } else if !own.is_empty() {
            return Err(DataError::bad_file(
                root,
                format!(
                    "{} beside {}: move them into a class folder or away",
                    counted(own.len() as u64, "image"),
                    counted(classes.len() as u64, "class folder")
                ),
            ));
        } else {
            starts.push(found.files.len() as u64);
        }
        if found.files.len() == 0 {
            return Err(DataError::NoImages {
                path: root.to_owned(),
                seen: found.passed.list().map_or(String::new(), |list| format!(", but {list}")),
                looked_for: format!(
                    "tar shards (*.tar), CIFAR binary (data_batch_1.bin), IDX (train-images-idx3-ubyte), images ({}) in \
                     class folders or at the top{}",
                    image_patterns(),
                    found.passed.advice()
                ),
            });
        }
        let digest = found.hasher.finalize().to_hex().to_string();
        Ok(Self {
            root: root.to_owned(),
            files: found.files,
            starts,
            classes,
            bytes: found.bytes,
            digest,
            passed: found.passed,
        })
    }

    fn path(&self, index: u64) -> PathBuf {
        self.root.join(self.files.get(index as usize))
    }
}

#[derive(Default)]
struct Found {
    files: Names,
    bytes: u64,
    hasher: blake3::Hasher,
    passed: PassedOver,
}

impl Found {
    fn walk(&mut self, dir: &Path, relative: &str, depth: usize) -> Result<(), DataError> {
        if depth > MAX_DEPTH {
            return Err(DataError::bad_file(
                dir,
                format!("more than {MAX_DEPTH} folders deep: is a link circular?"),
            ));
        }
        for entry in sorted_entries(dir)? {
            let name = entry.file_name();
            if is_foreign(&name.to_string_lossy()) {
                continue;
            }
            let Some(about) = about(&entry.path())? else { continue };
            let name = utf8_name(&entry, &about)?;
            let below = format!("{relative}/{name}");
            if about.is_dir() {
                if !is_run(&entry.path()) {
                    self.walk(&entry.path(), &below, depth + 1)?;
                }
            } else if is_image(&name) {
                self.add(&below, &entry.path(), &about)?;
            } else {
                self.pass(&name, &about);
            }
        }
        Ok(())
    }

    fn pass(&mut self, name: &str, about: &fs::Metadata) {
        if about.is_file() {
            self.passed.note(name);
        }
    }

    fn add(&mut self, relative: &str, path: &Path, about: &fs::Metadata) -> Result<(), DataError> {
        if let Some(what) = special(about.file_type()) {
            return Err(DataError::bad_file(
                path,
                format!("{what}, named like an image: remove it or give it another name"),
            ));
        }
        let size = about.len();
        self.files.push(relative);
        self.bytes += size;
        self.hasher.update(&(relative.len() as u64).to_le_bytes());
        self.hasher.update(relative.as_bytes());
        self.hasher.update(&size.to_le_bytes());
        Ok(())
    }
}

/// What an entry is, links followed; none for a link that leads nowhere and is named as a file of another kind. What may have been
/// an image or a class is never passed over.
pub(crate) fn about(path: &Path) -> Result<Option<fs::Metadata>, DataError> {
    let error = match fs::metadata(path) {
        Ok(about) => return Ok(Some(about)),
        Err(error) => error,
    };
    let refused = DataError::io("read", path, &error);
    if refused.is_passing() {
        return Err(refused);
    }
    let Ok(target) = fs::read_link(path) else { return Err(refused) };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !extension(&name).is_empty() && !is_image(&name) {
        return Ok(None);
    }
    Err(DataError::bad_file(
        path,
        format!(
            "a link to `{}`, which cannot be read ({error}): restore what it leads to, or remove the link",
            target.display()
        ),
    ))
}

/// What is neither a file nor a folder; to read such a thing could wait for ever.
fn special(kind: fs::FileType) -> Option<&'static str> {
    match () {
        () if kind.is_fifo() => Some("a named pipe"),
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_block_device() || kind.is_char_device() => Some("a device"),
        () => None,
    }
}

/// An entry's name, which must be UTF-8 for a folder or an image; of any other file it only says what kind that is.
fn utf8_name(entry: &fs::DirEntry, about: &fs::Metadata) -> Result<String, DataError> {
    entry.file_name().into_string().or_else(|name| {
        let name = name.to_string_lossy().into_owned();
        if about.is_dir() || is_image(&name) {
            return Err(DataError::bad_file(&entry.path(), "the name is not UTF-8: rename it"));
        }
        Ok(name)
    })
}

fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| is_image_name(extension))
}

/// What archives, file systems and programs leave beside images.
pub(crate) fn is_foreign(name: &str) -> bool {
    name.starts_with('.') || ["__MACOSX", "lost+found"].contains(&name)
}

/// Whether a folder is that of a run of ours.
fn is_run(dir: &Path) -> bool {
    dir.join("plan.toml").is_file()
}

/// One of the images that [`ImageFolder`] would find in `dir`, which lies `depth` folders down; what cannot be listed
/// holds none.
pub(crate) fn an_image(dir: &Path, depth: usize) -> Option<PathBuf> {
    let entries = sorted_entries(dir).ok().filter(|_| depth <= MAX_DEPTH && !is_run(dir))?;
    let named: Vec<_> = entries
        .iter()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .filter(|(name, _)| !is_foreign(name))
        .collect();
    // The first image ends the search: of a million in one folder no more is asked.
    let here = named.iter().find(|(name, path)| is_image(name) && !path.is_dir());
    here.map(|(_, path)| path.clone()).or_else(|| {
        named.iter().filter(|(_, path)| path.is_dir()).find_map(|(_, path)| an_image(path, depth + 1))
    })
}

/// What [`folders_with_images`] found.
#[derive(Debug, Default)]
pub(crate) struct Within {
    /// Names of the folders that hold images, sorted.
    pub(crate) folders: Vec<String>,
    /// There are images beside them.
    pub(crate) own: bool,
}

/// The folders in `dir`, itself a folder of the root, that hold images; none where it cannot be listed.
pub(crate) fn folders_with_images(dir: &Path) -> Within {
    let mut within = Within::default();
    for entry in sorted_entries(dir).unwrap_or_default() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_foreign(&name) {
            continue;
        }
        // Of files, of which there may be a million, the listing says that they are no folders.
        if entry.file_type().is_ok_and(|kind| kind.is_file()) || !entry.path().is_dir() {
            within.own |= is_image(&name);
        } else if an_image(&entry.path(), 2).is_some() {
            within.folders.push(name);
        }
    }
    within
}

impl Source for ImageFolder {
    fn len(&self) -> u64 {
        self.files.len() as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        let path = self.path(index);
        buffer.clear();
        fs::File::open(&path)
            .and_then(|mut file| file.read_to_end(buffer))
            .map_err(|e| DataError::io("read", &path, &e))?;
        Ok(Encoding::File)
    }

    fn label(&self, index: u64) -> Option<u32> {
        (!self.classes.is_empty()).then(|| self.starts.partition_point(|&start| start <= index) as u32 - 1)
    }

    fn key(&self, index: u64) -> String {
        shown(&self.path(index))
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn names_classes(&self) -> bool {
        !self.classes.is_empty()
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }

    fn stored(&self) -> (u64, u64) {
        (self.bytes, self.len())
    }

    fn passed_over(&self) -> Option<String> {
        let list = self.passed.list()?;
        Some(format!("passed over in {}: {list} (read are {FORMATS})", shown(&self.root)))
    }
}
