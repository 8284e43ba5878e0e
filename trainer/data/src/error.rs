//! What can be wrong with data, each with the place and the remedy.

use mentee_config::{counted, exit_code};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Bad or missing data. One line: what, where (file and key), what to do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DataError {
    /// The path does not exist.
    #[error(
        "{key}: no such folder `{}`: give a folder of tar shards, a folder of images, or one with CIFAR binary or \
         IDX files",
        shown(path)
    )]
    Missing {
        /// The recipe key (or argument) that named the path.
        key: String,
        /// What was looked for.
        path: PathBuf,
    },
    /// The path exists but holds nothing of the wanted format.
    #[error("no image found in `{}`{seen}: looked for {looked_for}", shown(path))]
    NoImages {
        /// Where.
        path: PathBuf,
        /// What is there instead: empty, or ", but 3 .tif".
        seen: String,
        /// What would have been accepted.
        looked_for: String,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`: {reason}", shown(path))]
    Io {
        /// "open", "read", "write", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Whether another try may find all as it should be.
        passing: bool,
        /// The system's words.
        reason: String,
    },
    /// A container (tar, index, CIFAR or IDX file) is not what its format says.
    #[error("`{}`: {reason}", shown(path))]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it, and the remedy where there is one.
        reason: String,
    },
    /// One sample cannot be read or decoded.
    #[error("bad sample {sample}: {reason}{}", remedy(reason))]
    BadSample {
        /// Shard and key, or the file's path.
        sample: String,
        /// Why.
        reason: String,
    },
    /// More samples are damaged than the recipe passes over.
    #[error(
        "{}, data.max_skipped is {budget}; the last: {last}: repair the data (`mentee data verify` finds all such) or raise \
         data.max_skipped", counted(*found, "damaged sample")
    )]
    TooManyBad {
        /// Different ones that were met.
        found: u64,
        /// How many are passed over.
        budget: u64,
        /// The one that was too many: its place and what is wrong.
        last: String,
    },
    /// Nothing is left of the images to evaluate with.
    #[error(
        "all {found} images {of} are damaged; the last: {last}: repair the data (`mentee data verify` finds all such)"
    )]
    AllBad {
        /// Which images: "of the bank", "to classify".
        of: &'static str,
        /// How many there are.
        found: u64,
        /// One of them: its place and what is wrong.
        last: String,
    },
    /// A label was needed and the sample has none.
    #[error(
        "sample {sample} has no label: evaluation needs labelled images (class folders, .cls entries or a file of labels)"
    )]
    NoLabel {
        /// Shard and key, or the file's path.
        sample: String,
    },
    /// A bank and images to classify cannot be had of so few.
    #[error(
        "one labelled image is too few to evaluate with: at least one for the bank and one to classify are needed"
    )]
    TooFew,
    /// A held-out sample is of a class that no training image can be of.
    #[error(
        "sample {sample} is of class `{class}`, which the training images do not have: name the classes of both alike, \
         or leave its images out"
    )]
    UnknownClass {
        /// Shard and key, or the file's path.
        sample: String,
        /// The class's name.
        class: String,
    },
    /// The output of a writer would overwrite something.
    #[error("`{}` already exists and is not empty: choose another folder or remove it", shown(path))]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// Another writer is at work on the same output.
    #[error(
        "`{}`: another writer is at work in it: wait for it, stop it, or choose another folder",
        shown(path)
    )]
    InUse {
        /// Where it writes.
        path: PathBuf,
    },
    /// What is written could not be moved to its place.
    #[error(
        "cannot move the shards from `{}` to `{}`: {reason}: they stay there; clear the way, then the same command goes \
         on from them",
        shown(from),
        shown(to)
    )]
    Unmoved {
        /// Where they are.
        from: PathBuf,
        /// Where they should be.
        to: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// A bug: making a view panicked.
    #[error(
        "making the views of sample {sample} in epoch {epoch} panicked (the message is above): please report it"
    )]
    Panicked {
        /// The epoch.
        epoch: u64,
        /// The sample's index in its source.
        sample: u64,
    },
    /// A thread that reads and decodes could not be started. Nothing is wrong with the data.
    #[error(
        "cannot start decode thread {thread}: {reason}: allow more processes (`ulimit -u`, pids.max) or ask for fewer threads"
    )]
    Thread {
        /// Which of them.
        thread: usize,
        /// The system's words.
        reason: String,
    },
}

/// A path in one line of a message, so that it can be found by what is said of it: bytes that are no UTF-8, and line
/// feeds and their kin, are escaped as `$'…'` of a shell takes them.
pub(crate) fn shown(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for letter in chunk.valid().chars() {
            match letter {
                '\n' | '\r' | '\t' => text.extend(letter.escape_default()),
                _ if letter.is_ascii_control() => text.push_str(&format!("\\x{:02x}", u32::from(letter))),
                _ => text.push(letter),
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// What to do about a damaged sample, where the reason does not say it: what is intact is to be made anew, not repaired, and what
/// was wanted of it (`--bands`) nothing else knows of.
fn remedy(reason: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|words| reason.contains(words));
    match () {
        () if says(&["(--bands)"]) => "",
        () if says(&["altered since "]) => {
            ": copy or write the shard again (`mentee data verify` finds all such)"
        }
        () if says(&["is not read: ", "megapixels: "]) => " (`mentee data verify` finds all such)",
        () => ": repair or remove it (`mentee data verify` finds all such)",
    }
}

impl DataError {
    /// Whether the system refused for a reason of its own: nothing is known of the data.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Thread { .. } | Self::Io { passing: true, .. })
    }

    /// How a program ends that cannot go on.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            passing if passing.is_passing() => exit_code::FAILED,
            Self::OutputExists { .. } => exit_code::USAGE,
            _ => exit_code::DATA,
        }
    }

    /// Names the recipe key or argument a missing path came from (`data.path` unless told).
    #[must_use]
    pub fn with_key(self, name: &str) -> Self {
        match self {
            Self::Missing { path, .. } => Self::Missing { key: name.to_owned(), path },
            other => other,
        }
    }

    /// Place and reason alone, for a list of what was passed over.
    pub(crate) fn brief(&self) -> String {
        match self {
            Self::BadSample { sample, reason } => format!("{sample}: {reason}"),
            other => other.to_string(),
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, error: &std::io::Error) -> Self {
        let passing = mentee_config::is_passing(error);
        Self::Io { action, path: path.to_owned(), passing, reason: error.to_string() }
    }

    pub(crate) fn bad_file(path: &Path, reason: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_owned(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_threads_is_no_damage() {
        let thread = DataError::Thread { thread: 3, reason: "Resource temporarily unavailable".to_owned() };
        assert_eq!(thread.exit_code(), exit_code::FAILED);
        assert_eq!(DataError::TooFew.exit_code(), exit_code::DATA);
        let said = "cannot start decode thread 3: Resource temporarily unavailable: allow more processes";
        assert!(thread.to_string().starts_with(said), "{thread}");
    }

    #[test]
    fn a_server_that_does_not_answer_is_no_damage() {
        let code = |errno| {
            DataError::io("read", Path::new("a.tar"), &std::io::Error::from_raw_os_error(errno)).exit_code()
        };
        assert_eq!([libc::ENOENT, libc::ESTALE].map(code), [exit_code::DATA, exit_code::FAILED]);
    }

    #[test]
    fn one_is_one() {
        let said =
            [(0, "image"), (1, "image"), (2, "image"), (1, "class"), (3, "class"), (1, "class folder")]
                .map(|(number, what)| counted(number, what));
        assert_eq!(said, ["0 images", "1 image", "2 images", "1 class", "3 classes", "1 class folder"]);
        let many = |found| DataError::TooManyBad { found, budget: 0, last: "x".to_owned() }.to_string();
        assert!(
            many(1).starts_with("1 damaged sample, data.max_skipped is 0; the last: x: repair the data (")
        );
        assert!(many(2).starts_with("2 damaged samples, "));
    }
}
