//! When a checkpoint is due, where it is made, and what it says of itself.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mentee_checkpoint::{
    self as checkpoint, CheckpointError, Committed, Counts, FileEntry, LocalDisk, Meta, Staging,
};
use mentee_config::Plan;

use crate::run_dir;

/// When a checkpoint is due, and what all checkpoints of a run have in common.
#[derive(Debug, Clone)]
pub struct Settings {
    pub folder: PathBuf,
    /// Steps between checkpoints; 0: not by steps.
    pub every_steps: u64,
    /// The same in epochs.
    pub every_epochs: u64,
    pub steps_per_epoch: u64,
    /// How many complete ones stay.
    pub keep: u64,
    /// How long rank 0 waits for the other ranks' shares.
    pub patience: Duration,
    /// How long the last checkpoint is tried again while the disk is full.
    pub wait_for_room: Duration,
    /// Names this start of the run: the same on all its ranks, and on those of no other start.
    pub attempt: String,
    /// Step, epoch and counts are those of the checkpoint.
    pub meta: Meta,
    /// Steps whose checkpoint is to find no room, once for each time that it stands here (see `faults.rs`).
    pub without_room: Vec<u64>,
}

impl Settings {
    /// Those of a plan.
    pub fn new(plan: &Plan, run_dir: &Path, world_size: u32, data_digest: &str, attempt: String) -> Self {
        let recipe = &plan.recipe;
        Self {
            folder: run_dir::checkpoints(run_dir),
            every_steps: recipe.checkpoint.every_steps,
            every_epochs: recipe.checkpoint.every_epochs,
            steps_per_epoch: plan.steps_per_epoch,
            keep: recipe.checkpoint.keep,
            patience: Duration::from_secs_f64(recipe.parallel.timeout_s),
            wait_for_room: Duration::from_secs_f64(recipe.checkpoint.wait_for_room_s),
            attempt,
            without_room: Vec::new(),
            meta: Meta {
                step: 0,
                epoch: 0,
                world_size,
                plan_hash: recipe.hash(),
                plan_toml: recipe.to_toml(),
                data_digest: data_digest.to_owned(),
                mentee_version: env!("CARGO_PKG_VERSION").into(),
                counts: Counts::default(),
            },
        }
    }

    /// Whether there is to be a checkpoint after `step` updates.
    pub(super) fn is_due(&self, step: u64) -> bool {
        let multiple = |of: u64| of > 0 && step.is_multiple_of(of);
        multiple(self.every_steps) || multiple(self.every_epochs.saturating_mul(self.steps_per_epoch))
    }

    /// A folder of its own for every try, as what is left of the last may still be there.
    pub(super) fn staging(&self, of: &UnderWay) -> Result<Staging<'static>, CheckpointError> {
        let attempt = match of.tries {
            0 => self.attempt.clone(),
            tries => format!("{}-{tries}", self.attempt),
        };
        Staging::open(&LocalDisk, &self.folder, of.step, &attempt)
    }

    pub(super) fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// Makes the checkpoint of these files count, and drops those beyond `keep`.
    pub(super) fn commit(&self, of: UnderWay, files: Vec<FileEntry>) -> Result<Committed, CheckpointError> {
        let UnderWay { step, counts, .. } = of;
        let meta = Meta { step, epoch: self.epoch(step), counts, ..self.meta.clone() };
        // Who loses power and goes on from here has the lines of all steps before. (A disk that refuses spoils no checkpoint.)
        let metrics = std::fs::File::open(self.folder.with_file_name("metrics.jsonl"));
        let _ = metrics.and_then(|file| file.sync_data());
        let committed = self.staging(&of)?.commit(&meta, files)?;
        let removed = match self.keep {
            0 => Ok(Vec::new()),
            keep => checkpoint::retain(&LocalDisk, &self.folder, keep),
        };
        if let Err(error) = removed {
            tracing::warn!(step, %error, "cannot remove old checkpoints");
        }
        Ok(committed)
    }

    pub(super) fn abandon(&self, of: &UnderWay) {
        if let Ok(staging) = self.staging(of) {
            staging.abandon();
        }
    }
}

/// What a checkpoint cost the step loop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stall {
    /// For the one before it.
    pub wait: Duration,
    /// For the copy.
    pub copy: Duration,
}

/// A checkpoint under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct UnderWay {
    pub(super) step: u64,
    /// How often it was tried before.
    pub(super) tries: u32,
    pub(super) counts: Counts,
    /// The training thread waits for it.
    pub(super) is_last: bool,
    pub(super) since: Instant,
    pub(super) stall: Stall,
}
