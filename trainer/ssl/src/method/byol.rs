//! BYOL: Bootstrap Your Own Latent, arXiv:2006.07733; `byol/byol_experiment.py` of DeepMind's code, which is
//! followed where it and the paper differ.
//!
//! The student predicts, from one view, the teacher's projection of the other; the teacher is a moving average of
//! the student (section 3.1).

use mentee_config::recipe;
use tch::Tensor;

use super::{Method, Networks, StepLoss, target};
use crate::SslError;
use crate::encoder::ResNet;
use crate::head::{Mlp, MlpLayer, Then};
use crate::layers::{Bias, LinearInit, Pass};
use crate::layout::Declarations;
use crate::loss::{cosine, swap_views};

/// BYOL with its networks.
#[derive(Debug)]
pub struct Byol {
    networks: Networks,
    settings: recipe::Method,
}

impl Byol {
    /// Projector and predictor are Linear – BN – ReLU – Linear, the last without bias (`utils/networks.py`, MLP).
    pub fn new(settings: &recipe::Method, backbone: ResNet, d: &mut Declarations) -> Self {
        let mlp = |d: &mut Declarations, name: &str, widths: &[i64]| {
            let last = widths.len() - 2;
            let layers: Vec<MlpLayer> = widths
                .windows(2)
                .enumerate()
                .map(|(i, channels)| MlpLayer {
                    channels: [channels[0], channels[1]],
                    bias: if i == last { Bias::No } else { Bias::Yes },
                    then: if i == last { Then::Nothing } else { Then::NormRelu },
                })
                .collect();
            Mlp::new(d, name, &layers, LinearInit::Haiku)
        };
        let (hidden, out) = (settings.projector_hidden as i64, settings.projector_out as i64);
        let mut widths = vec![backbone.feature_dim];
        widths.extend(std::iter::repeat_n(hidden, settings.projector_layers as usize - 1));
        widths.push(out);
        let projector = mlp(d, "projector", &widths);
        let predictor =
            settings.predictor.then(|| mlp(d, "predictor", &[out, settings.predictor_hidden as i64, out]));
        Self { networks: Networks { backbone, projector, predictor }, settings: settings.clone() }
    }
}

impl Method for Byol {
    fn networks(&self) -> &Networks {
        &self.networks
    }

    fn loss(
        &self,
        student: &Pass,
        teacher: Option<&Pass>,
        views: &Tensor,
        global_batch: u64,
    ) -> Result<StepLoss, SslError> {
        let z = self.networks.project(student, views)?; // [2N, D]
        let p = self.networks.predict(student, &z)?; // [2N, D]
        let t = target(&self.networks, &self.settings, teacher, views, &z)?; // [2N, D]

        // |p̂₁ − t̂₂|² + |p̂₂ − t̂₁|², where |â − b̂|² = 2 − 2 cos(a, b); mean over the batch. Equations 2 and 3.
        let cosines = cosine(&p, &swap_views(&t)?)?; // [2N]
        let loss = (cosines * -2.0 + 2.0).f_sum(None)? / global_batch as f64;
        Ok(StepLoss::new(loss, &z))
    }
}
