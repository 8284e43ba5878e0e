//! `mentee run` with real processes: a fake worker (`examples/fake-worker.rs`) that does what it is told, alone and
//! under the real mpirun, killed and stopped at will.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{put, script, terminal};
use mentee_data::synthetic::{SyntheticConfig, write_synthetic};
use serde_json::Value;
use tempfile::TempDir;

mod common;

const PATIENCE: Duration = Duration::from_secs(60);

/// `mentee` with the fake worker beside it, and a small data set.
struct Place {
    folder: TempDir,
    data: PathBuf,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().expect("a folder");
        let built = Path::new(env!("CARGO_BIN_EXE_mentee"));
        let worker = built.with_file_name("examples").join("fake-worker");
        put(built, &folder.path().join("mentee"));
        put(&worker, &folder.path().join("mentee-worker"));
        Place { folder, data: data().to_owned() }
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.path().canonicalize().expect("there").join("run")
    }

    fn command(&self, script: &str, workers: u32, more: &[&str]) -> Command {
        let mut command = Command::new(self.folder.path().join("mentee"));
        command
            .args(["run", "demo", "--workers", &workers.to_string(), "--run-dir"])
            .arg(self.run_dir())
            .arg("--set")
            .arg(format!("data.path={}", self.data.display()))
            .args(["--set", "schedule.global_batch=8"])
            .args(more)
            .env("FAKE_WORKER", script)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // So that a test's Ctrl-C does not reach it.
            .process_group(0);
        command
    }

    fn run(&self, script: &str, workers: u32, more: &[&str]) -> Ended {
        Ended::of(self.command(script, workers, more).output().expect("mentee starts"))
    }

    fn start(&self, script: &str, workers: u32) -> Child {
        self.command(script, workers, &[]).spawn().expect("mentee starts")
    }

    fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir().join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn restarts(&self) -> Vec<Value> {
        self.metrics().into_iter().filter(|line| line["kind"] == "restart").collect()
    }

    fn steps(&self) -> u64 {
        self.metrics().iter().filter_map(|line| line["step"].as_u64()).max().unwrap_or(0)
    }

    /// Processes that name the run directory on their command line.
    fn processes(&self) -> Vec<i32> {
        let run_dir = self.run_dir();
        fs::read_dir("/proc")
            .expect("linux")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                command.split(|&byte| byte == 0).any(|word| word == run_dir.as_os_str().as_encoded_bytes())
            })
            .collect()
    }

    fn status(&self) -> Value {
        let text = fs::read_to_string(self.run_dir().join("status.json")).expect("a status");
        serde_json::from_str(&text).expect("JSON")
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn of(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn data() -> &'static Path {
    static DATA: OnceLock<TempDir> = OnceLock::new();
    DATA.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let config = SyntheticConfig { train: 40, test: 8, ..SyntheticConfig::default() };
        write_synthetic(folder.path(), &config, &mut |_, _| ()).expect("written");
        folder
    })
    .path()
}

