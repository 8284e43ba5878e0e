//! The student's gradients, from backward passes to the buffer that ranks sum.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mentee_torch_ext as ext;
use tch::Tensor;

use crate::SslError;
use crate::layout::{Kinds, Layout, view};

/// The student's gradients: one flat buffer of the master type, which is what ranks all-reduce.
///
/// A parameter's gradient moves there as soon as a backward pass has completed it: of the first part of a step it replaces what
/// is there, of later parts it is added. What is computed in bf16 is added up in the buffer's type: bf16 has eight bits, in which
/// a sum of many parts would lose the later ones.
#[derive(Debug)]
pub struct Gradients {
    /// All gradients, in the student's layout.
    pub flat: Tensor,
    pub(crate) arrivals: Arc<Arrivals>,
}

impl Gradients {
    /// Zeros.
    pub fn new(layout: &Layout, kinds: Kinds) -> Result<Self, SslError> {
        Ok(Self {
            flat: Tensor::f_zeros([layout.len], (kinds.master, kinds.device))?,
            arrivals: Arc::new(Arrivals::of(layout)),
        })
    }

    /// Before the first backward pass of a step.
    pub(crate) fn begin(&self) {
        self.arrivals.holds.iter().for_each(|holds| holds.store(false, Ordering::Relaxed));
        self.arrivals.finite.store(true, Ordering::Relaxed);
    }

    /// After the last backward pass of a step: what the loss does not depend on has a gradient of zero. (Of a pass that a device
    /// replays nothing is heard: it brings what it brought when it was recorded.)
    pub fn complete(&mut self, layout: &Layout) -> Result<(), SslError> {
        let holds = |index: usize| self.arrivals.holds[index].load(Ordering::Relaxed);
        for (_, place) in layout.trained().filter(|(index, _)| !holds(*index)) {
            let _ = view(&self.flat, place)?.f_zero_()?;
        }
        Ok(())
    }

    /// Calls `ready` with a parameter's index among the declarations when a backward pass has brought its gradient, on the
    /// thread that runs the pass.
    pub fn on_arrival(&self, ready: Box<dyn Fn(usize) + Send + Sync>) {
        *lock(&self.arrivals.ready) = Some(Ready(ready));
    }

    /// Whether all that backward passes have brought in this step was finite; on devices nobody looks.
    pub fn were_finite(&self) -> bool {
        self.arrivals.finite.load(Ordering::Relaxed)
    }

    /// The parameter's next gradient will not be a number: for tests of what follows. (Not of a pass that a device replays.)
    pub fn spoil(&self, parameter: usize) {
        self.arrivals.spoilt.store(parameter, Ordering::Relaxed);
    }

    /// Why the last backward pass failed, if it did so here.
    pub(crate) fn failure(&self) -> Option<SslError> {
        lock(&self.arrivals.failure).take()
    }
}

/// What backward passes have brought of a step's gradients.
#[derive(Debug)]
pub(crate) struct Arrivals {
    /// Of every declaration, whether the buffer holds a part of this step's gradient.
    holds: Vec<AtomicBool>,
    finite: AtomicBool,
    /// A declaration whose next gradient is to be spoilt.
    spoilt: AtomicUsize,
    ready: Mutex<Option<Ready>>,
    failure: Mutex<Option<SslError>>,
}

struct Ready(Box<dyn Fn(usize) + Send + Sync>);

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ready")
    }
}

impl Arrivals {
    const NONE: usize = usize::MAX;

