//! What MPI works on while nobody holds its lock: requests, and how a thread waits for them.
//!
//! The thread level is *serialized*, so no thread may stay inside MPI while another has something to do
//! there. Every operation is therefore started by a call that returns at once, and waiting is a loop of short
//! calls with the lock given back in between.

use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    marker::PhantomData,
    mem::ManuallyDrop,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ::mpi::{environment::Universe, ffi};

use super::{MpiElement, abort_world, check};
use crate::{ErrorKind, waited::Waited};

/// How long an operation that failed may take to give back the memory it was handed.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);
/// The exit code when it does not.
const MEMORY_EXIT_CODE: i32 = 1;
/// Waiting threads look at the clock once in so many looks.
const LOOKS_PER_CLOCK: u32 = 256;

/// The MPI library of this process: one call at a time, until it is shut down.
pub(super) struct Library(Mutex<Option<ManuallyDrop<Universe>>>);

impl Library {
    pub(super) fn new(universe: ManuallyDrop<Universe>) -> Self {
        Library(Mutex::new(Some(universe)))
    }

    /// `None` inside after the end. Not dropped with this value: its drop calls `MPI_Finalize`, which waits
    /// for all ranks.
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<ManuallyDrop<Universe>>> {
        // A panic while the lock was held has ended the world already.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one MPI call, which must return without waiting for another rank.
    pub(super) fn call(&self, call: impl FnOnce() -> c_int) -> Result<(), ErrorKind> {
        let universe = self.lock();
        if universe.is_none() {
            return Err(ErrorKind::Finished);
        }
        check(call())
    }
}

/// A communicator; as plain data as the standard's handles are.
#[derive(Clone, Copy)]
pub(super) struct Comm(pub(super) ffi::MPI_Comm);

// SAFETY: under the thread level "serialized" a handle may be used from any thread, one call at a time, which
// `Library` ensures.
unsafe impl Send for Comm {}
// SAFETY: as above; the handle itself is never written.
unsafe impl Sync for Comm {}

/// How a thread waits: it looks again at once, then lets others have the core in between, then sleeps.
///
/// MPI makes progress only while somebody looks, so sleeping trades bandwidth for the core. A sleep's length
/// grows up to a bound, and the kernel adds its own slack of about 50 µs.
#[derive(Clone, Copy)]
pub(super) struct Polling {
    /// How long to look again at once.
    spin: Duration,
    /// How often to yield after that, before sleeping.
    yields: u32,
    longest_sleep: Duration,
}

impl Polling {
    const FIRST_SLEEP: Duration = Duration::from_micros(20);

    /// For a thread that has nothing else to do until the operation is complete. With a core for each of the
    /// machine's ranks, losing it to another program costs more than it gives; with fewer, the rank waited for may
    /// be waiting for this core.
    pub(super) fn foreground(ranks_here: usize) -> Polling {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let spin = if ranks_here <= cores { Duration::from_micros(30) } else { Duration::ZERO };
        Polling { spin, yields: 5000, longest_sleep: Duration::from_micros(100) }
    }

    /// For a thread beside one that computes: it sleeps soon.
    pub(super) fn background() -> Polling {
        Polling { spin: Duration::from_micros(5), yields: 10, longest_sleep: Duration::from_micros(200) }
    }
}

/// One wait.
struct Waiting {
    polling: Polling,
    began: Option<Instant>,
    waited: Option<Waited>,
    looks: u32,
    yields: u32,
    sleep: Duration,
}

impl Waiting {
    fn new(polling: Polling) -> Self {
        Waiting { polling, began: None, waited: None, looks: 0, yields: 0, sleep: Polling::FIRST_SLEEP }
    }

    /// Between two looks.
    fn pause(&mut self) {
        let began = *self.began.get_or_insert_with(Instant::now);
        self.waited.get_or_insert_with(Waited::begin);
        if self.yields == 0 && began.elapsed() < self.polling.spin {
            std::hint::spin_loop();
        } else if self.yields < self.polling.yields {
            self.yields += 1;
            thread::yield_now();
        } else {
            thread::sleep(self.sleep);
            self.sleep = (self.sleep + Duration::from_micros(2)).min(self.polling.longest_sleep);
        }
    }

