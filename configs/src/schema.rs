//! Every key of a recipe: its type, its range, what it means, where its default comes from.
//!
//! Reading, range checks, suggestions, the hash and `docs/recipes.md` all follow this one table. Tests hold
//! it equal to the types in [`crate::recipe`].

use std::fmt;

use toml::Value;

/// One key.
pub(crate) struct Key {
    /// `section.key`.
    pub path: &'static str,
    pub kind: Kind,
    /// Whether the loss curve depends on it: such keys make up the recipe's hash.
    pub decides: Decides,
    pub unit: &'static str,
    pub meaning: &'static str,
    /// Where the default comes from.
    pub source: &'static str,
}

/// Whether a key decides the numbers of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decides {
    Yes,
    No,
}

/// The type of a value and its range.
pub(crate) enum Kind {
    /// Names files and folders, so no `/`, no control characters, no leading dot.
    Name,
    Path {
        may_be_empty: bool,
    },
    Switch,
    Choice(&'static [&'static str]),
    Count {
        min: i64,
        max: i64,
    },
    Real(Bounds),
    Reals {
        len: usize,
        each: Bounds,
        ordered: bool,
    },
}

/// An interval of real numbers; an infinite `max` stands for "and finite".
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    min: f64,
    max: f64,
    open_min: bool,
    open_max: bool,
}

/// A value that is not of a key's kind.
pub(crate) struct Mismatch {
    pub expected: String,
    /// What is there, and the nearest allowed word if there is one.
    pub found: String,
}

const fn closed(min: f64, max: f64) -> Bounds {
    Bounds { min, max, open_min: false, open_max: false }
}
const UNIT: Bounds = closed(0.0, 1.0);
const UNIT_OPEN_BELOW: Bounds = Bounds { open_min: true, ..UNIT };
const UNIT_OPEN_ABOVE: Bounds = Bounds { open_max: true, ..UNIT };
const SIGMA: Bounds = Bounds { max: 100.0, ..UNIT_OPEN_BELOW };
const POSITIVE: Bounds = Bounds { min: 0.0, max: f64::INFINITY, open_min: true, open_max: true };
/// Longer than any run, and within what clocks count.
const PATIENCE: Bounds = Bounds { max: 1e9, open_max: false, ..POSITIVE };
/// The same, or not at all.
const WAIT: Bounds = Bounds { open_min: false, ..PATIENCE };
const NOT_NEGATIVE: Bounds = Bounds { open_min: false, ..POSITIVE };
const ANY_COUNT: Kind = Kind::Count { min: 0, max: i64::MAX };
const POSITIVE_COUNT: Kind = Kind::Count { min: 1, max: i64::MAX };
const PROBABILITY: Kind = Kind::Real(UNIT);
/// Layers wider than any paper's by a factor of eight; a larger number is a slip of the keyboard.
const WIDTH: Kind = Kind::Count { min: 1, max: 65_536 };
/// More threads than a machine has cores is a slip of the keyboard too.
const THREADS: Kind = Kind::Count { min: 0, max: 4_096 };

const fn key(
    path: &'static str,
    kind: Kind,
    decides: Decides,
    unit: &'static str,
    meaning: &'static str,
    source: &'static str,
) -> Key {
    Key { path, kind, decides, unit, meaning, source }
}

const BYOL_CODE: &str = "BYOL: `byol/configs/byol.py`; SimSiam: `main_simsiam.py`";
const HEADS: &str = "BYOL: `byol/configs/byol.py`; SimSiam: `simsiam/builder.py`";
const VIEWS: &str = "the preset";

