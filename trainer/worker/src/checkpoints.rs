//! Checkpoints while training goes on.
//!
//! ```text
//!  training thread   …step │copy│ step, step, …                           │ a line in metrics.jsonl, the event
//!  writer            ──────┴────┴► order, digests, write, sync, share ──┐  ▲
//!  coordinator                                every rank's share is there ▼  │
//!  writer of rank 0                                manifest, sync, rename ───┘
//! ```
//!
//! The step loop pays for a copy of this rank's share into a buffer that is used again and again. There is one buffer, so
//! at most one checkpoint is under way; the next waits for it, and the wait is measured. A checkpoint counts when rank 0
//! has renamed it, and is reported at the next step boundary. The last one of a run, or before a stop, is waited for: the
//! ranks gather their shares among themselves, so that a run that lost its coordinator still saves its work.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mentee_checkpoint::{
    self as checkpoint, CheckpointError, Committed, FileEntry, LocalDisk, Meta, Staging,
};
use mentee_cluster::{self as cluster, NoCommit, Phase, ShareFile, Shares, WorkerEvent};
use mentee_collectives::Collectives;
use mentee_config::Plan;
use mentee_ssl::State;

use crate::agree;
use crate::error::WorkerError;
use crate::link::Reporter;
use crate::metrics::{self, CheckpointLine, Metrics};
use crate::online::OnlineProbe;
use crate::snapshot::Share;

/// The folder of a run's checkpoints.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// When a checkpoint is due, and what all checkpoints of a run have in common.
#[derive(Debug, Clone)]
pub struct Settings {
    pub folder: PathBuf,
    /// Steps between checkpoints; 0: only the last one.
    pub every_steps: u64,
    /// The same in epochs.
    pub every_epochs: u64,
    pub steps_per_epoch: u64,
    /// How many complete ones stay.
    pub keep: u64,
    /// How long rank 0 waits for the other ranks' shares.
    pub patience: Duration,
    /// Names this start of the run: the same on all its ranks, and on those of no other start.
    pub attempt: String,
    /// Step and epoch are those of the checkpoint.
    pub meta: Meta,
    /// Steps whose checkpoint is to find no room (see `faults.rs`).
    pub without_room: Vec<u64>,
}

impl Settings {
    /// Those of a plan.
    pub fn new(plan: &Plan, run_dir: &Path, world_size: u32, data_digest: &str, attempt: String) -> Self {
        let recipe = &plan.recipe;
        Self {
            folder: folder(run_dir),
            every_steps: recipe.checkpoint.every_steps,
            every_epochs: recipe.checkpoint.every_epochs,
            steps_per_epoch: plan.steps_per_epoch,
            keep: recipe.checkpoint.keep,
            patience: Duration::from_secs_f64(recipe.parallel.timeout_s),
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
            },
        }
    }

    /// Whether there is to be a checkpoint after `step` updates.
    fn is_due(&self, step: u64) -> bool {
        let multiple = |of: u64| of > 0 && step.is_multiple_of(of);
        multiple(self.every_steps) || multiple(self.every_epochs.saturating_mul(self.steps_per_epoch))
    }
}

/// A copy of this rank's share, to be written.
struct Job {
    copy: Vec<u8>,
    step: u64,
    /// The training thread waits for it.
    is_last: bool,
}

/// The copy comes back.
struct Done {
    copy: Vec<u8>,
    outcome: Outcome,
    at: Instant,
}

enum Outcome {
    /// The copy was made: nothing has been written yet.
    New,
    /// The checkpoint is complete.
    Committed(Committed),
    /// This rank has done its part; rank 0 commits.
    Written,
    /// The ranks are to gather what each has written, or why it has not.
    Gather(Result<Option<FileEntry>, CheckpointError>),
    /// There is no checkpoint of this step, which is not this rank's fault.
    Abandoned(String),
    /// This rank could not write.
    Failed(CheckpointError),
}

/// What a checkpoint cost the step loop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stall {
    /// For the one before it.
    pub wait: Duration,
    /// For the copy.
    pub copy: Duration,
}

/// What the training thread remembers of the checkpoint under way.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    step: u64,
    is_last: bool,
    since: Instant,
    stall: Stall,
}

/// The checkpoints of one rank.
pub struct Checkpoints {
    settings: Settings,
    collectives: Arc<dyn Collectives>,
    share: Arc<Share>,
    jobs: mpsc::Sender<Job>,
    done: mpsc::Receiver<Done>,
    /// None while the writer has it.
    copy: Option<Vec<u8>>,
    under_way: Option<UnderWay>,
}

impl Checkpoints {
    /// Starts the writer. `shares` lead to the coordinator; a world of one does without.
    pub fn new(
        settings: Settings,
        state: &State,
        probe: Option<&OnlineProbe>,
        collectives: Arc<dyn Collectives>,
        shares: Option<Shares>,
    ) -> Result<Self, WorkerError> {
        let (rank, world_size) = (collectives.rank(), collectives.world_size());
        let share = Arc::new(Share::new(state, probe, rank, world_size)?);
        let (jobs, queue) = mpsc::channel();
        let (back, done) = mpsc::channel();
        let writer = Writer { settings: settings.clone(), rank, world_size, share: share.clone(), shares };
        thread::Builder::new()
            .name("checkpoints".into())
            .spawn(move || writer.run(&queue, &back))
            .map_err(|error| WorkerError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { settings, collectives, share, jobs, done, copy: None, under_way: None })
    }

