//! Evaluation of frozen features: how well the labels of test images follow from those of their nearest
//! training images, always beside the same measure on features nobody trained.

mod knn;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mentee_collectives::{Collectives, Single};
use mentee_config::{Recipe, exit_code};
use mentee_data::eval::{EvalOptions, eval_images};
use mentee_data::{Source, Split, open, open_split};
use mentee_ssl::{Method, State};
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::metrics::{self, EvalLine};
use crate::{affinity, checkpoints};

/// Images in a forward pass.
const BATCH: usize = 250;
/// `mentee-worker eval`
#[derive(clap::Args)]
pub struct EvalArgs {
    /// A run directory (its newest checkpoint) or a checkpoint directory.
    checkpoint: PathBuf,
    /// Labelled images: a data set with `train` and `test` (or `val`) parts, or only the images to classify
    /// [default: the recipe's].
    #[arg(long)]
    data: Option<PathBuf>,
    /// Weighted k-nearest-neighbour classification (the default).
    #[arg(long)]
    knn: bool,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// The images of an evaluation and what it has to beat.
pub struct Evaluator {
    recipe: Recipe,
    bank: Part,
    queries: Part,
    num_classes: i64,
    /// How bank and queries were chosen, for the protocol.
    split: String,
    threads: usize,
    /// kNN on random-init features and on raw pixels, percent; measured once.
    floors: Option<(f64, f64)>,
}

struct Part {
    source: Arc<dyn Source>,
    indices: Vec<u64>,
}

impl Part {
    fn all(source: Arc<dyn Source>) -> Self {
        let indices = (0..source.len()).collect();
        Self { source, indices }
    }

    /// At most `limit` images, evenly spread; 0 = all.
    fn at_most(mut self, limit: u64) -> Self {
        let len = self.indices.len() as u64;
        if limit > 0 && limit < len {
            self.indices = (0..limit).map(|i| self.indices[(i * len / limit) as usize]).collect();
        }
        self
    }

    /// This rank's images, contiguous, so that all ranks' parts follow each other in order.
    fn share(&self, collectives: &dyn Collectives) -> Self {
        let range = mentee_config::plan::share(
            self.indices.len() as u64,
            collectives.rank(),
            collectives.world_size(),
        );
        Self {
            source: self.source.clone(),
            indices: self.indices[range.start as usize..range.end as usize].to_vec(),
        }
    }
}

impl Evaluator {
    /// The evaluation during a run, where the recipe asks for one and the images have labels.
    pub fn of_run(
        recipe: &Recipe,
        train: Arc<dyn Source>,
        threads: usize,
    ) -> Result<Option<Self>, WorkerError> {
        if recipe.eval.knn_every_epochs == 0 {
            return Ok(None);
        }
        if train.label(0).is_none() {
            tracing::warn!("the training images have no labels: no kNN during this run");
            return Ok(None);
        }
        Self::new(recipe, train, threads).map(Some)
    }

    /// Chooses bank and queries: `eval.path`, else the held-out part of `data.path`, else every tenth training image.
    pub fn new(recipe: &Recipe, train: Arc<dyn Source>, threads: usize) -> Result<Self, WorkerError> {
        let held_out = if recipe.eval.path.as_os_str().is_empty() {
            open_split(&recipe.data.path, recipe.data.format, Split::Eval)?
        } else {
            let source = open_split(&recipe.eval.path, recipe.data.format, Split::Eval)
                .map_err(|error| error.with_key("eval.path"))?;
            Some(match source {
                Some(source) => source,
                None => open(&recipe.eval.path, recipe.data.format)
                    .map_err(|error| error.with_key("eval.path"))?,
            })
        };
        Self::from_sources(recipe, train, held_out, threads)
    }

    fn from_sources(
        recipe: &Recipe,
        train: Arc<dyn Source>,
        held_out: Option<Arc<dyn Source>>,
        threads: usize,
    ) -> Result<Self, WorkerError> {
        let mut num_classes = train.classes().len();
        let (bank, queries, split) = match held_out {
            Some(source) => {
                num_classes = num_classes.max(source.classes().len());
                (Part::all(train), Part::all(source), "test images")
            }
            None => {
                let (queries, bank) = (0..train.len()).partition(|i| i % 10 == 0);
                (
                    Part { source: train.clone(), indices: bank },
                    Part { source: train, indices: queries },
                    "every tenth training image, left out of the bank",
                )
            }
        };
        let bank = bank.at_most(recipe.eval.knn_bank);
        Ok(Self {
            recipe: recipe.clone(),
            split: split.to_owned(),
            num_classes: num_classes as i64,
            bank,
            queries,
            threads,
            floors: None,
        })
    }

