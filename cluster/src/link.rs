//! A worker's end of the wire: blocking calls for the training thread, one thread with the socket.
//!
//! Nothing here ever waits for the network but [`Link::connect`] and [`Link::close`]: reports overwrite each other
//! (the newest wins), events queue up. When the coordinator goes away the worker is asked to stop, since nobody could
//! ask it later.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc as std_mpsc};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::message::{
    CoordinatorAddress, Go, Hello, PROTOCOL, Phase, Progress, Share, ShareFile, ToCoordinator, ToWorker,
    WorkerEvent,
};
use crate::vitals::Vitals;
use crate::wire::{self, Decoder, MAX_TO_WORKER};

/// Without news, this often.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// With news, at most this often: people read it, at ten a second. In worlds of more than [`REPORTS_A_SECOND`] / 10 ranks
/// less often, so that all together the coordinator gets no more than so many, or one a second of each.
const REPORT_EVERY: Duration = Duration::from_millis(100);
const REPORTS_A_SECOND: u32 = 2000;
/// How long [`Link::close`] waits for the coordinator to have read everything.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);
/// A frame is small; a coordinator that does not take one in this time has stopped.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// Why a worker is not part of the job.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Nobody listens there.
    #[error(
        "rank {rank} cannot reach the coordinator at {address}: {reason}; is the supervisor still running?"
    )]
    Unreachable {
        /// This rank.
        rank: u32,
        /// Where the coordinator should be.
        address: String,
        /// The system's error.
        reason: String,
    },
    /// The coordinator said no; trying again cannot help.
    #[error("the coordinator at {address} refused rank {rank}: {reason}")]
    Refused {
        /// This rank.
        rank: u32,
        /// Where the coordinator is.
        address: String,
        /// What it said.
        reason: String,
        /// What this rank is to exit with, as it said.
        exit_code: i32,
    },
    /// Not all ranks have come.
    #[error("rank {rank} waited {} s for the other ranks at {address}: did all {world_size} start?", waited.as_secs())]
    TimedOut {
        /// This rank.
        rank: u32,
        /// Where the coordinator is.
        address: String,
        /// Ranks in the world.
        world_size: u32,
        /// How long.
        waited: Duration,
    },
}

/// Why the worker is to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The owner asked; its words.
    Requested(String),
    /// The coordinator is gone; how.
    CoordinatorLost(String),
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StopReason::Requested(reason) => write!(f, "stop requested: {reason}"),
            StopReason::CoordinatorLost(reason) => write!(f, "coordinator lost: {reason}"),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Newest report; what `vitals` holds is newer.
    progress: Mutex<Progress>,
    vitals: Arc<Vitals>,
    fresh: AtomicBool,
    stop: AtomicBool,
    stop_reason: Mutex<Option<StopReason>>,
    wake: Notify,
}

impl Shared {
    fn stop(&self, reason: StopReason) {
        lock(&self.stop_reason).get_or_insert(reason);
        self.stop.store(true, Ordering::Release);
    }
}

/// What the socket's thread is to do, in this order.
#[derive(Debug)]
enum Queued {
    Send(ToCoordinator),
    /// Say that all before this is on its way.
    Tell(std_mpsc::Sender<()>),
}

