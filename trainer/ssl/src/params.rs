//! Parameters as views of flat buffers.
//!
//! A network declares what it needs ([`Declarations`]); a [`Layout`] gives every parameter its place in one flat
//! buffer; [`Weights`] are one such buffer (the student's or the teacher's) with a leaf tensor per parameter.
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
use std::sync::{Arc, Mutex};

use mentee_torch_ext as ext;
use tch::{Device, Kind, Tensor, no_grad};

use crate::SslError;
use crate::gradients::{Gradients, lock};
use crate::normal::quantile;

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
pub struct StatId(usize);

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
    places: Vec<Option<Place>>,
    stats: Vec<Option<(String, i64)>>,
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

/// One flat buffer of parameters, with a leaf tensor for each.
#[derive(Debug)]
pub struct Weights {
    /// The places.
    pub layout: Arc<Layout>,
    /// All parameters, f32 or f64.
    pub master: Tensor,
    /// The convolution and linear parameters rounded to bf16, when computing in bf16.
    pub(crate) compute: Option<Tensor>,
    leaves: Vec<Option<Tensor>>,
}

impl Weights {
    /// A buffer of zeros with its leaves; `gradients` makes them trainable.
    pub fn new(layout: Arc<Layout>, kinds: Kinds, gradients: Option<&Gradients>) -> Result<Self, SslError> {
        let master = Tensor::f_zeros([layout.len], (kinds.master, kinds.device))?;
        let compute = (kinds.compute != kinds.master)
            .then(|| Tensor::f_zeros([layout.compute_len], (kinds.compute, kinds.device)))
            .transpose()?;
        let mut leaves = Vec::with_capacity(layout.places.len());
        for place in &layout.places {
            let Some(Place { declaration, range }) = place else {
                leaves.push(None);
                continue;
            };
            let in_compute = range.start < layout.compute_len;
            let buffer = compute.as_ref().filter(|_| in_compute).unwrap_or(&master);
            let trainable = gradients.is_some() && !declaration.frozen;
            leaves.push(Some(ext::leaf(buffer, range.start, &declaration.shape, trainable)?));
        }
        let mut weights = Self { layout, master, compute, leaves };
        gradients.map(|gradients| weights.send_gradients(gradients)).transpose()?;
        Ok(weights)
    }

    /// Backward passes bring the gradients of what is trained there from now on, each as soon as it is complete.
    pub fn send_gradients(&mut self, to: &Gradients) -> Result<(), SslError> {
        for (index, (leaf, place)) in self.leaves.iter_mut().zip(&self.layout.places).enumerate() {
            let (Some(leaf), Some(place)) = (leaf, place) else { continue };
            if leaf.requires_grad() {
                let (arrivals, to) = (to.arrivals.clone(), Mutex::new(view(&to.flat, place)?));
                ext::on_gradient(
                    leaf,
                    Box::new(move |gradient| arrivals.take(index, gradient, &mut lock(&to))),
                )?;
            }
        }
        Ok(())
    }

    /// Draws the initial values: a function of the seed and the declarations alone, to the last bit on any machine, and in f32
    /// whatever the precision.
    pub fn initialise(&mut self, seed: u64) -> Result<(), SslError> {
        tch::manual_seed(folded(seed).into());
        for place in self.layout.params() {
            let Declaration { shape, init, .. } = &place.declaration;
            let values = match *init {
                Init::KaimingFanOut => {
                    let std = (2.0 / (shape[0] * shape[2] * shape[3]) as f64).sqrt();
                    drawn(shape, |u| std * quantile(u))?
                }
                Init::Uniform { fan_in } => {
                    let bound = (1.0 / fan_in as f64).sqrt();
                    drawn(shape, |u| bound * (2.0 * u - 1.0))?
                }
                Init::TruncatedNormal { fan_in } => {
                    // The normal distribution's mass within two standard deviations.
                    const MASS: f64 = 0.954_499_736_103_641_6;
                    let std = (1.0 / fan_in as f64).sqrt();
                    drawn(shape, |u| std * quantile(0.5 + MASS * (u - 0.5)))?
                }
                Init::Constant(value) => Tensor::full(shape, value, (Kind::Float, Device::Cpu)),
            };
            self.named_view(place)?.f_copy_(&values)?;
        }
        self.refresh()
    }

