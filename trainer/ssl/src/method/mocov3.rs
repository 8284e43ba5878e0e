//! MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers, arXiv:2104.02057, with ResNets;
//! `moco/builder.py` of facebookresearch/moco-v3.
//!
//! The student's prediction of one view has to find, among the teacher's projections of all images of the global
//! batch, that of its own image's other view (algorithm 1). So a rank needs the keys of all ranks, without a gradient.
//!
//! Where this differs from the official code: the teacher moves after an update, there before the forward pass of the
//! next, so the momentum of a move is that of one step earlier here.

use mentee_config::recipe;
use tch::{Kind, Tensor};

use super::{Method, Networks, StepLoss, target};
use crate::SslError;
use crate::encoder::ResNet;
use crate::head::{Mlp, MlpLayer, Then};
use crate::layers::{Bias, LinearInit, Pass};
use crate::layout::Declarations;
use crate::loss::{l2_normalise, swap_views};

/// MoCo v3 with its networks.
#[derive(Debug)]
pub struct MocoV3 {
    networks: Networks,
    settings: recipe::Method,
}

impl MocoV3 {
    /// Linear layers without bias, batch norm and ReLU between; the projector ends with a batch norm without scale and
    /// offset, the predictor of a ResNet without (`MoCo_ResNet._build_projector_and_predictor_mlps`).
    pub fn new(settings: &recipe::Method, backbone: ResNet, d: &mut Declarations) -> Self {
        let mlp = |d: &mut Declarations, name: &str, widths: &[i64], last: Then| {
            let layers: Vec<MlpLayer> = widths
                .windows(2)
                .enumerate()
                .map(|(i, channels)| MlpLayer {
                    channels: [channels[0], channels[1]],
                    bias: Bias::No,
                    then: if i == widths.len() - 2 { last } else { Then::NormRelu },
                })
                .collect();
            Mlp::new(d, name, &layers, LinearInit::Torch)
        };
        let (hidden, out) = (settings.projector_hidden as i64, settings.projector_out as i64);
        let mut widths = vec![backbone.feature_dim];
        widths.extend(std::iter::repeat_n(hidden, settings.projector_layers as usize - 1));
        widths.push(out);
        let projector = mlp(d, "projector", &widths, Then::PlainNorm);
        let predictor = settings
            .predictor
            .then(|| mlp(d, "predictor", &[out, settings.predictor_hidden as i64, out], Then::Nothing));
        Self { networks: Networks { backbone, projector, predictor }, settings: settings.clone() }
    }
}

impl Method for MocoV3 {
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
        let z = self.networks.project(student, views)?; // [2n, D]
        let q = l2_normalise(&self.networks.predict(student, &z)?)?; // [2n, D]
        let k = l2_normalise(&target(&self.networks, &self.settings, teacher, views, &z)?)?.detach(); // [2n, D]

        // Queries of view 1 look among keys of view 2, and the other way round; both kinds travel together.
        let (q, k) = (q.f_chunk(2, 0)?, swap_views(&k)?.f_chunk(2, 0)?); // [n, D] each
        let (keys, first) = student.gather(&Tensor::f_cat(&k, 1)?)?; // [N, 2D] of all ranks, where ours begin
        let keys = keys.f_chunk(2, 1)?; // [N, D] each
        let own = Tensor::f_arange_start(first, first + q[0].size()[0], (Kind::Int64, q[0].device()))?;

        // 2T · cross-entropy of q·k / T against its own image, both ways, mean over the batch. Equation 1.
        let t = self.settings.temperature;
        let mut own_image = Vec::with_capacity(2);
        for (q, keys) in q.iter().zip(&keys) {
            let log_p = (q.f_matmul(&keys.f_tr()?)? / t).f_log_softmax(1, q.kind())?; // [n, N]
            own_image.push(log_p.f_gather(1, &own.f_unsqueeze(1)?, false)?); // [n, 1]
        }
        let log_p = Tensor::f_cat(&own_image, 0)?.f_sum(None)?;
        Ok(StepLoss::new(log_p * (-2.0 * t / global_batch as f64), &z))
    }
}