/// In the order of [`crate::recipe::Recipe`]'s fields.
#[rustfmt::skip]
pub(crate) const KEYS: &[Key] = &[
    key("run.name", Kind::Name, Decides::No, "",
        "names the run in logs and reports", "the recipe file's name"),
    key("run.seed", ANY_COUNT, Decides::Yes, "",
        "keys the initial weights, the order of samples and every augmentation", "`byol/configs/byol.py`"),
    key("run.log_every_steps", POSITIVE_COUNT, Decides::No, "steps",
        "one train line in `metrics.jsonl` every so many steps", "ours"),

    key("run.collapse_z_std", Kind::Real(NOT_NEGATIVE), Decides::No, "",
        "projections with a `z_std` below this for `collapse_steps` steps have collapsed; 1 is healthy, 0 a constant. Where \
         projectors end in a plain norm (`simsiam`, `mocov3`) a constant leaves up to f = 4 sqrt((1 - 4/B) / B) of B samples, and \
         the bound is f + this (1 - f); 0 = never",
        "arXiv:2011.10566, section 4.1"),
    key("run.collapse_steps", ANY_COUNT, Decides::No, "steps",
        "0 = off", "ours"),
    key("run.on_collapse", Kind::Choice(&["warn", "stop"]), Decides::No, "",
        "`stop` ends the run with exit code 6", "ours"),
    key("data.path", Kind::Path { may_be_empty: false }, Decides::No, "path",
        "training images; a folder with `train/` (and `test/`, `testing/`, `val/`, `valid/` or `validation/`) means that split; \
         relative to the current directory",
        ""),
    key("data.format", Kind::Choice(&["auto", "tar", "folder", "cifar", "idx"]), Decides::No, "",
        "how the images are stored; `auto` looks", "ours"),
    key("data.order", Kind::Choice(&["global", "windowed"]), Decides::Yes, "",
        "one permutation of all samples; or shards permuted and a window over them shuffled, for network file systems", "ours"),
    key("data.on_error", Kind::Choice(&["fail", "skip"]), Decides::No, "",
        "a damaged image ends the run; or is replaced (left out of an evaluation), the same on any number of ranks, and named \
         in the log", "ours"),
    key("data.max_skipped", ANY_COUNT, Decides::No, "images",
        "different damaged images that training skips from a start on, all ranks together, or an evaluation leaves out of bank or \
         queries, before it fails after all; ranks tell each other every `parallel.check_every_steps` and before checkpoints",
        "ours"),
    key("data.resident", Kind::Choice(&["auto", "always", "never"]), Decides::No, "",
        "a GPU holds all images, decoded, and makes the views itself, the same to the last bit; `auto`: once training waits for the \
         loader. Without effect on the processor",
        "ours"),
    key("data.resident_mib", POSITIVE_COUNT, Decides::No, "MiB",
        "a GPU's memory for that; sets that do not fit, or have a damaged image, stay with the loader", "ours"),

    key("views.preset", Kind::Choice(&["byol", "simsiam", "byol-cifar", "simsiam-cifar"]), Decides::No, "",
        "fills in the rest of `[views]` (and `model.stem`)", "the method"),
    key("views.definition", Kind::Choice(&["byol", "torchvision"]), Decides::Yes, "",
        "whose crop, jitter and blur", VIEWS),
    key("views.size", Kind::Count { min: 8, max: 2048 }, Decides::Yes, "pixels",
        "side of a view", VIEWS),
    key("views.resize", Kind::Choice(&["bicubic", "bilinear"]), Decides::Yes, "",
        "interpolation of the crop", VIEWS),
    key("views.crop_area",
        Kind::Reals { len: 2, each: UNIT_OPEN_BELOW, ordered: true },
        Decides::Yes, "fraction of the image",
        "range of the crop's area", VIEWS),
    key("views.crop_ratio",
        Kind::Reals { len: 2, each: closed(0.01, 100.0), ordered: true },
        Decides::Yes, "width / height",
        "range of the crop's shape, uniform in its logarithm", VIEWS),
    key("views.flip", PROBABILITY, Decides::Yes, "probability",
        "horizontal flip", VIEWS),
    key("views.jitter", PROBABILITY, Decides::Yes, "probability",
        "colours are jittered at all", VIEWS),
    key("views.brightness", Kind::Real(UNIT), Decides::Yes, "largest change",
        "`byol`: added, RGB in [0, 1]; `torchvision`: a factor's distance from 1", VIEWS),
    key("views.contrast", Kind::Real(UNIT), Decides::Yes, "largest change",
        "a factor's distance from 1", VIEWS),
    key("views.saturation", Kind::Real(UNIT), Decides::Yes, "largest change",
        "a factor's distance from 1", VIEWS),
    key("views.hue", Kind::Real(closed(0.0, 0.5)), Decides::Yes, "turns",
        "largest rotation of the hue", VIEWS),
    key("views.grayscale", PROBABILITY, Decides::Yes, "probability",
        "grayscale", VIEWS),
    key("views.blur", Kind::Reals { len: 2, each: UNIT, ordered: false }, Decides::Yes, "probability",
        "Gaussian blur, `[view 1, view 2]`", VIEWS),
    key("views.blur_sigma",
        Kind::Reals { len: 2, each: SIGMA, ordered: true },
        Decides::Yes, "pixels",
        "range of the blur's standard deviation", VIEWS),
    key("views.solarize", Kind::Reals { len: 2, each: UNIT, ordered: false }, Decides::Yes, "probability",
        "solarization (threshold 0.5), `[view 1, view 2]`", VIEWS),
    key("views.mean", Kind::Reals { len: 3, each: UNIT, ordered: false }, Decides::Yes, "RGB in [0, 1]",
        "subtracted per channel", VIEWS),
    key("views.std",
        Kind::Reals { len: 3, each: UNIT_OPEN_BELOW, ordered: false },
        Decides::Yes, "RGB in [0, 1]",
        "divided by per channel", VIEWS),

    key("model.backbone",
        Kind::Choice(&["resnet18", "resnet34", "resnet50", "resnet101", "resnet20"]),
        Decides::Yes, "",
        "the encoder", "both papers"),
    key("model.stem", Kind::Choice(&["imagenet", "cifar"]), Decides::Yes, "",
        "`imagenet`: 7x7 of stride 2 and max-pooling; `cifar`: 3x3 of stride 1",
        "the preset; `cifar` with `resnet20`"),
    key("model.zero_init_residual", Kind::Switch, Decides::Yes, "",
        "the last batch-norm weight of each residual block starts at zero",
        "both official codes (BYOL's paper ran without: `byol/README.md`)"),
    key("model.init", Kind::Path { may_be_empty: true }, Decides::Yes, "path",
        "a safetensors file with a backbone under torchvision's names, as `mentee export` writes it, to start from; \
         empty = random weights",
        "ours"),

    key("method.name", Kind::Choice(&["byol", "simsiam", "mocov3"]), Decides::Yes, "",
        "the method", ""),
    key("method.projector_layers", Kind::Count { min: 1, max: 8 }, Decides::Yes, "layers",
        "linear layers of the projector", HEADS),
    key("method.projector_hidden", WIDTH, Decides::Yes, "units",
        "width of the projector's hidden layers", HEADS),
    key("method.projector_out", WIDTH, Decides::Yes, "units",
        "width of a projection", HEADS),
    key("method.predictor_hidden", WIDTH, Decides::Yes, "units",
        "width of the predictor's hidden layer", HEADS),
    key("method.predictor", Kind::Switch, Decides::Yes, "",
        "off: the student's projection itself is compared with the teacher's", "both papers"),
    key("method.stop_gradient", Kind::Switch, Decides::Yes, "",
        "off: gradients flow into the target branch too; needs `teacher` = \"shared\"", "both papers"),
    key("method.teacher", Kind::Choice(&["ema", "shared", "copy-each-epoch"]), Decides::Yes, "",
        "what the student is compared with: its moving average, itself, or its copy from the start of the \
         epoch",
        "both papers"),
    key("method.tau_base", Kind::Real(UNIT), Decides::Yes, "",
        "momentum of an `ema` teacher at the first step", "`byol/configs/byol.py`, 100 and 300 epochs"),
    key("method.tau_schedule", Kind::Choice(&["cosine", "constant"]), Decides::Yes, "",
        "`cosine`: tau rises to 1 over the run", "arXiv:2006.07733, section 3.3"),
    key("method.fixed_predictor_lr", Kind::Switch, Decides::Yes, "",
        "the predictor keeps the peak learning rate",
        "`main_simsiam.py --fix-pred-lr`; false without a predictor"),
    key("method.temperature", Kind::Real(POSITIVE), Decides::Yes, "",
        "`mocov3`: similarities are divided by it", "`main_moco.py --moco-t`"),

    key("optimizer.name", Kind::Choice(&["lars", "sgd", "adamw"]), Decides::Yes, "",
        "the optimizer", BYOL_CODE),
    key("optimizer.base_lr", Kind::Real(POSITIVE), Decides::Yes, "per 256 samples",
        "learning rate; times `global_batch` / 256 it is the peak", BYOL_CODE),
    key("optimizer.momentum", Kind::Real(UNIT_OPEN_ABOVE), Decides::Yes, "",
        "of `lars` and `sgd`", BYOL_CODE),
    key("optimizer.weight_decay", Kind::Real(NOT_NEGATIVE), Decides::Yes, "",
        "added to the gradient times the weight (`adamw`: decoupled)", BYOL_CODE),
    key("optimizer.lars_eta", Kind::Real(POSITIVE), Decides::Yes, "",
        "trust coefficient of `lars`", "`byol/configs/byol.py`"),
    key("optimizer.exclude_bias_and_norm", Kind::Switch, Decides::Yes, "",
        "biases and norm parameters get no weight decay and no LARS adaptation", BYOL_CODE),
    key("optimizer.betas", Kind::Reals { len: 2, each: UNIT_OPEN_ABOVE, ordered: false }, Decides::Yes, "",
        "decay rates of `adamw`'s moments", "arXiv:1412.6980, algorithm 1"),
    key("optimizer.clip_norm", Kind::Real(NOT_NEGATIVE), Decides::Yes, "",
        "a mean gradient over the global batch that is longer than this, all parameters together, is scaled down to it; 0 = off",
        "`torch.nn.utils.clip_grad_norm_`; off in the codes of all methods here"),

    key("schedule.epochs", Kind::Count { min: 1, max: 1_000_000 }, Decides::Yes, "epochs",
        "length of the run", BYOL_CODE),
    key("schedule.global_batch", Kind::Count { min: 2, max: 1 << 24 }, Decides::Yes, "images",
        "images an update over all ranks; never changed by the number of ranks", BYOL_CODE),
    key("schedule.warmup_epochs", Kind::Real(NOT_NEGATIVE), Decides::Yes, "epochs",
        "the learning rate rises linearly from 0", BYOL_CODE),
    key("schedule.decay", Kind::Choice(&["cosine", "cosine-per-epoch", "constant"]), Decides::Yes, "",
        "after warm-up, to 0 at the end; moving every step or every epoch",
        "BYOL: `byol/utils/schedules.py`; SimSiam: `main_simsiam.py`"),
    key("schedule.max_steps", ANY_COUNT, Decides::No, "steps",
        "ends the run early, the schedules still span `epochs`; 0 = off", "ours"),

    key("parallel.device", Kind::Choice(&["auto", "cpu", "cuda"]), Decides::No, "",
        "where every rank computes; `auto`: on an NVIDIA device where there is one", "ours"),
    key("parallel.precision", Kind::Choice(&["f32", "bf16", "f64"]), Decides::Yes, "",
        "`bf16`: compute only, weights stay f32; `f64`: for exactness tests", "`main_simsiam.py`"),
    key("parallel.sync_batch_norm", Kind::Switch, Decides::Yes, "",
        "batch-norm statistics over the global batch, not each rank's share", "both official codes"),
    key("parallel.norm_statistics", Kind::Choice(&["batch", "running"]), Decides::Yes, "",
        "what batch norms normalise by in training: the batch's statistics, or the running ones, which then stay \
         as they are",
        "`torch.nn.BatchNorm2d` in train and in eval mode"),
    key("parallel.micro_batches", Kind::Count { min: 1, max: 1 << 16 }, Decides::Yes, "",
        "parts of the global batch worked on one after another for one update; batch norm sees one part at a time",
        "ours"),
    key("parallel.bucket_mib", Kind::Real(POSITIVE), Decides::No, "MiB",
        "gradients all-reduced at a time, while backward goes on; the first bucket has at most 1 MiB",
        "25 in `torch.nn.parallel.DistributedDataParallel`"),
    key("parallel.overlap_teacher", Kind::Switch, Decides::No, "",
        "on a GPU, the teacher's pass has a stream of its own beside the student's: the same numbers, more memory. \
         Without effect where batch norms sum over ranks, and on the processor",
        "ours"),
    key("parallel.check_every_steps", ANY_COUNT, Decides::No, "steps",
        "ranks compare digests of student and teacher; 0 = off", "ours"),
    key("parallel.check_collectives", Kind::Switch, Decides::No, "",
        "ranks compare every collective call before they make it: slower, for finding bugs", "ours"),
    key("parallel.timeout_s", Kind::Real(PATIENCE), Decides::No, "seconds",
        "how long a rank waits for the others in one collective call before the run is ended with an error; longer \
         than any one of them may take over a step, a checkpoint or an evaluation",
        "10 minutes in `torch.distributed`"),
    key("parallel.stall_s", Kind::Real(PATIENCE), Decides::No, "seconds",
        "when nothing goes on for so long the workers are started again from the last checkpoint; at least ten of \
         the longest recent steps, ten times as long at the start and in a checkpoint, thirty times in an \
         evaluation; a worker of which nothing is heard is given a quarter of it, at least 5",
        "ours"),
    key("parallel.threads", THREADS, Decides::No, "threads per rank",
        "compute; 0 = the cores this rank may use", "ours"),
    key("parallel.decode_threads", THREADS, Decides::No, "threads per rank",
        "decoding and augmentation; 0 = the cores this rank may use", "ours"),

    key("checkpoint.every_epochs", ANY_COUNT, Decides::No, "epochs",
        "0 = off; the end of a run and a preemption always write one", "ours"),
    key("checkpoint.every_steps", ANY_COUNT, Decides::No, "steps",
        "0 = off", "ours"),
    key("checkpoint.keep", ANY_COUNT, Decides::No, "checkpoints",
        "how many complete ones stay; 0 = all", "ours"),
    key("checkpoint.wait_for_room_s", Kind::Real(WAIT), Decides::No, "seconds",
        "how long the checkpoint at the end of a run is tried again while the disk or a quota is full; that before a stop as long \
         as the stop may take; any other is left out then",
        "ours"),

    key("eval.path", Kind::Path { may_be_empty: true }, Decides::No, "path",
        "labelled images to classify; empty = `test/`, `testing/`, `val/`, `valid/` or `validation/` beside the training split, \
         else a tenth of the training images; relative to the current directory",
        "ours"),
    key("eval.knn_every_epochs", ANY_COUNT, Decides::No, "epochs",
        "0 = off; otherwise also once at the end", "ours"),
    key("eval.knn_k", POSITIVE_COUNT, Decides::No, "neighbours",
        "how many vote", "arXiv:1805.01978, section 3.4"),
    key("eval.knn_temperature", Kind::Real(POSITIVE), Decides::No, "",
        "a vote weighs exp(cosine / temperature)", "lightly's benchmarks (arXiv:1805.01978 has 0.07)"),
    key("eval.knn_bank", ANY_COUNT, Decides::No, "images",
        "at most so many labelled training images in the bank; 0 = all", "ours"),
    key("eval.online_probe", Kind::Switch, Decides::No, "",
        "trains a linear classifier on the features of every step beside the encoder, which does not notice; its accuracy \
         is `online_top1` in `metrics.jsonl`",
        "ours; BYOL's code has one"),
];

