//! Strangers and what they must not use up: lines of the log, and this process's open files. In a process of its own, as both
//! are the process's.

use std::fmt::Debug;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::Duration;

use mentee_cluster::coordinator::Agreement;
use mentee_cluster::message::{Hello, PROTOCOL, ToCoordinator, ToWorker};
use mentee_cluster::server;
use mentee_cluster::wire::{self, Decoder, MAX_TO_WORKER};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Keeper;

impl tracing::Subscriber for Keeper {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn Debug) {
                self.0.push_str(&format!("{value:?}"));
            }
        }
        if event.metadata().target() == "mentee::coordinator" {
            let mut text = Text(String::new());
            event.record(&mut text);
            LINES.lock().expect("no panic").push(text.0);
        }
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn answer(stream: &mut TcpStream, token: &str) -> Option<ToWorker> {
    let hello = Hello {
        rank: 0,
        world_size: 1,
        host: "here".into(),
        pid: 1,
        plan_hash: "plan".into(),
        data_digest: "data".into(),
        version: "0.1.0".into(),
    };
    let hello = ToCoordinator::Hello { protocol: PROTOCOL, token: token.into(), generation: 0, hello };
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
    stream.write_all(&wire::encode(&hello).expect("small")).expect("sent");
    let mut decoder = Decoder::new(MAX_TO_WORKER);
    let mut buffer = [0; 512];
    loop {
        if let Some(message) = decoder.next().expect("well-formed") {
            return Some(message);
        }
        let count = stream.read(&mut buffer).ok().filter(|&count| count > 0)?;
        decoder.push(&buffer[..count]);
    }
}

#[test]
fn strangers_fill_neither_the_log_nor_the_table_of_open_files() {
    tracing::subscriber::set_global_default(Keeper).expect("the only one");
    let agreement = Agreement {
        token: "token".into(),
        world_size: 1,
        plan_hash: None,
        version: "0.1.0".into(),
        stall: Duration::from_secs(60),
    };
    let handle = server::start_thread(IpAddr::V4(Ipv4Addr::LOCALHOST), agreement).expect("a port is free");
    let connect = || TcpStream::connect(&handle.address.host_port).expect("listening");
    let refused = || {
        for _ in 0..50 {
            let refused = ToWorker::Refused { reason: "wrong token".into(), exit_code: 1 };
            assert_eq!(answer(&mut connect(), "guess"), Some(refused));
        }
    };
    refused();
    std::thread::sleep(Duration::from_millis(1500)); // longer than a tick
    refused();

    // All of the table is taken: the descriptors of silent strangers, and from here on no other.
    let _silent: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    std::thread::sleep(Duration::from_millis(200));
    let next = std::fs::File::open("/dev/null").expect("linux").as_raw_fd();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
    limit.rlim_cur = next as u64 + 1;
    // SAFETY: `limit` is valid and only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    // Its own end takes the last descriptor.
    assert_eq!(answer(&mut connect(), "token"), Some(ToWorker::Go { generation: 0 }));

    let lines = LINES.lock().expect("no panic");
    let of_strangers: Vec<&String> =
        lines.iter().filter(|line| line.contains("token") || line.contains("connections")).collect();
    assert_eq!(of_strangers.len(), 1, "{lines:#?}");
    assert!(of_strangers[0].contains("connections without a place in this job"), "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("rank 0 is here")), "{lines:#?}");
    assert!(lines.len() < 6, "{lines:#?}");
}
