//! Jobs in a real Slurm of two nodes: what it does to them, a run survives, with the bits of an undisturbed one.
//!
//! Where there can be no Slurm every test is reported as ignored, with the reason. `SLOW=1` adds the one that waits for a
//! real time limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;
use system_tests::guide;
use system_tests::process::{binary, finish, kill_rank, mentee, mpirun};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{final_state, losses, metrics};
use system_tests::slurm::{Lab, unix_time};
use system_tests::{machine, temp_dir};

const STEPS: usize = 40;
/// Steps of the run that lives to see its time limit.
const SLOW_STEPS: usize = 1500;
const TWO_BY_TWO: [&str; 4] = ["--nodes", "2", "--workers-per-node", "2"];

/// The lab and a run that nothing happened to.
struct Bench {
    lab: Lab,
    folder: PathBuf,
    recipe: PathBuf,
    whole: PathBuf,
}

type Test = (&'static str, fn(&Bench));

const TESTS: &[Test] = &[
    ("submit_run_and_mpirun_give_the_same_losses", submit_run_and_mpirun_give_the_same_losses),
    ("a_requeued_job_goes_on", a_requeued_job_goes_on),
    ("a_preempted_job_goes_on", a_preempted_job_goes_on),
    ("a_warned_job_puts_itself_back", a_warned_job_puts_itself_back),
    ("a_job_whose_node_goes_down_goes_on", a_job_whose_node_goes_down_goes_on),
    ("a_killed_task_is_restarted_in_the_same_job", a_killed_task_is_restarted_in_the_same_job),
    ("a_node_that_fails_twice_is_left_out", a_node_that_fails_twice_is_left_out),
    ("a_cancelled_job_is_gone_in_time_and_resumable", a_cancelled_job_is_gone_in_time_and_resumable),
    ("a_job_is_its_own_wherever_it_was_submitted", a_job_is_its_own_wherever_it_was_submitted),
    ("devices_follow_slurms_options", devices_follow_slurms_options),
    ("an_array_of_variants", an_array_of_variants),
    ("what_happens_to_a_task_of_an_array_is_its_own", what_happens_to_a_task_of_an_array_is_its_own),
    ("every_command_of_the_guide_runs", every_command_of_the_guide_runs),
    ("what_cannot_be_is_refused_before_it_is_submitted", what_cannot_be_is_refused_before_it_is_submitted),
];
const SLOW: Test = ("a_time_limit_is_no_end", a_time_limit_is_no_end);

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let slow = std::env::var_os("SLOW").is_some();
    let selected: Vec<Test> = TESTS
        .iter()
        .chain([&SLOW])
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())))
        .copied()
        .collect();
    if std::env::args().any(|word| word == "--list") {
        for (name, _) in &selected {
            println!("{name}: test");
        }
        return;
    }
    println!("\nrunning {} tests", selected.len());
    let began = Instant::now();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    let _machine = machine();
    let bench = if selected.is_empty() { Err("nothing is selected".to_owned()) } else { Bench::new() };
    for (name, test) in selected {
        let ready = match &bench {
            Err(reason) => Err(format!("Slurm: {reason}")),
            Ok(_) if name == SLOW.0 && !slow => Err("SLOW=1: two minutes".to_owned()),
            Ok(bench) => Ok(bench),
        };
        match ready {
            Err(reason) => {
                println!("test {name} ... ignored, needs {reason}");
                ignored += 1;
            }
            Ok(bench) => {
                let since = Instant::now();
                let run = std::panic::AssertUnwindSafe(|| test(bench));
                let ok = std::panic::catch_unwind(run).is_ok();
                println!(
                    "test {name} ... {} ({:.1} s)",
                    if ok { "ok" } else { "FAILED" },
                    since.elapsed().as_secs_f64()
                );
                *(if ok { &mut passed } else { &mut failed }) += 1;
                // Nothing of one test may hold up the next.
                let _ = finish({
                    let mut cancel = bench.lab.command("scancel");
                    cancel.arg("--state=RUNNING").arg("--state=PENDING").args(["--user", "root"]);
                    cancel
                });
            }
        }
    }
    drop(bench);
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; finished \
         in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        began.elapsed().as_secs_f64()
    );
    std::process::exit(i32::from(failed > 0));
}

