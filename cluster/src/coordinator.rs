//! The coordinator's decisions: a pure state machine, `handle(now, event) -> (effects, reason)`. Sockets and the
//! clock are in [`crate::server`]; transcripts of whole jobs in `cluster/tests/golden/` show it at work.
//!
//! ```text
//!              every rank said hello                 a stop was requested
//!  Gathering ────────────────────────► Running ───────────────────────────► Running, stopping
//!      ▲                                  │                                       │
//!      └────────── NewGeneration ─────────┴────────── every rank finished ────────┴──► Ended
//! ```
//!
//! A checkpoint counts when every rank has reported its share of it ([`ToCoordinator::Share`]): only then rank 0 is told to
//! write the manifest. A rank that dies first leaves an attempt that nobody commits.
//!
//! The gang lives and dies together: a failed collective cannot be repaired from inside, so there is no joining
//! later. What ends a generation is the supervisor's business ([`crate::Output`] tells it what happened); the next
//! one starts with [`Event::NewGeneration`], and whoever still belongs to the last one is refused.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use mentee_config::exit_code::{DATA, FAILED, USAGE};

use crate::message::{Hello, PROTOCOL, Phase, Progress, Share, ToCoordinator, ToWorker, WorkerEvent, clip};
use crate::watch::{Pace, Stall, Watch};

/// A connection, numbered by the server; never used twice.
pub type Peer = u64;

/// How long a gang may take to say hello. Loading libtorch and the list of a large data set from a cold network file
/// system takes a minute or two; more than this is a rank that will never come.
pub const GATHER_DEADLINE: Duration = Duration::from_secs(300);

/// Checkpoints that ranks may be writing at a time: one that is done with its share goes on to the next, while a slower
/// one still writes; then it waits for that one in the step's sums.
const OPEN_CHECKPOINTS: usize = 2;

/// What every rank must agree on.
#[derive(Debug, Clone)]
pub struct Agreement {
    /// The job's token.
    pub token: String,
    /// Ranks in the world.
    pub world_size: u32,
    /// Hash of the plan; `None` = that of the first rank to come counts.
    pub plan_hash: Option<String>,
    /// Version of mentee that every rank must run.
    pub version: String,
    /// When a gang that does not go on is a stall, see [`crate::watch`]. This one is the coordinator's alone.
    pub stall: Duration,
}

/// [`Agreement::stall`] where nothing else is asked for.
pub const STALL: Duration = Duration::from_secs(60);

/// What happens to the coordinator.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A connection delivered a message.
    Message {
        /// The connection.
        peer: Peer,
        /// The message.
        message: ToCoordinator,
    },
    /// A connection is gone.
    Gone {
        /// The connection.
        peer: Peer,
        /// Why: closed, slow, or broken.
        why: String,
    },
    /// The owner wants the ranks to stop at a step boundary.
    StopRequested {
        /// Why, for the ranks' logs.
        reason: String,
    },
    /// The gang is started again.
    NewGeneration {
        /// Its number; greater than the last.
        generation: u32,
    },
    /// Time passes.
    Tick,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The connection has shown the token: it may send longer messages.
    Admit(Peer),
    /// Send a message.
    Send(Peer, ToWorker),
    /// Send what is queued, then close the connection.
    Close(Peer),
    /// Tell the owner.
    Tell(Output),
}

