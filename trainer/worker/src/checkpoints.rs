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
//!
//! A rank that writes for longer than rank 0 waits holds nobody up: rank 0 goes on to the next checkpoint, and commits that one
//! when its verdict comes after all.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mentee_checkpoint::{
    self as checkpoint, CheckpointError, Committed, Counts, FileEntry, LocalDisk, Meta, Staging,
};
use mentee_cluster::{self as cluster, NoCommit, Phase, ShareFile, Shares, Verdict, WorkerEvent};
use mentee_collectives::Collectives;
use mentee_config::Plan;
use mentee_ssl::State;

use crate::agree;
use crate::error::WorkerError;
use crate::link::Reporter;
use crate::metrics::{self, CheckpointLine, Metrics};
use crate::online::OnlineProbe;
use crate::snapshot::Share;
use crate::stop::StopFlag;

/// How often rank 0 looks for a verdict that is late, when nothing else is to be done.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Between two tries of the last checkpoint on a full disk.
const TRY_EVERY: Duration = Duration::from_secs(2);
/// Between two lines that say so.
const SAY_EVERY: Duration = Duration::from_secs(60);

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
            folder: folder(run_dir),
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
    fn is_due(&self, step: u64) -> bool {
        let multiple = |of: u64| of > 0 && step.is_multiple_of(of);
        multiple(self.every_steps) || multiple(self.every_epochs.saturating_mul(self.steps_per_epoch))
    }
}

/// A copy of this rank's share, to be written.
struct Job {
    copy: Vec<u8>,
    of: UnderWay,
}

/// The copy comes back.
struct Done {
    copy: Vec<u8>,
    outcome: Outcome,
    at: Instant,
    /// Checkpoints of earlier steps that have become complete since.
    late: Vec<Complete>,
    /// With the last one: those whose verdict has not come.
    overdue: Vec<UnderWay>,
}

/// A checkpoint that counts, and since when.
struct Complete {
    of: UnderWay,
    committed: Committed,
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
    /// Not all ranks have written in time; they may yet.
    Overdue(String),
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

/// What a checkpoint is of.
#[derive(Clone, Copy)]
pub struct Content<'a> {
    pub state: &'a State,
    pub probe: Option<&'a OnlineProbe>,
    pub counts: Counts,
}

/// A checkpoint under way.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    step: u64,
    /// How often it was tried before.
    tries: u32,
    counts: Counts,
    /// The training thread waits for it.
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
    /// Why this rank found no room for the last checkpoint, when it has just tried.
    no_room: Option<String>,
    stop: StopFlag,
}

