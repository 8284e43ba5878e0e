//! Evaluation of frozen features: how well the labels of test images follow from those of their nearest
//! training images, or from a linear classifier, always beside the same measure on features nobody trained.

mod command;
mod knn;
mod linear;
mod probe;
mod spectrum;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use mentee_collectives::Collectives;
use mentee_config::Recipe;
use mentee_data::eval::{EvalOptions, all_labelled, eval_images};
use mentee_data::{Damaged, DataError, OnError, Order, Source, open_held_out, with_classes_of};
use mentee_ssl::{Method, State};
use tch::{Device, Kind, Tensor};

pub use command::command;

use crate::agree;
use crate::error::WorkerError;
use crate::metrics::{self, EvalLine, GridPoint};

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
        line.time = metrics::now();
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
            if features.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                let rows = Vec::<f64>::try_from(features.f_sum_dim_intlist(
                    [1i64].as_slice(),
                    false,
                    Kind::Double,
                )?)?;
                let row = rows.iter().position(|sum| !sum.is_finite()).unwrap_or_default();
                return Err(WorkerError::FeaturesNotFinite(part.source.key(batch.ids[row])));
            }
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
