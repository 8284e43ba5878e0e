//! A run that was killed and started again equals one that was not, to the last bit.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use system_tests::process::{binary, finish, kill_run, mentee, mpirun, start, worker};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{
    assert_kept, checkpoints, final_state, losses, metrics, snapshot, wait_for_lines,
};
use system_tests::{machine, temp_dir};

const STEPS: usize = 14;

fn recipe(dir: &Path) -> std::path::PathBuf {
    write_images(&dir.join("images"));
    TinyRecipe::new(&dir.join("images"))
        .set("schedule.max_steps", &STEPS.to_string())
        // f32 as users run it: bits must survive whatever the precision.
        .set("parallel.precision", "\"f32\"")
        .write(dir.join("tiny.toml"))
}

fn with_run_dir(mut command: Command, recipe: &Path, run_dir: &Path) -> Command {
    command.arg(recipe).arg("--run-dir").arg(run_dir);
    command
}

fn supervised(workers: &str) -> Command {
    let mut command = mentee();
    command.args(["run", "--workers", workers]);
    command
}

/// A step to be killed after, not the same every time; printed, so that a failure can be repeated.
fn random_step() -> usize {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let step = 1 + now as usize % (STEPS - 2);
    println!("killed after step {step}");
    step
}

/// Kills every process of the run once it has logged so many steps, starts it again, and compares with `whole`.
fn killed_after(steps: usize, command: impl Fn() -> Command, recipe: &Path, run_dir: &Path, whole: &Path) {
    let mut running = start(with_run_dir(command(), recipe, run_dir));
    wait_for_lines(run_dir, steps, &mut running);
    assert!(kill_run(run_dir) >= 1, "no process of the run was found to kill");
    let died = running.finish();
    assert_ne!(died.code, 0, "the run finished before it was killed after {steps} steps:\n{}", died.told());
    while kill_run(run_dir) > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }

    let said = finish(with_run_dir(command(), recipe, run_dir)).expect(0);
    assert_eq!(losses(run_dir), losses(whole), "killed after {steps} steps; resumed:\n{}", said.told());
    assert_eq!(final_state(run_dir), final_state(whole), "killed after {steps} steps");
}

#[test]
fn one_rank_killed_at_any_step() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let whole = dir.path().join("whole");
    finish(with_run_dir(worker(), &recipe, &whole)).expect(0);
    assert_eq!(losses(&whole).len(), STEPS);
    assert_eq!(final_state(&whole).0, STEPS as u64, "the end of a run writes a checkpoint");
    // Before the first checkpoint (3), in the middle of an epoch of 4, and anywhere.
    for (name, steps) in [("early", 1), ("middle", 6), ("anywhere", random_step())] {
        killed_after(steps, worker, &recipe, &dir.path().join(name), &whole);
    }
}

#[test]
fn two_supervised_ranks_killed_with_their_supervisor() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let whole = dir.path().join("whole");
    finish(with_run_dir(supervised("2"), &recipe, &whole)).expect(0);
    killed_after(random_step(), || supervised("2"), &recipe, &dir.path().join("killed"), &whole);
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let run_dir = dir.path().join("run");
    finish(with_run_dir(supervised("1"), &recipe, &run_dir)).expect(0);
    let before = (snapshot(&run_dir), losses(&run_dir), final_state(&run_dir));
    finish(with_run_dir(supervised("1"), &recipe, &run_dir)).expect(0);
    assert_kept(&before.0, &run_dir);
    assert_eq!((losses(&run_dir), final_state(&run_dir)), (before.1, before.2));
}

#[test]
fn a_signal_while_a_run_is_set_up_loses_nothing() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let (whole, run_dir) = (dir.path().join("whole"), dir.path().join("run"));
    finish(with_run_dir(worker(), &recipe, &whole)).expect(0);
    // At the first start and at one that goes on from a checkpoint.
    let log = run_dir.join("logs/rank-00000.jsonl");
    for _ in 0..2 {
        let _ = std::fs::remove_file(&log);
        let mut running = start(with_run_dir(worker(), &recipe, &run_dir));
        while !log.exists() {
            assert!(!running.has_ended(), "{}", running.finish().told());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        running.signal(libc::SIGTERM);
        running.finish().expect(75);
        finish({
            let mut command = with_run_dir(worker(), &recipe, &run_dir);
            command.args(["--set", "schedule.max_steps=5"]);
            command
        })
        .expect(0);
    }
    finish(with_run_dir(worker(), &recipe, &run_dir)).expect(0);
    assert_eq!(losses(&run_dir), losses(&whole));
    assert_eq!(final_state(&run_dir), final_state(&whole));
}

