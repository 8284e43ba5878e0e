//! Evaluation of frozen features: how well the labels of test images follow from those of their nearest
//! training images, or from a linear classifier, always beside the same measure on features nobody trained.

mod knn;
mod linear;
mod spectrum;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mentee_cluster::Identity;
use mentee_collectives::{Collectives, Single};
use mentee_commands::EvalArgs;
use mentee_commands::eval::LinearProtocol;
use mentee_config::recipe::MethodName;
use mentee_config::{Recipe, complain, exit_code, show};
use mentee_data::eval::{EvalOptions, all_labelled, eval_images, training_images};
use mentee_data::{
    Damaged, DataError, OnError, Order, Source, open_held_out, open_training, with_classes_of,
};
use mentee_ssl::{Method, State};
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::metrics::{self, EvalLine, GridPoint};
use crate::{affinity, agree, checkpoints, dense, device, snapshot};

/// The seed by which images are chosen, whatever that of the run: evaluations of different runs are of the same images.
const CHOICE: u64 = 0;
/// Images in a forward pass.
const BATCH: usize = 250;
/// Raw pixels of views from this side on are averaged to [`POOLED`] x [`POOLED`] first: their floor would not fit into memory.
const POOL_FROM: u32 = 64;
const POOLED: i64 = 32;

/// The images of an evaluation and what it has to beat.
pub struct Evaluator {
    recipe: Recipe,
    bank: Part,
    queries: Part,
    num_classes: i64,
    /// How bank and queries were chosen, for the protocol.
    split: String,
    threads: usize,
    /// Neighbours and temperatures: the first of each is what stands for kNN.
    k: Vec<u64>,
    temperature: Vec<f64>,
    /// Where features are computed.
    device: Device,
    /// kNN on random-init features and on raw pixels, percent, by setting; measured once.
    floors: Option<[Vec<f64>; 2]>,
    /// Tells of an image that is left out.
    warn: fn(&str),
}

/// Features of the images.
struct Features {
    /// This rank's part of the bank.
    bank: knn::Labelled,
    /// Images of the bank on all ranks.
    bank_len: u64,
    /// All queries, on every rank.
    queries: knn::Labelled,
    /// Damaged images of all ranks that are not among them: of the bank, of the queries.
    left_out: [u64; 2],
}

struct Part {
    source: Arc<dyn Source>,
    indices: Vec<u64>,
    /// What this rank has met of it so far: left out of every evaluation from then on.
    damaged: Arc<Damaged>,
}

impl Part {
    fn new(source: Arc<dyn Source>, indices: Vec<u64>, on_error: OnError) -> Self {
        Self { source, indices, damaged: Arc::new(Damaged::new(on_error)) }
    }

    fn all(source: Arc<dyn Source>, on_error: OnError) -> Self {
        let indices = (0..source.len()).collect();
        Self::new(source, indices, on_error)
    }

    /// At most `limit` images; 0 = all.
    fn at_most(mut self, limit: u64) -> Self {
        let len = self.indices.len() as u64;
        if limit > 0 && limit < len {
            self.indices = chosen(len, limit).into_iter().map(|place| self.indices[place as usize]).collect();
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
            damaged: self.damaged.clone(),
        }
    }
}

/// `count` of `len` places, in rising order: the same ones every time, and otherwise at random, so that no order of classes
/// meets them in step.
fn chosen(len: u64, count: u64) -> Vec<u64> {
    let (_, mut places) = Order::new(CHOICE, len, len).share(0, 0..count);
    places.sort_unstable();
    places
}

impl Evaluator {
    /// The evaluation during a run, where the recipe asks for one and the images of all ranks have labels for it.
    pub fn of_run(
        collectives: &dyn Collectives,
        recipe: &Recipe,
        train: Arc<dyn Source>,
        threads: usize,
        device: Device,
    ) -> Result<Option<Self>, WorkerError> {
        if recipe.eval.knn_every_epochs == 0 {
            return Ok(None);
        }
        let own = match Self::new(recipe, train, threads, device) {
            Ok(evaluator) => Ok((Some(evaluator), String::new())),
            // No reason not to train.
            Err(WorkerError::Data(
                why @ (DataError::NoLabel { .. } | DataError::UnknownClass { .. } | DataError::TooFew),
            )) => Ok((None, why.to_string())),
            Err(error) => Err(error),
        };
        let (own, why) = agree::together(collectives, own)?;
        // Held-out images may differ from machine to machine: no rank evaluates without the others.
        let all = collectives.all_gather(why.as_bytes())?;
        if let Some(why) = all.iter().find(|why| !why.is_empty()) {
            tracing::warn!("{}; no kNN evaluation during this run", String::from_utf8_lossy(why));
            return Ok(None);
        }
        if collectives.rank() == 0 {
            own.iter().for_each(Self::warn_of_one_class);
        }
        Ok(own)
    }

