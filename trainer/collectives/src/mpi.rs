//! Ranks as MPI processes.
//!
//! # What MPI can and cannot tell
//!
//! A failed or absent peer does not surface here as an error of MPI's: most MPI libraries wait forever or end the
//! process. Who starts the ranks has to be the failure detector. What is done here so that nothing hangs by
//! itself:
//!
//! - a wait ends after [`patience`] with an error that names the ranks waited for. MPI cannot be made to give back
//!   the memory it was to fill, so the error is printed, told to whom [`set_last_words`] names, and the whole world ends;
//! - a panic on any thread ends the whole world (`MPI_Abort`) after its message was printed, with
//!   [`PANIC_EXIT_CODE`];
//! - dropping [`Mpi`] does **not** shut MPI down, because `MPI_Finalize` waits for all ranks. A rank that
//!   leaves by an error calls [`Collectives::abort`](crate::Collectives::abort) or ends with a code other
//!   than 0 (mpirun then ends the others); one that is done calls
//!   [`Collectives::finish`](crate::Collectives::finish).
//!
//! # Which thread
//!
//! MPI is asked for the thread level *serialized*: any thread may call, one at a time, which a lock ensures. No
//! thread waits inside MPI: every operation is started by calls that return at once, and waiting is a loop of
//! looks (`MPI_Testall`) with the lock given back in between. So the threads of several
//! [lanes](crate::Collectives::lane), each with a communicator of its own, never wait for one another's peers.
//!
//! Between two looks a thread spins for some microseconds, then yields its core, then sleeps. The group itself
//! spins longer (not at all if the machine has fewer cores than ranks); a lane, which is meant for a thread beside
//! one that computes, sleeps soon. MPICH's own blocking calls spin without end: with more threads than cores, one
//! all-reduce then takes as long as the scheduler's time slices.
//!
//! `finish` must run on the thread that called [`Mpi::initialize`] (MPI-3.1, section 12.4.3); it also frees the
//! lanes' communicators. Once MPI reports a failure while other operations are under way, their memory cannot be
//! taken back from it: the world ends if they do not complete within a second.
//!
//! # How the sum is made
//!
//! `MPI_Allreduce` may add in any order and is not required to give all ranks the same bits. Instead each
//! rank receives everyone's part of one block, adds them in rank order and sends the sum to all: as many
//! bytes on the wire as the ring and Rabenseifner algorithms, in place but for scratch memory that is kept,
//! and the same bits everywhere. Long messages go in pieces that stay in the processor's cache; that also
//! keeps every count within MPI's `int`. A few pieces are under way at a time, so that one is added up while the
//! next arrive. Short messages are gathered whole by everyone and added locally: one exchange instead of two.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::ErrorKind;

/// Whether this program was built with an MPI library.
pub const BUILT_IN: bool = cfg!(feature = "mpi");

/// In milliseconds; see [`patience`].
static PATIENCE: AtomicU64 = AtomicU64::new(600_000);

/// How long an operation waits for other ranks before it fails; ten minutes unless [`set_patience`] says otherwise.
pub fn patience() -> Duration {
    Duration::from_millis(PATIENCE.load(Ordering::Relaxed))
}

/// Sets [`patience`] for all groups and lanes of this process, from their next wait on. It must cover everything that
/// one rank does while the others wait for it.
pub fn set_patience(patience: Duration) {
    PATIENCE.store(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// What is told of a failure that ends all ranks: what it is, and its line.
type LastWords = Box<dyn FnOnce(&ErrorKind, &str) + Send>;

static LAST_WORDS: Mutex<Option<LastWords>> = Mutex::new(None);
/// How long they may take.
#[cfg(feature = "mpi")]
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(4);

/// Sets what is called, on a thread of its own, when a wait has failed and MPI does not give back the memory it was to
/// fill: all ranks end a few seconds later, and nobody gets the error. It is called once.
pub fn set_last_words(words: impl FnOnce(&ErrorKind, &str) + Send + 'static) {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(words));
}

/// Returns when the words are said, or have taken too long; a second thread waits for the first.
#[cfg(feature = "mpi")]
fn say_last_words(kind: &ErrorKind, line: &str) {
    let mut guard = LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(words) = guard.take() else { return };
    let (kind, line) = (kind.clone(), line.to_owned());
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().spawn(move || {
        words(&kind, &line);
        let _ = tell.send(());
    });
    if thread.is_ok() {
        let _ = told.recv_timeout(LAST_WORDS_PATIENCE);
    }
}

/// The exit code of the ranks that a panic on one of them ends.
pub const PANIC_EXIT_CODE: i32 = 1;

#[cfg(feature = "mpi")]
mod linked;
#[cfg(feature = "mpi")]
pub use linked::Mpi;

#[cfg(not(feature = "mpi"))]
mod unavailable;
#[cfg(not(feature = "mpi"))]
pub use unavailable::Mpi;
