//! Decode threads that fill batches in order: the machinery under [`crate::loader`] and [`crate::eval`].
//!
//! ```text
//!   step s+2   [ . . . . . ]   opened when a thread finds nothing left to claim, at most `queue` at once
//!   step s+1   [ # # a . . ]   threads claim a few samples at a time, in order, and write to their places
//!   step s     [ # # # # b ]   delivered when its last sample is in (a, b: being decoded)
//! ```
//! Which thread fills a place has no influence on what is written there, so the batches are the same for any number
//! of threads. Buffers go round: a batch that was used up is given back and filled again.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::augment;
use crate::decode::{PlanarImage, RgbImage};
use crate::error::DataError;
use crate::eval::view::EvalScratch;
use crate::memory::Memory;
use crate::reader::Reader;

/// What to fill batches with.
pub(crate) trait Work: Send + Sync + 'static {
    /// Floats of one sample in one plane.
    fn sample_len(&self) -> usize;

    /// Planes: a batch is `[planes, N, sample_len]`. At most [`MAX_PLANES`].
    fn planes(&self) -> usize;

    /// The steps to be made.
    fn steps(&self) -> Range<u64>;

    /// Epoch and samples of a step.
    fn samples(&self, step: u64) -> (u64, Vec<u64>);

    /// The sample to take instead of `id`, which cannot be used, by `attempt` from 0; or the error that ends it, which is all there is
    /// where no other image will do, as in an evaluation.
    fn instead(&self, _epoch: u64, _id: u64, _attempt: u32, error: DataError) -> Result<u64, DataError> {
        Err(error)
    }

    /// Makes all planes of one sample; `out[p]` is its place in plane `p`.
    fn fill(
        &self,
        scratch: &mut Scratch,
        epoch: u64,
        id: u64,
        out: &mut [&mut [f32]],
    ) -> Result<(), DataError>;
}

/// The most planes a batch may have: two views, or an image and its raw pixels.
pub(crate) const MAX_PLANES: usize = 2;

/// Work memory of one decode thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) reader: Reader,
    pub(crate) image: RgbImage,
    pub(crate) planes: PlanarImage,
    pub(crate) augment: augment::Scratch,
    pub(crate) eval: EvalScratch,
}

/// A damaged sample that was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its place in the batch.
    pub place: usize,
    /// Its index in the source.
    pub id: u64,
    /// The sample that stands there now.
    pub instead: u64,
    /// It, and those that were to stand there and are damaged too: index in the source and what is wrong, naming shard or file and
    /// key.
    pub damaged: Vec<(u64, String)>,
}

/// The most samples that are tried for one place.
const MAX_ATTEMPTS: u32 = 16;

/// A finished batch.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) step: u64,
    pub(crate) epoch: u64,
    pub(crate) ids: Vec<u64>,
    /// Samples that were replaced, by place.
    pub(crate) skipped: Vec<Skipped>,
    /// `[planes, N, sample_len]`
    pub(crate) buffer: Memory,
    /// How long [`Pool::next`] blocked for it.
    pub(crate) wait: Duration,
}

/// Threads at work; dropping it stops and joins them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    work: Box<dyn Work>,
    /// Batches being filled or waiting to be taken, at most.
    queue: usize,
    /// Samples claimed at once.
    claim: usize,
    state: Mutex<State>,
    /// Signalled when there may be something to claim, or to stop for.
    room: Condvar,
    /// Signalled when the oldest batch may be complete.
    ready: Condvar,
}

struct State {
    /// Oldest first, consecutive steps.
    open: VecDeque<Open>,
    next_step: u64,
    /// Buffers given back.
    free: Vec<Memory>,
    stop: bool,
    /// The first error delivered: nothing comes after it.
    failed: Option<DataError>,
}

struct Open {
    step: u64,
    epoch: u64,
    ids: Arc<Vec<u64>>,
    buffer: Memory,
    /// Samples not yet claimed start here.
    claimed: usize,
    /// Samples not yet in.
    missing: usize,
    skipped: Vec<Skipped>,
    /// The error of the lowest place.
    error: Option<(usize, DataError)>,
}

/// A few places of one batch that one thread fills.
struct Claim {
    step: u64,
    epoch: u64,
    ids: Arc<Vec<u64>>,
    range: Range<usize>,
    base: *mut f32,
}

