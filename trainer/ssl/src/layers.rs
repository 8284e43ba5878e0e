//! Layers are descriptions; a [`Pass`] runs them on one set of weights. So the student and the teacher are the same
//! network on two buffers.

use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;

use mentee_torch_ext::{self as ext, DeviceReduce, StatReduce};
use tch::{Kind, Tensor};

use crate::SslError;
use crate::beside::SideStream;
use crate::layout::{Declaration, Declarations, Init, ParamId, Role, StatId};
use crate::params::Weights;
use crate::statistics::{Stats, Values};

/// Added to variances: PyTorch's and DeepMind's default.
pub const NORM_EPS: f64 = 1e-5;
/// Weight of a new batch in the running statistics: PyTorch's 0.1, DeepMind's decay of 0.9.
pub const NORM_MOMENTUM: f64 = 0.1;

/// Sums batch-norm statistics over ranks, where they are.
#[derive(Clone)]
pub enum Reduce {
    /// In host memory.
    Host(StatReduce),
    /// On a device.
    Device(DeviceReduce),
}

impl Reduce {
    fn on_host(&self) -> Option<&StatReduce> {
        match self {
            Self::Host(reduce) => Some(reduce),
            Self::Device(_) => None,
        }
    }

    fn on_device(&self) -> Option<&DeviceReduce> {
        match self {
            Self::Device(reduce) => Some(reduce),
            Self::Host(_) => None,
        }
    }
}

/// This rank's rows [n, D] to those of all ranks [N, D], in rank order, and where its own begin.
pub type GatherRows = dyn Fn(&Tensor) -> Result<(Tensor, i64), SslError> + Send + Sync;

/// What a pass gets from the other ranks.
#[derive(Clone)]
pub struct OverRanks {
    /// Sums batch-norm statistics; none where each rank has its own.
    pub reduce: Option<Reduce>,
    /// Collects rows, which carry no gradient; none in a world of one.
    pub gather: Option<Arc<GatherRows>>,
}

impl OverRanks {
    /// A world of one.
    pub const ALONE: Self = Self { reduce: None, gather: None };
}

/// One forward pass of a network.
pub struct Pass<'a> {
    weights: &'a Weights,
    mode: Mode<'a>,
    /// Whether the views pass through the networks one after the other.
    apart: bool,
    gather: Option<Arc<GatherRows>>,
    /// The backbone's features of this pass, without a graph, where somebody wants them.
    features: Option<RefCell<Vec<Tensor>>>,
    /// Where it works, if not on this thread's stream.
    side: Option<&'a dyn SideStream>,
}

enum Mode<'a> {
    Train {
        stats: RefCell<&'a mut Stats>,
        /// How many are stacked along the batch.
        views: Cell<i64>,
        reduce: Option<&'a Reduce>,
    },
    /// Trains with the running statistics as they are.
    Frozen {
        stats: &'a Stats,
    },
    Eval {
        stats: &'a Stats,
    },
}

impl<'a> Pass<'a> {
    /// Normalises each of `views` by its own batch, over all ranks, and updates running statistics.
    pub fn train(weights: &'a Weights, stats: &'a mut Stats, views: i64, over: &'a OverRanks) -> Self {
        let reduce = over.reduce.as_ref();
        let mode = Mode::Train { stats: RefCell::new(stats), views: Cell::new(views), reduce };
        Self { gather: over.gather.clone(), ..Self::new(weights, mode) }
    }

    /// Normalises by the running statistics, which stay as they are; differentiable.
    pub fn frozen(weights: &'a Weights, stats: &'a Stats, over: &'a OverRanks) -> Self {
        Self { gather: over.gather.clone(), ..Self::new(weights, Mode::Frozen { stats }) }
    }

    /// Normalises by the running statistics; keeps no graph through the norms.
    pub fn eval(weights: &'a Weights, stats: &'a Stats) -> Self {
        Self::new(weights, Mode::Eval { stats })
    }

