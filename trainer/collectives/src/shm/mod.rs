//! A decorator for ranks that share a machine: they exchange data through its memory, not through a network library.
//!
//! # What it does itself
//!
//! - **Short data** (up to 128 KiB a rank): each rank copies its own where all can read it, and adds up what it reads.
//!   One meeting a call.
//! - **Sums of [memory](Collectives::memory) that the group gave out**: every rank sees that of all others, so that a sum is
//!   read, added and written where it is needed, with no copy between. Each rank adds up its share, in chunks, then helps
//!   with what is left: one that the machine gives no time to does not hold up the others.
//! - **Everything else** is left to the group it decorates, which also sets it up, ends and aborts it.
//!
//! Sums are the same bits as everywhere: each element is added in rank order.
//!
//! # How it waits
//!
//! A rank that waits looks again at once for a while (if the machine has a core for each rank), then sleeps until the
//! last rank to arrive wakes it (`futex(2)`). It gives up after its patience with an error that names the ranks that did
//! not come; nothing of its memory is in anybody's hands then that would have to be waited for.
//!
//! Ranks that make different calls are told so at once, at no cost: what a rank calls is part of every meeting.

mod board;
mod segment;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use self::{
    board::{Board, Note, SLOT, Turn},
    segment::Segment,
};
use crate::{
    Buffer, CollectiveError, Collectives, ErrorKind, Operation,
    buffer::{Element, sum_in_rank_order, with_slice},
    checked::Call,
};

/// How long the group itself looks again at once before it sleeps; a lane, beside a thread that computes, does so shortly.
const SPIN: Duration = Duration::from_micros(100);
const SPIN_ON_LANE: Duration = Duration::from_micros(5);
/// Bytes of each rank that are summed at a time by one of them.
const CHUNK: usize = 128 << 10;
/// Elements that are summed at a time within that: they stay in the first-level cache until all ranks have them.
const TILE: usize = 2048;
/// To which the parts of ranks are rounded up, so that no page holds two ranks' memory.
const PAGE: usize = 4 << 10;

/// The ranks of a group that share a machine. See the [module documentation](self).
pub struct Shm {
    group: Arc<Group>,
    inner: Arc<dyn Collectives>,
    /// `None`: the group's own line of calls.
    lane: Option<String>,
    board: Board,
    turn: Arc<Mutex<Turn>>,
}

/// What all lines of calls share.
struct Group {
    patience: fn() -> Duration,
    /// Whether the machine has a core for each rank.
    has_cores: bool,
    finished: AtomicBool,
    /// What was given out, in the order of giving out.
    pieces: Mutex<Vec<Weak<Piece>>>,
    /// Name and turn of each lane.
    lanes: Mutex<Vec<(String, Arc<Mutex<Turn>>)>>,
}

/// Memory of one call of [`Collectives::memory`]: a part for each rank.
struct Piece {
    segment: Segment,
    rank: usize,
    /// Bytes of a part that may be used.
    len: usize,
    /// From the beginning of one part to the next.
    stride: usize,
}

impl Piece {
    fn part(&self, rank: usize) -> *mut u8 {
        self.segment.at(rank * self.stride)
    }

    /// Where in this rank's part `at` is, if `len` bytes from there on are inside.
    fn offset(&self, at: *const u8, len: usize) -> Option<usize> {
        let offset = (at as usize).checked_sub(self.part(self.rank) as usize)?;
        (offset <= self.len && len <= self.len - offset).then_some(offset)
    }
}

/// Memory whose sums over the ranks of a group are cheap; see [`Collectives::memory`]. It is zeroed at first.
///
/// Other ranks write to it in sums, and at no other time.
#[derive(Clone)]
pub struct SharedMemory(Arc<Piece>);

impl SharedMemory {
    /// The first byte, at the beginning of a cache line. All of it stays where it is while this value or a copy of it lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.part(self.0.rank)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it is no byte long.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes)", self.len())
    }
}

/// Why ranks cannot exchange data through memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the ranks share no memory: {0}")]
pub struct NotShared(String);

impl Shm {
    /// Over `inner`, when all its ranks share this machine's memory; else why not, the same on every rank. Each rank calls it
    /// at the same place among its calls. An operation waits for other ranks as long as `patience` says at its time.
    ///
    /// # Errors
    /// When `inner` fails.
    pub fn over(
        inner: Arc<dyn Collectives>,
        patience: fn() -> Duration,
    ) -> Result<Result<Shm, NotShared>, CollectiveError> {
        let world_size = inner.world_size() as usize;
        let segment = match Segment::open(&*inner, Board::bytes(world_size))? {
            Ok(segment) => segment,
            Err(reason) => return Ok(Err(NotShared(reason))),
        };
        let has_cores = cores(&*inner)? >= world_size;
        let group = Group {
            patience,
            has_cores,
            finished: AtomicBool::new(false),
            pieces: Mutex::default(),
            lanes: Mutex::default(),
        };
        Ok(Ok(Shm::new(Arc::new(group), inner, None, segment)))
    }