    /// Chooses bank and queries: `eval.path`, else the held-out part of `data.path`, else a tenth of the training images.
    /// An error when one of them has no label, or is of a class that the training images do not have.
    pub fn new(
        recipe: &Recipe,
        train: Arc<dyn Source>,
        threads: usize,
        device: Device,
    ) -> Result<Self, WorkerError> {
        // Without any there is no need for held-out images either.
        if (0..train.len()).all(|index| train.label(index).is_none()) {
            all_labelled(&*train, &[0])?;
        }
        Self::from_sources(recipe, train, open_held_out(recipe)?, threads, device)
    }

    /// What makes every accuracy look perfect.
    fn warn_of_one_class(&self) {
        if self.num_classes == 1 {
            (self.warn)("all images are of one class: every accuracy is 100 %");
        }
    }

    fn from_sources(
        recipe: &Recipe,
        train: Arc<dyn Source>,
        held_out: Option<Arc<dyn Source>>,
        threads: usize,
        device: Device,
    ) -> Result<Self, WorkerError> {
        let mut num_classes = train.classes().len();
        let on_error = OnError::of(&recipe.data);
        let (bank, queries, split) = match held_out {
            Some(source) => {
                num_classes = num_classes.max(source.classes().len());
                (Part::all(train, on_error), Part::all(source, on_error), "test images")
            }
            None => {
                let queries = chosen(train.len(), train.len().div_ceil(10));
                let bank = (0..train.len()).filter(|index| queries.binary_search(index).is_err()).collect();
                (
                    Part::new(train.clone(), bank, on_error),
                    Part::new(train, queries, on_error),
                    "a tenth of the training images, left out of the bank",
                )
            }
        };
        if bank.indices.is_empty() || queries.indices.is_empty() {
            return Err(DataError::TooFew.into());
        }
        let bank = bank.at_most(recipe.eval.knn_bank);
        all_labelled(&*bank.source, &bank.indices)?;
        all_labelled(&*queries.source, &queries.indices)?;
        let queries = Part { source: with_classes_of(&*bank.source, queries.source)?, ..queries };
        Ok(Self {
            recipe: recipe.clone(),
            split: split.to_owned(),
            num_classes: num_classes as i64,
            bank,
            queries,
            threads,
            k: vec![recipe.eval.knn_k],
            temperature: vec![recipe.eval.knn_temperature],
            device,
            floors: None,
            warn: |what| tracing::warn!("{what}"),
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
        let trained = self.features(collectives, &|images| Ok(state.features(method, images)?))?;
        let mut line = EvalLine::new(step, epoch);
        self.add_knn(collectives, &trained, &mut line)?;
        Ok(line)
    }

    /// Measures kNN and the spectrum of `trained`.
    fn add_knn(
        &mut self,
        collectives: &dyn Collectives,
        trained: &Features,
        line: &mut EvalLine,
    ) -> Result<(), WorkerError> {
        if self.floors.is_none() {
            let floors = [
                self.vote(collectives, &self.random_init(collectives)?)?,
                self.vote(collectives, &self.raw_pixels(collectives)?)?,
            ];
            self.floors = Some(floors);
        }
        let knn = self.vote(collectives, trained)?;
        let [random_init, raw_pixels] = self.floors.as_ref().expect("measured above");
        line.knn_top1 = Some(knn[0]);
        line.knn_random_init = Some(random_init[0]);
        line.knn_raw_pixels = Some(raw_pixels[0]);
        if knn.len() > 1 {
            let settings = self.k.iter().flat_map(|k| self.temperature.iter().map(move |t| (*k, *t)));
            line.knn_grid = settings
                .enumerate()
                .map(|(n, (k, temperature))| GridPoint {
                    k,
                    temperature,
                    knn_top1: knn[n],
                    knn_random_init: random_init[n],
                    knn_raw_pixels: raw_pixels[n],
                })
                .collect();
        }
        if let Some(spectrum) = spectrum::of_ranks(collectives, &trained.bank.features)? {
            line.spectrum = spectrum.values;
            line.effective_rank = Some(spectrum.effective_rank);
        }
        line.add_protocol(&self.knn_protocol(trained));
        Ok(())
    }

    /// In words what kNN's numbers mean.
    fn knn_protocol(&self, trained: &Features) -> String {
        format!(
            "weighted kNN, k={}, T={}, cosine, {}",
            self.k[0].min(trained.bank_len),
            self.temperature[0],
            self.images_in_words(trained),
        )
    }

    fn images_in_words(&self, trained: &Features) -> String {
        let size = self.recipe.views.size;
        let pooled =
            if size < POOL_FROM { String::new() } else { format!(" (raw pixels averaged to {POOLED})") };
        let [_, of_queries] = trained.left_out;
        let left_out = match trained.left_out.iter().sum() {
            0 => String::new(),
            1 => ", 1 damaged image left out".to_owned(),
            n => format!(", {n} damaged images left out"),
        };
        format!(
            "frozen backbone features, {size} px{pooled}; bank {} training images, {} queries ({}){left_out}",
            trained.bank_len,
            self.queries.indices.len() as u64 - of_queries,
            self.split,
        )
    }

    /// Features of the encoder's initial weights.
    fn random_init(&self, collectives: &dyn Collectives) -> Result<Features, WorkerError> {
        let (method, state) = mentee_ssl::state::on(&self.recipe, self.device)?;
        self.features(collectives, &|images| Ok(state.features(&*method, images)?))
    }

    /// The pixels themselves, as the network would see them.
    fn raw_pixels(&self, collectives: &dyn Collectives) -> Result<Features, WorkerError> {
        let pooled = self.recipe.views.size >= POOL_FROM;
        self.features(collectives, &|images| {
            let images =
                if pooled { images.f_adaptive_avg_pool2d([POOLED; 2])? } else { images.shallow_clone() };
            Ok(images.f_flatten(1, -1)?)
        })
    }

    /// [N, H, W, C] floats as [N, C, H, W], channels-last in memory.
    fn images(&self, values: &[f32], n: usize) -> Result<Tensor, WorkerError> {
        let side = i64::from(self.recipe.views.size);
        let nhwc = Tensor::f_from_slice(values)?.f_view([n as i64, side, side, 3])?;
        let kind = mentee_ssl::state::kinds(self.recipe.parallel.precision).master;
        Ok(nhwc.f_permute([0, 3, 1, 2])?.f_to_kind(kind)?)
    }

    fn features(
        &self,
        collectives: &dyn Collectives,
        features: &dyn Fn(&Tensor) -> Result<Tensor, WorkerError>,
    ) -> Result<Features, WorkerError> {
        // A rank that cannot use its images ends all: none may wait for its rows.
        let bank = agree::together(collectives, self.embed(&self.bank.share(collectives), features))?;
        let queries = agree::together(collectives, self.embed(&self.queries.share(collectives), features))?;
        let left_out = self.left_out(collectives)?;
        let bank_len = self.bank.indices.len() as u64 - left_out[0];
        Ok(Features { bank, bank_len, queries: gather(collectives, queries)?, left_out })
    }

    /// How many damaged images all ranks have met so far, of the bank and of the queries; an error when that is too many.
    fn left_out(&self, collectives: &dyn Collectives) -> Result<[u64; 2], WorkerError> {
        let failed = |error: serde_json::Error| WorkerError::Failed(error.to_string());
        let own = [self.bank.damaged.found(), self.queries.damaged.found()];
        let own = serde_json::to_vec(&own).map_err(failed)?;
        let mut found = [BTreeMap::new(), BTreeMap::new()];
        for of_rank in collectives.all_gather(&own)? {
            let of_rank: [BTreeMap<u64, String>; 2] = serde_json::from_slice(&of_rank).map_err(failed)?;
            found.iter_mut().zip(of_rank).for_each(|(found, of_rank)| found.extend(of_rank));
        }
        let [bank, queries] = &found;
        let budget = self.recipe.data.max_skipped;
        // Every rank finds the same.
        let known = |error: DataError| WorkerError::from(error).known(collectives.rank() == 0);
        Ok([
            not_too_many(bank, "of the bank", self.bank.indices.len(), budget).map_err(known)?,
            not_too_many(queries, "to classify", self.queries.indices.len(), budget).map_err(known)?,
        ])
    }

    /// Top-1 in percent of kNN on `features`, by setting.
    fn vote(&self, collectives: &dyn Collectives, features: &Features) -> Result<Vec<f64>, WorkerError> {
        let Features { bank, queries, .. } = features;
        let num_classes = self.num_classes_of(collectives, features)?;
        let grid = knn::Grid { k: &self.k, temperature: &self.temperature, num_classes };
        let counts = knn::correct(collectives, bank, queries, grid, self.device)?;
        let mut counts: Vec<f64> = counts.into_iter().map(|count| count as f64).collect();
        collectives.all_reduce_sum((&mut counts).into())?;
        let all = queries.len().max(1) as f64;
        Ok(counts.into_iter().map(|count| 100.0 * count / all).collect())
    }

    fn num_classes_of(&self, collectives: &dyn Collectives, features: &Features) -> Result<i64, WorkerError> {
        let own = features.bank.max_label()?.max(features.queries.max_label()?) + 1;
        let of_ranks = collectives.all_gather(&own.to_le_bytes())?;
        let of_ranks = of_ranks.iter().filter_map(|n| n.as_slice().try_into().ok()).map(i64::from_le_bytes);
        Ok(of_ranks.fold(self.num_classes, i64::max))
    }

    /// Trains a linear classifier on `trained` and on what it has to beat, in a world of one.
    fn add_linear(
        &self,
        method: &dyn Method,
        state: &State,
        trained: &Features,
        how: Linear,
        line: &mut EvalLine,
    ) -> Result<(), WorkerError> {
        let num_classes = self.num_classes_of(&Single::new(), trained)?;
        let top1 = |layer: &linear::Linear, queries: &knn::Labelled| -> Result<f64, WorkerError> {
            Ok(100.0 * layer.correct(queries)? as f64 / queries.len().max(1) as f64)
        };
        // The floors' own classifier is the best there is: what beats it beats any.
        let best = |features: &Features| -> Result<f64, WorkerError> {
            top1(&linear::logistic(&features.bank, num_classes)?, &features.queries)
        };
        let seed = self.recipe.run.seed;
        let (layer, what) = match how {
            Linear::Logistic => (
                linear::logistic(&trained.bank, num_classes)?,
                "logistic regression by L-BFGS, features standardised, L2 penalty 1/n (C=1)".to_owned(),
            ),
            Linear::Cached(settings) => (
                linear::on_cached(settings, &trained.bank, num_classes, seed)?,
                format!("{}, floors by logistic regression", settings.describe()),
            ),
            Linear::Augmented(settings) => (
                self.on_augmented(settings, method, state, num_classes)?,
                format!("{}, random crops and flips, floors by logistic regression", settings.describe()),
            ),
        };
        line.linear_top1 = Some(top1(&layer, &trained.queries)?);
        line.linear_random_init = Some(best(&self.random_init(&Single::new())?)?);
        line.linear_raw_pixels = Some(best(&self.raw_pixels(&Single::new())?)?);
        line.add_protocol(&format!("linear classifier, {what}, {}", self.images_in_words(trained)));
        Ok(())
    }

    /// An official protocol with everything it has: every epoch other crops and flips.
    fn on_augmented(
        &self,
        settings: linear::Settings,
        method: &dyn Method,
        state: &State,
        num_classes: i64,
    ) -> Result<linear::Linear, WorkerError> {
        let (seed, dim) = (self.recipe.run.seed, method.networks().backbone.feature_dim);
        // Damaged ones are known: their features were asked for before.
        let mut indices = self.bank.indices.clone();
        indices.retain(|&index| !self.bank.damaged.contains(index));
        let bank = indices.len() as u64;
        let mut training = linear::Training::new(settings, bank, dim, num_classes, seed)?;
        let options = EvalOptions { batch: settings.batch as usize, threads: self.threads };
        let source = self.bank.source.clone();
        let views = settings.views(&self.recipe.views);
        let steps_per_epoch = bank.div_ceil(settings.batch);
        let batches = training_images(source, indices, &views, seed, settings.epochs, options)?;
        for (step, batch) in (1..).zip(batches) {
            let batch = batch?;
            let view = views.size as usize * views.size as usize * 3;
            let parts = batch
                .images
                .chunks(BATCH * view)
                .map(|part| {
                    let features = state.features(method, &self.images(part, part.len() / view)?)?;
                    Ok(features.f_to_device(Device::Cpu)?)
                })
                .collect::<Result<Vec<_>, WorkerError>>()?;
            let labels: Vec<i64> = batch.labels.iter().map(|&label| i64::from(label)).collect();
            training.step(&Tensor::f_cat(&parts, 0)?, &Tensor::f_from_slice(&labels)?)?;
            if u64::is_multiple_of(step, steps_per_epoch) {
                complain!("linear classifier: epoch {} of {}", step / steps_per_epoch, settings.epochs);
            }
        }
        Ok(training.finish())
    }

    fn embed(
        &self,
        part: &Part,
        features: &dyn Fn(&Tensor) -> Result<Tensor, WorkerError>,
    ) -> Result<knn::Labelled, WorkerError> {
        let options = EvalOptions { batch: BATCH, threads: self.threads };
        let known = part.damaged.found();
        let (source, indices, damaged) = (part.source.clone(), part.indices.clone(), part.damaged.clone());
        // In place from the first row on: of a large bank there is no room for a second copy.
        let (mut rows, mut labels) = (None, Vec::new());
        for batch in eval_images(source, indices, &self.recipe.views, options, damaged)? {
            let batch = batch?;
            let images = self.images(&batch.images, batch.ids.len())?;
            let features = features(&images)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
            let (n, dim) = features.size2()?;
            let rows: &mut Tensor = match &mut rows {
                Some(rows) => rows,
                None => rows
                    .insert(Tensor::f_empty([part.indices.len() as i64, dim], (Kind::Float, Device::Cpu))?),
            };
            rows.f_narrow(0, labels.len() as i64, n)?.f_copy_(&features)?;
            labels.extend(batch.labels.iter().map(|&label| i64::from(label)));
        }
        for (_, what) in part.damaged.found().iter().filter(|(index, _)| !known.contains_key(index)) {
            (self.warn)(&format!("left a damaged image out of the evaluation: {what}"));
        }
        let features = match rows {
            Some(rows) => rows.f_narrow(0, 0, labels.len() as i64)?,
            None => Tensor::f_zeros([0, 0], (Kind::Float, Device::Cpu))?,
        };
        Ok(knn::Labelled { features, labels: Tensor::f_from_slice(&labels)? })
    }
}

/// How a linear classifier is trained, with what it needs.
#[derive(Clone, Copy)]
enum Linear {
    Logistic,
    Cached(linear::Settings),
    Augmented(linear::Settings),
}

impl Linear {
    fn of(args: &EvalArgs, recipe: &Recipe, bank: u64) -> Result<Self, WorkerError> {
        let of_method = match recipe.method.name {
            MethodName::Simsiam => LinearProtocol::Simsiam,
            _ => LinearProtocol::Byol,
        };
        let usual = if args.linear_augment { of_method } else { LinearProtocol::Logistic };
        let official = match args.linear_protocol.unwrap_or(usual) {
            LinearProtocol::Logistic => {
                if args.linear_augment || args.linear_epochs.is_some() {
                    return Err(WorkerError::Usage(
                        "logistic regression knows no epochs and no augmentation; give --linear-protocol byol or simsiam"
                            .into(),
                    ));
                }
                return Ok(Self::Logistic);
            }
            LinearProtocol::Byol => linear::Official::Byol,
            LinearProtocol::Simsiam => linear::Official::Simsiam,
        };
        let settings = linear::Settings::new(official, bank, args.linear_epochs);
        Ok(if args.linear_augment { Self::Augmented(settings) } else { Self::Cached(settings) })
    }
}

/// How many of so many `images` were found damaged; an error when they are more than `budget`, or all.
fn not_too_many(
    damaged: &BTreeMap<u64, String>,
    of: &'static str,
    images: usize,
    budget: u64,
) -> Result<u64, DataError> {
    let Some((_, last)) = damaged.last_key_value() else { return Ok(0) };
    let (found, last) = (damaged.len() as u64, last.clone());
    if found > budget {
        Err(DataError::TooManyBad { found, budget, last })
    } else if damaged.len() == images {
        Err(DataError::AllBad { of, found, last })
    } else {
        Ok(found)
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
        let parts = collectives.all_gather(&bytes)?;
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
    let is_named = args.checkpoint.parent().is_some_and(|parent| parent.ends_with("checkpoints"));
    let folder = if is_named || args.checkpoint.join("manifest.json").exists() {
        args.checkpoint.clone()
    } else {
        checkpoints::folder(&args.checkpoint)
    };
    let checkpoint = if folder == args.checkpoint {
        mentee_checkpoint::open(&folder)?
    } else {
        if !args.checkpoint.is_dir() {
            return Err(WorkerError::Usage(format!("{}: no such folder", args.checkpoint.display())));
        }
        let newest = mentee_checkpoint::newest(&folder)?
            .ok_or_else(|| WorkerError::NoCheckpoint(args.checkpoint.clone()))?;
        for (path, reason) in &newest.rejected {
            complain!("warning: {} is passed over: {reason}", path.display());
        }
        newest.checkpoint
    };
    let mut recipe = recipe_of(&checkpoint.manifest.meta.plan_toml, &folder)?;
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
    snapshot::load(&mut state, None, &checkpoint)?;
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
    let mut line = EvalLine::new(meta.step, meta.epoch);
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
    for part in line.protocol.split(" | ") {
        show!("{part}");
    }
}

/// The recipe inside a checkpoint.
fn recipe_of(plan_toml: &str, folder: &Path) -> Result<Recipe, WorkerError> {
    Ok(Recipe::from_plan_text(plan_toml, &folder.join("manifest.json"))?)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use mentee_collectives::threads;
    use mentee_data::Encoding;

    use super::*;

    const SIDE: usize = 16;

    #[derive(Clone, Copy)]
    struct Image {
        seed: u64,
        label: Option<u32>,
        whole: bool,
    }

    /// Noise of two classes, one darker than the other.
    #[derive(Clone)]
    struct Set {
        name: &'static str,
        images: Vec<Image>,
    }

    impl Set {
        fn new(name: &'static str, seeds: std::ops::Range<u64>) -> Self {
            let image = |seed| Image { seed, label: Some((seed % 2) as u32), whole: true };
            Self { name, images: seeds.map(image).collect() }
        }

        fn damaged(mut self, indices: &[usize]) -> Self {
            indices.iter().for_each(|&index| self.images[index].whole = false);
            self
        }

        fn unlabelled(mut self, indices: &[usize]) -> Self {
            indices.iter().for_each(|&index| self.images[index].label = None);
            self
        }

        /// Only its images that are whole.
        fn repaired(mut self) -> Self {
            self.images.retain(|image| image.whole);
            self
        }
    }

    impl Source for Set {
        fn len(&self) -> u64 {
            self.images.len() as u64
        }

        fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
            let Image { seed, whole, .. } = self.images[index as usize];
            if !whole {
                return Err(DataError::BadSample { sample: self.key(index), reason: "torn".to_owned() });
            }
            let mut state = seed + 1;
            buffer.clear();
            buffer.extend((0..3 * SIDE * SIDE).map(|_| {
                state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
                (state >> 57) as u8 + 100 * (seed % 2) as u8
            }));
            Ok(Encoding::Raw { width: SIDE as u32, height: SIDE as u32 })
        }

        fn label(&self, index: u64) -> Option<u32> {
            self.images[index as usize].label
        }

        fn key(&self, index: u64) -> String {
            format!("{}:{index}", self.name)
        }

        fn classes(&self) -> &[String] {
            &[]
        }

        fn digest(&self) -> String {
            self.name.to_owned()
        }

        fn stored(&self) -> (u64, u64) {
            (0, 1)
        }
    }

    fn recipe(sets: &[&str]) -> Recipe {
        let usual = ["views.size=16", "eval.knn_k=3", "eval.knn_bank=0", "eval.knn_every_epochs=1"];
        let sets: Vec<String> = usual.iter().chain(sets).map(|&set| set.to_owned()).collect();
        Recipe::load("byol-cifar10-small", &sets).unwrap()
    }

    fn evaluator(train: &Set, test: &Set, sets: &[&str]) -> Result<Evaluator, WorkerError> {
        let (train, test) = (Arc::new(train.clone()), Arc::new(test.clone()));
        Evaluator::from_sources(&recipe(sets), train, Some(test), 2, Device::Cpu)
    }

    fn on_ranks<R: Send>(world: u32, body: impl Fn(&dyn Collectives) -> R + Send + Sync) -> Vec<R> {
        threads::run(world, Duration::from_secs(60), |rank| body(&rank))
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).view([-1])).unwrap()
    }

