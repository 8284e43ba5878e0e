//! MPI through rsmpi: its start-up and its bindings. Its safe operations are not used, because they throw
//! MPI's return codes away.

#[path = "requests.rs"]
mod requests;

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    mem::ManuallyDrop,
    sync::{
        Arc, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use ::mpi::{
    Threading,
    environment::initialize_with_threading,
    ffi,
    traits::{AsRaw, Communicator},
};

use self::requests::{Account, Comm, Library, Message, Polling, Posting, Requests};
use super::PANIC_EXIT_CODE;
use crate::{
    Buffer, CollectiveError, Collectives, ErrorKind, Operation, StartError,
    buffer::{Element, block_start, sum_around, sum_in_rank_order, with_slice},
};

/// An all-reduce of at most this many bytes is gathered whole: one round of messages instead of two. Between two ranks
/// no more bytes travel that way, so it serves longer ones.
const fn short_bytes(world_size: usize) -> usize {
    if world_size == 2 { 16 << 10 } else { 4 << 10 }
}
/// In a larger world than this, short messages are gathered by MPI's own algorithm, which needs fewer steps than
/// one message to every rank.
const FEW_RANKS: usize = 8;
/// Longer all-reduces go in pieces of which each rank adds up a block of at most this many bytes: large
/// enough for full bandwidth, small enough that a block and its parts stay in the cache between receiving,
/// adding and sending.
const BLOCK_BYTES: usize = 128 << 10;
/// The same where each rank adds up at most [`EAGER_UP_TO`] bytes in all. Messages of this length leave at once, without
/// asking the receiver first (UCX does so up to about 8100 bytes unless told otherwise), which costs a
/// copy and saves a round trip.
const EAGER_BLOCK_BYTES: usize = 8000;
const EAGER_UP_TO: usize = 256 << 10;
/// How many pieces are under way at once: while one is added up, MPI moves the next.
const IN_FLIGHT: usize = 4;
/// Broadcasts go in pieces of this size, which fits MPI's `int` counts whatever the element.
const BROADCAST_BYTES: usize = 256 << 20;
/// All ranks together hand over at most this many bytes in one round of an all-gather.
const GATHER_BYTES: usize = 256 << 20;
/// The tags of messages; those of one tag are matched by their order.
const PART_TAG: c_int = 0;
const SUM_TAG: c_int = 1;
const BARRIER_TAG: c_int = 2;
/// How long mpirun gets to read what this rank printed last, its error most likely: it drops what it has not
/// read when the world is aborted (seen with MPICH's Hydra).
const OUTPUT_PATIENCE: Duration = Duration::from_millis(200);
/// How long `MPI_Abort` may take before the process ends without its help.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// Whether MPI is between start and end, so that a panic has to end the world. Read by the panic hook.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// This process's place in the world that mpirun started. See the [module documentation](super).
pub struct Mpi {
    world: Arc<World>,
    line: Arc<Line>,
}

/// What all lines of calls of this process share.
struct World {
    rank: u32,
    world_size: u32,
    started_by: ThreadId,
    library: Library,
    /// In the order of their making, the first one left out; freed at the end.
    lanes: Mutex<Vec<Arc<Line>>>,
}

/// One line of calls: the world's own, or a lane.
struct Line {
    /// `None`: the world's own.
    name: Option<String>,
    comm: Comm,
    polling: Polling,
    calls: AtomicU64,
    /// Held during an operation: one at a time.
    turn: Mutex<Scratch>,
}

/// What all ranks sent of the pieces at hand, in rank order; kept from call to call.
#[derive(Default)]
struct Scratch {
    f32: Vec<f32>,
    f64: Vec<f64>,
    u64: Vec<u64>,
    u8: Vec<u8>,
}

/// A type that both this crate and MPI know.
trait MpiElement: Element {
    fn datatype() -> ffi::MPI_Datatype;
    fn parts(scratch: &mut Scratch) -> &mut Vec<Self>;
}

macro_rules! mpi_element {
    ($type:ident, $constant:ident) => {
        impl MpiElement for $type {
            fn datatype() -> ffi::MPI_Datatype {
                // SAFETY: a constant of the C library, never written.
                unsafe { ffi::$constant }
            }
            fn parts(scratch: &mut Scratch) -> &mut Vec<Self> {
                &mut scratch.$type
            }
        }
    };
}

mpi_element!(f32, RSMPI_FLOAT);
mpi_element!(f64, RSMPI_DOUBLE);
mpi_element!(u64, RSMPI_UINT64_T);
mpi_element!(u8, RSMPI_UINT8_T);

fn comm_world() -> ffi::MPI_Comm {
    // SAFETY: a constant of the C library, never written.
    unsafe { ffi::RSMPI_COMM_WORLD }
}

impl Mpi {
    /// Starts MPI in this process and installs the panic hook.
    ///
    /// `expected` is the rank and world size that the launcher's environment variables give, if there are
    /// any: MPI must agree with them. (An MPI library started by a launcher it does not understand silently
    /// makes each rank a world of its own, and N ranks then train N networks.)
    ///
    /// # Errors
    /// See [`StartError`]. MPI cannot be started again in this process then; end it with a code other than 0.
    pub fn initialize(expected: Option<(u32, u32)>) -> Result<Mpi, StartError> {
        let (universe, granted) =
            initialize_with_threading(Threading::Serialized).ok_or(StartError::AlreadyStarted)?;
        let universe = ManuallyDrop::new(universe);
        let comm = universe.world();
        let (mpi_rank, mpi_world) = (comm.rank() as u32, comm.size() as u32);
        if let Some((environment_rank, environment_world)) = expected
            && (environment_rank, environment_world) != (mpi_rank, mpi_world)
        {
            return Err(StartError::WorldMismatch {
                environment_rank,
                environment_world,
                mpi_rank,
                mpi_world,
            });
        }
        if granted < Threading::Serialized {
            return Err(StartError::ThreadLevel { granted: format!("{granted:?}") });
        }
        // SAFETY: MPI is started and the communicator is the world; from here on its operations return their
        // error code.
        let code = unsafe { ffi::MPI_Comm_set_errhandler(comm.as_raw(), ffi::RSMPI_ERRORS_RETURN) };
        if code != ffi::MPI_SUCCESS as c_int {
            return Err(StartError::Mpi { code, text: error_text(code) });
        }
        RUNNING.store(true, Ordering::SeqCst);
        abort_on_panic();
        let world = World {
            rank: mpi_rank,
            world_size: mpi_world,
            started_by: thread::current().id(),
            library: Library::new(universe),
            lanes: Mutex::new(Vec::new()),
        };
        let polling = Polling::foreground(ranks_here(comm_world())?);
        let line = Line::new(None, Comm(comm_world()), polling);
        Ok(Mpi { world: Arc::new(world), line: Arc::new(line) })
    }

    /// Waits for its turn and runs one operation.
    fn operate<R>(
        &self,
        operation: Operation,
        work: impl FnOnce(&mut Scratch, &Account<'_>) -> Result<R, ErrorKind>,
    ) -> Result<R, CollectiveError> {
        let mut scratch = self.line.turn();
        let call = self.line.calls.fetch_add(1, Ordering::Relaxed);
        let failed = |kind| CollectiveError {
            operation,
            call,
            lane: self.line.name.clone(),
            rank: self.world.rank,
            world_size: self.world.world_size,
            kind,
        };
        // Also for those that have nothing to send.
        let running = if self.world.library.lock().is_some() { Ok(()) } else { Err(ErrorKind::Finished) };
        let report = |kind: &ErrorKind| failed(kind.clone()).to_string();
        running.and_then(|()| work(&mut scratch, &Account::new(&report))).map_err(failed)
    }

    fn requests<'a>(&'a self, account: &'a Account<'a>) -> Requests<'a> {
        Requests::new(&self.world.library, self.line.comm, self.line.polling, account)
    }

    fn sum<T: MpiElement>(
        &self,
        scratch: &mut Scratch,
        slice: &mut [T],
        account: &Account<'_>,
    ) -> Result<(), ErrorKind> {
        let world_size = self.world.world_size as usize;
        if slice.is_empty() || world_size == 1 {
            return Ok(());
        }
        let parts = T::parts(scratch);
        if size_of_val(slice) <= short_bytes(world_size) {
            self.sum_short(slice, parts, account)
        } else {
            self.sum_long(slice, parts, account)
        }
    }

    /// Everyone receives everything and adds it up.
    fn sum_short<T: MpiElement>(
        &self,
        slice: &mut [T],
        parts: &mut Vec<T>,
        account: &Account<'_>,
    ) -> Result<(), ErrorKind> {
        let (rank, world_size) = (self.world.rank as usize, self.world.world_size as usize);
        let len = slice.len();
        grow(parts, len * world_size);
        let (own, all) = (slice.as_mut_ptr(), parts.as_mut_ptr());
        let mut requests = self.requests(account);
        if world_size <= FEW_RANKS {
            // Pieces that leave at once.
            let longest = EAGER_BLOCK_BYTES / size_of::<T>();
            let pieces = || (0..len).step_by(longest).map(|start| (start, longest.min(len - start)));
            requests.post(|posting| {
                for peer in (1..world_size).map(|round| (rank + world_size - round) % world_size) {
                    for (start, len_of) in pieces() {
                        // SAFETY: `parts` has room for `world_size` times the slice; both are borrowed until after
                        // `wait`.
                        unsafe {
                            let at = all.add(peer * len + start);
                            posting.receive(Message { at, len: len_of, peer, tag: PART_TAG })?;
                        }
                    }
                }
                for peer in (1..world_size).map(|round| (rank + round) % world_size) {
                    for (start, len_of) in pieces() {
                        // SAFETY: as above; the slice is only read.
                        unsafe {
                            let at = own.add(start);
                            posting.send(Message { at, len: len_of, peer, tag: PART_TAG })?;
                        }
                    }
                }
                Ok(())
            })?;
            requests.wait()?;
            let (before, after) = parts[..len * world_size].split_at_mut(rank * len);
            sum_around(slice, before, &after[len..]);
        } else {
            let (count, datatype) = (len as c_int, T::datatype());
            // SAFETY: as above; the count is small.
            unsafe {
                requests.start(|comm, request| {
                    ffi::MPI_Iallgather(
                        own.cast(),
                        count,
                        datatype,
                        all.cast(),
                        count,
                        datatype,
                        comm,
                        request,
                    )
                })?;
            }
            requests.wait()?;
            sum_in_rank_order(slice, parts[..len * world_size].chunks_exact(len));
        }
        Ok(())
    }

    /// Every rank sums one block of each piece over all ranks and hands the sum to all. Several pieces are under
    /// way: the parts of the next ones arrive while one is added up, and sums are handed on meanwhile.
    fn sum_long<T: MpiElement>(
        &self,
        slice: &mut [T],
        parts: &mut Vec<T>,
        account: &Account<'_>,
    ) -> Result<(), ErrorKind> {
        let (rank, world_size) = (self.world.rank as usize, self.world.world_size as usize);
        let len = slice.len();
        let eager = size_of_val(slice) <= EAGER_UP_TO * world_size;
        let longest_block = if eager { EAGER_BLOCK_BYTES } else { BLOCK_BYTES } / size_of::<T>();
        let pieces = len.div_ceil(longest_block * world_size);
        let depth = IN_FLIGHT.min(pieces);
        let slot_len = longest_block * world_size;
        grow(parts, slot_len * depth);
        // All accesses below go through these two: MPI holds parts of both at any time.
        let (values, parts) = (slice.as_mut_ptr(), parts.as_mut_ptr());
        let block = |piece: usize, index: usize| {
            let begin = block_start(len, pieces, piece);
            let piece_len = block_start(len, pieces, piece + 1) - begin;
            let start = block_start(piece_len, world_size, index);
            (begin + start, block_start(piece_len, world_size, index + 1) - start)
        };
        // In round k everyone sends to the k-th rank after it and receives from the k-th before it: no rank
        // is a bottleneck.
        let partners = (1..world_size)
            .map(|round| ((rank + round) % world_size, (rank + world_size - round) % world_size));
        let mut scattered: [Requests<'_>; IN_FLIGHT] = std::array::from_fn(|_| self.requests(account));
        let mut gathered: [Requests<'_>; IN_FLIGHT] = std::array::from_fn(|_| self.requests(account));
        let part = |piece: usize, from: usize| {
            let own_len = block(piece, rank).1;
            (piece % depth * slot_len + from * own_len, own_len)
        };
        let scatter = |piece: usize, posting: &mut Posting<'_>| -> Result<(), ErrorKind> {
            for (to, from) in partners.clone() {
                let (start, len) = part(piece, from);
                // SAFETY: a block is at most `longest_block` long, so that all parts of it lie inside the slot, which
                // is free: what it held was added up before. The memory is borrowed until the requests are done.
                unsafe { posting.receive(Message { at: parts.add(start), len, peer: from, tag: PART_TAG })? };
                let (start, len) = block(piece, to);
                // SAFETY: inside the slice; nobody writes to that block before these requests are complete.
                unsafe { posting.send(Message { at: values.add(start), len, peer: to, tag: PART_TAG })? };
            }
            Ok(())
        };
        let gather = |piece: usize, posting: &mut Posting<'_>| -> Result<(), ErrorKind> {
            for (to, from) in partners.clone() {
                let (start, len) = block(piece, from);
                // SAFETY: inside the slice; that block has been sent, and is not read again.
                unsafe { posting.receive(Message { at: values.add(start), len, peer: from, tag: SUM_TAG })? };
                let (start, len) = block(piece, rank);
                // SAFETY: inside the slice; the block holds its sum and is not written any more.
                unsafe { posting.send(Message { at: values.add(start), len, peer: to, tag: SUM_TAG })? };
            }
            Ok(())
        };
        for (piece, requests) in scattered[..depth - 1].iter_mut().enumerate() {
            requests.post(|posting| scatter(piece, posting))?;
        }
        for piece in 0..pieces {
            let ahead = piece + depth - 1;
            if ahead < pieces {
                scattered[ahead % depth].post(|posting| scatter(ahead, posting))?;
            }
            scattered[piece % depth].wait()?;
            let ((start, len), slot) = (block(piece, rank), part(piece, 0).0);
            // SAFETY: MPI is done with this slot, and never had this rank's own block. No other reference to
            // either exists; the two do not overlap.
            let (own, all) = unsafe {
                (
                    std::slice::from_raw_parts_mut(values.add(start), len),
                    std::slice::from_raw_parts_mut(parts.add(slot), len * world_size),
                )
            };
            let (before, after) = all.split_at_mut(rank * len);
            sum_around(own, before, &after[len..]);
            // The sums of `depth` pieces ago have long arrived, most often.
            gathered[piece % depth].wait()?;
            gathered[piece % depth].post(|posting| gather(piece, posting))?;
        }
        gathered.iter_mut().try_for_each(Requests::wait)
    }

    fn broadcast_slice<T: MpiElement>(
        &self,
        slice: &mut [T],
        root: u32,
        account: &Account<'_>,
    ) -> Result<(), ErrorKind> {
        for piece in slice.chunks_mut(BROADCAST_BYTES / size_of::<T>()) {
            let (at, count) = (piece.as_mut_ptr().cast::<c_void>(), piece.len() as c_int);
            let mut requests = self.requests(account);
            // SAFETY: the count is the length of the piece, which fits an int; the datatype is that of T. The
            // piece is borrowed until after `wait`.
            unsafe {
                requests.start(|comm, request| {
                    ffi::MPI_Ibcast(at, count, T::datatype(), root as c_int, comm, request)
                })?;
            }
            requests.wait()?;
        }
        Ok(())
    }

    /// Lengths first, then the bytes, in rounds that keep every count and offset within an `int`.
    fn gather(&self, bytes: &[u8], account: &Account<'_>) -> Result<Vec<Vec<u8>>, ErrorKind> {
        let world_size = self.world.world_size as usize;
        let own_len = bytes.len() as u64;
        let mut lens = vec![0u64; world_size];
        let (from, to) = ((&raw const own_len).cast::<c_void>(), lens.as_mut_ptr().cast::<c_void>());
        let mut requests = self.requests(account);
        // SAFETY: one u64 from each rank into `world_size` of them; both live until after `wait`.
        unsafe {
            requests.start(|comm, request| {
                ffi::MPI_Iallgather(from, 1, u64::datatype(), to, 1, u64::datatype(), comm, request)
            })?;
        }
        requests.wait()?;
        drop(requests);
        let per_round = (GATHER_BYTES / world_size).max(1);
        let longest = lens.iter().copied().max().unwrap_or(0) as usize;
        let mut gathered = vec![Vec::new(); world_size];
        let mut round = Vec::new();
        for begin in (0..longest).step_by(per_round) {
            let part = |len: usize| len.min(begin + per_round).saturating_sub(begin);
            let counts: Vec<c_int> = lens.iter().map(|&len| part(len as usize) as c_int).collect();
            let starts: Vec<c_int> = counts
                .iter()
                .scan(0, |next, &count| {
                    let start = *next;
                    *next += count;
                    Some(start)
                })
                .collect();
            round.resize(counts.iter().map(|&count| count as usize).sum(), 0u8);
            let own = &bytes[begin.min(bytes.len())..][..part(bytes.len())];
            let (from, to) = (own.as_ptr().cast::<c_void>(), round.as_mut_ptr().cast::<c_void>());
            let (counts_at, starts_at) = (counts.as_ptr(), starts.as_ptr());
            let mut requests = self.requests(account);
            // SAFETY: `own` is what this rank announced for the round; counts and starts lie inside `round`; no
            // overlap. All of them live until after `wait`.
            unsafe {
                requests.start(|comm, request| {
                    ffi::MPI_Iallgatherv(
                        from,
                        own.len() as c_int,
                        u8::datatype(),
                        to,
                        counts_at,
                        starts_at,
                        u8::datatype(),
                        comm,
                        request,
                    )
                })?;
            }
            requests.wait()?;
            drop(requests);
            for (whole, (&start, &count)) in gathered.iter_mut().zip(starts.iter().zip(&counts)) {
                whole.extend_from_slice(&round[start as usize..][..count as usize]);
            }
        }
        Ok(gathered)
    }

    /// Rounds of empty messages over distances 1, 2, 4, …: after the last, every rank has heard, directly or
    /// not, of every other (Hensgen, Finkel and Manber 1988: the dissemination barrier).
    fn meet(&self, account: &Account<'_>) -> Result<(), ErrorKind> {
        let (rank, world_size) = (self.world.rank as usize, self.world.world_size as usize);
        let mut distance = 1;
        let nothing = std::ptr::dangling_mut::<u8>();
        while distance < world_size {
            let (to, from) = ((rank + distance) % world_size, (rank + world_size - distance) % world_size);
            let mut requests = self.requests(account);
            requests.post(|posting| {
                // SAFETY: no memory is named.
                unsafe {
                    posting.receive(Message { at: nothing, len: 0, peer: from, tag: BARRIER_TAG })?;
                    posting.send(Message { at: nothing, len: 0, peer: to, tag: BARRIER_TAG })
                }
            })?;
            requests.wait()?;
            distance *= 2;
        }
        Ok(())
    }

    /// Duplicates the communicator, so that nothing sent on the new line meets what is sent on this one.
    fn branch(&self, name: &str, account: &Account<'_>) -> Result<Mpi, ErrorKind> {
        // SAFETY: a constant of the C library, never written.
        let mut comm = unsafe { ffi::RSMPI_COMM_NULL };
        let at = &raw mut comm;
        let mut requests = self.requests(account);
        // SAFETY: `comm` lives until after `wait`.
        unsafe { requests.start(|from, request| ffi::MPI_Comm_idup(from, at, request))? };
        requests.wait()?;
        drop(requests);
        let line = Arc::new(Line::new(Some(name.to_owned()), Comm(comm), Polling::background()));
        self.world.lanes().push(Arc::clone(&line));
        Ok(Mpi { world: Arc::clone(&self.world), line })
    }

    fn shut_down(&self) -> Result<(), ErrorKind> {
        if self.line.name.is_some() {
            return Err(ErrorKind::OnLane);
        }
        if thread::current().id() != self.world.started_by {
            return Err(ErrorKind::WrongThread);
        }
        let lanes = self.world.lanes();
        let mut turns = Vec::new();
        for lane in lanes.iter() {
            let busy = || ErrorKind::LaneInUse { lane: lane.name.clone().unwrap_or_default() };
            turns.push(lane.turn.try_lock().map_err(|_| busy())?);
        }
        let mut library = self.world.library.lock();
        for lane in lanes.iter() {
            let mut comm = lane.comm.0;
            // SAFETY: made by MPI_Comm_idup, in use by nobody, freed once: the library is shut down next.
            check(unsafe { ffi::MPI_Comm_free(&raw mut comm) })?;
        }
        let universe = library.take();
        RUNNING.store(false, Ordering::SeqCst);
        drop(universe.map(ManuallyDrop::into_inner));
        Ok(())
    }
}