impl Bench {
    fn new() -> Result<Bench, String> {
        let lab = Lab::up()?;
        let folder = lab.folder();
        write_images(&folder.join("images"));
        let recipe = recipe(&folder, STEPS);
        let whole = folder.join("whole");
        let mut command = mentee();
        command.arg("run").arg(&recipe).args(["--workers", "4", "--run-dir"]).arg(&whole);
        finish(command).expect(0);
        assert_eq!(losses(&whole).len(), STEPS);
        Ok(Bench { lab, folder, recipe, whole })
    }

    fn run_dir(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn submitted(&self, name: &str, more: &[&str]) -> PathBuf {
        let run_dir = self.run_dir(name);
        let more = [&TWO_BY_TWO, more].concat();
        self.lab.submit(&self.recipe, &run_dir, &more).expect(0);
        run_dir
    }

    /// The run ended by itself with the bits of the undisturbed one.
    fn ends_like_the_whole(&self, run_dir: &Path) {
        self.lab.wait_for_end(run_dir, "COMPLETED");
        assert_eq!(losses(run_dir), losses(&self.whole), "{}", self.lab.told(run_dir));
        assert_eq!(final_state(run_dir), final_state(&self.whole));
    }
}

fn recipe(folder: &Path, steps: usize) -> PathBuf {
    TinyRecipe::new(&folder.join("images"))
        .set("schedule.epochs", "1000")
        .set("schedule.max_steps", &steps.to_string())
        .set("checkpoint.every_steps", "10")
        .write(folder.join(format!("tiny-{steps}.toml")))
}

/// From a disturbance at `at` to the next checkpoint, and to the first step of the next start, in words.
fn times(run_dir: &Path, at: f64) -> String {
    let lines = metrics(run_dir);
    let time = |line: &Value| line["time"].as_f64().unwrap_or(0.0);
    let after = |kind: &str, moment: f64| {
        lines.iter().filter(|line| line["kind"] == kind).map(time).find(|&then| then > moment)
    };
    let checkpoint = after("checkpoint", at);
    // The longest pause between two steps is that between the two starts.
    let steps: Vec<f64> = lines
        .iter()
        .filter(|line| line["kind"] == "train")
        .map(time)
        .filter(|&then| then > at - 5.0)
        .collect();
    let pause = steps
        .windows(2)
        .map(|pair| (pair[1] - pair[0], pair[1]))
        .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
    format!(
        "checkpoint after {:.2} s, next step after {:.1} s",
        checkpoint.map_or(f64::NAN, |then| then - at),
        pause.1 - at
    )
}

fn submit_run_and_mpirun_give_the_same_losses(bench: &Bench) {
    let submitted = bench.submitted("submitted", &[]);
    let bare = bench.run_dir("bare");
    bench.ends_like_the_whole(&submitted);
    let mut command = mpirun(4);
    command.arg(binary("mentee-worker")).arg(&bench.recipe).arg("--run-dir").arg(&bare);
    finish(command).expect(0);
    let (expected, bare) = (losses(&bench.whole), losses(&bare));
    let worst = |other: &BTreeMap<u64, f64>| {
        expected.iter().map(|(step, loss)| (loss - other[step]).abs()).fold(0.0, f64::max)
    };
    let (submitted, bare) = (worst(&losses(&submitted)), worst(&bare));
    println!("largest difference of losses over {STEPS} steps: submit {submitted:e}, mpirun {bare:e}");
    assert!(submitted <= 1e-12 && bare <= 1e-12);
    let status = bench.lab.status(&bench.run_dir("submitted"));
    assert_eq!(status["slurm"]["job"]["state"], "COMPLETED");
    assert_eq!(status["status"]["exit_code"], 0);
}

fn a_requeued_job_goes_on(bench: &Bench) {
    let run_dir = bench.submitted("requeued", &[]);
    bench.lab.wait_for_lines(&run_dir, 7);
    let at = unix_time();
    bench.lab.slurm("scontrol", &["requeue", &bench.lab.job(&run_dir).0]);
    bench.ends_like_the_whole(&run_dir);
    assert_eq!(bench.lab.requeues(&run_dir), 1);
    println!("scontrol requeue: {}", times(&run_dir, at));
}

fn a_preempted_job_goes_on(bench: &Bench) {
    let run_dir = bench.submitted("preempted", &["--partition", "main"]);
    bench.lab.wait_for_lines(&run_dir, 7);
    let at = unix_time();
    let wrap = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"];
    bench.lab.slurm("sbatch", &wrap);
    bench.ends_like_the_whole(&run_dir);
    assert_eq!(bench.lab.requeues(&run_dir), 1);
    println!("preemption by a job of 2 s: {}", times(&run_dir, at));
}

fn a_warned_job_puts_itself_back(bench: &Bench) {
    let run_dir = bench.submitted("warned", &[]);
    bench.lab.wait_for_lines(&run_dir, 7);
    let (job, _) = bench.lab.job(&run_dir);
    let at = unix_time();
    bench.lab.slurm("scancel", &["--batch", "--signal=USR1", &job]);
    bench.ends_like_the_whole(&run_dir);
    assert_eq!(bench.lab.requeues(&run_dir), 1);
    assert_eq!(bench.lab.job(&run_dir).0, job, "the same job");
    let status = bench.lab.status(&run_dir);
    assert_eq!(status["slurm"]["record"]["requeues"][0]["signal"], "SIGUSR1");
    println!("SIGUSR1: {}", times(&run_dir, at));
}

fn a_job_whose_node_goes_down_goes_on(bench: &Bench) {
    let run_dir = bench.submitted("node-down", &[]);
    bench.lab.wait_for_lines(&run_dir, 7);
    let at = unix_time();
    bench.lab.slurm("scontrol", &["update", "nodename=n2", "state=down", "reason=test"]);
    bench.ends_like_the_whole(&run_dir);
    assert_eq!(bench.lab.requeues(&run_dir), 1);
    println!("node down: {}", times(&run_dir, at));
}

/// Kills the first rank on a node once it trains.
fn kill_a_rank_on(bench: &Bench, run_dir: &Path, node: &str, generation: u64) {
    bench.lab.wait(run_dir, "rank that trains", || {
        let status = bench.lab.status(run_dir);
        let ranks = status["status"]["ranks"].as_object().cloned().unwrap_or_default();
        let rank = ranks.values().find(|rank| rank["host"] == node && rank["step"].as_u64() > Some(0));
        match rank {
            Some(rank) if status["status"]["generation"] == generation => {
                kill_rank(rank["pid"].as_u64().expect("a process id") as u32);
                true
            }
            _ => false,
        }
    });
}

fn a_killed_task_is_restarted_in_the_same_job(bench: &Bench) {
    let run_dir = bench.submitted("killed", &[]);
    bench.lab.wait_for_lines(&run_dir, 12);
    let (job, _) = bench.lab.job(&run_dir);
    let at = unix_time();
    kill_a_rank_on(bench, &run_dir, "n2", 0);
    bench.ends_like_the_whole(&run_dir);
    assert_eq!((bench.lab.job(&run_dir).0, bench.lab.requeues(&run_dir)), (job, 0));
    let restarts: Vec<Value> =
        metrics(&run_dir).into_iter().filter(|line| line["kind"] == "restart").collect();
    assert_eq!(restarts.len(), 1);
    assert!(restarts[0]["reason"].as_str().is_some_and(|reason| reason.contains("on n2")), "{}", restarts[0]);
    let times = times(&run_dir, at);
    println!("kill -9 of a task: {}", times.split_once(", ").map_or(times.as_str(), |(_, next)| next));
}

fn a_node_that_fails_twice_is_left_out(bench: &Bench) {
    // Long enough that it is still at work when its second rank is killed, however slow the machine.
    let recipe = recipe(&bench.folder, 5 * STEPS);
    let run_dir = bench.run_dir("left-out");
    bench.lab.submit(&recipe, &run_dir, &TWO_BY_TWO).expect(0);
    // Two are enough, unless a failure could not be laid at the node's door: the reasons are printed.
    for generation in 0..3 {
        kill_a_rank_on(bench, &run_dir, "n2", generation);
        bench.lab.wait(&run_dir, "restart", || {
            bench.lab.status(&run_dir)["status"]["generation"].as_u64() > Some(generation)
        });
        if bench.lab.status(&run_dir)["status"]["workers"] == 2 {
            break;
        }
    }
    bench.lab.wait_for_end(&run_dir, "COMPLETED");
    let restarts: Vec<Value> =
        metrics(&run_dir).into_iter().filter(|line| line["kind"] == "restart").collect();
    for restart in &restarts {
        println!("{}", restart["reason"]);
    }
    assert_eq!(bench.lab.status(&run_dir)["status"]["workers"], 2, "{restarts:#?}");
    assert_eq!(bench.lab.requeues(&run_dir), 0);
    let last = metrics(&run_dir).into_iter().rfind(|line| line["kind"] == "train").expect("a step");
    assert_eq!(last["world_size"], 2);
    let (expected, found) = (losses(&bench.whole), losses(&run_dir));
    assert_eq!((expected.len(), found.len()), (STEPS, 5 * STEPS));
    let worst = expected.iter().map(|(step, loss)| (loss - found[step]).abs()).fold(0.0, f64::max);
    println!("on the node that is left: largest difference of losses {worst:e}");
    assert!(worst < 1e-9, "a smaller world computes the same: {worst:e}");
}

fn a_cancelled_job_is_gone_in_time_and_resumable(bench: &Bench) {
    let run_dir = bench.submitted("cancelled", &[]);
    bench.lab.wait_for_lines(&run_dir, 7);
    let (job, _) = bench.lab.job(&run_dir);
    let since = Instant::now();
    let at = unix_time();
    bench.lab.slurm("scancel", &[&job]);
    bench.lab.wait_for_end(&run_dir, "CANCELLED");
    let gone = since.elapsed().as_secs_f64();
    // KillWait is 5 s here.
    assert!(gone < 5.0, "gone after {gone:.1} s");
    let status = bench.lab.status(&run_dir);
    assert_eq!(status["status"]["exit_code"], 75, "{status}");
    assert!(bench.lab.slurm("scontrol", &["show", "job", &job]).contains("ExitCode=75:0"));
    bench.lab.slurm("sbatch", &[run_dir.join("submit.sbatch").to_str().expect("UTF-8")]);
    bench.lab.wait(&run_dir, "second job", || bench.lab.job(&run_dir).0 != job);
    bench.ends_like_the_whole(&run_dir);
    println!("scancel: gone after {gone:.1} s; {}", times(&run_dir, at));
}

/// From within a step of another job, with variables of sbatch's that say otherwise and hand nothing on.
fn a_job_is_its_own_wherever_it_was_submitted(bench: &Bench) {
    let run_dir = bench.run_dir("from a step");
    let mut command = bench.lab.command("srun");
    command.args(["-N1", "-n1"]).arg(binary("mentee")).arg("submit").arg(&bench.recipe);
    command.arg("--run-dir").arg(&run_dir).args(TWO_BY_TWO).args(["--time", "20"]);
    command.envs([("SBATCH_TIMELIMIT", "7"), ("SBATCH_NO_REQUEUE", "1"), ("SBATCH_EXPORT", "NONE")]);
    finish(command).expect(0);
    let (job, _) = bench.lab.job(&run_dir);
    let said = bench.lab.slurm("scontrol", &["show", "job", &job]);
    assert!(said.contains("TimeLimit=00:20:00") && said.contains("Requeue=1"), "{said}");
    bench.ends_like_the_whole(&run_dir);
}

fn devices_follow_slurms_options(bench: &Bench) {
    // Options, and for both ranks of a node: what CUDA_VISIBLE_DEVICES holds and which of these is taken.
    type Expected = [(&'static str, u64); 2];
    let table: [(&[&str], Expected); 4] = [
        (&["--gpus-per-node=2"], [("0,1", 0), ("0,1", 1)]),
        (&["--gpus-per-task=1"], [("0", 0), ("1", 0)]),
        (&["--gpus-per-node=2", "--gpu-bind=single:1"], [("0", 0), ("1", 0)]),
        (&["--gres=gpu:1"], [("0", 0), ("0", 0)]),
    ];
    for (options, expected) in table {
        let mut command = bench.lab.command("srun");
        command.args(["-N2", "-n4", "--ntasks-per-node=2"]).args(options);
        command.arg(binary("mentee")).args(["place", "--json"]);
        let said = finish(command).expect(0).stdout;
        let places: Vec<Value> =
            said.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect();
        assert_eq!(places.len(), 4, "{said}");
        for place in places {
            let local = place["local_rank"].as_u64().expect("a local rank") as usize;
            let (visible, device) = expected[local];
            assert_eq!(place["visible_devices"], visible, "{options:?}: {place}");
            assert_eq!(place["device"], device, "{options:?}: {place}");
            let rank = place["rank"].as_u64().expect("a rank") as usize;
            assert_eq!(place["host"], format!("n{}", 1 + rank / 2));
            assert_eq!((rank % 2, &place["launcher"]), (local, &Value::from("srun")));
        }
    }
}

fn an_array_of_variants(bench: &Bench) {
    let folder = bench.run_dir("array");
    let more = [
        "--nodes",
        "1",
        "--workers-per-node",
        "1",
        "--set",
        "schedule.max_steps=10",
        "--sweep",
        "optimizer.base_lr=0.2,0.4",
        "--sweep",
        "run.seed=1,2",
    ];
    bench.lab.submit(&bench.recipe, &folder, &more).expect(0);
    let runs: Vec<PathBuf> = (0..4).map(|index| folder.join(index.to_string())).collect();
    for run in &runs {
        bench.lab.wait_for_end(run, "COMPLETED");
    }
    let states: std::collections::BTreeSet<String> = runs.iter().map(|run| final_state(run).1).collect();
    assert_eq!(states.len(), 4, "four recipes, four results");
    let mut command = bench.lab.mentee();
    command.arg("status").arg(&folder);
    let table = finish(command).expect(0).stdout;
    println!("{table}");
    assert_eq!(table.lines().filter(|line| line.contains(" done ")).count(), 4, "{table}");
    assert!(table.contains("optimizer.base_lr=0.4 run.seed=2"), "{table}");
    assert_eq!(bench.lab.status(&folder).as_array().map(Vec::len), Some(4));
}

fn what_happens_to_a_task_of_an_array_is_its_own(bench: &Bench) {
    let folder = bench.run_dir("array-of-two");
    let more = ["--nodes", "1", "--workers-per-node", "1", "--sweep", "run.seed=1,2"];
    bench.lab.submit(&recipe(&bench.folder, 8 * STEPS), &folder, &more).expect(0);
    let runs = [folder.join("0"), folder.join("1")];
    for run in &runs {
        bench.lab.wait_for_lines(run, 12);
    }
    // One task's own id is the array's, and Slurm's commands take that for all of them.
    let ids = bench.lab.slurm("squeue", &["--array", "--noheader", "--format=%F %A %K"]);
    let task: usize = ids
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words[0] == words[1])
        .and_then(|words| words[2].parse().ok())
        .unwrap_or_else(|| panic!("no task with the array's id: {ids}"));
    let (own, other) = (&runs[task], &runs[1 - task]);
    let host = bench.lab.status(own)["status"]["ranks"]["0"]["host"].clone();
    kill_a_rank_on(bench, own, host.as_str().expect("a host"), 0);
    bench.lab.wait(own, "restart", || bench.lab.status(own)["status"]["generation"] == 1);
    bench.lab.wait(own, "rank that trains", || {
        bench.lab.status(own)["status"]["ranks"]["0"]["step"].as_u64() > Some(0)
    });
    bench.lab.slurm("scancel", &["--batch", "--signal=USR1", &bench.lab.job(own).0]);
    for run in &runs {
        bench.lab.wait_for_end(run, "COMPLETED");
    }
    let restarts = |run: &Path| metrics(run).iter().filter(|line| line["kind"] == "restart").count();
    assert_eq!((restarts(own), bench.lab.requeues(own)), (1, 1), "{}", bench.lab.told(own));
    assert_eq!((restarts(other), bench.lab.requeues(other)), (0, 0), "{}", bench.lab.told(other));
}

fn what_cannot_be_is_refused_before_it_is_submitted(bench: &Bench) {
    let before = bench.lab.slurm("squeue", &["--noheader", "--format=%i"]);
    let table: [(&[&str], &str); 5] = [
        (&["--nodes", "2"], "--workers-per-node"),
        (&["--nodes", "2", "--workers-per-node", "2", "--time", "3"], "--stop-lead"),
        (&["--nodes", "2", "--workers-per-node", "9"], "schedule.global_batch"),
        (&["--nodes", "1", "--workers-per-node", "1", "--set", "optimizer.base_rl=1"], "base_lr"),
        (&["--nodes", "1", "--workers-per-node", "1", "--partition", "nowhere"], "Invalid partition"),
    ];
    for (options, part) in table {
        let run_dir = bench.run_dir("refused");
        let outcome = bench.lab.submit(&bench.recipe, &run_dir, options);
        assert_ne!(outcome.code, 0);
        assert!(outcome.error_line().contains(part), "{}", outcome.told());
        assert!(!run_dir.join("plan.toml").exists(), "the next try may be of another recipe");
    }
    let mut command = mentee();
    command.arg("run").arg(&bench.recipe).args(["--workers", "2", "--engine", "srun"]);
    assert!(finish(command).expect(2).error_line().contains("mentee submit"));
    assert_eq!(bench.lab.slurm("squeue", &["--noheader", "--format=%i"]), before);
    // A dry run writes nothing, and says what would be done.
    let run_dir = bench.run_dir("dry");
    let dry =
        bench.lab.submit(&bench.recipe, &run_dir, &[&TWO_BY_TWO, &["--dry-run"][..]].concat()).expect(0);
    assert!(dry.stdout.starts_with("#!/bin/bash\n") && !run_dir.exists(), "{}", dry.told());
    // One job a run directory.
    let run_dir = bench.submitted("twice", &["--sbatch", "--hold"]);
    let again = bench.lab.submit(&bench.recipe, &run_dir, &TWO_BY_TWO).expect(2);
    assert!(again.error_line().contains("already works in"), "{}", again.told());
    // Its state is known before it has run.
    let mut command = bench.lab.mentee();
    command.arg("status").arg(&run_dir);
    let status = finish(command).expect(0).stdout;
    assert!(status.contains("queued (JobHeldUser)") && status.contains("has not started yet"), "{status}");
}

fn every_command_of_the_guide_runs(bench: &Bench) {
    let place = guide::place(&bench.run_dir("guide"));
    for command in guide::commands("docs/slurm.md") {
        let mut shell = bench.lab.command("bash");
        shell.args(["-euc", &command]).current_dir(&place);
        finish(shell).expect(0);
        // The job that was just submitted is to have started before the next command asks for it.
        if let Some(run_dir) = command.strip_prefix("mentee status ") {
            bench.lab.wait(&place, "start of the job", || {
                [".", "0"]
                    .iter()
                    .any(|run| place.join(run_dir).join(run).join("logs/launcher.jsonl").exists())
            });
        }
    }
}

fn a_time_limit_is_no_end(bench: &Bench) {
    let folder = temp_dir();
    let recipe = recipe(&bench.folder, SLOW_STEPS);
    let whole = folder.path().join("whole");
    let run_dir = bench.run_dir("limited");
    let options = ["--time", "2", "--stop-lead", "30"];
    bench.lab.submit(&recipe, &run_dir, &[&TWO_BY_TWO[..], &options].concat()).expect(0);
    bench.lab.wait(&run_dir, "return into the queue", || bench.lab.requeues(&run_dir) > 0);
    let record = bench.lab.status(&run_dir)["slurm"]["record"].clone();
    println!("time limit of 2 min, warned 30 s before: {}", record["requeues"][0]);
    // The rest is no matter of time limits: cancelled, and compared up to where it came.
    bench.lab.wait(&run_dir, "second start", || bench.lab.job(&run_dir).1 == "RUNNING");
    let back = record["requeues"][0]["step"].as_u64().expect("a step") as usize;
    bench.lab.wait(&run_dir, "step after the return", || losses(&run_dir).len() > back + 5);
    bench.lab.slurm("scancel", &[&bench.lab.job(&run_dir).0]);
    bench.lab.wait_for_end(&run_dir, "CANCELLED");
    let found = losses(&run_dir);
    println!(
        "from the checkpoint's return: {}",
        times(&run_dir, record["requeues"][0]["time"].as_f64().expect("a time") - 1.0)
    );
    let mut command = mentee();
    command.arg("run").arg(&recipe).args(["--workers", "4", "--run-dir"]).arg(&whole);
    command.args(["--set", &format!("schedule.max_steps={}", back + 5)]);
    finish(command).expect(0);
    let expected = losses(&whole);
    assert!(
        expected.iter().all(|(step, loss)| found.get(step) == Some(loss)),
        "other losses than undisturbed"
    );
}