/// A worker's link to its coordinator. Dropping it is [`Link::close`].
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    /// `None` once closed.
    events: Option<mpsc::UnboundedSender<Queued>>,
    /// `None` once taken.
    shares: Option<Shares>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Link {
    /// Says hello and waits until every rank of the world has, at most `deadline`.
    ///
    /// # Errors
    /// [`LinkError`]; no thread is left behind.
    pub fn connect(
        address: &CoordinatorAddress,
        hello: Hello,
        deadline: Duration,
    ) -> Result<(Link, Go), LinkError> {
        Link::connect_with(address, hello, deadline, Arc::default())
    }

    /// [`Link::connect`], with vital signs that are kept outside.
    ///
    /// # Errors
    /// As there.
    pub fn connect_with(
        address: &CoordinatorAddress,
        hello: Hello,
        deadline: Duration,
        vitals: Arc<Vitals>,
    ) -> Result<(Link, Go), LinkError> {
        let (rank, world_size) = (hello.rank, hello.world_size);
        let unreachable =
            |reason: String| LinkError::Unreachable { rank, address: address.host_port.clone(), reason };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| unreachable(error.to_string()))?;
        let shared = Arc::new(Shared { vitals, ..Shared::default() });
        let (events, queue) = mpsc::unbounded_channel();
        let (answer, answered) = std_mpsc::sync_channel(1);
        let (verdict, verdicts) = std_mpsc::channel();
        let shares = Shares { to: events.downgrade(), verdicts };
        let thread = std::thread::Builder::new()
            .name("link".into())
            .spawn({
                let (shared, address) = (shared.clone(), address.clone());
                move || runtime.block_on(run(address, hello, deadline, shared, queue, answer, verdict))
            })
            .map_err(|error| unreachable(error.to_string()))?;
        // The thread keeps the deadline itself and always answers; a panic there closes the channel.
        let answer = answered.recv().unwrap_or(Answer::Unreachable("the link thread ended".into()));
        let error = match answer {
            Answer::Go(go) => {
                let (events, shares) = (Some(events), Some(shares));
                return Ok((Link { shared, events, shares, thread: Some(thread) }, go));
            }
            Answer::Unreachable(reason) => unreachable(reason),
            Answer::Refused { reason, exit_code } => {
                LinkError::Refused { rank, address: address.host_port.clone(), reason, exit_code }
            }
            Answer::TimedOut => {
                LinkError::TimedOut { rank, address: address.host_port.clone(), world_size, waited: deadline }
            }
        };
        let _ = thread.join();
        Err(error)
    }

    /// Where this rank stands; never waits. The phase is taken over too.
    pub fn report(&self, progress: Progress) {
        self.shared.vitals.phase(progress.phase);
        self.shared.vitals.step(progress.step);
        *lock(&self.shared.progress) = progress;
        self.news();
    }

    /// There is news among the vital signs; never waits.
    pub fn news(&self) {
        self.shared.fresh.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }

    /// What this rank does now; one atomic store, sent with the next report or heartbeat.
    pub fn phase(&self, phase: Phase) {
        self.shared.vitals.phase(phase);
    }

    /// Something that must not be lost; never waits. Delivered in order, at the latest by [`Link::close`].
    pub fn event(&self, mut event: WorkerEvent) {
        event.clip();
        if let Some(events) = &self.events {
            // A closed channel: the coordinator is lost, which `stop_reason` says.
            let _ = events.send(Queued::Send(ToCoordinator::Event { event }));
        }
    }

    /// For the thread that finds that this process must end at once.
    pub fn last_words(&self) -> LastWords {
        let to = self.events.as_ref().map(mpsc::UnboundedSender::downgrade);
        LastWords { to, shared: self.shared.clone() }
    }

    /// For the thread that writes checkpoints; the first call gets it.
    pub fn shares(&mut self) -> Option<Shares> {
        self.shares.take()
    }

    /// Whether the run is to checkpoint and stop at the next step boundary. Ranks may learn it a step apart: they must
    /// agree on the step among themselves.
    pub fn stop_requested(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Why, when [`Link::stop_requested`].
    pub fn stop_reason(&self) -> Option<StopReason> {
        lock(&self.shared.stop_reason).clone()
    }

    /// Delivers what is queued and hangs up; waits at most a few seconds.
    pub fn close(mut self) {
        self.hang_up();
    }

    fn hang_up(&mut self) {
        self.events = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The part of a [`Link`] by which any thread says why the process ends. It does not keep the link open.
#[derive(Debug)]
pub struct LastWords {
    to: Option<mpsc::WeakUnboundedSender<Queued>>,
    shared: Arc<Shared>,
}

impl LastWords {
    /// Says what `event` makes of the steps that are done and of the phase, and returns when it is on its way, or cannot be,
    /// within `patience`.
    pub fn say(&self, event: impl FnOnce(u64, Phase) -> WorkerEvent, patience: Duration) {
        let Some(to) = self.to.as_ref().and_then(mpsc::WeakUnboundedSender::upgrade) else { return };
        let Progress { step, phase, .. } = self.shared.vitals.fill(Progress::default());
        let mut event = event(step, phase);
        event.clip();
        let (tell, told) = std_mpsc::channel();
        let _ = to.send(Queued::Send(ToCoordinator::Event { event }));
        let _ = to.send(Queued::Tell(tell));
        // At once where the link's thread is gone, which drops the other end.
        let _ = told.recv_timeout(patience);
    }
}

/// The part of a [`Link`] by which checkpoints are committed. It does not keep the link open.
#[derive(Debug)]
pub struct Shares {
    to: mpsc::WeakUnboundedSender<Queued>,
    verdicts: std_mpsc::Receiver<(u64, Verdict)>,
}

/// Why a checkpoint is not to be committed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCommit {
    /// Every rank is done with it, and one of them failed; which and why.
    #[error("{0}")]
    ShareFailed(String),
    /// Not every rank was heard in time: they may still be writing.
    #[error("not every rank has written its share within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// Nobody knows what the others did.
    #[error("the coordinator was lost before it knew of every rank's share")]
    CoordinatorLost,
}

/// Every rank's file, or why there is to be no checkpoint.
pub type Verdict = Result<Vec<ShareFile>, NoCommit>;

impl Shares {
    /// What became of this rank's share of the checkpoint of `step`; never waits.
    pub fn report(&self, step: u64, mut share: Share) {
        share.clip();
        // Closed or lost: the verdict does not come then.
        if let Some(to) = self.to.upgrade() {
            let _ = to.send(Queued::Send(ToCoordinator::Share { step, share }));
        }
    }

    /// On rank 0: the files of all ranks, once every rank has reported its share. `late` is told meanwhile what became of
    /// earlier steps, whose verdict was not waited for to the end.
    ///
    /// # Errors
    /// When a rank failed, the coordinator is gone, or it took longer than `patience`.
    pub fn verdict(&self, step: u64, patience: Duration, mut late: impl FnMut(u64, Verdict)) -> Verdict {
        let deadline = Instant::now() + patience;
        loop {
            match self.verdicts.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((of, verdict)) if of == step => return verdict,
                Ok((of, verdict)) => late(of, verdict),
                Err(std_mpsc::RecvTimeoutError::Timeout) => {
                    return Err(NoCommit::TimedOut(patience));
                }
                Err(std_mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(NoCommit::CoordinatorLost);
                }
            }
        }
    }

    /// A verdict that has come since nobody waits for one, and its step; never waits.
    pub fn late(&self) -> Option<(u64, Verdict)> {
        self.verdicts.try_recv().ok()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.hang_up();
    }
}