impl World {
    fn lanes(&self) -> MutexGuard<'_, Vec<Arc<Line>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn new(name: Option<String>, comm: Comm, polling: Polling) -> Self {
        Line { name, comm, polling, calls: AtomicU64::new(0), turn: Mutex::default() }
    }

    fn turn(&self) -> MutexGuard<'_, Scratch> {
        // A panic while the lock was held has ended the world already.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many ranks run on this machine.
fn ranks_here(comm: ffi::MPI_Comm) -> Result<usize, StartError> {
    let mut ranks: c_int = 1;
    // SAFETY: MPI is started; all ranks call this at their start. What is made is freed here.
    let code = unsafe {
        let mut here = ffi::RSMPI_COMM_NULL;
        match ffi::MPI_Comm_split_type(
            comm,
            ffi::RSMPI_COMM_TYPE_SHARED,
            0,
            ffi::RSMPI_INFO_NULL,
            &raw mut here,
        ) {
            0 => match ffi::MPI_Comm_size(here, &raw mut ranks) {
                0 => ffi::MPI_Comm_free(&raw mut here),
                code => code,
            },
            code => code,
        }
    };
    if code == ffi::MPI_SUCCESS as c_int {
        Ok(ranks as usize)
    } else {
        Err(StartError::Mpi { code, text: error_text(code) })
    }
}

