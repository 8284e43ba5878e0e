//! A set with damaged images among a thousand good ones: found, named, and trained through or not as the recipe says. And
//! evaluated without them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use system_tests::process::{Outcome, finish, mentee};
use system_tests::recipe::{TinyRecipe, image};
use system_tests::run_dir::{losses, metrics};
use system_tests::{machine, temp_dir};

const DATA: i32 = 3;
const GOOD: usize = 1000;
const BATCH: usize = 67; // 1005 = 15 · 67: an epoch shows every image

fn jpeg(index: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let pixels = image((index % 4) as u8, index);
    jpeg_encoder::Encoder::new(&mut bytes, 90)
        .encode(&pixels, 32, 32, jpeg_encoder::ColorType::Rgb)
        .expect("an image can be encoded");
    bytes
}

/// Writes the set; the damaged files' names with what is wrong with each.
fn write_set(root: &Path) -> Vec<(&'static str, &'static str)> {
    for class in ["cats", "dogs"] {
        fs::create_dir_all(root.join("train").join(class)).expect("a folder");
    }
    for index in 0..GOOD {
        let class = ["cats", "dogs"][index % 2];
        fs::write(root.join(format!("train/{class}/{index:04}.jpg")), jpeg(index)).expect("an image");
    }
    let good = jpeg(1);
    let mut bomb = good.clone();
    let frame = bomb.windows(2).position(|pair| pair == [0xFF, 0xC0]).expect("a frame header");
    bomb[frame + 5..frame + 9].copy_from_slice(&[0xFD, 0xE8, 0xFD, 0xE8]);
    let mut codes = good.clone();
    let scan = codes.windows(2).position(|pair| pair == [0xFF, 0xDA]).expect("a scan");
    codes.splice(scan + 14..codes.len() - 2, [0xFE; 40]);
    let damaged: [(&str, Vec<u8>, &str); 5] = [
        ("train/cats/0100-empty.jpg", Vec::new(), "the file is empty"),
        ("train/cats/0200-page.jpg", b"<html>not found</html>".to_vec(), "none of JPEG, PNG"),
        ("train/dogs/0301-cut.jpg", good[..good.len() / 2].to_vec(), "truncated JPEG"),
        ("train/dogs/0401-bomb.jpg", bomb, "65000 x 65000 pixels"),
        ("train/dogs/0501-codes.jpg", codes, "JPEG"),
    ];
    damaged
        .into_iter()
        .map(|(name, bytes, problem)| {
            fs::write(root.join(name), bytes).expect("a damaged image");
            (name, problem)
        })
        .collect()
}

fn run(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    run_on(2, recipe, run_dir, sets)
}

fn run_on(workers: u32, recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(run_dir);
    command.args(["--workers", &workers.to_string()]);
    for set in sets {
        command.args(["--set", set]);
    }
    finish(command)
}

fn setting() -> (tempfile::TempDir, PathBuf, PathBuf, Vec<(&'static str, &'static str)>) {
    let dir = temp_dir();
    let images = dir.path().join("images");
    let damaged = write_set(&images);
    let recipe = TinyRecipe::new(&images)
        .set("schedule.global_batch", &BATCH.to_string())
        .set("schedule.max_steps", "15")
        .set("parallel.precision", "\"f32\"")
        .write(dir.path().join("tiny.toml"));
    (dir, images, recipe, damaged)
}

/// What the ranks' logs say with these words.
fn logged(run_dir: &Path, ranks: u32, words: &str) -> Vec<String> {
    let mut logs = String::new();
    for rank in 0..ranks {
        logs += &fs::read_to_string(run_dir.join(format!("logs/rank-{rank:05}.jsonl"))).expect("a log");
    }
    logs.lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
}

#[test]
fn verify_finds_every_damaged_image() {
    let (_dir, images, _, damaged) = setting();
    let mut command = mentee();
    command.args(["data", "verify"]).arg(&images);
    let outcome = finish(command).expect(DATA);
    assert!(outcome.error_line().contains("5 problems among 1005 images"), "{}", outcome.told());
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    for (name, problem) in damaged {
        assert!(lines.iter().any(|line| line.contains(name) && line.contains(problem)), "{name}: {lines:?}");
    }
}

#[test]
fn skip_trains_through_and_names_each() {
    let _machine = machine();
    let (dir, _, recipe, damaged) = setting();
    let run_dir = dir.path().join("run");
    run(&recipe, &run_dir, &["data.on_error=\"skip\"", "data.max_skipped=5"]).expect(0);
    assert_eq!(losses(&run_dir).len(), 15);
    let skipped = logged(&run_dir, 2, "skipped a damaged image");
    for (name, problem) in &damaged {
        assert!(
            skipped.iter().any(|line| line.contains(name) && line.contains(problem)),
            "{name}: {skipped:?}"
        );
    }
    // One epoch shows every image once.
    assert_eq!(skipped.iter().collect::<BTreeSet<_>>().len(), damaged.len(), "{skipped:?}");

    // Without a place for them all, the run ends, and says why.
    let outcome = run(
        &recipe,
        &dir.path().join("strict"),
        &["data.on_error=\"skip\"", "data.max_skipped=0", "run.name=\"strict\""],
    );
    assert!(outcome.expect(DATA).error_line().contains("max_skipped"));
    // Each rank has met fewer than all.
    let run_dir = dir.path().join("together");
    let outcome =
        run(&recipe, &run_dir, &["data.on_error=\"skip\"", "data.max_skipped=4", "run.name=\"together\""]);
    assert!(outcome.expect(DATA).error_line().contains("5 damaged samples, data.max_skipped is 4"));
    assert_eq!(losses(&run_dir).len(), 15);
}