    #[test]
    fn damaged_images_are_left_out_alike_on_any_number_of_ranks() {
        static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let train = Set::new("train", 0..23).damaged(&[0, 7, 12]);
        let test = Set::new("test", 100..111).damaged(&[10]);
        let skip = ["data.on_error=skip", "data.max_skipped=3"];
        let clean = evaluator(&train.clone().repaired(), &test.clone().repaired(), &skip).unwrap();
        let pixels = clean.raw_pixels(&Single::new()).unwrap();
        assert!(!clean.images_in_words(&pixels).contains("left out"));
        let clean_vote = clean.vote(&Single::new(), &pixels).unwrap();
        let clean_bank = (numbers(&pixels.bank.features), numbers(&pixels.bank.labels));
        let clean_queries = (numbers(&pixels.queries.features), numbers(&pixels.queries.labels));
        for world in [1, 2, 3, 8] {
            let ranks = on_ranks(world, |rank| {
                let mut own = evaluator(&train, &test, &skip).unwrap();
                own.warn = |what| TOLD.lock().unwrap().push(what.to_owned());
                let first = own.raw_pixels(rank).unwrap();
                let again = own.raw_pixels(rank).unwrap();
                for pixels in [&first, &again] {
                    let queries = (numbers(&pixels.queries.features), numbers(&pixels.queries.labels));
                    assert_eq!(queries, clean_queries);
                    assert_eq!(own.vote(rank, pixels).unwrap(), clean_vote);
                    assert_eq!(pixels.left_out, [3, 1]);
                }
                let words = own.images_in_words(&again);
                assert!(
                    words.contains(
                        "bank 20 training images, 10 queries (test images), 4 damaged images left out"
                    ),
                    "{words}"
                );
                (numbers(&again.bank.features), numbers(&again.bank.labels))
            });
            let (features, labels): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
            assert_eq!((features.concat(), labels.concat()), clean_bank, "{world} ranks");
            // Once each, by the rank that met it, however often they are asked for.
            let mut told = std::mem::take(&mut *TOLD.lock().unwrap());
            told.sort();
            let expected = ["test:10", "train:0", "train:12", "train:7"]
                .map(|key| format!("left a damaged image out of the evaluation: {key}: torn"));
            assert_eq!(told, expected, "{world} ranks");
        }
    }

