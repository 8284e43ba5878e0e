//! A group over NCCL: every call is non-blocking and polled under a deadline.
//!
//! Two kinds of locks, always taken in this order: a line's turn, held for a whole operation of that line; and the
//! group's state, held for one short call into NCCL. The history has a third, inside which nothing else is locked.

use std::{
    env, fmt,
    io::Write,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    Library, LibraryError, Version,
    ffi::{
        BFLOAT16, Comm, Config, CudaStream, FLOAT32, FLOAT64, IN_PROGRESS, ResultCode, SUCCESS, SUM,
        UNIQUE_ID_BYTES, UniqueId,
    },
    history::History,
};
use crate::{
    Collectives, DeviceBuffer, DeviceCollectives, DeviceError, DeviceErrorKind, DeviceType, Event, Operation,
    Stream, Ticket, device::Record, waited::Waited,
};

/// How often a thread that waits for the device asks NCCL for errors.
const CHECK_EVERY: Duration = Duration::from_millis(1);
/// What waits looks again at once so often, before it sleeps.
const EAGER_LOOKS: u32 = 200;
const FIRST_SLEEP: Duration = Duration::from_micros(20);
const LONGEST_SLEEP: Duration = Duration::from_micros(500);
/// How long whoever reads this process's output gets to read its last line before it ends.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(200);

/// How patient a group is.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long the start may take, and the opening of a lane, and the end: all ranks must have come.
    pub start_patience: Duration,
    /// How long an operation may take until it is on its stream. Its first on a lane connects to other ranks, and so
    /// waits for them.
    pub call_patience: Duration,
    /// How long `ncclCommAbort` may take before the process ends.
    pub abort_patience: Duration,
    /// The exit code when a start that failed cannot be undone in that time.
    pub exit_code: i32,
}

impl Default for Options {
    /// Ten minutes, five minutes, five seconds, 1.
    fn default() -> Self {
        Options {
            start_patience: Duration::from_secs(600),
            call_patience: Duration::from_secs(300),
            abort_patience: Duration::from_secs(5),
            exit_code: 1,
        }
    }
}

/// This process's place in a group over NCCL: the group itself or one of its lanes. See the
/// [module documentation](super).
///
/// Dropping it neither waits nor frees: what was neither finished nor aborted goes with the process.
pub struct Communicator {
    group: Arc<Group>,
    line: usize,
    /// `None`: the group itself.
    name: Option<Arc<str>>,
    /// Held during an operation: one at a time.
    turn: Mutex<()>,
}

/// What the group and its lanes share.
struct Group {
    library: Arc<Library>,
    host: Arc<dyn Collectives>,
    rank: u32,
    world_size: u32,
    options: Options,
    /// Held while a thread is inside NCCL.
    state: Mutex<State>,
    history: History,
    /// Set before `abort` waits for the lock, so that nobody takes it again.
    aborting: AtomicBool,
}

struct State {
    phase: Phase,
    /// By line.
    comms: Vec<Handle>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Finishing,
    Finished,
    Aborted,
}

#[derive(Clone, Copy)]
struct Handle(Comm);

// SAFETY: NCCL's communicators may be used from any thread, one at a time, which the lock around `State` ensures.
unsafe impl Send for Handle {}

/// A failure with the name of the call that failed.
type Failed = (String, DeviceErrorKind);

