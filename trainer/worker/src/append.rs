//! Files that grow while training goes on, on a disk that may be full at the moment, as it may be while a checkpoint is
//! being written.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::error::WorkerError;

/// What is kept until there is room again; more is an error.
const MAX_PENDING_BYTES: usize = 1 << 20;

/// A file that is only added to.
#[derive(Debug)]
pub struct Appended {
    file: File,
    /// There are file systems that count no links.
    had_links: bool,
    path: PathBuf,
    /// Not written yet.
    pending: Vec<u8>,
}

impl Appended {
    /// `file` is open for appending.
    pub fn new(file: File, path: PathBuf) -> Self {
        let had_links = file.metadata().is_ok_and(|file| file.nlink() > 0);
        Self { file, had_links, path, pending: Vec::new() }
    }

    /// An error when the file has been removed: what is written to it is lost then.
    pub fn check_is_there(&self) -> Result<(), WorkerError> {
        match self.file.metadata() {
            Ok(file) if file.nlink() == 0 && self.had_links => Err(WorkerError::Failed(format!(
                "{}: was removed while the run went on: start it again in a directory that stays",
                self.path.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Writes at once, or with what comes later if there is no room now.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WorkerError> {
        self.pending.extend(bytes);
        let mut written = 0;
        let result = loop {
            if written == self.pending.len() {
                break Ok(());
            }
            match self.file.write(&self.pending[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_no_room(&error) && self.pending.len() - written < MAX_PENDING_BYTES => {
                    break Ok(());
                }
                Err(error) => break Err(WorkerError::io("write", &*self.path)(error)),
            }
        };
        self.pending.drain(..written);
        result
    }

    /// Writes what there was no room for.
    pub fn finish(&mut self) -> Result<(), WorkerError> {
        self.write(b"")?;
        match self.pending.is_empty() {
            true => Ok(()),
            false => Err(WorkerError::io("write", &*self.path)(ErrorKind::StorageFull.into())),
        }
    }
}

fn is_no_room(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_file_that_was_removed_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = Appended::new(File::create(&path).unwrap(), path.clone());
        file.write(b"a line\n").unwrap();
        file.check_is_there().unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = file.check_is_there().unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl: was removed"), "{error}");
    }

    #[test]
    fn what_never_found_room_is_an_error_at_the_end() {
        let full = Path::new("/dev/full");
        let file = std::fs::OpenOptions::new().append(true).open(full).unwrap();
        let mut appended = Appended::new(file, full.to_owned());
        appended.write(b"the last line\n").unwrap();
        assert!(appended.finish().unwrap_err().to_string().contains("/dev/full"));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        appended.file = File::create(&path).unwrap();
        appended.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"the last line\n");
    }

    #[test]
    fn a_limit_of_any_kind_is_no_room() {
        for number in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            assert!(is_no_room(&std::io::Error::from_raw_os_error(number)), "{number}");
        }
        assert!(!is_no_room(&std::io::Error::from_raw_os_error(libc::EIO)));
    }
}