/// What the owner of the coordinator (supervisor, or rank 0 of a bare `mpirun`) gets to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Another start of the gang is waited for: what follows is of this one, what came before is not.
    Gathering {
        /// Which start of the gang.
        generation: u32,
    },
    /// Every rank is there and was told to go.
    Go {
        /// Which start of the gang.
        generation: u32,
        /// The ranks, in order.
        ranks: Vec<Hello>,
    },
    /// A rank's newest state.
    Progress {
        /// The rank.
        rank: u32,
        /// Its state.
        progress: Progress,
    },
    /// A rank reported an event (of [`WorkerEvent::Failed`], see there).
    Event {
        /// The rank.
        rank: u32,
        /// The event.
        event: WorkerEvent,
    },
    /// A rank's connection ended before the rank said that it was finished.
    Lost {
        /// The rank.
        rank: u32,
        /// The machine it ran on.
        host: String,
        /// Steps it had completed.
        step: u64,
        /// What it was doing last.
        phase: Phase,
        /// How the connection ended.
        why: String,
    },
    /// The gang does not go on; said once a start.
    Stalled {
        /// The rank that holds it up, where and how.
        stall: Stall,
        /// Its machine.
        host: String,
    },
    /// A rank has become a straggler, or is none any longer.
    Pace {
        /// The rank and its times.
        pace: Pace,
        /// Its machine.
        host: String,
    },
    /// A process that knows the token was turned away.
    Refused {
        /// The rank it claims.
        rank: u32,
        /// Why, as one line.
        reason: String,
        /// It belongs to this start of the gang: the gang cannot become complete.
        ours: bool,
        /// What it, and the run with it, is to end with.
        exit_code: i32,
    },
    /// Ranks that have not come within [`GATHER_DEADLINE`]; said once a generation.
    Missing {
        /// The ranks.
        ranks: Vec<u32>,
    },
    /// Every rank said it is finished.
    AllFinished {
        /// The greatest of their exit codes.
        exit_code: i32,
    },
}

/// Why the last decision was taken, for the log.
pub type Reason = String;

#[derive(Debug)]
struct Member {
    peer: Peer,
    hello: Hello,
    progress: Progress,
    finished: Option<i32>,
    failed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Gathering { missing_told: bool },
    Running,
    Ended,
}

/// The state machine. Total: any event is legal in any state, and memory is bounded by the world size.
#[derive(Debug)]
pub struct Coordinator {
    agreement: Agreement,
    data_digest: Option<String>,
    generation: u32,
    generation_started: Duration,
    state: State,
    members: BTreeMap<u32, Member>,
    /// The members' ranks.
    ranks: HashMap<Peer, u32>,
    /// Members that have said they are finished.
    finished: usize,
    watch: Option<Watch>,
    /// By step, then by rank: what was reported of checkpoints that are not complete.
    shares: BTreeMap<u64, BTreeMap<u32, Share>>,
    stop: Option<String>,
}

impl Coordinator {
    /// A job that waits for its ranks. `generation`: which start of the gang this is.
    pub fn new(agreement: Agreement, generation: u32) -> Coordinator {
        Coordinator {
            agreement,
            data_digest: None,
            generation,
            generation_started: Duration::ZERO,
            state: State::Gathering { missing_told: false },
            members: BTreeMap::new(),
            ranks: HashMap::new(),
            finished: 0,
            watch: None,
            shares: BTreeMap::new(),
            stop: None,
        }
    }

    /// Takes one event at time `now` (since the coordinator was made) and says what to do and why.
    pub fn handle(&mut self, now: Duration, event: Event) -> (Vec<Effect>, Reason) {
        match event {
            Event::Message { peer, message: ToCoordinator::Hello { protocol, token, generation, hello } } => {
                self.hello(now, peer, protocol, &token, generation, hello)
            }
            Event::Message { peer, message: ToCoordinator::Progress { progress } } => {
                self.progress(now, peer, progress)
            }
            Event::Message { peer, message: ToCoordinator::Event { event } } => {
                self.worker_event(peer, event)
            }
            Event::Message { peer, message: ToCoordinator::Share { step, share } } => {
                self.share(peer, step, share)
            }
            Event::Gone { peer, why } => self.gone(peer, why),
            Event::StopRequested { reason } => self.stop(reason),
            Event::NewGeneration { generation } => self.new_generation(now, generation),
            Event::Tick => self.tick(now),
        }
    }