impl Communicator {
    /// Starts the group: every rank of `host` calls this at the same place among its calls, with the device that it will
    /// use as the calling thread's current one.
    ///
    /// `library` is what [`Library::open`] returned, on success or not: a rank without a library says so to all, and
    /// every rank returns an error at once instead of waiting. The ranks compare versions; then they meet by an id that
    /// rank 0 makes. Both travel over `host`, which has to stay usable for lanes.
    ///
    /// # Errors
    /// When a rank has no library or another version, when NCCL cannot connect the ranks within `start_patience`. What
    /// was begun is aborted then.
    pub fn start(
        library: Result<Arc<Library>, LibraryError>,
        host: Arc<dyn Collectives>,
        options: Options,
    ) -> Result<Communicator, DeviceError> {
        let (rank, world_size) = (host.rank(), host.world_size());
        let failed = |kind| DeviceError {
            call: "NCCL's start".into(),
            rank,
            world_size,
            kind,
            report: Box::default(),
        };
        let own = match forced_to_block(env::var("NCCL_COMM_BLOCKING").ok().as_deref()) {
            Some(value) => Err(DeviceErrorKind::BlockingForced { value }),
            None => library.map_err(DeviceErrorKind::Library),
        };
        let (library, id) = agree(host.as_ref(), own, "the group").map_err(failed)?;
        let group = Arc::new(Group {
            library,
            host,
            rank,
            world_size,
            options,
            state: Mutex::new(State { phase: Phase::Running, comms: Vec::new() }),
            history: History::default(),
            aborting: AtomicBool::new(false),
        });
        group.connect(id, None).map_err(|kind| {
            // Nobody else can: there is no communicator to call it on. Its own error says nothing new.
            let _ = group.abort(group.options.exit_code);
            failed(kind)
        })
    }

    /// The operations that the group and its lanes had last, oldest first, at most [`super::HISTORY`].
    pub fn records(&self) -> Vec<Record> {
        self.group.look_at_events();
        self.group.history.records()
    }

    /// The library the group works with.
    pub fn library(&self) -> &Library {
        &self.group.library
    }

    fn enqueue(
        &self,
        operation: Operation,
        buffer: DeviceBuffer,
        function: &'static str,
        call: impl FnOnce(&Library, Comm) -> ResultCode,
    ) -> Result<Ticket, DeviceError> {
        let group = &*self.group;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = group.history.called(self.line, operation, buffer.len, buffer.element);
        let deadline = Deadline::after(group.options.call_patience);
        let work = || {
            {
                let state = group.lock_by(&deadline)?;
                state.running()?;
                let comm = state.comms[self.line].0;
                group.judge(function, call(&group.library, comm), comm)?;
            }
            // Whatever it returned, only the communicator's own state says that the operation is on the stream.
            group.settle(self.line, Phase::Running, function, &deadline)
        };
        match work() {
            Ok(()) => {
                group.history.enqueued(ticket);
                Ok(ticket)
            }
            Err(kind) => Err(group.failed((group.history.describe(ticket), kind))),
        }
    }

    fn shut_down(&self) -> Result<(), DeviceErrorKind> {
        let group = &*self.group;
        if self.name.is_some() {
            return Err(DeviceErrorKind::OnLane);
        }
        let deadline = Deadline::after(group.options.start_patience);
        let lines = {
            let mut state = group.lock_by(&deadline)?;
            state.running()?;
            state.phase = Phase::Finishing;
            state.comms.len()
        };
        for line in 0..lines {
            {
                let state = group.lock_by(&deadline)?;
                state.expect(Phase::Finishing)?;
                let comm = state.comms[line].0;
                // SAFETY: a communicator that started; the lock is held.
                let code = unsafe { (group.library.functions.comm_finalize)(comm) };
                group.judge("ncclCommFinalize", code, comm)?;
            }
            group.settle(line, Phase::Finishing, "ncclCommFinalize", &deadline)?;
        }
        let mut state = group.lock_by(&deadline)?;
        state.expect(Phase::Finishing)?;
        // An orderly end has time: a rank that is ended here would end a run that is done as a failure.
        let patience = group.options.start_patience;
        let _timer = group.timer("ncclCommDestroy", patience, group.options.exit_code);
        state.phase = Phase::Finished;
        for Handle(comm) in std::mem::take(&mut state.comms) {
            // SAFETY: finalized; the lock is held, and nobody finds it again.
            let code = unsafe { (group.library.functions.comm_destroy)(comm) };
            group.judge("ncclCommDestroy", code, std::ptr::null_mut())?;
        }
        Ok(())
    }
}

impl DeviceCollectives for Communicator {
    fn rank(&self) -> u32 {
        self.group.rank
    }

    fn world_size(&self) -> u32 {
        self.group.world_size
    }

