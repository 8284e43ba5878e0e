//! The commands that need no worker, and the demo with a fake one.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{put, script, terminal};
use mentee_checkpoint::{Dtype, Meta, Tensor};
use mentee_config::Recipe;
use mentee_config::recipe::DataFormat;
use mentee_data::check;
use mentee_data::decode::Reading;
use mentee_data::synthetic::{SyntheticConfig, write_synthetic};
use serde_json::Value;

mod common;

fn mentee(arguments: &[&str]) -> (Option<i32>, String, String) {
    run(Command::new(env!("CARGO_BIN_EXE_mentee")).args(arguments))
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.stdin(Stdio::null()).output().expect("mentee starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn help_is_quick_and_names_every_command() {
    let started = Instant::now();
    let (code, out, _) = mentee(&["--help"]);
    let took = started.elapsed();
    assert_eq!(code, Some(0));
    for command in [
        "demo",
        "run",
        "shard",
        "data",
        "checkpoints",
        "report",
        "status",
        "monitor",
        "logs",
        "eval",
        "bench",
        "man",
    ] {
        assert!(out.lines().any(|line| line.trim_start().starts_with(command)), "{command} in {out}");
    }
    assert!(took.as_millis() < 500, "{took:?}");
}

#[test]
fn completions_and_manual_pages_name_every_command_and_option() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, err) = mentee(&["completions", shell]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("monitor") && out.contains("max-restarts"), "{shell}: {out}");
    }
    let (code, out, err) = mentee(&["man"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(".TH mentee 1") && out.contains("monitor"), "{out}");
    let (_, out, _) = mentee(&["man", "run"]);
    assert!(out.contains(".TH mentee-run 1") && out.contains("max\\-restarts"), "{out}");
    assert_eq!(mentee(&["man", "nonsense"]).0, Some(2));
    let (code, out, err) = mentee(&["man", "data", "order"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(".TH mentee-data-order 1") && out.contains("from\\-step"), "{out}");
    let (_, out, _) = mentee(&["man", "bench", "step"]);
    assert!(out.contains(".TH mentee-bench-step 1") && out.contains("warmup"), "{out}");
    let (code, _, err) = mentee(&["man", "data", "nonsense"]);
    assert_eq!(code, Some(2));
    assert_eq!(err.trim_end(), "error: mentee data has no command nonsense: see mentee data --help");
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(mentee(&["man", "--out", text(folder.path())]).0, Some(0));
    let pages: Vec<String> = fs::read_dir(folder.path())
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    for page in ["mentee-data-verify.1", "mentee-eval.1", "mentee-bench-allreduce.1"] {
        assert!(pages.iter().any(|it| it == page), "{page} in {pages:?}");
    }
    assert!(pages.iter().all(|page| !page.contains("help")), "{pages:?}");
    let page = fs::read_to_string(folder.path().join("mentee.1")).expect("a page");
    assert!(!page.contains("mentee\\-help"), "{page}");
}

/// What the worker does is explained, completed and refused without it.
#[test]
fn commands_of_the_worker_are_known_here() {
    let folder = tempfile::tempdir().expect("a folder");
    let alone = folder.path().join("mentee");
    put(Path::new(env!("CARGO_BIN_EXE_mentee")), &alone);
    let alone = |line: &str| run(Command::new(&alone).args(line.split(' ')).env("PATH", "/nowhere"));
    for (line, parts) in [
        ("eval --help", &["Usage: mentee eval [OPTIONS] <CHECKPOINT>", "--data <DIR>", "Examples:"][..]),
        (
            "trace --help",
            &["Usage: mentee trace [OPTIONS] --out <DIR> <RECIPE>", "Replaces a value", "Examples:"],
        ),
        ("bench --help", &["loader", "step", "checkpoint", "allreduce", "coordinator", "Examples:"]),
        ("bench step --help", &["Usage: mentee bench step [OPTIONS] [RECIPE]", "Replaces a value"]),
        ("bench loader --help", &["Usage: mentee bench loader [OPTIONS] [RECIPE]"]),
        ("bench coordinator --help", &["Usage: mentee bench coordinator [OPTIONS] [RECIPE]"]),
        ("help bench allreduce", &["Usage: mentee bench allreduce [OPTIONS] [RECIPE]"]),
    ] {
        let (code, out, err) = alone(line);
        assert_eq!(code, Some(0), "{line}: {err}");
        for part in parts {
            assert!(out.contains(part), "{line}: {part} in {out}");
        }
    }
    for line in [
        "eval",
        "eval run --nonsense",
        "trace demo --steps 0 --out x",
        "bench nonsense",
        "bench step --steps 0",
        "bench checkpoint --every 18446744073709551615",
        "bench allreduce --seconds nan",
        "bench allreduce --workers 1",
        "bench loader --images 18446744073709551615",
    ] {
        let (code, _, err) = alone(line);
        assert_eq!(code, Some(2), "{line}: {err}");
        assert!(err.starts_with("error: ") && err.lines().count() == 1, "{line}: {err}");
    }
    // What is well said fails for want of the worker.
    let (code, _, err) = alone("eval run --knn");
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("mentee-worker is neither in"), "{err}");
}

