//! Ranks as threads of one process: a complete group for tests, without a network.
//!
//! ```
//! use mentee_collectives::{Collectives, threads};
//! use std::time::Duration;
//!
//! let sums = threads::run(3, Duration::from_secs(10), |rank| {
//!     let mut value = vec![f64::from(rank.rank())];
//!     rank.all_reduce_sum((&mut value).into()).map(|()| value[0])
//! });
//! assert!(sums.into_iter().all(|sum| sum == Ok(3.0)));
//! ```
//!
//! All data passes through shared slots, each written by one rank before a meeting and read by the others
//! after it. At every meeting the ranks compare what they call, so a wrong order or length is an error that
//! names two ranks. Nobody waits for a rank that cannot come: one that panics or is dropped tells the group,
//! and a meeting has a deadline.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Buffer, CollectiveError, Collectives, ErrorKind, Operation,
    buffer::{Element, block_start, sum_in_rank_order, with_slice},
    checked::Call,
};

/// Creates a group of `world_size` ranks, in rank order. `patience` is how long a rank waits for its peers in
/// one operation.
///
/// # Panics
/// If `world_size` is 0.
pub fn group(world_size: u32, patience: Duration) -> Vec<ThreadRank> {
    assert!(world_size > 0, "a group needs a rank");
    let hall = Hall {
        world_size,
        patience,
        state: Mutex::new(State { meetings: Vec::new(), broken: None }),
        all_here: Condvar::new(),
    };
    let shared = Shared::new(&Arc::new(hall), None);
    (0..world_size)
        .map(|rank| {
            let member = Member { rank, finished: AtomicBool::new(false), lanes: Mutex::new(Vec::new()) };
            ThreadRank::new(Arc::new(member), Arc::clone(&shared))
        })
        .collect()
}

/// Runs `body` once per rank, each on its own thread, and returns the results in rank order.
///
/// # Panics
/// If `body` panicked on a rank, with the panic of the lowest such rank, after all have ended.
pub fn run<R: Send>(
    world_size: u32,
    patience: Duration,
    body: impl Fn(ThreadRank) -> R + Send + Sync,
) -> Vec<R> {
    let outcomes: Vec<thread::Result<R>> = thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> =
            group(world_size, patience).into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .collect()
}

/// One rank of a group made by [`group`]. Dropping it takes the rank out of the group, but not out of its lanes.
pub struct ThreadRank {
    member: Arc<Member>,
    calls: AtomicU64,
    /// Held during an operation: one at a time.
    turn: Arc<Mutex<()>>,
    shared: Arc<Shared>,
}

/// What one rank's lines of calls have in common.
struct Member {
    rank: u32,
    finished: AtomicBool,
    /// Name and turn of each lane.
    lanes: Mutex<Vec<(String, Arc<Mutex<()>>)>>,
}

/// What unwinds a thread that called [`Collectives::abort`] on a [`ThreadRank`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted {
    /// The rank that called it.
    pub rank: u32,
    /// The exit code it asked for.
    pub code: i32,
}

/// What the ranks of a group and all its lanes share.
struct Hall {
    world_size: u32,
    patience: Duration,
    state: Mutex<State>,
    all_here: Condvar,
}

struct State {
    /// Of the group itself, then of each lane.
    meetings: Vec<Meeting>,
    /// Why no meeting will ever be complete again; set once, for the group and its lanes together.
    broken: Option<ErrorKind>,
}

/// A barrier at which the ranks compare their calls.
struct Meeting {
    /// How many meetings are over.
    generation: u64,
    /// What each rank that is waiting calls.
    calls: Vec<Option<Call>>,
    /// Who was dropped.
    left: Vec<bool>,
}

/// One line of calls: the group's own, or a lane.
struct Shared {
    hall: Arc<Hall>,
    /// Which of the meetings.
    index: usize,
    /// `None`: the group's own.
    name: Option<String>,
    /// The lane that is being opened, from rank 0 to the others.
    opened: Mutex<Option<Arc<Shared>>>,
    f32: Slots<f32>,
    f64: Slots<f64>,
    u64: Slots<u64>,
    u8: Slots<u8>,
}

