//! The thread that writes this rank's shares, and on rank 0 makes checkpoints count.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use mentee_checkpoint::{self as checkpoint, CheckpointError, Committed, FileEntry};
use mentee_cluster::{self as cluster, NoCommit, ShareFile, Shares, Verdict};

use super::settings::{Settings, UnderWay};
use crate::snapshot::Share;

/// How often rank 0 looks for a verdict that is late, when nothing else is to be done.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A copy of this rank's share, to be written.
pub(super) struct Job {
    pub(super) copy: Vec<u8>,
    pub(super) of: UnderWay,
}

/// The copy comes back.
pub(super) struct Done {
    pub(super) copy: Vec<u8>,
    pub(super) outcome: Outcome,
    pub(super) at: Instant,
    /// Checkpoints of earlier steps that have become complete since.
    pub(super) late: Vec<Complete>,
    /// With the last one: those whose verdict has not come.
    pub(super) overdue: Vec<UnderWay>,
}

/// A checkpoint that counts, and since when.
pub(super) struct Complete {
    pub(super) of: UnderWay,
    pub(super) committed: Committed,
    pub(super) at: Instant,
}

pub(super) enum Outcome {
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

/// The thread that writes.
pub(super) struct Writer {
    settings: Settings,
    rank: u32,
    world_size: u32,
    share: Arc<Share>,
    shares: Option<Shares>,
    overdue: Overdue,
}

impl Writer {
    pub(super) fn new(
        settings: Settings,
        rank: u32,
        world_size: u32,
        share: Arc<Share>,
        shares: Option<Shares>,
    ) -> Self {
        let overdue = Overdue { settings: settings.clone(), waiting: Vec::new(), complete: Vec::new() };
        Self { settings, rank, world_size, share, shares, overdue }
    }

    pub(super) fn run(&mut self, queue: &mpsc::Receiver<Job>, back: &mpsc::Sender<Done>) {
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

fn to_wire(FileEntry { name, bytes, blake3 }: &FileEntry) -> ShareFile {
    ShareFile { name: name.clone(), bytes: *bytes, blake3: blake3.clone() }
}

fn from_wire(ShareFile { name, bytes, blake3 }: ShareFile) -> FileEntry {
    FileEntry { name, bytes, blake3 }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::thread;

    use mentee_checkpoint::{Counts, Meta};
    use mentee_cluster::{Agreement, Hello, Link, coordinator::STALL, server};
    use mentee_config::Recipe;

    use super::super::settings::Stall;
    use super::*;
    use crate::run_dir;

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
            folder: run_dir::checkpoints(dir.path()),
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
        let checkpoints = run_dir::checkpoints(dir.path());

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
