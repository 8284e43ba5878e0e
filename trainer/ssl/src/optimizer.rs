//! LARS, SGD and AdamW over flat buffers. Which parameters are decayed and adapted goes by their role, not by name.

use mentee_config::recipe::{Optimizer as Settings, OptimizerName};
use mentee_torch_ext as ext;
use tch::{Device, Tensor};

use crate::SslError;
use crate::gradients::Gradients;
use crate::layout::{Layout, Place, Role};
use crate::params::Weights;
use crate::schedule::Rates;

/// AdamW's guard against division by zero: PyTorch's default.
const ADAM_EPS: f64 = 1e-8;

/// The optimizer's settings and its own state.
#[derive(Debug)]
pub struct Optimizer {
    settings: Settings,
    /// LARS's and SGD's momentum, AdamW's first moment: in the student's layout.
    pub momentum: Tensor,
    /// AdamW's second moment.
    pub second_moment: Option<Tensor>,
    /// On a device: all parameters, for one kernel.
    table: Option<ext::UpdateTable>,
}

impl Optimizer {
    /// Moments of zero.
    pub fn new(settings: &Settings, weights: &Weights) -> Result<Self, SslError> {
        let device = weights.master.device();
        let zeros = || Tensor::f_zeros([weights.layout.len], (weights.master.kind(), device));
        let range = |place: &Place| {
            let excluded = is_excluded(settings, place);
            ext::UpdateRange {
                range: place.range.clone(),
                decays: !excluded,
                adapts: settings.name == OptimizerName::Lars && !excluded,
                predictor: is_of_predictor(place),
            }
        };
        let ranges: Vec<ext::UpdateRange> = trained(&weights.layout).map(range).collect();
        Ok(Self {
            settings: settings.clone(),
            momentum: zeros()?,
            second_moment: (settings.name == OptimizerName::Adamw).then(zeros).transpose()?,
            table: (device != Device::Cpu).then(|| ext::UpdateTable::new(&ranges, device)).transpose()?,
        })
    }

    /// Updates the student with the mean gradient over the global batch; `step` counts from 0.
    pub fn step(
        &mut self,
        weights: &mut Weights,
        gradients: &Gradients,
        rates: &Rates,
        step: u64,
    ) -> Result<(), SslError> {
        if self.table.is_some() {
            self.update_all(&mut weights.master, &gradients.flat, rates, step)?;
            return weights.refresh();
        }
        let layout = weights.layout.clone();
        for place in trained(&layout) {
            self.update(weights, &gradients.flat, place, rates, step)?;
        }
        Ok(())
    }

    /// On a device.
    fn update_all(
        &mut self,
        param: &mut Tensor,
        grad: &Tensor,
        rates: &Rates,
        step: u64,
    ) -> Result<(), SslError> {
        let (Some(table), settings) = (&self.table, &self.settings) else { return Ok(()) };
        let &Rates { lr, predictor_lr, weight_decay, .. } = rates;
        let rates = ext::UpdateRates { lr, predictor_lr, weight_decay };
        match (settings.name, &mut self.second_moment) {
            (OptimizerName::Adamw, Some(second)) => {
                let moments = (&mut self.momentum, second);
                table.adamw(param, grad, moments, rates, settings.betas, ADAM_EPS, step + 1)?;
            }
            _ => table.momentum(
                param,
                grad,
                &mut self.momentum,
                rates,
                settings.momentum,
                settings.lars_eta,
            )?,
        }
        Ok(())
    }

    fn update(
        &mut self,
        weights: &mut Weights,
        grad: &Tensor,
        place: &Place,
        rates: &Rates,
        step: u64,
    ) -> Result<(), SslError> {
        let settings = &self.settings;
        let excluded = is_excluded(settings, place);
        let weight_decay = if excluded { 0.0 } else { rates.weight_decay };
        let lr = if is_of_predictor(place) { rates.predictor_lr } else { rates.lr };
        let range = place.range.clone();
        let (param, rounded) = weights.updated(&range);
        match settings.name {
            OptimizerName::Lars if !excluded => ext::lars(
                param,
                grad,
                &mut self.momentum,
                rounded,
                range,
                lr,
                settings.momentum,
                weight_decay,
                settings.lars_eta,
            )?,
            OptimizerName::Lars | OptimizerName::Sgd => {
                let momentum = &mut self.momentum;
                ext::sgd(param, grad, momentum, rounded, range, lr, settings.momentum, weight_decay)?;
            }
            OptimizerName::Adamw => {
                let second = self.second_moment.as_mut().expect("made in new");
                let moments = (&mut self.momentum, second);
                ext::adamw(
                    param,
                    grad,
                    moments,
                    rounded,
                    range,
                    lr,
                    settings.betas,
                    ADAM_EPS,
                    weight_decay,
                    step + 1,
                )?;
            }
        }
        Ok(())
    }
}

/// Neither decayed nor adapted.
fn is_excluded(settings: &Settings, place: &Place) -> bool {
    settings.exclude_bias_and_norm && place.declaration.role != Role::Weight
}

fn is_of_predictor(place: &Place) -> bool {
    place.declaration.name.starts_with("predictor.")
}

fn trained(layout: &Layout) -> impl Iterator<Item = &Place> {
    layout.params().filter(|place| !place.declaration.frozen)
}
