//! Bad input: one line that says what, where and what to do, the exit code of the table, nothing of an earlier run lost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use system_tests::process::{Outcome, binary, finish, mentee, mpirun, worker};
use system_tests::recipe::{NUM_TRAIN, TinyRecipe, image, write_images, write_many_images};
use system_tests::run_dir::{assert_kept, checkpoints, snapshot};
use system_tests::{machine, temp_dir};

/// Bad usage or bad recipe.
const USAGE: i32 = 2;
/// Bad or missing data.
const DATA: i32 = 3;
/// Checkpoint unusable.
const CHECKPOINT: i32 = 4;

fn supervised(recipe: &Path, run_dir: &Path, more: &[&str]) -> Outcome {
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(run_dir).args(more);
    finish(command)
}

fn alone(recipe: &Path, run_dir: &Path, more: &[&str]) -> Outcome {
    let mut command = worker();
    command.arg(recipe).arg("--run-dir").arg(run_dir).args(more);
    finish(command)
}

fn assert_refused(outcome: Outcome, code: i32, words: &[&str]) {
    let outcome = outcome.expect(code);
    let line = outcome.error_line();
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

fn images(dir: &Path) -> PathBuf {
    let path = dir.join("images");
    write_images(&path);
    path
}

#[test]
fn a_bad_recipe() {
    let _machine = machine();
    let dir = temp_dir();
    let data = images(dir.path());
    let cases: [(&str, &str, &[&str]); 8] = [
        ("optimizer.base_ir", "0.1", &["base_ir", "base_lr"]),
        ("shedule.epochs", "1", &["shedule", "schedule"]),
        ("run.seed", "\"seven\"", &["seed"]),
        ("method.tau_base", "2.0", &["tau_base", "2"]),
        ("method.name", "\"bjol\"", &["name", "byol"]),
        ("schedule.global_batch", "0", &["global_batch"]),
        ("schedule.global_batch", "4096", &["global_batch", "64"]),
        ("views.crop_area", "[1.0, 0.2]", &["crop_area"]),
    ];
    for (number, (key, value, words)) in cases.into_iter().enumerate() {
        let recipe = TinyRecipe::new(&data).set(key, value).write(dir.path().join(format!("{number}.toml")));
        let run_dir = dir.path().join(format!("run-{number}"));
        assert_refused(supervised(&recipe, &run_dir, &[]), USAGE, words);
        assert_refused(alone(&recipe, &run_dir, &[]), USAGE, words);
        assert!(checkpoints(&run_dir).is_empty());
    }
    let recipe = TinyRecipe::new(&data).write(dir.path().join("good.toml"));
    let run_dir = dir.path().join("run");
    assert_refused(supervised(&recipe, &run_dir, &["--set", "run.sede=1"]), USAGE, &["sede", "seed"]);
    assert_refused(alone(&recipe, &run_dir, &["--set", "run.seed"]), USAGE, &["run.seed"]);
    assert_refused(supervised(Path::new("byol-cifar99"), &run_dir, &[]), USAGE, &["byol-cifar99"]);
    assert_refused(supervised(&dir.path().join("none.toml"), &run_dir, &[]), USAGE, &["none.toml"]);
    let broken = dir.path().join("broken.toml");
    fs::write(&broken, "[run\nseed = 1\n").expect("a file");
    assert_refused(supervised(&broken, &run_dir, &[]), USAGE, &["broken.toml"]);
}

#[test]
fn a_world_larger_than_the_batch() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = TinyRecipe::new(&images(dir.path()))
        .set("schedule.global_batch", "2")
        .write(dir.path().join("r.toml"));
    assert_refused(
        supervised(&recipe, &dir.path().join("run"), &["--workers", "3"]),
        USAGE,
        &["global_batch", "2", "3"],
    );
}

fn jpeg(path: &Path, index: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
    encoder.encode(&image((index % 4) as u8, index), 32, 32, jpeg_encoder::ColorType::Rgb).expect("a JPEG");
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(path, &bytes).expect("an image");
    bytes
}

