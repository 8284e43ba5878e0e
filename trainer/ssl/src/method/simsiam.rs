//! SimSiam: Exploring Simple Siamese Representation Learning, arXiv:2011.10566; `simsiam/builder.py` of the
//! authors' code.
//!
//! No teacher of its own: the student predicts its own projection of the other view, through which no gradient
//! flows (algorithm 1).

use mentee_config::recipe;
use tch::Tensor;

use super::{Method, Networks, StepLoss, target};
use crate::SslError;
use crate::encoder::ResNet;
use crate::head::{Mlp, MlpLayer, Then};
use crate::layers::{Bias, LinearInit, Pass};
use crate::layout::Declarations;
use crate::loss::{cosine, swap_views};

/// SimSiam with its networks.
#[derive(Debug)]
pub struct Simsiam {
    networks: Networks,
    settings: recipe::Method,
}

impl Simsiam {
    /// Projector: Linear – BN – ReLU layers without bias, then a Linear whose bias stays at its initial value (it is
    /// followed by a batch norm) and a batch norm without scale and offset. Predictor: Linear – BN – ReLU – Linear.
    pub fn new(settings: &recipe::Method, backbone: ResNet, d: &mut Declarations) -> Self {
        let (hidden, out) = (settings.projector_hidden as i64, settings.projector_out as i64);
        let mut layers = Vec::new();
        let mut channels = backbone.feature_dim;
        for _ in 1..settings.projector_layers {
            layers.push(MlpLayer { channels: [channels, hidden], bias: Bias::No, then: Then::NormRelu });
            channels = hidden;
        }
        layers.push(MlpLayer { channels: [channels, out], bias: Bias::Frozen, then: Then::PlainNorm });
        let projector = Mlp::new(d, "projector", &layers, LinearInit::Torch);
        let predictor = settings.predictor.then(|| {
            let hidden = settings.predictor_hidden as i64;
            let layers = [
                MlpLayer { channels: [out, hidden], bias: Bias::No, then: Then::NormRelu },
                MlpLayer { channels: [hidden, out], bias: Bias::Yes, then: Then::Nothing },
            ];
            Mlp::new(d, "predictor", &layers, LinearInit::Torch)
        });
        Self { networks: Networks { backbone, projector, predictor }, settings: settings.clone() }
    }
}

impl Method for Simsiam {
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

        // −(cos(p₁, z₂) + cos(p₂, z₁)) / 2, mean over the batch. Equations 1 to 4.
        let cosines = cosine(&p, &swap_views(&t)?)?; // [2N]
        let loss = cosines.f_sum(None)? / (-2.0 * global_batch as f64);
        Ok(StepLoss::new(loss, &z))
    }
}
