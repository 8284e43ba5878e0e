//! What frozen features are worth: `mentee eval` in all its forms, labels that are missing or numbered otherwise, the probe
//! that learns beside a run, and a backbone that comes back in.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use system_tests::process::{finish, mentee};
use system_tests::recipe::{TinyRecipe, image, write_images};
use system_tests::run_dir::{final_state, losses, metrics};
use system_tests::{machine, root, temp_dir};

/// Trains the tiny recipe in f32.
fn trained(dir: &Path, run: &str, sets: &[(&str, &str)]) -> PathBuf {
    write_images(&dir.join("images"));
    let mut recipe = TinyRecipe::new(&dir.join("images")).set("parallel.precision", "\"f32\"");
    for (key, value) in sets {
        recipe = recipe.set(key, value);
    }
    let run_dir = dir.join(run);
    let mut command = mentee();
    command.arg("run").arg(recipe.write(dir.join(format!("{run}.toml")))).arg("--run-dir").arg(&run_dir);
    finish(command).expect(0);
    run_dir
}

/// The largest difference of a feature relative to the largest feature.
const SAME_FEATURES: &str = "
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import replay, torch
replay.KINDS['I64'] = torch.int64
a, b = (replay.read(Path(name))['queries.features'] for name in sys.argv[2:])
assert a.abs().max() > 0
print(((a - b).abs().max() / a.abs().max()).item())
";

fn eval(run: &Path, more: &[&str]) -> Value {
    let mut command = mentee();
    command.arg("eval").arg(run).arg("--json").args(more);
    serde_json::from_str(&finish(command).expect(0).stdout).expect("one object")
}

fn percent(line: &Value, key: &str) -> f64 {
    let value = line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"));
    assert!((0.0..=100.0).contains(&value), "{key}: {line}");
    value
}

#[test]
fn linear_probes_say_their_protocol_and_floors_and_repeat_themselves() {
    let _machine = machine();
    let dir = temp_dir();
    let run = trained(dir.path(), "run", &[("schedule.max_steps", "4")]);
    let logistic = eval(&run, &["--linear"]);
    // Twenty-five of a hundred is chance; four classes of discs are told apart by any linear classifier.
    assert!(percent(&logistic, "linear_top1") > 30.0, "{logistic}");
    percent(&logistic, "linear_random_init");
    percent(&logistic, "linear_raw_pixels");
    assert!(logistic.get("knn_top1").is_none(), "not asked for: {logistic}");
    let protocol = |line: &Value| line["protocol"].as_str().expect("a protocol").to_owned();
    assert!(protocol(&logistic).contains("L-BFGS"), "{logistic}");

    let official = |more: &[&str]| eval(&run, &[&["--linear", "--linear-epochs", "3"], more].concat());
    let byol = official(&["--linear-protocol", "byol"]);
    assert!(protocol(&byol).contains("Nesterov momentum 0.9, lr 0.05, cosine, 3 epochs, batch 64"), "{byol}");
    let simsiam = official(&["--linear-protocol", "simsiam"]);
    assert!(protocol(&simsiam).contains("LARC, momentum 0.9, lr 0.025, cosine, 3 epochs"), "{simsiam}");
    let augmented = official(&["--linear-augment"]);
    assert!(
        protocol(&augmented).contains("BYOL's protocol") && protocol(&augmented).contains("random crops")
    );
    let without_time = |mut line: Value| {
        line.as_object_mut().expect("an object").remove("time");
        line
    };
    assert_eq!(without_time(official(&["--linear-augment"])), without_time(augmented));

    let mut command = mentee();
    command.arg("eval").arg(&run).args(["--linear", "--linear-protocol", "logistic", "--linear-augment"]);
    assert!(finish(command).expect(2).error_line().contains("knows no epochs"));
}

