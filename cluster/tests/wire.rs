//! The wire under real sockets on a free port: good peers, slow ones, and hostile ones.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use mentee_cluster::coordinator::{Agreement, Output};
use mentee_cluster::message::{
    CoordinatorAddress, Hello, PROTOCOL, Phase, Progress, Share, ShareFile, ToCoordinator, ToWorker,
    WorkerEvent,
};
use mentee_cluster::server::{self, CoordinatorHandle};
use mentee_cluster::wire::{self, Decoder, MAX_FRAME, MAX_HELLO, MAX_TO_WORKER, WireError};
use mentee_cluster::{Link, LinkError, NoCommit, StopReason};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PATIENCE: Duration = Duration::from_secs(20);

fn coordinator(world_size: u32) -> CoordinatorHandle {
    let agreement = Agreement {
        token: server::fresh_token().expect("the system has randomness"),
        world_size,
        plan_hash: None,
        version: "0.1.0".into(),
        stall: Duration::from_secs(60),
    };
    server::start_thread(LOCAL, agreement).expect("a port is free")
}

fn hello(rank: u32, world_size: u32) -> Hello {
    Hello {
        rank,
        world_size,
        host: "here".into(),
        pid: std::process::id(),
        plan_hash: "plan".into(),
        data_digest: "data".into(),
        version: "0.1.0".into(),
    }
}

/// Every rank of a world connects, each from a thread of its own.
fn gang(address: &CoordinatorAddress, world_size: u32) -> Vec<Link> {
    let joins: Vec<_> = (0..world_size)
        .map(|rank| {
            let address = address.clone();
            std::thread::spawn(move || Link::connect(&address, hello(rank, world_size), PATIENCE))
        })
        .collect();
    joins.into_iter().map(|join| join.join().expect("no panic").expect("go").0).collect()
}

