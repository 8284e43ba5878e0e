//! The resolved recipe: every key has its value. This is what `plan.toml` holds and what the crates are handed.
//!
//! What a user writes may leave out any key; [`crate::file`] fills it in from the preset and the method.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A complete recipe. Everything that decides the loss curve is in here; nothing of the cluster is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub run: Run,
    pub data: Data,
    pub views: Views,
    pub model: Model,
    pub method: Method,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub parallel: Parallel,
    pub checkpoint: Checkpoint,
    pub eval: Eval,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Names the run in logs and reports.
    pub name: String,
    /// Keys the initial weights, the order of samples and every augmentation.
    pub seed: u64,
    /// One train line in `metrics.jsonl` every so many steps.
    pub log_every_steps: u64,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Training images: a folder of tar shards, an image folder, CIFAR binary or IDX files. When it holds a
    /// `train` folder (and `test` or `val`), that split is meant.
    pub path: PathBuf,
    pub format: DataFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    Auto,
    Tar,
    Folder,
    Cifar,
    Idx,
}

/// `[views]`: the augmentations; two views are drawn from every image. Arrays of two are `[view 1, view 2]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Views {
    pub preset: ViewPreset,
    /// Whose definitions of crop, jitter and blur are meant (they differ, see [`Definition`]).
    pub definition: Definition,
    /// Side of a view, pixels.
    pub size: u32,
    pub resize: Interpolation,
    /// Range of the crop's area as a fraction of the image.
    pub crop_area: [f64; 2],
    /// Range of the crop's width/height; drawn uniformly in its logarithm.
    pub crop_ratio: [f64; 2],
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Probability that colours are jittered at all.
    pub jitter: f64,
    pub brightness: f64,
    pub contrast: f64,
    pub saturation: f64,
    pub hue: f64,
    /// Probability of grayscale.
    pub grayscale: f64,
    /// Probability of a Gaussian blur, per view.
    pub blur: [f64; 2],
    /// Range of the blur's standard deviation, pixels.
    pub blur_sigma: [f64; 2],
    /// Probability of solarization (threshold 0.5), per view.
    pub solarize: [f64; 2],
    /// Per-channel mean of RGB in [0, 1], subtracted.
    pub mean: [f64; 3],
    /// Per-channel standard deviation, divided by.
    pub std: [f64; 3],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViewPreset {
    /// BYOL on ImageNet (arXiv:2006.07733, appendix B; `byol/utils/augmentations.py`).
    Byol,
    /// SimSiam on ImageNet (arXiv:2011.10566, section 3; `main_simsiam.py`).
    Simsiam,
    /// BYOL's set without blur for 32-pixel images.
    ByolCifar,
    /// SimSiam's set without blur for 32-pixel images (arXiv:2011.10566, appendix D).
    SimsiamCifar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Definition {
    /// DeepMind's code: crop clipped to the image (no retries), brightness added, contrast about each channel's mean,
    /// clip after each operation, 23-tap blur at 224 pixels (kernel side = size / 10).
    Byol,
    /// torchvision's: ten tries then a centre crop, brightness and contrast multiplied, Gaussian blur.
    Torchvision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    Bicubic,
    Bilinear,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub backbone: Backbone,
    pub stem: Stem,
    /// The last batch-norm weight of each residual block starts at zero.
    pub zero_init_residual: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backbone {
    Resnet18,
    Resnet34,
    Resnet50,
    Resnet101,
    /// The 16-32-64 network for 32-pixel images (arXiv:1512.03385, section 4.2).
    Resnet20,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7x7 convolution of stride 2, then max-pooling.
    Imagenet,
    /// 3x3 convolution of stride 1, no pooling.
    Cifar,
}

/// `[method]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    pub name: MethodName,
    pub projector_layers: u64,
    pub projector_hidden: u64,
    pub projector_out: u64,
    pub predictor_hidden: u64,
    /// Off: the student's projection itself is compared with the teacher's.
    pub predictor: bool,
    /// Off: gradients flow into the target branch too (only meaningful with a shared teacher).
    pub stop_gradient: bool,
    pub teacher: Teacher,
    /// The teacher's momentum at the first step.
    pub tau_base: f64,
    pub tau_schedule: TauSchedule,
    /// The predictor keeps the peak learning rate (SimSiam's `--fix-pred-lr`).
    pub fixed_predictor_lr: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    Byol,
    Simsiam,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Teacher {
    /// teacher ← tau·teacher + (1−tau)·student after every update.
    Ema,
    /// The student itself.
    Shared,
    /// A copy of the student taken at the start of every epoch.
    CopyEachEpoch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TauSchedule {
    /// tau = 1 − (1 − tau_base)·(cos(πk/K) + 1)/2 (arXiv:2006.07733, section 3.3).
    Cosine,
    Constant,
}

/// `[optimizer]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    pub name: OptimizerName,
    /// Learning rate per 256 samples of global batch.
    pub base_lr: f64,
    pub momentum: f64,
    pub weight_decay: f64,
    /// LARS trust coefficient.
    pub lars_eta: f64,
    /// Leaves biases and norm parameters out of weight decay (and of LARS adaptation).
    pub exclude_bias_and_norm: bool,
    /// AdamW's moment decay rates.
    pub betas: [f64; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    Lars,
    Sgd,
    Adamw,
}

/// `[schedule]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub epochs: u64,
    /// Samples per update over all ranks; never changed by the number of ranks.
    pub global_batch: u64,
    pub warmup_epochs: f64,
    pub decay: Decay,
    /// Ends the run after so many steps (the schedules still span `epochs`); 0 = off.
    pub max_steps: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Cosine to zero, moving every step.
    Cosine,
    /// Cosine to zero, moving once an epoch (SimSiam's code).
    CosinePerEpoch,
    Constant,
}

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    pub precision: Precision,
    /// Batch-norm statistics over the global batch rather than each rank's share.
    pub sync_batch_norm: bool,
    /// Compute threads per rank; 0 = the cores this rank may use.
    pub threads: u64,
    /// Decode threads per rank; 0 = the cores this rank may use.
    pub decode_threads: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    F32,
    /// bf16 compute; master weights, statistics and updates in f32.
    Bf16,
    /// For exactness tests.
    F64,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// 0 = off. The end of a run and a preemption always write one.
    pub every_epochs: u64,
    /// 0 = off.
    pub every_steps: u64,
    /// How many complete checkpoints stay.
    pub keep: u64,
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Labelled images to classify; empty = the `test` or `val` folder beside the training split, else a tenth of
    /// the training images, left out of the bank.
    pub path: PathBuf,
    /// 0 = off; otherwise also once at the end.
    pub knn_every_epochs: u64,
    /// Neighbours that vote.
    pub knn_k: u64,
    /// Votes weigh exp(cosine / temperature).
    pub knn_temperature: f64,
    /// At most so many labelled training images in the bank; 0 = all.
    pub knn_bank: u64,
}
