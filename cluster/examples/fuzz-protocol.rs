//! Whole jobs of random and damaged messages for the coordinator: `fuzz-protocol [EXECUTIONS] [SEED]`.
//!
//! An execution is one event: a frame through the decoder into the state machine, sound or with bytes changed, cut,
//! repeated or spliced, with the token or without; a lost connection, a stop, a new start, time. What the coordinator
//! answers is held against a plain account of what it may say. A panic or a broken promise ends it with the last events.
//! Deterministic: the same seed does the same.

use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use mentee_cluster::coordinator::{Agreement, Coordinator, Effect, Event, Output, Peer};
use mentee_cluster::message::{
    Hello, PROTOCOL, Phase, Progress, Share, ShareFile, ToCoordinator, WorkerEvent,
};
use mentee_cluster::wire::{self, Decoder, MAX_FRAME, MAX_HELLO, MAX_TO_WORKER};

const TOKEN: &str = "7e57ab1e";
/// Events of one job.
const JOB: u64 = 300;
/// Connections that are in use at once.
const PEERS: u64 = 10;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number =
        |at: usize, default: u64| arguments.get(at).map_or(default, |text| text.parse().expect("a number"));
    let (executions, seed) = (number(1, 1_000_000), number(2, 1));
    let started = Instant::now();
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut counts = Counts::default();
    let mut slowest = Duration::ZERO;
    let mut execution = 0;
    while execution < executions {
        let mut job = Job::new(1 + random.below(4) as u32);
        for _ in 0..JOB.min(executions - execution) {
            let began = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| job.event(&mut random, &mut counts)));
            slowest = slowest.max(began.elapsed());
            let broken = match outcome {
                Ok(Ok(())) => None,
                Ok(Err(promise)) => Some(promise),
                Err(_) => Some("it panicked".to_owned()),
            };
            if let Some(promise) = broken {
                println!("execution {execution} of seed {seed}: {promise}; the last events:");
                job.last.iter().for_each(|line| println!("  {line}"));
                std::process::exit(1);
            }
            execution += 1;
        }
    }
    println!(
        "{executions} events in {:.0} s: {} frames decoded, {} refused, {} incomplete; {} hellos admitted, {} gangs went, \
         {} ranks lost, {} stalls; no panic, no broken promise; slowest {slowest:?}",
        started.elapsed().as_secs_f64(),
        counts.decoded,
        counts.refused,
        counts.incomplete,
        counts.admitted,
        counts.went,
        counts.lost,
        counts.stalled
    );
}

#[derive(Debug, Default)]
struct Counts {
    decoded: u64,
    refused: u64,
    incomplete: u64,
    admitted: u64,
    went: u64,
    lost: u64,
    stalled: u64,
}

/// A job and what is known of it from outside.
struct Job {
    coordinator: Coordinator,
    world_size: u32,
    now: Duration,
    generation: u32,
    next_peer: Peer,
    /// Connections: number, decoder, and whether the token was shown.
    open: Vec<(Peer, Decoder, bool)>,
    went: bool,
    all_finished: bool,
    stalled: bool,
    lost: BTreeSet<u32>,
    last: VecDeque<String>,
}

impl Job {
    fn new(world_size: u32) -> Job {
        let agreement = Agreement {
            token: TOKEN.into(),
            world_size,
            plan_hash: None,
            version: "1".into(),
            stall: Duration::from_secs(60),
        };
        Job {
            coordinator: Coordinator::new(agreement, 0),
            world_size,
            now: Duration::ZERO,
            generation: 0,
            next_peer: 0,
            open: Vec::new(),
            went: false,
            all_finished: false,
            stalled: false,
            lost: BTreeSet::new(),
            last: VecDeque::new(),
        }
    }

    /// One random event, and whether what follows is what may follow.
    fn event(&mut self, random: &mut Random, counts: &mut Counts) -> Result<(), String> {
        self.now += Duration::from_millis(random.below(400));
        while (self.open.len() as u64) < PEERS {
            self.open.push((self.next_peer, Decoder::new(MAX_HELLO), false));
            self.next_peer += 1;
        }
        match random.below(100) {
            0..90 => self.frame(random, counts),
            90..93 => {
                let at = random.below(PEERS) as usize;
                let (peer, _, _) = self.open.swap_remove(at);
                self.handle(Event::Gone { peer, why: random.text() }, true, counts)
            }
            93 if random.below(20) == 0 => {
                self.handle(Event::StopRequested { reason: random.text() }, true, counts)
            }
            94 if random.below(8) == 0 => {
                let generation = self.generation + random.below(3) as u32;
                if generation > self.generation {
                    self.generation = generation;
                    (self.went, self.all_finished, self.stalled) = (false, false, false);
                    self.lost.clear();
                }
                self.handle(Event::NewGeneration { generation }, true, counts)
            }
            95 => {
                self.now += Duration::from_secs(random.below(100));
                self.handle(Event::Tick, true, counts)
            }
            _ => self.handle(Event::Tick, true, counts),
        }
    }

