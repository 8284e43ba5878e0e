//! All training state, in one struct: what a checkpoint holds and what ranks must agree on.

use std::collections::BTreeMap;
use std::sync::Arc;

use mentee_config::recipe::{NormStatistics, Precision, Recipe, Teacher as TeacherKind};
use tch::{Device, Kind, Tensor, no_grad};

use crate::beside::{CudaSide, SideStream};
use crate::gradients::Gradients;
use crate::layers::{OverRanks, Pass};
use crate::layout::{Declarations, Kinds, Layout, view};
use crate::method::{Method, StepLoss};
use crate::optimizer::Optimizer;
use crate::params::Weights;
use crate::schedule::Rates;
use crate::statistics::Stats;
use crate::{SslError, method};

/// How many views of each image a batch holds.
pub const VIEWS: i64 = 2;

/// A network's parameters and running statistics.
#[derive(Debug)]
pub struct Network {
    /// Parameters.
    pub weights: Weights,
    /// Running statistics of its batch norms.
    pub stats: Stats,
}

impl Network {
    fn pass<'a>(&'a mut self, statistics: NormStatistics, over: &'a OverRanks) -> Pass<'a> {
        match statistics {
            NormStatistics::Batch => Pass::train(&self.weights, &mut self.stats, VIEWS, over),
            NormStatistics::Running => Pass::frozen(&self.weights, &self.stats, over),
        }
    }
}

/// Everything that training changes.
#[derive(Debug)]
pub struct State {
    /// Trained by gradient.
    pub student: Network,
    /// The student's gradients: in use only within a step.
    pub gradients: Gradients,
    /// Follows the student; none when the student is its own teacher.
    pub teacher: Option<Network>,
    /// Momentum.
    pub optimizer: Optimizer,
    /// Whether both views pass through a network together. Apart they give the same numbers (up to rounding), slower.
    pub one_pass: bool,
    /// Whether a step's loss comes with the features it was made of.
    pub keep_features: bool,
    /// Where the teacher's pass works, if not behind the student's. Not used where batch norms sum over ranks: all ranks' sums have
    /// one order.
    pub side: Option<Box<dyn SideStream>>,
}

/// The types that a precision means.
pub fn kinds(precision: Precision) -> Kinds {
    let (master, compute) = match precision {
        Precision::F32 => (Kind::Float, Kind::Float),
        Precision::Bf16 => (Kind::Float, Kind::BFloat16),
        Precision::F64 => (Kind::Double, Kind::Double),
    };
    Kinds { master, compute, device: Device::Cpu }
}

/// The method of a recipe and its state before the first step: a function of the recipe alone.
pub fn new(recipe: &Recipe) -> Result<(Box<dyn Method>, State), SslError> {
    on(recipe, Device::Cpu)
}

/// [`new`], with the same values, on a device.
pub fn on(recipe: &Recipe, device: Device) -> Result<(Box<dyn Method>, State), SslError> {
    let mut declarations = Declarations::default();
    let method = method::new(recipe, &mut declarations);
    let state = State::new(recipe, &declarations, device)?;
    Ok((method, state))
}

impl State {
    fn new(recipe: &Recipe, declarations: &Declarations, device: Device) -> Result<Self, SslError> {
        let kinds = Kinds { device, ..kinds(recipe.parallel.precision) };
        let layout = Arc::new(Layout::new(declarations, true));
        let gradients = Gradients::new(&layout, kinds)?;
        let mut student = Network {
            weights: Weights::new(layout.clone(), kinds, Some(&gradients))?,
            stats: Stats::new(&layout, device)?,
        };
        student.weights.initialise(recipe.run.seed)?;
        let teacher = match recipe.method.teacher {
            TeacherKind::Shared => None,
            TeacherKind::Ema | TeacherKind::CopyEachEpoch => {
                let layout = Arc::new(Layout::new(declarations, false));
                let mut weights = Weights::new(layout.clone(), kinds, None)?;
                weights.copy_from(&student.weights)?;
                Some(Network { weights, stats: Stats::new(&layout, device)? })
            }
        };
        let optimizer = Optimizer::new(&recipe.optimizer, &student.weights)?;
        let side: Option<Box<dyn SideStream>> = match device {
            Device::Cuda(index) if recipe.parallel.overlap_teacher => Some(Box::new(CudaSide::new(index)?)),
            _ => None,
        };
        Ok(Self { student, gradients, teacher, optimizer, one_pass: true, keep_features: false, side })
    }