    /// Whether [`Checkpoints::maybe_save`] will save.
    pub fn is_due(&self, step: u64, is_last: bool) -> bool {
        is_last || self.settings.is_due(step)
    }

    /// Reports what has become complete, and saves the state after `step` updates if that is due. When `is_last`, it is,
    /// and on return the checkpoint is complete.
    ///
    /// # Errors
    /// When this rank could not write a checkpoint. If there was no room for it, only when it is the last: before that,
    /// training goes on.
    pub fn maybe_save(
        &mut self,
        step: u64,
        is_last: bool,
        state: &State,
        probe: Option<&OnlineProbe>,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
        if let Ok(done) = self.done.try_recv() {
            self.settle(done, metrics, reporter)?;
        }
        if !self.is_due(step, is_last) {
            return Ok(());
        }
        reporter.phase(Phase::Checkpoint);
        let waiting = Instant::now();
        let mut copy = loop {
            match self.copy.take() {
                Some(copy) => break copy,
                None => self.wait(metrics, reporter)?,
            }
        };
        let since = Instant::now();
        self.share.copy(state, probe, &mut copy)?;
        let stall = Stall { wait: since - waiting, copy: since.elapsed() };
        self.under_way = Some(UnderWay { step, is_last, since, stall });
        self.jobs.send(Job { copy, step, is_last }).map_err(|_| writer_ended())?;
        if is_last {
            self.wait(metrics, reporter)?;
        }
        Ok(())
    }

    /// Whether one is being written, as far as this thread has heard.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Waits for the checkpoint under way, if there is one.
    ///
    /// # Errors
    /// As [`Checkpoints::maybe_save`].
    pub fn finish(&mut self, metrics: &mut Metrics, reporter: &mut Reporter) -> Result<(), WorkerError> {
        if self.under_way.is_some() { self.wait(metrics, reporter) } else { Ok(()) }
    }

    fn wait(&mut self, metrics: &mut Metrics, reporter: &mut Reporter) -> Result<(), WorkerError> {
        let done = self.done.recv().map_err(|_| writer_ended())?;
        self.settle(done, metrics, reporter)
    }

    /// Takes the copy back and does what the outcome asks for.
    fn settle(
        &mut self,
        Done { copy, outcome, mut at }: Done,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
        self.copy = Some(copy);
        let Some(UnderWay { step, is_last, since, stall }) = self.under_way.take() else { return Ok(()) };
        let committed = match outcome {
            Outcome::New | Outcome::Written => None,
            Outcome::Committed(committed) => Some(committed),
            Outcome::Gather(share) => self.commit_together(step, share)?,
            Outcome::Abandoned(reason) => {
                tracing::warn!(step, "no checkpoint of step {step}: {reason}; training goes on");
                None
            }
            Outcome::Failed(source) if source.is_no_room() && !is_last => {
                tracing::warn!(
                    step,
                    "no checkpoint of step {step}: {source}; training goes on, older checkpoints are intact: free some space"
                );
                None
            }
            Outcome::Failed(source) => return Err(WorkerError::NotSaved { step, source }),
        };
        let Some(Committed { folder, state_digest: digest }) = committed else { return Ok(()) };
        if is_last {
            at = Instant::now();
        }
        let (write_ms, wait_ms, copy_ms) = (ms(at - since), ms(stall.wait), ms(stall.copy));
        tracing::info!(step, digest, write_ms, wait_ms, copy_ms, "checkpoint");
        let (kind, epoch, time) = ("checkpoint", self.settings.epoch(step), metrics::now());
        metrics.write(&CheckpointLine {
            kind,
            step,
            epoch,
            time,
            digest: digest.clone(),
            write_ms,
            wait_ms,
            copy_ms,
        })?;
        reporter.event(WorkerEvent::Checkpoint { step, path: folder.display().to_string(), digest });
        Ok(())
    }

    /// All ranks tell each other what they wrote; rank 0 commits, and has it then. When any of them failed, all do.
    fn commit_together(
        &self,
        step: u64,
        share: Result<Option<FileEntry>, CheckpointError>,
    ) -> Result<Option<Committed>, WorkerError> {
        let (collectives, first) = (&*self.collectives, self.collectives.rank() == 0);
        let not_saved = |source| WorkerError::NotSaved { step, source };
        let file = match agree::together(collectives, share.map_err(not_saved)) {
            Ok(file) => file,
            Err(error) => {
                if first {
                    self.settings.abandon(step);
                }
                return Err(error);
            }
        };
        let json =
            |error: serde_json::Error| WorkerError::Failed(format!("a share of a checkpoint: {error}"));
        let own = serde_json::to_vec(&file).map_err(json)?;
        let all = collectives.all_gather(&own).map_err(|source| WorkerError::Collective { step, source })?;
        let mut files = Vec::new();
        for bytes in &all {
            files.extend(serde_json::from_slice::<Option<FileEntry>>(bytes).map_err(json)?);
        }
        let committed = first.then(|| self.settings.commit(step, files).map_err(not_saved));
        agree::together(collectives, committed.transpose())
    }
}