/// The data of all ranks, kept from call to call.
struct Slots<T> {
    /// What each rank brings.
    inputs: Vec<RwLock<Vec<T>>>,
    /// The sum of one block, made by one rank.
    sums: Vec<RwLock<Vec<T>>>,
}

impl<T> Slots<T> {
    fn new(world_size: u32) -> Self {
        let slots = || (0..world_size).map(|_| RwLock::new(Vec::new())).collect();
        Slots { inputs: slots(), sums: slots() }
    }
}

/// A type that has slots.
trait Shareable: Element {
    fn slots(shared: &Shared) -> &Slots<Self>;
}

macro_rules! shareable {
    ($($type:ident),*) => {$(
        impl Shareable for $type {
            fn slots(shared: &Shared) -> &Slots<Self> {
                &shared.$type
            }
        }
    )*};
}

shareable!(f32, f64, u64, u8);

fn put<T: Copy>(slot: &RwLock<Vec<T>>, values: &[T]) {
    let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
    slot.clear();
    slot.extend_from_slice(values);
}

impl Shared {
    /// A new line of calls in this hall.
    fn new(hall: &Arc<Hall>, name: Option<String>) -> Arc<Shared> {
        let world_size = hall.world_size;
        let mut state = hall.lock();
        state.meetings.push(Meeting {
            generation: 0,
            calls: vec![None; world_size as usize],
            left: vec![false; world_size as usize],
        });
        Arc::new(Shared {
            hall: Arc::clone(hall),
            index: state.meetings.len() - 1,
            name,
            opened: Mutex::new(None),
            f32: Slots::new(world_size),
            f64: Slots::new(world_size),
            u64: Slots::new(world_size),
            u8: Slots::new(world_size),
        })
    }

    /// Waits until all ranks are here with the same call.
    fn meet(&self, rank: u32, call: Call) -> Result<(), ErrorKind> {
        let hall = &*self.hall;
        let mut state = hall.lock();
        if let Some(reason) = &state.broken {
            return Err(reason.clone());
        }
        let meeting = &mut state.meetings[self.index];
        if let Some(gone) = meeting.left.iter().position(|left| *left) {
            return Err(hall.break_up(&mut state, ErrorKind::PeerLeft { rank: gone as u32 }));
        }
        meeting.calls[rank as usize] = Some(call);
        if meeting.calls.iter().all(Option::is_some) {
            let calls: Vec<Call> = meeting.calls.iter_mut().filter_map(Option::take).collect();
            if let Some(difference) = Call::first_difference(&calls) {
                return Err(hall.break_up(&mut state, difference));
            }
            meeting.generation += 1;
            hall.all_here.notify_all();
            return Ok(());
        }
        let (arrival, began) = (meeting.generation, Instant::now());
        loop {
            let waited = began.elapsed();
            let Some(remaining) = hall.patience.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let calls = &state.meetings[self.index].calls;
                let missing = (0..hall.world_size).filter(|&r| calls[r as usize].is_none()).collect();
                return Err(hall.break_up(&mut state, ErrorKind::Timeout { waited: hall.patience, missing }));
            };
            state = hall.all_here.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
            if state.meetings[self.index].generation != arrival {
                return Ok(());
            }
            if let Some(reason) = &state.broken {
                return Err(reason.clone());
            }
        }
    }
}

impl Hall {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements below; a poisoned lock says only that a rank
        // panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the group and its lanes for everyone, unless something else did before; returns the reason that
    /// holds.
    fn break_up(&self, state: &mut State, reason: ErrorKind) -> ErrorKind {
        let reason = state.broken.get_or_insert(reason).clone();
        self.all_here.notify_all();
        reason
    }
}

impl ThreadRank {
    fn new(member: Arc<Member>, shared: Arc<Shared>) -> Self {
        ThreadRank { member, calls: AtomicU64::new(0), turn: Arc::default(), shared }
    }

