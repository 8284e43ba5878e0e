//! Faults of memory and of the network: found, named, and never trained on.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use system_tests::process::{LIMIT, Outcome, binary, finish, mentee, mpirun, start};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::losses;
use system_tests::{machine, temp_dir};

fn run(dir: &Path, ranks: u32, faults: &str, sets: &[&str]) -> Outcome {
    write_images(&dir.join("images"));
    let recipe = TinyRecipe::new(&dir.join("images")).write(dir.join("tiny.toml"));
    let mut command = mpirun(ranks);
    command.env("MENTEE_FAULTS", faults);
    command.arg(binary("mentee-worker")).arg(&recipe).arg("--run-dir").arg(dir.join("run"));
    for set in sets {
        command.args(["--set", set]);
    }
    finish(command)
}

#[test]
fn a_flipped_bit_names_rank_and_tensor_within_one_check_interval() {
    let _machine = machine();
    let dir = temp_dir();
    let faults = "flip:rank=1,step=5,tensor=teacher.backbone.conv1.weight";
    let sets = ["parallel.check_every_steps=2", "checkpoint.every_steps=0"];
    let outcome = run(dir.path(), 3, faults, &sets).expect(1);
    let error = outcome.error_line();
    assert!(
        error.starts_with("step 6: teacher.backbone.conv1.weight on rank 1 is not what the other ranks hold"),
        "{error}"
    );
    assert!(!dir.path().join("run/checkpoints").exists(), "a checkpoint of weights that differ");
}

#[test]
fn a_flipped_bit_never_reaches_a_checkpoint() {
    let _machine = machine();
    let dir = temp_dir();
    let faults = "flip:rank=1,step=5,tensor=student.backbone.layer1.0.conv1.weight";
    let outcome = run(dir.path(), 2, faults, &["parallel.check_every_steps=0"]).expect(1);
    assert!(outcome.error_line().starts_with("step 6: "), "{}", outcome.told());
    assert!(dir.path().join("run/checkpoints/step-00000003").exists());
    assert!(!dir.path().join("run/checkpoints/step-00000006").exists());
}

#[test]
fn a_nan_in_one_ranks_gradient_updates_no_rank() {
    let _machine = machine();
    let dir = temp_dir();
    let outcome = run(dir.path(), 2, "nan:rank=1,step=4", &[]).expect(6);
    let error = outcome.error_line();
    assert!(error.starts_with("after step 4: the gradient of student."), "{error}");
    assert!(error.contains("it comes from rank 1") && error.contains("no rank was updated"), "{error}");
    assert_eq!(losses(&dir.path().join("run")).keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
}

#[test]
fn a_skipped_bucket_is_an_error_that_names_both_calls() {
    let _machine = machine();
    // Through shared memory, which ranks of one machine use, calls are compared without being asked to.
    for compare in ["true", "false"] {
        let dir = temp_dir();
        let sets = [&format!("parallel.check_collectives={compare}"), "parallel.bucket_mib=0.05"];
        let outcome = run(dir.path(), 2, "skip-bucket:rank=1,step=2,bucket=1", &sets).expect(1);
        let told = outcome.told();
        assert!(
            outcome.stderr.contains("step 2: ") && outcome.stderr.contains("on lane gradients"),
            "{told}"
        );
        assert!(outcome.stderr.contains(": rank 0 calls all-reduce of "), "{told}");
        assert!(
            outcome.stderr.contains(" f64 as its call ")
                && outcome.stderr.contains(", rank 1 calls all-reduce of "),
            "{told}"
        );
    }
}

#[test]
fn a_skipped_bucket_ends_the_run_also_when_calls_are_not_compared() {
    let _machine = machine();
    // The last bucket: the other rank waits for it, and nothing else is sent that it could take for it.
    let dir = temp_dir();
    let sets = ["parallel.bucket_mib=0.05", "parallel.timeout_s=3"];
    let outcome = run(dir.path(), 2, "skip-bucket:rank=1,step=2,bucket=last", &sets);
    let told = outcome.told();
    assert_ne!(outcome.code, 0, "{told}");
    // Rank 0 waits in its last bucket, rank 1 in what comes after it; who loses patience first ends both.
    let waited = |rank: &str, other: &str| {
        outcome.stderr.lines().any(|line| {
            line.contains(&format!("failed on rank {rank} of 2: waited "))
                && line.contains(&format!(" s for rank {other}; see in its log what it was doing"))
        })
    };
    assert!(waited("0", "1") || waited("1", "0"), "{told}");
    assert_eq!(losses(&dir.path().join("run")).keys().copied().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_rank_whose_launcher_is_gone_does_not_wait_for_mpi() {
    let _machine = machine();
    let dir = temp_dir();
    // A launcher that never answers: MPI waits for it, and the shell between is what started the rank.
    let (launcher, rank) = UnixStream::pair().expect("two sockets");
    launcher.set_read_timeout(Some(LIMIT)).expect("a time limit");
    let (rank, there) = (rank.as_raw_fd(), rank);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("\"$@\" 2>\"$0\" & echo $!; wait").arg(dir.path().join("said"));
    shell.arg(binary("mentee-worker")).arg("demo").arg("--run-dir").arg(dir.path().join("run"));
    shell.envs([("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("PMI_FD", &rank.to_string())]);
    shell.envs([("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")]);
    // SAFETY: fcntl is async-signal-safe; the socket stays open in the child.
    unsafe {
        shell.pre_exec(move || {
            if libc::fcntl(rank, libc::F_SETFD, 0) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
    };
    let mut shell = shell.stdout(Stdio::piped()).spawn().expect("sh");
    drop(there);
    let mut pid = String::new();
    BufReader::new(shell.stdout.take().expect("piped")).read_line(&mut pid).expect("a line");
    let process = Path::new("/proc").join(pid.trim());
    let mut word = [0; 4];
    (&launcher).read_exact(&mut word).expect("MPI asks its launcher");
    std::thread::sleep(Duration::from_secs(1));
    assert!(process.join("exe").exists(), "it waits");
    shell.kill().expect("killed");
    shell.wait().expect("gone");
    let since = Instant::now();
    while process.join("exe").exists() {
        assert!(since.elapsed() < LIMIT, "it waits for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = std::fs::read_to_string(dir.path().join("said")).expect("a file");
    assert!(said.contains("is gone while MPI starts"), "{said}");
}

#[test]
fn a_run_whose_directory_is_removed_ends_and_leaves_alone_what_comes_there() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("schedule.epochs", "100000")
        .set("eval.knn_every_epochs", "0")
        .write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    let command = |sets: &[&str]| {
        let mut command = mentee();
        command.arg("run").arg(&recipe).arg("--run-dir").arg(&run_dir).args(["--workers", "2"]).args(sets);
        command
    };
    let first = start(command(&[]));
    let since = Instant::now();
    while !run_dir.join("metrics.jsonl").exists() || losses(&run_dir).len() < 5 {
        assert!(since.elapsed() < LIMIT, "no steps within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    // As a user does who forgets it. What is being written meanwhile may make a removal fail.
    while std::fs::remove_dir_all(&run_dir).is_err() {
        assert!(since.elapsed() < LIMIT, "it cannot be removed");
    }
    let second = finish(command(&["--set", "run.seed=9", "--set", "schedule.max_steps=8"])).expect(0);
    assert!(losses(&run_dir).len() >= 8, "{}", second.told());
    let first = first.finish().expect(1);
    assert!(first.error_line().contains("was removed, renamed or taken by another run"), "{}", first.told());
    assert_eq!(losses(&run_dir).keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
}