    fn new(group: Arc<Group>, inner: Arc<dyn Collectives>, lane: Option<String>, segment: Segment) -> Shm {
        let spin = match (group.has_cores, &lane) {
            (false, _) => Duration::ZERO,
            (true, None) => SPIN,
            (true, Some(_)) => SPIN_ON_LANE,
        };
        let board = Board::new(segment, inner.rank() as usize, inner.world_size() as usize, spin);
        Shm { group, inner, lane, board, turn: Arc::default() }
    }

    /// Waits for its turn and runs one operation.
    fn operate<R>(
        &self,
        call: Call,
        work: impl FnOnce(&mut Turn, Call, u64) -> Result<R, Failure>,
    ) -> Result<R, CollectiveError> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let number = turn.calls;
        let running = match self.group.finished.load(Ordering::Relaxed) {
            true => Err(ErrorKind::Finished.into()),
            false => Ok(()),
        };
        running.and_then(|()| work(&mut turn, call, number)).map_err(|failure| match failure {
            Failure::Own(kind) => CollectiveError {
                operation: call.operation,
                call: number,
                lane: self.lane.clone(),
                rank: self.rank(),
                world_size: self.world_size(),
                kind,
            },
            Failure::Inner(error) => error,
        })
    }

    fn meet<T: Element>(&self, turn: &mut Turn, note: Note, data: &[T]) -> Result<Vec<Note>, Failure> {
        Ok(self.board.meet(turn, note, data, (self.group.patience)())?)
    }

    /// Which piece of shared memory a slice is in, and where.
    fn find<T>(&self, slice: &[T]) -> Option<(Arc<Piece>, (u32, u32))> {
        let pieces = self.group.pieces();
        pieces.iter().enumerate().find_map(|(index, piece)| {
            let piece = piece.upgrade()?;
            let offset = piece.offset(slice.as_ptr().cast(), size_of_val(slice))?;
            // In elements, for room; a larger one is not summed in place.
            let place = (index as u32, u32::try_from(offset / size_of::<T>()).ok()?);
            Some((piece, place))
        })
    }

    fn sum<T: Element>(
        &self,
        turn: &mut Turn,
        call: Call,
        number: u64,
        slice: &mut [T],
    ) -> Result<(), Failure>
    where
        for<'a> Buffer<'a>: From<&'a mut [T]>,
    {
        let len = slice.len();
        let is_short = size_of_val(slice) <= SLOT;
        let found = if is_short { None } else { self.find(slice) };
        let mut note = Note::new(call, number, size_of_val(slice));
        note.place = found.as_ref().map(|(_, place)| *place);
        let notes = self.meet(turn, note, if is_short { &*slice } else { &[] })?;
        if is_short {
            sum_in_rank_order(slice, (0..notes.len()).map(|rank| self.board.slot(rank, number, len)));
            return Ok(());
        }
        match found {
            Some((piece, (_, offset))) if notes.iter().all(|other| other.place == note.place) => {
                self.sum_in_place::<T>(turn, &piece, offset as usize, len)
            }
            _ => Ok(self.inner.all_reduce_sum(slice.into())?),
        }
    }

    fn sum_in_place<T: Element>(
        &self,
        turn: &mut Turn,
        piece: &Piece,
        offset: usize,
        len: usize,
    ) -> Result<(), Failure> {
        let per_chunk = CHUNK / size_of::<T>();
        let parts: Vec<*mut T> = (0..self.world_size() as usize)
            // SAFETY: the offset is inside each rank's part, as all have said of their own.
            .map(|rank| unsafe { piece.part(rank).cast::<T>().add(offset) })
            .collect();
        let work = |chunk: usize| {
            let begin = chunk * per_chunk;
            // SAFETY: all ranks have met, so that their data are complete, and wait until all chunks are done; each chunk is
            // given to one of them, once.
            unsafe { sum_to_all(&parts, begin, per_chunk.min(len - begin)) }
        };
        Ok(self.board.share(turn, len.div_ceil(per_chunk), (self.group.patience)(), work)?)
    }
}

/// Elements `begin..begin + len` of every part become their sum.
///
/// # Safety
/// All parts are that long, and nobody else touches those elements.
unsafe fn sum_to_all<T: Element>(parts: &[*mut T], begin: usize, len: usize) {
    let mut sum = [T::default(); TILE];
    for tile in (begin..begin + len).step_by(TILE) {
        let here = TILE.min(begin + len - tile);
        let sum = &mut sum[..here];
        // SAFETY: by this function's contract.
        let read = |part: &*mut T| unsafe { std::slice::from_raw_parts(part.add(tile), here) };
        sum_in_rank_order(sum, parts.iter().map(read));
        for part in parts {
            // SAFETY: as above; the sum is this function's own.
            unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), part.add(tile), here) };
        }
    }
}