#[test]
fn an_evaluation_that_a_run_was_stopped_before_comes_when_it_goes_on() {
    let _machine = machine();
    let dir = temp_dir();
    let sets = [("schedule.max_steps", "8"), ("eval.knn_every_epochs", "1")];
    let run = trained(dir.path(), "run", &sets);
    let kinds = |lines: &[Value]| -> Vec<String> {
        lines
            .iter()
            .map(|line| format!("{} {}", line["kind"].as_str().unwrap_or_default(), line["step"]))
            .collect()
    };
    let lines = metrics(&run);
    let place = |what: &str| {
        kinds(&lines).iter().position(|line| line == what).unwrap_or_else(|| panic!("no {what}"))
    };
    // Who is stopped in the evaluation has the checkpoint already.
    assert!(place("checkpoint 8") < place("eval 8"), "{:?}", kinds(&lines));

    // As if it had been killed there, one supervisor and all.
    let text: Vec<String> = lines[..place("eval 8")].iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(run.join("metrics.jsonl"), text.concat()).expect("the metrics can be cut");
    std::fs::remove_file(run.join("status.json")).expect("there was a status");
    let digest = final_state(&run);
    let again = || {
        let mut command = mentee();
        command
            .arg("run")
            .arg(dir.path().join("run.toml"))
            .arg("--run-dir")
            .arg(&run)
            .args(["--workers", "2"]);
        finish(command).expect(0)
    };
    again();
    let resumed = metrics(&run);
    assert_eq!(kinds(&resumed), kinds(&lines), "the evaluation is all that was missing");
    assert_eq!(resumed.last().map(|line| &line["knn_top1"]), lines.last().map(|line| &line["knn_top1"]));
    assert_eq!(final_state(&run), digest);
    assert!(again().stdout.contains("nothing to do"));
    assert_eq!(metrics(&run), resumed);
}

#[test]
fn a_grid_of_knn_has_every_setting_and_a_record_reaches_the_report() {
    let _machine = machine();
    let dir = temp_dir();
    let run = trained(dir.path(), "run", &[("schedule.max_steps", "2"), ("eval.knn_every_epochs", "1")]);
    let single = eval(&run, &["--k", "3", "--temperature", "0.1"]);
    let grid = eval(&run, &["--k", "20,3", "--temperature", "0.07,0.1", "--linear", "--record"]);
    let points = grid["knn_grid"].as_array().expect("a grid");
    assert_eq!(points.len(), 4);
    assert_eq!((&points[3]["k"], &points[3]["temperature"]), (&3.into(), &0.1.into()));
    for key in ["knn_top1", "knn_random_init", "knn_raw_pixels"] {
        assert_eq!(points[3][key], single[key], "{key}");
        assert_eq!(points[0][key], grid[key], "the first setting is the line's own: {key}");
    }
    let spectrum: Vec<f64> =
        grid["spectrum"].as_array().expect("a spectrum").iter().flat_map(Value::as_f64).collect();
    assert_eq!((spectrum.len(), spectrum[0]), (64, 1.0));
    assert!(spectrum.is_sorted_by(|a, b| a >= b) && spectrum[63] >= 0.0, "{spectrum:?}");
    let rank = grid["effective_rank"].as_f64().expect("a rank");
    assert!((1.0..64.0).contains(&rank), "{rank}");

    let lines = metrics(&run);
    let of_training = lines.iter().find(|line| line["kind"] == "eval").expect("the run's own evaluation");
    assert_eq!(of_training["spectrum"].as_array().map(Vec::len), Some(64));
    assert_eq!(lines.last().expect("lines"), &grid, "what was recorded is what was printed");
    let out = dir.path().join("x.safetensors");
    let mut command = mentee();
    command.arg("export").arg(&run).arg("--out").arg(&out);
    finish(command).expect(0);
    let card = std::fs::read_to_string(out.with_extension("md")).expect("a card");
    assert!(card.contains("| linear top-1 |"), "{card}");
}

fn jpeg(path: &Path, class: u8, index: usize) {
    let mut bytes = Vec::new();
    let encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
    encoder.encode(&image(class, index), 32, 32, jpeg_encoder::ColorType::Rgb).expect("a JPEG");
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    std::fs::write(path, &bytes).expect("an image");
}

