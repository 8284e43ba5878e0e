//! MPI through rsmpi: its start-up and its bindings. Its safe operations are not used, because they throw
//! MPI's return codes away.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    mem::ManuallyDrop,
    ops::Range,
    sync::{
        Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use ::mpi::{
    Threading,
    environment::{Universe, initialize_with_threading},
    ffi,
    traits::{AsRaw, Communicator},
};

use super::PANIC_EXIT_CODE;
use crate::{
    Buffer, CollectiveError, Collectives, ErrorKind, Operation, StartError,
    buffer::{Element, block_start, sum_around, sum_in_rank_order, with_slice},
};

/// An all-reduce whose messages from all ranks together take at most this many bytes is gathered whole.
const SHORT_BYTES: usize = 32 << 10;
/// Longer all-reduces go in pieces of which each rank adds up a block of at most this many bytes: large
/// enough for full bandwidth, small enough that a block and its parts stay in the cache between receiving,
/// adding and sending.
const BLOCK_BYTES: usize = 128 << 10;
/// Broadcasts go in pieces of this size, which fits MPI's `int` counts whatever the element.
const BROADCAST_BYTES: usize = 256 << 20;
/// All ranks together hand over at most this many bytes in one round of an all-gather.
const GATHER_BYTES: usize = 256 << 20;
/// The tag of all messages of this module; they are matched by their order.
const EXCHANGE_TAG: c_int = 0;
/// How long mpirun gets to read what this rank printed last, its error most likely: it drops what it has not
/// read when the world is aborted (seen with MPICH's Hydra).
const OUTPUT_PATIENCE: Duration = Duration::from_millis(200);
/// How long `MPI_Abort` may take before the process ends without its help.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// Whether MPI is between start and end, so that a panic has to end the world. Read by the panic hook.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// This process's place in the world that mpirun started. See the [module documentation](super).
pub struct Mpi {
    rank: u32,
    world_size: u32,
    calls: AtomicU64,
    started_by: ThreadId,
    state: Mutex<State>,
}

/// What one operation at a time may use.
struct State {
    /// `None` after the end. Not dropped with [`Mpi`]: its drop calls `MPI_Finalize`, which waits for all
    /// ranks.
    universe: Option<ManuallyDrop<Universe>>,
    /// What all ranks sent of the piece at hand, in rank order; kept from call to call.
    f32: Vec<f32>,
    f64: Vec<f64>,
    u64: Vec<u64>,
    u8: Vec<u8>,
}

/// A type that both this crate and MPI know.
trait MpiElement: Element {
    fn datatype() -> ffi::MPI_Datatype;
    fn parts(state: &mut State) -> &mut Vec<Self>;
}

macro_rules! mpi_element {
    ($type:ident, $constant:ident) => {
        impl MpiElement for $type {
            fn datatype() -> ffi::MPI_Datatype {
                // SAFETY: a constant of the C library, never written.
                unsafe { ffi::$constant }
            }
            fn parts(state: &mut State) -> &mut Vec<Self> {
                &mut state.$type
            }
        }
    };
}

mpi_element!(f32, RSMPI_FLOAT);
mpi_element!(f64, RSMPI_DOUBLE);
mpi_element!(u64, RSMPI_UINT64_T);
mpi_element!(u8, RSMPI_UINT8_T);

fn world() -> ffi::MPI_Comm {
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
        Ok(Mpi {
            rank: mpi_rank,
            world_size: mpi_world,
            calls: AtomicU64::new(0),
            started_by: thread::current().id(),
            state: Mutex::new(State {
                universe: Some(universe),
                f32: Vec::new(),
                f64: Vec::new(),
                u64: Vec::new(),
                u8: Vec::new(),
            }),
        })
    }

    /// Waits for its turn and runs one operation, unless the group was shut down.
    fn operate<R>(
        &self,
        operation: Operation,
        work: impl FnOnce(&mut State) -> Result<R, ErrorKind>,
    ) -> Result<R, CollectiveError> {
        let mut state = self.lock();
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let result = if state.universe.is_some() { work(&mut state) } else { Err(ErrorKind::Finished) };
        result.map_err(|kind| CollectiveError {
            operation,
            call,
            rank: self.rank,
            world_size: self.world_size,
            kind,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held has ended the world already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sum<T: MpiElement>(&self, state: &mut State, slice: &mut [T]) -> Result<(), ErrorKind> {
        let world_size = self.world_size as usize;
        let parts = T::parts(state);
        if size_of_val(slice) * world_size <= SHORT_BYTES {
            return sum_short(slice, parts, world_size);
        }
        for piece in slice.chunks_mut(world_size * BLOCK_BYTES / size_of::<T>()) {
            self.sum_piece(piece, parts)?;
        }
        Ok(())
    }

    /// Adds up one piece: every rank sums one block of it over all ranks and hands the sum to all.
    fn sum_piece<T: MpiElement>(&self, piece: &mut [T], parts: &mut Vec<T>) -> Result<(), ErrorKind> {
        let (rank, world_size) = (self.rank as usize, self.world_size as usize);
        let piece_len = piece.len();
        let block = |index: usize| {
            block_start(piece_len, world_size, index)..block_start(piece_len, world_size, index + 1)
        };
        let own = block(rank);
        let len = own.len();
        grow(parts, len * world_size);
        // In round k everyone sends to the k-th rank after it and receives from the k-th before it: no rank
        // is a bottleneck.
        let partners = (1..world_size)
            .map(|round| ((rank + round) % world_size, (rank + world_size - round) % world_size));
        for (to, from) in partners.clone() {
            exchange(&piece[block(to)], to, &mut parts[from * len..][..len], from)?;
        }
        let (before, after) = parts[..len * world_size].split_at_mut(rank * len);
        sum_around(&mut piece[own.clone()], before, &after[len..]);
        for (to, from) in partners {
            let (sent, received) = two_ranges(piece, own.clone(), block(from));
            exchange(sent, to, received, from)?;
        }
        Ok(())
    }
}

/// The memory of two ranges that do not overlap, the second to be written.
fn two_ranges<T>(slice: &mut [T], read: Range<usize>, written: Range<usize>) -> (&[T], &mut [T]) {
    if read.start < written.start || (read.end <= written.start) {
        let (low, high) = slice.split_at_mut(written.start);
        (&low[read], &mut high[..written.len()])
    } else {
        let (low, high) = slice.split_at_mut(read.start);
        (&high[..read.len()], &mut low[written])
    }
}

/// Sends to one rank and receives from another, at the same time.
fn exchange<T: MpiElement>(sent: &[T], to: usize, received: &mut [T], from: usize) -> Result<(), ErrorKind> {
    // SAFETY: the counts are the lengths of the slices, which a piece's size keeps within an int, and the
    // datatype is that of T. Returns when both slices are no longer in use.
    check(unsafe {
        ffi::MPI_Sendrecv(
            sent.as_ptr().cast::<c_void>(),
            sent.len() as c_int,
            T::datatype(),
            to as c_int,
            EXCHANGE_TAG,
            received.as_mut_ptr().cast::<c_void>(),
            received.len() as c_int,
            T::datatype(),
            from as c_int,
            EXCHANGE_TAG,
            world(),
            ffi::RSMPI_STATUS_IGNORE,
        )
    })
}

/// Everyone receives everything and adds it up.
fn sum_short<T: MpiElement>(slice: &mut [T], parts: &mut Vec<T>, world_size: usize) -> Result<(), ErrorKind> {
    if slice.is_empty() {
        return Ok(());
    }
    grow(parts, slice.len() * world_size);
    // SAFETY: `parts` has room for `world_size` times the slice; no overlap; the count is at most
    // SHORT_BYTES.
    check(unsafe {
        ffi::MPI_Allgather(
            slice.as_ptr().cast::<c_void>(),
            slice.len() as c_int,
            T::datatype(),
            parts.as_mut_ptr().cast::<c_void>(),
            slice.len() as c_int,
            T::datatype(),
            world(),
        )
    })?;
    let len = slice.len();
    sum_in_rank_order(slice, parts[..len * world_size].chunks_exact(len));
    Ok(())
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
        ffi::MPI_Abort(world(), code);
        libc::_exit(code)
    }
}

impl Collectives for Mpi {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.operate(Operation::AllReduceSum, |state| with_slice!(buffer, slice => self.sum(state, slice)))
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.operate(Operation::Broadcast, |_| {
            if root >= self.world_size {
                return Err(ErrorKind::NoSuchRoot { root });
            }
            with_slice!(buffer, slice => broadcast(slice, root))
        })
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.operate(Operation::AllGather, |_| gather(bytes, self.world_size as usize))
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        // SAFETY: MPI is running, checked by `operate`, which also lets one thread in at a time.
        self.operate(Operation::Barrier, |_| check(unsafe { ffi::MPI_Barrier(world()) }))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.operate(Operation::Finish, |state| {
            if thread::current().id() != self.started_by {
                return Err(ErrorKind::WrongThread);
            }
            let universe = state.universe.take();
            RUNNING.store(false, Ordering::SeqCst);
            drop(universe.map(ManuallyDrop::into_inner));
            Ok(())
        })
    }

    fn abort(&self, code: i32) -> ! {
        if RUNNING.load(Ordering::SeqCst) {
            abort_world(code)
        }
        std::process::exit(code)
    }
}

fn broadcast<T: MpiElement>(slice: &mut [T], root: u32) -> Result<(), ErrorKind> {
    for piece in slice.chunks_mut(BROADCAST_BYTES / size_of::<T>()) {
        // SAFETY: the count is the length of the piece, which fits an int; the datatype is that of T.
        check(unsafe {
            ffi::MPI_Bcast(
                piece.as_mut_ptr().cast::<c_void>(),
                piece.len() as c_int,
                T::datatype(),
                root as c_int,
                world(),
            )
        })?;
    }
    Ok(())
}

/// Lengths first, then the bytes, in rounds that keep every count and offset within an `int`.
fn gather(bytes: &[u8], world_size: usize) -> Result<Vec<Vec<u8>>, ErrorKind> {
    let own_len = bytes.len() as u64;
    let mut lens = vec![0u64; world_size];
    // SAFETY: one u64 from each rank into `world_size` of them.
    check(unsafe {
        ffi::MPI_Allgather(
            (&raw const own_len).cast::<c_void>(),
            1,
            u64::datatype(),
            lens.as_mut_ptr().cast::<c_void>(),
            1,
            u64::datatype(),
            world(),
        )
    })?;
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
        // SAFETY: `own` is what this rank announced for the round; counts and starts lie inside `round`; no
        // overlap.
        check(unsafe {
            ffi::MPI_Allgatherv(
                own.as_ptr().cast::<c_void>(),
                own.len() as c_int,
                u8::datatype(),
                round.as_mut_ptr().cast::<c_void>(),
                counts.as_ptr(),
                starts.as_ptr(),
                u8::datatype(),
                world(),
            )
        })?;
        for (whole, (&start, &count)) in gathered.iter_mut().zip(starts.iter().zip(&counts)) {
            whole.extend_from_slice(&round[start as usize..][..count as usize]);
        }
    }
    Ok(gathered)
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .finish_non_exhaustive()
    }
}