fn writer_ended() -> WorkerError {
    WorkerError::Failed("the thread that writes checkpoints has ended".into())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The thread that writes.
struct Writer {
    settings: Settings,
    rank: u32,
    world_size: u32,
    share: Arc<Share>,
    shares: Option<Shares>,
}

impl Writer {
    fn run(&self, queue: &mpsc::Receiver<Job>, back: &mpsc::Sender<Done>) {
        let mut copy = vec![0u8; self.share.len];
        // The system gives memory when it is first written to: now, and not while training waits.
        copy.chunks_mut(4096).for_each(|page| page[0] = 1);
        // Whoever does not listen has ended.
        let _ = back.send(Done { copy, outcome: Outcome::New, at: Instant::now() });
        for Job { mut copy, step, is_last } in queue {
            let outcome = self.write(step, is_last, &mut copy);
            let _ = back.send(Done { copy, outcome, at: Instant::now() });
        }
    }

    fn write(&self, step: u64, is_last: bool, copy: &mut [u8]) -> Outcome {
        let share = self.write_share(step, copy);
        if self.world_size == 1 {
            return match share {
                Ok(file) => self.commit(step, file.into_iter().collect()),
                Err(error) => {
                    self.settings.abandon(step);
                    Outcome::Failed(error)
                }
            };
        }
        if is_last {
            return Outcome::Gather(share);
        }
        let Some(shares) = &self.shares else {
            return Outcome::Abandoned("there is no coordinator to commit it".into());
        };
        shares.report(
            step,
            match &share {
                Ok(file) => cluster::Share::Written { file: file.as_ref().map(to_wire) },
                Err(error) => cluster::Share::Failed { reason: error.to_string() },
            },
        );
        let verdict = (self.rank == 0).then(|| shares.verdict(step, self.settings.patience));
        if matches!(verdict, Some(Err(NoCommit::ShareFailed(_)))) {
            self.settings.abandon(step); // every rank is done with it
        }
        match (share, verdict) {
            (Err(error), _) => Outcome::Failed(error),
            (Ok(_), None) => Outcome::Written,
            (Ok(_), Some(Err(no))) => Outcome::Abandoned(no.to_string()),
            (Ok(_), Some(Ok(files))) => self.commit(step, files.into_iter().map(from_wire).collect()),
        }
    }

    /// Nothing is abandoned when it fails: that is done already, or the folder aside holds the checkpoint of before.
    fn commit(&self, step: u64, files: Vec<FileEntry>) -> Outcome {
        match self.settings.commit(step, files) {
            Ok(committed) => Outcome::Committed(committed),
            Err(error) => Outcome::Failed(error),
        }
    }

    /// Writes this rank's file; none when there are more ranks than tensors.
    fn write_share(&self, step: u64, copy: &mut [u8]) -> Result<Option<FileEntry>, CheckpointError> {
        let tensors = self.share.tensors(copy);
        if tensors.is_empty() {
            return Ok(None);
        }
        let name = checkpoint::file_name(self.rank, self.world_size);
        if self.settings.without_room.contains(&step) {
            let (action, source) = ("write", std::io::ErrorKind::StorageFull.into());
            return Err(CheckpointError::Io { action, path: name.into(), source });
        }
        self.settings.staging(step)?.write(&name, &tensors).map(Some)
    }
}

impl Settings {
    fn staging(&self, step: u64) -> Result<Staging<'static>, CheckpointError> {
        Staging::open(&LocalDisk, &self.folder, step, &self.attempt)
    }

    fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// Makes the checkpoint of these files count, and drops those beyond `keep`.
    fn commit(&self, step: u64, files: Vec<FileEntry>) -> Result<Committed, CheckpointError> {
        let meta = Meta { step, epoch: self.epoch(step), ..self.meta.clone() };
        let committed = self.staging(step)?.commit(&meta, files)?;
        let removed = match self.keep {
            0 => Ok(Vec::new()),
            keep => checkpoint::retain(&LocalDisk, &self.folder, keep),
        };
        if let Err(error) = removed {
            tracing::warn!(step, %error, "cannot remove old checkpoints");
        }
        Ok(committed)
    }

    fn abandon(&self, step: u64) {
        if let Ok(staging) = self.staging(step) {
            staging.abandon();
        }
    }
}

fn to_wire(FileEntry { name, bytes, blake3 }: &FileEntry) -> ShareFile {
    ShareFile { name: name.clone(), bytes: *bytes, blake3: blake3.clone() }
}

fn from_wire(ShareFile { name, bytes, blake3 }: ShareFile) -> FileEntry {
    FileEntry { name, bytes, blake3 }
}