/// A run of one epoch on two ranks that is to evaluate once: what it said, and its directory.
fn evaluating(images: &Path, run: &str) -> (String, PathBuf) {
    let dir = images.parent().expect("a parent");
    let recipe = TinyRecipe::new(images)
        .set("parallel.precision", "\"f32\"")
        .set("schedule.max_steps", "1")
        .set("eval.knn_every_epochs", "1")
        .set("eval.knn_k", "1")
        .write(dir.join(format!("{run}.toml")));
    let run_dir = dir.join(run);
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(&run_dir).args(["--workers", "2"]);
    (finish(command).expect(0).stdout, run_dir)
}

/// The run said so, evaluated nothing, and the command refuses with the same words.
fn assert_not_evaluated(told: &str, run: &Path, words: &str) {
    let warned = told.lines().find(|line| line.contains("no kNN evaluation during this run"));
    assert!(warned.is_some_and(|line| line.contains(words)), "{words:?}: {told}");
    assert!(metrics(run).iter().all(|line| line["kind"] != "eval"));
    let mut command = mentee();
    command.arg("eval").arg(run);
    let outcome = finish(command).expect(3);
    assert!(outcome.error_line().contains(words), "{}", outcome.told());
}

#[test]
fn where_a_label_is_missing_a_run_goes_on_without_evaluation() {
    let _machine = machine();
    let dir = temp_dir();
    let images = dir.path().join("images");
    for index in 0..16 {
        jpeg(&images.join(format!("train/class-{}/{index:03}.jpg", index % 2)), (index % 2) as u8, index);
    }
    for index in 16..20 {
        jpeg(&images.join(format!("test/{index:03}.jpg")), 0, index);
    }
    let (told, run) = evaluating(&images, "run");
    assert_not_evaluated(&told, &run, "016.jpg has no label: evaluation needs labelled images");
}

#[test]
fn classes_of_held_out_images_are_those_of_the_same_name() {
    let _machine = machine();
    let dir = temp_dir();
    let images = dir.path().join("images");
    // Every image to classify is also in the bank: its nearest neighbour is itself.
    for index in 0..18 {
        let class = ["a", "b", "c"][index % 3];
        jpeg(&images.join(format!("train/{class}/{index:03}.jpg")), (index % 3) as u8, index);
        if class != "b" {
            jpeg(&images.join(format!("test/{class}/{index:03}.jpg")), (index % 3) as u8, index);
        }
    }
    let (_, run) = evaluating(&images, "run");
    let lines = metrics(&run);
    let line = lines.iter().find(|line| line["kind"] == "eval").expect("an evaluation");
    assert_eq!(percent(line, "knn_raw_pixels"), 100.0, "{line}");
    assert_eq!(percent(&eval(&run, &["--knn"]), "knn_raw_pixels"), 100.0);

    jpeg(&images.join("test/d/018.jpg"), 3, 18);
    let (told, run) = evaluating(&images, "unknown");
    assert_not_evaluated(&told, &run, "018.jpg is of class `d`, which the training images do not have");
}

