//! `mentee export`: the backbone of a checkpoint as a file that torchvision or timm load, with what one has to know to
//! use it.
//!
//! ```text
//! FILE.safetensors   conv1.weight, bn1.weight, bn1.running_mean, …; no metadata, f32
//! FILE.json          architecture, input (size, mean, standard deviation, resize), scores with their protocols, origin
//! FILE.md            the same as a model card, with the lines of Python that load it
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mentee_checkpoint::{self as checkpoint, Checkpoint, Dtype, OwnedTensor};
use mentee_config::recipe::Stem;
use mentee_config::{Recipe, exit_code};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::rundir::RunDir;

/// Whose names the tensors get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// torchvision.models
    Torchvision,
    /// timm.create_model
    Timm,
}

/// Whose backbone it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// the one trained by gradient, which the papers evaluate
    Student,
    /// its slow moving copy
    Teacher,
}

/// `mentee export`
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// A run directory (its newest checkpoint) or a checkpoint directory
    checkpoint: PathBuf,
    /// The library whose names the tensors get
    #[arg(long, value_enum, default_value = "timm")]
    layout: Layout,
    /// Whose backbone
    #[arg(long, value_enum, default_value = "student")]
    network: Network,
    /// The file to write; FILE.json and FILE.md are written beside it
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// The checkpoint and, where it lies in a run directory, the run.
fn find(path: &Path) -> Result<(Checkpoint, Option<RunDir>), Failure> {
    if path.join(checkpoint::MANIFEST_NAME).is_file() {
        let run = path.canonicalize().ok().and_then(|path| RunDir::existing(path.parent()?.parent()?).ok());
        return Ok((checkpoint::open(path)?, run));
    }
    if path.parent().is_some_and(|parent| parent.ends_with("checkpoints")) && path.is_dir() {
        return Ok((checkpoint::open(path)?, None)); // says what it lacks
    }
    let run = RunDir::existing(path)?;
    let newest = checkpoint::newest(&run.checkpoints())?.ok_or_else(|| {
        let line = format!("{} holds no checkpoint yet: train on, or give another run", path.display());
        Failure { exit_code: exit_code::CHECKPOINT, line }
    })?;
    for (path, reason) in &newest.rejected {
        eprintln!("warning: passing over {}: {reason}", path.display());
    }
    Ok((newest.checkpoint, Some(run)))
}

