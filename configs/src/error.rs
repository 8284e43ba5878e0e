//! Everything that can be wrong with a recipe. One line each: the key, where it stands, what would be right.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::{exit_code, is_passing};

/// A recipe that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Neither a file nor a built-in recipe.
    #[error("no recipe `{name}`: {hint}")]
    NotFound {
        /// What was asked for.
        name: String,
        /// The nearest built-in recipe, or all of them; of a folder, what to give instead.
        hint: String,
    },
    /// The file is there but cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The recipe or plan.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// Where reading stopped.
        place: Place,
        /// What the TOML reader says.
        message: String,
    },
    /// A key or a section that no recipe has.
    #[error("unknown {what} in {place}: {hint}")]
    Unknown {
        /// "key `section.key`" or "section `[section]`".
        what: String,
        /// Where it is written.
        place: Place,
        /// The nearest known one.
        hint: String,
    },
    /// A value of the wrong type, or not one of the words a key knows.
    #[error("`{key}` in {place}: expected {expected}, found {found}")]
    Type {
        /// The key as `section.key`.
        key: String,
        /// Where it is written.
        place: Place,
        /// The type, or the words allowed.
        expected: String,
        /// What stands there, and the nearest allowed word if there is one.
        found: String,
    },
    /// A key without a default is not given.
    #[error("missing key `{key}` in {place}: {hint}")]
    Missing {
        /// The key as `section.key`.
        key: String,
        /// The file that lacks it.
        place: Place,
        /// What it is for.
        hint: String,
    },
    /// A value outside its range.
    #[error("`{key}` = {value} in {place}: must be {allowed}")]
    Range {
        /// The key as `section.key`.
        key: String,
        /// The value, as TOML writes it.
        value: String,
        /// Where it is written.
        place: Place,
        /// The range.
        allowed: String,
    },
    /// A value that another one forbids.
    #[error("`{key}` = {value} in {place}: {why}")]
    Conflict {
        /// The key to change, as `section.key`.
        key: String,
        /// Its value.
        value: String,
        /// Where it is written.
        place: Place,
        /// The other key and value, and what to do.
        why: String,
    },
    /// A `--set` that is not `section.key=value`.
    #[error("--set {}: expected section.key=value, such as --set optimizer.base_lr=0.3", printable(argument))]
    Set {
        /// The argument as given.
        argument: String,
    },
    /// The recipe does not fit this data set or this world.
    #[error("`{key}` = {value}: {why}")]
    Plan {
        /// The key to change, as `section.key`.
        key: &'static str,
        /// Its value.
        value: u64,
        /// What it disagrees with, and what to do.
        why: String,
    },
    /// The table of keys and the Rust types disagree: a mistake in this crate, excluded by its tests.
    #[error("the recipe's keys and types disagree (a bug in mentee): {0}")]
    Schema(String),
}

impl ConfigError {
    /// How a program ends that cannot go on.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Read { source, .. } if is_passing(source) => exit_code::FAILED,
            _ => exit_code::USAGE,
        }
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1; `None` = the file as a whole.
    File {
        /// As the user gave it; a built-in recipe is `built-in NAME.toml`.
        path: PathBuf,
        /// Counted from 1.
        line: Option<usize>,
    },
    /// A `--set` argument.
    Set(String),
    /// A default of mentee's own.
    Default,
    /// A [`Recipe`](crate::Recipe) changed or made in Rust.
    Recipe,
}

impl Place {
    /// The file as a whole.
    pub(crate) fn file(path: &Path) -> Place {
        Place::File { path: path.to_owned(), line: None }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line: Some(line) } => write!(out, "{} (line {line})", path.display()),
            Place::File { path, line: None } => write!(out, "{}", path.display()),
            Place::Set(argument) => write!(out, "--set {}", printable(argument)),
            Place::Default => write!(out, "the defaults"),
            Place::Recipe => write!(out, "the recipe"),
        }
    }
}

/// Control characters escaped, so that an error stays one line whatever it quotes.
pub(crate) fn printable(text: &str) -> String {
    text.chars().fold(String::new(), |mut line, c| {
        if c.is_control() {
            line.extend(c.escape_default())
        } else {
            line.push(c)
        }
        line
    })
}