    #[test]
    fn too_much_damage_ends_the_evaluation_of_all_ranks_with_one_word() {
        let refused = |train: &Set, test: &Set, sets: &[&str]| {
            [1, 2, 5].map(|world| {
                let errors = on_ranks(world, |rank| {
                    let own = evaluator(train, test, sets).unwrap();
                    own.raw_pixels(rank).err().expect("an error")
                });
                assert!(errors.iter().all(|error| error.exit_code() == exit_code::DATA), "{errors:?}");
                let heard: Vec<String> =
                    errors.iter().filter(|error| !error.is_silent()).map(ToString::to_string).collect();
                assert_eq!(heard.len(), 1, "{errors:?}");
                heard[0].clone()
            })
        };
        let (train, test) = (Set::new("train", 0..20), Set::new("test", 100..108));
        // On two ranks and more, none has met more than the recipe passes over.
        for line in
            refused(&train.clone().damaged(&[1, 19]), &test, &["data.on_error=skip", "data.max_skipped=1"])
        {
            assert!(line.starts_with("2 damaged samples, data.max_skipped is 1; the last: train:"), "{line}");
        }
        let none_left = test.clone().damaged(&[0, 1, 2, 3, 4, 5, 6, 7]);
        for line in refused(&train, &none_left, &["data.on_error=skip"]) {
            assert!(
                line.starts_with("all 8 images to classify are damaged; the last: test:7: torn"),
                "{line}"
            );
        }
        for line in refused(&train, &test.clone().damaged(&[5]), &["data.on_error=fail"]) {
            assert!(line.starts_with("bad sample test:5: torn"), "{line}");
        }
    }