impl Key {
    /// The part before the dot.
    pub fn section(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(section, _)| section)
    }

    /// The part after the dot.
    pub fn name(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, name)| name)
    }
}

/// The key of that path.
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// The section names, in order.
pub(crate) fn sections() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().map(Key::section).collect();
    sections.dedup();
    sections
}

/// What a user who wrote `section.name` (or `name` alone) may have meant.
pub(crate) fn suggest_key(section: &str, name: &str) -> String {
    let here: Vec<_> = KEYS.iter().filter(|key| key.section() == section).collect();
    if let Some(key) = KEYS.iter().find(|key| key.name() == name) {
        return format!("did you mean `{}`?", key.path);
    }
    if let Some(near) = nearest(name, here.iter().map(|key| key.name())) {
        return format!("did you mean `{near}`?");
    }
    // "lr" and "batch_size" are far from `base_lr` and `global_batch` in letters but share a word with them.
    let shares_a_word =
        |key: &&Key| name.split('_').any(|word| key.name().split('_').any(|other| other == word));
    if let Some(key) = here.iter().copied().find(shares_a_word) {
        return format!("did you mean `{}`?", key.name());
    }
    let elsewhere = nearest(name, KEYS.iter().map(Key::name))
        .and_then(|near| KEYS.iter().find(|key| key.name() == near))
        .or_else(|| KEYS.iter().find(shares_a_word));
    match elsewhere {
        Some(key) => format!("did you mean `{}`?", key.path),
        None if here.is_empty() => format!("the sections are {}", sections().join(", ")),
        None => {
            let names: Vec<_> = here.iter().map(|key| key.name()).collect();
            format!("[{section}] has {}", names.join(", "))
        }
    }
}

