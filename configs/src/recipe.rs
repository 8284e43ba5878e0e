//! The resolved recipe: every key has its value. This is what `plan.toml` holds and what the crates are
//! handed.
//!
//! What a user writes may leave out any key that has a default; [`Recipe::load`] fills it in from the preset
//! and the method. `docs/recipes.md` lists every key with its default, unit and source.
//!
//! "BYOL's code" is google-deepmind/deepmind-research `byol/`, "SimSiam's" is facebookresearch/simsiam.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A complete recipe. Everything that decides the loss curve is in here; nothing of the cluster is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// `[run]`: name, seed, logging.
    pub run: Run,
    /// `[data]`: where the training images are.
    pub data: Data,
    /// `[views]`: the augmentations.
    pub views: Views,
    /// `[model]`: the encoder.
    pub model: Model,
    /// `[method]`: heads, teacher, and which asymmetries are on.
    pub method: Method,
    /// `[optimizer]`: the update.
    pub optimizer: Optimizer,
    /// `[schedule]`: length, batch, learning-rate curve.
    pub schedule: Schedule,
    /// `[parallel]`: precision, batch-norm statistics, threads.
    pub parallel: Parallel,
    /// `[checkpoint]`: how often, how many.
    pub checkpoint: Checkpoint,
    /// `[eval]`: kNN on frozen features.
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
    /// Collapsed: `z_std` below this for `collapse_steps` steps on end.
    pub collapse_z_std: f64,
    /// See `collapse_z_std`; 0 = off.
    pub collapse_steps: u64,
    /// What happens then.
    pub on_collapse: OnCollapse,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Training images: a folder of tar shards, an image folder, CIFAR binary or IDX files. When it holds a
    /// `train` folder (and `test`, `testing`, `val`, `valid` or `validation`), that split is meant.
    ///
    /// Relative to the current directory of the command, not to the recipe.
    pub path: PathBuf,
    /// How the images are stored.
    pub format: DataFormat,
    /// How an epoch's order is drawn.
    pub order: DataOrder,
    /// What a damaged image does.
    pub on_error: OnDataError,
    /// Different damaged images that [`OnDataError::Skip`] passes over, in one process, before it fails after all; or that all
    /// processes together leave out of an evaluation's bank, or of its queries.
    pub max_skipped: u64,
    /// Whether a device holds the images.
    pub resident: Resident,
    /// Device memory for that.
    pub resident_mib: u64,
}

/// Whether a device holds all images, decoded, and makes the views of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resident {
    /// When training waits for the loader.
    Auto,
    /// As soon as they are decoded.
    Always,
    /// The loader makes all views.
    Never,
}

/// How the samples of an epoch are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataOrder {
    /// One permutation of all samples.
    Global,
    /// Shards in random order, samples in random order within a window that moves over them: reads stay in a few shards
    /// at a time, for network file systems.
    Windowed,
}

/// What a damaged image does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDataError {
    /// Ends the run, naming it.
    Fail,
    /// Is replaced by another image, the same one on any number of ranks, and named in the log. An evaluation leaves it out.
    Skip,
}

/// How images are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Looks at what is in the folder.
    Auto,
    /// Tar shards, WebDataset naming.
    Tar,
    /// A folder of images; sub-folders are classes.
    Folder,
    /// CIFAR-10 or CIFAR-100, binary version.
    Cifar,
    /// IDX files as of MNIST and Fashion-MNIST, `.gz` too.
    Idx,
}

/// `[views]`: the augmentations; two views are drawn from every image. Arrays of two are `[view 1, view 2]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Views {
    /// Filled in the keys below that the recipe left out.
    pub preset: ViewPreset,
    /// Whose definitions of crop, jitter and blur are meant (they differ, see [`Definition`]).
    pub definition: Definition,
    /// Side of a view, pixels.
    pub size: u32,
    /// Interpolation of the crop to `size`.
    pub resize: Interpolation,
    /// Range of the crop's area as a fraction of the image.
    pub crop_area: [f64; 2],
    /// Range of the crop's width/height; drawn uniformly in its logarithm.
    pub crop_ratio: [f64; 2],
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Probability that colours are jittered at all.
    pub jitter: f64,
    /// Largest change of brightness: added to RGB in [0, 1] by [`Definition::Byol`], a factor's distance from
    /// 1 by [`Definition::Torchvision`].
    pub brightness: f64,
    /// Largest change of contrast, a factor's distance from 1.
    pub contrast: f64,
    /// Largest change of saturation, a factor's distance from 1.
    pub saturation: f64,
    /// Largest rotation of the hue, in turns (0.5 = any hue).
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