    /// A message through a connection's decoder.
    fn frame(&mut self, random: &mut Random, counts: &mut Counts) -> Result<(), String> {
        let at = random.below(PEERS) as usize;
        let message = self.message(random, self.open[at].2);
        let mut bytes = wire::encode(&message).map_err(|error| format!("a sound message: {error}"))?;
        if random.below(4) == 0 {
            mutate(&mut bytes, random);
        }
        let (peer, decoder, admitted) = &mut self.open[at];
        let (peer, admitted) = (*peer, *admitted);
        decoder.set_limit(if admitted { MAX_FRAME } else { MAX_HELLO });
        decoder.push(&bytes);
        let mut messages = Vec::new();
        let mut ended = None;
        loop {
            match decoder.next::<ToCoordinator>() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    ended = Some(error.to_string());
                    break;
                }
            }
        }
        counts.decoded += messages.len() as u64;
        counts.incomplete += u64::from(messages.is_empty() && ended.is_none());
        for message in messages {
            let token = matches!(&message, ToCoordinator::Hello { token, .. } if token == TOKEN);
            self.handle(Event::Message { peer, message }, token || admitted, counts)?;
        }
        if let Some(why) = ended {
            counts.refused += 1;
            self.open.retain(|(other, ..)| *other != peer);
            self.handle(Event::Gone { peer, why }, true, counts)?;
        }
        Ok(())
    }

    fn message(&self, random: &mut Random, admitted: bool) -> ToCoordinator {
        let beyond = u64::from(random.below(10) == 0);
        let rank = random.below(u64::from(self.world_size) + beyond) as u32;
        match random.below(if admitted { 10 } else { 2 }) {
            0 => ToCoordinator::Hello {
                protocol: PROTOCOL + u32::from(random.below(20) == 0),
                token: if random.below(10) == 0 { random.text() } else { TOKEN.into() },
                generation: self.generation + u32::from(random.below(20) == 0),
                hello: Hello {
                    rank,
                    world_size: self.world_size + u32::from(random.below(20) == 0),
                    host: if random.below(10) == 0 { random.text() } else { format!("host{rank}") },
                    pid: rank,
                    plan_hash: if random.below(30) == 0 { "other" } else { "plan" }.into(),
                    data_digest: if random.below(30) == 0 { "other" } else { "data" }.into(),
                    version: if random.below(30) == 0 { "2" } else { "1" }.into(),
                },
            },
            1 | 2 if admitted || random.below(8) == 0 => ToCoordinator::Event {
                event: match random.below(4) {
                    0 => WorkerEvent::Failed {
                        step: random.extreme(),
                        phase: Phase::Reduce,
                        message: random.text(),
                        exit_code: random.below(9) as i32,
                        peers: (random.below(2) == 0).then(|| vec![7; random.below(200) as usize]),
                    },
                    1 => WorkerEvent::Checkpoint {
                        step: random.extreme(),
                        path: random.text(),
                        digest: random.text(),
                    },
                    _ => WorkerEvent::Finished { exit_code: 75 },
                },
            },
            3 if admitted => ToCoordinator::Share {
                step: if random.below(10) == 0 { random.extreme() } else { random.below(4) },
                share: match random.below(8) {
                    0 => Share::Failed { reason: random.text() },
                    1 => Share::Written { file: None },
                    _ => {
                        let file = ShareFile {
                            name: random.text(),
                            bytes: random.extreme(),
                            blake3: "0".repeat(64),
                        };
                        Share::Written { file: Some(file) }
                    }
                },
            },
            _ => ToCoordinator::Progress {
                progress: Progress {
                    step: if random.below(10) == 0 { random.extreme() } else { self.now.as_secs() },
                    phase: [Phase::Starting, Phase::Forward, Phase::Reduce, Phase::Eval, Phase::Done]
                        [random.below(5) as usize],
                    waiting: random.below(2) == 0,
                    own_ms: random.extreme() as f64,
                    data_ms: -1.0,
                    ..Progress::default()
                },
            },
        }
    }

    /// `knows`: the event comes from the owner or from a peer that has the token.
    fn handle(&mut self, event: Event, knows: bool, counts: &mut Counts) -> Result<(), String> {
        if self.last.len() == 20 {
            self.last.pop_front();
        }
        let mut line = format!("{:?} {event:?}", self.now);
        line.truncate((0..=300.min(line.len())).rev().find(|&end| line.is_char_boundary(end)).unwrap_or(0));
        self.last.push_back(line);
        let next = self.next_peer;
        let (effects, reason) = self.coordinator.handle(self.now, event);
        let promise = |kept: bool, what: &str| if kept { Ok(()) } else { Err(what.to_owned()) };
        promise(!reason.is_empty() && reason.len() < 16 * 1024, "a reason is one line of bounded length")?;
        promise(effects.len() <= 4 * self.world_size as usize + 8, "effects are bounded by the world")?;
        for effect in effects {
            match effect {
                Effect::Admit(peer) => {
                    promise(knows, "who does not know the token is not admitted")?;
                    counts.admitted += 1;
                    self.open.iter_mut().filter(|(other, ..)| *other == peer).for_each(|(.., a)| *a = true);
                }
                Effect::Send(peer, message) => {
                    promise(peer < next, "messages go to connections that there are or were")?;
                    let frame = wire::encode_within(&message, MAX_TO_WORKER);
                    promise(frame.is_ok(), "what is sent fits a frame")?;
                }
                Effect::Close(peer) => self.open.retain(|(other, ..)| *other != peer),
                Effect::Tell(output) => {
                    promise(knows, "the owner hears nothing of strangers")?;
                    self.told(output, counts)?;
                }
            }
        }
        Ok(())
    }

    fn told(&mut self, output: Output, counts: &mut Counts) -> Result<(), String> {
        let promise = |kept: bool, what: &str| if kept { Ok(()) } else { Err(what.to_owned()) };
        let world_size = self.world_size;
        let known = |rank: u32| promise(rank < world_size, "only ranks of the world are spoken of");
        match output {
            Output::Gathering { generation } => {
                promise(generation == self.generation, "it gathers the newest start")
            }
            Output::Go { generation, ranks } => {
                promise(!self.went, "a gang goes once")?;
                promise(generation == self.generation, "it is the newest start that goes")?;
                promise(ranks.iter().map(|hello| hello.rank).eq(0..world_size), "all ranks go, in order")?;
                self.went = true;
                counts.went += 1;
                Ok(())
            }
            Output::Progress { rank, .. } | Output::Event { rank, .. } => known(rank),
            Output::Lost { rank, why, host, .. } => {
                known(rank)?;
                promise(why.len() < 3000 && host.len() < 3000, "texts are clipped")?;
                // While it gathers a place is free again and can be lost again.
                promise(self.lost.insert(rank) || !self.went, "a rank is lost once")?;
                if !self.went {
                    self.lost.remove(&rank);
                }
                counts.lost += 1;
                Ok(())
            }
            Output::Stalled { stall, .. } => {
                known(stall.rank)?;
                promise(self.went && !self.stalled, "a gang that went stalls once")?;
                self.stalled = true;
                counts.stalled += 1;
                Ok(())
            }
            Output::Pace { pace, .. } => known(pace.rank),
            Output::Refused { reason, .. } => promise(reason.len() < 16 * 1024, "refusals are one line"),
            Output::Missing { ranks } => {
                promise(!self.went && !ranks.is_empty(), "who has come is not missed")
            }
            Output::AllFinished { .. } => {
                promise(self.went && !self.all_finished, "a gang that went finishes once")?;
                self.all_finished = true;
                Ok(())
            }
        }
    }
}

/// Changes, cuts, repeats or splices bytes.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => {
                let copy = bytes[at..].to_vec();
                bytes.extend(copy);
            }
            4 => {
                bytes.remove(at);
            }
            _ => {
                // A header that lies.
                let length = random.extreme() as u32;
                let header = bytes.len().min(4);
                bytes[..header].copy_from_slice(&length.to_be_bytes()[..header]);
            }
        }
    }
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound.max(1)
    }

    fn extreme(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::MAX - self.below(3),
            1 => self.below(20),
            2 => 1 << self.below(64),
            _ => self.next(),
        }
    }

    fn text(&mut self) -> String {
        let longest = if self.below(50) == 0 { 3000 } else { 20 };
        let length = self.below(longest) as usize;
        ["é", "\"", "\0", "x", "rank 1: ", "\u{1F980}"][self.below(6) as usize].repeat(length)
    }
}