/// Makes `scratch` at least `len` long; it never shrinks.
fn grow<T: Element>(scratch: &mut Vec<T>, len: usize) {
    if scratch.len() < len {
        scratch.resize(len, T::default());
    }
}

fn check(code: c_int) -> Result<(), ErrorKind> {
    if code == ffi::MPI_SUCCESS as c_int {
        Ok(())
    } else {
        Err(ErrorKind::Mpi { code, text: error_text(code) })
    }
}

/// The library's own words for an error code.
fn error_text(code: c_int) -> String {
    let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len: c_int = 0;
    // SAFETY: the buffer is as long as the standard asks for, plus a final zero that the library does not
    // overwrite.
    let status = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut len) };
    if status != ffi::MPI_SUCCESS as c_int {
        return "no text for this code".to_owned();
    }
    // SAFETY: the last byte is still zero.
    unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().trim().to_owned()
}

/// Lets a panic on any thread end the world, after the message that the former hook prints.
///
/// Without this, unwinding leaves the other ranks waiting for this one.
fn abort_on_panic() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            former(info);
            if RUNNING.load(Ordering::SeqCst) {
                abort_world(PANIC_EXIT_CODE);
            }
        }));
    });
}

/// Ends all ranks. Takes no lock: another thread may be inside MPI, waiting for a rank that will never come.
fn abort_world(code: i32) -> ! {
    // The way out if MPI_Abort itself hangs. No thread to be had means no memory: then only MPI_Abort is
    // left.
    let _ = thread::Builder::new().spawn(move || {
        thread::sleep(OUTPUT_PATIENCE + ABORT_PATIENCE);
        // SAFETY: ends the process without running exit handlers, which could wait for MPI.
        unsafe { libc::_exit(code) }
    });
    thread::sleep(OUTPUT_PATIENCE);
    // SAFETY: MPI is running. Another thread may be inside MPI at the same time; this process ends here
    // either way, and the timer above bounds how long it takes.
    unsafe {
        ffi::MPI_Abort(comm_world(), code);
        libc::_exit(code)
    }
}

impl Collectives for Mpi {
    fn rank(&self) -> u32 {
        self.world.rank
    }

    fn world_size(&self) -> u32 {
        self.world.world_size
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.operate(
            Operation::AllReduceSum,
            |scratch, account| with_slice!(buffer, slice => self.sum(scratch, slice, account)),
        )
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.operate(Operation::Broadcast, |_, account| {
            if root >= self.world.world_size {
                return Err(ErrorKind::NoSuchRoot { root });
            }
            with_slice!(buffer, slice => self.broadcast_slice(slice, root, account))
        })
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.operate(Operation::AllGather, |_, account| self.gather(bytes, account))
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.operate(Operation::Barrier, |_, account| self.meet(account))
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        let lane = self.operate(Operation::Lane, |_, account| self.branch(name, account))?;
        Ok(Arc::new(lane))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.operate(Operation::Finish, |_, _| self.shut_down())
    }

    fn abort(&self, code: i32) -> ! {
        if RUNNING.load(Ordering::SeqCst) {
            abort_world(code)
        }
        std::process::exit(code)
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi")
            .field("rank", &self.world.rank)
            .field("world_size", &self.world.world_size)
            .field("lane", &self.line.name)
            .finish_non_exhaustive()
    }
}
