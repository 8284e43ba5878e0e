//! The coordinator's shell: sockets and the clock in, effects out. One task owns the state machine; each connection
//! has a task that reads and one that writes, with bounded queues between.
//!
//! A peer cannot hurt the job: it may hold little memory before it has shown the token, must show it soon, and is
//! dropped when it does not read what it is sent. An owner that does not read [`Events`] loses some, and never
//! holds up the job.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, timeout};

use crate::coordinator::{Agreement, Coordinator, Effect, Event, Output, Peer};
use crate::limits;
use crate::message::{CoordinatorAddress, ToCoordinator, ToWorker};
use crate::wire::{self, Decoder, MAX_FRAME, MAX_HELLO, MAX_TO_WORKER};

/// A peer must have said hello by then: it connects only to say it.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// A frame is a few hundred bytes; a peer that does not take it in this time has stopped.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Messages to one worker are few (go, stop): a full queue means it does not read.
const OUTBOUND: usize = 16;
/// Between connections and the state machine; when full, TCP holds the workers' link threads back.
const INBOUND: usize = 1024;
/// Messages that are taken from there at once.
const BATCH: usize = 256;
/// Events an owner may leave unread, and one more for every rank: all may fail at once.
const EVENTS: usize = 4096;
/// Of these, kept free for events other than progress.
const RESERVED: usize = 1024;
/// Connections beyond one a rank: those of the last generation that are not closed yet, and strangers. Above that, who
/// has been longest without saying hello makes room: a worker says it at once, so that no number of silent strangers keeps
/// it out.
const SPARE_CONNECTIONS: usize = 64;
/// Connections that are being closed, beyond those.
const CLOSING: usize = 256;
/// Files that the process has open besides.
const OTHER_FILES: u64 = 128;
/// Of strangers the log has a line so often, however many they are.
const STRANGERS_EVERY: Duration = Duration::from_secs(60);

/// A running coordinator. Dropping it ends the coordinator and closes every connection.
#[derive(Debug)]
pub struct CoordinatorHandle {
    /// Where it listens, for the first generation; see [`CoordinatorHandle::new_generation`].
    pub address: CoordinatorAddress,
    /// What it has to say.
    pub events: Events,
    commands: mpsc::UnboundedSender<Event>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the coordinator has to say to its owner, in order.
#[derive(Debug)]
pub struct Events(mpsc::Receiver<Output>);

impl Events {
    /// The next one; `None` when the coordinator has ended. Cancel safe.
    pub async fn recv(&mut self) -> Option<Output> {
        self.0.recv().await
    }

    /// The next one if there is one now.
    pub fn try_recv(&mut self) -> Option<Output> {
        self.0.try_recv().ok()
    }

    /// The next one, from a thread without a runtime.
    pub fn blocking_recv(&mut self) -> Option<Output> {
        self.0.blocking_recv()
    }
}

impl CoordinatorHandle {
    /// Every rank is told to checkpoint and stop at a step boundary; those still to come as soon as they go.
    pub fn request_stop(&self, reason: &str) {
        self.send(Event::StopRequested { reason: reason.to_owned() });
    }

    /// Makes ready for the next start of the gang; returns the address its workers are to be given.
    pub fn new_generation(&mut self, generation: u32) -> CoordinatorAddress {
        self.send(Event::NewGeneration { generation });
        self.address.generation = generation;
        self.address.clone()
    }