    /// The loss of a batch [V·N, 3, H, W] of this rank: its samples' part of the mean over the global batch. Batch-norm
    /// statistics are those of the batch, over all ranks, or the running ones.
    pub fn loss(
        &mut self,
        method: &dyn Method,
        views: &Tensor,
        global_batch: u64,
        statistics: NormStatistics,
        over: &OverRanks,
    ) -> Result<StepLoss, SslError> {
        let mut student = self.student.pass(statistics, over);
        let mut teacher = self.teacher.as_mut().map(|teacher| teacher.pass(statistics, over));
        if !self.one_pass {
            student.views_apart();
            teacher.iter_mut().for_each(Pass::views_apart);
        }
        let sums = statistics == NormStatistics::Batch && over.reduce.is_some();
        if let Some(side) = self.side.as_deref().filter(|_| !sums)
            && let Some(teacher) = &mut teacher
        {
            side.fork()?;
            teacher.on_side(side);
        }
        if self.keep_features {
            student.keep_features();
        }
        let mut out = method.loss(&student, teacher.as_ref(), views, global_batch)?;
        out.features = student.take_features()?;
        Ok(out)
    }

    /// Brings the gradients of this rank's share of the loss to `gradients`, which tell when each is complete. Those of a step's
    /// first part, 0, replace what is there; those of later parts are added.
    pub fn backward(&mut self, loss: &Tensor, part: usize) -> Result<(), SslError> {
        if part == 0 {
            self.gradients.begin();
        }
        loss.f_backward().map_err(|error| self.gradients.failure().unwrap_or_else(|| error.into()))
    }

    /// Keeps gradients in `flat` from here on, a buffer of the same type and length. (Memory that ranks share, for one.)
    pub fn move_gradients(&mut self, flat: Tensor) -> Result<(), SslError> {
        debug_assert_eq!(
            (flat.size(), flat.kind()),
            (self.gradients.flat.size(), self.gradients.flat.kind())
        );
        self.gradients.flat = flat;
        self.student.weights.send_gradients(&self.gradients)
    }

    /// Where the state is.
    pub fn device(&self) -> Device {
        self.student.weights.master.device()
    }

    /// The norm of the flat gradient.
    pub fn grad_norm(&self) -> Result<f64, SslError> {
        Ok(mentee_torch_ext::norm(&self.gradients.flat)?)
    }

    /// Scales the gradient, whose norm is `norm`, down to `longest` where that is less (0: never), as
    /// `torch.nn.utils.clip_grad_norm_` does.
    pub fn clip_gradients(&mut self, norm: f64, longest: f64) -> Result<(), SslError> {
        let scale = longest / (norm + 1e-6);
        if longest > 0.0 && scale < 1.0 {
            let _ = no_grad(|| self.gradients.flat.f_mul_scalar_(scale))?;
        }
        Ok(())
    }