/// The worker, or several under the real mpirun, gets every word as it was typed.
#[test]
fn the_worker_is_given_the_same_arguments() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path().join("a place");
    fs::create_dir(&here).expect("made");
    put(Path::new(env!("CARGO_BIN_EXE_mentee")), &here.join("mentee"));
    script(&here.join("mentee-worker"), "IFS='|'; printf '|%s|\\n' \"$*\"");
    for (words, workers) in [
        (&["eval", "a run", "--data", "my data", "--k", "1,2", "--knn"][..], 1),
        (&["trace", "my recipe.toml", "--out=a trace", "--set", "data.path=\"my data\""], 1),
        (&["bench", "step", "--steps", "1", "--set", "run.name=$HOME 'x'"], 1),
        (&["bench", "step", "demo", "--workers", "3", "--set", "data.path=my data"], 3),
        (&["bench", "checkpoint", "--workers=2", "--out", "a folder"], 2),
        (&["bench", "allreduce", "--json"], 2),
    ] {
        let (code, out, err) = run(Command::new(here.join("mentee")).args(words));
        assert_eq!(code, Some(0), "{words:?}: {err}");
        let expected = format!("|{}|", words.join("|"));
        assert_eq!(out.lines().collect::<Vec<_>>(), vec![expected; workers], "{words:?}: {err}");
    }
}

/// Every command, and every command of those.
fn all_commands() -> Vec<String> {
    let named = |line: &str| -> Vec<String> {
        let words = line.split(' ').filter(|word| !word.is_empty()).chain(["--help"]);
        let (code, out, err) = mentee(&words.collect::<Vec<_>>());
        assert_eq!(code, Some(0), "{line}: {err}");
        let lines = out.lines().skip_while(|line| *line != "Commands:").skip(1);
        let names = lines.take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("   "));
        names.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
    };
    let mut all = Vec::new();
    for command in named("") {
        all.push(command.clone());
        if command != "help" {
            all.extend(named(&command).iter().map(|own| format!("{command} {own}")));
        }
    }
    all
}

#[test]
fn help_fits_a_terminal_and_says_the_same_of_the_same_option() {
    let all = all_commands();
    assert!(all.iter().any(|command| command == "bench allreduce"), "{all:?}");
    let help = |command: &str, columns: &str| {
        let words = command.split(' ').chain(["--help"]);
        let mut mentee = Command::new(env!("CARGO_BIN_EXE_mentee"));
        let (code, out, err) = run(mentee.args(words).env("COLUMNS", columns));
        assert_eq!(code, Some(0), "{command}: {err}");
        out
    };
    for command in all.iter().filter(|command| !command.split(' ').any(|word| word == "help")) {
        for (columns, most) in [("80", 80), ("100", 100), ("300", 110)] {
            for line in help(command, columns).lines().filter(|line| !line.starts_with("Usage: ")) {
                assert!(line.chars().count() <= most, "{command}: {line}");
            }
        }
        let out = help(command, "300");
        if let Some((_, after)) = out.split_once("--set <SECTION.KEY=VALUE>") {
            let says: Vec<&str> = after.split_whitespace().take(5).collect();
            assert!(matches!(says[..], ["Replaces", "a", "value", "of", "the"]), "{command}: {out}");
        }
    }
    for command in ["run", "submit", "shard", "report", "export", "doctor", "eval", "trace", "bench"] {
        let out = help(command, "300");
        let (_, examples) = out.split_once("\nExamples:\n").unwrap_or_else(|| panic!("{command}: {out}"));
        assert!(examples.contains(&format!("  mentee {command}")), "{command}: {examples}");
    }
}

/// bash itself, with what `mentee completions bash` prints.
#[test]
fn bash_completes_a_command_and_its_options() {
    let script = "source <(\"$0\" completions bash); COMP_WORDS=(mentee $1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); \
                  _mentee mentee \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[*]}\"";
    let complete = |words: &str| {
        let mut bash = Command::new("bash");
        bash.args(["-c", script, env!("CARGO_BIN_EXE_mentee"), words]);
        run(&mut bash).1.trim().to_owned()
    };
    assert_eq!(complete("moni"), "monitor");
    assert_eq!(complete("run --max"), "--max-restarts");
    assert_eq!(complete("eval --linear-p"), "--linear-protocol");
    assert_eq!(complete("eval x --linear-protocol"), "--linear-protocol");
    assert_eq!(complete("bench al"), "allreduce");
    assert_eq!(complete("bench step --warm"), "--warmup");
}