    #[test]
    fn every_label_is_looked_at_before_an_image_is() {
        let (train, test) = (Set::new("train", 0..20), Set::new("test", 100..108));
        let refused = |train: &Set, test: &Set, sets: &[&str]| {
            let error = evaluator(train, test, sets).err().expect("a label is missing");
            assert_eq!(error.exit_code(), exit_code::DATA);
            error.to_string()
        };
        let line = refused(&train.clone().unlabelled(&[0]), &test, &[]);
        assert!(line.starts_with("sample train:0 has no label"), "{line}");
        let line = refused(&train.clone().unlabelled(&[13, 19]), &test, &[]);
        assert!(line.starts_with("sample train:13 has no label"), "{line}");
        let line = refused(&train, &test.clone().unlabelled(&[7]), &[]);
        assert!(line.starts_with("sample test:7 has no label"), "{line}");
        // The bank is half of the images.
        let half = ["eval.knn_bank=10"];
        let bank: Vec<usize> = chosen(20, 10).into_iter().map(|index| index as usize).collect();
        let others: Vec<usize> = (0..20).filter(|index| !bank.contains(index)).collect();
        assert!(evaluator(&train.clone().unlabelled(&others), &test, &half).is_ok());
        refused(&train.clone().unlabelled(&bank[3..4]), &test, &half);
    }

