//! Folders and the names in them.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::error::DataError;

/// Names of the entries of a folder, sorted by bytes.
pub(crate) fn sorted_entries(dir: &Path) -> Result<Vec<fs::DirEntry>, DataError> {
    let mut entries = fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| DataError::io("list", dir, &e))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Whether there is a file at `path`. A link that leads nowhere is an error: without it the set would be another.
pub(crate) fn is_file(path: &Path) -> Result<bool, DataError> {
    match fs::metadata(path) {
        Ok(about) => Ok(about.is_file()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => Ok(false),
        Err(error) => Err(DataError::io("read", path, &error)),
    }
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
