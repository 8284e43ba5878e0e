//! Real ranks: `examples/mpi_check.rs` under mpirun. It holds the assertions about data; this file looks at
//! how worlds end.

use std::{
    env, fmt,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Far more than any case needs, far less than a hang.
const LIMIT: Duration = Duration::from_secs(120);
/// Ranks spin while they wait: two worlds at a time on a small machine are many times slower than one after
/// the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How a world ended.
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    elapsed: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "exit code {:?} after {:?}", self.code, self.elapsed)?;
        write!(f, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr)
    }
}

/// The mpirun of the MPI library that this was linked to, else the one on PATH.
fn mpirun() -> PathBuf {
    let mpicc = option_env!("MENTEE_MPICC").unwrap_or("");
    let beside = Path::new(mpicc).parent().map(|folder| folder.join("mpirun"));
    let beside = beside.filter(|path| path.is_absolute());
    let on_path = env::var_os("PATH").unwrap_or_default();
    let all = beside.into_iter().chain(env::split_paths(&on_path).map(|folder| folder.join("mpirun")));
    all.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("no mpirun beside {mpicc:?} (MPICC) nor on PATH: run ci/setup, or set MPICC to an MPI compiler wrapper")
    })
}

/// The example, which `cargo test` builds before it runs the tests.
fn check_program() -> PathBuf {
    let test = env::current_exe().expect("this test's path");
    let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let program = profile.join("examples/mpi_check");
    assert!(
        program.is_file(),
        "{} is missing; `cargo test -p mentee-collectives` builds it, `--test mpi` alone does not",
        program.display()
    );
    program
}

/// Runs a command to its end, at most [`LIMIT`].
fn run(command: &mut Command) -> Outcome {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let began = Instant::now();
    let mut child = command
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let collect = |mut pipe: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut text = Vec::new();
            // What arrived before an error is what there is to show.
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = collect(Box::new(child.stdout.take().expect("piped")));
    let stderr = collect(Box::new(child.stderr.take().expect("piped")));
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if began.elapsed() > LIMIT {
            child.kill().expect("kill");
            let _ = child.wait();
            panic!("{command:?} still ran after {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(10));
    };
    let elapsed = began.elapsed();
    Outcome {
        code: status.code(),
        stdout: stdout.join().expect("reader"),
        stderr: stderr.join().expect("reader"),
        elapsed,
    }
}

/// Starts a world of `ranks`.
fn world(ranks: u32, args: &[&str]) -> Outcome {
    run(Command::new(mpirun()).arg("-n").arg(ranks.to_string()).arg(check_program()).args(args))
}

/// By messages, and through shared memory.
fn all_is_well(ranks: u32, command: &str) {
    for args in [&[command][..], &[command, "shm"]] {
        let outcome = world(ranks, args);
        assert_eq!(outcome.code, Some(0), "{args:?}: {outcome}");
        for rank in 0..ranks {
            assert!(outcome.stdout.contains(&format!("rank {rank} of {ranks}: all well")), "{outcome}");
        }
    }
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn two_ranks_agree() {
    all_is_well(2, "sums");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn three_ranks_agree() {
    all_is_well(3, "sums");
}

/// So many that short messages take MPI's own way.
#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn nine_ranks_agree() {
    all_is_well(9, "sums");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn lanes_do_not_wait_for_one_another() {
    for ranks in [1, 2, 3, 4] {
        all_is_well(ranks, "lanes");
    }
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn abort_wakes_all_lanes() {
    for (ranks, how) in [(2, "messages"), (4, "messages"), (4, "shm")] {
        let outcome = world(ranks, &["wake", "1", "6", how]);
        assert_eq!(outcome.code, Some(6), "{outcome}");
        assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
    }
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn one_process_without_mpirun_is_a_world_of_one() {
    let outcome = run(Command::new(check_program()).arg("sums"));
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(outcome.stdout.contains("rank 0 of 1: all well"), "{outcome}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn a_panic_on_one_rank_ends_all() {
    for (ranks, how) in [(2, "messages"), (3, "messages"), (3, "shm")] {
        let outcome = world(ranks, &["panic", "1", how]);
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains("a panic on purpose"), "{outcome}");
        assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
    }
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn a_panic_on_another_thread_ends_all_though_mpi_is_busy() {
    let outcome = world(2, &["panic-elsewhere", "1"]);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("a panic on purpose"), "{outcome}");
    assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn a_rank_that_leaves_by_an_error_does_not_hang_in_finalize() {
    for how in ["messages", "shm"] {
        let outcome = world(2, &["leave", "1", how]);
        assert!(outcome.code.is_some_and(|code| code != 0), "{outcome}");
        assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
    }
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn a_rank_that_does_not_come_is_named_and_all_end() {
    for ranks in [2, 3] {
        let outcome = world(ranks, &["sleep", "1"]);
        assert_eq!(outcome.code, Some(1), "{outcome}");
        let (call, message) = (
            format!("error: all-reduce (call 0 on lane gradients) failed on rank 0 of {ranks}: waited "),
            " s for rank 1; see in its log what it was doing; ending all ranks",
        );
        let stderr = &outcome.stderr;
        // Of three ranks, the third may lose its patience first, and waits for the first two.
        assert!(ranks == 3 || stderr.contains(&call) && stderr.contains(message), "{outcome}");
        assert!(stderr.contains(" s for rank ") && stderr.contains("on lane gradients"), "{outcome}");
        assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
    }
    // Through shared memory it is known who did not come, and the error is the caller's.
    let outcome = world(3, &["sleep", "1", "shm"]);
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome}"); // whose code it is depends on who ended first
    assert!(outcome.stderr.contains("(call 0 on lane gradients)"), "{outcome}");
    assert!(outcome.stderr.contains("waited 0.5 s for rank 1;"), "{outcome}");
    assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn a_rank_that_stops_in_the_middle_of_a_sum_is_named() {
    let outcome = world(2, &["stop", "1"]);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for line in [
        "error: all-reduce (call 1) failed on rank 0 of 2: waited ",
        "heard: all-reduce (call 1) failed on rank 0",
    ] {
        assert!(outcome.stderr.contains(line), "{outcome}");
    }
    assert!(outcome.stderr.contains(" s for rank 1;"), "{outcome}");
    assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn abort_ends_all_with_its_code() {
    let outcome = world(2, &["abort", "0", "4"]);
    assert_eq!(outcome.code, Some(4), "{outcome}");
    assert!(outcome.elapsed < LIMIT / 4, "{outcome}");
}

#[test]
#[cfg_attr(not(feature = "mpi"), ignore = "built without the feature mpi")]
fn ranks_that_mpi_does_not_know_of_are_refused() {
    // As if a launcher had started this process as rank 1 of 2 without MPI's knowledge.
    let outcome = run(Command::new(check_program()).args(["expect", "1", "2"]));
    assert_eq!(outcome.code, Some(2), "{outcome}");
    let message = "error: the environment says rank 1 of 2, but MPI says rank 0 of 1;";
    assert!(outcome.stderr.starts_with(message), "{outcome}");

    let outcome = run(Command::new(check_program()).args(["expect", "0", "1"]));
    assert_eq!(outcome.code, Some(0), "{outcome}");

    let outcome = world(2, &["expect", "0", "3"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    // The first rank to end takes the other with it, message or not.
    assert!(outcome.stderr.contains("the environment says rank 0 of 3, but MPI says rank"), "{outcome}");
}
