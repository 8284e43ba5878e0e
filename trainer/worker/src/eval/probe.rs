//! Linear classifiers on frozen features: which protocol, on which features, beside which floors.

use mentee_collectives::Single;
use mentee_commands::EvalArgs;
use mentee_commands::eval::LinearProtocol;
use mentee_config::recipe::MethodName;
use mentee_config::{Recipe, complain};
use mentee_data::eval::{EvalOptions, training_images};
use mentee_ssl::{Method, State};
use tch::{Device, Tensor};

use super::{BATCH, Evaluator, Features, knn, linear};
use crate::error::WorkerError;
use crate::metrics::EvalLine;

/// How a linear classifier is trained, with what it needs.
#[derive(Clone, Copy)]
pub(super) enum Linear {
    Logistic,
    Cached(linear::Settings),
    Augmented(linear::Settings),
}

impl Linear {
    /// As the arguments say, on a bank of so many images.
    pub(super) fn of(args: &EvalArgs, recipe: &Recipe, bank: u64) -> Result<Self, WorkerError> {
        let of_method = match recipe.method.name {
            MethodName::Simsiam => LinearProtocol::Simsiam,
            MethodName::Byol | MethodName::Mocov3 => LinearProtocol::Byol,
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

impl Evaluator {
    /// Trains a linear classifier on `trained` and on what it has to beat, in a world of one.
    pub(super) fn add_linear(
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
}