    fn send(&self, event: Event) {
        // The task ends only with the handle or its runtime; then there is nobody left to stop.
        let _ = self.commands.send(event);
    }
}

impl Drop for CoordinatorHandle {
    fn drop(&mut self) {
        // Closing the channel ends the core task, whose queues' ends end the connections.
        self.commands = mpsc::unbounded_channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Allows this process as many open files as a coordinator of this world may hold connections, and it needs besides.
///
/// # Errors
/// When the system does not allow those of the workers.
pub fn allow_open_files(world_size: u32) -> io::Result<()> {
    let ranks = 2 * u64::from(world_size);
    let wanted = ranks + (SPARE_CONNECTIONS + CLOSING) as u64 + OTHER_FILES;
    // With fewer, strangers make room.
    limits::allow_open_files(wanted, ranks + SPARE_CONNECTIONS as u64 + OTHER_FILES)
}

/// A token nobody can guess: 128 bits of the system's randomness, hex.
///
/// # Errors
/// When the system has none to give.
pub fn fresh_token() -> io::Result<String> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Starts a coordinator on the current tokio runtime, on a free port of `interface`, or of every one this machine has.
///
/// # Errors
/// When no port can be bound there.
pub async fn start(
    interface: impl Into<Option<IpAddr>>,
    agreement: Agreement,
) -> io::Result<CoordinatorHandle> {
    let listener = listen(interface.into()).await?;
    let address = address(&listener, &agreement)?;
    let (commands, command_queue) = mpsc::unbounded_channel();
    let (tell, events) = mpsc::channel(EVENTS + agreement.world_size as usize);
    tokio::spawn(core(listener, agreement, command_queue, tell));
    Ok(CoordinatorHandle { address, events: Events(events), commands, thread: None })
}

/// Starts a coordinator on a thread of its own, for an owner without a runtime (rank 0 of a bare `mpirun`).
///
/// # Errors
/// When no port can be bound there, or no thread started.
pub fn start_thread(
    interface: impl Into<Option<IpAddr>>,
    agreement: Agreement,
) -> io::Result<CoordinatorHandle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(listen(interface.into()))?;
    let address = address(&listener, &agreement)?;
    let (commands, command_queue) = mpsc::unbounded_channel();
    let (tell, events) = mpsc::channel(EVENTS + agreement.world_size as usize);
    let thread = std::thread::Builder::new()
        .name("coordinator".into())
        .spawn(move || runtime.block_on(core(listener, agreement, command_queue, tell)))?;
    Ok(CoordinatorHandle { address, events: Events(events), commands, thread: Some(thread) })
}

/// A port opened as a coordinator opens its own, for those who ask whether it can be reached.
///
/// # Errors
/// When no port can be bound there.
pub fn open_port(interface: Option<IpAddr>) -> io::Result<std::net::TcpListener> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async { listen(interface).await?.into_std() })
}

async fn listen(interface: Option<IpAddr>) -> io::Result<TcpListener> {
    match interface {
        Some(interface) => TcpListener::bind((interface, 0)).await,
        // Without IPv6 in the kernel, IPv4 alone.
        None => match dual_stack() {
            Ok(listener) => Ok(listener),
            Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await,
        },
    }
}

/// One port for IPv6 and IPv4: this machine's name may mean either to those who connect.
fn dual_stack() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    let off: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as `socket`, and the option is read from a valid place of the size given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_V6ONLY,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind((Ipv6Addr::UNSPECIFIED, 0).into())?;
    socket.listen(1024)
}

fn address(listener: &TcpListener, agreement: &Agreement) -> io::Result<CoordinatorAddress> {
    let bound = listener.local_addr()?;
    // Bound to every interface: workers on other machines find it by this machine's name.
    let host_port = if bound.ip().is_unspecified() {
        format!("{}:{}", hostname(), bound.port())
    } else {
        bound.to_string()
    };
    Ok(CoordinatorAddress { host_port, token: agreement.token.clone(), generation: 0 })
}

/// This machine's name, as the kernel has it.
pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or("localhost".into(), |name| name.trim().to_owned())
}

struct Connection {
    outbound: mpsc::Sender<Vec<u8>>,
    admitted: Arc<AtomicBool>,
}

impl Connection {
    fn is_admitted(&self) -> bool {
        self.admitted.load(Ordering::Acquire)
    }
}

/// The oldest stranger makes room; whether there was one.
fn evict(strangers: &mut VecDeque<Peer>, connections: &mut HashMap<Peer, Connection>) -> bool {
    while let Some(oldest) = strangers.pop_front() {
        if connections.get(&oldest).is_some_and(|it| !it.is_admitted()) {
            connections.remove(&oldest);
            return true;
        }
    }
    false
}

/// Strangers in the log: anyone on the network can be one any number of times, so that they are counted.
struct Strangers {
    count: u64,
    one: String,
    told: Option<Instant>,
}

impl Strangers {
    /// Something of one; `over`: its end, which says less than what it did.
    fn note(&mut self, over: bool, what: String) {
        self.count += u64::from(over);
        if self.one.is_empty() || !over {
            self.one = what;
        }
    }

