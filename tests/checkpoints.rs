//! Checkpoints of several ranks: every one writes its share, any number reads them, and a full disk costs none that is
//! there.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use system_tests::process::{LIMIT, binary, finish, kill_run, mentee, mpirun, start, worker};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{assert_kept, checkpoints, final_state, losses, metrics, snapshot};
use system_tests::{machine, temp_dir};

fn recipe(dir: &Path, steps: u64) -> TinyRecipe {
    write_images(&dir.join("images"));
    TinyRecipe::new(&dir.join("images")).set("schedule.max_steps", &steps.to_string())
}

fn run(recipe: &Path, run_dir: &Path, workers: u32) -> Command {
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(run_dir).args(["--workers", &workers.to_string()]);
    command
}

/// Names in the folder of checkpoints, and in one of them.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

#[test]
fn two_four_one_and_three_workers_over_one_run() {
    let _machine = machine();
    let dir = temp_dir();
    // 4 steps an epoch, a checkpoint every 3: most are in the middle of an epoch. In f64, as rounding differs.
    // At a rate at which it does not grow beyond the tolerance in 14 steps.
    let recipe = recipe(dir.path(), 14).set("optimizer.base_lr", "0.1").write(dir.path().join("tiny.toml"));
    let (whole, changing) = (dir.path().join("whole"), dir.path().join("changing"));
    finish(run(&recipe, &whole, 1)).expect(0);

    for (workers, until) in [(2, 4), (4, 7), (1, 10)] {
        let mut running = start(run(&recipe, &changing, workers));
        let since = Instant::now();
        let saved = until / 3 * 3;
        while losses(&changing).keys().last().is_none_or(|step| *step < until)
            || checkpoints(&changing).last().is_none_or(|(step, _)| *step < saved)
        {
            assert!(!running.has_ended(), "the run ended before step {until}");
            assert!(since.elapsed() < LIMIT, "no step {until} within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        while kill_run(&changing) > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let died = running.finish();
        assert_ne!(died.code, 0, "{}", died.told());
    }
    finish(run(&recipe, &changing, 3)).expect(0);

    let (expected, found) = (losses(&whole), losses(&changing));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (step, loss) in &expected {
        let difference = (loss - found[step]).abs() / loss.abs();
        assert!(difference <= 1e-9, "step {step}: {loss:e} and {:e}", found[step]);
    }
    // Every world wrote at least one of the checkpoints, each rank its file.
    let mut command = mentee();
    command.arg("checkpoints").arg(&changing).args(["--verify", "--json"]);
    let listed: Value = serde_json::from_str(&finish(command).expect(0).stdout).expect("JSON");
    let mut worlds: BTreeMap<u64, u64> = BTreeMap::new();
    for checkpoint in listed.as_array().expect("a list") {
        assert_eq!((&checkpoint["usable"], &checkpoint["verified"]), (&true.into(), &true.into()));
        let (step, world) = (
            checkpoint["step"].as_u64().expect("a step"),
            checkpoint["world_size"].as_u64().expect("a size"),
        );
        worlds.insert(step, world);
        let mut files: Vec<String> =
            (0..world).map(|rank| format!("state-{rank:05}-of-{world:05}.safetensors")).collect();
        if world == 1 {
            files = vec!["state.safetensors".into()];
        }
        files.insert(0, "manifest.json".into());
        assert_eq!(names(&changing.join(format!("checkpoints/step-{step:08}"))), files);
    }
    assert_eq!(worlds.keys().copied().collect::<Vec<_>>(), [3, 6, 9, 12, 14]);
    // How far each world came before it was killed is a matter of time.
    let order: Vec<Option<usize>> =
        worlds.values().map(|world| [2, 4, 1, 3].iter().position(|other| other == world)).collect();
    assert!(order.is_sorted() && order[0] == Some(0) && order[4] == Some(3), "{worlds:?}");
    let trained: BTreeSet<u64> = metrics(&changing)
        .iter()
        .filter(|line| line["kind"] == "train")
        .filter_map(|line| line["world_size"].as_u64())
        .collect();
    assert_eq!(trained, [1, 2, 3, 4].into());
    let folders: Vec<String> = worlds.keys().map(|step| format!("step-{step:08}")).collect();
    assert_eq!(names(&changing.join("checkpoints")), folders, "a crash left something behind");
}

#[test]
fn every_checkpoint_is_reported_when_it_is_complete() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path(), 8).write(dir.path().join("tiny.toml"));
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    finish(run(&recipe, &two, 2)).expect(0);
    finish(run(&recipe, &one, 2)).expect(0);
    let reported: Vec<(u64, String)> = metrics(&two)
        .iter()
        .filter(|line| line["kind"] == "checkpoint")
        .map(|line| {
            assert!(line["copy_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{line}");
            (line["step"].as_u64().expect("a step"), line["digest"].as_str().expect("a digest").to_owned())
        })
        .collect();
    assert_eq!(reported.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 8]);
    assert_eq!(reported[2], final_state(&two));
    // Asynchronous or not: the same run, bit for bit, on the same number of ranks.
    assert_eq!(final_state(&one), final_state(&two));
    assert_eq!(names(&two.join("checkpoints")), ["step-00000003", "step-00000006", "step-00000008"]);
}