fn lock(mutex: &Mutex<State>) -> MutexGuard<'_, State> {
    // No code that can panic runs under this lock, and its state is consistent between statements anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Starts `threads` threads (at least one) that keep `queue` batches (at least one) ahead.
    pub(crate) fn start(
        work: Box<dyn Work>,
        threads: usize,
        queue: usize,
        batch: usize,
    ) -> Result<Self, DataError> {
        let threads = threads.max(1);
        let first = work.steps().start;
        let shared = Arc::new(Shared {
            work,
            queue: queue.max(1),
            // Small enough that the threads finish a batch together, large enough to spare the lock.
            claim: (batch / (4 * threads)).clamp(1, 16),
            state: Mutex::new(State {
                open: VecDeque::new(),
                next_step: first,
                free: Vec::new(),
                stop: false,
                failed: None,
            }),
            room: Condvar::new(),
            ready: Condvar::new(),
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(threads) };
        for thread in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new()
                .name(format!("decode-{thread}"))
                .spawn(move || shared.run())
                .map_err(|e| DataError::Thread { thread, reason: e.to_string() })?;
            pool.threads.push(handle);
        }
        Ok(pool)
    }

    /// The next batch in step order, `None` after the last. Blocks until it is there. After an error every further
    /// call gives that error again.
    pub(crate) fn next(&mut self) -> Result<Option<Filled>, DataError> {
        let started = Instant::now();
        let shared = &*self.shared;
        let last = shared.work.steps().end;
        let mut state = lock(&shared.state);
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            match state.open.front() {
                Some(oldest) if oldest.missing == 0 => break,
                None if state.next_step >= last => return Ok(None),
                _ => state = shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
        let Some(done) = state.open.pop_front() else { return Ok(None) };
        if let Some((_, error)) = done.error {
            state.failed = Some(error.clone());
            state.stop = true;
            shared.room.notify_all();
            return Err(error);
        }
        shared.room.notify_all();
        drop(state);
        let mut ids = Arc::try_unwrap(done.ids).unwrap_or_else(|ids| ids.to_vec());
        let mut skipped = done.skipped;
        // In order of place, whatever the order of arrival.
        skipped.sort_by_key(|skipped| skipped.place);
        skipped.iter().for_each(|skipped| ids[skipped.place] = skipped.instead);
        Ok(Some(Filled {
            step: done.step,
            epoch: done.epoch,
            ids,
            skipped,
            buffer: done.buffer,
            wait: started.elapsed(),
        }))
    }

    /// Gives a buffer back to be filled again.
    pub(crate) fn recycle(&self, buffer: Memory) {
        let mut state = lock(&self.shared.state);
        if state.free.len() <= self.shared.queue {
            state.free.push(buffer);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to give back.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut scratch = Scratch::default();
        while let Some(claim) = self.claim() {
            let mut failure = None;
            let mut skipped = Vec::new();
            for place in claim.range.clone() {
                match self.place(&mut scratch, &claim, place) {
                    Ok(replaced) => skipped.extend(replaced),
                    Err(error) => {
                        failure = Some((place, error));
                        break;
                    }
                }
            }
            self.settle(&claim, skipped, failure);
        }
    }

    /// Waits for places to fill; `None` to stop.
    fn claim(&self) -> Option<Claim> {
        let last = self.work.steps().end;
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return None;
            }
            if let Some(open) = state.open.iter_mut().find(|open| open.claimed < open.ids.len()) {
                let range = open.claimed..(open.claimed + self.claim).min(open.ids.len());
                open.claimed = range.end;
                return Some(Claim {
                    step: open.step,
                    epoch: open.epoch,
                    ids: Arc::clone(&open.ids),
                    range,
                    base: open.buffer.as_mut_ptr(),
                });
            }
            if state.next_step >= last {
                return None;
            }
            if state.open.len() < self.queue {
                let step = state.next_step;
                state.next_step += 1;
                let (epoch, ids) = self.work.samples(step);
                let mut buffer = state.free.pop().unwrap_or_default();
                buffer.resize(self.work.planes() * ids.len() * self.work.sample_len());
                let missing = ids.len();
                state.open.push_back(Open {
                    step,
                    epoch,
                    ids: Arc::new(ids),
                    buffer,
                    claimed: 0,
                    missing,
                    skipped: Vec::new(),
                    error: None,
                });
                // The others may claim from it too; an empty share is complete as it is.
                self.room.notify_all();
                self.ready.notify_all();
                continue;
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fills one place with its sample, or with what takes the place of a damaged one.
    fn place(
        &self,
        scratch: &mut Scratch,
        claim: &Claim,
        place: usize,
    ) -> Result<Option<Skipped>, DataError> {
        let id = claim.ids[place];
        let mut now = id;
        let mut damaged = Vec::new();
        loop {
            // A thread lost to a panic would leave its places missing, and the consumer waiting, for ever.
            let filled = catch_unwind(AssertUnwindSafe(|| self.fill(scratch, claim, place, now)))
                .unwrap_or(Err(DataError::Panicked { epoch: claim.epoch, sample: now }));
            let error = match filled {
                Ok(()) if damaged.is_empty() => return Ok(None),
                Ok(()) => {
                    return Ok(Some(Skipped { place, id, instead: now, damaged }));
                }
                Err(error) => error,
            };
            let attempt = damaged.len() as u32;
            damaged.push((now, error.brief()));
            if attempt >= MAX_ATTEMPTS {
                return Err(error);
            }
            now = self.work.instead(claim.epoch, id, attempt, error)?;
        }
    }

    fn fill(&self, scratch: &mut Scratch, claim: &Claim, place: usize, id: u64) -> Result<(), DataError> {
        let len = self.work.sample_len();
        let planes = self.work.planes();
        let count = claim.ids.len();
        let mut out: [&mut [f32]; MAX_PLANES] = [&mut [], &mut []];
        for (plane, slot) in out.iter_mut().enumerate().take(planes) {
            let first = (plane * count + place) * len;
            // SAFETY: the batch's buffer has planes · count · len floats and stays where it is while this claim's places
            // are `missing`; a place belongs to one claim only, so no other reference reaches this (plane, place).
            *slot = unsafe { std::slice::from_raw_parts_mut(claim.base.add(first), len) };
        }
        self.work.fill(scratch, claim.epoch, id, &mut out[..planes])
    }

    fn settle(&self, claim: &Claim, skipped: Vec<Skipped>, failure: Option<(usize, DataError)>) {
        let mut state = lock(&self.state);
        let Some(open) = state.open.iter_mut().find(|open| open.step == claim.step) else { return };
        open.skipped.extend(skipped);
        if let Some((place, error)) = failure {
            // The lowest place wins: the same error whatever the order of arrival.
            if open.error.as_ref().is_none_or(|(lowest, _)| place < *lowest) {
                open.error = Some((place, error));
            }
        }
        open.missing -= claim.range.len();
        if open.missing == 0 {
            self.ready.notify_all();
        }
    }
}