    fn all_reduce_sum(&self, buffer: DeviceBuffer, stream: Stream) -> Result<Ticket, DeviceError> {
        let DeviceBuffer { pointer, len, element } = buffer;
        self.enqueue(Operation::AllReduceSum, buffer, "ncclAllReduce", |library, comm| {
            let (kind, stream): (_, CudaStream) = (data_type(element), stream.0);
            // SAFETY: in place; what is at the address, and how long, is `DeviceBuffer::new`'s contract, and the
            // stream's is `Stream::from_raw`'s. The communicator is alive and the lock is held.
            unsafe { (library.functions.all_reduce)(pointer, pointer, len, kind, SUM, comm, stream) }
        })
    }

    fn broadcast(&self, buffer: DeviceBuffer, root: u32, stream: Stream) -> Result<Ticket, DeviceError> {
        if root >= self.group.world_size {
            let failed = ("broadcast".to_owned(), DeviceErrorKind::NoSuchRoot { root });
            return Err(self.group.failed(failed));
        }
        let DeviceBuffer { pointer, len, element } = buffer;
        self.enqueue(Operation::Broadcast, buffer, "ncclBroadcast", |library, comm| {
            let (kind, root) = (data_type(element), root as i32);
            // SAFETY: as in `all_reduce_sum`.
            unsafe { (library.functions.broadcast)(pointer, pointer, len, kind, root, comm, stream.0) }
        })
    }

    fn watch(&self, ticket: Ticket, event: Arc<dyn Event>) {
        self.group.history.watch(ticket, event);
    }

    fn wait(&self, ticket: Ticket, event: &dyn Event, patience: Duration) -> Result<(), DeviceError> {
        let group = &*self.group;
        group.history.asked(ticket);
        let deadline = Deadline::after(patience);
        let mut pause = Pause::default();
        let mut next_check = deadline.began;
        let mut work = || {
            loop {
                if event.is_complete().map_err(DeviceErrorKind::Device)? {
                    // An aborted operation leaves its stream as well, without a result. Abort is seen under the lock
                    // before it stops anything: what is complete while the group runs has its result.
                    return group.look(Some(&deadline));
                }
                let now = Instant::now();
                if now >= next_check {
                    group.look(None)?;
                    next_check = now + CHECK_EVERY;
                }
                if let Some(waited) = deadline.passed() {
                    return Err(DeviceErrorKind::NotComplete { waited });
                }
                pause.take();
            }
        };
        match work() {
            Ok(()) => {
                group.history.complete(ticket);
                Ok(())
            }
            Err(kind) => Err(group.failed((group.history.describe(ticket), kind))),
        }
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.group.look(None).map_err(|kind| self.group.failed(("NCCL's check".to_owned(), kind)))
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn DeviceCollectives>, DeviceError> {
        let group = &self.group;
        let open = || {
            // A rank that cannot go on says so to the others as well.
            let deadline = Deadline::after(group.options.call_patience);
            let own = group.lock_by(&deadline).and_then(|state| state.running());
            let own = own.map(|()| Arc::clone(&group.library));
            let (_, id) = agree(group.host.as_ref(), own, &format!("lane {name}"))?;
            group.connect(id, Some(name.into()))
        };
        match open() {
            Ok(lane) => Ok(Arc::new(lane)),
            Err(kind) => Err(group.failed((format!("lane {name}"), kind))),
        }
    }

    fn finish(&self) -> Result<(), DeviceError> {
        self.shut_down().map_err(|kind| self.group.failed(("NCCL's end".to_owned(), kind)))
    }

    fn abort(&self, exit_code: i32) -> Result<(), DeviceError> {
        self.group.abort(exit_code)
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.group.rank)
            .field("world_size", &self.group.world_size)
            .field("lane", &self.name)
            .field("library", &self.group.library)
            .finish_non_exhaustive()
    }
}

impl State {
    fn running(&self) -> Result<(), DeviceErrorKind> {
        self.expect(Phase::Running)
    }

    fn expect(&self, phase: Phase) -> Result<(), DeviceErrorKind> {
        match self.phase {
            now if now == phase => Ok(()),
            Phase::Aborted => Err(DeviceErrorKind::Aborted),
            _ => Err(DeviceErrorKind::Finished),
        }
    }
}

