//! Parameters as views of flat buffers: [`Weights`] are one such buffer (the student's or the teacher's) with a leaf tensor
//! per parameter.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use mentee_torch_ext as ext;
use tch::{Device, Kind, Tensor, no_grad};

use crate::SslError;
use crate::gradients::{Gradients, lock};
use crate::layout::{Declaration, Init, Kinds, Layout, ParamId, Place, view};
use crate::normal::quantile;

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
