//! Where the ranks of one line of calls meet: what each calls, short data, and whose turn it is.
//!
//! ```text
//!   | bell, sleepers | chunks done | posts of rank 0, 1, … | slots of rank 0, 1, … |
//! ```
//!
//! Everything a rank writes for its call n lies in place n mod 2. So one meeting a call is enough: a rank that writes
//! for call n + 2 has met all others in call n + 1, where nobody needs anything of call n any more.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::segment::Segment;
use crate::{
    ErrorKind,
    buffer::{Element, block_start},
    checked::Call,
    waited::Waited,
};

/// Bytes that a rank can hand over in a meeting. Statistics of a batch norm over 4096 channels (a projector's) and two views, in f64,
/// are 128 KiB and two counts.
pub(super) const SLOT: usize = (128 << 10) + 4096;
/// A cache line, twice: processors fetch them in pairs.
const LINE: usize = 128;
const BELL: usize = 0;
const SLEEPERS: usize = 4;
const DONE: usize = LINE;
const POSTS: usize = 2 * LINE;
/// Of a rank's post: the number of its calls, two notes of [`NOTE`] words, how many of its chunks are taken; a line each.
const POST: usize = 4 * LINE;
const NOTE: usize = 5;
/// What a thread that sleeps wakes up for by itself, to look at the clock.
const LONGEST_SLEEP: Duration = Duration::from_millis(200);

/// What a rank calls, for the others to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Note {
    /// [`Call::to_bytes`].
    call: [u64; 3],
    /// Bytes of its own, in its slot if they fit.
    pub(super) len: usize,
    /// Where its data lie in shared memory, if they do: which piece of it, and the offset there.
    pub(super) place: Option<(u32, u32)>,
}

impl Note {
    pub(super) fn new(call: Call, number: u64, len: usize) -> Note {
        let mut bytes = [0u8; 24];
        bytes[..Call::BYTES].copy_from_slice(&call.to_bytes(number));
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Note { call: [word(0), word(8), word(16)], len, place: None }
    }

    fn describe(&self) -> String {
        let bytes: Vec<u8> = self.call.iter().flat_map(|word| word.to_le_bytes()).collect();
        Call::describe(&bytes[..Call::BYTES])
    }

    fn to_words(self) -> [u64; NOTE] {
        let [a, b, c] = self.call;
        let place = self.place.map_or(u64::MAX, |(piece, offset)| u64::from(piece) << 32 | u64::from(offset));
        [a, b, c, self.len as u64, place]
    }

    fn from_words([a, b, c, len, place]: [u64; NOTE]) -> Note {
        let place = (place != u64::MAX).then_some(((place >> 32) as u32, place as u32));
        Note { call: [a, b, c], len: len as usize, place }
    }
}

/// One line of calls.
pub(super) struct Board {
    segment: Segment,
    rank: usize,
    world_size: usize,
    /// How long a rank that waits looks again at once, before it sleeps.
    spin: Duration,
}

/// How far a rank is on a board.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Calls made.
    pub(super) calls: u64,
    /// Chunks of each rank that were to be summed in those.
    chunks: Vec<u64>,
}

impl Board {
    /// Bytes that a board for so many ranks needs.
    pub(super) const fn bytes(world_size: usize) -> usize {
        POSTS + world_size * (POST + 2 * SLOT)
    }

    /// On zeroed memory of [`Board::bytes`].
    pub(super) fn new(segment: Segment, rank: usize, world_size: usize, spin: Duration) -> Board {
        assert!(segment.len() >= Board::bytes(world_size) && rank < world_size);
        Board { segment, rank, world_size, spin }
    }