    fn tell(&mut self) {
        if self.count > 0 && self.told.is_none_or(|told| told.elapsed() >= STRANGERS_EVERY) {
            tracing::info!(
                target: "mentee::coordinator",
                "{} connections without a place in this job have ended, one of them: {}",
                self.count,
                self.one
            );
            *self = Strangers { count: 0, one: String::new(), told: Some(Instant::now()) };
        }
    }
}

/// The one task that owns the state machine.
async fn core(
    listener: TcpListener,
    agreement: Agreement,
    mut commands: mpsc::UnboundedReceiver<Event>,
    tell: mpsc::Sender<Output>,
) {
    let room = 2 * agreement.world_size as usize + SPARE_CONNECTIONS;
    let slots = Arc::new(Semaphore::new(room + CLOSING));
    // In order of their coming; those that have said hello or gone since are passed over.
    let mut strangers: VecDeque<Peer> = VecDeque::new();
    let mut coordinator = Coordinator::new(agreement, 0);
    let mut connections: HashMap<Peer, Connection> = HashMap::new();
    // Each with whether it is of one that has shown the token.
    let (inbound, mut arrivals) = mpsc::channel::<(Event, bool)>(INBOUND);
    let mut next_peer: Peer = 0;
    let mut batch = Vec::with_capacity(BATCH);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    // After a pause of this process one tick says all.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let started = Instant::now();
    let mut last_reason = String::new();
    let mut unknown = Strangers { count: 0, one: String::new(), told: None };
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => batch.push((command, true)),
                None => return,
            },
            _ = arrivals.recv_many(&mut batch, BATCH) => {}
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    // Out of file descriptors, most likely: a stranger gives up its own, and some get the time to close.
                    let wait = if evict(&mut strangers, &mut connections) { 5 } else { 50 };
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                    continue;
                };
                while connections.len() >= room && evict(&mut strangers, &mut connections) {}
                // Above the bound the stream is dropped, that is closed.
                if let Ok(slot) = slots.clone().try_acquire_owned() {
                    let peer = next_peer;
                    next_peer += 1;
                    let (outbound, queue) = mpsc::channel(OUTBOUND);
                    let admitted = Arc::new(AtomicBool::new(false));
                    strangers.push_back(peer);
                    if strangers.len() > 2 * room {
                        strangers.retain(|peer| {
                            connections.get(peer).is_some_and(|it| !it.is_admitted())
                        });
                    }
                    connections.insert(peer, Connection { outbound, admitted: admitted.clone() });
                    let inbound = inbound.clone();
                    tokio::spawn(async move {
                        let why = connection(peer, stream, &inbound, queue, &admitted).await;
                        let known = admitted.load(Ordering::Acquire);
                        let _ = inbound.send((Event::Gone { peer, why }, known)).await;
                        drop(slot);
                    });
                }
                continue;
            }
            _ = ticks.tick() => {
                unknown.tell();
                batch.push((Event::Tick, true));
            }
        }
        // In order of their coming; what follows from one comes before the next.
        let mut events: VecDeque<(Event, bool)> = batch.drain(..).collect();
        while let Some((event, known)) = events.pop_front() {
            if let Event::Gone { peer, .. } = &event {
                connections.remove(peer);
            }
            let over = matches!(event, Event::Gone { .. });
            let routine = matches!(event, Event::Tick)
                || matches!(event, Event::Message { message: ToCoordinator::Progress { .. }, .. });
            let (effects, reason) = coordinator.handle(started.elapsed(), event);
            let news = |effect: &Effect| matches!(effect, Effect::Tell(output) if !matches!(output, Output::Progress { .. }));
            let known =
                known || effects.iter().any(|effect| matches!(effect, Effect::Admit(_) | Effect::Tell(_)));
            if !known {
                unknown.note(over, reason);
            } else if (!routine || effects.iter().any(news)) && reason != last_reason {
                tracing::info!(target: "mentee::coordinator", "{reason}");
                last_reason = reason;
            }
            for effect in effects {
                match effect {
                    Effect::Admit(peer) => {
                        if let Some(connection) = connections.get(&peer) {
                            connection.admitted.store(true, Ordering::Release);
                        }
                    }
                    Effect::Send(peer, message) => {
                        if !send(&connections, peer, &message) && connections.remove(&peer).is_some() {
                            let why = "it does not read what it is sent".into();
                            events.push_front((Event::Gone { peer, why }, known));
                        }
                    }
                    // Dropping the queue lets the connection send what is in it, then close.
                    Effect::Close(peer) => drop(connections.remove(&peer)),
                    Effect::Tell(output) => pass_on(&tell, output),
                }
            }
        }
    }
}

