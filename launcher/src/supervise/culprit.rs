//! Who failed, and which of several failures explains the others.

use mentee_cluster::Phase;
use mentee_config::exit_code::{CHECKPOINT, DATA, DIVERGED, USAGE};

/// Exit codes that another start cannot change.
pub(super) const FINAL: [i32; 4] = [USAGE, DATA, CHECKPOINT, DIVERGED];

/// How a rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Failing {
    /// By itself, with its own word.
    #[default]
    Own,
    /// Its process ended without a word.
    Vanished,
    /// It does not go on; it was ended for that.
    Stalled,
    /// Because another rank was gone or late: it is no cause itself.
    Follows,
}

/// Who failed, where, and how.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Culprit {
    /// The rank, when known.
    pub rank: Option<u32>,
    /// Its machine.
    pub host: Option<String>,
    /// Steps it had completed.
    pub step: Option<u64>,
    /// What it was doing.
    pub phase: Option<Phase>,
    /// In words, one line.
    pub cause: String,
    /// The exit code it announced.
    pub exit_code: Option<i32>,
    /// How it failed.
    pub kind: Failing,
}

impl Culprit {
    /// How much it explains. A failure that follows from another rank's gives way to that, and everything to one
    /// that names the code the run is to end with: whatever the order in which they are heard, since a rank's last
    /// word may overtake the end of another's connection.
    pub(super) fn weight(&self) -> u8 {
        match self.exit_code {
            _ if self.kind == Failing::Follows => 0,
            Some(code) if FINAL.contains(&code) => 2,
            _ => 1,
        }
    }
}

impl std::fmt::Display for Culprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank}")?,
            None => f.write_str("the workers")?,
        }
        if let Some(host) = &self.host {
            write!(f, " on {host}")?;
        }
        if let Some(step) = self.step {
            write!(f, " at step {step}")?;
        }
        if let Some(phase) = self.phase {
            write!(f, " ({phase})")?;
        }
        write!(f, ": {}", self.cause)
    }
}