/// The section a user may have meant.
pub(crate) fn suggest_section(name: &str) -> String {
    match nearest(name, sections()) {
        Some(near) => format!("did you mean `[{near}]`?"),
        None => format!("the sections are {}", sections().join(", ")),
    }
}

/// The known word nearest to `word`, if it is near enough that it may be meant: a third of the letters may
/// differ.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let allowed = 1 + word.chars().count() / 3;
    known
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(&word, known), known))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, known)| *distance <= allowed && *distance < known.chars().count())
        .map(|(_, known)| known)
}

impl Kind {
    /// The value in the form the recipe holds it (whole numbers widened where a real one is meant).
    pub fn accept(&self, value: Value) -> Result<Value, Mismatch> {
        let mismatch = |value: &Value| Mismatch { expected: self.expected(), found: describe(value) };
        match (self, value) {
            (Kind::Name | Kind::Path { .. }, value @ Value::String(_)) => Ok(value),
            (Kind::Switch, value @ Value::Boolean(_)) => Ok(value),
            (Kind::Count { .. }, value @ Value::Integer(_)) => Ok(value),
            // What TOML reads as a whole number beyond 64 bits arrives as a real one.
            (Kind::Count { .. }, Value::Float(beyond))
                if beyond.abs() >= 2f64.powi(63) && beyond.is_finite() =>
            {
                let expected = "a whole number below 2^63".into();
                Err(Mismatch { expected, found: format!("{beyond:e}") })
            }
            (Kind::Real(_), value) => real(&value).ok_or_else(|| mismatch(&value)),
            (Kind::Choice(words), Value::String(word)) if words.contains(&word.as_str()) => {
                Ok(Value::String(word))
            }
            (Kind::Choice(words), value) => {
                let mut mismatch = mismatch(&value);
                if let Some(near) = value.as_str().and_then(|word| nearest(word, words.iter().copied())) {
                    mismatch.found += &format!(": did you mean \"{near}\"?");
                }
                Err(mismatch)
            }
            (Kind::Reals { len, .. }, Value::Array(items)) if items.len() == *len => {
                let reals: Option<Vec<_>> = items.iter().map(real).collect();
                reals.map(Value::Array).ok_or_else(|| mismatch(&Value::Array(items)))
            }
            (_, value) => Err(mismatch(&value)),
        }
    }