    fn hello(
        &mut self,
        now: Duration,
        peer: Peer,
        protocol: u32,
        token: &str,
        generation: u32,
        mut hello: Hello,
    ) -> (Vec<Effect>, Reason) {
        if !same_secret(token, &self.agreement.token) {
            // Says nothing of the job, not even to the owner: anyone on the network can do this any number of times.
            let refusal = ToWorker::Refused { reason: "wrong token".into(), exit_code: FAILED };
            return (vec![Effect::Send(peer, refusal), Effect::Close(peer)], "wrong token".into());
        }
        clip(&mut hello.host);
        if let Some((blame, reason)) = self.objection(peer, protocol, generation, &hello) {
            let exit_code = blame.unwrap_or(FAILED);
            let (rank, ours) = (hello.rank, blame.is_some());
            let effects = vec![
                Effect::Send(peer, ToWorker::Refused { reason: reason.clone(), exit_code }),
                Effect::Close(peer),
                Effect::Tell(Output::Refused { rank, reason: reason.clone(), ours, exit_code }),
            ];
            return (effects, reason);
        }
        self.agreement.plan_hash.get_or_insert_with(|| hello.plan_hash.clone());
        self.data_digest.get_or_insert_with(|| hello.data_digest.clone());
        let rank = hello.rank;
        let member = Member { peer, hello, progress: Progress::default(), finished: None, failed: false };
        self.members.insert(rank, member);
        self.ranks.insert(peer, rank);
        let mut effects = vec![Effect::Admit(peer)];
        let (there, world) = (self.members.len(), self.agreement.world_size);
        if there < world as usize {
            return (effects, format!("rank {rank} is here, {there} of {world}"));
        }
        self.state = State::Running;
        self.watch = Some(Watch::new(self.agreement.stall, world, now));
        effects.extend(
            self.members
                .values()
                .map(|member| Effect::Send(member.peer, ToWorker::Go { generation: self.generation })),
        );
        if let Some(reason) = &self.stop {
            effects.extend(
                self.members
                    .values()
                    .map(|member| Effect::Send(member.peer, ToWorker::Stop { reason: reason.clone() })),
            );
        }
        let ranks = self.members.values().map(|member| member.hello.clone()).collect();
        effects.push(Effect::Tell(Output::Go { generation: self.generation, ranks }));
        (effects, format!("rank {rank} is here, all {world} are: go"))
    }

    /// Why a rank with the right token cannot take part; where that leaves this gang incomplete, with the exit code of what
    /// is wrong.
    fn objection(
        &self,
        peer: Peer,
        protocol: u32,
        generation: u32,
        hello: &Hello,
    ) -> Option<(Option<i32>, String)> {
        let Hello { rank, world_size, version, plan_hash, data_digest, .. } = hello;
        let agreed = &self.agreement;
        if generation != self.generation {
            let reason =
                format!("rank {rank} belongs to start {generation} of the run, this is {}", self.generation);
            return Some((None, reason));
        }
        if protocol != PROTOCOL || *version != agreed.version {
            let reason = format!(
                "rank {rank} runs mentee {version} (protocol {protocol}), the job {} (protocol {PROTOCOL}): use one \
                 version on all machines",
                agreed.version
            );
            return Some((Some(USAGE), reason));
        }
        if *world_size != agreed.world_size {
            let reason = format!(
                "rank {rank} was started in a world of {world_size}, the job has {}: start all ranks with one launcher",
                agreed.world_size
            );
            return Some((Some(USAGE), reason));
        }
        if *rank >= agreed.world_size {
            return Some((
                Some(USAGE),
                format!("rank {rank} does not exist in a world of {}", agreed.world_size),
            ));
        }
        if !matches!(self.state, State::Gathering { .. }) {
            return Some((
                None,
                format!("rank {rank} comes too late: start {generation} of the run is under way"),
            ));
        }
        if let Some(member) = self.members.get(rank) {
            let Hello { host, pid, .. } = &member.hello;
            let same = if member.peer == peer { " (the same connection)" } else { "" };
            return Some((
                Some(USAGE),
                format!("rank {rank} is taken by process {pid} on {host}{same}: ranks must differ"),
            ));
        }
        if let Some(expected) = agreed.plan_hash.as_ref().filter(|expected| *expected != plan_hash) {
            let reason = format!(
                "rank {rank} has plan {plan_hash}, the job {expected}: give every rank the same recipe and --set"
            );
            return Some((Some(USAGE), reason));
        }
        if let Some(expected) = self.data_digest.as_ref().filter(|expected| *expected != data_digest) {
            let reason = format!(
                "rank {rank} sees data set {data_digest}, the others {expected}: data.path must hold the same files on \
                 every machine"
            );
            return Some((Some(DATA), reason));
        }
        None
    }