#[test]
fn bad_data() {
    let _machine = machine();
    let dir = temp_dir();
    let at = |name: &str| dir.path().join(name);
    let recipe = |data: PathBuf| TinyRecipe::new(&data).write(data.with_extension("toml"));

    let missing = recipe(at("missing"));
    assert_refused(supervised(&missing, &at("run"), &[]), DATA, &["missing"]);
    assert_refused(alone(&missing, &at("run"), &[]), DATA, &["missing"]);

    fs::create_dir(at("empty")).expect("a folder");
    assert_refused(supervised(&recipe(at("empty")), &at("run"), &[]), DATA, &["empty"]);

    fs::create_dir(at("texts")).expect("a folder");
    fs::write(at("texts/readme.txt"), "no image").expect("a file");
    assert_refused(supervised(&recipe(at("texts")), &at("run"), &[]), DATA, &["texts"]);

    // Whole images train; one that breaks off half-way is named.
    for index in 0..32 {
        jpeg(&at(&format!("photos/class-{}/{index:03}.jpg", index % 4)), index);
    }
    let photos = recipe(at("photos"));
    let one_epoch = ["--set", "schedule.max_steps=2"];
    supervised(&photos, &at("good"), &one_epoch).expect(0);
    let torn = at("photos/class-1/005.jpg");
    let bytes = fs::read(&torn).expect("the image");
    fs::write(&torn, &bytes[..bytes.len() / 2]).expect("the image can be torn");
    assert_refused(supervised(&photos, &at("torn"), &one_epoch), DATA, &["005.jpg"]);
    assert_refused(
        supervised(&photos, &at("torn-2"), &["--workers", "2", one_epoch[0], one_epoch[1]]),
        DATA,
        &["005.jpg"],
    );
    fs::write(&torn, "this is no image").expect("the image can be replaced");
    assert_refused(alone(&photos, &at("torn-3"), &one_epoch), DATA, &["005.jpg"]);

    // CIFAR's records have one length only.
    let cifar = images(&at("cifar"));
    let batch = cifar.join("data_batch_1.bin");
    let bytes = fs::read(&batch).expect("the batch");
    fs::write(&batch, &bytes[..bytes.len() - 100]).expect("the batch can be torn");
    assert_refused(supervised(&recipe(cifar), &at("run"), &[]), DATA, &["data_batch_1.bin"]);
}

/// A run that has one checkpoint, at step 3, and more steps to go: as if it had been killed there.
fn unfinished_run(dir: &Path) -> (PathBuf, PathBuf) {
    let recipe = TinyRecipe::new(&images(dir)).write(dir.join("tiny.toml"));
    let run_dir = dir.join("run");
    supervised(&recipe, &run_dir, &[]).expect(0);
    for (_, later) in checkpoints(&run_dir).iter().filter(|(step, _)| *step > 3) {
        fs::remove_dir_all(later).expect("a later checkpoint can be removed");
    }
    assert_eq!(checkpoints(&run_dir).len(), 1);
    (recipe, run_dir)
}

#[test]
fn a_bad_checkpoint() {
    let _machine = machine();
    let dir = temp_dir();
    let (recipe, run_dir) = unfinished_run(dir.path());
    let folder = checkpoints(&run_dir).remove(0).1;
    let state = fs::read_dir(&folder)
        .expect("the checkpoint")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .expect("a file of tensors");
    let whole = fs::read(&state).expect("the tensors");
    let manifest = fs::read(folder.join("manifest.json")).expect("the manifest");

    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let damages: [(&str, &Path, Vec<u8>); 4] = [
        ("truncated", &state, whole[..whole.len() / 2].to_vec()),
        ("one bit altered", &state, flipped),
        ("emptied", &state, Vec::new()),
        ("manifest truncated", &folder.join("manifest.json"), manifest[..manifest.len() / 2].to_vec()),
    ];
    for (name, path, damaged) in damages {
        let original = fs::read(path).expect("the file");
        fs::write(path, damaged).expect("the file can be damaged");
        let before = snapshot(&run_dir);
        println!("{name}");
        assert_refused(supervised(&recipe, &run_dir, &[]), CHECKPOINT, &["step-00000003"]);
        assert_refused(alone(&recipe, &run_dir, &[]), CHECKPOINT, &["step-00000003"]);
        assert_kept(&before, &run_dir);
        let mut verify = mentee();
        verify.arg("checkpoints").arg(&run_dir).arg("--verify");
        finish(verify).expect(CHECKPOINT);
        fs::write(path, original).expect("the file can be restored");
    }
    // Nothing was lost: with its bytes back the run goes on.
    supervised(&recipe, &run_dir, &[]).expect(0);
}

#[test]
fn images_that_a_run_was_not_made_of() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = TinyRecipe::new(&images(dir.path())).write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    supervised(&recipe, &run_dir, &[]).expect(0);
    let other = dir.path().join("other");
    write_many_images(&other, NUM_TRAIN + 1);
    let before = snapshot(&run_dir);
    let set = format!("data.path={}", other.display());
    // Of a run that is finished, and of one that is to go on.
    for more in [&["--set", &set][..], &["--set", &set, "--set", "schedule.max_steps=9"]] {
        assert_refused(
            supervised(&recipe, &run_dir, more),
            DATA,
            &["other", "not those of this run's checkpoint"],
        );
    }
    assert_refused(
        alone(&recipe, &run_dir, &["--set", &set]),
        DATA,
        &["other", "not those of this run's checkpoint"],
    );
    assert_kept(&before, &run_dir);
}