    fn of(layout: &Layout) -> Self {
        Self {
            holds: (0..layout.declared()).map(|_| AtomicBool::new(false)).collect(),
            finite: AtomicBool::new(true),
            spoilt: AtomicUsize::new(Self::NONE),
            ready: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// Moves one gradient to its place; `false` when that failed.
    pub(crate) fn take(&self, index: usize, gradient: &Tensor, to: &mut Tensor) -> bool {
        if self.spoilt.load(Ordering::Relaxed) == index {
            self.spoilt.store(Self::NONE, Ordering::Relaxed);
            let _ = gradient.shallow_clone().fill_(f64::NAN);
        }
        let adds = self.holds[index].swap(true, Ordering::Relaxed);
        match ext::gather(gradient, to, adds) {
            Ok(finite) => _ = self.finite.fetch_and(finite, Ordering::Relaxed),
            Err(error) => {
                lock(&self.failure).get_or_insert(error.into());
                return false;
            }
        }
        if let Some(Ready(ready)) = &*lock(&self.ready) {
            ready(index);
        }
        true
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::layout::{Declaration, Declarations, Init, ParamId, Role};
    use crate::params::Weights;

    const KINDS: Kinds = Kinds { master: Kind::Float, compute: Kind::BFloat16, device: Device::Cpu };

    /// A student of a convolution, a linear layer and a norm, all ones.
    fn student() -> (Weights, Gradients, [ParamId; 3]) {
        let mut declarations = Declarations::default();
        let mut declare = |name: &str, shape: &[i64], role| {
            let (name, shape, init) = (name.to_owned(), shape.to_vec(), Init::Constant(1.0));
            declarations.param(Declaration { name, shape, role, init, frozen: false })
        };
        let conv = declare("backbone.conv.weight", &[2, 3, 2, 2], Role::Weight);
        let linear = declare("predictor.0.weight", &[5, 7], Role::Weight);
        let norm = declare("backbone.bn.weight", &[2], Role::Norm);
        let layout = Arc::new(Layout::new(&declarations, true));
        let gradients = Gradients::new(&layout, KINDS).unwrap();
        let mut weights = Weights::new(layout, KINDS, Some(&gradients)).unwrap();
        weights.initialise(0).unwrap();
        (weights, gradients, [conv, linear, norm])
    }

    fn counting(shape: &[i64]) -> Tensor {
        Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(shape)
    }

    /// A pass whose gradient is `times` 0, 1, 2, … of a parameter.
    fn pass(weights: &Weights, of: &[ParamId], times: f64) {
        let loss = |&id: &ParamId| {
            let leaf = weights.leaf(id);
            (leaf * (counting(&leaf.size()) * times).to_kind(leaf.kind())).sum(Kind::Float)
        };
        of.iter().map(loss).reduce(|a, b| a + b).unwrap().backward();
    }

    fn gradient(weights: &Weights, gradients: &Gradients, of: ParamId) -> Tensor {
        let place = weights.layout.params().nth(of.0).unwrap();
        view(&gradients.flat, place).unwrap()
    }

    #[test]
    fn a_gradient_replaces_the_last_steps_and_is_added_to_its_own_steps() {
        let (weights, mut gradients, all) = student();
        let arrived = Arc::new(Mutex::new(Vec::new()));
        let heard = arrived.clone();
        gradients.on_arrival(Box::new(move |index| lock(&heard).push(index)));
        for _ in 0..2 {
            gradients.begin();
            pass(&weights, &all, 1.0);
            pass(&weights, &all, 256.0); // their sum is not in bf16
            gradients.complete(&weights.layout).unwrap();
            for id in all {
                let found = gradient(&weights, &gradients, id);
                assert_eq!(found, counting(&found.size()) * 257.0, "{id:?}");
                assert!(!weights.leaf(id).grad().defined(), "{id:?} keeps a gradient");
            }
        }
        let mut arrived = lock(&arrived).clone();
        arrived.sort_unstable();
        assert_eq!(arrived, [[0; 4], [1; 4], [2; 4]].concat());
    }

    #[test]
    fn what_no_pass_of_a_step_reaches_has_a_gradient_of_zero() {
        let (weights, mut gradients, all @ [conv, linear, norm]) = student();
        gradients.begin();
        pass(&weights, &all, 1.0);
        gradients.complete(&weights.layout).unwrap();
        gradients.begin();
        pass(&weights, &[conv], 2.0);
        gradients.complete(&weights.layout).unwrap();
        let sum = |id| gradient(&weights, &gradients, id).abs().sum(Kind::Double).double_value(&[]);
        assert_eq!((sum(conv), sum(linear), sum(norm)), (2.0 * 276.0, 0.0, 0.0));
        // Nothing is heard of a pass that a device replays: what it wrote stays.
        gradients.complete(&weights.layout).unwrap();
        assert_eq!(gradient(&weights, &gradients, conv).sum(Kind::Double).double_value(&[]), 2.0 * 276.0);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_noticed_in_its_step() {
        for times in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let (weights, gradients, [conv, linear, norm]) = student();
            gradients.begin();
            pass(&weights, &[norm], times);
            pass(&weights, &[conv, linear], 1.0);
            assert!(!gradients.were_finite(), "{times}");
            gradients.begin();
            pass(&weights, &[conv, linear, norm], 1.0);
            assert!(gradients.were_finite());
            gradients.spoil(linear.0);
            pass(&weights, &[conv, linear], 1.0);
            assert!(!gradients.were_finite());
            assert!(gradient(&weights, &gradients, linear).isnan().all().int64_value(&[]) == 1);
            assert!(gradient(&weights, &gradients, conv).isfinite().all().int64_value(&[]) == 1);
        }
    }

    #[test]
    fn what_is_computed_in_bf16_follows_every_update() {
        use mentee_config::recipe::OptimizerName;

        for name in [OptimizerName::Lars, OptimizerName::Sgd, OptimizerName::Adamw] {
            let (mut weights, gradients, all) = student();
            let mut settings = mentee_config::Recipe::load("demo", &[]).unwrap().optimizer;
            settings.name = name;
            let mut optimizer = crate::optimizer::Optimizer::new(&settings, &weights).unwrap();
            let mut teacher = Weights::new(weights.layout.clone(), KINDS, None).unwrap();
            gradients.begin();
            pass(&weights, &all, 0.37);
            let rates = crate::Rates { lr: 0.1, predictor_lr: 0.1, weight_decay: 1e-3, tau: 0.9 };
            optimizer.step(&mut weights, &gradients, &rates, 0).unwrap();
            teacher.mix(&weights, rates.tau).unwrap();
            for weights in [&weights, &teacher] {
                let compute = weights.compute.as_ref().unwrap();
                let expected =
                    weights.master.narrow(0, 0, weights.layout.compute_len).to_kind(Kind::BFloat16);
                assert!(compute.equal(&expected), "{name:?}");
                assert!(compute.abs().sum(Kind::Float).double_value(&[]) > 0.0);
            }
        }
    }
}