    #[test]
    fn one_image_is_too_few() {
        let alone = |train: std::ops::Range<u64>| {
            let train = Arc::new(Set::new("train", train));
            Evaluator::from_sources(&recipe(&[]), train, None, 2, Device::Cpu)
        };
        let error = alone(0..1).err().expect("too few");
        assert_eq!(error.exit_code(), exit_code::DATA);
        assert!(error.to_string().contains("too few"), "{error}");
        assert!(alone(0..2).is_ok());
    }

    #[test]
    fn images_are_chosen_whatever_the_order_of_classes() {
        for (len, count) in [(1, 1), (20, 0), (20, 20), (1000, 100)] {
            let places = chosen(len, count);
            assert_eq!(places, chosen(len, count), "the same ones every time");
            assert_eq!(places.len() as u64, count);
            assert!(places.is_sorted_by(|a, b| a < b) && places.iter().all(|&place| place < len));
        }
        // Ten classes that come in turn: each is asked for, and each is in the bank.
        let train: Arc<dyn Source> = Arc::new(Set::new("train", 0..1000));
        let evaluator = Evaluator::from_sources(&recipe(&[]), train, None, 2, Device::Cpu).unwrap();
        let Evaluator { bank, queries, .. } = evaluator;
        assert_eq!((bank.indices.len(), queries.indices.len()), (900, 100));
        assert!(queries.indices.iter().all(|index| !bank.indices.contains(index)));
        for class in 0..10 {
            assert!([&bank, &queries].map(|part| part.indices.iter().any(|i| i % 10 == class)) == [true; 2]);
        }
    }