    /// What must be written, for an error: "a whole number".
    pub fn expected(&self) -> String {
        match self {
            Kind::Name | Kind::Path { .. } => "a string".into(),
            Kind::Switch => "true or false".into(),
            Kind::Choice(words) => {
                let words: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
                format!("one of {}", words.join(", "))
            }
            Kind::Count { .. } => "a whole number".into(),
            Kind::Real(_) => "a number".into(),
            Kind::Reals { len, .. } => format!("an array of {len} numbers"),
        }
    }

    /// The range, if the value is outside it: "in [0, 1]".
    pub fn refusal(&self, value: &Value) -> Option<String> {
        let fits = match (self, value) {
            (Kind::Name, Value::String(name)) => {
                !name.is_empty()
                    && !name.starts_with('.')
                    && !name.contains(|c: char| c == '/' || c.is_control())
            }
            (Kind::Path { may_be_empty }, Value::String(path)) => *may_be_empty || !path.is_empty(),
            (Kind::Count { min, max }, Value::Integer(count)) => (min..=max).contains(&count),
            (Kind::Real(bounds), Value::Float(real)) => bounds.contain(*real),
            (Kind::Reals { each, ordered, .. }, Value::Array(items)) => {
                let reals: Vec<f64> = items.iter().filter_map(Value::as_float).collect();
                reals.iter().all(|real| each.contain(*real)) && (!ordered || reals.is_sorted())
            }
            _ => true,
        };
        (!fits).then(|| self.range())
    }