impl Group {
    /// Makes a communicator of this rank and all others that have the same id.
    fn connect(
        self: &Arc<Group>,
        id: UniqueId,
        name: Option<Arc<str>>,
    ) -> Result<Communicator, DeviceErrorKind> {
        const FUNCTION: &str = "ncclCommInitRankConfig";
        let deadline = Deadline::after(self.options.start_patience);
        let line = {
            let mut state = self.lock_by(&deadline)?;
            state.running()?;
            let (mut comm, mut config): (Comm, _) = (std::ptr::null_mut(), Config::non_blocking());
            let (world_size, rank) = (self.world_size as i32, self.rank as i32);
            // SAFETY: fills `comm`, reads `config` before it returns; the id is one of this library's. The lock is held.
            let code = unsafe {
                let init = self.library.functions.comm_init_rank_config;
                init(&raw mut comm, world_size, id, rank, &raw mut config)
            };
            if comm.is_null() {
                self.judge(FUNCTION, code, comm)?;
                return Err(self.broken(FUNCTION, code, "it returned no communicator"));
            }
            // Also one whose start failed is kept, for `abort` to free. Numbered alike here and in the history.
            state.comms.push(Handle(comm));
            let line = self.history.line(name.clone());
            self.judge(FUNCTION, code, comm)?;
            line
        };
        self.settle(line, Phase::Running, FUNCTION, &deadline)?;
        Ok(Communicator { group: Arc::clone(self), line, name, turn: Mutex::new(()) })
    }

    /// Waits until the last call on a communicator is through.
    fn settle(
        &self,
        line: usize,
        phase: Phase,
        function: &'static str,
        deadline: &Deadline,
    ) -> Result<(), DeviceErrorKind> {
        let mut pause = Pause::default();
        loop {
            let in_progress = {
                let state = self.lock_by(deadline)?;
                state.expect(phase)?;
                self.state_of(&state, line)? == IN_PROGRESS
            };
            if !in_progress {
                return Ok(());
            }
            if let Some(waited) = deadline.passed() {
                return Err(DeviceErrorKind::InProgress { function, waited });
            }
            pause.take();
        }
    }