    fn new(weights: &'a Weights, mode: Mode<'a>) -> Self {
        Self { weights, mode, apart: false, gather: None, features: None, side: None }
    }

    /// Rows [n, D] of all ranks, [N, D] in rank order, and where this rank's begin; without a gradient.
    pub fn gather(&self, rows: &Tensor) -> Result<(Tensor, i64), SslError> {
        match &self.gather {
            Some(gather) => gather(&rows.detach()),
            None => Ok((rows.detach(), 0)),
        }
    }

    /// Keeps the backbone's features for [`Self::take_features`].
    pub fn keep_features(&mut self) {
        self.features = Some(RefCell::default());
    }

    /// Called with the features of every part of the batch, in order.
    pub(crate) fn has_features(&self, features: &Tensor) {
        if let Some(kept) = &self.features {
            kept.borrow_mut().push(features.detach());
        }
    }

    /// The features [V·N, feature_dim] of what passed through, if they were kept.
    pub fn take_features(&self) -> Result<Option<Tensor>, SslError> {
        let Some(kept) = &self.features else { return Ok(None) };
        Ok(Some(Tensor::f_cat(&kept.take(), 0)?))
    }

    /// Has [`Self::beside`] work on `side`, which was forked.
    pub fn on_side(&mut self, side: &'a dyn SideStream) {
        self.side = Some(side);
    }

    /// Does `work` on the pass's side stream, where it has one. Streams are joined after a failure too.
    pub(crate) fn beside<T>(&self, work: impl FnOnce() -> Result<T, SslError>) -> Result<T, SslError> {
        let Some(side) = self.side else { return work() };
        side.enter()?;
        let done = work();
        side.join()?;
        done
    }

    /// Lets the views pass one after the other.
    pub fn views_apart(&mut self) {
        self.apart = true;
    }

    /// What `network` makes of the views [V·N, …], together or one after the other.
    pub fn run(
        &self,
        views: &Tensor,
        network: impl Fn(&Tensor) -> Result<Tensor, SslError>,
    ) -> Result<Tensor, SslError> {
        let Mode::Train { views: count, .. } = &self.mode else { return network(views) };
        if !self.apart {
            return network(views);
        }
        let all = count.replace(1);
        let parts = views.f_chunk(all, 0)?.iter().map(network).collect::<Result<Vec<_>, _>>();
        count.set(all);
        Ok(Tensor::f_cat(&parts?, 0)?)
    }

    /// The batch's side of training, if the statistics of `norm` are on a device.
    fn on_device(&self, norm: &Norm) -> Option<OnDevice<'_>> {
        let Mode::Train { stats, views, reduce } = &self.mode else { return None };
        let stats = stats.borrow();
        let on_device = matches!(stats.values(norm.stat), Values::Device(_));
        let reduce = reduce.and_then(Reduce::on_device);
        on_device.then(|| OnDevice { stats, views: views.get(), reduce })
    }

    /// The type activations have.
    fn compute_kind(&self, id: ParamId) -> tch::Kind {
        self.weights.leaf(id).kind()
    }
}

/// What a norm on a device trains with.
struct OnDevice<'a> {
    stats: Ref<'a, &'a mut Stats>,
    views: i64,
    reduce: Option<&'a DeviceReduce>,
}

impl OnDevice<'_> {
    fn running(&self, norm: &Norm) -> ext::Running<'_> {
        match self.stats.values(norm.stat) {
            Values::Device(values) => ext::Running { values, momentum: NORM_MOMENTUM },
            Values::Host { .. } => unreachable!("the statistics of all layers lie in one place"),
        }
    }
}

/// A convolution without bias.
#[derive(Debug, Clone)]
pub struct Conv {
    weight: ParamId,
    stride: i64,
    padding: i64,
}

