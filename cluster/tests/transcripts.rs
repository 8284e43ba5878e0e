//! Whole jobs as the coordinator sees them, compared with transcripts a person can read: `golden/*.txt`.
//! `BLESS=1 cargo test -p mentee-cluster` rewrites them; review the difference.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use mentee_cluster::coordinator::{Agreement, Coordinator, Effect, Event, Output, Peer};
use mentee_cluster::message::{
    Hello, PROTOCOL, Phase, Progress, Share, ShareFile, ToCoordinator, ToWorker, WorkerEvent,
};

const TOKEN: &str = "right";

fn agreement(world_size: u32) -> Agreement {
    Agreement {
        token: TOKEN.into(),
        world_size,
        plan_hash: Some("plan-a".into()),
        version: "0.1.0".into(),
        stall: Duration::from_secs(60),
    }
}

fn hello(rank: u32, world_size: u32) -> Hello {
    Hello {
        rank,
        world_size,
        host: format!("host{rank}"),
        pid: 100 + rank,
        plan_hash: "plan-a".into(),
        data_digest: "data-a".into(),
        version: "0.1.0".into(),
    }
}

struct Transcript {
    name: &'static str,
    coordinator: Coordinator,
    now: Duration,
    text: String,
}

impl Transcript {
    fn new(name: &'static str, agreement: Agreement) -> Transcript {
        let text = format!("# {name}: a job of {}\n", agreement.world_size);
        Transcript { name, coordinator: Coordinator::new(agreement, 0), now: Duration::ZERO, text }
    }

    fn after(&mut self, seconds: u64) -> &mut Transcript {
        self.now += Duration::from_secs(seconds);
        self
    }

    fn event(&mut self, event: Event) -> &mut Transcript {
        let shown = match &event {
            Event::Message { peer, message } => format!("peer {peer}: {}", show(message)),
            other => format!("{other:?}"),
        };
        let (effects, reason) = self.coordinator.handle(self.now, event);
        writeln!(self.text, "\n+{}s {shown}\n    because: {reason}", self.now.as_secs()).unwrap();
        for effect in effects {
            let shown = match effect {
                Effect::Send(peer, message) => format!("send {peer} {}", json(&message)),
                Effect::Tell(Output::Go { generation, ranks }) => {
                    let ranks: Vec<String> = ranks.iter().map(|h| format!("{}@{}", h.rank, h.host)).collect();
                    format!("tell Go {{ generation: {generation}, ranks: {} }}", ranks.join(" "))
                }
                Effect::Tell(Output::Progress { rank, progress }) => {
                    format!("tell Progress of {rank}: step {}, {}", progress.step, progress.phase)
                }
                Effect::Tell(output) => format!("tell {output:?}"),
                other => format!("{other:?}").to_lowercase(),
            };
            writeln!(self.text, "    -> {shown}").unwrap();
        }
        self
    }

    fn says(&mut self, peer: Peer, message: ToCoordinator) -> &mut Transcript {
        self.event(Event::Message { peer, message })
    }

    fn hello(&mut self, peer: Peer, hello: Hello) -> &mut Transcript {
        self.hello_of(peer, 0, hello)
    }

    fn hello_of(&mut self, peer: Peer, generation: u32, hello: Hello) -> &mut Transcript {
        self.says(peer, ToCoordinator::Hello { protocol: PROTOCOL, token: TOKEN.into(), generation, hello })
    }

    fn at(&mut self, peer: Peer, step: u64, phase: Phase) -> &mut Transcript {
        self.says(peer, ToCoordinator::Progress { progress: Progress { step, phase, ..Progress::default() } })
    }

    fn reports(&mut self, peer: Peer, event: WorkerEvent) -> &mut Transcript {
        self.says(peer, ToCoordinator::Event { event })
    }

    fn wrote(&mut self, peer: Peer, step: u64) -> &mut Transcript {
        let file =
            ShareFile { name: format!("state-{peer}.safetensors"), bytes: 10 + peer, blake3: "b3".into() };
        self.says(peer, ToCoordinator::Share { step, share: Share::Written { file: Some(file) } })
    }

    fn gone(&mut self, peer: Peer) -> &mut Transcript {
        self.event(Event::Gone { peer, why: "it closed the connection".into() })
    }

    fn check(&self) {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{}.txt", self.name));
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, &self.text).expect("golden file is writable");
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(golden == self.text, "{} differs; now:\n{}", path.display(), self.text);
    }
}

