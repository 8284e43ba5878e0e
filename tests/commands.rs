//! One run through the commands a user types after training: shard, data, checkpoints, eval, report, status, logs.

use std::fs;
use std::path::Path;

use serde_json::Value;
use system_tests::process::{Outcome, finish, mentee, start, worker};
use system_tests::recipe::{NUM_TEST, NUM_TRAIN, TinyRecipe, image, write_images};
use system_tests::run_dir::{losses, metrics};
use system_tests::{machine, root, temp_dir};

fn run(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Outcome {
    let mut command = mentee();
    command.args(arguments.iter().map(|argument| argument.as_ref()));
    finish(command)
}

fn json(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}:\n{}", outcome.told()))
}

fn first_shard(dir: &Path) -> std::path::PathBuf {
    let mut queue = vec![dir.to_path_buf()];
    while let Some(folder) = queue.pop() {
        let mut entries: Vec<_> =
            fs::read_dir(&folder).expect("a folder").flatten().map(|e| e.path()).collect();
        entries.sort();
        for path in entries {
            if path.extension().is_some_and(|e| e == "tar") {
                return path;
            } else if path.is_dir() {
                queue.push(path);
            }
        }
    }
    panic!("no shard below {}", dir.display());
}

/// How many test images the vote of the `k` most similar training images gets right on raw pixels, normalised as the
/// network would see them: the weight of a neighbour is exp(cosine / temperature). The plain computation in f64, to
/// hold the reported number against.
fn raw_pixels_correct(k: usize, temperature: f64) -> u32 {
    let unit = |index: usize| -> Vec<f64> {
        let pixels = image((index % 4) as u8, index);
        let pixels: Vec<f64> = pixels.into_iter().map(|p| f64::from(p) / 127.5 - 1.0).collect();
        let length = pixels.iter().map(|p| p * p).sum::<f64>().sqrt();
        pixels.into_iter().map(|p| p / length).collect()
    };
    let bank: Vec<(usize, Vec<f64>)> = (0..NUM_TRAIN).map(|index| (index % 4, unit(index))).collect();
    let is_correct = |query: usize| {
        let pixels = unit(query);
        let mut neighbours: Vec<(f64, usize)> = bank
            .iter()
            .map(|(class, other)| (pixels.iter().zip(other).map(|(a, b)| a * b).sum(), *class))
            .collect();
        neighbours.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut votes = [0.0; 4];
        for (cosine, class) in &neighbours[..k] {
            votes[*class] += (cosine / temperature).exp();
        }
        (0..4).max_by(|a, b| f64::total_cmp(&votes[*a], &votes[*b])) == Some(query % 4)
    };
    (NUM_TRAIN..NUM_TRAIN + NUM_TEST).map(|query| u32::from(is_correct(query))).sum()
}