    /// Rounds the parameters that are computed with to bf16 again; call after every change of `master`.
    pub fn refresh(&mut self) -> Result<(), SslError> {
        if let Some(compute) = &mut self.compute {
            let prefix = self.master.f_narrow(0, 0, self.layout.compute_len)?;
            no_grad(|| compute.f_copy_(&prefix))?;
        }
        Ok(())
    }

    /// The parameter as the network computes with it. Panics when this network has none of that name: layers are
    /// only run on weights of a layout that was made from their declarations.
    pub fn leaf(&self, id: ParamId) -> &Tensor {
        self.leaves[id.0].as_ref().expect("the teacher has no predictor")
    }

    /// The parameter in the master buffer, as a view.
    pub fn named_view(&self, place: &Place) -> Result<Tensor, SslError> {
        view(&self.master, place)
    }

    /// The master buffer, and what goes along with an update of `range` of it: the parameters in bf16, where it is computed
    /// with those.
    pub(crate) fn updated(&mut self, range: &Range<i64>) -> (&mut Tensor, Option<&mut Tensor>) {
        let in_compute = range.start < self.layout.compute_len;
        (&mut self.master, self.compute.as_mut().filter(|_| in_compute))
    }

    /// This teacher's parameters become the student's.
    pub fn copy_from(&mut self, student: &Weights) -> Result<(), SslError> {
        self.mix(student, 0.0)
    }

    /// teacher ← tau·teacher + (1 − tau)·student.
    pub fn mix(&mut self, student: &Weights, tau: f64) -> Result<(), SslError> {
        for (to, from) in self.layout.shared.clone().iter().zip(&student.layout.shared) {
            let (master, rounded) = self.updated(to);
            ext::ema(master, &student.master, rounded, to.start, from.start, to.end - to.start, tau)?;
        }
        Ok(())
    }
}

/// A parameter's place in any buffer that has its layout.
pub fn view(buffer: &Tensor, place: &Place) -> Result<Tensor, SslError> {
    Ok(ext::leaf(buffer, place.range.start, &place.declaration.shape, false)?)
}

/// Running statistics of every batch-norm layer of one network; apart from the parameters, because they change
/// between a forward pass and its backward.
#[derive(Debug, Clone)]
pub struct Stats {
    layers: Vec<Option<Layer>>,
}

#[derive(Debug, Clone)]
struct Layer {
    name: String,
    values: Values,
}

/// Where a layer's statistics are.
#[derive(Debug)]
pub(crate) enum Values {
    /// Means and unbiased variances, [C] each.
    Host { mean: Vec<f64>, variance: Vec<f64> },
    /// [2·C] doubles: means, then unbiased variances.
    Device(Tensor),
}

impl Clone for Values {
    fn clone(&self) -> Self {
        match self {
            Self::Host { mean, variance } => Self::Host { mean: mean.clone(), variance: variance.clone() },
            Self::Device(values) => Self::Device(values.copy()),
        }
    }
}

/// Running statistics of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningStatistics {
    /// `backbone.bn1`, `projector.1`, …
    pub name: String,
    /// [C]
    pub mean: Vec<f64>,
    /// [C], unbiased.
    pub variance: Vec<f64>,
}

impl Stats {
    /// Mean 0 and variance 1, as PyTorch starts.
    pub fn new(layout: &Layout, device: Device) -> Result<Self, SslError> {
        let layer = |(name, channels): &(String, i64)| -> Result<Layer, SslError> {
            let c = *channels as usize;
            let mut layer =
                Layer { name: name.clone(), values: Values::Host { mean: vec![], variance: vec![] } };
            if device != Device::Cpu {
                layer.values = Values::Device(Tensor::f_zeros([2 * channels], (Kind::Double, device))?);
            }
            layer.set(vec![0.0; c], vec![1.0; c])?;
            Ok(layer)
        };
        let layers = layout.stats.iter().map(|stat| stat.as_ref().map(layer).transpose());
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }

    /// Every layer, in the order of declaration; from a device they are copied.
    pub fn layers(&self) -> Result<Vec<RunningStatistics>, SslError> {
        self.layers.iter().flatten().map(Layer::read).collect()
    }

    /// Takes every layer's mean and variance from `of` its name.
    pub fn load(
        &mut self,
        of: impl Fn(&str) -> Result<(Vec<f64>, Vec<f64>), SslError>,
    ) -> Result<(), SslError> {
        for layer in self.layers.iter_mut().flatten() {
            let (mean, variance) = of(&layer.name)?;
            layer.set(mean, variance)?;
        }
        Ok(())
    }

    pub(crate) fn values(&self, id: StatId) -> &Values {
        &self.layers[id.0].as_ref().expect("the teacher has no predictor").values
    }

    /// running ← (1 − momentum)·running + momentum·batch, view by view, the variance unbiased.
    pub(crate) fn update(&mut self, id: StatId, batch: &ext::BatchNormStatistics, momentum: f64) {
        let layer = self.layers[id.0].as_mut().expect("the teacher has no predictor");
        let Values::Host { mean: running_mean, variance: running_variance } = &mut layer.values else {
            return;
        };
        let channels = running_mean.len();
        for (view, &count) in batch.count.iter().enumerate() {
            for c in 0..channels {
                let (mean, variance) = (batch.mean[view * channels + c], batch.variance[view * channels + c]);
                let unbiased = variance * count / (count - 1.0);
                running_mean[c] += momentum * (mean - running_mean[c]);
                running_variance[c] += momentum * (unbiased - running_variance[c]);
            }
        }
    }
}

impl Layer {
    fn read(&self) -> Result<RunningStatistics, SslError> {
        let (mean, variance) = match &self.values {
            Values::Host { mean, variance } => (mean.clone(), variance.clone()),
            Values::Device(values) => {
                let mut mean = Vec::<f64>::try_from(values)?;
                let variance = mean.split_off(mean.len() / 2);
                (mean, variance)
            }
        };
        Ok(RunningStatistics { name: self.name.clone(), mean, variance })
    }

    fn set(&mut self, mean: Vec<f64>, variance: Vec<f64>) -> Result<(), SslError> {
        match &mut self.values {
            Values::Device(values) => {
                values.f_copy_(&Tensor::f_from_slice(&[mean, variance].concat())?)?;
            }
            values @ Values::Host { .. } => *values = Values::Host { mean, variance },
        }
        Ok(())
    }
}

/// All bits of a seed in the 32 that libtorch's generator looks at; one of 32 bits stays as it is.
fn folded(seed: u64) -> u32 {
    let high = (seed >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (seed ^ high) as u32
}

/// What `of` makes of uniform draws between 0 and 1, which are multiples of 2^-53 and so the same everywhere.
fn drawn(shape: &[i64], of: impl Fn(f64) -> f64) -> Result<Tensor, SslError> {
    const LEAST: f64 = f64::EPSILON / 4.0; // for a draw of 0
    let uniform = Tensor::f_rand([shape.iter().product::<i64>()], (Kind::Double, Device::Cpu))?;
    let values: Vec<f32> =
        Vec::<f64>::try_from(uniform)?.into_iter().map(|u| of(u.max(LEAST)) as f32).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_seed_counts() {
        for seed in [0, 7, u32::MAX] {
            assert_eq!(folded(seed.into()), seed);
        }
        let mut all: Vec<u32> = (0..64).map(|bit| folded(7 ^ (1 << bit))).collect();
        all.push(folded(7));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 65);
    }
}
