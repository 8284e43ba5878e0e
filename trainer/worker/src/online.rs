//! A linear classifier that is trained beside the encoder, on the features of every step: how good they are while they are
//! made, at the price of a small matrix product. The encoder does not notice: features come without a graph.
//!
//! Softmax regression on both views by SGD as in `main_lincls.py` of facebookresearch/moco-v3 (momentum 0.9, no decay, lr
//! 0.1 · batch/256), the rate constant and the weights zero at first; in f64, so that it is the same on any number of ranks
//! wherever the encoder is. It is part of a checkpoint, under the names `probe.…`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use mentee_collectives::{Buffer, Collectives};
use mentee_config::Recipe;
use mentee_data::Source;
use mentee_ssl::StepLoss;
use mentee_ssl::state::VIEWS;
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::views;

/// Learning rate per 256 images.
const BASE_LR: f64 = 0.1;
const MOMENTUM: f64 = 0.9;
/// What its tensors in a checkpoint begin with.
pub const PREFIX: &str = "probe.";

/// See the module.
pub struct OnlineProbe {
    source: Arc<dyn Source>,
    /// Weight [C, D] and bias [C].
    params: [Tensor; 2],
    momentum: [Tensor; 2],
    lr: f64,
    /// Correct and all views since somebody asked: whole numbers.
    since: [f64; 2],
}

impl OnlineProbe {
    /// The probe of a run, where its recipe asks for one and the images have labels.
    pub fn of_run(recipe: &Recipe, source: Arc<dyn Source>, dim: i64) -> Result<Option<Self>, WorkerError> {
        if !recipe.eval.online_probe {
            return Ok(None);
        }
        let labels = (0..source.len()).map(|index| source.label(index)).collect::<Option<Vec<u32>>>();
        let Some(labels) = labels else {
            tracing::warn!("not all training images have labels: no online probe during this run");
            return Ok(None);
        };
        let classes = labels.iter().max().map_or(0, |&most| i64::from(most) + 1);
        let zeros = || -> Result<[Tensor; 2], WorkerError> {
            let options = (Kind::Double, Device::Cpu);
            Ok([Tensor::f_zeros([classes, dim], options)?, Tensor::f_zeros([classes], options)?])
        };
        let lr = BASE_LR * recipe.schedule.global_batch as f64 / 256.0;
        Ok(Some(Self { source, params: zeros()?, momentum: zeros()?, lr, since: [0.0; 2] }))
    }

    /// Learns from the features of a step's parts; `ids` are this rank's samples and `share` their places within the global
    /// batch.
    pub fn step(
        &mut self,
        collectives: &dyn Collectives,
        step: u64,
        parts: &[StepLoss],
        ids: &[u64],
        share: &Range<u64>,
    ) -> Result<(), WorkerError> {
        let label = |&id: &u64| self.source.label(id).map_or(-1, i64::from);
        let labels: Vec<i64> = ids.iter().map(label).collect();
        let labels = Tensor::f_from_slice(&labels)?.f_repeat([VIEWS])?; // [V·N]
        let labels = views::micro_batches(&labels, share, parts.len() as u64)?;
        let [weight, bias] = &self.params;
        let (classes, dim) = weight.size2()?;
        let mut gradients = [weight.f_zeros_like()?, bias.f_zeros_like()?];
        let (mut correct, mut rows) = (0.0, 0.0);
        for (part, labels) in parts.iter().zip(&labels) {
            let Some(features) = &part.features else { continue };
            let x = features.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
            let logits = x.f_linear(weight, Some(bias))?;
            let right = logits.f_argmax(1, false)?.f_eq_tensor(labels)?;
            correct += right.f_sum(Kind::Double)?.f_double_value(&[])?;
            rows += x.size()[0] as f64;
            let error = logits.f_softmax(1, Kind::Double)? - labels.f_one_hot(classes)?;
            gradients[0] += error.f_tr()?.f_matmul(&x)?;
            gradients[1] += error.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
        }
        // [correct, rows, gradients]
        let mut message = vec![correct, rows];
        for gradient in &gradients {
            message.extend(Vec::<f64>::try_from(gradient.f_view([-1])?)?);
        }
        collectives
            .all_reduce_sum(Buffer::F64(&mut message))
            .map_err(|source| WorkerError::Collective { step, source })?;
        self.since[0] += message[0];
        self.since[1] += message[1];
        let of_weight =
            Tensor::f_from_slice(&message[2..2 + (classes * dim) as usize])?.f_view([classes, dim])?;
        let of_bias = Tensor::f_from_slice(&message[2 + (classes * dim) as usize..])?;
        for ((p, m), g) in self.params.iter_mut().zip(&mut self.momentum).zip([of_weight, of_bias]) {
            *m *= MOMENTUM;
            *m += g / message[1];
            *p -= &*m * self.lr;
        }
        Ok(())
    }

    /// Accuracy, in percent, on the views of the steps since the last call, each classified before it was learned from.
    pub fn take_top1(&mut self) -> Option<f64> {
        let [correct, rows] = std::mem::take(&mut self.since);
        (rows > 0.0).then(|| 100.0 * correct / rows)
    }

    /// Correct and all views since somebody asked.
    pub fn counts(&self) -> [u64; 2] {
        self.since.map(|count| count as u64)
    }

    /// Goes on counting from there.
    pub fn count_on(&mut self, counts: [u64; 2]) {
        self.since = counts.map(|count| count as f64);
    }

    /// What a checkpoint holds of it.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let names = ["weight", "bias"];
        let of = |prefix: &str, tensors: &[Tensor; 2]| {
            names
                .iter()
                .zip(tensors)
                .map(|(name, tensor)| (format!("{PREFIX}{prefix}{name}"), tensor.shallow_clone()))
                .collect::<Vec<_>>()
        };
        let mut all = of("", &self.params);
        all.extend(of("momentum.", &self.momentum));
        all
    }

    /// Goes on from what a checkpoint holds; from zero where it holds no probe of these classes and features.
    pub fn load(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<(), WorkerError> {
        let own = self.tensors();
        let fits = own.iter().all(|(name, own)| {
            tensors.get(name).is_some_and(|found| found.size() == own.size() && found.kind() == own.kind())
        });
        if !fits {
            tracing::warn!("the checkpoint holds no online probe that fits: it starts from zero");
            return Ok(());
        }
        for (name, mut own) in own {
            own.f_copy_(&tensors[&name])?;
        }
        Ok(())
    }
}
