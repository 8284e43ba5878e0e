//! Traces against PyTorch: `tests/replay.py` repeats every recorded step from the papers' definitions.

use std::process::Command;

use serde_json::Value;
use system_tests::process::{finish, mentee};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::{machine, root, temp_dir};

/// Records three steps and lets PyTorch repeat them; the largest relative difference of each kind.
fn differences(sets: &[(&str, &str)]) -> serde_json::Map<String, Value> {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let mut recipe = TinyRecipe::new(&dir.path().join("images"));
    for (key, value) in sets {
        recipe = recipe.set(key, value);
    }
    let recipe = recipe.write(dir.path().join("tiny.toml"));
    let trace = dir.path().join("an/empty/folder");
    std::fs::create_dir_all(&trace).expect("a folder");
    let mut command = mentee();
    command.arg("trace").arg(recipe).args(["--steps", "3", "--out"]).arg(&trace);
    finish(command).expect(0);
    let told = std::fs::read_to_string(trace.join("trace.json")).expect("the trace");
    for step in serde_json::from_str::<Value>(&told).expect("an object")["steps"].as_array().expect("steps") {
        assert!(step["loss"].is_f64(), "{step}");
        assert_eq!((&step["lr"], &step["tau"]), (&step["rates"]["lr"], &step["rates"]["tau"]), "{step}");
    }
    let mut python = Command::new(root().join(".venv/bin/python"));
    python.arg(root().join("tests/replay.py")).arg(trace).arg("--json");
    let said = finish(python).expect(0).stdout;
    println!("{sets:?}: {said}");
    serde_json::from_str(&said).expect("one object")
}

fn assert_within(found: &serde_json::Map<String, Value>, bound: f64) {
    assert_eq!(found.len(), 5, "{found:?}");
    for (name, value) in found {
        assert!(value.as_f64().is_some_and(|value| value <= bound), "{name}: {value}, more than {bound:e}");
    }
}

#[test]
fn byol_with_lars_is_pytorchs() {
    let lars =
        [("optimizer.name", "\"lars\""), ("optimizer.base_lr", "2.0"), ("optimizer.weight_decay", "0.001")];
    assert_within(&differences(&lars), 1e-11);
    let single = [lars.as_slice(), &[("parallel.precision", "\"f32\"")]].concat();
    assert_within(&differences(&single), 1e-2);
}

#[test]
fn a_clipped_gradient_is_pytorchs() {
    // A hundredth of the norm that it has.
    assert_within(&differences(&[("optimizer.clip_norm", "0.05")]), 1e-11);
}

#[test]
fn simsiam_with_sgd_is_pytorchs() {
    let sgd = [
        ("method.name", "\"simsiam\""),
        ("method.teacher", "\"shared\""),
        ("method.fixed_predictor_lr", "true"),
        ("method.projector_layers", "3"),
        ("views.preset", "\"simsiam-cifar\""),
        ("optimizer.weight_decay", "0.001"),
    ];
    assert_within(&differences(&sgd), 1e-11);
    let single = [sgd.as_slice(), &[("parallel.precision", "\"f32\"")]].concat();
    assert_within(&differences(&single), 1e-2);
}

#[test]
fn mocov3_with_lars_is_pytorchs() {
    let lars = [
        ("method.name", "\"mocov3\""),
        ("method.temperature", "0.5"),
        ("optimizer.name", "\"lars\""),
        ("optimizer.base_lr", "2.0"),
        ("optimizer.weight_decay", "0.001"),
    ];
    assert_within(&differences(&lars), 1e-11);
}

#[test]
fn resnet18_with_the_imagenet_stem_is_pytorchs() {
    let sets = [
        ("model.backbone", "\"resnet18\""),
        ("model.stem", "\"imagenet\""),
        ("model.zero_init_residual", "true"),
        ("views.size", "33"),
        ("schedule.global_batch", "8"),
    ];
    assert_within(&differences(&sets), 1e-11);
}