fn until<T>(handle: &mut CoordinatorHandle, mut wanted: impl FnMut(Output) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match handle.events.try_recv() {
            Some(output) => {
                if let Some(found) = wanted(output) {
                    return found;
                }
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    panic!("the event did not come")
}

fn becomes(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "the condition did not come true");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn frames_come_out_as_they_went_in_however_they_are_cut() {
    let messages: Vec<ToWorker> = (0..5).map(|generation| ToWorker::Go { generation }).collect();
    let bytes: Vec<u8> = messages.iter().flat_map(|message| wire::encode(message).expect("small")).collect();
    for size in 1..bytes.len() {
        let mut decoder = Decoder::new(MAX_FRAME);
        let mut out: Vec<ToWorker> = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.push(piece);
            while let Some(message) = decoder.next().expect("well-formed") {
                out.push(message);
            }
        }
        assert_eq!(out, messages, "in pieces of {size}");
    }
}

#[test]
fn bad_frames_are_errors_and_half_ones_are_not() {
    let next = |bytes: &[u8]| {
        let mut decoder = Decoder::new(64);
        decoder.push(bytes);
        decoder.next::<ToWorker>()
    };
    assert!(next(b"").expect("nothing yet").is_none());
    assert!(next(&[0, 0, 0]).expect("half a header").is_none());
    assert!(next(&[0, 0, 0, 9, b'{']).expect("half a frame").is_none());
    assert!(matches!(next(&[0, 0, 0, 65]), Err(WireError::TooLong { bytes: 65, limit: 64 })));
    assert!(matches!(next(&[0xff; 4]), Err(WireError::TooLong { .. })));
    assert!(matches!(next(&[0, 0, 0, 0]), Err(WireError::NotAMessage(_))));
    assert!(matches!(next(b"\0\0\0\x02{}"), Err(WireError::NotAMessage(_))));
    assert!(matches!(next(b"\0\0\0\x02\xff\xfe"), Err(WireError::NotAMessage(_))));
    let long = ToWorker::Stop { reason: "x".repeat(MAX_FRAME) };
    assert!(matches!(wire::encode(&long), Err(WireError::TooLong { .. })));
}

#[test]
fn a_gang_goes_reports_and_finishes() {
    let mut handle = coordinator(3);
    let mut links = gang(&handle.address, 3);
    until(&mut handle, |output| {
        matches!(output, Output::Go { generation: 0, ranks } if ranks.len() == 3).then_some(())
    });

    links[1].report(Progress {
        step: 7,
        total_steps: 9,
        loss: Some(1.5),
        phase: Phase::Reduce,
        ..Progress::default()
    });
    let progress = until(&mut handle, |output| match output {
        Output::Progress { rank: 1, progress } if progress.step == 7 => Some(progress),
        _ => None,
    });
    assert_eq!((progress.loss, progress.phase), (Some(1.5), Phase::Reduce));

    // The phase alone travels with the heartbeat.
    links[1].phase(Phase::Checkpoint);
    until(&mut handle, |output| {
        matches!(output, Output::Progress { rank: 1, progress } if progress.phase == Phase::Checkpoint)
            .then_some(())
    });

    for step in 0..100 {
        links[2].event(WorkerEvent::Checkpoint { step, path: "p".into(), digest: "d".into() });
    }
    let mut expected = 0;
    until(&mut handle, |output| match output {
        Output::Event { rank: 2, event: WorkerEvent::Checkpoint { step, .. } } => {
            assert_eq!(step, expected, "in order");
            expected += 1;
            (expected == 100).then_some(())
        }
        _ => None,
    });

    // The last words before closing arrive, and leaving as announced is no loss.
    for link in links.drain(..) {
        link.event(WorkerEvent::Finished { exit_code: 0 });
        link.close();
    }
    let exit_code = until(&mut handle, |output| match output {
        Output::AllFinished { exit_code } => Some(exit_code),
        Output::Lost { rank, .. } => panic!("rank {rank} was not lost"),
        _ => None,
    });
    assert_eq!(exit_code, 0);
}

#[test]
fn a_stop_reaches_every_rank() {
    let handle = coordinator(2);
    let links = gang(&handle.address, 2);
    assert!(links.iter().all(|link| !link.stop_requested()));
    handle.request_stop("SIGTERM");
    becomes(|| links.iter().all(Link::stop_requested));
    assert_eq!(links[0].stop_reason(), Some(StopReason::Requested("SIGTERM".into())));
}

#[test]
fn a_lost_coordinator_stops_the_worker_and_holds_nothing_up() {
    let handle = coordinator(1);
    let links = gang(&handle.address, 1);
    drop(handle);
    becomes(|| links[0].stop_requested());
    assert!(matches!(links[0].stop_reason(), Some(StopReason::CoordinatorLost(_))));
    let started = Instant::now();
    for step in 0..10_000 {
        links[0].report(Progress { step, ..Progress::default() });
        links[0].event(WorkerEvent::Finished { exit_code: 75 });
    }
    drop(links);
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_lost_rank_is_told_with_its_last_phase() {
    let mut handle = coordinator(1);
    let mut peer = raw(&handle.address, &handle.address.token, 0, 1);
    assert_eq!(read_message(&mut peer), Some(ToWorker::Go { generation: 0 }));
    let progress = Progress { step: 3, phase: Phase::Backward, ..Progress::default() };
    peer.write_all(&wire::encode(&ToCoordinator::Progress { progress }).expect("small")).expect("sent");
    drop(peer);
    let lost = until(&mut handle, |output| match output {
        Output::Lost { rank, step, phase, host, .. } => Some((rank, step, phase, host)),
        _ => None,
    });
    assert_eq!(lost, (0, 3, Phase::Backward, "here".to_owned()));
}

#[test]
fn refusals_and_deadlines_are_errors_with_a_reason() {
    let handle = coordinator(2);
    let wrong = CoordinatorAddress { token: "guess".into(), ..handle.address.clone() };
    let error = Link::connect(&wrong, hello(0, 2), PATIENCE).expect_err("wrong token");
    assert!(
        matches!(&error, LinkError::Refused { reason, exit_code: 1, .. } if reason == "wrong token"),
        "{error}"
    );

    let error = Link::connect(&handle.address, hello(0, 5), PATIENCE).expect_err("wrong world");
    assert!(error.to_string().contains("in a world of 5, the job has 2"), "{error}");

    let error = Link::connect(&handle.address, hello(0, 2), Duration::from_millis(300))
        .expect_err("rank 1 never came");
    assert!(matches!(error, LinkError::TimedOut { world_size: 2, .. }), "{error}");

    let free = std::net::TcpListener::bind((LOCAL, 0)).expect("a port is free").local_addr().expect("bound");
    let nobody = CoordinatorAddress { host_port: free.to_string(), ..handle.address.clone() };
    let error = Link::connect(&nobody, hello(0, 2), Duration::from_secs(20)).expect_err("nobody there");
    assert!(matches!(error, LinkError::Unreachable { .. }), "{error}");
}

#[test]
fn the_next_generation_starts_on_the_same_port() {
    let mut handle = coordinator(2);
    let first = gang(&handle.address, 2);
    let address = handle.new_generation(1);
    becomes(|| first.iter().all(Link::stop_requested));
    let second = gang(&address, 2);
    assert!(second.iter().all(|link| !link.stop_requested()));
    until(&mut handle, |output| matches!(output, Output::Go { generation: 1, .. }).then_some(()));
}

fn raw(address: &CoordinatorAddress, token: &str, rank: u32, world_size: u32) -> TcpStream {
    let mut stream = TcpStream::connect(&address.host_port).expect("listening");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let message = ToCoordinator::Hello {
        protocol: PROTOCOL,
        token: token.to_owned(),
        generation: address.generation,
        hello: hello(rank, world_size),
    };
    stream.write_all(&wire::encode(&message).expect("small")).expect("sent");
    stream
}

fn read_message(stream: &mut TcpStream) -> Option<ToWorker> {
    let mut decoder = Decoder::new(MAX_FRAME);
    let mut byte = [0; 1];
    loop {
        if let Some(message) = decoder.next().expect("well-formed") {
            return Some(message);
        }
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        decoder.push(&byte);
    }
}

fn is_closed(stream: &mut TcpStream) -> bool {
    let mut rest = [0; 256];
    loop {
        match stream.read(&mut rest) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Wrong tokens, half frames, oversize frames, noise, silence, and a peer that speaks before it has said hello: each
/// is dropped, and the job beside them goes on.
#[test]
fn hostile_peers_do_not_disturb_the_job() {
    let mut handle = coordinator(1);
    let address = handle.address.clone();

    let mut half = TcpStream::connect(&address.host_port).expect("listening");
    half.write_all(&[0, 0, 1]).expect("sent");
    let _silent = TcpStream::connect(&address.host_port).expect("listening");
    let noise: [&[u8]; 4] = [
        &[0xff; 64],
        b"GET / HTTP/1.1\r\n\r\n",
        &u32::try_from(MAX_HELLO + 1).expect("small").to_be_bytes(),
        &wire::encode(&ToCoordinator::Progress { progress: Progress::default() }).expect("small"),
    ];
    for bytes in noise {
        let mut stream = TcpStream::connect(&address.host_port).expect("listening");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream.write_all(bytes).expect("sent");
        assert!(is_closed(&mut stream), "{bytes:?}");
    }
    let mut stranger = raw(&address, "guess", 0, 1);
    assert_eq!(
        read_message(&mut stranger),
        Some(ToWorker::Refused { reason: "wrong token".into(), exit_code: 1 })
    );
    assert!(is_closed(&mut stranger));

    let links = gang(&address, 1);
    links[0].report(Progress { step: 5, ..Progress::default() });
    until(&mut handle, |output| {
        matches!(output, Output::Progress { progress, .. } if progress.step == 5).then_some(())
    });
}

/// On every interface: by IPv6 and by IPv4, whichever this machine's name means to those who connect.
#[test]
fn a_coordinator_on_every_interface_is_reached_both_ways() {
    let agreement = Agreement {
        token: "token".into(),
        world_size: 2,
        plan_hash: None,
        version: "0.1.0".into(),
        stall: Duration::from_secs(60),
    };
    let handle = server::start_thread(None, agreement).expect("a port is free");
    let (name, port) = handle.address.host_port.rsplit_once(':').expect("a port");
    assert_eq!(name, server::hostname());
    let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    let hosts = ["127.0.0.1", if has_v6 { "[::1]" } else { "127.0.0.1" }];
    let joins: Vec<_> = (0..2u32)
        .zip(hosts)
        .map(|(rank, host)| {
            let host_port = format!("{host}:{port}");
            let address = CoordinatorAddress { host_port, ..handle.address.clone() };
            std::thread::spawn(move || Link::connect(&address, hello(rank, 2), PATIENCE))
        })
        .collect();
    for join in joins {
        join.join().expect("no panic").expect("go");
    }
}

/// More silent connections than the bound: those that were first make room at once, the others hold their place only
/// until the hello deadline, and a worker is let in beside them.
#[test]
fn a_flood_of_silent_connections_is_bounded() {
    let handle = coordinator(1);
    let streams: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect(&handle.address.host_port).expect("listening")).collect();
    let closed = || {
        streams
            .iter()
            .filter(|stream| {
                stream.set_nonblocking(true).expect("set");
                matches!((&mut &**stream).read(&mut [0]), Ok(0))
            })
            .count()
    };
    becomes(|| closed() >= 100);
    let links = gang(&handle.address, 1);
    assert!(!links[0].stop_requested());
    assert!(closed() < 200, "most of the silent are still there");
}

/// Memory of this process in use, bytes.
fn memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("linux");
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
}

/// Strangers of every kind, thousands of them, while a gang works: it notices nothing, and they cost no memory.
#[test]
fn a_storm_of_hostile_peers_costs_the_job_nothing() {
    let mut handle = coordinator(2);
    let address = handle.address.clone();
    let links = gang(&address, 2);
    let hello = |token: &str| {
        wire::encode(&ToCoordinator::Hello {
            protocol: PROTOCOL,
            token: token.into(),
            generation: 0,
            hello: hello(0, 2),
        })
        .expect("small")
    };
    let hostile: Vec<Vec<u8>> = vec![
        hello("guess"),                                                           // a wrong token
        hello(""),                                                                // none
        hello(&address.token),         // the right one, of a rank that is there
        hello("guess")[..30].to_vec(), // half a frame
        vec![0xff; 2000],              // a frame of 4 GiB
        (MAX_HELLO as u32).to_be_bytes().to_vec(), // the longest frame, and nothing of it
        [&(MAX_HELLO as u32).to_be_bytes()[..], &[b'['; MAX_HELLO][..]].concat(), // deeply nested
        Vec::new(),                    // nothing
    ];
    // A drip: one byte at a time of a frame that is never whole.
    let mut drip = TcpStream::connect(&address.host_port).expect("listening");
    let before = memory();
    let mut open = Vec::new();
    for round in 0..500_u64 {
        let _ = drip.write_all(&hello("guess")[round as usize % 8..][..1]);
        for bytes in &hostile {
            let mut stream = TcpStream::connect(&address.host_port).expect("listening");
            let _ = stream.write_all(bytes);
            open.push(stream);
        }
        // They stay for a while.
        open.drain(..open.len().saturating_sub(100));
        links[(round % 2) as usize].report(Progress { step: round + 1, ..Progress::default() });
    }
    until(&mut handle, |output| match output {
        Output::Lost { rank, .. } => panic!("rank {rank} was lost"),
        Output::Progress { progress, .. } if progress.step == 500 => Some(()),
        _ => None,
    });
    assert!(links.iter().all(|link| !link.stop_requested()));
    let grown = memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
}

#[test]
fn last_words_are_on_their_way_when_they_are_said() {
    let mut handle = coordinator(2);
    let links = gang(&handle.address, 2);
    let words = links[1].last_words();
    links[1].phase(Phase::Reduce);
    let failed = |step, phase| WorkerEvent::Failed {
        step,
        phase,
        message: "waited in vain".into(),
        exit_code: 1,
        peers: Some(vec![0]),
    };
    // From another thread than the link's owner, who may be stuck.
    std::thread::scope(|scope| scope.spawn(|| words.say(failed, PATIENCE)).join().expect("no panic"));
    let said = until(&mut handle, |output| match output {
        Output::Event { rank: 1, event } => Some(event),
        _ => None,
    });
    assert_eq!(said, failed(0, Phase::Reduce));
    // Who has hung up, or has nobody to talk to, does not wait.
    drop(links);
    let begin = Instant::now();
    words.say(failed, PATIENCE);
    assert!(begin.elapsed() < PATIENCE / 2);
}

#[test]
fn shares_of_a_checkpoint_come_together_at_rank_0() {
    let handle = coordinator(3);
    let mut links = gang(&handle.address, 3);
    let shares: Vec<_> = links.iter_mut().map(|link| link.shares().expect("the first call")).collect();
    assert!(links[0].shares().is_none());
    let file = |rank: usize| ShareFile {
        name: format!("state-{rank}.safetensors"),
        bytes: rank as u64,
        blake3: "0".repeat(64),
    };
    for step in [10, 20] {
        for rank in [2, 0, 1] {
            shares[rank].report(step, Share::Written { file: Some(file(rank)) });
        }
    }
    // Nobody has asked for that of step 10 yet.
    let (mut late, files) = (Vec::new(), || (0..3).map(file).collect::<Vec<_>>());
    assert_eq!(shares[0].verdict(20, PATIENCE, |step, verdict| late.push((step, verdict))), Ok(files()));
    assert_eq!(late, [(10, Ok(files()))]);
    let none = |step, _| panic!("a verdict of step {step}");
    shares[1].report(30, Share::Failed { reason: "no room".into() });
    for rank in [0, 2] {
        shares[rank].report(30, Share::Written { file: None });
    }
    let no = shares[0].verdict(30, PATIENCE, none);
    assert_eq!(no, Err(NoCommit::ShareFailed("rank 1 could not write its share: no room".into())));
    // Ranks 1 and 2 have not reported step 40.
    shares[0].report(40, Share::Written { file: None });
    let patience = Duration::from_millis(10);
    assert_eq!(shares[0].verdict(40, patience, none), Err(NoCommit::TimedOut(patience)));
    assert_eq!(shares[0].late(), None);
    for rank in [1, 2] {
        shares[rank].report(40, Share::Written { file: None });
    }
    becomes(|| shares[0].late() == Some((40, Ok(Vec::new()))));
    drop(handle);
    becomes(|| links[0].stop_requested());
    assert_eq!(shares[0].verdict(50, PATIENCE, none), Err(NoCommit::CoordinatorLost));
}

#[test]
fn a_commit_of_thousands_of_ranks_fits_a_frame() {
    let files = (0..4096)
        .map(|rank| ShareFile {
            name: format!("state-{rank:05}-of-04096.safetensors"),
            bytes: 123_456_789,
            blake3: "0".repeat(64),
        })
        .collect();
    let frame = wire::encode_within(&ToWorker::Commit { step: 1_000_000, files }, MAX_TO_WORKER);
    assert!(frame.is_ok(), "{}", frame.expect_err("too long"));
}