#[test]
fn bad_usage_is_2() {
    for arguments in [&["nonsense"][..], &["run"], &["status", "/nowhere"], &["run", "no-such-recipe"]] {
        let (code, _, err) = mentee(arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(err.starts_with("error: "), "{err}");
    }
}

#[test]
fn shard_verify_stats() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, out) = (folder.path().join("data"), folder.path().join("out"));
    let config = SyntheticConfig { train: 30, test: 10, ..SyntheticConfig::default() };
    write_synthetic(&data, &config, &mut |_, _| ()).expect("written");

    let (code, said, err) = mentee(&["shard", text(&data), "--out", text(&out), "--shard-bytes", "20KB"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(said.contains("30 images") && said.contains("10 images"), "{said}");
    assert!(out.join("train/00001.tar").is_file(), "more than one shard: {said}");

    let (code, said, err) = mentee(&["data", "verify", text(&out)]);
    assert_eq!(code, Some(0), "{err}");
    assert!(said.contains("all well: 40 images"), "{said}");
    let (code, said, _) = mentee(&["data", "stats", text(&out), "--json"]);
    assert_eq!(code, Some(0));
    let parts: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(parts.as_array().expect("parts").len(), 2);
    let sheet = out.with_file_name("sheet.png");
    assert!(mentee(&["data", "stats", text(&out), "--sheet", text(&sheet)]).1.contains("30 images"));
    assert!(fs::read(&sheet).unwrap().starts_with(b"\x89PNG"));

    // Nothing is overwritten.
    let (code, _, err) = mentee(&["shard", text(&data), "--out", text(&out)]);
    assert_eq!(code, Some(2), "{err}");
    assert_eq!(mentee(&["data", "verify", text(&out)]).0, Some(0));

    let shard = out.join("train/00000.tar");
    let mut bytes = fs::read(&shard).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(&shard, bytes).expect("written");
    let (code, said, err) = mentee(&["data", "verify", text(&out)]);
    assert_eq!(code, Some(3));
    assert!(said.contains("00000.tar"), "{said}");
    assert_eq!(err.lines().count(), 1, "{err}");

    let (code, _, err) = mentee(&["data", "stats", "/nowhere"]);
    assert_eq!(code, Some(3));
    assert!(err.contains("/nowhere"), "{err}");
}

#[test]
fn what_is_passed_over_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let config = SyntheticConfig { train: 3, test: 1, ..SyntheticConfig::default() };
    write_synthetic(&data.join("drawn"), &config, &mut |_, _| ()).expect("written");
    let images =
        check::contact_sheet(&data.join("drawn"), DataFormat::Auto, Reading::default()).expect("a PNG");
    let set = folder.path().join("set");
    fs::create_dir_all(set.join("cat")).expect("made");
    fs::write(set.join("cat/a.png"), images).expect("written");
    fs::write(set.join("cat/b.DCM"), "not read").expect("written");
    let line = format!(
        "passed over in {}: 1 .dcm (read are JPEG, PNG, WebP, TIFF, BMP, PPM and PGM)",
        set.display()
    );
    for arguments in [&["verify", text(&set)][..], &["stats", text(&set)], &["stats", "--json", text(&set)]] {
        let (code, said, err) = mentee(&[&["data"], arguments].concat());
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(said.matches(&line).count(), 1, "{said}");
    }
    let (_, said, _) = mentee(&["shard", text(&set), "--out", text(&folder.path().join("out"))]);
    assert!(said.contains(&line) && said.contains("1 image of 1 class in 1 shard,"), "{said}");
}

#[test]
fn shard_leaves_out_no_part() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, more, out) =
        (folder.path().join("data"), folder.path().join("more"), folder.path().join("out"));
    for (to, test) in [(&data, 3), (&more, 5)] {
        let config = SyntheticConfig { train: 7, test, ..SyntheticConfig::default() };
        write_synthetic(to, &config, &mut |_, _| ()).expect("written");
    }
    fs::rename(more.join("test"), data.join("val")).expect("renamed");
    let (code, said, err) = mentee(&["shard", text(&data), "--out", text(&out)]);
    assert_eq!(code, Some(0), "{err}");
    for (part, images) in [("train", 7), ("test", 3), ("val", 5)] {
        let line = format!("{}: {images} images", out.join(part).display());
        assert!(said.contains(&line), "{line} in {said}");
    }
    let (code, said, err) = mentee(&["data", "verify", text(&out)]);
    assert_eq!(code, Some(0), "{err}");
    assert!(said.contains("all well: 15 images"), "{said}");
}

/// Parts that are named otherwise than those that are written would be joined by them.
#[test]
fn shard_writes_nothing_among_what_it_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let config = SyntheticConfig { train: 7, test: 3, ..SyntheticConfig::default() };
    write_synthetic(&data, &config, &mut |_, _| ()).expect("written");
    for (from, to) in [("train", "training"), ("test", "testing")] {
        fs::rename(data.join(from), data.join(to)).expect("renamed");
    }
    for out in [data.clone(), data.join("shards"), data.join("training/shards"), data.join("training/../x")] {
        let (code, _, err) = mentee(&["shard", text(&data), "--out", text(&out)]);
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains("is SOURCE or lies in it"), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    assert_eq!(fs::read_dir(&data).expect("there").count(), 2, "nothing was written");
    let beside = folder.path().join("data-shards");
    assert_eq!(mentee(&["shard", text(&data), "--out", text(&beside)]).0, Some(0));
}

