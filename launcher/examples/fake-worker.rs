//! Stands in for `mentee-worker` in the launcher's tests: says hello, counts steps, writes metrics, and misbehaves as
//! the variable `FAKE_WORKER` tells it. No torch, no MPI.
//!
//! `FAKE_WORKER` holds words: `steps=N` (20), `step_ms=N` (5), `kill=RANK@STEP` (SIGKILL to itself, once a run
//! directory), `kill_always=RANK@STEP`, `fail=RANK@STEP:CODE` (says why, then exits), `exit=CODE` (before hello, with
//! an `error:` line), `other_data=RANK` (sees other data), `deaf` (ignores requests to stop), `warn` (a warning
//! that every rank gives), `segment=PATH` (before hello it maps a new file there, and a second later kills itself).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mentee_cluster::{
    CoordinatorAddress, Hello, Link, LinkError, Phase, Progress, WorkerEvent, discover, server,
};
use mentee_config::{Recipe, complain};

struct Script(String);

impl Script {
    fn word(&self, name: &str) -> Option<&str> {
        self.0.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn number(&self, name: &str, default: u64) -> u64 {
        self.word(name).and_then(|text| text.parse().ok()).unwrap_or(default)
    }

    /// `RANK@STEP` or `RANK@STEP:CODE`.
    fn at(&self, name: &str, rank: u32, step: u64) -> Option<i32> {
        let (place, code) = self.word(name).map(|text| text.split_once(':').unwrap_or((text, "0")))?;
        (place == format!("{rank}@{step}")).then(|| code.parse().expect("a code"))
    }
}

fn die() {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    assert_eq!(arguments[2], "--run-dir", "the launcher's command line");
    let run = PathBuf::from(&arguments[3]);
    let script = Script(std::env::var("FAKE_WORKER").unwrap_or_default());
    let environment = |name: &str| std::env::var(name).ok();
    let identity = discover(&environment).expect("the launcher says who we are");
    let rank = identity.rank;
    if let Some(code) = script.word("exit") {
        complain!("error: this fake worker was told to fail, rank {rank}");
        std::process::exit(code.parse().expect("a code"));
    }
    if let Some(segment) = script.word("segment") {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(segment).expect("made");
        file.set_len(4096).expect("long enough");
        // SAFETY: a new mapping of one page of an open file; nothing else is touched.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(address, libc::MAP_FAILED);
        std::thread::sleep(Duration::from_secs(1));
        die();
    }
    let recipe = Recipe::from_plan(Path::new(&arguments[1])).expect("a plan");
    let address = CoordinatorAddress::from_env(&environment).expect("the launcher's coordinator");
    let hello = Hello {
        rank,
        world_size: identity.world_size,
        host: server::hostname(),
        pid: std::process::id(),
        plan_hash: recipe.hash(),
        data_digest: if script.word("other_data") == Some(&rank.to_string()) { "other" } else { "fake" }
            .into(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let (link, go) = match Link::connect(&address, hello, Duration::from_secs(60)) {
        Ok(joined) => joined,
        Err(error) => {
            complain!("error: {error}");
            let LinkError::Refused { exit_code, .. } = error else { std::process::exit(1) };
            std::process::exit(exit_code);
        }
    };
    if script.0.contains("warn") {
        complain!("warning: rank {rank}: this fake worker was told to warn");
    }
    println!("rank {rank} of {} goes, start {}", identity.world_size, go.generation);

    let total_steps = script.number("steps", 20);
    let saved = run.join(format!("fake-step-{rank}"));
    let mut step: u64 = fs::read_to_string(&saved).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    while step < total_steps {
        if link.stop_requested() && !script.0.contains("deaf") {
            println!("rank {rank} stops at {step}");
            link.event(WorkerEvent::Finished { exit_code: 75 });
            link.close();
            std::process::exit(75);
        }
        std::thread::sleep(Duration::from_millis(script.number("step_ms", 5)));
        step += 1;
        let phase = Phase::Forward;
        let loss = Some(1.0 / step as f64);
        link.report(Progress { step, total_steps, epoch: 0, epochs: 1, phase, loss, ..Progress::default() });
        if script.at("kill_always", rank, step).is_some() {
            die();
        }
        if script.at("kill", rank, step).is_some() {
            let once = OpenOptions::new().write(true).create_new(true).open(run.join("killed-once"));
            if once.is_ok() {
                die();
            }
        }
        if let Some(exit_code) = script.at("fail", rank, step) {
            let message = format!("rank {rank} was told to fail at step {step}");
            complain!("error: {message}");
            link.event(WorkerEvent::Failed { step, phase: Phase::Update, message, exit_code, peers: None });
            link.close();
            std::process::exit(exit_code);
        }
        fs::write(&saved, step.to_string()).expect("written");
        if rank == 0 {
            let line = format!(
                "{{\"kind\":\"train\",\"step\":{step},\"epoch\":0,\"loss\":{}}}\n",
                1.0 / step as f64
            );
            let metrics = OpenOptions::new().create(true).append(true).open(run.join("metrics.jsonl"));
            metrics.and_then(|mut file| file.write_all(line.as_bytes())).expect("written");
        }
    }
    if rank == 0 {
        let line = format!(
            "{{\"kind\":\"eval\",\"step\":{step},\"epoch\":1,\"knn_top1\":60.5,\"knn_random_init\":40,\
             \"knn_raw_pixels\":30.25,\"protocol\":\"none: a fake\"}}\n"
        );
        let metrics = OpenOptions::new().append(true).open(run.join("metrics.jsonl"));
        metrics.and_then(|mut file| file.write_all(line.as_bytes())).expect("written");
    }
    link.event(WorkerEvent::Finished { exit_code: 0 });
    link.close();
}
