//! From a path to its samples: which format lies there, and which part of a divided set is meant.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mentee_config::Recipe;
use mentee_config::recipe::DataFormat;

use crate::error::DataError;
use crate::source::{Source, Split};
use crate::splits::{held_out, refuse_parts_as_classes, split_base};
use crate::{cifar, folder, idx, tar};

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

/// The images that a run trains on.
///
/// # Errors
/// As [`open`], in the words of the recipe.
pub fn open_training(recipe: &Recipe) -> Result<Arc<dyn Source>, DataError> {
    let path = &recipe.data.path;
    open_split(path, recipe.data.format, Split::Train)?
        .ok_or_else(|| DataError::Missing { key: "data.path".to_owned(), path: path.clone() })
}

/// The images that a run classifies: those at `eval.path`, else the held-out part of `data.path`; `None` when that has none.
///
/// # Errors
/// As [`open_training`].
pub fn open_held_out(recipe: &Recipe) -> Result<Option<Arc<dyn Source>>, DataError> {
    let (path, format) = (&recipe.eval.path, recipe.data.format);
    if path.as_os_str().is_empty() {
        return open_split(&recipe.data.path, format, Split::Eval);
    }
    let source = match open_split(path, format, Split::Eval) {
        Ok(None) => open(path, format).map(Some),
        source => source,
    };
    source.map_err(|error| error.with_key("eval.path"))
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
        DataFormat::Folder | DataFormat::Auto => {
            let images = folder::ImageFolder::open(path)?;
            refuse_parts_as_classes(path, images.classes())?;
            Arc::new(images)
        }
    })
}