    /// Asks every communicator for errors. Without a deadline it asks nothing while another thread is inside NCCL.
    fn look(&self, deadline: Option<&Deadline>) -> Result<(), DeviceErrorKind> {
        let state = match deadline {
            Some(deadline) => self.lock_by(deadline)?,
            None if self.aborting.load(Ordering::SeqCst) => return Err(DeviceErrorKind::Aborted),
            None => match self.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(()),
            },
        };
        state.running()?;
        (0..state.comms.len()).try_for_each(|line| self.state_of(&state, line).map(|_| ()))
    }

    /// [`SUCCESS`] or [`IN_PROGRESS`]; anything else is an error. The caller holds the lock.
    fn state_of(&self, state: &State, line: usize) -> Result<ResultCode, DeviceErrorKind> {
        let (comm, mut now) = (state.comms[line].0, SUCCESS);
        // SAFETY: the communicator is alive, because it is in the list; fills `now`. The lock is held.
        let code = unsafe { (self.library.functions.comm_get_async_error)(comm, &raw mut now) };
        self.judge("ncclCommGetAsyncError", code, comm)?;
        if now == SUCCESS || now == IN_PROGRESS {
            return Ok(now);
        }
        let (text, last) = (self.library.text(now), self.library.last_error(comm));
        Err(DeviceErrorKind::Asynchronous { line: self.history.name(line), code: now, text, last })
    }

    fn judge(&self, function: &'static str, code: ResultCode, comm: Comm) -> Result<(), DeviceErrorKind> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.broken(function, code, &self.library.last_error(comm))),
        }
    }

    fn broken(&self, function: &'static str, code: ResultCode, last: &str) -> DeviceErrorKind {
        DeviceErrorKind::Call { function, code, text: self.library.text(code), last: last.to_owned() }
    }

    /// The right to be inside NCCL. Not waited for without end: the thread that has it may be stuck in there.
    fn lock_by(&self, deadline: &Deadline) -> Result<MutexGuard<'_, State>, DeviceErrorKind> {
        let mut pause = Pause::default();
        loop {
            if self.aborting.load(Ordering::SeqCst) {
                return Err(DeviceErrorKind::Aborted);
            }
            match self.state.try_lock() {
                Ok(state) => return Ok(state),
                // A panic in between leaves nothing half done.
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => {
                    if let Some(waited) = deadline.passed() {
                        return Err(DeviceErrorKind::Stuck { waited });
                    }
                    pause.take();
                }
            }
        }
    }

    fn abort(&self, exit_code: i32) -> Result<(), DeviceError> {
        let timer = self.timer("ncclCommAbort", self.options.abort_patience, exit_code);
        // From here on nobody else starts a call; whoever is inside one is waited for.
        self.aborting.store(true, Ordering::SeqCst);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(state.phase, Phase::Finished | Phase::Aborted) {
            // After an orderly end the error of later calls stays "shut down".
            self.aborting.store(state.phase == Phase::Aborted, Ordering::SeqCst);
            return Ok(());
        }
        state.phase = Phase::Aborted;
        let comms = std::mem::take(&mut state.comms);
        let result = self.abort_all(&comms);
        drop((state, timer));
        result.map_err(|kind| self.failed(("NCCL's abort".to_owned(), kind)))
    }

    /// In one group call, which tells all communicators to stop before it waits for any: freeing what one of them had
    /// may wait for the whole device, and so for the kernels of another (since NCCL 2.22; before, one after another).
    fn abort_all(&self, comms: &[Handle]) -> Result<(), DeviceErrorKind> {
        let functions = &self.library.functions;
        let grouped = comms.len() > 1;
        let mut result = Ok(());
        let mut note = |function, code| {
            if let (Ok(()), Err(kind)) = (&result, self.judge(function, code, std::ptr::null_mut())) {
                result = Err(kind);
            }
        };
        if grouped {
            // SAFETY: ended below, on this thread.
            note("ncclGroupStart", unsafe { (functions.group_start)() });
        }
        for Handle(comm) in comms.iter().rev() {
            // SAFETY: alive until here and out of the list now; the lock is held, so that no other thread is inside NCCL.
            note("ncclCommAbort", unsafe { (functions.comm_abort)(*comm) });
        }
        if grouped {
            // SAFETY: started above.
            note("ncclGroupEnd", unsafe { (functions.group_end)() });
        }
        result
    }

    fn failed(&self, (call, kind): Failed) -> DeviceError {
        self.look_at_events();
        let report = self.history.report(self.rank).into();
        DeviceError { call: call.into(), rank: self.rank, world_size: self.world_size, kind, report }
    }

    /// Brings the history up to date, as long as a complete event means a result.
    fn look_at_events(&self) {
        if !self.aborting.load(Ordering::SeqCst) {
            self.history.look();
        }
    }

    /// Ends the process unless what is returned is dropped within `patience`.
    fn timer(&self, what: &'static str, patience: Duration, exit_code: i32) -> Timer {
        let report = self.history.report(self.rank);
        let report = if report.is_empty() { report } else { format!("; {report}") };
        Timer::start(
            patience,
            exit_code,
            format!(
                "error: rank {} of {}: {what} does not return after {:.1} s; ending this process{report}",
                self.rank,
                self.world_size,
                patience.as_secs_f64()
            ),
        )
    }
}

fn data_type(element: DeviceType) -> i32 {
    match element {
        DeviceType::F32 => FLOAT32,
        DeviceType::F64 => FLOAT64,
        DeviceType::Bf16 => BFLOAT16,
    }
}

/// The value of `NCCL_COMM_BLOCKING` if it makes communicators block whatever their configuration says.
fn forced_to_block(value: Option<&str>) -> Option<String> {
    let value = value?.trim();
    (value.parse::<i64>().is_ok_and(|number| number > 0)).then(|| value.to_owned())
}