#[test]
fn a_run_directory_is_one_runs_at_a_time() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let run_dir = dir.path().join("run");
    let bare_ranks = || {
        let mut command = mpirun(2);
        command.arg(binary("mentee-worker"));
        command
    };
    let mut first = start({
        let mut command = with_run_dir(worker(), &recipe, &run_dir);
        command.args(["--set", "schedule.max_steps=10000", "--set", "schedule.epochs=10000"]);
        command
    });
    let long = ["--set", "schedule.epochs=10000"];
    wait_for_lines(&run_dir, 2, &mut first);
    for mut command in [worker(), bare_ranks(), supervised("1")].map(|c| with_run_dir(c, &recipe, &run_dir)) {
        command.args(long);
        let refused = finish(command).expect(2);
        let holder = format!("{} is in use by process {} on ", run_dir.display(), first.pid());
        assert!(refused.error_line().contains(&holder), "{}", refused.told());
    }
    first.signal(libc::SIGTERM);
    first.finish().expect(75);
    let steps: Vec<u64> = metrics(&run_dir)
        .iter()
        .filter(|line| line["kind"] == "train")
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "one run's lines");
}

#[test]
fn a_longer_run_continues_a_shorter_one() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    finish(with_run_dir(worker(), &recipe, &whole)).expect(0);
    // max_steps is where a run stops, not what it computes: the same run, in two parts.
    let mut first = with_run_dir(worker(), &recipe, &parts);
    first.args(["--set", "schedule.max_steps=5"]);
    finish(first).expect(0);
    assert_eq!(final_state(&parts).0, 5);
    let plan = || std::fs::read_to_string(parts.join("plan.toml")).expect("a plan");
    assert!(plan().contains("max_steps = 5"), "{}", plan());
    finish(with_run_dir(worker(), &recipe, &parts)).expect(0);
    assert_eq!(losses(&parts), losses(&whole));
    assert_eq!(final_state(&parts), final_state(&whole));
    assert!(plan().contains(&format!("max_steps = {STEPS}")), "what really ran: {}", plan());
}

#[test]
fn a_torn_newest_checkpoint_costs_only_its_steps() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
    finish(with_run_dir(worker(), &recipe, &whole)).expect(0);
    let mut first = with_run_dir(worker(), &recipe, &torn);
    first.args(["--set", "schedule.max_steps=7"]);
    finish(first).expect(0);
    let saved = checkpoints(&torn);
    assert_eq!(saved.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 7]);
    let newest = saved[2].1.join("state.safetensors");
    let bytes = std::fs::read(&newest).expect("the newest checkpoint");
    std::fs::write(&newest, &bytes[..bytes.len() / 2]).expect("the newest checkpoint can be torn");

    let said = finish(with_run_dir(worker(), &recipe, &torn)).expect(0);
    let told = format!("{}{}", said.stdout, said.stderr);
    assert!(told.contains("step-00000007"), "nothing was said of the torn checkpoint:\n{}", said.told());
    assert_eq!(losses(&torn), losses(&whole));
    assert_eq!(final_state(&torn), final_state(&whole));
}

#[test]
fn what_is_counted_over_steps_comes_to_the_same() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path());
    let (whole, run_dir) = (dir.path().join("whole"), dir.path().join("run"));
    let command = || {
        let mut command = worker();
        command.args(["--set", "eval.online_probe=true", "--set", "run.log_every_steps=4"]);
        command
    };
    let accuracies = |run_dir: &Path| {
        let lines = metrics(run_dir).into_iter().filter(|line| line["kind"] == "train");
        let all: BTreeMap<u64, f64> = lines
            .map(|line| {
                (line["step"].as_u64().expect("a step"), line["online_top1"].as_f64().expect("a number"))
            })
            .collect();
        all
    };
    finish(with_run_dir(command(), &recipe, &whole)).expect(0);
    // There are checkpoints of steps 3, 6, …: between two lines.
    killed_after(1, command, &recipe, &run_dir, &whole);
    assert_eq!(accuracies(&run_dir).keys().copied().collect::<Vec<_>>(), [4, 8, 12, 14]);
    assert_eq!(accuracies(&run_dir), accuracies(&whole));

    // Twelve steps on end are too many, whichever start they are in; and a run that has ended so ends so again.
    let collapsing = |run_dir: &Path, until: usize, code: i32| {
        let mut command = with_run_dir(worker(), &recipe, run_dir);
        let sets = [
            "run.collapse_z_std=10",
            "run.collapse_steps=12",
            "run.on_collapse=\"stop\"",
            "run.log_every_steps=1",
        ];
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        command.args(["--set", &format!("schedule.max_steps={until}")]);
        finish(command).expect(code).stderr
    };
    let (whole, parts) = (dir.path().join("collapses"), dir.path().join("collapses-in-parts"));
    let said = collapsing(&whole, STEPS, 6);
    assert!(said.contains("error: step 12: z_std is "), "{said}");
    assert_eq!(collapsing(&whole, STEPS, 6), said);
    collapsing(&parts, 5, 0);
    assert_eq!(collapsing(&parts, STEPS, 6), said);
}