enum Answer {
    Go(Go),
    Refused { reason: String, exit_code: i32 },
    Unreachable(String),
    TimedOut,
}

async fn run(
    address: CoordinatorAddress,
    hello: Hello,
    deadline: Duration,
    shared: Arc<Shared>,
    events: mpsc::UnboundedReceiver<Queued>,
    answer: std_mpsc::SyncSender<Answer>,
    verdicts: std_mpsc::Sender<(u64, Verdict)>,
) {
    let every = report_every(hello.world_size);
    let joined = timeout(deadline, join(&address, hello)).await.unwrap_or(Err(Answer::TimedOut));
    let (stream, decoder) = match joined {
        Ok((stream, decoder, go)) => {
            let _ = answer.send(Answer::Go(go));
            (stream, decoder)
        }
        Err(no) => {
            let _ = answer.send(no);
            return;
        }
    };
    if let Err(reason) = exchange(stream, decoder, &shared, events, &verdicts, every).await {
        shared.stop(StopReason::CoordinatorLost(reason));
    }
}

/// How often a rank of such a world reports at most.
pub fn report_every(world_size: u32) -> Duration {
    (Duration::from_secs(1) * world_size / REPORTS_A_SECOND).clamp(REPORT_EVERY, HEARTBEAT)
}

async fn join(address: &CoordinatorAddress, hello: Hello) -> Result<(TcpStream, Decoder, Go), Answer> {
    let lost = |error: std::io::Error| Answer::Unreachable(error.to_string());
    let mut stream = dial(&address.host_port).await.map_err(lost)?;
    let _ = stream.set_nodelay(true);
    let message = ToCoordinator::Hello {
        protocol: PROTOCOL,
        token: address.token.clone(),
        generation: address.generation,
        hello,
    };
    let frame = wire::encode(&message).map_err(|error| Answer::Unreachable(error.to_string()))?;
    stream.write_all(&frame).await.map_err(lost)?;
    let mut decoder = Decoder::new(MAX_TO_WORKER);
    loop {
        match decoder.next::<ToWorker>().map_err(|error| Answer::Unreachable(error.to_string()))? {
            Some(ToWorker::Go { generation }) => return Ok((stream, decoder, Go { generation })),
            Some(ToWorker::Refused { reason, exit_code }) => {
                return Err(Answer::Refused { reason, exit_code });
            }
            // Nothing was asked of it yet, but a stop, which is said again.
            Some(ToWorker::Stop { .. } | ToWorker::Commit { .. } | ToWorker::Abandon { .. }) => {}
            None => read_into(&mut stream, &mut decoder).await.map_err(Answer::Unreachable)?,
        }
    }
}

