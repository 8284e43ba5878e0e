//! A set with damaged images among a thousand good ones: found, named, and trained through or not as the recipe says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use system_tests::process::{Outcome, finish, mentee};
use system_tests::recipe::{TinyRecipe, image};
use system_tests::run_dir::losses;
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
        ("train/cats/0200-page.jpg", b"<html>not found</html>".to_vec(), "neither JPEG, PNG nor WebP"),
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
    let mut command = mentee();
    command.arg("run").arg(recipe).arg("--run-dir").arg(run_dir).args(["--workers", "2"]);
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
    let mut logs = String::new();
    for rank in 0..2 {
        logs += &fs::read_to_string(run_dir.join(format!("logs/rank-{rank:05}.jsonl"))).expect("a log");
    }
    let skipped: Vec<&str> = logs.lines().filter(|line| line.contains("skipped a damaged image")).collect();
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
