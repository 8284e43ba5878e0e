//! `mentee export`: the backbone of a checkpoint as a file that torchvision's or timm's networks load, with what one has to
//! know to use it. CIFAR's ResNet-20 is in neither library: its model card brings the class, of torchvision's blocks.
//!
//! ```text
//! FILE.safetensors   conv1.weight, bn1.weight, bn1.running_mean, …; no metadata, f32
//! FILE.json          architecture, input (size, mean, standard deviation, resize), scores with their protocols, origin
//! FILE.md            the same as a model card, with the lines of Python that load it and make its input
//! ```

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use mentee_checkpoint::{self as checkpoint, Checkpoint, Dtype, OwnedTensor};
use mentee_config::recipe::{Backbone, Precision, Stem};
use mentee_config::replace::write_atomically;
use mentee_config::{Recipe, complain, exit_code, show};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::printable::printable;
use crate::rundir::RunDir;

/// ResNet-20 (trainer/ssl/src/encoder/resnet.rs) under the names that both libraries give a ResNet.
const RESNET20: &str = r#"import torch
from safetensors.torch import load_file
from torchvision.models.resnet import BasicBlock

class ResNet20(torch.nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels wide (arXiv:1512.03385, section 4.2); 1x1 convolutions as shortcuts."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.layer1 = torch.nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
        self.layer2 = self.narrowed(16, 32)
        self.layer3 = self.narrowed(32, 64)

    @staticmethod
    def narrowed(before, width):
        shortcut = torch.nn.Sequential(torch.nn.Conv2d(before, width, 1, 2, bias=False), torch.nn.BatchNorm2d(width))
        return torch.nn.Sequential(BasicBlock(before, width, 2, shortcut), BasicBlock(width, width), BasicBlock(width, width))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

model = ResNet20()
"#;

/// Whose names the tensors get; those of ResNet-20, which neither library has, are the same in both.
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
#[command(after_help = "Examples:
  mentee export runs/try-3 --out backbone.safetensors
  mentee export runs/try-3/checkpoints/step-00001000 --layout torchvision --out backbone.safetensors")]
pub struct ExportArgs {
    /// A run directory (its newest checkpoint) or a checkpoint directory
    checkpoint: PathBuf,
    /// The library whose names the tensors get, and in which the model card loads them. Neither has a resnet20: its card
    /// brings the class
    #[arg(long, value_enum, default_value = "timm")]
    layout: Layout,
    /// Whose backbone
    #[arg(long, value_enum, default_value = "student")]
    network: Network,
    /// The file to write; FILE.json and FILE.md are written beside it, over those of an earlier export only
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// The checkpoint and, where it lies in a run directory, the run.
fn find(path: &Path) -> Result<(Checkpoint, Option<RunDir>), Failure> {
    if path.join(checkpoint::MANIFEST_NAME).is_file() {
        let run = path.canonicalize().ok().and_then(|path| RunDir::existing(path.parent()?.parent()?).ok());
        return Ok((checkpoint::open(path)?, run));
    }
    if path.parent().is_some_and(|parent| parent.ends_with("checkpoints")) {
        return Ok((checkpoint::open(path)?, None)); // says what it lacks
    }
    let run = RunDir::existing(path)?;
    let newest = checkpoint::newest(&run.checkpoints())?.ok_or_else(|| {
        let line = format!("{} holds no checkpoint yet: train on, or give another run", path.display());
        Failure { exit_code: exit_code::CHECKPOINT, line }
    })?;
    for (path, reason) in &newest.rejected {
        complain!("warning: passing over {}: {reason}", path.display());
    }
    Ok((newest.checkpoint, Some(run)))
}

/// `mentee export …`.
///
/// # Errors
/// [`Failure`] with exit code 2 for a path that is no run and an `--out` whose description would overwrite it or what is no
/// description, 4 where no checkpoint is usable.
pub fn command(args: &ExportArgs) -> Result<(), Failure> {
    let ending = args.out.extension().unwrap_or_default().to_ascii_lowercase();
    if ending == "json" || ending == "md" {
        return Err(Failure::usage(format!(
            "--out {}: the weights' description is written to that name; give FILE.safetensors",
            args.out.display()
        )));
    }
    if let Some(refusal) = checkpoint::refusal_to_write(&args.out) {
        return Err(Failure::usage(refusal));
    }
    let (json_file, card_file) = (beside(&args.out, ".json"), beside(&args.out, ".md"));
    refuse_other(&json_file, |text| {
        let described: Value = serde_json::from_str(text).unwrap_or_default();
        ["architecture", "layout", "input", "training"].iter().all(|key| !described[*key].is_null())
    })?;
    refuse_other(&card_file, |text| {
        let title = text.lines().next().unwrap_or_default();
        title.starts_with("# ") && title.ends_with(TITLE) && text.contains("\n## Origin\n")
    })?;
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
    put(&args.out, &safetensors::serialize(views, None).map_err(failed)?)?;

    let description = describe(args, &recipe, &found, run.as_ref())?;
    let text =
        serde_json::to_string_pretty(&description).map_err(|error| Failure::failed(error.to_string()))?;
    put(&json_file, (text + "\n").as_bytes())?;
    put(&card_file, card(args, &recipe, &description).as_bytes())?;
    show!(
        "{}: {} tensors of {} at step {}; how to load it stands in {}",
        args.out.display(),
        tensors.len(),
        description["architecture"].as_str().unwrap_or_default(),
        meta.step,
        card_file.display()
    );
    Ok(())
}

/// What a card's first line ends with.
const TITLE: &str = ", pretrained without labels";

/// `x.json` of `x.safetensors`, `v1.2.json` of `v1.2`.
fn beside(out: &Path, ending: &str) -> PathBuf {
    let name = out.file_name().unwrap_or_default();
    let stem = name.as_bytes().strip_suffix(b".safetensors").filter(|stem| !stem.is_empty());
    let mut name = stem.map_or(name, OsStr::from_bytes).to_owned();
    name.push(ending);
    out.with_file_name(name)
}

/// Refuses a file that is there and of which `is_description` does not hold.
fn refuse_other(path: &Path, is_description: impl Fn(&str) -> bool) -> Result<(), Failure> {
    if !path.is_file() || std::fs::read_to_string(path).is_ok_and(|text| is_description(&text)) {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{} would be overwritten and is no description of exported weights: give another --out",
        path.display()
    )))
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_atomically(path, bytes).map_err(|error| Failure::io("write", path, &error))
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
    let measured = |run: &RunDir| -> Result<Option<Value>, Failure> {
        let metrics = Metrics::read_without_steps(&run.metrics())?;
        Ok(metrics.eval_to_show(meta.step).map(|line| {
            let mut object = line.object.clone();
            object.retain(|key, _| !["kind", "time"].contains(&key.as_str()));
            Value::Object(object)
        }))
    };
    let (scores, why_no_scores) = match (args.network, run) {
        (Network::Teacher, _) => (None, Some("evaluations measure the student; this is its teacher")),
        (Network::Student, None) => {
            (None, Some("the checkpoint lies in no run directory, which would hold them"))
        }
        (Network::Student, Some(run)) => match measured(run)? {
            None => (None, Some("none were measured up to this step")),
            scores => (scores, None),
        },
    };
    Ok(json!({
        "architecture": recipe.model.backbone,
        "stem": recipe.model.stem,
        "layout": match args.layout { Layout::Torchvision => "torchvision", Layout::Timm => "timm" },
        "network": match args.network { Network::Student => "student", Network::Teacher => "teacher" },
        "input": {
            "size": views.size,
            "as_it_is": [views.size, views.size],
            "resize_shorter_side": mentee_data::eval::shorter_side(views.size.into()),
            "then": "centre crop",
            "interpolation": views.resize,
            "antialias": true,
            "mean": views.mean,
            "std": views.std,
            "channels": "RGB in [0, 1]",
            "padding": "zeros, kernel / 2",
        },
        "evaluated_in": recipe.parallel.precision,
        "scores": scores,
        "why_no_scores": why_no_scores,
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

/// Text of a run for Markdown: no mark-up of its own.
fn plain(text: &str) -> String {
    printable(text).chars().fold(String::new(), |mut plain, letter| {
        match letter {
            '&' => plain.push_str("&amp;"),
            '<' => plain.push_str("&lt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '~' => plain.extend(['\\', letter]),
            _ => plain.push(letter),
        }
        plain
    })
}

/// The same, set as code where that can hold it.
fn code(text: &str) -> String {
    let is_simple = !text.is_empty() && !text.contains(['`', '<', '&']) && printable(text) == text;
    if is_simple { format!("`{text}`") } else { plain(text) }
}

/// A string of Python, which takes all that JSON escapes.
fn python(text: &str) -> String {
    Value::from(text).to_string()
}

/// The input as evaluations make it of a file.
fn view(input: &Value) -> String {
    let (size, mean, std) = (&input["size"], &input["mean"], &input["std"]);
    let interpolation = input["interpolation"].as_str().unwrap_or_default().to_uppercase();
    format!(
        "from PIL import ImageOps\nfrom torchvision.transforms import functional\n\n\
         def view(image):\n    \
         \"\"\"What evaluations see of an image of Pillow: model(view(image)[None]).\"\"\"\n    \
         image = ImageOps.exif_transpose(image).convert(\"RGB\")\n    \
         if image.size != ({size}, {size}):\n        \
         image = functional.resize(image, {}, functional.InterpolationMode.{interpolation}, antialias=True)\n        \
         image = functional.center_crop(image, [{size}, {size}])\n    \
         return functional.normalize(functional.to_tensor(image), {mean}, {std})\n",
        input["resize_shorter_side"]
    )
}

/// The model card.
fn card(args: &ExportArgs, recipe: &Recipe, description: &Value) -> String {
    let (name, input) = (description["architecture"].as_str().unwrap_or_default(), &description["input"]);
    let file = args.out.file_name().unwrap_or_default().to_string_lossy();
    let mut text = format!(
        "# {name}{TITLE}\n\nThe {}'s backbone: {} by mentee {}, run {}, step {} (epoch {}).\n\n## Loading\n\n",
        description["network"].as_str().unwrap_or_default(),
        description["training"]["method"].as_str().unwrap_or_default(),
        plain(description["training"]["mentee_version"].as_str().unwrap_or_default()),
        code(&recipe.run.name),
        description["training"]["step"],
        description["training"]["epoch"],
    );
    let create = match (recipe.model.backbone, args.layout) {
        (Backbone::Resnet20, layout) => {
            text.push_str(match layout {
                Layout::Timm => "timm has no ResNet-20 for small images: this class, of the blocks of torchvision, which timm brings, holds it.\n\n",
                Layout::Torchvision => "torchvision has no ResNet-20 for small images: this class, of its blocks, holds it.\n\n",
            });
            RESNET20.to_owned()
        }
        (_, Layout::Timm) => format!(
            "import timm, torch\nfrom safetensors.torch import load_file\n\nmodel = timm.create_model(\"{name}\", num_classes=0)\n"
        ),
        (_, Layout::Torchvision) => format!(
            "import torch, torchvision\nfrom safetensors.torch import load_file\n\nmodel = torchvision.models.{name}()\nmodel.fc = torch.nn.Identity()\n"
        ),
    };
    text.push_str("```python\n");
    text.push_str(&create);
    if recipe.model.stem == Stem::Cifar && recipe.model.backbone != Backbone::Resnet20 {
        text.push_str(
            "# The stem for small images: 3x3, stride 1, no pooling.\n\
             model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)\n\
             model.maxpool = torch.nn.Identity()\n",
        );
    }
    let _ = write!(
        text,
        "model.load_state_dict(load_file({}), strict=True)\nmodel.eval()\n```\n\n## Input\n\nRGB in [0, 1]: an image of {size} x {size} as it is, \
         of any other the shorter side resized to {} ({}, antialiased) and the centre {size} x {size} cut out; then minus mean {} over standard \
         deviation {}.\n\n```python\n{}```\n\nOf images that are not resized these are the features that were evaluated, to 1e-5; of others \
         they differ by 3e-3 to 8e-3 in the mean, as no two programs resize alike.",
        python(&file),
        input["resize_shorter_side"],
        input["interpolation"].as_str().unwrap_or_default(),
        input["mean"],
        input["std"],
        view(input),
        size = input["size"],
    );
    if recipe.parallel.precision == Precision::Bf16 {
        text.push_str(" The run evaluated in bf16 and these weights are f32, which makes another 4e-3.");
    }
    text.push_str("\n\n## Scores\n\n");
    match &description["scores"] {
        Value::Null => {
            let _ = writeln!(text, "None: {}.", description["why_no_scores"].as_str().unwrap_or_default());
        }
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
                "\nAt step {}{}. {}",
                scores["step"],
                scores["data"].as_str().map_or(String::new(), |data| format!(", on {}", code(data))),
                plain(scores["protocol"].as_str().unwrap_or_default())
            );
        }
    }
    let _ = write!(
        text,
        "\n## Origin\n\nPlan hash {}, data digest {}, state digest {}.\n",
        code(description["training"]["plan_hash"].as_str().unwrap_or_default()),
        code(description["training"]["data_digest"].as_str().unwrap_or_default()),
        code(description["training"]["state_digest"].as_str().unwrap_or_default()),
    );
    text
}