#[test]
fn a_run_directory_of_another_recipe() {
    let _machine = machine();
    let dir = temp_dir();
    let (recipe, run_dir) = unfinished_run(dir.path());
    let before = snapshot(&run_dir);
    for (set, words) in [
        ("run.seed=8", ["seed", "7", "8"]),
        ("schedule.global_batch=32", ["global_batch", "16", "32"]),
        ("optimizer.base_lr=0.4", ["base_lr", "0.8", "0.4"]),
    ] {
        assert_refused(supervised(&recipe, &run_dir, &["--set", set]), USAGE, &words);
        assert_refused(alone(&recipe, &run_dir, &["--set", set]), USAGE, &words);
    }
    // Checkpoints that were copied into a new directory say what they are of.
    let plan = run_dir.join("plan.toml");
    let text = fs::read(&plan).expect("the plan");
    for start in [supervised, alone] {
        fs::remove_file(&plan).expect("the plan can be removed");
        let refused = start(&recipe, &run_dir, &["--set", "run.seed=8"]);
        assert_refused(refused, USAGE, &["step-00000003", "run.seed = 7 there, 8 here"]);
        fs::write(&plan, &text).expect("the plan can be restored");
    }
    assert_kept(&before, &run_dir);
    // What decides no number may change: more steps, another number of ranks.
    supervised(&recipe, &run_dir, &["--workers", "2", "--set", "schedule.max_steps=5"]).expect(0);
}

#[test]
fn ranks_that_read_different_recipes() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = TinyRecipe::new(&images(dir.path())).write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    // As from a file on one node that was not brought up to date. The key decides no number, but when all ranks save.
    let mut command = mpirun(1);
    for (n, set) in ["checkpoint.every_steps=3", "checkpoint.every_steps=2"].iter().enumerate() {
        if n > 0 {
            command.args([":", "-n", "1"]);
        }
        command.arg(binary("mentee-worker")).arg(&recipe).arg("--run-dir").arg(&run_dir).args(["--set", set]);
    }
    assert_refused(finish(command), 2, &["rank 1", "checkpoint.every_steps = 2 there, 3 on rank 0"]);
    assert!(!run_dir.exists(), "refused before anything is written");
}

#[test]
fn a_world_that_disagrees_with_the_environment() {
    let _machine = machine();
    let dir = temp_dir();
    let recipe = TinyRecipe::new(&images(dir.path())).write(dir.path().join("tiny.toml"));
    let run = |mut command: Command, name: &str, environment: &[(&str, &str)]| {
        command.arg(&recipe).arg("--run-dir").arg(dir.path().join(name)).envs(environment.iter().copied());
        finish(command)
    };
    let under_mpirun = || {
        let mut command = mpirun(2);
        command.arg(binary("mentee-worker"));
        command
    };
    let torchrun =
        |rank, size| [("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", size)];
    let open_mpi = [
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    // Two launchers in one environment, which name different worlds.
    let both = run(under_mpirun(), "a", &torchrun("0", "4")).expect(USAGE);
    let lines = both.error_lines();
    // Two ranks that cannot tell who they are: each may say so, once.
    assert!((1..=2).contains(&lines.len()), "{}", both.told());
    for (line, word) in lines.iter().flat_map(|line| ["torchrun", " of 4", " of 2"].map(|word| (line, word)))
    {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
    // The environment promises a world that MPI does not have: not started by mpirun at all.
    assert_refused(run(worker(), "b", &open_mpi), USAGE, &["2", "1"]);
    assert_refused(run(worker(), "c", &torchrun("0", "2")), USAGE, &["2", "1"]);
    // Half an identity, and such as cannot be.
    assert_refused(run(worker(), "d", &[("PMI_RANK", "0")]), USAGE, &["PMI_RANK", "PMI_SIZE"]);
    assert_refused(run(worker(), "e", &torchrun("2", "2")), USAGE, &["torchrun", "rank 2 of 2"]);
    assert_refused(run(worker(), "f", &torchrun("zero", "2")), USAGE, &["RANK", "zero"]);
}

#[test]
fn bad_usage() {
    let unknown = |mut command: Command, arguments: &[&str]| {
        command.args(arguments);
        let outcome = finish(command).expect(USAGE);
        assert_eq!(outcome.stderr.trim_end().lines().count(), 1, "one line: {}", outcome.stderr);
    };
    unknown(mentee(), &["trian"]);
    unknown(mentee(), &["run"]);
    unknown(mentee(), &["run", "demo", "--workers", "0"]);
    unknown(mentee(), &["run", "demo", "--wrkers", "2"]);
    unknown(worker(), &["--no-such-flag"]);
}
