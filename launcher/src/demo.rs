//! `mentee demo`: the whole road in a few minutes. Draws an image set, trains BYOL on it, evaluates, reports.

use std::path::PathBuf;

use mentee_config::{Recipe, exit_code, say};
use mentee_data::shard::INDEX_FILE;
use mentee_data::synthetic::{CLASSES, SyntheticConfig, write_synthetic};

use crate::engine::Engine;
use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::progress::Counter;
use crate::rundir::RunDir;
use crate::supervise::STOP_GRACE;
use crate::{report, run};

/// `mentee demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Where images and run go; what is there already is used
    #[arg(long, default_value = "demo-run", value_name = "DIR")]
    pub out: PathBuf,
    /// Worker processes
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub workers: u32,
    /// Replaces a value of the demo's recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

/// `mentee demo [--out DIR] [--workers N]`. Images in `DIR/data`, the run in `DIR` itself.
///
/// # Errors
/// As `mentee run`.
pub fn command(args: &DemoArgs) -> Result<i32, Failure> {
    let data = args.out.join("data");
    let mut sets = vec![format!("data.path={}", toml_string(&data)?)];
    sets.extend_from_slice(&args.sets);
    // What is refused leaves nothing behind.
    let mut recipe = Recipe::load("demo", &sets)?;
    recipe.make_paths_absolute()?;
    RunDir::at(&args.out)?.check_recipe(&recipe)?;
    draw(&data)?;
    let ended = run::command(&run::RunArgs {
        recipe: "demo".into(),
        workers: args.workers,
        engine: Engine::Auto,
        run_dir: Some(args.out.clone()),
        max_restarts: 3,
        stop_grace: STOP_GRACE.as_secs(),
        sets,
        engine_args: Vec::new(),
        interface: None,
        metrics_address: None,
        requeue: false,
    })?;
    if ended.exit_code == exit_code::DONE {
        conclude(&ended.dir)?;
    }
    Ok(ended.exit_code)
}

/// A part appears whole or not at all, so what has an index need not be drawn again.
fn draw(data: &std::path::Path) -> Result<(), Failure> {
    let config = SyntheticConfig::default();
    if ["train", "test"].iter().all(|part| data.join(part).join(INDEX_FILE).is_file()) {
        return Ok(());
    }
    for part in ["train", "test"] {
        let part = data.join(part);
        // Of a demo that was ended between the two; what holds anything else is refused by the writer.
        if is_drawn(&part) {
            std::fs::remove_dir_all(&part).map_err(|error| Failure::io("replace", &part, &error))?;
        }
    }
    let mut counter = Counter::new("images");
    let written = write_synthetic(data, &config, &mut |done, total| counter.at(done, total));
    counter.finish();
    let [train, test] = written?;
    say!(
        "drew {} training and {} test images of patterns in {}; colour, place, scale and ground say nothing of the class",
        train.samples,
        test.samples,
        data.display()
    );
    Ok(())
}

/// Whether it holds the demo's shards: a set of its classes.
fn is_drawn(part: &std::path::Path) -> bool {
    let index = std::fs::read(part.join(INDEX_FILE)).unwrap_or_default();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap_or_default();
    index["classes"] == serde_json::json!(CLASSES)
}

/// As a TOML value, so that any path survives `--set`.
fn toml_string(path: &std::path::Path) -> Result<String, Failure> {
    let path =
        path.to_str().ok_or_else(|| Failure::usage(format!("--out {}: must be UTF-8", path.display())))?;
    // JSON's strings are TOML's.
    Ok(serde_json::json!(path).to_string())
}

fn conclude(dir: &RunDir) -> Result<(), Failure> {
    let metrics = Metrics::read_without_steps(&dir.metrics())?;
    say!("");
    if let Some(eval) = metrics.last_eval() {
        for line in eval.table() {
            say!("{line}");
        }
    }
    if let Some(z_std) = metrics.last_train().and_then(|train| train.number("z_std")) {
        say!("z_std {z_std:.2} (about 1 when healthy, 0 when collapsed)");
    }
    report::write(dir)?;
    say!("report: {}", dir.report().display());
    Ok(())
}