    #[test]
    fn a_run_evaluates_on_all_ranks_or_on_none() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str| {
            let image = dir.path().join(name);
            std::fs::create_dir_all(image.parent().unwrap()).unwrap();
            std::fs::write(image, "never looked at").unwrap();
        };
        for name in ["named/a/x.png", "nameless/x.png", "other/b/x.png"] {
            set(name);
        }
        let train: Arc<dyn Source> =
            mentee_data::open(&dir.path().join("named"), mentee_config::recipe::DataFormat::Auto).unwrap();
        // The held-out images of the last rank's machine are these; the other's are good.
        let on_one = |name: &str| -> Vec<Result<bool, i32>> {
            on_ranks(2, |rank| {
                let name = if rank.rank() == 1 { name } else { "named" };
                let recipe = recipe(&[&format!("eval.path={}", dir.path().join(name).display())]);
                let own = Evaluator::of_run(rank, &recipe, train.clone(), 1, Device::Cpu);
                own.map(|own| own.is_some()).map_err(|error| error.exit_code())
            })
        };
        assert_eq!(on_one("named"), [Ok(true); 2]);
        assert_eq!(on_one("nameless"), [Ok(false); 2]);
        assert_eq!(on_one("other"), [Ok(false); 2], "a class that the training images do not have");
        assert_eq!(on_one("nowhere"), [Err(exit_code::DATA); 2], "a wrong path is a mistake");
    }
}