/// A published set of augmentations.
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

/// Whose definitions of crop, jitter and blur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Definition {
    /// DeepMind's code: crop clipped to the image (no retries), brightness added, contrast about each
    /// channel's mean, clip after each operation, 23-tap blur at 224 pixels (kernel side = size / 10).
    Byol,
    /// torchvision's: ten tries then a centre crop, brightness and contrast multiplied, Gaussian blur.
    Torchvision,
}

/// How pixels between pixels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// Of BYOL.
    Bicubic,
    /// Of SimSiam (torchvision's default).
    Bilinear,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The residual network.
    pub backbone: Backbone,
    /// Its first layers.
    pub stem: Stem,
    /// The last batch-norm weight of each residual block starts at zero.
    pub zero_init_residual: bool,
    /// A safetensors file with the backbone's weights under torchvision's names, to start from; empty = random.
    pub init: PathBuf,
}

/// Residual networks (arXiv:1512.03385) with torchvision's parameter names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backbone {
    /// Basic blocks, 2-2-2-2, 512 features.
    Resnet18,
    /// Basic blocks, 3-4-6-3, 512 features.
    Resnet34,
    /// Bottleneck blocks, 3-4-6-3, 2048 features.
    Resnet50,
    /// Bottleneck blocks, 3-4-23-3, 2048 features.
    Resnet101,
    /// The 16-32-64 network for 32-pixel images (arXiv:1512.03385, section 4.2).
    Resnet20,
}

/// The first layers of the backbone.
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
    /// Which method.
    pub name: MethodName,
    /// Linear layers of the projector (2 in BYOL, 3 in SimSiam on ImageNet).
    pub projector_layers: u64,
    /// Width of the projector's hidden layers.
    pub projector_hidden: u64,
    /// Width of a projection, and of a prediction.
    pub projector_out: u64,
    /// Width of the predictor's hidden layer.
    pub predictor_hidden: u64,
    /// Off: the student's projection itself is compared with the teacher's.
    pub predictor: bool,
    /// Off: gradients flow into the target branch too (only meaningful with a shared teacher).
    pub stop_gradient: bool,
    /// What the student is compared with.
    pub teacher: Teacher,
    /// The teacher's momentum at the first step.
    pub tau_base: f64,
    /// How the teacher's momentum goes from `tau_base`.
    pub tau_schedule: TauSchedule,
    /// The predictor keeps the peak learning rate (SimSiam's `--fix-pred-lr`).
    pub fixed_predictor_lr: bool,
    /// MoCo v3 divides similarities by it.
    pub temperature: f64,
}

/// A way of learning without labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// arXiv:2006.07733.
    Byol,
    /// arXiv:2011.10566.
    Simsiam,
    /// arXiv:2104.02057.
    Mocov3,
}

/// The branch that gives the targets.
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

/// The teacher's momentum over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TauSchedule {
    /// tau = 1 − (1 − tau_base)·(cos(πk/K) + 1)/2 (arXiv:2006.07733, section 3.3).
    Cosine,
    /// tau stays at `tau_base`.
    Constant,
}

/// `[optimizer]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Which update rule.
    pub name: OptimizerName,
    /// Learning rate per 256 samples of global batch.
    pub base_lr: f64,
    /// Of LARS and SGD.
    pub momentum: f64,
    /// Times the weight, added to the gradient (AdamW: decoupled).
    pub weight_decay: f64,
    /// LARS trust coefficient.
    pub lars_eta: f64,
    /// Leaves biases and norm parameters out of weight decay (and of LARS adaptation).
    pub exclude_bias_and_norm: bool,
    /// AdamW's moment decay rates.
    pub betas: [f64; 2],
    /// The longest that the gradient of all parameters together may be; 0 = any.
    pub clip_norm: f64,
}