    /// kNN of the student's features and its floors, on all ranks together.
    pub fn knn(
        &mut self,
        collectives: &dyn Collectives,
        method: &dyn Method,
        state: &State,
        step: u64,
        epoch: u64,
    ) -> Result<EvalLine, WorkerError> {
        let floors = match self.floors {
            Some(floors) => floors,
            None => *self.floors.insert(self.measure_floors(collectives)?),
        };
        let features = |images: &Tensor| Ok(state.features(method, images)?);
        let knn_top1 = self.measure(collectives, &features)?;
        Ok(EvalLine {
            kind: "eval",
            step,
            epoch,
            time: metrics::now(),
            knn_top1,
            knn_random_init: floors.0,
            knn_raw_pixels: floors.1,
            protocol: self.protocol(),
        })
    }

    /// In words what the numbers mean.
    pub fn protocol(&self) -> String {
        let (eval, views) = (&self.recipe.eval, &self.recipe.views);
        format!(
            "weighted kNN, k={}, T={}, cosine, frozen backbone features, {} px; bank {} training images, {} queries ({})",
            eval.knn_k.min(self.bank.indices.len() as u64),
            eval.knn_temperature,
            views.size,
            self.bank.indices.len(),
            self.queries.indices.len(),
            self.split,
        )
    }

    /// The same kNN on the encoder's initial weights and on the pixels themselves, as the network would see them.
    fn measure_floors(&self, collectives: &dyn Collectives) -> Result<(f64, f64), WorkerError> {
        let (method, state) = mentee_ssl::state::new(&self.recipe)?;
        let random_init = self.measure(collectives, &|images| Ok(state.features(&*method, images)?))?;
        let raw_pixels = self.measure(collectives, &|images| Ok(images.f_flatten(1, -1)?))?;
        Ok((random_init, raw_pixels))
    }

    /// [N, H, W, C] floats as [N, C, H, W], channels-last in memory.
    fn images(&self, values: &[f32], n: usize) -> Result<Tensor, WorkerError> {
        let side = i64::from(self.recipe.views.size);
        let nhwc = Tensor::f_from_slice(values)?.f_view([n as i64, side, side, 3])?;
        let kind = mentee_ssl::state::kinds(self.recipe.parallel.precision).master;
        Ok(nhwc.f_permute([0, 3, 1, 2])?.f_to_kind(kind)?)
    }

    /// Top-1 in percent of kNN on `features`, which may depend on the image alone.
    fn measure(
        &self,
        collectives: &dyn Collectives,
        features: &dyn Fn(&Tensor) -> Result<Tensor, WorkerError>,
    ) -> Result<f64, WorkerError> {
        let bank = self.embed(&self.bank.share(collectives), features)?;
        let bank = gather(collectives, bank)?;
        let queries = self.embed(&self.queries.share(collectives), features)?;
        let settings = knn::Settings {
            k: self.recipe.eval.knn_k as i64,
            temperature: self.recipe.eval.knn_temperature,
            num_classes: self.num_classes.max(bank.max_label()? + 1).max(queries.max_label()? + 1),
        };
        let mut counts = [knn::correct(&bank, &queries, settings)? as f64, queries.len() as f64];
        collectives
            .all_reduce_sum(mentee_collectives::Buffer::F64(&mut counts))
            .map_err(|source| WorkerError::Collective { step: 0, source })?;
        Ok(100.0 * counts[0] / counts[1].max(1.0))
    }