/// Of an array Slurm is asked once, and not again where it does not answer; a job it has forgotten is another matter.
#[test]
fn what_slurm_cannot_say_is_told_from_what_it_has_forgotten() {
    let folder = tempfile::tempdir().expect("a folder");
    let (bin, sweep) = (folder.path().join("bin"), folder.path().join("sweep"));
    fs::create_dir(&bin).expect("made");
    let record = |job: &str| {
        serde_json::json!({ "job": job, "submitted": 0.0, "script": "submit.sbatch" }).to_string()
    };
    for run in ["0", "1", "2"] {
        let run_dir = sweep.join(run);
        fs::create_dir_all(&run_dir).expect("made");
        fs::write(run_dir.join("plan.toml"), "").expect("written");
        fs::write(run_dir.join("slurm.json"), record(&format!("7_{run}"))).expect("written");
    }
    fs::write(sweep.join("sweep.json"), "{\"job\":\"7\",\"variants\":[[\"a=1\"],[\"a=2\"],[\"a=3\"]]}")
        .expect("written");
    let asked = folder.path().join("asked");
    let status = |scontrol: &str, run: &Path| {
        script(&bin.join("scontrol"), &format!("echo \"$@\" >> {}\n{scontrol}", asked.display()));
        let _ = fs::remove_file(&asked);
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let (code, out, err) =
            self::run(Command::new(env!("CARGO_BIN_EXE_mentee")).arg("status").arg(run).env("PATH", path));
        assert_eq!(code, Some(0), "{err}");
        (out, fs::read_to_string(&asked).expect("asked").lines().count())
    };
    let down = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1";
    let (out, _) = status(down, &sweep.join("1"));
    assert!(
        out.contains("job 7_1: Slurm could not be asked (scontrol: slurm_load_jobs error: Unable"),
        "{out}"
    );
    let (out, times) = status(down, &sweep);
    assert_eq!((times, out.matches("could not be asked").count()), (1, 1), "{out}");
    let forgotten = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1";
    assert!(status(forgotten, &sweep.join("1")).0.contains("job 7_1: no longer known to Slurm"));
    let known = "echo JobId=9 ArrayJobId=7 ArrayTaskId=1 JobState=RUNNING NodeList=n1 RunTime=1 TimeLimit=2\n\
                 echo JobId=7 ArrayJobId=7 ArrayTaskId=0,2%1 JobState=PENDING Reason=Resources";
    let (out, times) = status(known, &sweep);
    assert_eq!((times, out.matches("queued (Resources)").count()), (1, 2), "{out}");
    assert!(out.contains("running on n1"), "{out}");
}

/// `mentee … | head`, and a full disk under what was asked for.
#[test]
fn results_that_nobody_reads_or_that_are_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = SyntheticConfig { train: 8, test: 4, ..SyntheticConfig::default() };
    write_synthetic(folder.path(), &config, &mut |_, _| ()).expect("written");
    let stats = |stdout: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mentee"));
        run(command.args(["data", "stats", text(folder.path())]).stdout(stdout))
    };
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    assert_eq!(stats(writer.into()), (Some(0), String::new(), String::new()));
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("linux");
    let (code, _, err) = stats(full.into());
    assert_eq!(code, Some(1), "{err}");
    assert!(err.starts_with("error: cannot write to standard output: "), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

/// The training part is complete, the other one was stopped: the same command gives what one go gives.
#[test]
fn shard_carries_on_after_the_first_part() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, out, whole) =
        (folder.path().join("data"), folder.path().join("out"), folder.path().join("whole"));
    let image = |name: &str, seed: usize| {
        let path = data.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        let pixels: Vec<u8> = (0..300).map(|at| ((at + 1) * (seed + 7) * 131 % 251) as u8).collect();
        fs::write(path, [b"P6\n10 10\n255\n", &pixels[..]].concat()).expect("written");
    };
    for index in 0..30 {
        image(&format!("train/a/{index:02}.ppm"), index);
        image(&format!("valid/a/{index:02}.ppm"), index + 100);
    }
    let shard = |out: &Path, more: &[&str]| {
        let fixed = ["shard", text(&data), "--out", text(out), "--shard-bytes", "5000"];
        mentee(&[&fixed, more].concat())
    };
    assert_eq!(shard(&whole, &[]).0, Some(0));

    // As long as the whole image, so that the repaired set is the same one by its digest.
    let damaged = data.join("valid/a/20.ppm");
    let good = fs::read(&damaged).expect("there");
    fs::write(&damaged, vec![0; good.len()]).expect("written");
    let (code, _, err) = shard(&out, &[]);
    assert_eq!(code, Some(3), "{err}");
    assert!(out.join("train/index.json").is_file() && !out.join("test").exists());
    let first = fs::metadata(out.join("train/00000.tar")).expect("there").modified().expect("a time");
    fs::write(&damaged, good).expect("written");
    // Another job does not go on with it.
    let (code, _, err) = shard(&out, &["--raw"]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("train` already exists"), "{err}");

    let (code, said, err) = shard(&out, &[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(said.contains("train: complete from before, left as it is"), "{said}");
    assert!(said.contains("of them were there from before"), "{said}");
    assert_eq!(fs::metadata(out.join("train/00000.tar")).unwrap().modified().unwrap(), first);
    let files = |root: &Path| {
        let mut files = Vec::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(root).expect("below").to_owned();
                    files.push((name, fs::read(path).expect("readable")));
                }
            }
        }
        files.sort();
        files
    };
    assert!(files(&out) == files(&whole), "other files than in one go");
    // Once all is there it is as any other set: not written over.
    assert_eq!(shard(&out, &[]).0, Some(2));
}

