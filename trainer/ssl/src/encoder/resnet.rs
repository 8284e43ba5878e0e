//! ResNets under torchvision's parameter names (arXiv:1512.03385; bottlenecks with the stride in the 3x3
//! convolution, as torchvision has them), and the 16-32-64 network for 32-pixel images (section 4.2).

use mentee_config::recipe::{Backbone, Model, Stem};
use tch::Tensor;

use crate::SslError;
use crate::layers::{Conv, Norm, Pass, Shortcut};
use crate::layout::Declarations;

/// A ResNet without its classifier.
#[derive(Debug, Clone)]
pub struct ResNet {
    conv1: Conv,
    bn1: Norm,
    pool: bool,
    blocks: Vec<Block>,
    /// Width of a feature vector.
    pub feature_dim: i64,
}

#[derive(Debug, Clone)]
struct Block {
    /// Two 3x3 convolutions, or 1x1, 3x3, 1x1; each with its norm.
    convs: Vec<(Conv, Norm)>,
    downsample: Option<(Conv, Norm)>,
}

struct Architecture {
    widths: &'static [i64],
    depths: &'static [i64],
    bottleneck: bool,
}

fn architecture(backbone: Backbone) -> Architecture {
    let (widths, depths, bottleneck): (&[i64], &[i64], bool) = match backbone {
        Backbone::Resnet18 => (&[64, 128, 256, 512], &[2, 2, 2, 2], false),
        Backbone::Resnet34 => (&[64, 128, 256, 512], &[3, 4, 6, 3], false),
        Backbone::Resnet50 => (&[64, 128, 256, 512], &[3, 4, 6, 3], true),
        Backbone::Resnet101 => (&[64, 128, 256, 512], &[3, 4, 23, 3], true),
        Backbone::Resnet20 => (&[16, 32, 64], &[3, 3, 3], false),
    };
    Architecture { widths, depths, bottleneck }
}

impl ResNet {
    /// Declares the parameters under `backbone.`.
    pub fn new(d: &mut Declarations, model: &Model) -> Self {
        let Architecture { widths, depths, bottleneck } = architecture(model.backbone);
        let expansion = if bottleneck { 4 } else { 1 };
        let last_scale = if model.zero_init_residual { 0.0 } else { 1.0 };
        let (kernel, stride) = match model.stem {
            Stem::Imagenet => (7, 2),
            Stem::Cifar => (3, 1),
        };
        let conv1 = Conv::new(d, "backbone.conv1", [3, widths[0]], kernel, stride);
        let bn1 = Norm::new(d, "backbone.bn1", widths[0], 1.0);
        let mut channels = widths[0];
        let mut blocks = Vec::new();
        for (stage, (&width, &depth)) in widths.iter().zip(depths).enumerate() {
            for index in 0..depth {
                let name = format!("backbone.layer{}.{index}", stage + 1);
                let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                let shape = BlockShape { c_in: channels, width, c_out: width * expansion, stride };
                blocks.push(Block::new(d, &name, shape, bottleneck, last_scale));
                channels = width * expansion;
            }
        }
        Self { conv1, bn1, pool: model.stem == Stem::Imagenet, blocks, feature_dim: channels }
    }

    /// [N, 3, H, W] to [N, feature_dim].
    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        let mut x = self.conv1.forward(pass, x)?;
        x = if self.pool { self.bn1.relu_pool(pass, &x)? } else { self.bn1.relu(pass, &x)? };
        let mut around = x.shallow_clone();
        for block in &self.blocks {
            (x, around) = block.forward(pass, &x, &around)?;
        }
        Ok(x.f_mean_dim([2i64, 3].as_slice(), false, x.kind())?)
    }
}

struct BlockShape {
    c_in: i64,
    width: i64,
    c_out: i64,
    stride: i64,
}

impl Block {
    fn new(d: &mut Declarations, name: &str, shape: BlockShape, bottleneck: bool, last_scale: f64) -> Self {
        let BlockShape { c_in, width, c_out, stride } = shape;
        // (channels, kernel, stride) of each convolution.
        let plan: &[([i64; 2], i64, i64)] = if bottleneck {
            &[([c_in, width], 1, 1), ([width, width], 3, stride), ([width, c_out], 1, 1)]
        } else {
            &[([c_in, width], 3, stride), ([width, c_out], 3, 1)]
        };
        let convs = plan
            .iter()
            .enumerate()
            .map(|(i, &(channels, kernel, stride))| {
                let scale = if i + 1 == plan.len() { last_scale } else { 1.0 };
                let conv = Conv::new(d, &format!("{name}.conv{}", i + 1), channels, kernel, stride);
                (conv, Norm::new(d, &format!("{name}.bn{}", i + 1), channels[1], scale))
            })
            .collect();
        let downsample = (stride != 1 || c_in != c_out).then(|| {
            let conv = Conv::new(d, &format!("{name}.downsample.0"), [c_in, c_out], 1, stride);
            (conv, Norm::new(d, &format!("{name}.downsample.1"), c_out, 1.0))
        });
        Self { convs, downsample }
    }

    /// The same input twice, see [`Norm::add_relu`]: for the convolutions and for the way around them. So is the output.
    fn forward(&self, pass: &Pass, input: &Tensor, around: &Tensor) -> Result<(Tensor, Tensor), SslError> {
        let made;
        let shortcut = match &self.downsample {
            Some((conv, norm)) => {
                made = conv.forward(pass, around)?;
                Shortcut::Normed(norm, &made)
            }
            None => Shortcut::As(around),
        };
        let (last, inner) = self.convs.split_last().expect("a block has convolutions");
        let mut x = input.shallow_clone();
        for (conv, norm) in inner {
            x = norm.relu(pass, &conv.forward(pass, &x)?)?;
        }
        last.1.add_relu(pass, &last.0.forward(pass, &x)?, shortcut)
    }
}