    fn atomic32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: inside the segment, aligned, and used as an atomic only, by all ranks.
        unsafe { AtomicU32::from_ptr(self.segment.at(offset).cast()) }
    }

    fn atomic(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.segment.at(offset).cast()) }
    }

    fn posted(&self, rank: usize) -> &AtomicU64 {
        self.atomic(POSTS + rank * POST)
    }

    fn taken(&self, rank: usize) -> &AtomicU64 {
        self.atomic(POSTS + rank * POST + 3 * LINE)
    }

    fn note_words(&self, rank: usize, call: u64) -> [&AtomicU64; NOTE] {
        let begin = POSTS + rank * POST + LINE * (1 + (call % 2) as usize);
        std::array::from_fn(|word| self.atomic(begin + 8 * word))
    }

    fn slot_at(&self, rank: usize, call: u64) -> *mut u8 {
        self.segment.at(POSTS + self.world_size * POST + (2 * rank + (call % 2) as usize) * SLOT)
    }

    /// What `rank` handed over in the meeting of `call`; it stands there until this rank meets it again.
    pub(super) fn slot<T: Element>(&self, rank: usize, call: u64, len: usize) -> &[T] {
        assert!(len * size_of::<T>() <= SLOT);
        // SAFETY: inside the segment, aligned to a line, written before the meeting and not until the next but one. Any bytes
        // are elements.
        unsafe { std::slice::from_raw_parts(self.slot_at(rank, call).cast_const().cast(), len) }
    }

    /// Tells the others what this rank calls and hands over `data`, as far as it fits; waits until all have done so.
    /// Their notes, in rank order. An error when one calls something else.
    pub(super) fn meet<T: Element>(
        &self,
        turn: &mut Turn,
        note: Note,
        data: &[T],
        patience: Duration,
    ) -> Result<Vec<Note>, ErrorKind> {
        let call = turn.calls;
        turn.calls += 1;
        if size_of_val(data) <= SLOT {
            // SAFETY: this rank's own slot, which nobody reads any more; it is long enough.
            unsafe {
                std::ptr::copy_nonoverlapping(data.as_ptr(), self.slot_at(self.rank, call).cast(), data.len())
            };
        }
        for (to, word) in self.note_words(self.rank, call).into_iter().zip(note.to_words()) {
            to.store(word, Ordering::Relaxed);
        }
        self.posted(self.rank).store(turn.calls, Ordering::Release);
        self.ring();
        let here = |rank: &usize| self.posted(*rank).load(Ordering::Acquire) >= turn.calls;
        self.wait(|| (0..self.world_size).all(|rank| here(&rank)), patience).map_err(|waited| {
            let missing = (0..self.world_size).filter(|rank| !here(rank)).map(|rank| rank as u32).collect();
            ErrorKind::Timeout { waited, missing }
        })?;
        let read = |rank| self.note_words(rank, call).map(|word| word.load(Ordering::Relaxed));
        let notes: Vec<Note> = (0..self.world_size).map(read).map(Note::from_words).collect();
        match notes.iter().position(|other| other.call != notes[0].call) {
            None => Ok(notes),
            Some(second) => Err(ErrorKind::Disagreement {
                first: 0,
                first_call: notes[0].describe(),
                second: second as u32,
                second_call: notes[second].describe(),
            }),
        }
    }

    /// Has every one of `chunks` pieces of work done once; returns when all are done. Every rank has an equal share of them,
    /// and helps with those of the others when it is through. All ranks call it, after a meeting.
    pub(super) fn share(
        &self,
        turn: &mut Turn,
        chunks: usize,
        patience: Duration,
        mut work: impl FnMut(usize),
    ) -> Result<(), ErrorKind> {
        turn.chunks.resize(self.world_size, 0);
        let done = self.atomic(DONE);
        let all: u64 = turn.chunks.iter().sum::<u64>() + chunks as u64;
        for owner in (0..self.world_size).map(|next| (self.rank + next) % self.world_size) {
            let begin = block_start(chunks, self.world_size, owner);
            let (before, taken) = (turn.chunks[owner], self.taken(owner));
            let end = before + (block_start(chunks, self.world_size, owner + 1) - begin) as u64;
            turn.chunks[owner] = end;
            let mut next = taken.load(Ordering::Relaxed);
            while next < end {
                match taken.compare_exchange_weak(next, next + 1, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(chunk) => {
                        work(begin + (chunk - before) as usize);
                        if done.fetch_add(1, Ordering::AcqRel) + 1 == all {
                            self.ring();
                        }
                        next = taken.load(Ordering::Relaxed);
                    }
                    Err(now) => next = now,
                }
            }
        }
        self.wait(|| done.load(Ordering::Acquire) >= all, patience)
            .map_err(|waited| ErrorKind::Timeout { waited, missing: Vec::new() })
    }

    /// Wakes those who sleep in [`Board::wait`].
    fn ring(&self) {
        let bell = self.atomic32(BELL);
        bell.fetch_add(1, Ordering::SeqCst);
        if self.atomic32(SLEEPERS).load(Ordering::SeqCst) > 0 {
            // SAFETY: a futex of this segment, which lives during the call; no other argument is used.
            unsafe { libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
        }
    }

    /// Returns when `ready`, which becomes so before somebody rings; how long it took, when that is more than `patience`.
    fn wait(&self, ready: impl Fn() -> bool, patience: Duration) -> Result<(), Duration> {
        if ready() {
            return Ok(());
        }
        let began = Instant::now();
        while began.elapsed() < self.spin {
            for _ in 0..32 {
                if ready() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let (bell, sleepers) = (self.atomic32(BELL), self.atomic32(SLEEPERS));
        let waited = Waited::begin();
        loop {
            // Whoever rings after this line sees a sleeper; if it was before, `ready` sees why.
            sleepers.fetch_add(1, Ordering::SeqCst);
            let rung = bell.load(Ordering::SeqCst);
            let is_ready = ready();
            let left = patience.saturating_sub(waited.look());
            if !is_ready && !left.is_zero() {
                let sleep = left.min(LONGEST_SLEEP);
                let timeout = libc::timespec {
                    tv_sec: sleep.as_secs() as libc::time_t,
                    tv_nsec: sleep.subsec_nanos().into(),
                };
                // SAFETY: as in `ring`; the timeout lives during the call. Why it returns does not matter.
                unsafe {
                    libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAIT, rung, &raw const timeout)
                };
            }
            sleepers.fetch_sub(1, Ordering::SeqCst);
            if is_ready || ready() {
                return Ok(());
            }
            if left.is_zero() {
                return Err(waited.look());
            }
        }
    }
}