#[test]
fn the_order_does_not_depend_on_the_world() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = SyntheticConfig { train: 50, test: 10, ..SyntheticConfig::default() };
    write_synthetic(folder.path(), &config, &mut |_, _| ()).expect("written");
    let path = format!("data.path={}", text(folder.path()));
    let order = |more: &[&str]| {
        let fixed = ["data", "order", "demo", "--set", &path, "--set", "schedule.global_batch=12"];
        let (code, out, err) = mentee(&[&fixed, more].concat());
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let ids = |out: String| {
        let ids = out.lines().map(|line| line.split_once(": ").expect("ids").1.to_owned());
        ids.collect::<Vec<_>>().join(" ")
    };
    let alone = ids(order(&["--epochs", "2"]));
    assert_eq!(alone.split(' ').count(), 2 * 48);
    for world in ["2", "3", "5", "12"] {
        assert_eq!(ids(order(&["--epochs", "2", "--world", world])), alone, "world of {world}");
    }
    let two_steps_later = ids(order(&["--epochs", "2", "--from-step", "2"]));
    assert!(alone.ends_with(&two_steps_later) && two_steps_later.split(' ').count() == 72);

    let digest = order(&["--hash"]);
    assert_eq!(digest.trim().len(), 64);
    assert_eq!(order(&["--hash", "--world", "3"]), digest);
    assert_ne!(order(&["--hash", "--set", "run.seed=1"]), digest);
    assert_ne!(order(&["--hash", "--set", "views.flip=0.25"]), digest, "the views' bytes count");
}

#[test]
fn checkpoints_are_listed_and_verified() {
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path();
    let checkpoints = run_dir.join("checkpoints");
    for step in [10, 20] {
        let meta = Meta {
            step,
            epoch: 1,
            world_size: 2,
            plan_hash: "hash".into(),
            plan_toml: String::new(),
            data_digest: "data".into(),
            mentee_version: "0.1.0".into(),
            counts: mentee_checkpoint::Counts::default(),
        };
        let bytes = [0, 1, 2, 3, 4, 5, 6, step as u8];
        let state = vec![Tensor::new("student.w", Dtype::F32, &[2], &bytes)];
        mentee_checkpoint::write(&checkpoints, &meta, &[("state.safetensors".into(), state)])
            .expect("written");
    }
    let (code, out, err) = mentee(&["checkpoints", text(run_dir), "--verify"]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.lines().filter(|line| line.ends_with("verified")).count(), 2, "{out}");

    let file = checkpoints.join("step-00000020/state.safetensors");
    let mut bytes = fs::read(&file).expect("there");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&file, bytes).expect("written");
    let (code, out, err) = mentee(&["checkpoints", text(run_dir), "--verify", "--json"]);
    assert_eq!(code, Some(4), "{err}");
    let list: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(
        (list[0]["usable"].as_bool(), list[1]["usable"].as_bool()),
        (Some(true), Some(false)),
        "{list}"
    );
    assert_eq!(list[0]["world_size"], 2);
    assert_eq!(list[0]["state_digest"].as_str().map(str::len), Some(64));
    assert_eq!(err.lines().count(), 1, "{err}");
}

/// A run of a name with mark-up, its checkpoint of step 14, and lines of metrics.
fn run_of(run_dir: &Path, sets: &[&str], metrics: &str) {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let mut recipe = Recipe::load("byol-cifar10-resnet18", &sets).expect("built in");
    recipe.run.name = "a`b<script>_c".into();
    let meta = Meta {
        step: 14,
        epoch: 2,
        world_size: 1,
        plan_hash: "hash".into(),
        plan_toml: recipe.to_toml(),
        data_digest: "data".into(),
        mentee_version: "0.1.0".into(),
        counts: mentee_checkpoint::Counts::default(),
    };
    let bytes = [0; 8];
    let state = vec![Tensor::new("student.backbone.conv1.weight", Dtype::F32, &[2], &bytes)];
    mentee_checkpoint::write(&run_dir.join("checkpoints"), &meta, &[("state.safetensors".into(), state)])
        .expect("written");
    fs::write(run_dir.join("plan.toml"), recipe.to_toml()).expect("written");
    fs::write(run_dir.join("metrics.jsonl"), metrics).expect("written");
}

const OWN: &str = "{\"kind\":\"eval\",\"step\":7,\"knn_top1\":16.5,\"protocol\":\"k_1 <b>\"}\n";
const OTHER: &str = "{\"kind\":\"eval\",\"step\":14,\"knn_top1\":88.5,\"data\":\"/other\"}\n";
const TRAIN: &str = "{\"kind\":\"train\",\"step\":14,\"loss\":1.5}\n";