fn json(message: &ToWorker) -> String {
    serde_json::to_string(message).expect("messages are JSON")
}

fn show(message: &ToCoordinator) -> String {
    match message {
        ToCoordinator::Hello { generation, hello, .. } => {
            format!("hello, rank {} of {}, start {generation}", hello.rank, hello.world_size)
        }
        ToCoordinator::Progress { progress } => format!("step {}, {}", progress.step, progress.phase),
        ToCoordinator::Event { event } => serde_json::to_string(event).expect("events are JSON"),
        ToCoordinator::Share { step, share } => format!("checkpoint {step}: {share:?}"),
    }
}

#[test]
fn an_undisturbed_job() {
    let mut job = Transcript::new("undisturbed", agreement(2));
    job.hello(0, hello(1, 2)).after(1).hello(1, hello(0, 2));
    job.after(1).at(0, 1, Phase::Forward).at(1, 1, Phase::Reduce);
    job.reports(1, WorkerEvent::Checkpoint { step: 10, path: "step-00000010".into(), digest: "d1".into() });
    job.reports(
        1,
        WorkerEvent::Eval {
            step: 10,
            epoch: 1,
            knn_top1: 50.0,
            knn_random_init: Some(30.0),
            knn_raw_pixels: None,
            protocol: "k = 200".into(),
        },
    );
    job.reports(0, WorkerEvent::Finished { exit_code: 0 }).gone(0);
    job.reports(1, WorkerEvent::Finished { exit_code: 0 }).gone(1);
    job.check();
}

#[test]
fn a_rank_dies_and_the_gang_starts_again() {
    let mut job = Transcript::new("rank-dies", agreement(3));
    for rank in 0..3 {
        job.hello(u64::from(rank), hello(rank, 3));
    }
    job.after(5).at(2, 41, Phase::Backward).gone(2).gone(2);
    job.gone(0);
    job.event(Event::NewGeneration { generation: 1 });
    job.gone(1);
    // A rank of the first start that was slow to die, then the second start.
    job.hello_of(3, 0, hello(1, 3));
    for rank in 0..3 {
        job.hello_of(4 + u64::from(rank), 1, hello(rank, 3));
    }
    job.check();
}

#[test]
fn a_rank_says_why_it_fails() {
    let mut job = Transcript::new("rank-fails", agreement(2));
    job.hello(0, hello(0, 2)).hello(1, hello(1, 2));
    job.reports(
        1,
        WorkerEvent::Failed {
            step: 7,
            phase: Phase::Update,
            message: "loss is NaN at step 7 on rank 1: lower optimizer.base_lr".into(),
            exit_code: 6,
            peers: None,
        },
    );
    job.gone(1).gone(0);
    job.check();
}

#[test]
fn a_rank_whose_peer_vanished_says_so() {
    let mut job = Transcript::new("rank-fails-of-its-peer", agreement(2));
    job.hello(0, hello(0, 2)).hello(1, hello(1, 2));
    job.reports(
        0,
        WorkerEvent::Failed {
            step: 7,
            phase: Phase::Reduce,
            message: "step 7: waited 600.0 s for rank 1; see in its log what it was doing".into(),
            exit_code: 1,
            peers: Some(vec![1]),
        },
    );
    job.gone(1).gone(0);
    job.check();
}

#[test]
fn a_checkpoint_counts_when_every_rank_has_written_its_share() {
    let mut job = Transcript::new("checkpoints", agreement(3));
    job.hello(0, hello(0, 3)).wrote(0, 9).hello(1, hello(1, 3)).hello(2, hello(2, 3));
    // In any order; one rank has nothing to write.
    job.wrote(2, 10).wrote(0, 10);
    job.says(1, ToCoordinator::Share { step: 10, share: Share::Written { file: None } });
    job.reports(0, WorkerEvent::Checkpoint { step: 10, path: "step-00000010".into(), digest: "d1".into() });
    // One rank is at the next checkpoint already, and one has no room for this one.
    job.wrote(0, 20).wrote(1, 20).wrote(0, 30);
    let reason = "No space left on device".into();
    job.says(2, ToCoordinator::Share { step: 20, share: Share::Failed { reason } });
    job.wrote(1, 30).wrote(2, 30);
    // A rank dies before it has written its share: the next start begins anew.
    job.wrote(0, 40).wrote(1, 40).gone(2);
    job.event(Event::NewGeneration { generation: 1 });
    job.wrote(1, 40);
    for rank in 0..3 {
        job.hello_of(10 + u64::from(rank), 1, hello(rank, 3));
    }
    job.wrote(11, 40).wrote(12, 40).wrote(10, 40);
    job.check();
}

