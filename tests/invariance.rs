//! The promise: the loss curve is a function of the recipe, not of the number of ranks.
//!
//! In f64, because the order of sums differs between worlds and f32's rounding grows by a factor of several every step.

use std::collections::BTreeMap;
use std::path::Path;

use system_tests::process::{binary, finish, mentee, mpirun};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{final_state, losses, metrics};
use system_tests::{machine, root, temp_dir};

const STEPS: u64 = 8;
/// Largest relative difference of a loss: rounding starts at 1e-16 and grows over eight steps.
const ROUNDING: f64 = 1e-9;

fn train(recipe: &Path, run_dir: &Path, workers: u32) -> BTreeMap<u64, f64> {
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(run_dir).args(["--workers", &workers.to_string()]);
    finish(command).expect(0);
    let world = |line: &serde_json::Value| line["world_size"].as_u64();
    let trained = metrics(run_dir);
    let trained: Vec<_> = trained.iter().filter(|line| line["kind"] == "train").collect();
    assert!(trained.iter().all(|line| world(line) == Some(u64::from(workers))), "another world: {trained:?}");
    losses(run_dir)
}

fn assert_same_curve(one: &BTreeMap<u64, f64>, other: &BTreeMap<u64, f64>, name: &str) {
    assert_eq!(one.len() as u64, STEPS, "{one:?}");
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>(), "{name}");
    for (step, loss) in one {
        let difference = (loss - other[step]).abs() / loss.abs();
        assert!(
            difference <= ROUNDING,
            "{name}: step {step}: {loss:e} and {:e}\n{one:?}\n{other:?}",
            other[step]
        );
    }
}

#[test]
fn byol_on_one_two_and_three_ranks_and_under_bare_mpirun() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images")).write(dir.path().join("tiny.toml"));

    let one = train(&recipe, &dir.path().join("one"), 1);
    assert!(one.values().all(|loss| loss.is_finite() && *loss > 0.0), "{one:?}");
    let spread =
        one.values().fold(0.0f64, |most, loss| most.max((loss - one.values().next().unwrap_or(loss)).abs()));
    assert!(spread > 1e-3, "nothing is learned, so nothing is compared: {one:?}");

    let two = train(&recipe, &dir.path().join("two"), 2);
    assert_same_curve(&one, &two, "two ranks");
    // 16 samples over 3 ranks: shares of 5, 5 and 6.
    let three = train(&recipe, &dir.path().join("three"), 3);
    assert_same_curve(&one, &three, "three ranks");

    let bare = dir.path().join("bare");
    let mut command = mpirun(2);
    command.arg(binary("mentee-worker")).arg(&recipe).arg("--run-dir").arg(&bare);
    finish(command).expect(0);
    // The same world: not one bit may differ, whoever started it.
    assert_eq!(losses(&bare), two);
    assert_eq!(final_state(&bare), final_state(&dir.path().join("two")));
}

/// The words of `method.name`: each has its defaults in a file.
fn methods() -> Vec<String> {
    let files = std::fs::read_dir(root().join("configs/defaults")).expect("the defaults").flatten();
    let names = files.filter_map(|file| Some(file.path().file_stem()?.to_str()?.to_owned()));
    let mut methods: Vec<String> = names
        .filter(|name| !["base", "before"].contains(&name.as_str()) && !name.starts_with("views-"))
        .collect();
    methods.sort();
    methods
}

#[test]
fn every_method_with_lars_on_one_and_two_ranks() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let methods = methods();
    assert!(methods.len() >= 3, "{methods:?}");
    for method in methods {
        let recipe = TinyRecipe::new(&dir.path().join("images"))
            .set("method.name", &format!("{method:?}"))
            .set("optimizer.name", "\"lars\"")
            .write(dir.path().join(format!("{method}.toml")));
        let run = |workers: u32| train(&recipe, &dir.path().join(format!("{method}-{workers}")), workers);
        assert_same_curve(&run(1), &run(2), &format!("{method} on two ranks"));
    }
}

#[test]
fn mocov3_whose_keys_come_from_all_ranks_on_one_two_and_three() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("method.name", "\"mocov3\"")
        .set("method.temperature", "0.2")
        .set("eval.online_probe", "true")
        .write(dir.path().join("tiny.toml"));
    let run = |workers| {
        let run_dir = dir.path().join(format!("run-{workers}"));
        let losses = train(&recipe, &run_dir, workers);
        let online = |line: &serde_json::Value| line["online_top1"].as_f64();
        (losses, metrics(&run_dir).iter().filter_map(online).collect::<Vec<_>>())
    };
    let (one, online) = run(1);
    assert_eq!(online.len() as u64, STEPS);
    assert!(online.iter().all(|top1| (0.0..=100.0).contains(top1)), "{online:?}");
    for workers in [2, 3] {
        let (curve, same_online) = run(workers);
        assert_same_curve(&one, &curve, &format!("{workers} ranks"));
        assert_eq!(online, same_online, "{workers} ranks");
    }
}