#[test]
fn a_card_says_how_it_was_measured_and_can_be_run_whatever_names_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path().join("run");
    run_of(&run_dir, &["views.size=64", "parallel.precision=bf16"], &[OWN, TRAIN].concat());
    let export = |name: &str| mentee(&["export", text(&run_dir), "--out", text(&folder.path().join(name))]);
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).expect(name);

    let (code, out, err) = export("a\"b\\c\nd.safetensors");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("1 tensors of resnet18 at step 14"), "{out}");
    let card = read("a\"b\\c\nd.md");
    for part in [
        "model.load_state_dict(load_file(\"a\\\"b\\\\c\\nd.safetensors\"), strict=True)\n",
        "run a\\`b&lt;script>\\_c, step 14",
        "an image of 64 x 64 as it is",
        "    if image.size != (64, 64):\n        image = functional.resize(image, 73, functional.InterpolationMode.",
        "functional.center_crop(image, [64, 64])",
        "evaluated in bf16",
        "At step 7. k\\_1 &lt;b>",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
    let described: Value = serde_json::from_str(&read("a\"b\\c\nd.json")).expect("JSON");
    assert_eq!(described["input"]["as_it_is"], serde_json::json!([64, 64]));
    assert_eq!(described["evaluated_in"], "bf16");
    assert!(described["scores"].get("data").is_none(), "{described}");

    // Names that differ behind a dot only.
    for name in ["v1.2", "v1.3.safetensors"] {
        assert_eq!(export(name).0, Some(0));
    }
    assert!(read("v1.2.md").contains("load_file(\"v1.2\")"));
    assert!(
        read("v1.3.md").contains("load_file(\"v1.3.safetensors\")")
            && folder.path().join("v1.3.json").exists()
    );
    assert_eq!(export("v1.2").0, Some(0), "over an earlier one");

    // An evaluation on other data, of a step that has none of its own.
    run_of(&folder.path().join("other"), &[], &[OWN, TRAIN, OTHER].concat());
    let out = folder.path().join("other.safetensors");
    let (code, _, err) = mentee(&["export", text(&folder.path().join("other")), "--out", text(&out)]);
    assert_eq!(code, Some(0), "{err}");
    assert!(read("other.md").contains("At step 14, on `/other`. "), "{}", read("other.md"));
    assert!(!read("other.md").contains("bf16"), "{}", read("other.md"));
    let described: Value = serde_json::from_str(&read("other.json")).expect("JSON");
    assert_eq!(described["scores"]["data"], "/other");
}

#[test]
fn an_export_overwrites_descriptions_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path();
    run_of(run_dir, &[], "");
    for (out, there) in [("status", "status.json"), ("README", "README.md"), ("x.safetensors", "x.json")] {
        for kept in ["", "# mine\n", "{\"state\":\"done\"}"] {
            fs::write(run_dir.join(there), kept).expect("written");
            let (code, _, err) = mentee(&["export", text(run_dir), "--out", text(&run_dir.join(out))]);
            assert_eq!(code, Some(2), "{err}");
            assert!(err.contains(there) && err.lines().count() == 1, "{err}");
            assert_eq!(fs::read_to_string(run_dir.join(there)).expect("there"), kept);
            assert!(!run_dir.join(out).exists(), "{out}");
        }
    }
    let checkpoints = fs::read_dir(run_dir.join("checkpoints")).expect("checkpoints").flatten();
    let inside = checkpoints.last().expect("one").path().join("mine.safetensors");
    let (code, _, err) = mentee(&["export", text(run_dir), "--out", text(&inside)]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("mine.safetensors: lies in a checkpoint") && !inside.exists(), "{err}");
}