    fn embed(
        &self,
        part: &Part,
        features: &dyn Fn(&Tensor) -> Result<Tensor, WorkerError>,
    ) -> Result<knn::Labelled, WorkerError> {
        let options = EvalOptions { batch: BATCH, threads: self.threads };
        let (mut rows, mut labels) = (Vec::new(), Vec::new());
        for batch in eval_images(part.source.clone(), part.indices.clone(), &self.recipe.views, options)? {
            let batch = batch?;
            let images = self.images(&batch.images, batch.ids.len())?;
            rows.push(features(&images)?.f_to_kind(Kind::Float)?);
            labels.extend(batch.labels.iter().map(|&label| i64::from(label)));
        }
        let features = if rows.is_empty() {
            Tensor::f_zeros([0, 0], (Kind::Float, Device::Cpu))?
        } else {
            Tensor::f_cat(&rows, 0)?
        };
        Ok(knn::Labelled { features, labels: Tensor::f_from_slice(&labels)? })
    }
}

/// Every rank gets all ranks' rows, in rank order.
fn gather(collectives: &dyn Collectives, own: knn::Labelled) -> Result<knn::Labelled, WorkerError> {
    if collectives.world_size() == 1 {
        return Ok(own);
    }
    let all = |tensor: &Tensor, kind: Kind| -> Result<Vec<Tensor>, WorkerError> {
        let dense = tensor.f_contiguous()?;
        let mut bytes = vec![0u8; dense.numel() * kind.elt_size_in_bytes()];
        dense.f_copy_data_u8(&mut bytes, dense.numel())?;
        let parts =
            collectives.all_gather(&bytes).map_err(|source| WorkerError::Collective { step: 0, source })?;
        parts
            .iter()
            .map(|part| {
                let len = (part.len() / kind.elt_size_in_bytes()) as i64;
                Ok(Tensor::f_from_data_size(part, &[len], kind)?)
            })
            .collect()
    };
    let labels = Tensor::f_cat(&all(&own.labels, Kind::Int64)?, 0)?;
    let features = Tensor::f_cat(&all(&own.features, Kind::Float)?, 0)?;
    Ok(knn::Labelled { features: features.f_view([labels.size()[0], -1])?, labels })
}

/// Evaluates a checkpoint in a world of one.
pub fn command(args: &EvalArgs) -> Result<i32, WorkerError> {
    let folder = if args.checkpoint.join("manifest.json").exists() {
        args.checkpoint.clone()
    } else {
        checkpoints::folder(&args.checkpoint)
    };
    let checkpoint = if folder == args.checkpoint {
        mentee_checkpoint::open(&folder)?
    } else {
        let newest = mentee_checkpoint::newest(&folder)?.ok_or_else(|| {
            WorkerError::Usage(format!(
                "{}: no checkpoint there; give a run directory or one of its checkpoints",
                args.checkpoint.display()
            ))
        })?;
        for (path, reason) in &newest.rejected {
            eprintln!("warning: {} is passed over: {reason}", path.display());
        }
        newest.checkpoint
    };
    let mut recipe = recipe_of(&checkpoint.manifest.meta.plan_toml, &folder)?;
    if let Some(data) = &args.data {
        recipe.data.path.clone_from(data);
        recipe.data.format = mentee_config::recipe::DataFormat::Auto;
        recipe.eval.path = PathBuf::new();
    }
    let cores = affinity::cores(1);
    tch::set_num_threads(cores as i32);
    let train = open_split(&recipe.data.path, recipe.data.format, Split::Train)
        .map_err(|error| error.with_key("--data"))?
        .ok_or_else(|| WorkerError::Usage("--data holds no training images for the bank".into()))?;
    let (method, mut state) = mentee_ssl::state::new(&recipe)?;
    snapshot::load(&mut state, &checkpoint)?;
    let meta = &checkpoint.manifest.meta;
    let mut evaluator = Evaluator::new(&recipe, train, cores)?;
    let line = evaluator.knn(&Single::new(), &*method, &state, meta.step, meta.epoch)?;
    if args.json {
        let text = serde_json::to_string(&line).map_err(|error| WorkerError::Failed(error.to_string()))?;
        println!("{text}");
    } else {
        println!("features             kNN top-1");
        println!("step {:<10}      {:>6.2} %", line.step, line.knn_top1);
        println!("random init          {:>6.2} %", line.knn_random_init);
        println!("raw pixels           {:>6.2} %", line.knn_raw_pixels);
        println!("{}", line.protocol);
    }
    Ok(exit_code::DONE)
}

/// The recipe inside a checkpoint.
fn recipe_of(plan_toml: &str, folder: &Path) -> Result<Recipe, WorkerError> {
    Ok(Recipe::from_plan_text(plan_toml, &folder.join("manifest.json"))?)
}