    fn operate<R>(
        &self,
        call: Call,
        work: impl FnOnce(&Shared) -> Result<R, ErrorKind>,
    ) -> Result<R, CollectiveError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let result = if self.member.finished.load(Ordering::Relaxed) {
            Err(ErrorKind::Finished)
        } else {
            work(&self.shared)
        };
        result.map_err(|kind| CollectiveError {
            operation: call.operation,
            call: number,
            lane: self.shared.name.clone(),
            rank: self.rank(),
            world_size: self.shared.hall.world_size,
            kind,
        })
    }

    /// Two meetings: after the first all inputs are there, after the second all block sums.
    ///
    /// No third is needed before the slots are used again: a rank writes its input once it has left the
    /// second meeting, where nobody reads inputs any more, and its block sum after the next first meeting,
    /// when everyone has taken the old sums.
    fn sum<T: Shareable>(&self, shared: &Shared, slice: &mut [T], call: Call) -> Result<(), ErrorKind> {
        let (rank, world_size) = (self.rank() as usize, shared.hall.world_size as usize);
        let Slots { inputs, sums } = T::slots(shared);
        put(&inputs[rank], slice);
        shared.meet(self.rank(), call)?;
        let block =
            block_start(slice.len(), world_size, rank)..block_start(slice.len(), world_size, rank + 1);
        {
            let mut sum = sums[rank].write().unwrap_or_else(PoisonError::into_inner);
            sum.resize(block.len(), T::default());
            let inputs: Vec<_> =
                inputs.iter().map(|input| input.read().unwrap_or_else(PoisonError::into_inner)).collect();
            sum_in_rank_order(&mut sum, inputs.iter().map(|input| &input[block.clone()]));
        }
        shared.meet(self.rank(), call)?;
        for (owner, sum) in sums.iter().enumerate() {
            let start = block_start(slice.len(), world_size, owner);
            let sum = sum.read().unwrap_or_else(PoisonError::into_inner);
            slice[start..][..sum.len()].copy_from_slice(&sum);
        }
        Ok(())
    }

    fn copy_from_root<T: Shareable>(
        &self,
        shared: &Shared,
        slice: &mut [T],
        root: u32,
        call: Call,
    ) -> Result<(), ErrorKind> {
        let slot = &T::slots(shared).inputs[root as usize];
        if self.rank() == root {
            put(slot, slice);
        }
        shared.meet(self.rank(), call)?;
        if self.rank() != root {
            slice.copy_from_slice(&slot.read().unwrap_or_else(PoisonError::into_inner));
        }
        shared.meet(self.rank(), call)
    }
}

impl Collectives for ThreadRank {
    fn rank(&self) -> u32 {
        self.member.rank
    }

    fn world_size(&self) -> u32 {
        self.shared.hall.world_size
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        let call = Call::all_reduce_sum(&buffer);
        self.operate(call, |shared| with_slice!(buffer, slice => self.sum(shared, slice, call)))
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        let call = Call::broadcast(&buffer, root);
        self.operate(call, |shared| {
            if root >= shared.hall.world_size {
                return Err(ErrorKind::NoSuchRoot { root });
            }
            with_slice!(buffer, slice => self.copy_from_root(shared, slice, root, call))
        })
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let call = Call::plain(Operation::AllGather);
        self.operate(call, |shared| {
            put(&shared.u8.inputs[self.rank() as usize], bytes);
            shared.meet(self.rank(), call)?;
            let inputs = shared.u8.inputs.iter();
            let all =
                inputs.map(|slot| slot.read().unwrap_or_else(PoisonError::into_inner).clone()).collect();
            shared.meet(self.rank(), call)?;
            Ok(all)
        })
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let call = Call::plain(Operation::Barrier);
        self.operate(call, |shared| shared.meet(self.rank(), call))
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        let call = Call::plain(Operation::Lane);
        self.operate(call, |shared| {
            let rank = self.rank();
            put(&shared.u8.inputs[rank as usize], name.as_bytes());
            shared.meet(rank, call)?;
            let names: Vec<_> = shared.u8.inputs.iter().map(read).collect();
            if let Some(second) = names.iter().position(|other| **other != *names[0]) {
                let named = |rank: usize| format!("lane {}", String::from_utf8_lossy(&names[rank]));
                let kind = ErrorKind::Disagreement {
                    first: 0,
                    first_call: named(0),
                    second: second as u32,
                    second_call: named(second),
                };
                return Err(shared.hall.break_up(&mut shared.hall.lock(), kind));
            }
            drop(names);
            // No third meeting is needed: rank 0 writes here again after the next one, when everyone has read.
            if rank == 0 {
                *lock(&shared.opened) = Some(Shared::new(&shared.hall, Some(name.to_owned())));
            }
            shared.meet(rank, call)?;
            let opened = lock(&shared.opened).clone();
            let Some(opened) = opened else { unreachable!("rank 0 opened the lane before the meeting") };
            let lane = ThreadRank::new(Arc::clone(&self.member), opened);
            lock(&self.member.lanes).push((name.to_owned(), Arc::clone(&lane.turn)));
            Ok(Arc::new(lane) as Arc<dyn Collectives>)
        })
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        let call = Call::plain(Operation::Finish);
        self.operate(call, |shared| {
            if shared.name.is_some() {
                return Err(ErrorKind::OnLane);
            }
            let lanes = lock(&self.member.lanes);
            let mut turns = Vec::new();
            for (name, turn) in lanes.iter() {
                turns.push(turn.try_lock().map_err(|_| ErrorKind::LaneInUse { lane: name.clone() })?);
            }
            shared.meet(self.rank(), call)?;
            self.member.finished.store(true, Ordering::Relaxed);
            Ok(())
        })
    }