/// `mentee export …`.
///
/// # Errors
/// [`Failure`] with exit code 2 for a path that is no run, 4 where no checkpoint is usable.
pub fn command(args: &ExportArgs) -> Result<(), Failure> {
    let (found, run) = find(&args.checkpoint)?;
    let meta = &found.manifest.meta;
    let recipe = Recipe::from_plan_text(&meta.plan_toml, &found.folder.join(checkpoint::MANIFEST_NAME))?;
    let prefix = match args.network {
        Network::Student => "student.backbone.",
        Network::Teacher => "teacher.backbone.",
    };
    let mut tensors = BTreeMap::new();
    for (name, tensor) in found.load()? {
        if let Some(name) = name.strip_prefix(prefix) {
            tensors.insert(name.to_owned(), (tensor.shape.clone(), f32_bytes(&tensor)));
        }
    }
    if tensors.is_empty() {
        return Err(Failure::usage(format!(
            "{}: this run has no teacher of its own (method.teacher = \"shared\"): use --network student",
            found.folder.display()
        )));
    }
    // Both libraries keep a count of batches beside running statistics; it has no part in inference.
    let counts: Vec<String> = tensors
        .keys()
        .filter_map(|name| Some(format!("{}.num_batches_tracked", name.strip_suffix(".running_mean")?)))
        .collect();
    let batches = (2 * meta.step).to_le_bytes();
    let mut views = Vec::new();
    for (name, (shape, bytes)) in &tensors {
        views.push((name.clone(), TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes)));
    }
    for name in counts {
        views.push((name, TensorView::new(safetensors::Dtype::I64, Vec::new(), &batches)));
    }
    let failed = |error: safetensors::SafeTensorError| {
        Failure::failed(format!("cannot write {}: {error}", args.out.display()))
    };
    let views = views
        .into_iter()
        .map(|(name, view)| Ok((name, view?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    safetensors::serialize_to_file(views, None, &args.out).map_err(failed)?;

    let description = describe(args, &recipe, &found, run.as_ref())?;
    let text =
        serde_json::to_string_pretty(&description).map_err(|error| Failure::failed(error.to_string()))?;
    put(&args.out.with_extension("json"), &(text + "\n"))?;
    put(&args.out.with_extension("md"), &card(args, &recipe, &description))?;
    println!(
        "{}: {} tensors of {} at step {}; how to load it stands in {}",
        args.out.display(),
        tensors.len(),
        description["architecture"].as_str().unwrap_or_default(),
        meta.step,
        args.out.with_extension("md").display()
    );
    Ok(())
}

fn put(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| Failure::io("write", path, &error))
}

fn f32_bytes(tensor: &OwnedTensor) -> Vec<u8> {
    match tensor.dtype {
        Dtype::F64 => tensor
            .bytes()
            .chunks_exact(8)
            .flat_map(|value| {
                let value = f64::from_le_bytes(std::array::from_fn(|i| value[i]));
                (value as f32).to_le_bytes()
            })
            .collect(),
        _ => tensor.bytes().to_vec(),
    }
}

fn describe(
    args: &ExportArgs,
    recipe: &Recipe,
    found: &Checkpoint,
    run: Option<&RunDir>,
) -> Result<Value, Failure> {
    let (meta, views) = (&found.manifest.meta, &recipe.views);
    let scores = match run {
        Some(run) => {
            Metrics::read(&run.metrics())?.eval().filter(|line| line.step <= meta.step).last().map(|line| {
                let mut object = line.object.clone();
                object.retain(|key, _| !["kind", "time"].contains(&key.as_str()));
                Value::Object(object)
            })
        }
        None => None,
    };
    Ok(json!({
        "architecture": recipe.model.backbone,
        "stem": recipe.model.stem,
        "layout": match args.layout { Layout::Torchvision => "torchvision", Layout::Timm => "timm" },
        "network": match args.network { Network::Student => "student", Network::Teacher => "teacher" },
        "input": {
            "size": views.size,
            "resize_shorter_side": mentee_data::eval::shorter_side(views.size.into()),
            "then": "centre crop",
            "interpolation": views.resize,
            "antialias": true,
            "mean": views.mean,
            "std": views.std,
            "channels": "RGB in [0, 1]",
            "padding": "zeros, kernel / 2",
        },
        "scores": scores,
        "training": {
            "run": recipe.run.name,
            "method": recipe.method.name,
            "step": meta.step,
            "epoch": meta.epoch,
            "world_size": meta.world_size,
            "plan_hash": meta.plan_hash,
            "data_digest": meta.data_digest,
            "state_digest": found.manifest.state_digest,
            "mentee_version": meta.mentee_version,
        },
    }))
}

/// The model card.
fn card(args: &ExportArgs, recipe: &Recipe, description: &Value) -> String {
    let (name, input) = (description["architecture"].as_str().unwrap_or_default(), &description["input"]);
    let file = args.out.file_name().unwrap_or_default().to_string_lossy();
    let mut text = format!(
        "# {name}, pretrained without labels\n\n{} by mentee {}, run `{}`, step {} (epoch {}).\n\n## Loading\n\n```python\n",
        description["training"]["method"].as_str().unwrap_or_default(),
        description["training"]["mentee_version"].as_str().unwrap_or_default(),
        recipe.run.name,
        description["training"]["step"],
        description["training"]["epoch"],
    );
    let create = match args.layout {
        Layout::Timm => format!(
            "import timm, torch\nfrom safetensors.torch import load_file\n\nmodel = timm.create_model(\"{name}\", num_classes=0)\n"
        ),
        Layout::Torchvision => format!(
            "import torch, torchvision\nfrom safetensors.torch import load_file\n\nmodel = torchvision.models.{name}()\nmodel.fc = torch.nn.Identity()\n"
        ),
    };
    text.push_str(&create);
    if recipe.model.stem == Stem::Cifar {
        text.push_str(
            "# The stem for small images: 3x3, stride 1, no pooling.\n\
             model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)\n\
             model.maxpool = torch.nn.Identity()\n",
        );
    }
    let _ = write!(
        text,
        "model.load_state_dict(load_file(\"{file}\"))\nmodel.eval()\n```\n\n## Input\n\nRGB in [0, 1], the shorter side resized to {} ({}, \
         antialiased), the centre {} x {} cut out, then minus mean {} over standard deviation {}.\n\n## Scores\n\n",
        input["resize_shorter_side"],
        input["interpolation"].as_str().unwrap_or_default(),
        input["size"],
        input["size"],
        input["mean"],
        input["std"],
    );
    match &description["scores"] {
        Value::Null => text.push_str("None were measured.\n"),
        scores => {
            text.push_str("| measure | percent |\n|---|---|\n");
            for (name, key) in [
                ("kNN top-1", "knn_top1"),
                ("kNN top-1 of the same network at random", "knn_random_init"),
                ("kNN top-1 of raw pixels", "knn_raw_pixels"),
                ("linear top-1", "linear_top1"),
                ("linear top-1 of the same network at random", "linear_random_init"),
                ("linear top-1 of raw pixels", "linear_raw_pixels"),
            ] {
                if let Some(score) = scores[key].as_f64() {
                    let _ = writeln!(text, "| {name} | {score:.1} |");
                }
            }
            let _ = writeln!(
                text,
                "\nAt step {}. {}",
                scores["step"],
                scores["protocol"].as_str().unwrap_or_default()
            );
        }
    }
    let _ = write!(
        text,
        "\n## Origin\n\nPlan hash `{}`, data digest `{}`, state digest `{}`.\n",
        description["training"]["plan_hash"].as_str().unwrap_or_default(),
        description["training"]["data_digest"].as_str().unwrap_or_default(),
        description["training"]["state_digest"].as_str().unwrap_or_default(),
    );
    text
}