fn becomes(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: no memory is involved; the process is a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// The processes that `of` has started.
fn children(of: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Several workers are started by the `mpirun` that ci/setup brings.
const WORLDS: [u32; 2] = [1, 2];

#[test]
fn a_warning_of_every_rank_is_shown_once() {
    let place = Place::new();
    let ended = place.run("steps=3 warn", 3, &[]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout.matches("told to warn").count(), 1, "{ended:?}");
    assert!(ended.stdout.contains("(2 more warnings like these"), "{ended:?}");
    let kept =
        fs::read_to_string(place.run_dir().join("logs/worker-output.log")).expect("the workers' output");
    assert_eq!(kept.matches("told to warn").count(), 3, "all are kept: {kept}");
}

#[test]
fn a_run_that_goes_well() {
    for workers in WORLDS {
        let place = Place::new();
        let ended = place.run("", workers, &[]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stdout.contains("done: 20 steps"), "{ended:?}");
        assert_eq!(ended.stderr, "");
        assert_eq!(place.steps(), 20);
        assert!(place.restarts().is_empty());
        let status = place.status();
        assert_eq!((status["state"].as_str(), status["exit_code"].as_i64()), (Some("done"), Some(0)));
        let output = fs::read_to_string(place.run_dir().join("logs/worker-output.log")).expect("captured");
        for rank in 0..workers {
            assert!(output.contains(&format!("rank {rank} of {workers} goes, start 0")), "{output}");
        }
        assert!(place.run_dir().join("plan.toml").is_file());
        assert!(place.processes().is_empty());
    }
}

/// `mentee run … | tee log` in a terminal.
#[test]
fn a_pipe_gets_the_lines_also_where_a_bar_could_be_drawn() {
    let place = Place::new();
    let (_ours, theirs) = terminal();
    let output = place.command("kill=0@7", 1, &[]).env("TERM", "xterm").stderr(theirs).output();
    let ended = Ended::of(output.expect("mentee starts"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for part in ["demo: 1 worker (direct), ", "restart 1 of 3", "done: 20 steps"] {
        assert!(ended.stdout.contains(part), "no {part} in {ended:?}");
    }
}

#[test]
fn a_killed_rank_is_answered_with_a_restart() {
    for workers in WORLDS {
        let place = Place::new();
        let last = workers - 1;
        let ended = place.run(&format!("kill={last}@7"), workers, &[]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let restarts = place.restarts();
        assert_eq!(restarts.len(), 1, "{restarts:?}");
        assert_eq!(restarts[0]["rank"].as_u64(), Some(u64::from(last)), "{restarts:?}");
        assert_eq!(restarts[0]["generation"].as_u64(), Some(1));
        assert!(ended.stdout.contains("restart 1 of 3"), "{ended:?}");
        assert_eq!(place.steps(), 20);
        assert!(place.processes().is_empty());
    }
}

#[test]
fn a_budget_that_is_spent_ends_with_a_report() {
    for workers in WORLDS {
        let place = Place::new();
        let last = workers - 1;
        let ended = place.run(&format!("kill_always={last}@7"), workers, &["--max-restarts", "1"]);
        assert_eq!(ended.code, Some(5), "{ended:?}");
        assert_eq!(place.restarts().len(), 1);
        let error = ended.stderr.lines().last().expect("a line");
        assert!(error.starts_with(&format!("error: rank {last} on ")), "{error}");
        assert!(error.contains("its process ended without a word"), "{error}");
        assert!(
            ended.stderr.contains(&format!("rank {last} of {workers} goes, start 1")),
            "last words: {ended:?}"
        );
        assert_eq!(place.status()["state"], "failed");
        assert!(place.processes().is_empty());
    }
}

#[test]
fn shared_memory_of_a_worker_that_dies_before_all_have_come_is_removed() {
    let place = Place::new();
    let segment = PathBuf::from(format!("/dev/shm/mentee-test-early-{}", std::process::id()));
    let ended = place.run(&format!("segment={}", segment.display()), 1, &["--max-restarts", "0"]);
    assert_eq!(ended.code, Some(5), "{ended:?}");
    let left = segment.exists();
    let _ = fs::remove_file(&segment);
    assert!(!left, "it is still there: {ended:?}");
}

#[test]
fn what_a_restart_cannot_help_ends_at_once_with_its_own_code() {
    for workers in WORLDS {
        for code in [2, 3, 4, 6] {
            let place = Place::new();
            let ended = place.run(&format!("fail={}@3:{code}", workers - 1), workers, &[]);
            assert_eq!(ended.code, Some(code), "{ended:?}");
            assert!(place.restarts().is_empty());
            let line = format!("error: rank {} was told to fail at step 3", workers - 1);
            assert_eq!(
                ended.stderr.lines().filter(|said| **said == *line).count(),
                1,
                "said once: {ended:?}"
            );
        }
        for code in [2, 3, 4] {
            let place = Place::new();
            let ended = place.run(&format!("exit={code}"), workers, &[]);
            assert_eq!(ended.code, Some(code), "{ended:?}");
            assert!(ended.stderr.starts_with("error: this fake worker was told to fail"), "{ended:?}");
            assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
        }
    }
}

#[test]
fn a_rank_that_sees_other_data_ends_the_run_with_3() {
    let place = Place::new();
    let ended = place.run("other_data=1", 2, &[]);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.stderr.contains("data.path must hold the same files on every machine"), "{ended:?}");
    assert!(place.restarts().is_empty());
}

#[test]
fn a_stop_is_a_checkpoint_and_75_and_the_same_command_goes_on() {
    for workers in WORLDS {
        for asked in [libc::SIGINT, libc::SIGTERM] {
            let place = Place::new();
            let script = "steps=100000 step_ms=2";
            let child = place.start(script, workers);
            becomes("steps are made", || place.steps() > 5);
            signal(child.id(), asked);
            let ended = Ended::of(child.wait_with_output().expect("waited"));
            assert_eq!(ended.code, Some(75), "{ended:?}");
            assert_eq!(place.status()["state"], "preempted");
            assert!(place.restarts().is_empty());
            assert!(place.processes().is_empty());
            let stopped = place.steps();
            let ended = place.run(&format!("steps={}", stopped + 5), workers, &[]);
            assert_eq!(ended.code, Some(0), "{ended:?}");
            let repeated = place.metrics().iter().filter(|line| line["step"] == stopped).count();
            assert_eq!(repeated, 1, "it went on where it was");
        }
    }
}

/// `nohup mentee run &`, and the terminal is closed.
#[test]
fn a_hang_up_that_is_ignored_ends_no_run() {
    let place = Place::new();
    let mut command = place.command("steps=100000 step_ms=2", 1, &[]);
    // SAFETY: between fork and exec only signal is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let child = command.spawn().expect("mentee starts");
    becomes("steps are made", || place.steps() > 5);
    signal(child.id(), libc::SIGHUP);
    let then = place.steps();
    becomes("it goes on", || place.steps() > then + 100);
    signal(child.id(), libc::SIGINT);
    assert_eq!(child.wait_with_output().expect("waited").status.code(), Some(75));
}

/// A rank that hangs outlives its killed mpirun; were it continued later, it would write beside the next start.
#[test]
fn the_ranks_of_a_killed_mpirun_are_gone_before_the_next_start() {
    let place = Place::new();
    let child = place.start("steps=100000 step_ms=2", 2);
    becomes("steps are made", || place.steps() > 5);
    let mpirun = children(child.id() as i32);
    let proxies: Vec<i32> = mpirun.iter().flat_map(|&pid| children(pid)).collect();
    let ranks: Vec<i32> = proxies.iter().flat_map(|&pid| children(pid)).collect();
    assert_eq!((mpirun.len(), ranks.len()), (1, 2), "{mpirun:?} {proxies:?} {ranks:?}");
    signal(ranks[1] as u32, libc::SIGSTOP);
    for &pid in mpirun.iter().chain(&proxies) {
        signal(pid as u32, libc::SIGKILL);
    }
    becomes("it is started again", || place.restarts().len() == 1);
    let then = place.steps();
    becomes("steps are made again", || place.steps() > then + 5);
    assert!(!place.processes().contains(&ranks[1]), "the rank that hung is still there");
    signal(child.id(), libc::SIGINT);
    assert_eq!(child.wait_with_output().expect("waited").status.code(), Some(75));
}

/// `mentee run | tee log` and Ctrl-C: tee is gone first.
#[test]
fn a_reader_that_is_gone_ends_no_run() {
    let place = Place::new();
    let mut child = place.start("steps=100000 step_ms=2 warn", 1);
    (child.stdout, child.stderr) = (None, None);
    becomes("steps are made", || place.steps() > 5);
    // Longer than between two lines of progress.
    std::thread::sleep(Duration::from_millis(2500));
    signal(child.id(), libc::SIGINT);
    assert_eq!(child.wait().expect("waited").code(), Some(75));
    assert_eq!(place.status()["state"], "preempted");
}

#[test]
fn a_full_disk_under_the_output_ends_no_run() {
    let place = Place::new();
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").expect("linux");
    let run = |script: &str| {
        let mut command = place.command(script, 1, &["--max-restarts", "1"]);
        command.stdout(full()).stderr(full()).status().expect("mentee starts").code()
    };
    // Every kind of line: progress, a warning, a restart, last words.
    assert_eq!(run("steps=5 kill_always=0@3 warn"), Some(5));
    assert_eq!(run("steps=10 warn"), Some(0));
    assert_eq!(place.status()["state"], "done");
}

/// With programs that stand in for Slurm's: an srun that dies leaves its step behind, which is ended before the next start
/// and not after it.
#[test]
fn what_an_srun_leaves_is_ended_before_the_next_start() {
    let place = Place::new();
    let bin = place.folder.path().join("bin");
    let steps = place.folder.path().join("steps");
    fs::create_dir_all(&bin).expect("made");
    fs::create_dir_all(&steps).expect("made");
    let said = place.folder.path().join("said");
    let srun = "name=$2; shift 2
        while [ \"${1#--}\" != \"$1\" ]; do shift; done
        echo \"start $name\" >> SAID; touch STEPS/$name
        SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 exec \"$@\"";
    let squeue = "for step in $(ls STEPS); do echo \"7.$step $step\"; done";
    // As Slurm: not gone at once.
    let scancel = "echo \"scancel $2\" >> SAID; (sleep 1; rm -f STEPS/${2#7.}) > /dev/null 2>&1 &";
    for (name, text) in [("srun", srun), ("squeue", squeue), ("scancel", scancel)] {
        let text = text.replace("SAID", &said.display().to_string());
        script(&bin.join(name), &text.replace("STEPS", &steps.display().to_string()));
    }
    let mut command = place.command("kill=0@3", 1, &["--engine", "srun", "--interface", "127.0.0.1"]);
    command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
    command.env("SLURM_JOB_ID", "7").env("SLURM_JOB_NODELIST", "n1");
    let child = command.spawn().expect("mentee starts");
    let name = format!("mentee-workers-{}-", child.id());
    let ended = Ended::of(child.wait_with_output().expect("waited"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(place.restarts().len(), 1);
    let said = fs::read_to_string(&said).expect("srun was called").replace(&name, "step ");
    let mut said: Vec<&str> = said.lines().collect();
    said.dedup();
    assert_eq!(said, ["start step 0", "scancel 7.step 0", "start step 1"]);
}

/// A terminal that was opened in a job of two nodes which is over.
#[test]
fn the_variables_of_a_job_that_is_over_are_passed_over() {
    let place = Place::new();
    let bin = place.folder.path().join("bin");
    fs::create_dir_all(&bin).expect("made");
    script(&bin.join("scontrol"), "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1");
    let mut command = place.command("steps=5", 2, &[]);
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").expect("a PATH")));
    command.env("SLURM_JOB_ID", "7").env("SLURM_JOB_NODELIST", "n[1-2]");
    let ended = Ended::of(command.output().expect("mentee starts"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("job 7, which is over"), "{ended:?}");
}

#[test]
fn a_second_signal_kills() {
    for workers in WORLDS {
        let place = Place::new();
        let child = place.start("steps=100000 step_ms=2 deaf", workers);
        becomes("steps are made", || place.steps() > 5);
        signal(child.id(), libc::SIGINT);
        becomes("the first is noticed", || place.status()["state"] == "stopping");
        let started = Instant::now();
        signal(child.id(), libc::SIGINT);
        let ended = Ended::of(child.wait_with_output().expect("waited"));
        assert_eq!(ended.code, Some(75), "{ended:?}");
        assert!(started.elapsed() < Duration::from_secs(10));
        becomes("nothing is left", || place.processes().is_empty());
    }
}

#[test]
fn a_killed_launcher_leaves_nothing_and_the_same_command_goes_on() {
    for workers in WORLDS {
        let place = Place::new();
        let mut child = place.start("steps=100000 step_ms=2 deaf", workers);
        becomes("steps are made", || place.steps() > 5);
        child.kill().expect("killed");
        child.wait().expect("waited");
        let started = Instant::now();
        becomes("nothing is left", || place.processes().is_empty());
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        let steps = place.steps();
        let ended = place.run(&format!("steps={}", steps + 5), workers, &[]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}

#[test]
fn two_launchers_do_not_share_a_directory() {
    let place = Place::new();
    let child = place.start("steps=100000 step_ms=2", 1);
    becomes("steps are made", || place.steps() > 5);
    let ended = place.run("", 1, &[]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains(&format!("in use by process {}", child.id())), "{ended:?}");
    signal(child.id(), libc::SIGINT);
    assert_eq!(child.wait_with_output().expect("waited").status.code(), Some(75));
}

#[test]
fn another_recipes_directory_is_left_alone() {
    let place = Place::new();
    assert_eq!(place.run("", 1, &[]).code, Some(0));
    let everything = |place: &Place| -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<_> = ["plan.toml", "metrics.jsonl", "status.json", "logs/worker-output.log"]
            .map(|name| (name.into(), fs::read(place.run_dir().join(name)).expect("there")))
            .into();
        files.sort();
        files
    };
    let before = everything(&place);
    let ended = place.run("", 1, &["--set", "run.seed=7"]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("run.seed = 0 there, 7 here"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1);
    assert_eq!(everything(&place), before);
}

#[test]
fn bad_input_ends_with_one_line_before_anything_is_written() {
    let table: [(&[&str], i32, &str); 6] = [
        (&["--set", "schedule.global_bach=8"], 2, "global_batch"),
        (&["--set", "data.path=/nowhere"], 3, "/nowhere"),
        (&["--set", "schedule.global_batch=1000"], 2, "schedule.global_batch"),
        (&["--workers", "0"], 2, "--workers"),
        (&["--workers", "2", "--engine", "direct"], 2, "--engine"),
        (&["--workers", "many"], 2, "many"),
    ];
    for (more, code, part) in table {
        let place = Place::new();
        let ended = place.run("", 1, more);
        // clap refuses the second --workers; what is tested is the last value.
        if ended.stderr.contains("cannot be used multiple times") {
            let mut command = Command::new(place.folder.path().join("mentee"));
            command.args(["run", "demo", "--run-dir"]).arg(place.run_dir()).args(more);
            let ended = Ended::of(command.output().expect("mentee starts"));
            assert_eq!(ended.code, Some(code), "{more:?}: {ended:?}");
            assert!(ended.stderr.contains(part), "{more:?}: {ended:?}");
        } else {
            assert_eq!(ended.code, Some(code), "{more:?}: {ended:?}");
            assert!(ended.stderr.contains(part), "{more:?}: {ended:?}");
            assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
        }
        assert!(!place.run_dir().exists(), "{more:?}");
    }
}

#[test]
fn a_missing_worker_is_named() {
    let place = Place::new();
    fs::remove_file(place.folder.path().join("mentee-worker")).expect("there");
    let ended = Ended::of(place.command("", 1, &[]).env("PATH", "/nowhere").output().expect("mentee starts"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.starts_with("error: mentee-worker is neither in "), "{ended:?}");
}

#[test]
fn a_run_can_be_looked_at() {
    let place = Place::new();
    assert_eq!(place.run("kill=0@7", 1, &[]).code, Some(0));
    let mentee = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mentee")).args(arguments).arg(place.run_dir()).output();
        Ended::of(output.expect("mentee starts"))
    };
    let shown = mentee(&["status"]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.stdout.contains("demo: done"), "{shown:?}");
    assert!(shown.stdout.contains("1 restart\n"), "{shown:?}");
    let json: Value = serde_json::from_str(&mentee(&["status", "--json"]).stdout).expect("JSON");
    assert_eq!(json["last_train"]["step"], 20);
    assert_eq!(json["status"]["state"], "done");
    for name in ["launcher", "coordinator"] {
        let log = fs::read_to_string(place.run_dir().join(format!("logs/{name}.jsonl"))).expect("a log");
        let event: Value = serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
        assert!(event["message"].is_string() && event["level"].is_string(), "{event}");
    }
    let logs = mentee(&["logs"]);
    assert!(logs.stdout.contains("launcher") && logs.stdout.contains("coordinator"), "{logs:?}");
    assert!(mentee(&["logs", "--level", "warn"]).stdout.contains("restart 1 of 3"));
    assert_eq!(mentee(&["logs", "--rank", "5"]).code, Some(1));
}
