//! Faults of memory and of the network: found, named, and never trained on.

use std::path::Path;

use system_tests::process::{Outcome, binary, finish, mpirun};
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
        error.starts_with("step 5: teacher.backbone.conv1.weight on rank 1 is not what the other ranks hold"),
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
    assert!(outcome.error_line().starts_with("step 5: "), "{}", outcome.told());
    assert!(dir.path().join("run/checkpoints/step-00000003").exists());
    assert!(!dir.path().join("run/checkpoints/step-00000006").exists());
}

#[test]
fn a_nan_in_one_ranks_gradient_updates_no_rank() {
    let _machine = machine();
    let dir = temp_dir();
    let outcome = run(dir.path(), 2, "nan:rank=1,step=4", &[]).expect(6);
    let error = outcome.error_line();
    assert!(error.starts_with("step 4: the gradient of student."), "{error}");
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