#[test]
fn fail_stops_at_the_first_and_names_it() {
    let _machine = machine();
    let (dir, _, recipe, damaged) = setting();
    let run_dir = dir.path().join("run");
    let outcome = run(&recipe, &run_dir, &[]).expect(DATA);
    let line = outcome.error_line();
    let named =
        damaged.iter().filter(|(name, problem)| line.contains(name) && line.contains(problem)).count();
    assert_eq!(named, 1, "{line}");
    assert!(losses(&run_dir).len() < 15);
    let mut logs = mentee();
    logs.arg("logs").arg(&run_dir);
    let logs = finish(logs).expect(0).stdout;
    let first = logs.lines().next().unwrap_or_default();
    assert!(first.contains("exit code 3") && first.contains(line), "the cause comes first:\n{logs}");
}

/// Forty images to train on and twelve to classify.
fn write_small_set(root: &Path) {
    for index in 0..52 {
        let (part, class) = (if index < 40 { "train" } else { "test" }, ["cats", "dogs"][index % 2]);
        let folder = root.join(part).join(class);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(format!("{index:04}.jpg")), jpeg(index)).expect("an image");
    }
}

#[test]
fn an_evaluation_leaves_damaged_images_out() {
    let _machine = machine();
    let dir = temp_dir();
    let (images, clean) = (dir.path().join("images"), dir.path().join("clean"));
    write_small_set(&images);
    write_small_set(&clean);
    let in_bank = images.join("train/cats/0011-cut.jpg");
    let cut = jpeg(11);
    fs::write(&in_bank, &cut[..cut.len() / 2]).expect("a damaged image");
    fs::write(images.join("test/dogs/0042-page.jpg"), b"<html>not found</html>").expect("a damaged image");
    let damaged = [("0011-cut.jpg", "truncated JPEG"), ("0042-page.jpg", "none of JPEG, PNG")];
    let recipe = TinyRecipe::new(&images)
        .set("data.on_error", "\"skip\"")
        .set("eval.knn_every_epochs", "1")
        .set("eval.knn_k", "5")
        .set("schedule.max_steps", "4")
        .write(dir.path().join("tiny.toml"));
    let protocol = "bank 40 training images, 12 queries (test images), 2 damaged images left out";

    // Two evaluations, on one rank and on two: the same numbers, each image named once.
    let evaluations = [1, 2].map(|workers| {
        let run_dir = dir.path().join(format!("run-{workers}"));
        run_on(workers, &recipe, &run_dir, &[]).expect(0);
        let warned = logged(&run_dir, workers, "left a damaged image out of the evaluation");
        assert_eq!(warned.len(), 2, "{warned:?}");
        for (name, problem) in damaged {
            let named = |line: &String| line.contains(name) && line.contains(problem);
            assert_eq!(warned.iter().filter(|line| named(line)).count(), 1, "{name}: {warned:?}");
        }
        let lines: Vec<Value> = metrics(&run_dir).into_iter().filter(|line| line["kind"] == "eval").collect();
        assert_eq!(lines.len(), 2);
        lines
            .into_iter()
            .map(|line| {
                assert!(line["protocol"].as_str().is_some_and(|words| words.contains(protocol)), "{line}");
                ["knn_top1", "knn_random_init", "knn_raw_pixels"].map(|key| line[key].as_f64().expect(key))
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(evaluations[0], evaluations[1]);

    // The command finds what it finds without them, bit for bit.
    let eval = |more: &[&str]| {
        let mut command = mentee();
        command.arg("eval").arg(dir.path().join("run-1")).args(["--json", "--linear"]).args(more);
        let outcome = finish(command).expect(0);
        let mut line: Value = serde_json::from_str(&outcome.stdout).expect("one object");
        let object = line.as_object_mut().expect("an object");
        object.remove("time");
        let words = object.remove("protocol").and_then(|words| Some(words.as_str()?.to_owned()));
        (line, words.expect("a protocol"), outcome.stderr)
    };
    let (with, words, told) = eval(&["--knn"]);
    assert_eq!(words.matches(protocol).count(), 2, "of neighbours and of the classifier: {words}");
    for (name, problem) in damaged {
        let warned = told.lines().filter(|line| line.starts_with("warning: ") && line.contains(name));
        let warned: Vec<&str> = warned.collect();
        assert!(warned.len() == 1 && warned[0].contains(problem), "{told}");
    }
    let clean = clean.to_str().expect("UTF-8");
    let (mut without, words, told) = eval(&["--knn", "--data", clean]);
    let named = without.as_object_mut().and_then(|object| object.remove("data"));
    assert_eq!(named, Some(Value::from(clean)), "other images than the run's");
    assert_eq!(with, without);
    assert!(!words.contains("left out") && !told.contains("left a damaged"), "{words}\n{told}");
    let (_, words, _) = eval(&["--linear-augment", "--linear-epochs", "1"]);
    assert!(words.contains("batch 40, random crops") && words.contains(protocol), "{words}");

    // As many as the recipe has a place for, and none where it says so.
    fs::remove_file(in_bank).expect("the image can be removed");
    for (name, set, words) in [
        ("none", "data.max_skipped=0", "1 damaged sample, data.max_skipped is 0"),
        ("strict", "data.on_error=\"fail\"", "0042-page.jpg"),
    ] {
        let run_dir = dir.path().join(name);
        let outcome = run(&recipe, &run_dir, &[set]).expect(DATA);
        assert!(outcome.error_line().contains(words), "{}", outcome.told());
        assert_eq!(losses(&run_dir).len(), 2, "it trains until the first evaluation");
    }
}