/// `false`: the peer does not read what it is sent, or it cannot be sent.
fn send(connections: &HashMap<Peer, Connection>, peer: Peer, message: &ToWorker) -> bool {
    let Some(connection) = connections.get(&peer) else { return true };
    match wire::encode_within(message, MAX_TO_WORKER) {
        // One that has ended says so itself, behind what it has sent.
        Ok(frame) => !matches!(connection.outbound.try_send(frame), Err(mpsc::error::TrySendError::Full(_))),
        Err(error) => {
            tracing::error!(target: "mentee::coordinator", "{error}");
            false
        }
    }
}

/// Progress is dropped when the owner is behind: newer comes soon.
fn pass_on(tell: &mpsc::Sender<Output>, output: Output) {
    if matches!(output, Output::Progress { .. }) && tell.capacity() < RESERVED {
        return;
    }
    if let Err(mpsc::error::TrySendError::Full(output)) = tell.try_send(output) {
        tracing::debug!(target: "mentee::coordinator", "nobody reads the coordinator's events; lost {output:?}");
    }
}

/// Moves messages of one peer until it ends; returns why it did.
async fn connection(
    peer: Peer,
    stream: TcpStream,
    inbound: &mpsc::Sender<(Event, bool)>,
    mut outbound: mpsc::Receiver<Vec<u8>>,
    admitted: &AtomicBool,
) -> String {
    let _ = stream.set_nodelay(true);
    let (mut read_half, mut write_half) = stream.into_split();
    let reading = async {
        let mut decoder = Decoder::new(MAX_HELLO);
        let mut buffer = [0; 4096];
        let deadline = Instant::now() + HELLO_DEADLINE;
        loop {
            let known = admitted.load(Ordering::Acquire);
            if known {
                decoder.set_limit(MAX_FRAME);
            }
            loop {
                match decoder.next::<ToCoordinator>() {
                    Ok(Some(message)) => {
                        let known = admitted.load(Ordering::Acquire);
                        if inbound.send((Event::Message { peer, message }, known)).await.is_err() {
                            return "the coordinator has ended".to_owned();
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return error.to_string(),
                }
            }
            let read = read_half.read(&mut buffer);
            let count = if known {
                read.await
            } else {
                match tokio::time::timeout_at(deadline, read).await {
                    Ok(count) => count,
                    // Said hello in time and waits for the rest of its gang.
                    Err(_) if admitted.load(Ordering::Acquire) => continue,
                    Err(_) => return format!("no hello within {} s", HELLO_DEADLINE.as_secs()),
                }
            };
            match count {
                Ok(0) => return "it closed the connection".to_owned(),
                Ok(count) => decoder.push(&buffer[..count]),
                Err(error) => return error.to_string(),
            }
        }
    };
    let writing = async {
        while let Some(frame) = outbound.recv().await {
            match timeout(WRITE_DEADLINE, write_half.write_all(&frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return "it does not read what it is sent".to_owned(),
            }
        }
        let _ = timeout(WRITE_DEADLINE, write_half.shutdown()).await;
        "closed by the coordinator".to_owned()
    };
    tokio::select! {
        why = reading => why,
        why = writing => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_has_ended_is_not_taken_for_one_that_does_not_read() {
        let (outbound, queue) = mpsc::channel(1);
        let connections = HashMap::from([(1, Connection { outbound, admitted: Arc::default() })]);
        let message = ToWorker::Abandon { step: 3, reason: "none".into() };
        assert!(send(&connections, 1, &message), "there is room");
        assert!(!send(&connections, 1, &message), "nobody has read the first");
        drop(queue);
        assert!(send(&connections, 1, &message), "its own end is on its way, behind what it said last");
        assert!(send(&connections, 2, &message), "nobody");
    }
}