#[test]
fn from_images_to_a_report() {
    let _machine = machine();
    let dir = temp_dir();
    let (images, shards, run_dir) =
        (dir.path().join("images"), dir.path().join("shards"), dir.path().join("run"));
    write_images(&images);

    run(&[&"shard", &images, &"--out", &shards]).expect(0);
    run(&[&"data", &"verify", &shards]).expect(0);
    let stats = run(&[&"data", &"stats", &shards]).expect(0).stdout;
    assert!(stats.contains(&NUM_TRAIN.to_string()), "no {NUM_TRAIN} images in:\n{stats}");

    let tiny = |data: &Path| {
        TinyRecipe::new(data)
            .set("eval.knn_every_epochs", "1")
            .set("eval.knn_k", "5")
            .set("views.size", "32")
            .set("views.mean", "[0.5, 0.5, 0.5]")
            .set("views.std", "[0.5, 0.5, 0.5]")
            .set("parallel.precision", "\"f32\"")
    };
    let recipe = tiny(&shards).write(dir.path().join("tiny.toml"));
    run(&[&"run", &recipe, &"--workers", &"2", &"--run-dir", &run_dir]).expect(0);
    assert_eq!(losses(&run_dir).len(), 8);
    for file in [
        "plan.toml",
        "metrics.jsonl",
        "report.html",
        "logs/launcher.jsonl",
        "logs/coordinator.jsonl",
        "logs/rank-00000.jsonl",
        "logs/rank-00001.jsonl",
    ] {
        assert!(run_dir.join(file).is_file(), "{file} is missing");
    }
    let lines = metrics(&run_dir);
    for key in [
        "epoch",
        "time",
        "lr",
        "tau",
        "grad_norm",
        "z_std",
        "images_per_s",
        "step_ms",
        "data_wait_ms",
        "world_size",
    ] {
        let line = lines.iter().find(|line| line["kind"] == "train").expect("a train line");
        assert!(line[key].is_number() || line[key].is_string(), "no {key} in {line}");
    }
    let evals: Vec<_> = lines.iter().filter(|line| line["kind"] == "eval").collect();
    assert!(!evals.is_empty(), "no evaluation in {lines:?}");
    for key in ["knn_top1", "knn_random_init", "knn_raw_pixels"] {
        let percent = evals[0][key].as_f64().unwrap_or_else(|| panic!("no {key} in {}", evals[0]));
        assert!((0.0..=100.0).contains(&percent), "{key} = {percent}");
        let correct = percent / 100.0 * NUM_TEST as f64;
        assert!(
            (correct - correct.round()).abs() < 1e-6,
            "{key} = {percent} is no part of {NUM_TEST} images"
        );
    }

    // Training on shards and on what they were made of is the same training: they hold the same pixels in the same order.
    let plain = dir.path().join("plain");
    run(&[
        &"run",
        &tiny(&images).write(dir.path().join("plain.toml")),
        &"--workers",
        &"2",
        &"--run-dir",
        &plain,
    ])
    .expect(0);
    assert_eq!(losses(&plain), losses(&run_dir));

    let listed = json(&run(&[&"checkpoints", &run_dir, &"--verify", &"--json"]).expect(0));
    let newest =
        listed.as_array().and_then(|list| list.last()).unwrap_or_else(|| panic!("no list: {listed}"));
    assert_eq!(newest["step"], 8, "{listed}");
    assert_eq!(newest["world_size"], 2, "{listed}");

    let raw = evals[0]["knn_raw_pixels"].as_f64().unwrap_or(f64::NAN);
    let oracle = 100.0 * f64::from(raw_pixels_correct(5, 0.1)) / NUM_TEST as f64;
    println!("raw pixels: {raw} %, encoder: {} %", evals[0]["knn_top1"]);
    assert!((raw - oracle).abs() < 1e-6, "raw pixels: {raw} reported, {oracle} computed here");

    let evaluate = || json(&run(&[&"eval", &run_dir, &"--data", &shards, &"--knn", &"--json"]).expect(0));
    let first = evaluate();
    let last = evals.last().expect("an evaluation");
    for key in ["knn_top1", "knn_random_init", "knn_raw_pixels"] {
        assert_eq!(first[key], last[key], "the same checkpoint, another number: {first} and {last}");
    }
    assert!(first["protocol"].is_string() || first["protocol"].is_object(), "{first}");
    let second = evaluate();
    for key in ["step", "knn_top1", "knn_random_init", "knn_raw_pixels", "protocol"] {
        assert_eq!(second[key], first[key], "evaluated twice");
    }

    let page = dir.path().join("page.html");
    run(&[&"report", &run_dir, &"--out", &page]).expect(0);
    let page = fs::read_to_string(page).expect("the report");
    assert!(page.contains("<svg") || page.contains("<canvas"), "a report without curves");
    assert!(page.contains("data:image/png;base64,"), "a report without example views");
    for outside in ["src=\"http", "href=\"http", "src='http", "@import", "url(http"] {
        assert!(!page.contains(outside), "the report loads something from elsewhere: {outside}");
    }

    let status = json(&run(&[&"status", &run_dir, &"--json"]).expect(0));
    assert_eq!(status["last_train"]["step"], 8, "{status}");
    assert!(!run(&[&"logs", &run_dir, &"--rank", &"1"]).expect(0).stdout.is_empty(), "no logs of rank 1");

    // One altered byte in a shard is found.
    let shard = first_shard(&shards);
    let mut bytes = fs::read(&shard).expect("a shard");
    bytes[700] ^= 0x20;
    fs::write(&shard, bytes).expect("the shard can be altered");
    let refused = run(&[&"data", &"verify", &shards]).expect(3);
    assert!(refused.stdout.contains("00000.tar"), "{}", refused.told());
    assert!(refused.error_line().contains("problem"), "{}", refused.told());
}