    /// Fails the group and its lanes for all ranks and unwinds this thread with an [`Aborted`], without a panic
    /// message.
    fn abort(&self, code: i32) -> ! {
        let reason = format!("aborted with code {code}");
        let mut state = self.shared.hall.lock();
        self.shared.hall.break_up(&mut state, ErrorKind::PeerFailed { rank: self.rank(), reason });
        drop(state);
        std::panic::resume_unwind(Box::new(Aborted { rank: self.rank(), code }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(slot: &RwLock<Vec<T>>) -> RwLockReadGuard<'_, Vec<T>> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        let hall = &*self.shared.hall;
        let mut state = hall.lock();
        let meeting = &mut state.meetings[self.shared.index];
        meeting.left[self.member.rank as usize] = true;
        let someone_waits = meeting.calls.iter().any(Option::is_some);
        if thread::panicking() {
            let reason = "its thread panicked".to_owned();
            hall.break_up(&mut state, ErrorKind::PeerFailed { rank: self.member.rank, reason });
        } else if someone_waits {
            hall.break_up(&mut state, ErrorKind::PeerLeft { rank: self.member.rank });
        }
    }
}

impl fmt::Debug for ThreadRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadRank")
            .field("rank", &self.member.rank)
            .field("world_size", &self.shared.hall.world_size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Values with rounding errors that depend on the order of a sum.
    fn awkward(rank: u32, index: usize) -> f32 {
        let bits = (u64::from(rank) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ (index as u64).wrapping_mul(0xd134_2543_de82_ef95);
        let mantissa = (bits >> 40) as f32 - 8_388_608.0;
        mantissa * 10f32.powi((bits % 13) as i32 - 6)
    }

    #[test]
    fn sums_have_the_same_bits_on_every_rank_and_follow_rank_order() {
        for world_size in 1..=4u32 {
            for len in [0usize, 1, 2, 3, 5, 1000, 70_001] {
                let results = run(world_size, PATIENCE, |rank| {
                    let mut values: Vec<f32> = (0..len).map(|i| awkward(rank.rank(), i)).collect();
                    rank.all_reduce_sum((&mut values).into()).unwrap();
                    values
                });
                for (i, sum) in results[0].iter().enumerate() {
                    let expected = (1..world_size).fold(awkward(0, i), |sum, rank| sum + awkward(rank, i));
                    assert_eq!(sum.to_bits(), expected.to_bits(), "element {i} of {len}, {world_size} ranks");
                }
                for other in &results[1..] {
                    assert!(other.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }

    #[test]
    fn many_operations_in_a_row_do_not_mix() {
        let results = run(3, PATIENCE, |rank| {
            let mut seen = Vec::new();
            for step in 0..200u64 {
                let mut sum = vec![step * (u64::from(rank.rank()) + 1); 1 + (step as usize % 7)];
                rank.all_reduce_sum((&mut sum).into()).unwrap();
                assert!(sum.iter().all(|x| *x == 6 * step));
                let mut word = vec![u64::from(rank.rank()) * 1000 + step];
                rank.broadcast((&mut word).into(), (step % 3) as u32).unwrap();
                assert_eq!(word[0], (step % 3) * 1000 + step);
                let all = rank
                    .all_gather(&vec![rank.rank() as u8; rank.rank() as usize + step as usize % 3])
                    .unwrap();
                for (r, bytes) in all.iter().enumerate() {
                    assert_eq!(*bytes, vec![r as u8; r + step as usize % 3]);
                }
                seen.push(word[0]);
            }
            rank.finish().unwrap();
            assert_eq!(rank.barrier().unwrap_err().kind, ErrorKind::Finished);
            seen
        });
        assert!(results.iter().all(|seen| *seen == results[0]));
    }

    #[test]
    fn lanes_do_not_wait_for_one_another() {
        for world_size in 2..=4 {
            let sums = run(world_size, PATIENCE, |rank| {
                let lane = rank.lane("gradients").unwrap();
                // Even ranks are in a call of the lane when odd ones are in one of the group.
                let lane_first = rank.rank() % 2 == 0;
                let (mut of_lane, mut of_group) = (vec![1f32; 1000], vec![2f32; 10]);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        thread::sleep(Duration::from_millis(if lane_first { 0 } else { 30 }));
                        lane.all_reduce_sum((&mut of_lane).into()).unwrap();
                    });
                    thread::sleep(Duration::from_millis(if lane_first { 30 } else { 0 }));
                    rank.all_reduce_sum((&mut of_group).into()).unwrap();
                });
                (of_lane[999], of_group[9])
            });
            assert!(sums.iter().all(|sum| *sum == (world_size as f32, 2.0 * world_size as f32)));
        }
    }

    #[test]
    fn abort_wakes_the_group_and_its_lanes() {
        let began = Instant::now();
        let mut ranks = group(2, PATIENCE).into_iter();
        let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
        let aborting = thread::spawn(move || -> () {
            let lane = second.lane("gradients").unwrap();
            thread::sleep(Duration::from_millis(30));
            lane.abort(4)
        });
        let lane = first.lane("gradients").unwrap();
        let kinds = thread::scope(|scope| {
            let waiting = scope.spawn(|| lane.barrier().unwrap_err().kind);
            [first.all_gather(b"x").unwrap_err().kind, waiting.join().unwrap()]
        });
        assert!(aborting.join().is_err());
        let reason = ErrorKind::PeerFailed { rank: 1, reason: "aborted with code 4".into() };
        assert_eq!(kinds, [reason.clone(), reason]);
        assert!(began.elapsed() < PATIENCE / 2);
    }

    #[test]
    fn a_lane_left_by_a_rank_does_not_leave_its_peers_waiting() {
        let results = run(2, PATIENCE, |rank| {
            let lane = rank.lane("gradients").unwrap();
            if rank.rank() == 1 {
                drop(lane);
                return rank.barrier();
            }
            lane.barrier()
        });
        assert_eq!(results[0].clone().unwrap_err().kind, ErrorKind::PeerLeft { rank: 1 });
        assert_eq!(results[1].clone().unwrap_err().kind, ErrorKind::PeerLeft { rank: 1 });
    }

    #[test]
    fn the_end_is_refused_while_a_lane_is_in_use() {
        let results = run(2, PATIENCE, |rank| {
            let lane = rank.lane("gradients").unwrap();
            if rank.rank() == 1 {
                rank.barrier().unwrap();
                lane.barrier().unwrap();
                rank.finish().unwrap();
                return lane.finish();
            }
            thread::scope(|scope| {
                let waiting = scope.spawn(|| lane.barrier());
                while lock(&rank.shared.hall.state).meetings[1].calls[0].is_none() {
                    thread::sleep(Duration::from_millis(1));
                }
                let refused = rank.finish().unwrap_err();
                assert_eq!(refused.kind, ErrorKind::LaneInUse { lane: "gradients".into() });
                rank.barrier().unwrap();
                waiting.join().unwrap().unwrap();
            });
            rank.finish().unwrap();
            lane.barrier()
        });
        assert!(results.iter().all(|result| result.as_ref().unwrap_err().kind == ErrorKind::Finished));
    }

    #[test]
    fn a_rank_that_returns_early_does_not_leave_its_peers_waiting() {
        let began = Instant::now();
        let results = run(3, PATIENCE, |rank| {
            rank.barrier()?;
            if rank.rank() == 1 { Ok(()) } else { rank.barrier() }
        });
        assert!(began.elapsed() < PATIENCE / 2);
        assert_eq!(results[1], Ok(()));
        for rank in [0, 2] {
            assert_eq!(results[rank].clone().unwrap_err().kind, ErrorKind::PeerLeft { rank: 1 });
        }
    }

    #[test]
    fn a_rank_that_panics_frees_its_peers_and_is_named() {
        let mut ranks = group(2, PATIENCE).into_iter();
        let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
        let peer = thread::spawn(move || first.barrier());
        // Unwinds with the rank in hand, as a failing test body would; no message on stderr.
        let failing = thread::spawn(move || {
            let _held = second;
            std::panic::resume_unwind(Box::new("boom"));
        });
        assert!(failing.join().is_err());
        let error = peer.join().unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "barrier (call 0) failed on rank 0 of 2: rank 1 failed: its thread panicked"
        );
    }

    #[test]
    fn abort_ends_the_group_with_its_code() {
        let mut ranks = group(2, PATIENCE).into_iter();
        let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
        let peer = thread::spawn(move || first.all_gather(b"x"));
        let aborting = thread::spawn(move || -> () { second.abort(4) });
        assert_eq!(aborting.join().unwrap_err().downcast_ref(), Some(&Aborted { rank: 1, code: 4 }));
        let kind = peer.join().unwrap().unwrap_err().kind;
        assert_eq!(kind, ErrorKind::PeerFailed { rank: 1, reason: "aborted with code 4".into() });
    }

    #[test]
    fn a_rank_that_never_comes_is_a_timeout_that_names_it() {
        let ranks = group(3, Duration::from_millis(50));
        let error = thread::scope(|scope| {
            let waiting: Vec<_> = ranks[..2].iter().map(|rank| scope.spawn(|| rank.barrier())).collect();
            waiting.into_iter().map(|thread| thread.join().unwrap().unwrap_err()).next().unwrap()
        });
        let ErrorKind::Timeout { missing, .. } = &error.kind else { panic!("{error}") };
        assert!(missing.contains(&2));
        // The group stays broken, so that a late rank does not wait for those that gave up.
        assert!(matches!(ranks[2].barrier().unwrap_err().kind, ErrorKind::Timeout { .. }));
    }

    #[test]
    fn different_calls_are_refused_by_name() {
        let results = run(2, PATIENCE, |rank| {
            if rank.rank() == 0 { rank.barrier() } else { rank.all_reduce_sum((&mut vec![0f32; 7]).into()) }
        });
        for result in results {
            let text = result.unwrap_err().to_string();
            assert!(text.ends_with("rank 0 calls barrier, rank 1 calls all-reduce of 7 f32"), "{text}");
        }
        let results =
            run(2, PATIENCE, |rank| rank.all_reduce_sum((&mut vec![0f64; 3 + rank.rank() as usize]).into()));
        assert!(results.iter().all(|result| matches!(
            result.as_ref().unwrap_err().kind,
            ErrorKind::Disagreement { first: 0, second: 1, .. }
        )));
    }

    #[test]
    fn the_root_must_exist() {
        let results = run(2, PATIENCE, |rank| rank.broadcast((&mut vec![0u8; 4]).into(), 2));
        assert!(results.iter().all(|r| r.as_ref().unwrap_err().kind == ErrorKind::NoSuchRoot { root: 2 }));
    }
}