    /// The range in words; empty where the type says it all.
    pub fn range(&self) -> String {
        match self {
            Kind::Name => "a name without `/`, control characters or a leading dot".into(),
            Kind::Path { may_be_empty: false } => "a path, not empty".into(),
            Kind::Path { may_be_empty: true } | Kind::Switch | Kind::Choice(_) => String::new(),
            Kind::Count { min, max: i64::MAX } => format!("at least {min}"),
            Kind::Count { min, max } => format!("in [{min}, {max}]"),
            Kind::Real(bounds) => bounds.to_string(),
            Kind::Reals { len, each, ordered } => {
                let order = if *ordered { ", the smaller one first" } else { "" };
                format!("{len} numbers {each}{order}")
            }
        }
    }
}

impl Bounds {
    /// Never true of a NaN.
    fn contain(&self, real: f64) -> bool {
        let above = if self.open_min { real > self.min } else { real >= self.min };
        let below = if self.open_max { real < self.max } else { real <= self.max };
        above && below
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.max.is_infinite() {
            let than = if self.open_min { "greater than" } else { "at least" };
            return write!(out, "{than} {} and finite", self.min);
        }
        let (left, right) = (if self.open_min { '(' } else { '[' }, if self.open_max { ')' } else { ']' });
        write!(out, "in {left}{}, {}{right}", self.min, self.max)
    }
}