    /// How long it has taken, when that is `patience` or more.
    fn too_long(&mut self, patience: Duration) -> Option<Duration> {
        self.looks = self.looks.wrapping_add(1);
        if !self.looks.is_multiple_of(LOOKS_PER_CLOCK) {
            return None;
        }
        self.waited.as_ref().map(Waited::look).filter(|&waited| waited >= patience)
    }
}

/// One side of a message: where the elements are and who the other rank is.
pub(super) struct Message<T> {
    pub(super) at: *mut T,
    pub(super) len: usize,
    pub(super) peer: usize,
    pub(super) tag: c_int,
}

/// What is said of an operation that failed: by whichever of its requests MPI does not let go of.
pub(super) struct Account<'a> {
    /// Makes a failure's whole message.
    report: &'a dyn Fn(&ErrorKind) -> String,
    /// What failed first.
    failure: RefCell<Option<ErrorKind>>,
}

impl<'a> Account<'a> {
    pub(super) fn new(report: &'a dyn Fn(&ErrorKind) -> String) -> Self {
        Account { report, failure: RefCell::new(None) }
    }

    fn note<R>(&self, result: Result<R, ErrorKind>) -> Result<R, ErrorKind> {
        if let Err(failure) = &result {
            self.failure.borrow_mut().get_or_insert_with(|| failure.clone());
        }
        result
    }
}

/// Operations that MPI is working on. Their memory is MPI's until [`Requests::wait`] returned `Ok`.
pub(super) struct Requests<'a> {
    library: &'a Library,
    comm: Comm,
    polling: Polling,
    handles: Vec<ffi::MPI_Request>,
    /// Of every handle, in the same order: the rank at the other end of a message; none for an operation of all.
    peers: Vec<Option<usize>>,
    /// Of the operation that these are a part of.
    account: &'a Account<'a>,
    /// The memory MPI may touch outlives this value.
    memory: PhantomData<&'a mut ()>,
}

impl<'a> Requests<'a> {
    pub(super) fn new(library: &'a Library, comm: Comm, polling: Polling, account: &'a Account<'a>) -> Self {
        let (handles, peers) = (Vec::new(), Vec::new());
        Requests { library, comm, polling, handles, peers, account, memory: PhantomData }
    }