    /// The first parameter whose gradient holds a value that is not finite; empty when all are.
    pub fn non_finite_gradient(&self) -> Result<String, SslError> {
        for place in self.student.weights.layout.params() {
            let gradient = view(&self.gradients.flat, place)?;
            if gradient.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Ok(format!("student.{}", place.declaration.name));
            }
        }
        Ok(String::new())
    }

    /// The student moves along the mean gradient over the global batch.
    pub fn update(&mut self, rates: &Rates, step: u64) -> Result<(), SslError> {
        self.optimizer.step(&mut self.student.weights, &self.gradients, rates, step)
    }

    /// The teacher follows, once an update: teacher ← tau·teacher + (1 − tau)·student, or a copy at an epoch's end.
    pub fn move_teacher(
        &mut self,
        kind: TeacherKind,
        rates: &Rates,
        epoch_ends: bool,
    ) -> Result<(), SslError> {
        match (&mut self.teacher, kind) {
            (Some(teacher), TeacherKind::Ema) => teacher.weights.mix(&self.student.weights, rates.tau),
            (Some(teacher), TeacherKind::CopyEachEpoch) if epoch_ends => {
                teacher.weights.copy_from(&self.student.weights)
            }
            _ => Ok(()),
        }
    }

    /// Features of images [N, 3, H, W] by the student's backbone with its running statistics: [N, feature_dim], f32.
    pub fn features(&self, method: &dyn Method, images: &Tensor) -> Result<Tensor, SslError> {
        no_grad(|| {
            let pass = Pass::eval(&self.student.weights, &self.student.stats);
            let images = images.f_to_device(self.device())?;
            Ok(method.networks().backbone.forward(&pass, &images)?.f_to_kind(Kind::Float)?)
        })
    }

    /// Every tensor of the state under its name, as views of the master buffers (running statistics are copies).
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>, SslError> {
        let mut out = Vec::new();
        let networks = [("student", Some(&self.student)), ("teacher", self.teacher.as_ref())];
        for (prefix, network) in networks.iter().filter_map(|(p, n)| n.map(|n| (p, n))) {
            for place in network.weights.layout.params() {
                out.push((
                    format!("{prefix}.{}", place.declaration.name),
                    network.weights.named_view(place)?,
                ));
            }
            for layer in network.stats.layers()? {
                out.push((format!("{prefix}.{}.running_mean", layer.name), Tensor::from_slice(&layer.mean)));
                out.push((
                    format!("{prefix}.{}.running_var", layer.name),
                    Tensor::from_slice(&layer.variance),
                ));
            }
        }
        for (prefix, buffer) in self.moments() {
            for place in self.student.weights.layout.params() {
                out.push((format!("{prefix}.student.{}", place.declaration.name), view(buffer, place)?));
            }
        }
        Ok(out)
    }

    fn moments(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let second = self.optimizer.second_moment.as_ref().map(|t| ("second_moment", t));
        std::iter::once(("momentum", &self.optimizer.momentum)).chain(second)
    }

    /// Takes every tensor of the state from `tensors`, which must hold exactly the names that [`Self::tensors`]
    /// yields, of the same shapes and types. Nothing is changed on an error in names or shapes.
    pub fn load(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<(), SslError> {
        let own = self.tensors()?;
        for (name, expected) in &own {
            let Some(found) = tensors.get(name) else {
                return Err(SslError::Load { name: name.clone(), problem: "missing".into() });
            };
            if found.size() != expected.size() || found.kind() != expected.kind() {
                let problem = format!(
                    "{:?} of {:?} there, {:?} of {:?} in this recipe's network",
                    found.size(),
                    found.kind(),
                    expected.size(),
                    expected.kind()
                );
                return Err(SslError::Load { name: name.clone(), problem });
            }
        }
        if let Some(name) = tensors.keys().find(|name| !own.iter().any(|(own, _)| own == *name)) {
            return Err(SslError::Load { name: name.clone(), problem: "not part of this recipe".into() });
        }
        for (name, mut own) in own {
            no_grad(|| own.f_copy_(&tensors[&name]))?;
        }
        let networks = [("student", Some(&mut self.student)), ("teacher", self.teacher.as_mut())];
        for (prefix, network) in networks {
            let Some(network) = network else { continue };
            network.stats.load(|layer| {
                let values = |suffix: &str| -> Result<Vec<f64>, SslError> {
                    Ok(Vec::<f64>::try_from(&tensors[&format!("{prefix}.{layer}.{suffix}")])?)
                };
                Ok((values("running_mean")?, values("running_var")?))
            })?;
            network.weights.refresh()?;
        }
        Ok(())
    }
}