/// Tells all ranks of all ranks whether they can take part, what they are about to open and with which version; hands
/// them an id that rank 0 makes. One exchange: when it is over, every rank has the same error or none.
fn agree(
    host: &dyn Collectives,
    own: Result<Arc<Library>, DeviceErrorKind>,
    name: &str,
) -> Result<(Arc<Library>, UniqueId), DeviceErrorKind> {
    let made = own.and_then(|library| match host.rank() {
        0 => match library.unique_id() {
            Ok(id) => Ok((library, id)),
            Err(code) => Err(DeviceErrorKind::Call {
                function: "ncclGetUniqueId",
                code,
                text: library.text(code),
                last: library.last_error(std::ptr::null_mut()),
            }),
        },
        _ => Ok((library, UniqueId([0; UNIQUE_ID_BYTES]))),
    });
    let said = match &made {
        Ok((library, id)) => Said::Ready { version: library.version(), id: *id, name: name.to_owned() },
        Err(kind) => Said::Failed(kind.to_string()),
    };
    let all = host.all_gather(&said.to_bytes()).map_err(|error| DeviceErrorKind::Host(Box::new(error)))?;
    let all: Vec<Said> = all.iter().map(|bytes| Said::from_bytes(bytes)).collect();
    let id = common_id(&all);
    // One's own account in full, where that is what went wrong.
    let (library, _) = made?;
    Ok((library, id?))
}

/// What a rank says of itself.
enum Said {
    Ready { version: Version, id: UniqueId, name: String },
    Failed(String),
}

impl Said {
    const READY: u8 = 1;
    const FAILED: u8 = 0;

    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Said::Ready { version, id, name } => {
                [&[Said::READY][..], &version.0.to_le_bytes(), &id.0, name.as_bytes()].concat()
            }
            Said::Failed(reason) => [&[Said::FAILED], reason.as_bytes()].concat(),
        }
    }

    fn from_bytes(bytes: &[u8]) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes.split_first() {
            Some((&Said::READY, rest)) if rest.len() >= 4 + UNIQUE_ID_BYTES => {
                let (version, rest) = rest.split_at(4);
                let (id, name) = rest.split_at(UNIQUE_ID_BYTES);
                let mut own = UniqueId([0; UNIQUE_ID_BYTES]);
                own.0.copy_from_slice(id);
                let version = version.try_into().map_or(0, i32::from_le_bytes);
                Said::Ready { version: Version(version), id: own, name: text(name) }
            }
            Some((&Said::FAILED, reason)) => Said::Failed(text(reason)),
            _ => Said::Failed("it answers something else; do all ranks run the same program?".to_owned()),
        }
    }
}

/// Rank 0's id, if all ranks are ready, and for the same.
fn common_id(all: &[Said]) -> Result<UniqueId, DeviceErrorKind> {
    let mut first: Option<(Version, UniqueId, &str)> = None;
    for (rank, said) in all.iter().enumerate() {
        if let Said::Failed(reason) = said {
            return Err(DeviceErrorKind::Peer { rank: rank as u32, reason: reason.clone() });
        }
    }
    for (rank, said) in all.iter().enumerate() {
        let (Said::Ready { version, id, name }, second) = (said, rank as u32) else { continue };
        match first {
            None => first = Some((*version, *id, name)),
            Some((of_first, _, _)) if of_first != *version => {
                return Err(DeviceErrorKind::Versions {
                    first: 0,
                    first_version: of_first.to_string(),
                    second,
                    second_version: version.to_string(),
                });
            }
            Some((_, _, of_first)) if of_first != name => {
                return Err(DeviceErrorKind::Names {
                    first: 0,
                    first_name: of_first.to_owned(),
                    second,
                    second_name: name.clone(),
                });
            }
            Some(_) => {}
        }
    }
    match first {
        Some((_, id, _)) => Ok(id),
        None => Err(DeviceErrorKind::Peer { rank: 0, reason: "nothing came from it".to_owned() }),
    }
}

/// When a wait has taken too long.
struct Deadline {
    began: Instant,
    waited: Waited,
    patience: Duration,
}

impl Deadline {
    fn after(patience: Duration) -> Deadline {
        Deadline { began: Instant::now(), waited: Waited::begin(), patience }
    }