/// No file of the command or its children may become larger.
fn limit_file_size(command: &mut Command, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: setrlimit is async-signal-safe and reads a value that the closure owns.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

#[test]
fn without_room_training_goes_on_to_its_end_and_no_checkpoint_is_lost() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path(), 8).write(dir.path().join("tiny.toml"));
    let command = |run_dir: &Path| {
        let mut command = worker();
        command.arg(&recipe).arg("--run-dir").arg(run_dir);
        command
    };
    let (whole, run_dir) = (dir.path().join("whole"), dir.path().join("run"));
    finish(command(&whole)).expect(0);
    let mut first = command(&run_dir);
    first.args(["--set", "schedule.max_steps=4"]);
    finish(first).expect(0);
    let before = snapshot(&run_dir.join("checkpoints"));
    let folders = ["step-00000003", "step-00000004"];
    assert_eq!(names(&run_dir.join("checkpoints")), folders);

    // The state is larger; logs and metrics are smaller.
    let mut limited = command(&run_dir);
    limit_file_size(&mut limited, 100_000);
    let outcome = finish(limited).expect(1);
    let told = outcome.told();
    assert!(told.contains("no checkpoint of step 6: ") && told.contains("training goes on"), "{told}");
    let error = outcome.error_line();
    assert!(error.starts_with("no checkpoint of step 8: cannot write "), "{error}");
    assert!(error.contains("File too large") && error.contains("any older one is intact"), "{error}");
    assert_eq!(losses(&run_dir), losses(&whole), "training did not go on");
    assert_kept(&before, &run_dir.join("checkpoints"));
    assert_eq!(names(&run_dir.join("checkpoints")), folders, "something was left behind");

    finish(command(&run_dir)).expect(0);
    assert_eq!(losses(&run_dir), losses(&whole));
    assert_eq!(final_state(&run_dir), final_state(&whole));

    // A last checkpoint that has rotted since is none: it is made again.
    let shard = run_dir
        .join("checkpoints/step-00000008")
        .read_dir()
        .expect("there")
        .map(|it| it.expect("a file").path());
    let shard = shard
        .into_iter()
        .find(|path| path.extension().is_some_and(|it| it == "safetensors"))
        .expect("a shard");
    let mut bytes = std::fs::read(&shard).expect("read");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&shard, bytes).expect("written");
    finish(command(&run_dir)).expect(0);
    assert_eq!(final_state(&run_dir), final_state(&whole));
}

#[test]
fn one_rank_without_room_costs_all_ranks_that_checkpoint_and_no_other_and_the_last_is_waited_for() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = recipe(dir.path(), 8).write(dir.path().join("tiny.toml"));
    let trained = |name: &str, faults: &str, wait: u32| {
        let run_dir = dir.path().join(name);
        let mut command = mpirun(2);
        command.env("MENTEE_FAULTS", faults);
        command.arg(binary("mentee-worker")).arg(&recipe).arg("--run-dir").arg(&run_dir);
        command.args(["--set", &format!("checkpoint.wait_for_room_s={wait}")]);
        (finish(command), names(&run_dir.join("checkpoints")))
    };
    let (outcome, there) = trained("sometimes", "full:rank=1,step=6", 600);
    let told = outcome.expect(0).told();
    assert!(told.contains("no checkpoint of step 6: rank 1 could not write its share"), "{told}");
    assert_eq!(there, ["step-00000003", "step-00000008"]);
    // Without a supervisor, rank 0 hosts the coordinator and keeps its log.
    let log = std::fs::read_to_string(dir.path().join("sometimes/logs/coordinator.jsonl")).expect("a log");
    assert!(log.contains("mentee::coordinator"), "{log}");

    // The last one waits for room, and is given up in the end.
    let (outcome, there) = trained("at-the-end", "full:rank=1,step=8;full:rank=1,step=8", 600);
    let told = outcome.expect(0).told();
    assert_eq!(told.matches("no checkpoint of step 8 yet: ").count(), 1, "{told}");
    assert_eq!(there, ["step-00000003", "step-00000006", "step-00000008"]);
    let (outcome, there) = trained("given-up", "full:rank=1,step=8", 0);
    let outcome = outcome.expect(1);
    assert!(outcome.error_line().starts_with("no checkpoint of step 8: "), "{}", outcome.told());
    assert_eq!(there, ["step-00000003", "step-00000006"]);
}