impl Conv {
    /// `kernel` x `kernel` of stride `stride`, padded so that stride 1 keeps the size.
    pub fn new(d: &mut Declarations, name: &str, [c_in, c_out]: [i64; 2], kernel: i64, stride: i64) -> Self {
        let weight = d.param(Declaration {
            name: format!("{name}.weight"),
            shape: vec![c_out, c_in, kernel, kernel],
            role: Role::Weight,
            init: Init::KaimingFanOut,
            frozen: false,
        });
        Self { weight, stride, padding: kernel / 2 }
    }

    /// [N, C, H, W] to [N, C', H/stride, W/stride].
    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        let x = x.f_to_kind(pass.compute_kind(self.weight))?;
        Ok(ext::conv2d(&x, pass.weights.leaf(self.weight), self.stride, self.padding)?)
    }
}

/// A batch normalisation.
#[derive(Debug, Clone)]
pub struct Norm {
    affine: Option<(ParamId, ParamId)>,
    stat: StatId,
}

impl Norm {
    /// Over `channels`, scale starting at `scale`.
    pub fn new(d: &mut Declarations, name: &str, channels: i64, scale: f64) -> Self {
        let mut param = |suffix: &str, init| {
            d.param(Declaration {
                name: format!("{name}.{suffix}"),
                shape: vec![channels],
                role: Role::Norm,
                init: Init::Constant(init),
                frozen: false,
            })
        };
        let affine = Some((param("weight", scale), param("bias", 0.0)));
        Self { affine, stat: d.stat(name, channels) }
    }

    /// Over `channels`, without scale and offset.
    pub fn plain(d: &mut Declarations, name: &str, channels: i64) -> Self {
        Self { affine: None, stat: d.stat(name, channels) }
    }

    /// norm(x).
    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        self.run(pass, x, None, false)
    }

    /// relu(norm(x)).
    pub fn relu(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        self.run(pass, x, None, true)
    }

    /// relu(norm(x)), and the largest of each 3x3 places, two apart.
    pub fn relu_pool(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        if let Some(on) = pass.on_device(self) {
            let running = on.running(self);
            return Ok(ext::device_batch_norm_pool(x, self.of(pass, true), running, on.views, on.reduce)?);
        }
        Ok(self.relu(pass, x)?.f_max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false)?)
    }

    /// relu(norm(x) + shortcut), twice: for the convolutions behind it and for the way around them.
    pub fn add_relu(
        &self,
        pass: &Pass,
        x: &Tensor,
        shortcut: Shortcut,
    ) -> Result<(Tensor, Tensor), SslError> {
        if let Some(on) = pass.on_device(self) {
            let residual = match shortcut {
                Shortcut::As(x) => ext::Residual { x, norm: None },
                Shortcut::Normed(norm, x) => {
                    ext::Residual { x, norm: Some((norm.of(pass, false), on.running(norm))) }
                }
            };
            let (norm, running) = (self.of(pass, true), on.running(self));
            let (out, twin) =
                ext::device_batch_norm_train(x, norm, Some(residual), running, on.views, on.reduce)?;
            return Ok((twin.unwrap_or_else(|| out.shallow_clone()), out));
        }
        let out = match shortcut {
            Shortcut::As(residual) => self.run(pass, x, Some(residual), true)?,
            Shortcut::Normed(norm, residual) => {
                self.run(pass, x, Some(&norm.forward(pass, residual)?), true)?
            }
        };
        Ok((out.shallow_clone(), out))
    }

    fn of<'a>(&self, pass: &Pass<'a>, relu: bool) -> ext::Norm<'a> {
        let weights = pass.weights;
        let affine = self.affine.map(|(weight, bias)| (weights.leaf(weight), weights.leaf(bias)));
        ext::Norm { affine, eps: NORM_EPS, relu }
    }

    fn run(
        &self,
        pass: &Pass,
        x: &Tensor,
        residual: Option<&Tensor>,
        relu: bool,
    ) -> Result<Tensor, SslError> {
        let norm = self.of(pass, relu);
        if let Some(on) = pass.on_device(self) {
            // What has a residual does not come here.
            let running = on.running(self);
            return Ok(ext::device_batch_norm_train(x, norm, None, running, on.views, on.reduce)?.0);
        }
        match &pass.mode {
            Mode::Train { stats, views, reduce } => {
                let reduce = reduce.and_then(Reduce::on_host);
                let (y, batch) = ext::batch_norm_train(x, norm, residual, views.get(), reduce)?;
                stats.borrow_mut().update(self.stat, &batch, NORM_MOMENTUM);
                Ok(y)
            }
            Mode::Frozen { stats } => {
                let kind = statistics_kind(x);
                let (mean, variance) = match stats.values(self.stat) {
                    Values::Host { mean, variance } => {
                        (Tensor::from_slice(mean), Tensor::from_slice(variance))
                    }
                    Values::Device(running) => {
                        let half = running.size()[0] / 2;
                        (running.f_narrow(0, 0, half)?, running.f_narrow(0, half, half)?)
                    }
                };
                let (mean, variance) = (mean.f_to_kind(kind)?, variance.f_to_kind(kind)?);
                let (weight, bias) = (norm.affine.map(|a| a.0), norm.affine.map(|a| a.1));
                let mut y =
                    x.f_batch_norm(weight, bias, Some(&mean), Some(&variance), false, 0.0, NORM_EPS, false)?;
                if let Some(residual) = residual {
                    y = y.f_add(residual)?;
                }
                Ok(if relu { y.f_relu()? } else { y })
            }
            Mode::Eval { stats } => Ok(match stats.values(self.stat) {
                Values::Host { mean, variance } => ext::batch_norm_apply(x, norm, residual, mean, variance)?,
                Values::Device(running) => ext::device_batch_norm_apply(x, norm, residual, running)?,
            }),
        }
    }
}