/// An update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Layer-wise adaptive rates in the |g + wd·p| form of BYOL's code (`byol/utils/optimizers.py`).
    Lars,
    /// Stochastic gradient descent with momentum, as torch's (no Nesterov, no dampening).
    Sgd,
    /// arXiv:1711.05101.
    Adamw,
}

/// `[schedule]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Length of the run.
    pub epochs: u64,
    /// Samples per update over all ranks; never changed by the number of ranks.
    pub global_batch: u64,
    /// The learning rate rises linearly from 0 over so many epochs.
    pub warmup_epochs: f64,
    /// The learning rate after warm-up.
    pub decay: Decay,
    /// Ends the run after so many steps (the schedules still span `epochs`); 0 = off.
    pub max_steps: u64,
}

/// The learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Cosine to zero, moving every step.
    Cosine,
    /// Cosine to zero, moving once an epoch (SimSiam's code).
    CosinePerEpoch,
    /// The peak learning rate throughout.
    Constant,
}

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Where every rank computes.
    pub device: Device,
    /// What the network is computed in.
    pub precision: Precision,
    /// Batch-norm statistics over the global batch rather than each rank's share.
    pub sync_batch_norm: bool,
    /// What batch norms normalise by while training.
    pub norm_statistics: NormStatistics,
    /// Parts a rank's share of the batch is worked on in, one after another, for one update.
    pub micro_batches: u64,
    /// Size of a gradient bucket, which is all-reduced while backward goes on.
    pub bucket_mib: f64,
    /// On a device, the teacher's pass has a stream of its own beside the student's.
    pub overlap_teacher: bool,
    /// Every so many steps the ranks compare digests of student and teacher; 0 = off.
    pub check_every_steps: u64,
    /// Ranks compare every collective call before they make it.
    pub check_collectives: bool,
    /// Seconds a rank waits for the others in one collective call before it gives up.
    pub timeout_s: f64,
    /// Seconds without any progress after which the run is started again, see the schema; longer where steps are slow.
    pub stall_s: f64,
    /// Compute threads per rank; 0 = the cores this rank may use.
    pub threads: u64,
    /// Decode threads per rank; 0 = the cores this rank may use.
    pub decode_threads: u64,
}

/// Where a rank computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// On an NVIDIA device where there is one that libtorch can use, else on the processor.
    Auto,
    /// On the processor.
    Cpu,
    /// On an NVIDIA device; an error where there is none.
    Cuda,
}

/// What the network is computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in f32.
    F32,
    /// bf16 compute; master weights, statistics and updates in f32.
    Bf16,
    /// For exactness tests.
    F64,
}

/// What happens to a run that collapsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCollapse {
    /// The log says so.
    Warn,
    /// The run ends with the exit code of a diverged one.
    Stop,
}

/// What a batch norm normalises by while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormStatistics {
    /// Mean and variance of the batch, view by view; the running ones follow.
    Batch,
    /// The running statistics, which stay as they are.
    Running,
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
    /// How long the last checkpoint waits for room on a full disk, in seconds.
    pub wait_for_room_s: f64,
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Labelled images to classify; empty = the `test`, `testing`, `val`, `valid` or `validation` folder beside the training split,
    /// else a tenth of the training images, left out of the bank. Relative to the current directory.
    pub path: PathBuf,
    /// 0 = off; otherwise also once at the end.
    pub knn_every_epochs: u64,
    /// Neighbours that vote.
    pub knn_k: u64,
    /// Votes weigh exp(cosine / temperature).
    pub knn_temperature: f64,
    /// At most so many labelled training images in the bank; 0 = all.
    pub knn_bank: u64,
    /// Trains a linear classifier on the features of every step beside the encoder, which does not notice.
    pub online_probe: bool,
}