    fn progress(&mut self, now: Duration, peer: Peer, progress: Progress) -> (Vec<Effect>, Reason) {
        let Some((rank, member)) = self.find(peer) else { return stranger(peer) };
        member.progress = progress.clone();
        let mut reason = format!("rank {rank} is at step {}, {}", progress.step, progress.phase);
        let paces = self.watch.as_mut().map_or(Vec::new(), |watch| watch.progress(now, rank, &progress));
        let mut effects = vec![Effect::Tell(Output::Progress { rank, progress })];
        for pace in paces {
            reason = format!(
                "rank {} {}: {:.1} ms of its own a step, the median {:.1} ms",
                pace.rank,
                if pace.slow { "is a straggler" } else { "is no straggler any longer" },
                pace.own_ms,
                pace.median_ms
            );
            let host = self.host(pace.rank);
            effects.push(Effect::Tell(Output::Pace { pace, host }));
        }
        (effects, reason)
    }

    fn worker_event(&mut self, peer: Peer, mut event: WorkerEvent) -> (Vec<Effect>, Reason) {
        let Some((rank, member)) = self.find(peer) else { return stranger(peer) };
        event.clip();
        let mut newly_finished = false;
        let mut over = false;
        let reason = match &event {
            WorkerEvent::Checkpoint { step, .. } => format!("rank {rank} has checkpoint {step}"),
            WorkerEvent::Eval { step, knn_top1, .. } => {
                format!("rank {rank} evaluated step {step}: kNN {knn_top1}")
            }
            WorkerEvent::Failed { step, phase, peers, .. } => {
                member.failed = true;
                over = true;
                let own = if peers.is_some() { " because of its peers" } else { "" };
                format!("rank {rank} failed at step {step}, {phase}{own}")
            }
            WorkerEvent::Finished { exit_code } => {
                newly_finished = member.finished.is_none();
                over = true;
                member.finished = Some(*exit_code);
                format!("rank {rank} finished with {exit_code}")
            }
        };
        let mut effects = vec![Effect::Tell(Output::Event { rank, event })];
        self.finished += usize::from(newly_finished);
        if let Some(watch) = self.watch.as_mut().filter(|_| over) {
            watch.over(rank);
        }
        if self.state == State::Running && self.finished == self.members.len() {
            let codes = self.members.values().filter_map(|member| member.finished);
            let exit_code = codes.max().unwrap_or_default();
            self.state = State::Ended;
            effects.push(Effect::Tell(Output::AllFinished { exit_code }));
            return (effects, format!("{reason}: all have"));
        }
        (effects, reason)
    }

    /// One more rank is done with its share; the last one decides.
    fn share(&mut self, peer: Peer, step: u64, mut share: Share) -> (Vec<Effect>, Reason) {
        let Some((rank, _)) = self.find(peer) else { return stranger(peer) };
        if self.state != State::Running {
            return (
                Vec::new(),
                format!("rank {rank} has a share of checkpoint {step}, but nothing is running"),
            );
        }
        share.clip();
        let shares = self.shares.entry(step).or_default();
        shares.insert(rank, share);
        let (there, world) = (shares.len(), self.agreement.world_size as usize);
        if there < world {
            while self.shares.len() > OPEN_CHECKPOINTS {
                self.shares.pop_first();
            }
            return (Vec::new(), format!("rank {rank} is done with checkpoint {step}, {there} of {world}"));
        }
        // Ranks report in the order of steps: what is older can no longer become complete.
        let newer = self.shares.split_off(&step.saturating_add(1));
        let shares = self.shares.remove(&step).unwrap_or_default();
        self.shares = newer;
        let mut files = Vec::new();
        let mut failed = None;
        for (rank, share) in shares {
            match share {
                Share::Written { file } => files.extend(file),
                Share::Failed { reason } => {
                    failed.get_or_insert(format!("rank {rank} could not write its share: {reason}"));
                }
            }
        }
        let (verdict, reason) = match failed {
            None => {
                let reason = format!("every rank is done with checkpoint {step}: commit");
                (ToWorker::Commit { step, files }, reason)
            }
            Some(failed) => {
                let reason = format!("checkpoint {step} is abandoned: {failed}");
                (ToWorker::Abandon { step, reason: failed }, reason)
            }
        };
        (self.members.get(&0).map(|first| Effect::Send(first.peer, verdict)).into_iter().collect(), reason)
    }

