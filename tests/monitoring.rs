//! One run that is killed and continued, and what those who watch it see: TensorBoard's own reader, Prometheus' own tool,
//! `mentee monitor`, `mentee logs`, `mentee report`. And runs that fail: what `mentee logs` says first.
//!
//! A test whose tool is missing is reported as ignored, with the reason.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use system_tests::process::{LIMIT, finish, kill_run, mentee, start};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::{metrics, wait_for_lines};
use system_tests::{machine, root, temp_dir};

const STEPS: usize = 24;

/// The run, and what a scraper was told while it went on.
struct Bench {
    folder: tempfile::TempDir,
    run: PathBuf,
    scraped: String,
}

type Test = (&'static str, fn() -> Result<(), String>, fn(&Bench));

const TESTS: &[Test] = &[
    ("tensorboard_reads_what_was_logged", tensorboard_is_there, tensorboard_reads_what_was_logged),
    ("promtool_finds_nothing_wrong", promtool_is_there, promtool_finds_nothing_wrong),
    ("the_scraped_numbers_are_those_of_the_run", always, the_scraped_numbers_are_those_of_the_run),
    ("a_snapshot_shows_ranks_and_numbers", always, a_snapshot_shows_ranks_and_numbers),
    ("logs_are_filtered_and_merged", always, logs_are_filtered_and_merged),
    ("a_report_compares_runs", always, a_report_compares_runs),
    ("the_cause_of_a_failure_comes_first", always, the_cause_of_a_failure_comes_first),
];

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let selected: Vec<&Test> = TESTS
        .iter()
        .filter(|(name, ..)| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())))
        .collect();
    if std::env::args().any(|word| word == "--list") {
        for (name, ..) in &selected {
            println!("{name}: test");
        }
        return;
    }
    println!("\nrunning {} tests", selected.len());
    let began = Instant::now();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    let _machine = machine();
    let bench = (!selected.is_empty()).then(Bench::new);
    for (name, ready, test) in selected {
        let Some(bench) = &bench else { continue };
        if let Err(reason) = ready() {
            println!("test {name} ... ignored, needs {reason}");
            ignored += 1;
            continue;
        }
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(bench))).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        *(if ok { &mut passed } else { &mut failed }) += 1;
    }
    drop(bench);
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; finished \
         in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        began.elapsed().as_secs_f64()
    );
    std::process::exit(i32::from(failed > 0));
}

fn always() -> Result<(), String> {
    Ok(())
}

fn python() -> PathBuf {
    root().join(".venv/bin/python")
}

fn tensorboard_is_there() -> Result<(), String> {
    let import = "from tensorboard.backend.event_processing import event_accumulator";
    let output = Command::new(python()).args(["-c", import]).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().last().unwrap_or("it does not start");
    if output.status.success() { Ok(()) } else { Err(format!("tensorboard, from ci/setup --python: {why}")) }
}

fn promtool_is_there() -> Result<(), String> {
    match Command::new("promtool").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("promtool, of Debian's package prometheus: {error}")),
    }
}

fn run_command(recipe: &Path, run: &Path) -> Command {
    let mut command = mentee();
    command.arg("run").arg(recipe).args(["--workers", "2", "--run-dir"]).arg(run);
    command
}

fn recipe(folder: &Path, name: &str) -> TinyRecipe {
    TinyRecipe::new(&folder.join("images"))
        .set("run.name", &format!("{name:?}"))
        .set("schedule.epochs", "10")
        .set("schedule.max_steps", &STEPS.to_string())
        .set("parallel.precision", "\"f32\"")
        .set("eval.knn_every_epochs", "3")
        .set("eval.knn_k", "5")
}

impl Bench {
    fn new() -> Bench {
        let folder = temp_dir();
        write_images(&folder.path().join("images"));
        let recipe = recipe(folder.path(), "watched").write(folder.path().join("watched.toml"));
        let run = folder.path().join("run");
        let mut first = start(run_command(&recipe, &run));
        wait_for_lines(&run, 8, &mut first);
        kill_run(&run);
        drop(first);
        while kill_run(&run) > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }

        // Free a moment ago; nobody else here asks for this one.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|any| any.local_addr()).expect("a port").port();
        let mut command = run_command(&recipe, &run);
        command.args(["--metrics-address", &port.to_string()]);
        let mut second = start(command);
        let mut scraped = String::new();
        let since = Instant::now();
        while !second.has_ended() {
            assert!(since.elapsed() < LIMIT, "no end");
            if let Some(page) = scrape(port).filter(|page| page.contains("mentee_rank_forward_seconds")) {
                scraped = page;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let said = second.finish().expect(0).stdout;
        assert!(said.contains(&format!("http://127.0.0.1:{port}/metrics")), "{said}");
        Bench { folder, run, scraped }
    }
}

fn scrape(port: u16) -> Option<String> {
    let mut peer = TcpStream::connect(("127.0.0.1", port)).ok()?;
    peer.set_read_timeout(Some(LIMIT)).ok()?;
    peer.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    peer.read_to_string(&mut answer).ok()?;
    Some(answer.strip_prefix("HTTP/1.1 200 OK\r\n")?.split_once("\r\n\r\n")?.1.to_owned())
}

/// By key: value of every step, the last line of a step.
fn logged(run: &Path, kind: &str, key: &str) -> BTreeMap<u64, f64> {
    let lines = metrics(run);
    let of_kind = lines.iter().filter(|line| line["kind"] == kind);
    of_kind.filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect()
}

fn tensorboard_reads_what_was_logged(bench: &Bench) {
    let mut command = Command::new(python());
    command.arg(root().join("tests/read_events.py")).arg(bench.run.join("tensorboard"));
    let said = finish(command).expect(0).stdout;
    let tags: BTreeMap<String, Vec<(u64, f64)>> = serde_json::from_str(&said).expect("tags");
    for (tag, kind, key) in [
        ("train/loss", "train", "loss"),
        ("train/lr", "train", "lr"),
        ("train/tau", "train", "tau"),
        ("train/grad_norm", "train", "grad_norm"),
        ("train/z_std", "train", "z_std"),
        ("speed/images_per_s", "train", "images_per_s"),
        ("speed/step_ms", "train", "step_ms"),
        ("speed/data_wait_ms", "train", "data_wait_ms"),
        ("eval/knn_top1", "eval", "knn_top1"),
        ("eval/knn_random_init", "eval", "knn_random_init"),
        ("checkpoint/write_ms", "checkpoint", "write_ms"),
    ] {
        let seen = tags.get(tag).unwrap_or_else(|| panic!("no {tag} in {:?}", tags.keys()));
        let expected = logged(&bench.run, kind, key);
        let steps: Vec<u64> = seen.iter().map(|&(step, _)| step).collect();
        let wanted: Vec<u64> = expected.keys().copied().collect();
        assert_eq!(steps, wanted, "{tag}: every step once, also those that ran twice");
        // Event files hold f32.
        let same = |&(step, value): &(u64, f64)| {
            (value - expected[&step]).abs() <= f64::from(f32::EPSILON) * expected[&step].abs()
        };
        assert!(seen.iter().all(same), "{tag}: {seen:?}, expected {expected:?}");
    }
    assert_eq!(tags["train/loss"].len(), STEPS);
    let files = std::fs::read_dir(bench.run.join("tensorboard")).expect("event files").count();
    assert_eq!(files, 2, "one a start");
}

fn promtool_finds_nothing_wrong(bench: &Bench) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.spawn().expect("promtool starts");
    child.stdin.take().expect("a pipe").write_all(bench.scraped.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("promtool ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "promtool: {said}\n{}", bench.scraped);
}

fn the_scraped_numbers_are_those_of_the_run(bench: &Bench) {
    let sample = |name: &str| -> f64 {
        let line = bench.scraped.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{}", bench.scraped));
        line.parse().unwrap_or_else(|error| panic!("{name} {line}: {error}"))
    };
    let step = sample("mentee_step") as u64;
    assert!((1..=STEPS as u64).contains(&step), "step {step}");
    assert_eq!(sample("mentee_steps_planned"), STEPS as f64);
    assert_eq!(sample("mentee_workers"), 2.0);
    let losses = logged(&bench.run, "train", "loss");
    assert_eq!(sample("mentee_loss"), losses[&step], "of step {step}");
    let seconds = ["data_wait", "forward", "backward", "communication", "update"].map(|part| {
        let samples: Vec<f64> = (bench.scraped.lines())
            .filter(|line| line.starts_with(&format!("mentee_rank_{part}_seconds{{")))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse().ok())
            .collect();
        assert_eq!(samples.len(), 2, "{part} of two ranks in\n{}", bench.scraped);
        samples[0]
    });
    assert!(seconds[1] > 0.0 && seconds[2] > 0.0 && seconds.iter().sum::<f64>() < 60.0, "{seconds:?}");
}

fn said(arguments: &[&str], run: &Path) -> String {
    let mut command = mentee();
    command.arg(arguments[0]).arg(run).args(&arguments[1..]);
    finish(command).expect(0).stdout
}

fn a_snapshot_shows_ranks_and_numbers(bench: &Bench) {
    let text = said(&["monitor", "--once"], &bench.run);
    for part in [
        "watched",
        "done",
        "100.0 %",
        &format!("step {STEPS}/{STEPS}"),
        "loss",
        "tau",
        "images/s",
        "kNN",
        "ms/step",
    ] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    for rank in ["   0 done", "   1 done"] {
        let line =
            text.lines().find(|line| line.contains(rank)).unwrap_or_else(|| panic!("no {rank} in\n{text}"));
        // Step, and milliseconds of a step, its five parts, memory: nothing is unknown.
        assert!(!line.contains('–') && line.contains(&STEPS.to_string()), "{line}");
    }
    assert_eq!(said(&["monitor"], &bench.run).lines().count(), text.lines().count(), "no terminal: the same");
}

fn logs_are_filtered_and_merged(bench: &Bench) {
    let text = said(&["logs"], &bench.run);
    let times: Vec<&str> = text.lines().filter_map(|line| line.get(..23)).collect();
    assert!(times.is_sorted() && times.len() > 10, "merged by time:\n{text}");
    assert!(!text.contains("where time went"), "times are for those who ask");
    let times = said(&["logs", "--level", "debug", "--target", "mentee_worker::times", "--json"], &bench.run);
    let ranks: std::collections::BTreeSet<String> = (times.lines())
        .map(|line| serde_json::from_str::<Value>(line).expect("one object a line"))
        .map(|line| {
            assert_eq!(line["target"], "mentee_worker::times");
            assert!(line["forward_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{line}");
            line["who"].as_str().expect("who").to_owned()
        })
        .collect();
    assert_eq!(ranks.into_iter().collect::<Vec<_>>(), ["rank 0", "rank 1"]);
    assert_eq!(said(&["logs", "--lines", "3"], &bench.run).lines().count(), 3);
    let one = said(&["logs", "--rank", "1"], &bench.run);
    assert!(one.lines().count() > 2 && one.lines().all(|line| line.contains("rank 1")), "{one}");
}

fn a_report_compares_runs(bench: &Bench) {
    let copy = bench.folder.path().join("copy");
    std::fs::create_dir(&copy).expect("a folder");
    for file in ["plan.toml", "metrics.jsonl"] {
        std::fs::copy(bench.run.join(file), copy.join(file)).expect("copied");
    }
    let page = bench.folder.path().join("both.html");
    let mut command = mentee();
    command.arg("report").arg(&bench.run).arg(&copy).arg("--out").arg(&page);
    finish(command).expect(0);
    let page = std::fs::read_to_string(page).expect("the page");
    for part in
        ["2 runs", "line c0", "line c1", "all runs have the same plan", "<td>rank 1</td>", "kNN, trained"]
    {
        assert!(page.contains(part), "no {part} in the page");
    }
}

/// A NaN and a killed rank: the first line names the cause and the rank. (A bad image: `damaged.rs`.)
fn the_cause_of_a_failure_comes_first(bench: &Bench) {
    let folder = bench.folder.path();
    let fails = |name: &str, faults: &str, code: i32| -> Vec<String> {
        let recipe = recipe(folder, name).write(folder.join(format!("{name}.toml")));
        let run = folder.join(name);
        let mut command = run_command(&recipe, &run);
        command.args(["--max-restarts", "0"]).env("MENTEE_FAULTS", faults);
        finish(command).expect(code);
        said(&["logs"], &run).lines().map(str::to_owned).collect()
    };
    let lines = fails("nan", "nan:rank=1,step=5", 6);
    assert!(
        lines[0].contains("exit code 6") && lines[0].contains("rank 1") && lines[0].contains("step 5"),
        "{lines:#?}"
    );
    assert!(lines[1].starts_with("first error of a rank: ") && lines[1].contains("not finite"), "{lines:#?}");

    let run = folder.join("killed");
    let endless =
        self::recipe(folder, "killed").set("schedule.epochs", "10000").set("schedule.max_steps", "0");
    let recipe = endless.write(folder.join("killed.toml"));
    let mut command = run_command(&recipe, &run);
    command.args(["--max-restarts", "0"]);
    let mut running = start(command);
    wait_for_lines(&run, 3, &mut running);
    let since = Instant::now();
    let pid = loop {
        let status = std::fs::read(run.join("status.json")).unwrap_or_default();
        let status: Value = serde_json::from_slice(&status).unwrap_or_default();
        if let Some(pid) = status["ranks"]["1"]["pid"].as_u64() {
            break pid;
        }
        assert!(since.elapsed() < LIMIT, "no rank 1 in {status}");
        std::thread::sleep(Duration::from_millis(10));
    };
    system_tests::process::kill_rank(pid as u32);
    running.finish().expect(5);
    let first = said(&["logs"], &run).lines().next().map(str::to_owned).unwrap_or_default();
    assert!(
        first.contains("exit code 5") && first.contains("rank 1") && first.contains("without a word"),
        "{first}"
    );
}
