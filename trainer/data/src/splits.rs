//! Folders that are parts of one data set: what is trained on, and what is held out.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{DataError, shown};
use crate::folder;

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
pub(crate) fn held_out(base: &Path) -> Result<Vec<PathBuf>, DataError> {
    folders_named(base, &HELD_OUT)
}

/// The folders of `base` that have one of these names in upper or lower case, in the order of the names, as it is written here
/// first. A link that leads nowhere is an error: without it the set would be another.
fn folders_named(base: &Path, names: &[&str]) -> Result<Vec<PathBuf>, DataError> {
    let listed = if base.as_os_str().is_empty() { Path::new(".") } else { base };
    let there: Vec<String> = match fs::read_dir(listed).and_then(Iterator::collect::<Result<Vec<_>, _>>) {
        Ok(entries) => entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect(),
        Err(error) if mentee_config::is_passing(&error) => return Err(DataError::io("list", base, &error)),
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
pub(crate) fn split_base(path: &Path) -> Result<(PathBuf, Option<PathBuf>), DataError> {
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