    fn gone(&mut self, peer: Peer, mut why: String) -> (Vec<Effect>, Reason) {
        clip(&mut why);
        let gathering = matches!(self.state, State::Gathering { .. });
        let Some((rank, member)) = self.find(peer) else {
            return (Vec::new(), format!("connection {peer} ended: {why}"));
        };
        if member.finished.is_some() || member.failed {
            self.forget(peer, gathering);
            return (Vec::new(), format!("rank {rank} left as announced"));
        }
        let reason = format!("rank {rank} is lost: {why}");
        let lost = Output::Lost {
            rank,
            host: member.hello.host.clone(),
            step: member.progress.step,
            phase: member.progress.phase,
            why,
        };
        // So that it is told once.
        member.failed = true;
        self.forget(peer, gathering);
        if let Some(watch) = &mut self.watch {
            watch.over(rank);
        }
        (vec![Effect::Tell(lost)], reason)
    }

    fn stop(&mut self, mut reason: String) -> (Vec<Effect>, Reason) {
        clip(&mut reason);
        if self.stop.is_some() {
            return (Vec::new(), "a stop is under way".into());
        }
        self.stop = Some(reason.clone());
        if self.state != State::Running {
            return (Vec::new(), format!("no rank is running: stop when they go ({reason})"));
        }
        let effects = self
            .members
            .values()
            .map(|member| Effect::Send(member.peer, ToWorker::Stop { reason: reason.clone() }))
            .collect();
        (effects, format!("every rank is told to stop: {reason}"))
    }

    fn new_generation(&mut self, now: Duration, generation: u32) -> (Vec<Effect>, Reason) {
        if generation <= self.generation {
            return (Vec::new(), format!("start {generation} is not after start {}", self.generation));
        }
        let mut effects: Vec<Effect> =
            self.members.values().map(|member| Effect::Close(member.peer)).collect();
        effects.push(Effect::Tell(Output::Gathering { generation }));
        self.members.clear();
        self.ranks.clear();
        self.finished = 0;
        self.watch = None;
        self.shares.clear();
        self.generation = generation;
        self.generation_started = now;
        self.state = State::Gathering { missing_told: false };
        (effects, format!("start {generation} of the run waits for {} ranks", self.agreement.world_size))
    }

    fn tick(&mut self, now: Duration) -> (Vec<Effect>, Reason) {
        if let Some(stall) = self.watch.as_mut().and_then(|watch| watch.tick(now)) {
            let reason = format!(
                "the gang does not go on since {} s: rank {} at step {}, {} ({:?})",
                stall.lasted.as_secs(),
                stall.rank,
                stall.step,
                stall.phase,
                stall.kind
            );
            let host = self.host(stall.rank);
            return (vec![Effect::Tell(Output::Stalled { stall, host })], reason);
        }
        let waited = now.saturating_sub(self.generation_started);
        if self.state != (State::Gathering { missing_told: false }) || waited < GATHER_DEADLINE {
            return (Vec::new(), "nothing is due".into());
        }
        self.state = State::Gathering { missing_told: true };
        let ranks: Vec<u32> =
            (0..self.agreement.world_size).filter(|rank| !self.members.contains_key(rank)).collect();
        let reason = format!("{} ranks have not come in {} s", ranks.len(), GATHER_DEADLINE.as_secs());
        (vec![Effect::Tell(Output::Missing { ranks })], reason)
    }

    fn find(&mut self, peer: Peer) -> Option<(u32, &mut Member)> {
        let rank = *self.ranks.get(&peer)?;
        self.members.get_mut(&rank).map(|member| (rank, member))
    }

    /// A connection is gone. While the gang gathers, its rank's place is free again.
    fn forget(&mut self, peer: Peer, gathering: bool) {
        if gathering
            && let Some(rank) = self.ranks.remove(&peer)
            && let Some(member) = self.members.remove(&rank)
        {
            self.finished -= usize::from(member.finished.is_some());
        }
    }

    fn host(&self, rank: u32) -> String {
        self.members.get(&rank).map_or_else(String::new, |member| member.hello.host.clone())
    }
}

fn stranger(peer: Peer) -> (Vec<Effect>, Reason) {
    (vec![Effect::Close(peer)], format!("connection {peer} speaks without having said hello"))
}

/// Compares in a time that depends on the lengths only.
fn same_secret(a: &str, b: &str) -> bool {
    let mut difference = a.len() ^ b.len();
    for (a, b) in a.bytes().zip(b.bytes().cycle()) {
        difference |= usize::from(a ^ b);
    }
    std::hint::black_box(difference) == 0 && !b.is_empty()
}
