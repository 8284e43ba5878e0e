//! `mentee eval`: a checkpoint evaluated in a world of one.

use std::path::{Path, PathBuf};

use mentee_cluster::Identity;
use mentee_collectives::Single;
use mentee_commands::EvalArgs;
use mentee_config::{Recipe, complain, exit_code, show};
use mentee_data::open_training;
use tch::Tensor;

use super::Evaluator;
use super::probe::Linear;
use crate::error::WorkerError;
use crate::metrics::{self, EvalLine};
use crate::{affinity, dense, device, run_dir, snapshot};

/// Evaluates a checkpoint in a world of one.
pub fn command(args: &EvalArgs) -> Result<i32, WorkerError> {
    let is_named = args.checkpoint.parent().is_some_and(|parent| parent.ends_with("checkpoints"));
    let folder = if is_named || args.checkpoint.join("manifest.json").exists() {
        args.checkpoint.clone()
    } else {
        run_dir::checkpoints(&args.checkpoint)
    };
    let checkpoint = if folder == args.checkpoint {
        mentee_checkpoint::open(&folder)?
    } else {
        if !args.checkpoint.is_dir() {
            return Err(WorkerError::Usage(format!(
                "{}: no such folder: give a run directory, or one of its checkpoints",
                args.checkpoint.display()
            )));
        }
        let newest = mentee_checkpoint::newest(&folder)?
            .ok_or_else(|| WorkerError::NoCheckpoint(args.checkpoint.clone()))?;
        for (path, reason) in &newest.rejected {
            complain!("warning: {} is passed over: {reason}", path.display());
        }
        newest.checkpoint
    };
    if let Some(refusal) = args.features.as_deref().and_then(mentee_checkpoint::refusal_to_write) {
        return Err(WorkerError::Usage(refusal));
    }
    let mut recipe = recipe_of(&checkpoint.manifest.meta.plan_toml, &folder)?;
    let has_own_queries = !recipe.eval.path.as_os_str().is_empty();
    if let Some(data) = &args.data {
        recipe.data.path.clone_from(data);
        recipe.data.format = mentee_config::recipe::DataFormat::Auto;
        recipe.eval.path = PathBuf::new();
    }
    let cores = affinity::cores(&Single::new())?;
    let alone = Identity { rank: 0, world_size: 1, local_rank: 0, local_size: 1, source: "eval" };
    let device = device::of_recipe(&recipe, &alone)?;
    tch::set_num_threads(cores as i32);
    let train = open_training(&recipe).map_err(|error| error.with_key("--data"))?;
    let is_other = has_own_queries || train.digest() != checkpoint.manifest.meta.data_digest;
    let data = args.data.as_ref().filter(|_| is_other).map(|data| data.display().to_string());
    let mut evaluator = Evaluator::new(&recipe, train, cores, device)?;
    evaluator.warn = |what| complain!("warning: {what}");
    evaluator.warn_of_one_class();
    if !args.k.is_empty() {
        evaluator.k.clone_from(&args.k);
    }
    if !args.temperature.is_empty() {
        evaluator.temperature.clone_from(&args.temperature);
    }
    let linear = |bank: u64| args.linear.then(|| Linear::of(args, &recipe, bank)).transpose();
    // What cannot be asked for is refused before there is anything to wait for.
    linear(evaluator.bank.indices.len() as u64)?;
    let (method, mut state) = mentee_ssl::state::on(&recipe, device)?;
    snapshot::load(&mut state, None, &checkpoint.folder, checkpoint.load()?)?;
    let meta = &checkpoint.manifest.meta;
    let alone = Single::new();
    let trained = evaluator.features(&alone, &|images| Ok(state.features(&*method, images)?))?;
    if let Some(path) = &args.features {
        let parts = [("bank", &trained.bank), ("queries", &trained.queries)];
        let tensors = parts.iter().flat_map(|(name, part)| {
            let of = |what: &str, tensor: &Tensor| (format!("{name}.{what}"), tensor.shallow_clone());
            [of("features", &part.features), of("labels", &part.labels)]
        });
        dense::write(path, tensors)?;
    }
    let linear = linear(trained.bank.len() as u64)?; // without the damaged
    let mut line = EvalLine { data, ..EvalLine::new(meta.step, meta.epoch) };
    if args.knn || args.record || linear.is_none() {
        evaluator.add_knn(&alone, &trained, &mut line)?;
    }
    if let Some(how) = linear {
        evaluator.add_linear(&*method, &state, &trained, how, &mut line)?;
    }
    let text = serde_json::to_string(&line).map_err(|error| WorkerError::Failed(error.to_string()))?;
    if args.record {
        record(&checkpoint.folder, &text)?;
    }
    if args.json {
        show!("{text}");
    } else {
        print(&line);
    }
    Ok(exit_code::DONE)
}

/// Adds a line to the metrics of the run whose checkpoint lies in `folder`.
fn record(folder: &Path, line: &str) -> Result<(), WorkerError> {
    let folder = folder.canonicalize().map_err(WorkerError::io("find", folder))?;
    let metrics = folder.ancestors().nth(2).map(|run| run.join("metrics.jsonl"));
    let Some(metrics) = metrics.filter(|metrics| metrics.is_file()) else {
        return Err(WorkerError::Usage(format!(
            "{}: not within a run directory; leave out --record",
            folder.display()
        )));
    };
    metrics::append(&metrics, line)
}

/// The line as a table for people.
fn print(line: &EvalLine) {
    let step = format!("step {}", line.step);
    let table = |what: &str, rows: [Option<f64>; 3]| {
        if rows.iter().any(Option::is_some) {
            show!("features             {what}");
            for (name, value) in [step.as_str(), "random init", "raw pixels"].iter().zip(rows) {
                if let Some(value) = value {
                    show!("{name:<21}{value:>6.2} %");
                }
            }
        }
    };
    table("kNN top-1", [line.knn_top1, line.knn_random_init, line.knn_raw_pixels]);
    if !line.knn_grid.is_empty() {
        show!("     k       T   {step:>12}   random init   raw pixels");
        for point in &line.knn_grid {
            show!(
                "{:>6}{:>8}   {:>10.2} %{:>12.2} %{:>11.2} %",
                point.k,
                if point.temperature < 1e-3 {
                    format!("{:e}", point.temperature)
                } else {
                    point.temperature.to_string()
                },
                point.knn_top1,
                point.knn_random_init,
                point.knn_raw_pixels
            );
        }
    }
    table("linear top-1", [line.linear_top1, line.linear_random_init, line.linear_raw_pixels]);
    if let Some(rank) = line.effective_rank {
        show!("effective rank       {rank:>6.2}");
    }
    if let Some(data) = &line.data {
        show!("images of {data}");
    }
    for part in line.protocol.split(" | ") {
        show!("{part}");
    }
}

/// The recipe inside a checkpoint.
fn recipe_of(plan_toml: &str, folder: &Path) -> Result<Recipe, WorkerError> {
    Ok(Recipe::from_plan_text(plan_toml, &folder.join("manifest.json"))?)
}
