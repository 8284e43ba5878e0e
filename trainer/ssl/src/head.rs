//! Projectors and predictors: small MLPs, numbered as in a `torch.nn.Sequential`.

use tch::Tensor;

use crate::SslError;
use crate::layers::{Bias, Linear, LinearInit, Norm, Pass};
use crate::layout::Declarations;

/// Linear layers, each optionally followed by batch norm and ReLU.
#[derive(Debug, Clone)]
pub struct Mlp {
    layers: Vec<(Linear, Option<(Norm, bool)>)>,
}

/// One linear layer of an MLP and what follows it.
#[derive(Debug, Clone, Copy)]
pub struct MlpLayer {
    /// Inputs and outputs.
    pub channels: [i64; 2],
    /// Its bias.
    pub bias: Bias,
    /// What follows.
    pub then: Then,
}

/// What follows a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Nothing: the output.
    Nothing,
    /// Batch norm and ReLU.
    NormRelu,
    /// Batch norm without scale and offset: the output.
    PlainNorm,
}

impl Mlp {
    /// Declares the parameters under `name.`.
    pub fn new(d: &mut Declarations, name: &str, layers: &[MlpLayer], init: LinearInit) -> Self {
        let mut index = 0;
        let layers = layers
            .iter()
            .map(|layer| {
                let linear = Linear::new(d, &format!("{name}.{index}"), layer.channels, layer.bias, init);
                let norm_name = format!("{name}.{}", index + 1);
                let norm = match layer.then {
                    Then::Nothing => None,
                    Then::NormRelu => Some((Norm::new(d, &norm_name, layer.channels[1], 1.0), true)),
                    Then::PlainNorm => Some((Norm::plain(d, &norm_name, layer.channels[1]), false)),
                };
                index += 3;
                (linear, norm)
            })
            .collect();
        Self { layers }
    }

    /// [N, in] to [N, out].
    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        let mut x = x.shallow_clone();
        for (linear, norm) in &self.layers {
            x = linear.forward(pass, &x)?;
            x = match norm {
                Some((norm, true)) => norm.relu(pass, &x)?,
                Some((norm, false)) => norm.forward(pass, &x)?,
                None => x,
            };
        }
        Ok(x)
    }
}