    /// How long it has taken, if that is too long.
    fn passed(&self) -> Option<Duration> {
        let waited = self.waited.look();
        (waited >= self.patience).then_some(waited)
    }
}

/// Between two looks: at once at first, for what takes microseconds; then with growing sleeps.
struct Pause {
    looks: u32,
    sleep: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Pause { looks: 0, sleep: FIRST_SLEEP }
    }
}

impl Pause {
    fn take(&mut self) {
        if self.looks < EAGER_LOOKS {
            self.looks += 1;
            thread::yield_now();
        } else {
            thread::sleep(self.sleep);
            self.sleep = (self.sleep * 5 / 4).min(LONGEST_SLEEP);
        }
    }
}

/// Ends the process after a while unless it is dropped before.
struct Timer(Arc<(Mutex<bool>, Condvar)>);

impl Timer {
    fn start(patience: Duration, exit_code: i32, last_words: String) -> Timer {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let (words, theirs) = (last_words.clone(), Arc::clone(&shared));
        let watch = move || {
            let (dropped, changed) = &*theirs;
            let dropped = dropped.lock().unwrap_or_else(PoisonError::into_inner);
            let (dropped, _) = changed
                .wait_timeout_while(dropped, patience, |dropped| !*dropped)
                .unwrap_or_else(PoisonError::into_inner);
            if !*dropped {
                end_process(exit_code, words);
            }
        };
        if thread::Builder::new().name("nccl-timer".to_owned()).spawn(watch).is_err() {
            // Without a timer the next call may never return; and without threads nothing else works either.
            end_process(exit_code, last_words);
        }
        Timer(shared)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let (dropped, changed) = &*self.0;
        *dropped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }
}

/// Says why, and ends the process without its exit handlers, which could wait for the device.
fn end_process(exit_code: i32, last_words: String) -> ! {
    // On a thread of its own: whoever should read it may not, and then writing does not return.
    let _ = thread::Builder::new().spawn(move || {
        let _ = writeln!(std::io::stderr(), "{last_words}");
    });
    thread::sleep(OUTPUT_PATIENCE);
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(exit_code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(version: i32, first_byte: u8, name: &str) -> Said {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        id.0[0] = first_byte;
        Said::Ready { version: Version(version), id, name: name.to_owned() }
    }

    fn outcome(all: &[Said]) -> Result<u8, String> {
        let all: Vec<Said> = all.iter().map(|said| Said::from_bytes(&said.to_bytes())).collect();
        common_id(&all).map(|id| id.0[0]).map_err(|kind| kind.to_string())
    }

    #[test]
    fn ranks_agree_or_all_hear_why_not() {
        let group = "the group";
        assert_eq!(outcome(&[ready(22809, 7, group), ready(22809, 0, group)]), Ok(7));
        let cases = [
            (
                vec![ready(22809, 7, group), ready(22809, 0, group), ready(22105, 0, group)],
                "rank 0 has NCCL 2.28.9, rank 2 has NCCL 2.21.5; let all ranks load the same library, see MENTEE_NCCL",
            ),
            (
                vec![ready(22809, 7, "lane a"), ready(22809, 0, "lane b")],
                "rank 0 opens lane a, rank 1 opens lane b",
            ),
            // A rank that cannot take part comes before any difference.
            (
                vec![ready(22809, 7, group), ready(22105, 0, group), Said::Failed("no NCCL".to_owned())],
                "rank 2 cannot take part: no NCCL",
            ),
        ];
        for (all, expected) in cases {
            assert_eq!(outcome(&all), Err(expected.to_owned()));
        }
        let strange = [ready(22809, 7, group), Said::from_bytes(&[Said::READY, 1, 2])];
        assert!(outcome(&strange).is_err_and(|text| text.starts_with("rank 1 cannot take part: it answers")));
    }

    #[test]
    fn only_a_value_that_forces_blocking_is_refused() {
        assert_eq!(forced_to_block(Some("1")), Some("1".to_owned()));
        for allowed in [None, Some("0"), Some(""), Some("no")] {
            assert_eq!(forced_to_block(allowed), None);
        }
    }
}