#[test]
fn an_online_probe_changes_nothing_and_is_carried_on() {
    let _machine = machine();
    let dir = temp_dir();
    let online = |run: &Path| -> Vec<Option<f64>> {
        metrics(run)
            .iter()
            .filter(|line| line["kind"] == "train")
            .map(|line| line["online_top1"].as_f64())
            .collect()
    };
    let sets = |more: &[(&'static str, &'static str)]| -> Vec<(&'static str, &'static str)> {
        [[("schedule.max_steps", "8"), ("checkpoint.every_steps", "3")].as_slice(), more].concat()
    };
    let without = trained(dir.path(), "without", &sets(&[]));
    let probe = [("eval.online_probe", "true")];
    let with = trained(dir.path(), "with", &sets(&probe));
    assert_eq!(losses(&with), losses(&without));
    assert!(online(&without).iter().all(Option::is_none));
    let whole = online(&with);
    assert!(whole.len() == 8 && whole.iter().all(Option::is_some), "{whole:?}");
    // All but the probe is the same to the last bit.
    let tensors = |run: &Path, name: &str| {
        let state = run.join(format!("checkpoints/step-00000008/{name}"));
        std::fs::read(&state).unwrap_or_else(|error| panic!("{}: {error}", state.display()))
    };
    let compare = format!(
        "import sys; sys.path.insert(0, {:?}); import replay, torch\n\
         from pathlib import Path\n\
         a, b = (replay.read(Path(p)) for p in sys.argv[1:3])\n\
         probe = sorted(n for n in b if n.startswith('probe.'))\n\
         assert all(torch.equal(a[n], b[n]) for n in a) and sorted(a) + probe == sorted(a) + sorted(b.keys() - a.keys())\n\
         assert all(b[n].abs().max() > 0 for n in probe)\n\
         print(len(probe))",
        root().join("tests")
    );
    let mut python = Command::new(root().join(".venv/bin/python"));
    python.args(["-c", &compare]);
    for run in [&without, &with] {
        python.arg(run.join("checkpoints/step-00000008/state.safetensors"));
    }
    assert_eq!(finish(python).expect(0).stdout.trim(), "4");
    assert_ne!(tensors(&with, "state.safetensors"), tensors(&without, "state.safetensors"));

    // In two parts: the same accuracies and the same probe.
    let first = [[("schedule.max_steps", "4"), ("checkpoint.every_steps", "3")].as_slice(), &probe].concat();
    trained(dir.path(), "parts", &first);
    let parts = trained(dir.path(), "parts", &sets(&probe));
    assert_eq!(online(&parts), whole);
    assert_eq!(final_state(&parts), final_state(&with));
    eval(&parts, &["--knn"]);
}

#[test]
fn an_exported_backbone_comes_back_in() {
    let _machine = machine();
    let dir = temp_dir();
    let run = trained(dir.path(), "run", &[("schedule.max_steps", "3")]);
    let file = dir.path().join("backbone.safetensors");
    let mut command = mentee();
    command.arg("export").arg(&run).args(["--layout", "torchvision", "--out"]).arg(&file);
    finish(command).expect(0);

    // A run that stops before it has moved at all evaluates like the one the weights come from.
    let init = format!("{:?}", file.to_str().expect("UTF-8"));
    let still = [
        ("schedule.max_steps", "1"),
        ("optimizer.base_lr", "1e-300"),
        ("optimizer.weight_decay", "0.0"),
        ("parallel.norm_statistics", "\"running\""),
        ("run.seed", "9"),
        ("model.init", init.as_str()),
    ];
    let copy = trained(dir.path(), "copy", &still);
    let mut python = Command::new(root().join(".venv/bin/python"));
    python.args(["-c", SAME_FEATURES]).arg(root().join("tests"));
    for (run, name) in [(&run, "a.safetensors"), (&copy, "b.safetensors")] {
        let path = dir.path().join(name);
        eval(run, &["--features", path.to_str().expect("UTF-8")]);
        python.arg(path);
    }
    // Running statistics are f64 here and f32 in the file.
    let difference: f64 = finish(python).expect(0).stdout.trim().parse().expect("a number");
    assert!(difference <= 1e-6, "{difference}");

    let refused = |init: &str, more: &[&str]| {
        let mut command = mentee();
        command
            .arg("trace")
            .arg(dir.path().join("run.toml"))
            .arg("--out")
            .arg(dir.path().join(format!("trace-{init}")));
        command.arg("--set").arg(format!("model.init={}", dir.path().join(init).display())).args(more);
        finish(command).expect(2).error_line().to_owned()
    };
    let line = refused("backbone.safetensors", &["--set", "model.backbone=resnet18"]);
    assert!(line.contains("tensor `bn1.bias` is [16], [64] in this recipe's backbone"), "{line}");
    assert!(refused("run.toml", &[]).contains("is no safetensors file"));
    assert!(refused("nothing", &[]).contains("cannot be read"));
}
