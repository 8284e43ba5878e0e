//! Workers that stand still and workers that are slow: found, named, and the run goes on.

use std::path::{Path, PathBuf};

use serde_json::Value;
use system_tests::process::{Outcome, finish, mentee};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{final_state, losses, metrics};
use system_tests::{machine, temp_dir};

/// A supervised run of two ranks with faults; 14 steps, a checkpoint every 3.
fn run(dir: &Path, name: &str, faults: &str, stall_s: u32, steps: u32) -> (Outcome, PathBuf) {
    write_images(&dir.join("images"));
    let recipe = TinyRecipe::new(&dir.join("images"))
        .set("schedule.epochs", "100")
        .set("schedule.max_steps", &steps.to_string())
        .set("parallel.stall_s", &format!("{stall_s}.0"))
        .set("checkpoint.every_steps", "3");
    let recipe = recipe.write(dir.join(format!("{name}.toml")));
    let run_dir = dir.join(name);
    let mut command = mentee();
    command.arg("run").arg(&recipe).args(["--workers", "2", "--run-dir"]).arg(&run_dir);
    command.env("MENTEE_FAULTS", faults);
    (finish(command).expect(0), run_dir)
}

fn restarts(run_dir: &Path) -> Vec<Value> {
    metrics(run_dir).into_iter().filter(|line| line["kind"] == "restart").collect()
}

#[test]
fn a_rank_that_is_stopped_or_hangs_is_named_killed_and_the_run_goes_on() {
    let _machine = machine();
    let dir = temp_dir();
    let (_, whole) = run(dir.path(), "whole", "", 60, 14);
    assert_eq!(restarts(&whole), [Value::Null; 0]);
    for (name, faults, stall_s, place, expected) in [
        // As by `kill -STOP`: no heartbeat for a quarter of `stall_s`. What it did last it may not have told.
        ("stopped", "stop:rank=1,step=7", 24, " at step ", "stalled: no sign of life for "),
        // It sends heartbeats and does not get on.
        (
            "hanging",
            "hang:rank=1,step=7",
            8,
            " at step 7 (update): ",
            "stalled: it lives, but has not gone on for ",
        ),
    ] {
        let (outcome, run_dir) = run(dir.path(), name, faults, stall_s, 14);
        let told = outcome.told();
        let restarts = restarts(&run_dir);
        assert_eq!(restarts.len(), 1, "{name}: {restarts:?}\n{told}");
        assert_eq!(restarts[0]["rank"], 1, "{restarts:?}");
        let reason = restarts[0]["reason"].as_str().expect("a reason");
        assert!(reason.contains(place) && reason.contains(expected), "{reason}");
        assert_eq!(losses(&run_dir), losses(&whole), "{told}");
        assert_eq!(final_state(&run_dir), final_state(&whole), "{told}");
    }
}

#[test]
fn a_rank_that_others_wait_for_in_vain_over_mpi_is_named() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("schedule.epochs", "100")
        .set("schedule.max_steps", "14")
        .set("parallel.timeout_s", "6.0")
        .write(dir.path().join("late.toml"));
    let run_dir = dir.path().join("late");
    let mut command = mentee();
    command.arg("run").arg(&recipe).args(["--workers", "2", "--run-dir"]).arg(&run_dir);
    // As between machines: MPI keeps the memory of a wait that failed, so that the process has to end.
    command.envs([("MENTEE_FAULTS", "hang:rank=1,step=7"), ("MENTEE_SHARED_MEMORY", "0")]);
    let told = finish(command).expect(0).told();
    let restarts = restarts(&run_dir);
    assert_eq!(restarts.len(), 1, "{restarts:?}\n{told}");
    assert_eq!(restarts[0]["rank"], 1, "{restarts:?}\n{told}");
    // The one that waited got to say so, in the form that says whose failure it follows from.
    let log = std::fs::read_to_string(run_dir.join("logs/rank-00000.jsonl")).expect("a log");
    let error = log.lines().find(|line| line.contains("\"ERROR\"")).expect("an error");
    assert!(error.contains("failed on rank 0 of 2: waited ") && error.contains(" s for rank 1;"), "{error}");
}

#[test]
fn a_rank_that_is_three_times_slower_is_named_within_50_steps() {
    let _machine = machine();
    let dir = temp_dir();
    let (outcome, run_dir) = run(dir.path(), "slow", "slow:rank=1,step=0,times=3", 60, 70);
    let told = outcome.told();
    let said: Vec<&str> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with("rank ") && line.contains("holds up"))
        .collect();
    assert_eq!(said.len(), 1, "once: {told}");
    assert!(said[0].starts_with("rank 1 on "), "{said:?}");
    let (_, step) = said[0].split_once("since about step ").expect("a step");
    let step: u64 = step.split(':').next().expect("a number").parse().expect("a number");
    assert!(step <= 50, "{said:?}");
    let status = std::fs::read_to_string(run_dir.join("status.json")).expect("a status");
    let status: Value = serde_json::from_str(&status).expect("JSON");
    let times = |rank: &str| status["ranks"][rank]["times_slower"].as_f64();
    assert!(times("1").is_some_and(|times| times > 1.5), "{status}");
    assert_eq!(times("0"), None);
}