impl Group {
    fn pieces(&self) -> MutexGuard<'_, Vec<Weak<Piece>>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lanes(&self) -> MutexGuard<'_, Vec<(String, Arc<Mutex<Turn>>)>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where an operation failed: in here, or in what is decorated.
enum Failure {
    Own(ErrorKind),
    Inner(CollectiveError),
}

impl From<ErrorKind> for Failure {
    fn from(kind: ErrorKind) -> Self {
        Failure::Own(kind)
    }
}

impl From<CollectiveError> for Failure {
    fn from(error: CollectiveError) -> Self {
        Failure::Inner(error)
    }
}

/// The cores that this thread may run on, a bit each; none are set where the system does not say.
#[must_use]
pub fn core_mask() -> Vec<u8> {
    // SAFETY: a plain mask of bits, for which zeros are the empty set.
    let mut mask: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let bytes = size_of_val(&mask);
    // SAFETY: the mask is as long as said.
    unsafe { libc::sched_getaffinity(0, bytes, &raw mut mask) };
    // SAFETY: initialised above, and any bytes can be read as such.
    unsafe { std::slice::from_raw_parts((&raw const mask).cast::<u8>(), bytes) }.to_vec()
}

/// Cores that the ranks of a group may use, all together.
fn cores(group: &dyn Collectives) -> Result<usize, CollectiveError> {
    let mut own = core_mask();
    let bytes = own.len();
    let count = |mask: &[u8]| mask.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
    // Fewer where a quota allows less time than the mask does cores.
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    own.push(u8::from(usable < count(&own)));
    own.extend((usable as u64).to_le_bytes());
    let mut all = vec![0u8; bytes];
    let mut quota = usize::MAX;
    for of_rank in group.all_gather(&own)? {
        all.iter_mut().zip(&of_rank).for_each(|(all, byte)| *all |= byte);
        if let [1, usable @ ..] = &of_rank[bytes..]
            && let Ok(usable) = usable.try_into()
        {
            quota = quota.min(u64::from_le_bytes(usable) as usize);
        }
    }
    Ok(count(&all).min(quota))
}

impl Collectives for Shm {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.operate(
            Call::all_reduce_sum(&buffer),
            |turn, call, number| with_slice!(buffer, slice => self.sum(turn, call, number, slice)),
        )
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.operate(Call::broadcast(&buffer, root), |turn, call, number| {
            if root >= self.world_size() {
                return Err(ErrorKind::NoSuchRoot { root }.into());
            }
            with_slice!(buffer, slice => {
                let (len, bytes) = (slice.len(), size_of_val(slice));
                let is_root = root == self.rank() && bytes <= SLOT;
                self.meet(turn, Note::new(call, number, bytes), if is_root { &*slice } else { &[] })?;
                if bytes > SLOT {
                    return Ok(self.inner.broadcast(slice.into(), root)?);
                }
                slice.copy_from_slice(self.board.slot(root as usize, number, len));
                Ok(())
            })
        })
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.operate(Call::plain(Operation::AllGather), |turn, call, number| {
            let notes = self.meet(turn, Note::new(call, number, bytes.len()), bytes)?;
            if notes.iter().any(|note| note.len > SLOT) {
                return Ok(self.inner.all_gather(bytes)?);
            }
            let parts = notes.iter().enumerate().map(|(rank, note)| self.board.slot(rank, number, note.len));
            Ok(parts.map(<[u8]>::to_vec).collect())
        })
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.operate(Call::plain(Operation::Barrier), |turn, call, number| {
            self.meet::<u8>(turn, Note::new(call, number, 0), &[]).map(drop)
        })
    }

    fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
        let (rank, world_size) = (self.rank() as usize, self.world_size() as usize);
        let stride = bytes.saturating_add(PAGE).div_ceil(PAGE) * PAGE;
        let Ok(segment) = Segment::open(self, stride.saturating_mul(world_size))? else { return Ok(None) };
        let piece = Arc::new(Piece { segment, rank, len: bytes, stride });
        self.group.pieces().push(Arc::downgrade(&piece));
        Ok(Some(SharedMemory(piece)))
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        self.operate(Call::plain(Operation::Lane), |turn, call, number| {
            self.meet::<u8>(turn, Note::new(call, number, 0), &[]).map(drop)
        })?;
        let inner = self.inner.lane(name)?;
        let Ok(segment) = Segment::open(&*inner, Board::bytes(self.world_size() as usize))? else {
            return Ok(inner);
        };
        let lane = Shm::new(self.group.clone(), inner, Some(name.to_owned()), segment);
        self.group.lanes().push((name.to_owned(), lane.turn.clone()));
        Ok(Arc::new(lane))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.operate(Call::plain(Operation::Finish), |_, _, _| {
            if self.lane.is_some() {
                return Err(ErrorKind::OnLane.into());
            }
            let lanes = self.group.lanes();
            let mut turns = Vec::new();
            for (lane, turn) in lanes.iter() {
                let busy = || ErrorKind::LaneInUse { lane: lane.clone() };
                turns.push(turn.try_lock().map_err(|_| busy())?);
            }
            self.inner.finish()?;
            self.group.finished.store(true, Ordering::Relaxed);
            Ok(())
        })
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

impl fmt::Debug for Shm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shm")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