/// What goes around the convolutions of a residual block.
#[derive(Clone, Copy)]
pub enum Shortcut<'a> {
    /// As it is.
    As(&'a Tensor),
    /// Normalised.
    Normed(&'a Norm, &'a Tensor),
}

/// The type of the statistics of activations `x`.
fn statistics_kind(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Whose initialisation a linear layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearInit {
    /// `torch.nn.Linear`.
    Torch,
    /// Haiku's `Linear`: truncated normal weights, zero biases.
    Haiku,
}

/// Whether a linear layer has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// None.
    No,
    /// Trained.
    Yes,
    /// Kept at its initial value.
    Frozen,
}

/// A linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl Linear {
    /// `c_in` to `c_out`.
    pub fn new(
        d: &mut Declarations,
        name: &str,
        [c_in, c_out]: [i64; 2],
        bias: Bias,
        init: LinearInit,
    ) -> Self {
        let (weight_init, bias_init) = match init {
            LinearInit::Torch => (Init::Uniform { fan_in: c_in }, Init::Uniform { fan_in: c_in }),
            LinearInit::Haiku => (Init::TruncatedNormal { fan_in: c_in }, Init::Constant(0.0)),
        };
        let mut param = |suffix: &str, shape, role, init, frozen| {
            d.param(Declaration { name: format!("{name}.{suffix}"), shape, role, init, frozen })
        };
        let weight = param("weight", vec![c_out, c_in], Role::Weight, weight_init, false);
        let bias = (bias != Bias::No)
            .then(|| param("bias", vec![c_out], Role::Bias, bias_init, bias == Bias::Frozen));
        Self { weight, bias }
    }

    /// [N, in] to [N, out].
    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor, SslError> {
        let x = x.f_to_kind(pass.compute_kind(self.weight))?;
        let bias = self.bias.map(|id| pass.weights.leaf(id));
        Ok(ext::linear(&x, pass.weights.leaf(self.weight), bias)?)
    }
}