/// `10` where a real number is meant is 10.0.
fn real(value: &Value) -> Option<Value> {
    match value {
        Value::Float(real) => Some(Value::Float(*real)),
        Value::Integer(whole) => Some(Value::Float(*whole as f64)),
        _ => None,
    }
}

/// A value for an error: its type and, where short, itself.
fn describe(value: &Value) -> String {
    match value {
        Value::String(_) => format!("the string {}", one_line(value)),
        Value::Integer(_) | Value::Float(_) => format!("the number {value}"),
        Value::Boolean(_) => value.to_string(),
        Value::Datetime(_) => format!("the date {value}"),
        Value::Array(items) => {
            format!("an array of {} value{}", items.len(), if items.len() == 1 { "" } else { "s" })
        }
        Value::Table(_) => "a table".into(),
    }
}

/// A value as TOML writes it, strings always on one line.
pub(crate) fn one_line(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        // Which TOML writes with all its zeros.
        Value::Float(real) if real.is_finite() && *real != 0.0 && !(1e-6..1e15).contains(&real.abs()) => {
            format!("{real:e}")
        }
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn the_table_has_the_keys_of_the_types_in_their_order() {
        let plan = Recipe::load("demo", &[]).unwrap().to_toml();
        let mut section = String::new();
        let mut paths = Vec::new();
        for line in plan.lines().filter(|line| !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = name.to_owned();
            } else if let Some((name, _)) = line.split_once(" = ") {
                paths.push(format!("{section}.{name}"));
            }
        }
        let known: Vec<_> = KEYS.iter().map(|key| key.path).collect();
        assert_eq!(paths, known);
    }

    #[test]
    fn every_value_that_the_table_allows_the_types_take() {
        let recipe = Recipe::load("demo", &[]).unwrap();
        for key in KEYS {
            let values = match &key.kind {
                Kind::Choice(words) => words.iter().map(|&word| Value::String(word.into())).collect(),
                Kind::Count { min, max } => vec![Value::Integer(*min), Value::Integer(*max)],
                Kind::Switch => vec![Value::Boolean(false), Value::Boolean(true)],
                _ => continue,
            };
            for value in values {
                let mut table = recipe.to_table().unwrap();
                table[key.section()][key.name()] = value.clone();
                let taken = Recipe::from_table(table)
                    .unwrap_or_else(|error| panic!("{} = {value}: {error}", key.path));
                assert_eq!(taken.to_table().unwrap()[key.section()][key.name()], value, "{}", key.path);
            }
        }
    }

    #[test]
    fn every_word_that_the_types_take_is_in_the_table() {
        for key in KEYS {
            let Kind::Choice(words) = &key.kind else { continue };
            let mut table = Recipe::load("demo", &[]).unwrap().to_table().unwrap();
            table[key.section()][key.name()] = Value::String("no such word".into());
            // serde lists the variants: unknown variant `no such word`, expected `a` or `b` / one of `a`,
            // `b`, `c`.
            let message = Recipe::from_table(table).unwrap_err().to_string();
            let (_, expected) = message.split_once("expected ").expect(&message);
            let mut variants: Vec<_> = expected.split('`').skip(1).step_by(2).take(words.len() + 1).collect();
            variants.retain(|variant| !variant.contains('.'));
            assert_eq!(variants, *words, "{}: {message}", key.path);
        }
    }

    #[test]
    fn bounds_exclude_what_they_say() {
        assert!(UNIT.contain(0.0) && UNIT.contain(1.0) && !UNIT.contain(-0.1) && !UNIT.contain(f64::NAN));
        assert!(!UNIT_OPEN_BELOW.contain(0.0) && UNIT_OPEN_BELOW.contain(1.0));
        assert!(UNIT_OPEN_ABOVE.contain(0.0) && !UNIT_OPEN_ABOVE.contain(1.0));
        assert!(!POSITIVE.contain(0.0) && POSITIVE.contain(1e300) && !POSITIVE.contain(f64::INFINITY));
        assert!(NOT_NEGATIVE.contain(0.0) && !NOT_NEGATIVE.contain(f64::INFINITY));
    }
}
