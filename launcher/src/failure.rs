//! How a command fails: one line (what, where, what to do) and the exit code that scripts rely on.

use mentee_config::{ConfigError, complain, exit_code};
use mentee_data::DataError;

/// A command's failure.
#[derive(Debug, thiserror::Error)]
#[error("{line}")]
pub struct Failure {
    /// See [`mentee_config::exit_code`].
    pub exit_code: i32,
    /// One line; empty when everything has been said already.
    pub line: String,
}

impl Failure {
    /// Bad command line or recipe.
    pub fn usage(line: impl Into<String>) -> Failure {
        Failure { exit_code: exit_code::USAGE, line: line.into() }
    }

    /// What no other code names.
    pub fn failed(line: impl Into<String>) -> Failure {
        Failure { exit_code: exit_code::FAILED, line: line.into() }
    }

    /// The system refused something.
    pub fn io(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Failure {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let remedy = match folder.filter(|_| error.kind() == std::io::ErrorKind::NotFound) {
            Some(folder) => format!(": make {} first", folder.display()),
            None => String::new(),
        };
        Failure::failed(format!("cannot {doing} {}: {error}{remedy}", path.display()))
    }
}

/// What the argument parser has to say: help, or one line about a bad command line. Returns the exit code.
pub fn parser_said(error: &clap::Error) -> i32 {
    match mentee_config::usage::one_line(&error.to_string()) {
        Some(line) => complain!("{line}"),
        None => match error.print() {
            Err(lost) if !error.use_stderr() && lost.kind() != std::io::ErrorKind::BrokenPipe => {
                return exit_code::FAILED;
            }
            _ => {} // nothing to do about a closed terminal
        },
    }
    if error.use_stderr() { exit_code::USAGE } else { exit_code::DONE }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure { exit_code: error.exit_code(), line: error.to_string() }
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Failure {
        Failure { exit_code: error.exit_code(), line: error.to_string() }
    }
}

impl From<mentee_checkpoint::CheckpointError> for Failure {
    fn from(error: mentee_checkpoint::CheckpointError) -> Failure {
        let exit_code = if error.is_passing() { exit_code::FAILED } else { exit_code::CHECKPOINT };
        Failure { exit_code, line: error.to_string() }
    }
}