#[test]
fn stop_before_and_after_go() {
    let mut job = Transcript::new("stop", agreement(2));
    job.hello(0, hello(0, 2));
    job.event(Event::StopRequested { reason: "SIGTERM".into() });
    job.hello(1, hello(1, 2));
    job.event(Event::StopRequested { reason: "again".into() });
    job.reports(0, WorkerEvent::Finished { exit_code: 75 });
    job.reports(1, WorkerEvent::Finished { exit_code: 75 });
    job.check();

    let mut job = Transcript::new("stop-while-running", agreement(1));
    job.hello(0, hello(0, 1));
    job.event(Event::StopRequested { reason: "SIGINT".into() });
    job.reports(0, WorkerEvent::Finished { exit_code: 75 });
    job.check();
}

#[test]
fn whoever_does_not_agree_is_refused() {
    let mut job = Transcript::new("refusals", agreement(3));
    let hello_with = |protocol, token: &str, hello| ToCoordinator::Hello {
        protocol,
        token: token.into(),
        generation: 0,
        hello,
    };
    job.says(0, hello_with(PROTOCOL, "wrong", hello(0, 3)));
    job.says(1, hello_with(PROTOCOL, "", hello(0, 3)));
    job.says(2, hello_with(PROTOCOL, "righ", hello(0, 3)));
    job.says(3, hello_with(PROTOCOL, "rightright", hello(0, 3)));
    job.says(4, hello_with(PROTOCOL + 1, TOKEN, hello(0, 3)));
    job.hello(5, Hello { version: "0.2.0".into(), ..hello(0, 3) });
    job.hello(6, hello(0, 1));
    job.hello(7, hello(3, 3));
    job.hello(8, Hello { plan_hash: "plan-b".into(), ..hello(0, 3) });
    job.hello(9, hello(0, 3));
    job.hello(10, hello(0, 3));
    job.hello(11, Hello { data_digest: "data-b".into(), ..hello(1, 3) });
    job.at(12, 3, Phase::Forward);
    job.hello(13, hello(1, 3)).hello(14, hello(2, 3));
    job.hello(15, hello(2, 3));
    job.check();
}

#[test]
fn ranks_that_never_come_are_named_once() {
    let mut job = Transcript::new("missing", agreement(4));
    job.hello(0, hello(2, 4));
    job.after(299).event(Event::Tick).after(1).event(Event::Tick).after(1).event(Event::Tick);
    job.gone(0);
    job.check();
}

/// Any event in any state: no panic, no memory beyond the world, no effect on a stranger but closing.
#[test]
fn it_is_total() {
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut draw = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..200 {
        let world_size = 1 + draw(3) as u32;
        let mut coordinator = Coordinator::new(agreement(world_size), 0);
        let mut generation = 0;
        for second in 0..200 {
            let peer = draw(8);
            let event = match draw(10) {
                0..=3 => Event::Message {
                    peer,
                    message: ToCoordinator::Hello {
                        protocol: PROTOCOL,
                        token: if draw(8) == 0 { "wrong".into() } else { TOKEN.into() },
                        generation: if draw(6) == 0 { 99 } else { generation },
                        hello: hello(draw(4) as u32, if draw(8) == 0 { 9 } else { world_size }),
                    },
                },
                4 => Event::Gone { peer, why: "x".repeat(5000) },
                5 => Event::Tick,
                6 => {
                    generation += draw(2) as u32;
                    Event::NewGeneration { generation }
                }
                7 => Event::Message {
                    peer,
                    message: ToCoordinator::Event {
                        event: WorkerEvent::Finished { exit_code: draw(3) as i32 },
                    },
                },
                8 => {
                    let share = match draw(3) {
                        0 => Share::Failed { reason: "é".repeat(5000) },
                        _ => Share::Written { file: None },
                    };
                    let step = [0, 1, 2, u64::MAX][draw(4) as usize];
                    Event::Message { peer, message: ToCoordinator::Share { step, share } }
                }
                _ => Event::StopRequested { reason: "é".repeat(5000) },
            };
            let (effects, reason) = coordinator.handle(Duration::from_secs(second * 7), event);
            assert!(effects.len() <= 4 * world_size as usize + 4, "{effects:?}");
            assert!(!reason.is_empty() && reason.len() < 4096);
        }
    }
}