    /// Starts a few operations in one turn.
    pub(super) fn post(
        &mut self,
        post: impl FnOnce(&mut Posting<'_>) -> Result<(), ErrorKind>,
    ) -> Result<(), ErrorKind> {
        let universe = self.library.lock();
        if universe.is_none() {
            return self.account.note(Err(ErrorKind::Finished));
        }
        let posting = &mut Posting { comm: self.comm, handles: &mut self.handles, peers: &mut self.peers };
        self.account.note(post(posting))
    }

    /// Starts one operation.
    ///
    /// # Safety
    /// As [`Posting::start`].
    pub(super) unsafe fn start(
        &mut self,
        call: impl FnOnce(ffi::MPI_Comm, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), ErrorKind> {
        // SAFETY: as this function's.
        self.post(|posting| unsafe { posting.start(None, call) })
    }

    /// Returns when all of them are complete, and forgets them; gives up after [`super::super::patience`].
    pub(super) fn wait(&mut self) -> Result<(), ErrorKind> {
        let result = self.wait_within(super::super::patience());
        self.account.note(result)
    }

    fn wait_within(&mut self, patience: Duration) -> Result<(), ErrorKind> {
        let mut waiting = Waiting::new(self.polling);
        while !self.test()? {
            waiting.pause();
            if let Some(waited) = waiting.too_long(patience) {
                return Err(ErrorKind::Timeout { waited, missing: self.missing()? });
            }
        }
        Ok(())
    }

    /// The ranks at the other end of what is not complete, in rising order; none when all are waited for at once.
    fn missing(&mut self) -> Result<Vec<u32>, ErrorKind> {
        let Requests { library, handles, peers, .. } = self;
        let mut missing = Vec::new();
        for (handle, peer) in handles.iter_mut().zip(peers) {
            let mut complete: c_int = 0;
            // SAFETY: the request is active or null, and null afterwards if it is complete; no status is wanted.
            library.call(|| unsafe { ffi::MPI_Test(handle, &raw mut complete, ffi::RSMPI_STATUS_IGNORE) })?;
            missing.extend(peer.filter(|_| complete == 0).map(|rank| rank as u32));
        }
        missing.sort_unstable();
        missing.dedup();
        Ok(missing)
    }

    fn test(&mut self) -> Result<bool, ErrorKind> {
        if self.handles.is_empty() {
            return Ok(true);
        }
        let mut complete: c_int = 0;
        let Requests { library, handles, .. } = self;
        // SAFETY: the requests are active or null; statuses are not wanted.
        library.call(|| unsafe {
            ffi::MPI_Testall(
                handles.len() as c_int,
                handles.as_mut_ptr(),
                &raw mut complete,
                ffi::RSMPI_STATUSES_IGNORE,
            )
        })?;
        if complete != 0 {
            self.handles.clear();
            self.peers.clear();
        }
        Ok(complete != 0)
    }
}

/// The right to start operations: it lives while the lock is held.
pub(super) struct Posting<'r> {
    comm: Comm,
    handles: &'r mut Vec<ffi::MPI_Request>,
    peers: &'r mut Vec<Option<usize>>,
}

impl Posting<'_> {
    /// Starts an operation, with one other rank or with all, by a call that fills in its request.
    ///
    /// # Safety
    /// `call` is an MPI call that does not wait, with valid arguments. The memory it names is valid, and used by
    /// nobody else (written by nobody else, if MPI only reads it), until [`Requests::wait`] returned `Ok` or the
    /// [`Requests`] are dropped.
    unsafe fn start(
        &mut self,
        peer: Option<usize>,
        call: impl FnOnce(ffi::MPI_Comm, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), ErrorKind> {
        // SAFETY: a constant of the C library, never written.
        let mut handle = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(call(self.comm.0, &raw mut handle))?;
        self.handles.push(handle);
        self.peers.push(peer);
        Ok(())
    }

    /// Starts to send; the memory is only read.
    ///
    /// # Safety
    /// As [`Posting::start`]; the length fits an `int`.
    pub(super) unsafe fn send<T: MpiElement>(&mut self, message: Message<T>) -> Result<(), ErrorKind> {
        let Message { at, len, peer, tag } = message;
        let buffer = at.cast_const().cast::<c_void>();
        // SAFETY: as this function's.
        unsafe {
            self.start(Some(peer), |comm, request| {
                ffi::MPI_Isend(buffer, len as c_int, T::datatype(), peer as c_int, tag, comm, request)
            })
        }
    }

    /// Starts to receive.
    ///
    /// # Safety
    /// As [`Posting::start`]; the length fits an `int`.
    pub(super) unsafe fn receive<T: MpiElement>(&mut self, message: Message<T>) -> Result<(), ErrorKind> {
        let Message { at, len, peer, tag } = message;
        // SAFETY: as this function's.
        unsafe {
            self.start(Some(peer), |comm, request| {
                ffi::MPI_Irecv(at.cast(), len as c_int, T::datatype(), peer as c_int, tag, comm, request)
            })
        }
    }
}

impl Drop for Requests<'_> {
    /// Reached with requests left only after an error. The memory is about to be given to someone else, so MPI
    /// has to let go of it; if it does not, this process must end.
    fn drop(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        let began = Instant::now();
        let mut waiting = Waiting::new(self.polling);
        while let Ok(false) = self.test() {
            if began.elapsed() > RELEASE_PATIENCE {
                break;
            }
            waiting.pause();
        }
        if !self.handles.is_empty() {
            match &*self.account.failure.borrow() {
                Some(failure) => {
                    let line = (self.account.report)(failure);
                    eprintln!("error: {line}; ending all ranks");
                    super::super::say_last_words(failure, &line);
                }
                None => eprintln!("error: MPI does not let go of memory it was handed; ending all ranks"),
            }
            abort_world(MEMORY_EXIT_CODE);
        }
    }
}