#[test]
fn micro_batches_are_one_update() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let curve = |statistics: &str, parts: u64, workers: u32| {
        let name = format!("{statistics}-{parts}-{workers}");
        let recipe = TinyRecipe::new(&dir.path().join("images"))
            .set("parallel.norm_statistics", &format!("{statistics:?}"))
            .set("parallel.micro_batches", &parts.to_string())
            .write(dir.path().join(format!("{name}.toml")));
        train(&recipe, &dir.path().join(name), workers)
    };
    // Where batch norm does not look at the batch, the parts of a batch are the batch.
    let whole = curve("running", 1, 1);
    for (parts, workers) in [(2, 1), (4, 1), (4, 2)] {
        let name = format!("{parts} parts on {workers} ranks");
        assert_same_curve(&whole, &curve("running", parts, workers), &name);
    }
    // Where it does, it sees one part at a time: another curve, but the same one on any number of ranks.
    let parts = curve("batch", 2, 1);
    assert_ne!(parts, curve("batch", 1, 1));
    assert_same_curve(&parts, &curve("batch", 2, 2), "two parts on two ranks");
    assert_same_curve(&parts, &curve("batch", 2, 3), "two parts on three ranks");
}

#[test]
fn the_size_of_buckets_changes_nothing() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let run = |mib: &str| {
        let run_dir = dir.path().join(format!("run-{mib}"));
        let recipe = TinyRecipe::new(&dir.path().join("images"))
            .set("parallel.bucket_mib", mib)
            .set("parallel.check_collectives", "true")
            .write(dir.path().join(format!("{mib}.toml")));
        (train(&recipe, &run_dir, 2), final_state(&run_dir))
    };
    assert_eq!(run("0.01"), run("100.0"));
}

#[test]
fn messages_and_shared_memory_give_the_same_bits() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images")).write(dir.path().join("tiny.toml"));
    let run = |shared: &str| {
        let run_dir = dir.path().join(format!("shared-{shared}"));
        let mut command = mentee();
        command.env("MENTEE_SHARED_MEMORY", shared);
        command.arg("run").arg(&recipe).arg("--run-dir").arg(&run_dir).args(["--workers", "3"]);
        finish(command).expect(0);
        let logs = std::fs::read_to_string(run_dir.join("logs/rank-00001.jsonl")).unwrap();
        let expected = if shared == "0" { "\"exchange\":\"MPI (" } else { "\"exchange\":\"shared memory\"" };
        assert!(logs.contains(expected), "{logs}");
        (losses(&run_dir), final_state(&run_dir))
    };
    assert_eq!(run("0"), run("1"));
}

#[test]
fn norms_of_each_rank_by_itself_still_make_one_run() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = |check: &str| {
        TinyRecipe::new(&dir.path().join("images"))
            .set("parallel.sync_batch_norm", "false")
            .set("parallel.check_every_steps", check)
            .write(dir.path().join(format!("every-{check}.toml")))
    };
    // The ranks' weights and running statistics are compared after every step, and in the last checkpoint alone.
    let often = train(&recipe("1"), &dir.path().join("often"), 2);
    let once = train(&recipe("0"), &dir.path().join("once"), 2);
    assert_eq!(often, once);
    let alone = train(&recipe("0"), &dir.path().join("alone"), 1);
    assert_ne!(alone, once, "each rank's own norms are not those of the batch");
}

#[test]
fn the_order_of_samples_and_every_byte_of_a_view_do_not_depend_on_the_world() {
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images")).write(dir.path().join("tiny.toml"));
    let digest = |more: &[&str]| {
        let mut command = mentee();
        command.args(["data", "order"]).arg(&recipe).arg("--hash").args(more);
        finish(command).expect(0).stdout.trim().to_owned()
    };
    let one = digest(&["--world", "1"]);
    assert!(!one.is_empty());
    assert_eq!(digest(&["--world", "2"]), one);
    assert_eq!(digest(&["--world", "5"]), one);
    assert_ne!(digest(&["--world", "1", "--epochs", "2"]), one, "the digest covers nothing");
}