/// The coordinator listens before any worker starts; a refused connection is tried again for a moment only, for
/// machines whose accept queue overflows when thousands of ranks come at once.
async fn dial(host_port: &str) -> std::io::Result<TcpStream> {
    let started = Instant::now();
    loop {
        match TcpStream::connect(host_port).await {
            Err(_) if started.elapsed() < Duration::from_secs(3) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            result => return result,
        }
    }
}

async fn read_into(stream: &mut (impl AsyncReadExt + Unpin), decoder: &mut Decoder) -> Result<(), String> {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer).await {
        Ok(0) => Err("it closed the connection".into()),
        Ok(count) => {
            decoder.push(&buffer[..count]);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Moves messages both ways until the worker closes the link (`Ok`) or the coordinator is gone.
async fn exchange(
    stream: TcpStream,
    mut decoder: Decoder,
    shared: &Shared,
    mut events: mpsc::UnboundedReceiver<Queued>,
    verdicts: &std_mpsc::Sender<(u64, Verdict)>,
    every: Duration,
) -> Result<(), String> {
    let (mut reader, mut writer) = stream.into_split();
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next_report = tokio::time::Instant::now();
    let reading = listen(&mut reader, &mut decoder, shared, verdicts);
    let writing = async {
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(Queued::Send(message)) => send(&mut writer, &message).await?,
                    Some(Queued::Tell(tell)) => drop(tell.send(())),
                    None => break,
                },
                () = async {
                    shared.wake.notified().await;
                    tokio::time::sleep_until(next_report).await;
                } => {}
                _ = heartbeat.tick() => shared.fresh.store(true, Ordering::Release),
            }
            let now = tokio::time::Instant::now();
            if now >= next_report && shared.fresh.swap(false, Ordering::AcqRel) {
                next_report = now + every;
                send(&mut writer, &newest(shared)).await?;
            }
        }
        send(&mut writer, &newest(shared)).await?;
        writer.shutdown().await.map_err(|error| error.to_string())
    };
    tokio::pin!(reading);
    tokio::select! {
        Err(reason) = &mut reading => return Err(reason),
        result = writing => result?,
    }
    // The coordinator has read everything when it closes its end too.
    let _ = timeout(CLOSE_DEADLINE, reading).await;
    Ok(())
}

/// Takes in what the coordinator sends until it is gone.
async fn listen(
    reader: &mut (impl AsyncReadExt + Unpin),
    decoder: &mut Decoder,
    shared: &Shared,
    verdicts: &std_mpsc::Sender<(u64, Verdict)>,
) -> Result<Infallible, String> {
    // Who does not wait for a verdict has dropped the other end.
    let decided = |step, verdict| drop(verdicts.send((step, verdict)));
    loop {
        match decoder.next::<ToWorker>().map_err(|error| error.to_string())? {
            Some(ToWorker::Commit { step, files }) => decided(step, Ok(files)),
            Some(ToWorker::Abandon { step, reason }) => decided(step, Err(NoCommit::ShareFailed(reason))),
            Some(ToWorker::Stop { reason }) => shared.stop(StopReason::Requested(reason)),
            Some(ToWorker::Refused { reason, .. }) => return Err(reason),
            Some(ToWorker::Go { .. }) => {}
            None => read_into(reader, decoder).await?,
        }
    }
}

fn newest(shared: &Shared) -> ToCoordinator {
    ToCoordinator::Progress { progress: shared.vitals.fill(lock(&shared.progress).clone()) }
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), message: &ToCoordinator) -> Result<(), String> {
    let frame = wire::encode(message).map_err(|error| error.to_string())?;
    match timeout(WRITE_DEADLINE, writer.write_all(&frame)).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("it does not read what it is sent".into()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