#[test]
fn status_names_an_evaluation_that_is_not_of_the_newest_step_or_on_other_data() {
    let folder = tempfile::tempdir().expect("a folder");
    let status = |metrics: &[&str]| {
        fs::write(folder.path().join("metrics.jsonl"), metrics.concat()).expect("written");
        let (code, out, err) = mentee(&["status", text(folder.path())]);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let out = status(&[OWN, TRAIN]);
    assert!(out.contains("  evaluation of step 7:\n  kNN top-1, trained        16.5 %\n"), "{out}");
    let out = status(&[OWN, TRAIN, OTHER]);
    assert!(
        out.contains("  evaluation of step 14 on /other:\n  kNN top-1, trained        88.5 %\n"),
        "{out}"
    );
    let own = OTHER.replace("data", "what");
    let out = status(&[OWN, TRAIN, &own, &OTHER.replace("88", "99")]);
    assert!(out.contains("88.5 %") && !out.contains("evaluation of"), "{out}");
    let (_, out, _) = mentee(&["status", text(folder.path()), "--json"]);
    let value: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(value["last_eval"]["values"]["knn_top1"], 88.5);
}

/// What a run directory's files hold reaches a terminal as text.
#[test]
fn a_run_directory_steers_no_terminal() {
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path();
    let evil = "\x1b[2J\x07\u{9b}31m\x7f";
    run_of(run_dir, &[], "");
    let line = |value: Value| value.to_string() + "\n";
    let eval =
        serde_json::json!({ "kind": "eval", "step": 1, "knn_top1": 1, "protocol": evil, "data": evil });
    let restart = serde_json::json!({ "kind": "restart", "step": 1, "time": 1, "reason": evil });
    fs::write(run_dir.join("metrics.jsonl"), line(eval) + &line(restart)).expect("written");
    let status = serde_json::json!({
        "state": "failed", "name": evil, "host": evil, "pid": 1, "workers": 1, "generation": 0,
        "progress": { "phase": "done", "step": 1, "total_steps": 2, "epoch": 0, "epochs": 1, "loss": 1.0, "lr": 0.1, "z_std": 1.0,
            "images_per_s": 1.0 },
        "eta_s": null, "updated": 1.0, "exit_code": 1, "error": evil, "ranks": {},
    });
    fs::write(run_dir.join("status.json"), status.to_string()).expect("written");
    fs::create_dir(run_dir.join("logs")).expect("made");
    let event = serde_json::json!({ "timestamp": "2026-01-02T03:04:05Z", "level": "ERROR", "message": evil, "why": evil });
    fs::write(run_dir.join("logs/rank-00000.jsonl"), line(event) + evil + "\n").expect("written");
    let broken = run_dir.join("checkpoints/step-00000015");
    fs::create_dir_all(&broken).expect("made");
    fs::write(broken.join("manifest.json"), format!("{{\"format\":{evil:?}}}")).expect("written");
    for words in [
        &["status"][..],
        &["status", "--json"],
        &["logs"],
        &["logs", "--json"],
        &["checkpoints"],
        &["checkpoints", "--json"],
        &["monitor", "--once"],
    ] {
        let (code, out, err) = mentee(&[&words[..1], &[text(run_dir)], &words[1..]].concat());
        assert!(code == Some(0) || code == Some(4), "{words:?}: {err}");
        let steers = |letter: char| letter.is_control() && letter != '\n';
        assert!(!out.contains(steers) && !err.contains(steers), "{words:?}: {out:?} {err:?}");
        if matches!(words, ["status"] | ["logs"] | ["monitor", ..]) {
            assert!(out.contains("\\x1b[2J\\x07\\x9b31m\\x7f"), "{words:?}: {out}");
        }
    }
}

#[test]
fn a_monitor_ends_with_its_terminal() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("metrics.jsonl"), "").expect("written");
    let (mut ours, theirs) = terminal();
    let open = || theirs.try_clone().expect("a descriptor");
    let mut child = Command::new(env!("CARGO_BIN_EXE_mentee"))
        .args(["monitor", text(folder.path())])
        .env("TERM", "xterm")
        .stdin(open())
        .stdout(open())
        .stderr(open())
        .spawn()
        .expect("mentee starts");
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("quit") {
        let mut some = [0; 4096];
        let count = ours.read(&mut some).expect("it draws");
        seen.extend_from_slice(&some[..count]);
    }
    drop((ours, theirs));
    let since = Instant::now();
    while child.try_wait().expect("asked").is_none() {
        if since.elapsed() > Duration::from_secs(60) {
            child.kill().expect("killed");
            panic!("it goes on without a terminal");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn of_a_sweep_one_run_is_to_be_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let sweep = folder.path();
    fs::write(sweep.join("sweep.json"), "{\"job\":\"7\",\"variants\":[[\"a=1\"],[\"a=2\"]]}")
        .expect("written");
    for command in ["report", "monitor", "logs", "checkpoints"] {
        let (code, _, err) = mentee(&[command, text(sweep)]);
        assert_eq!(code, Some(2), "{command}: {err}");
        assert!(err.contains("is a sweep of 2 runs: name one, e.g. "), "{command}: {err}");
    }
}

#[test]
fn the_demo_ends_with_its_table_and_a_report_and_can_be_repeated() {
    let folder = tempfile::tempdir().expect("a folder");
    let built = Path::new(env!("CARGO_BIN_EXE_mentee"));
    put(built, &folder.path().join("mentee"));
    let fake = built.with_file_name("examples").join("fake-worker");
    put(&fake, &folder.path().join("mentee-worker"));
    let demo = |out: &str| {
        run(Command::new(folder.path().join("mentee")).current_dir(folder.path()).args([
            "demo",
            "--workers",
            "1",
            "--out",
            out,
        ]))
    };
    for attempt in 0..2 {
        let (code, out, err) = demo("a place");
        assert_eq!(code, Some(0), "{err}");
        for line in
            ["kNN top-1, trained        60.5 %", "kNN top-1, random init    40.0 %", "protocol: none: a fake"]
        {
            assert!(out.lines().any(|said| said == line), "{line} in {out}");
        }
        assert!(out.trim_end().ends_with("report.html"), "{out}");
        assert_eq!(out.contains("drew 4000 training"), attempt == 0, "{out}");
    }
    let page = fs::read_to_string(folder.path().join("a place/report.html")).expect("a report");
    assert!(page.contains("60.5 %") && page.contains("<svg"));
    let (code, out, _) = mentee(&[
        "report",
        text(&folder.path().join("a place")),
        "--out",
        text(&folder.path().join("x.html")),
    ]);
    assert_eq!((code, folder.path().join("x.html").is_file()), (Some(0), true), "{out}");
}

#[test]
fn doctor_says_what_is_wrong_and_ends_with_the_code_a_run_would() {
    let folder = tempfile::tempdir().expect("a folder");
    let alone = folder.path().join("mentee");
    put(Path::new(env!("CARGO_BIN_EXE_mentee")), &alone);
    let doctor = |more: &[&str]| {
        let run_dir = folder.path().join("runs/one");
        let mut command = Command::new(&alone);
        command.arg("doctor").args(more).arg("--run-dir").arg(run_dir).env("PATH", "/nowhere");
        run(&mut command)
    };
    // Data that is not there comes before the worker that is not there.
    let (code, out, err) = doctor(&["byol-cifar10-small", "--set", "data.path=\"/nowhere\""]);
    assert_eq!(code, Some(3), "{out}{err}");
    assert!(out.starts_with("FAULT data        "), "{out}");
    for well in ["ok    run ", "ok    port "] {
        assert!(out.lines().any(|line| line.starts_with(well)), "{well} in {out}");
    }
    assert!(out.lines().any(|line| line.starts_with("FAULT worker ") && line.contains("on PATH")), "{out}");
    assert!(!folder.path().join("runs").exists());

    let (code, out, _) = doctor(&["--json"]);
    assert_eq!(code, Some(1), "{out}");
    let findings: Value = serde_json::from_str(&out).expect("JSON");
    let parts: Vec<_> = findings.as_array().expect("a list").iter().map(|it| it["part"].clone()).collect();
    assert_eq!(parts, ["run", "files", "port", "worker"]);
    assert_eq!(findings[3]["level"], "fault");

    // A run that was started with a relative path is a run of the same recipe.
    let own = folder.path().join("runs/one");
    fs::create_dir_all(&own).expect("made");
    let sets = ["model.init=weights.safetensors".to_owned()];
    let mut recipe = mentee_config::Recipe::load("byol-cifar10-small", &sets).expect("a recipe");
    recipe.make_paths_absolute().expect("a current directory");
    fs::write(own.join("plan.toml"), recipe.to_toml()).expect("written");
    let (_, out, _) = doctor(&["byol-cifar10-small", "--set", &sets[0]]);
    assert!(out.lines().any(|line| line.starts_with("ok    run ") && line.contains("is resumed")), "{out}");

    assert_eq!(doctor(&["no-such-recipe"]).0, Some(2));
    assert_eq!(doctor(&["--set", "run.seed=1"]).0, Some(2));

    // What lies beside the data is looked at by both, and a run that lacks it writes nothing.
    let images = folder.path().join("images");
    fs::create_dir(&images).expect("made");
    for index in 0..3 {
        fs::write(images.join(format!("{index}.ppm")), b"P6 1 1 255\nabc").expect("written");
    }
    let data = format!("data.path={}", images.display());
    for (set, part, code) in
        [("model.init=/nowhere/a.safetensors", "weights", 2), ("eval.path=/nowhere/b", "eval", 3)]
    {
        let sets = ["byol-cifar10-small", "--set", &data, "--set", "schedule.global_batch=2", "--set", set];
        let (_, out, _) = doctor(&sets);
        let fault = format!("FAULT {part:<12}");
        assert!(out.lines().any(|line| line.starts_with(&fault) && line.contains("/nowhere")), "{out}");
        let run_dir = folder.path().join("runs/none");
        let mut command = Command::new(&alone);
        let (ended, _, err) = run(command.arg("run").args(sets).arg("--run-dir").arg(&run_dir));
        assert_eq!(ended, Some(code), "{err}");
        assert!(err.contains(set.split('=').next().expect("a key")) && err.contains("/nowhere"), "{err}");
        assert!(!run_dir.exists());
    }
}

#[test]
fn a_current_directory_that_was_removed_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let gone = folder.path().join("gone");
    for (arguments, expected) in [(&["run", "demo"][..], 2), (&["eval", "x"], 2), (&["man"], 0)] {
        fs::create_dir(&gone).expect("made");
        let mut command = Command::new("sh");
        command.args(["-c", "rmdir ../gone; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_mentee")]);
        let (code, _, err) = run(command.args(arguments).current_dir(&gone));
        assert_eq!(code, Some(expected), "{arguments:?}: {err}");
        let said = "error: the current directory was removed: change to one that is there\n";
        assert_eq!(err, if expected == 2 { said } else { "" }, "{arguments:?}");
    }
}

#[test]
fn a_run_directory_with_too_long_a_name_is_bad_usage() {
    let folder = tempfile::tempdir().expect("a folder");
    let deep = ["d"; 2000].join("/");
    for name in ["n".repeat(256), format!("new/{}", "n".repeat(256)), deep] {
        let (code, _, err) = mentee(&["run", "demo", "--run-dir", text(&folder.path().join(name))]);
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains("too long a name"), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

/// `ulimit -f` sends a signal that would end the program without a word, and a child keeps it.
#[test]
fn a_file_beyond_a_limit_on_its_size_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("pages");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_mentee"), "man", "--out"]);
    let (code, _, err) = run(command.arg(&out));
    assert_eq!(code, Some(1), "{err}");
    assert!(err.starts_with("error: cannot write ") && err.contains("File too large"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

#[test]
fn output_that_is_lost_is_an_error() {
    for words in [&["completions", "bash"][..], &["man"], &["--help"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
        let mut command = Command::new(env!("CARGO_BIN_EXE_mentee"));
        let ended = command.args(words).stdout(full).stderr(Stdio::null()).status().expect("it runs");
        assert_eq!(ended.code(), Some(1), "{words:?}");
    }
}