#[test]
fn the_demo_removes_nothing_that_it_did_not_draw() {
    let dir = temp_dir();
    let own = dir.path().join("data/train/cat/own.jpg");
    fs::create_dir_all(own.parent().expect("a folder")).expect("a folder can be made");
    fs::write(&own, "mine").expect("a file can be written");
    let refused = run(&[&"demo", &"--out", &dir.path()]).expect(2);
    assert!(refused.error_line().contains("data/train"), "{}", refused.told());
    assert_eq!(fs::read_to_string(&own).expect("the file"), "mine");
    // Nor does it draw anything into what is no place for it.
    let refused = run(&[&"demo", &"--out", &own]).expect(2);
    assert!(refused.error_line().ends_with("is a file: give a folder"), "{}", refused.told());
    let other = dir.path().join("other");
    fs::create_dir(&other).expect("a folder");
    fs::copy(root().join("configs/tests/plan-of-the-first-version.toml"), other.join("plan.toml"))
        .expect("a plan");
    fs::write(other.join("metrics.jsonl"), "{}\n").expect("a step");
    let refused = run(&[&"demo", &"--out", &other]).expect(2);
    assert!(refused.error_line().contains("holds a run of another recipe"), "{}", refused.told());
    assert!(!other.join("data").exists());
}

#[test]
fn a_bare_worker_has_its_run_directory_on_its_command_line() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("schedule.max_steps", "3")
        .write(dir.path().join("tiny.toml"));
    let mut command = worker();
    command.arg(&recipe).args(["--set", "run.name=\"bare\""]).current_dir(dir.path());
    let mut running = start(command);
    let command_line = format!("/proc/{}/cmdline", running.pid());
    let run_dir = dir.path().canonicalize().expect("the folder").join("runs/bare");
    let words = format!("--run-dir\0{}\0", run_dir.display());
    while !fs::read_to_string(&command_line).is_ok_and(|line| line.contains(&words)) {
        assert!(!running.has_ended(), "{}", running.finish().told());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    running.finish().expect(0);
    assert_eq!(losses(&run_dir).len(), 3);
}

#[test]
fn benches_print_one_json_value() {
    let _machine = machine();
    let all_reduce = run(&[&"bench", &"allreduce", &"demo", &"--json", &"--seconds", &"0.001"]);
    let rows = json(&all_reduce.expect(0));
    let rows = rows.as_array().expect("an array");
    assert_eq!(rows.len(), 10);
    assert_eq!(rows[0]["ranks"], 2);
    let mut alone = worker();
    alone.args(["bench", "allreduce", "demo"]);
    let refused = finish(alone).expect(2);
    assert!(refused.error_line().contains("--workers 2"), "{}", refused.told());
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
        let expected = number("bytes") / number("seconds") / 1e9;
        assert!((number("algbw_gb_s") / expected - 1.0).abs() < 0.01, "{row}");
        assert!(number("n") >= 1.0);
    }
    let coordinator = run(&[
        &"bench",
        &"coordinator",
        &"demo",
        &"--json",
        &"--workers",
        &"4",
        &"--seconds",
        &"1",
        &"--rounds",
        &"1",
    ]);
    let report = json(&coordinator.expect(0));
    for key in ["workers", "p50_ms", "p99_ms", "rss_mb", "cpu_share", "n"] {
        assert!(report[key].is_number(), "no {key} in {report}");
    }
}

#[test]
fn doctor_finds_this_machine_fit() {
    let _machine = machine();
    let dir = temp_dir();
    let images = dir.path().join("images");
    write_images(&images);
    let recipe = TinyRecipe::new(&images).write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"doctor", &recipe, &"--run-dir", &run_dir, &"--workers", &"2"];

    let said = run(&arguments).expect(0).stdout;
    for part in
        ["data", "files", "space", "port", "libtorch", "MPI", "devices", "NCCL", "clocks", "all-reduce"]
    {
        let line = said.lines().find(|line| line.split_whitespace().nth(1) == Some(part));
        assert!(line.is_some_and(|line| !line.starts_with("FAULT")), "{part} in:\n{said}");
    }
    assert!(
        said.contains("1 MiB over 2 workers") && said.contains("right; gradients go by shared memory"),
        "{said}"
    );
    assert!(!run_dir.exists());

    arguments.push(&"--json");
    let findings = json(&run(&arguments).expect(0));
    let levels: Vec<_> = findings.as_array().expect("a list").iter().map(|it| it["level"].clone()).collect();
    assert!(levels.len() >= 11 && levels.iter().all(|level| level == "ok" || level == "note"), "{findings}");
}
