//! Golden losses: the first steps of small runs, kept in golden/losses. A change that is not meant to change numbers does not.
//!
//! In f64 and to 1e-9: machines round differently, and ten steps amplify that, but not to that size.
//! `BLESS=1 cargo test --release -p system-tests --test golden` writes them anew; CONTRIBUTING.md says when that is right.

use std::fmt::Write as _;
use std::fs;

use system_tests::process::{finish, worker};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::losses;
use system_tests::{machine, root, temp_dir};

const TOLERANCE: f64 = 1e-9;

fn check(name: &str, sets: &[(&str, &str)]) {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let mut recipe = TinyRecipe::new(&dir.path().join("images")).set("schedule.max_steps", "10");
    for (key, value) in sets {
        recipe = recipe.set(key, value);
    }
    let mut command = worker();
    command.arg(recipe.write(dir.path().join("tiny.toml"))).arg("--run-dir").arg(dir.path().join("run"));
    finish(command).expect(0);
    let now = losses(&dir.path().join("run"));
    assert_eq!(now.len(), 10);

    let file = root().join("tests/golden/losses").join(format!("{name}.txt"));
    if std::env::var_os("BLESS").is_some() {
        let mut text = String::from("# step, loss (f64)\n");
        for (step, loss) in &now {
            let _ = writeln!(text, "{step} {loss:.17e}");
        }
        fs::write(&file, text).expect("the golden file can be written");
        return;
    }
    let text =
        fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}; BLESS=1 writes it", file.display()));
    let golden: Vec<(u64, f64)> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (step, loss) = line.split_once(' ').expect("step and loss");
            (step.parse().expect("a step"), loss.parse().expect("a loss"))
        })
        .collect();
    let mut table = String::new();
    let mut same = golden.len() == now.len();
    for ((step, golden), loss) in golden.iter().zip(now.values()) {
        // A loss near zero (SimSiam) has the rounding of its terms, which are near one.
        let difference = (golden - loss).abs() / golden.abs().max(1.0);
        same &= difference <= TOLERANCE && now.contains_key(step);
        let _ = writeln!(table, "{step:4} {golden:.17e} {loss:.17e} {difference:9.1e}");
    }
    assert!(same, "{name}: the losses changed\nstep golden now relative difference\n{table}");
}

#[test]
fn byol() {
    check("byol", &[]);
}

#[test]
fn byol_with_lars_and_warmup() {
    check(
        "byol-lars",
        &[("optimizer.name", "\"lars\""), ("optimizer.base_lr", "2.0"), ("schedule.warmup_epochs", "1.0")],
    );
}

#[test]
fn simsiam() {
    check("simsiam", &[("method.name", "\"simsiam\""), ("views.preset", "\"simsiam-cifar\"")]);
}

#[test]
fn mocov3() {
    check("mocov3", &[("method.name", "\"mocov3\""), ("method.temperature", "0.2")]);
}

#[test]
fn resnet18_with_adamw() {
    check(
        "resnet18-adamw",
        &[
            ("model.backbone", "\"resnet18\""),
            ("schedule.global_batch", "4"),
            ("optimizer.name", "\"adamw\""),
            ("optimizer.base_lr", "0.1"),
        ],
    );
}
