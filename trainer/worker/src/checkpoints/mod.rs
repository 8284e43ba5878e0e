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

mod settings;
mod writer;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mentee_checkpoint::{CheckpointError, Committed, Counts, FileEntry};
use mentee_cluster::{Phase, Shares, WorkerEvent};
use mentee_collectives::Collectives;
use mentee_ssl::State;

use crate::agree;
use crate::error::WorkerError;
use crate::link::Reporter;
use crate::metrics::{self, CheckpointLine, Metrics};
use crate::online::OnlineProbe;
use crate::snapshot::Share;
use crate::stop::StopFlag;

use settings::UnderWay;
pub use settings::{Settings, Stall};
use writer::{Complete, Done, Job, Outcome, Writer};

/// Between two tries of the last checkpoint on a full disk.
const TRY_EVERY: Duration = Duration::from_secs(2);
/// Between two lines that say so.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// What a checkpoint is of.
#[derive(Clone, Copy)]
pub struct Content<'a> {
    pub state: &'a State,
    pub probe: Option<&'a OnlineProbe>,
    pub counts: Counts,
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
        let all: Vec<Option<FileEntry>> = agree::gather(collectives, step, &file, "share of a checkpoint")?;
        let files = all.into_iter().flatten().collect();
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
