//! What a network needs, and where each of its parameters lies in a flat buffer.
//!
//! A network declares what it needs ([`Declarations`]); a [`Layout`] gives every parameter its place.
//!
//! The buffer is ordered so that the parts that are treated alike lie together:
//!
//! ```text
//! | weights of backbone, projector | weights of predictor | norms of backbone, projector | norms of predictor |
//! |<------------------ computed in bf16 when asked ----->|<--------------------- always f32 ---------------->|
//! ```
//!
//! The teacher has no predictor; its two parts are copies of the student's first and third.

use std::ops::Range;

use mentee_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::SslError;

/// Elements to which every parameter's place is rounded up: 64 bytes of f32.
const ALIGN: i64 = 16;

/// What a parameter is: decides weight decay and LARS adaptation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A convolution's or linear layer's weight.
    Weight,
    /// A linear layer's bias.
    Bias,
    /// Scale or offset of a normalisation.
    Norm,
}

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with variance 2 / (kernel area · out channels): torchvision's convolutions (arXiv:1502.01852).
    KaimingFanOut,
    /// Uniform in ±1/sqrt(fan in): `torch.nn.Linear`, weights and biases.
    Uniform {
        /// Inputs of the layer.
        fan_in: i64,
    },
    /// Normal cut at two standard deviations, of standard deviation 1/sqrt(fan in): Haiku's `Linear`.
    TruncatedNormal {
        /// Inputs of the layer.
        fan_in: i64,
    },
    /// One value everywhere.
    Constant(f64),
}

/// One parameter as a network declares it.
#[derive(Debug, Clone)]
pub struct Declaration {
    /// `backbone.conv1.weight`, `projector.0.bias`, …
    pub name: String,
    /// [O, I, H, W], [out, in] or [C].
    pub shape: Vec<i64>,
    /// What it is.
    pub role: Role,
    /// How it starts.
    pub init: Init,
    /// Never updated (SimSiam's last projector bias).
    pub frozen: bool,
}

/// Index of a parameter among the declarations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamId(pub(crate) usize);

/// Index of a batch-norm layer among the declarations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatId(pub(crate) usize);

/// What a network needs: parameters, and batch-norm layers with their channels.
#[derive(Debug, Clone, Default)]
pub struct Declarations {
    params: Vec<Declaration>,
    stats: Vec<(String, i64)>,
}

impl Declarations {
    /// Declares a parameter.
    pub fn param(&mut self, declaration: Declaration) -> ParamId {
        self.params.push(declaration);
        ParamId(self.params.len() - 1)
    }

    /// Declares running statistics `name.running_mean` and `name.running_var` of `channels` values.
    pub fn stat(&mut self, name: &str, channels: i64) -> StatId {
        self.stats.push((name.to_owned(), channels));
        StatId(self.stats.len() - 1)
    }
}

fn is_predictor(name: &str) -> bool {
    name.starts_with("predictor.")
}

/// Where a parameter lies.
#[derive(Debug, Clone)]
pub struct Place {
    /// What was declared.
    pub declaration: Declaration,
    /// Elements of the flat buffer (without padding).
    pub range: Range<i64>,
}

/// The place of every parameter of a network in its flat buffer.
#[derive(Debug)]
pub struct Layout {
    pub(crate) places: Vec<Option<Place>>,
    pub(crate) stats: Vec<Option<(String, i64)>>,
    /// Elements in all, padding included.
    pub len: i64,
    /// The first so many elements are convolution and linear parameters.
    pub compute_len: i64,
    /// The parts that student and teacher share, in the order of both buffers.
    pub shared: [Range<i64>; 2],
}

impl Layout {
    /// The student's layout, or (without predictor) the teacher's.
    pub fn new(declarations: &Declarations, with_predictor: bool) -> Self {
        let mut places = vec![None; declarations.params.len()];
        let mut offset = 0;
        let mut part = |norm: bool, predictor: bool| {
            let begin = offset;
            for (place, declaration) in places.iter_mut().zip(&declarations.params) {
                if (declaration.role == Role::Norm) == norm && is_predictor(&declaration.name) == predictor {
                    let len: i64 = declaration.shape.iter().product();
                    *place = Some(Place { declaration: declaration.clone(), range: offset..offset + len });
                    offset += (len + ALIGN - 1) / ALIGN * ALIGN;
                }
            }
            begin..offset
        };
        let weights = part(false, false);
        let compute_len = if with_predictor { part(false, true).end } else { weights.end };
        let norms = part(true, false);
        let len = if with_predictor { part(true, true).end } else { norms.end };
        let stats = declarations
            .stats
            .iter()
            .map(|stat| (with_predictor || !is_predictor(&stat.0)).then(|| stat.clone()))
            .collect();
        Self { places, stats, len, compute_len, shared: [weights, norms] }
    }

    /// Every parameter of this layout, in the order of declaration.
    pub fn params(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().flatten()
    }

    /// Every parameter that has a gradient, with its index among the declarations.
    pub fn trained(&self) -> impl DoubleEndedIterator<Item = (usize, &Place)> {
        let places = self.places.iter().enumerate();
        places
            .filter_map(|(index, place)| Some((index, place.as_ref()?)))
            .filter(|(_, place)| !place.declaration.frozen)
    }

    /// How many parameters were declared: the student has all of them.
    pub(crate) fn declared(&self) -> usize {
        self.places.len()
    }

    /// How many numbers are trained.
    pub fn num_parameters(&self) -> i64 {
        self.params().map(|place| place.range.end - place.range.start).sum()
    }
}

/// The types a network is kept and computed in, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    /// Parameters, gradients after reduction, moments.
    pub master: Kind,
    /// Convolutions, linear layers and activations.
    pub compute: Kind,
    /// Of all buffers.
    pub device: Device,
}

/// A parameter's place in any buffer that has its layout.
pub fn view(buffer: &Tensor, place: &Place) -> Result<Tensor, SslError> {
    Ok(ext::leaf(buffer, place.range.start, &place.declaration.shape, false)?)
}