impl Checkpoints {
    /// Starts the writer. `shares` lead to the coordinator; a world of one does without.
    pub fn new(
        settings: Settings,
        state: &State,
        probe: Option<&OnlineProbe>,
        collectives: Arc<dyn Collectives>,
        shares: Option<Shares>,
        stop: StopFlag,
    ) -> Result<Self, WorkerError> {
        let (rank, world_size) = (collectives.rank(), collectives.world_size());
        let share = Arc::new(Share::new(state, probe, rank, world_size)?);
        let (jobs, queue) = mpsc::channel();
        let (back, done) = mpsc::channel();
        let mut writer = Writer::new(settings.clone(), rank, world_size, share.clone(), shares);
        thread::Builder::new()
            .name("checkpoints".into())
            .spawn(move || writer.run(&queue, &back))
            .map_err(|error| WorkerError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            settings,
            collectives,
            share,
            jobs,
            done,
            copy: None,
            under_way: None,
            no_room: None,
            stop,
        })
    }

    /// Whether [`Checkpoints::maybe_save`] will save.
    pub fn is_due(&self, step: u64, is_last: bool) -> bool {
        is_last || self.settings.is_due(step)
    }

    /// Reports what has become complete, and saves the state after `step` updates if that is due. When `is_last`, it is,
    /// and on return the checkpoint is complete; on a full disk it is tried again, as there is no step to go on with.
    ///
    /// # Errors
    /// When this rank could not write a checkpoint. If there was no room for it, only when it is the last: before that,
    /// training goes on.
    pub fn maybe_save(
        &mut self,
        step: u64,
        is_last: bool,
        content: Content<'_>,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
        if let Ok(done) = self.done.try_recv() {
            self.settle(done, metrics, reporter)?;
        }
        if !self.is_due(step, is_last) {
            return Ok(());
        }
        let (begin, asked) = (Instant::now(), self.is_asked_to_stop(reporter));
        let mut said = None;
        for tries in 0.. {
            reporter.phase(Phase::Checkpoint);
            let Err(error) = self.save(step, is_last, tries, content, metrics, reporter) else { break };
            // A stop that came later is of somebody who does not want to wait.
            let enough =
                begin.elapsed() >= self.settings.wait_for_room || (!asked && self.is_asked_to_stop(reporter));
            if !is_last || !self.is_tried_again(step, &error, enough, &mut said)? {
                return Err(error);
            }
            reporter.phase(Phase::Update); // another phase: whoever watches sees that it goes on
            thread::sleep(TRY_EVERY);
        }
        Ok(())
    }

    fn is_asked_to_stop(&self, reporter: &Reporter) -> bool {
        self.stop.is_set() || reporter.stop_requested()
    }

    /// Whether all ranks are to save the last checkpoint once more: some rank found its disk full, and none has had `enough`.
    fn is_tried_again(
        &mut self,
        step: u64,
        error: &WorkerError,
        enough: bool,
        said: &mut Option<Instant>,
    ) -> Result<bool, WorkerError> {
        if self.collectives.world_size() > 1 && !error.is_known() {
            return Ok(false); // the others may be gone
        }
        let own = (self.no_room.take(), enough);
        let all: Vec<(Option<String>, bool)> =
            agree::gather(&*self.collectives, step, &own, "word on its disk")?;
        let full = all.iter().enumerate().find_map(|(rank, (full, _))| full.as_ref().map(|why| (rank, why)));
        let again = full.is_some() && all.iter().all(|(_, enough)| !enough);
        if let Some((rank, why)) = full.filter(|_| again && self.collectives.rank() == 0)
            && said.is_none_or(|at| at.elapsed() >= SAY_EVERY)
        {
            let rank = if rank == 0 { String::new() } else { format!("rank {rank}: ") };
            tracing::warn!(
                step,
                "no checkpoint of step {step} yet: {rank}{why}; free some space: it is tried again"
            );
            *said = Some(Instant::now());
        }
        Ok(again)
    }

    /// Saves the state after `step` updates; when `is_last`, it is complete on return.
    fn save(
        &mut self,
        step: u64,
        is_last: bool,
        tries: u32,
        Content { state, probe, counts }: Content<'_>,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
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
        let of = UnderWay { step, tries, counts, is_last, since, stall };
        self.under_way = Some(of);
        self.jobs.send(Job { copy, of }).map_err(|_| writer_ended())?;
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
        Done { copy, outcome, mut at, late, overdue }: Done,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
        self.copy = Some(copy);
        for complete in late {
            self.tell(complete, metrics, reporter)?;
        }
        let Some(of) = self.under_way.take() else { return Ok(()) };
        let UnderWay { step, is_last, .. } = of;
        let committed = match outcome {
            Outcome::New | Outcome::Written => None,
            Outcome::Committed(committed) => Some(committed),
            Outcome::Gather(share) => {
                let committed = self.commit_together(of, share)?;
                // Whoever is here has written all shares before this one.
                overdue.iter().for_each(|of| self.settings.abandon(of));
                committed
            }
            Outcome::Abandoned(reason) => {
                tracing::warn!(step, "no checkpoint of step {step}: {reason}; training goes on");
                None
            }
            Outcome::Overdue(reason) => {
                tracing::warn!(
                    step,
                    "the checkpoint of step {step} is not complete yet: {reason}; training goes on"
                );
                None
            }
            Outcome::Failed(source) if source.is_no_room() && !is_last => {
                tracing::warn!(
                    step,
                    "no checkpoint of step {step}: {source}; training goes on, any older one is intact: free some space"
                );
                None
            }
            Outcome::Failed(source) => {
                self.note_room(&source);
                return Err(WorkerError::NotSaved { step, source });
            }
        };
        let Some(committed) = committed else { return Ok(()) };
        if is_last {
            at = Instant::now();
        }
        self.tell(Complete { of, committed, at }, metrics, reporter)
    }

    /// A checkpoint is complete.
    fn tell(
        &self,
        Complete { of, committed, at }: Complete,
        metrics: &mut Metrics,
        reporter: &mut Reporter,
    ) -> Result<(), WorkerError> {
        let (UnderWay { step, since, stall, .. }, Committed { folder, state_digest: digest }) =
            (of, committed);
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
        &mut self,
        of: UnderWay,
        share: Result<Option<FileEntry>, CheckpointError>,
    ) -> Result<Option<Committed>, WorkerError> {
        let collectives = self.collectives.clone();
        let (collectives, first, step) = (&*collectives, collectives.rank() == 0, of.step);
        let not_saved = |source| WorkerError::NotSaved { step, source };
        share.as_ref().err().into_iter().for_each(|error| self.note_room(error));
        let file = match agree::together(collectives, share.map_err(not_saved)) {
            Ok(file) => file,
            Err(error) => {
                if first {
                    self.settings.abandon(&of);
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
        let committed = first.then(|| self.settings.commit(of, files)).transpose();
        committed.as_ref().err().into_iter().for_each(|error| self.note_room(error));
        agree::together(collectives, committed.map_err(not_saved))
    }

    /// Every rank remembers its own: of all failures the ranks are told one.
    fn note_room(&mut self, error: &CheckpointError) {
        if error.is_full() {
            self.no_room = Some(error.to_string());
        }
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
    overdue: Overdue,
}

impl Writer {
    fn new(
        settings: Settings,
        rank: u32,
        world_size: u32,
        share: Arc<Share>,
        shares: Option<Shares>,
    ) -> Self {
        let overdue = Overdue { settings: settings.clone(), waiting: Vec::new(), complete: Vec::new() };
        Self { settings, rank, world_size, share, shares, overdue }
    }

    fn run(&mut self, queue: &mpsc::Receiver<Job>, back: &mpsc::Sender<Done>) {
        let mut copy = vec![0u8; self.share.len];
        // The system gives memory when it is first written to: now, and not while training waits.
        copy.chunks_mut(4096).for_each(|page| page[0] = 1);
        // Whoever does not listen has ended.
        let _ = back.send(self.done(copy, Outcome::New));
        while let Some(Job { mut copy, of }) = self.next(queue) {
            let outcome = self.write(of, &mut copy);
            let _ = back.send(self.done(copy, outcome));
        }
    }

    fn done(&mut self, copy: Vec<u8>, outcome: Outcome) -> Done {
        let late = std::mem::take(&mut self.overdue.complete);
        let overdue = match outcome {
            Outcome::Gather(_) => std::mem::take(&mut self.overdue.waiting),
            _ => Vec::new(),
        };
        Done { copy, outcome, at: Instant::now(), late, overdue }
    }

    /// The next job; late verdicts are heard until it comes.
    fn next(&mut self, queue: &mpsc::Receiver<Job>) -> Option<Job> {
        while !self.overdue.waiting.is_empty() {
            match queue.recv_timeout(LOOK_EVERY) {
                Ok(job) => return Some(job),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => self.hear(),
            }
        }
        queue.recv().ok()
    }

    /// Takes in the verdicts that have come.
    fn hear(&mut self) {
        while let Some((step, verdict)) = self.shares.as_ref().and_then(Shares::late) {
            self.overdue.heard(step, verdict);
        }
    }

    fn write(&mut self, of: UnderWay, copy: &mut [u8]) -> Outcome {
        let UnderWay { step, is_last, .. } = of;
        let share = self.write_share(&of, copy);
        if self.world_size == 1 {
            return match share {
                Ok(file) => self.commit(of, file.into_iter().collect()),
                Err(error) => {
                    self.settings.abandon(&of);
                    Outcome::Failed(error)
                }
            };
        }
        if is_last {
            self.hear();
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
        let (overdue, patience) = (&mut self.overdue, self.settings.patience);
        let verdict = (self.rank == 0)
            .then(|| shares.verdict(step, patience, |step, verdict| overdue.heard(step, verdict)));
        match verdict {
            Some(Ok(_)) => self.overdue.give_up_before(step),
            Some(Err(NoCommit::ShareFailed(_))) => {
                self.overdue.give_up_before(step);
                self.settings.abandon(&of); // every rank is done with it
            }
            Some(Err(NoCommit::TimedOut(_))) => self.overdue.waiting.push(of),
            Some(Err(NoCommit::CoordinatorLost)) | None => {}
        }
        match (share, verdict) {
            (Err(error), _) => Outcome::Failed(error),
            (Ok(_), None) => Outcome::Written,
            (Ok(_), Some(Err(no @ NoCommit::TimedOut(_)))) => Outcome::Overdue(no.to_string()),
            (Ok(_), Some(Err(no))) => Outcome::Abandoned(no.to_string()),
            (Ok(_), Some(Ok(files))) => self.commit(of, files.into_iter().map(from_wire).collect()),
        }
    }

    /// Nothing is abandoned when it fails: that is done already, or the folder aside holds the checkpoint of before.
    fn commit(&self, of: UnderWay, files: Vec<FileEntry>) -> Outcome {
        match self.settings.commit(of, files) {
            Ok(committed) => Outcome::Committed(committed),
            Err(error) => Outcome::Failed(error),
        }
    }

    /// Writes this rank's file; none when there are more ranks than tensors.
    fn write_share(&mut self, of: &UnderWay, copy: &mut [u8]) -> Result<Option<FileEntry>, CheckpointError> {
        let tensors = self.share.tensors(copy);
        if tensors.is_empty() {
            return Ok(None);
        }
        let name = checkpoint::file_name(self.rank, self.world_size);
        if let Some(n) = self.settings.without_room.iter().position(|without| *without == of.step) {
            self.settings.without_room.remove(n);
            let (action, source) = ("write", std::io::ErrorKind::StorageFull.into());
            return Err(CheckpointError::Io { action, path: name.into(), source });
        }
        self.settings.staging(of)?.write(&name, &tensors).map(Some)
    }
}

/// On rank 0: checkpoints whose verdict did not come in time, and may come yet.
struct Overdue {
    settings: Settings,
    /// In the order of steps.
    waiting: Vec<UnderWay>,
    /// Committed after all, to be told.
    complete: Vec<Complete>,
}

impl Overdue {
    /// The verdict of a step, of which a newer one has not come.
    fn heard(&mut self, step: u64, verdict: Verdict) {
        self.give_up_before(step);
        if self.waiting.first().is_none_or(|of| of.step != step) {
            return;
        }
        let of = self.waiting.remove(0);
        let Ok(files) = verdict else { return self.settings.abandon(&of) };
        match self.settings.commit(of, files.into_iter().map(from_wire).collect()) {
            Ok(committed) => self.complete.push(Complete { of, committed, at: Instant::now() }),
            Err(error) => tracing::warn!(step, "no checkpoint of step {step}: {error}; training goes on"),
        }
    }

    /// The verdict of `step` has come: every rank is done with what is older, as ranks write in the order of steps, and the
    /// coordinator speaks of it no more.
    fn give_up_before(&mut self, step: u64) {
        while self.waiting.first().is_some_and(|of| of.step < step) {
            self.settings.abandon(&self.waiting.remove(0));
        }
    }
}

impl Settings {
    /// A folder of its own for every try, as what is left of the last may still be there.
    fn staging(&self, of: &UnderWay) -> Result<Staging<'static>, CheckpointError> {
        let attempt = match of.tries {
            0 => self.attempt.clone(),
            tries => format!("{}-{tries}", self.attempt),
        };
        Staging::open(&LocalDisk, &self.folder, of.step, &attempt)
    }

    fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// Makes the checkpoint of these files count, and drops those beyond `keep`.
    fn commit(&self, of: UnderWay, files: Vec<FileEntry>) -> Result<Committed, CheckpointError> {
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

    fn abandon(&self, of: &UnderWay) {
        if let Ok(staging) = self.staging(of) {
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

#[cfg(test)]
mod tests {
    use mentee_cluster::{Agreement, Hello, Link, coordinator::STALL, server};
    use mentee_config::Recipe;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn of(step: u64) -> UnderWay {
        UnderWay {
            step,
            tries: 0,
            counts: Counts::default(),
            is_last: false,
            since: Instant::now(),
            stall: Stall::default(),
        }
    }

    /// The names in the folder.
    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_checkpoint_that_one_rank_is_late_with_is_committed_when_it_has_written() {
        let dir = tempfile::tempdir().unwrap();
        let (_, state) = mentee_ssl::state::new(&Recipe::load("demo", &[]).unwrap()).unwrap();
        let agreement = Agreement {
            token: server::fresh_token().unwrap(),
            world_size: 2,
            plan_hash: None,
            version: "0".into(),
            stall: STALL,
        };
        let handle =
            server::start_thread(std::net::IpAddr::from(std::net::Ipv4Addr::LOCALHOST), agreement).unwrap();
        let hello = |rank| Hello {
            rank,
            world_size: 2,
            host: String::new(),
            pid: 0,
            plan_hash: String::new(),
            data_digest: String::new(),
            version: "0".into(),
        };
        let address = &handle.address;
        let mut links: Vec<Link> = thread::scope(|scope| {
            let join = |rank| scope.spawn(move || Link::connect(address, hello(rank), LONG).unwrap().0);
            [0, 1].map(join).into_iter().map(|link| link.join().unwrap()).collect()
        });
        let settings = |without_room| Settings {
            folder: folder(dir.path()),
            every_steps: 3,
            every_epochs: 0,
            steps_per_epoch: 10,
            keep: 9,
            patience: Duration::from_millis(50),
            wait_for_room: Duration::ZERO,
            attempt: "a".into(),
            meta: Meta {
                step: 0,
                epoch: 0,
                world_size: 2,
                plan_hash: String::new(),
                plan_toml: String::new(),
                data_digest: String::new(),
                mentee_version: String::new(),
                counts: Counts::default(),
            },
            without_room,
        };
        let mut writers: Vec<_> = (0..2u32)
            .map(|rank| {
                let share = Arc::new(Share::new(&state, None, rank, 2).unwrap());
                let shares = links[rank as usize].shares();
                Writer::new(settings(vec![9]), rank, 2, share, shares)
            })
            .collect();
        let mut late = writers.pop().unwrap();
        let mut first = writers.pop().unwrap();
        let steps = |first: &Writer| first.overdue.waiting.iter().map(|of| of.step).collect::<Vec<_>>();
        // As its loop does when there is no job.
        let waits = |first: &mut Writer, done: &dyn Fn(&Writer) -> bool| {
            let begin = Instant::now();
            while !done(first) {
                assert!(begin.elapsed() < LONG, "no verdict");
                thread::sleep(Duration::from_millis(5));
                first.hear();
            }
        };
        let mut copy = vec![0; first.share.len.max(late.share.len)];
        let mut write = |writer: &mut Writer, step| {
            let len = writer.share.len;
            writer.write(of(step), &mut copy[..len])
        };
        let checkpoints = folder(dir.path());

        assert!(matches!(write(&mut first, 3), Outcome::Overdue(_)));
        assert_eq!(names(&checkpoints), [".tmp-step-00000003-a"]);
        assert!(matches!(write(&mut late, 3), Outcome::Written));
        // Heard while the next one is waited for, or after: that of step 6 is late too.
        assert!(matches!(write(&mut first, 6), Outcome::Overdue(_)));
        waits(&mut first, &|first| steps(first) == [6]);
        assert_eq!(names(&checkpoints), [".tmp-step-00000006-a", "step-00000003"]);
        let told = first.done(Vec::new(), Outcome::Written);
        assert_eq!(told.late.iter().map(|complete| complete.of.step).collect::<Vec<_>>(), [3]);
        assert!(told.overdue.is_empty(), "this thread's still");

        // One that fails in the end leaves nothing, and takes what is older with it.
        first.settings.without_room.clear();
        assert!(matches!(write(&mut first, 9), Outcome::Overdue(_)));
        assert!(matches!(write(&mut late, 9), Outcome::Failed(_)));
        waits(&mut first, &|first| steps(first).is_empty());
        assert_eq!(names(&checkpoints), ["step-00000003"]);
        let found = checkpoint::newest(&checkpoints).unwrap().unwrap();
        assert_eq!(found.checkpoint.manifest.meta.step, 3);
    }
}
