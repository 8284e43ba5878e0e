//! LARS, SGD and AdamW over flat buffers. Which parameters are decayed and adapted goes by their role, not by name.

use mentee_config::recipe::{Optimizer as Settings, OptimizerName};
use mentee_torch_ext as ext;
use tch::{Device, Tensor};

use crate::SslError;
use crate::params::{Gradients, Layout, Place, Role, Weights};
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
}

impl Optimizer {
    /// Moments of zero.
    pub fn new(settings: &Settings, weights: &Weights) -> Self {
        let zeros = || Tensor::zeros([weights.layout.len], (weights.master.kind(), Device::Cpu));
        Self {
            settings: settings.clone(),
            momentum: zeros(),
            second_moment: (settings.name == OptimizerName::Adamw).then(zeros),
        }
    }

    /// Updates the student with the mean gradient over the global batch; `step` counts from 0.
    pub fn step(
        &mut self,
        weights: &mut Weights,
        gradients: &Gradients,
        rates: &Rates,
        step: u64,
    ) -> Result<(), SslError> {
        let layout = weights.layout.clone();
        for place in trained(&layout) {
            self.update(&mut weights.master, &gradients.flat, place, rates, step)?;
        }
        weights.refresh()
    }

    fn update(
        &mut self,
        param: &mut Tensor,
        grad: &Tensor,
        place: &Place,
        rates: &Rates,
        step: u64,
    ) -> Result<(), SslError> {
        let settings = &self.settings;
        let excluded = settings.exclude_bias_and_norm && place.declaration.role != Role::Weight;
        let weight_decay = if excluded { 0.0 } else { rates.weight_decay };
        let lr = if place.declaration.name.starts_with("predictor.") { rates.predictor_lr } else { rates.lr };
        let range = place.range.clone();
        match settings.name {
            OptimizerName::Lars if !excluded => ext::lars(
                param,
                grad,
                &mut self.momentum,
                range,
                lr,
                settings.momentum,
                weight_decay,
                settings.lars_eta,
            )?,
            OptimizerName::Lars | OptimizerName::Sgd => {
                ext::sgd(param, grad, &mut self.momentum, range, lr, settings.momentum, weight_decay)?;
            }
            OptimizerName::Adamw => {
                let second = self.second_moment.as_mut().expect("made in new");
                let moments = (&mut self.momentum, second);
                ext::adamw(
                    param,
                    grad,
                    moments,
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

fn trained(layout: &Layout) -> impl Iterator<Item = &Place> {
    layout.params().filter(|place| !place.declaration.frozen)
}
