//! Linear classification of frozen features, by three protocols.
//!
//! | protocol | classifier | source |
//! |---|---|---|
//! | `logistic` | the optimum of multinomial logistic regression: features standardised, L2 penalty \|W\|²/2n, by L-BFGS | scikit-learn's `LogisticRegression(C=1)` after `StandardScaler` |
//! | `byol` | 80 epochs of SGD, batch 1024, Nesterov momentum 0.9, lr 0.2 · batch/256, cosine to 0, no decay | `byol/configs/eval.py`, `byol/eval_experiment.py` |
//! | `simsiam` | 90 epochs of SGD under LARC (trust 0.001), batch 4096, momentum 0.9, lr 0.1 · batch/256, cosine epoch by epoch, no decay | `main_lincls.py --lars` |
//!
//! Where papers and codes differ, the codes are followed: BYOL's paper takes the best of five learning rates on
//! held-out images, its code has one; SimSiam's paper has lr 0.02, its code 0.1. BYOL's batch size is the paper's
//! (appendix C.1), as its code takes it from the command line. Left out here: DeepMind's batches run across the ends
//! of epochs; ours end with them, the last one smaller, as SimSiam's do.

use mentee_config::complain;
use mentee_config::recipe::{Definition, Interpolation, Views};
use mentee_data::Order;
use tch::{Device, Kind, Tensor};

use super::knn::Labelled;
use crate::error::WorkerError;

/// Pairs of differences that L-BFGS remembers.
const MEMORY: usize = 10;
/// The largest element of the gradient at which L-BFGS has arrived; scikit-learn stops at 1e-4.
const GRADIENT_TOLERANCE: f64 = 1e-5;
/// Iterations after which L-BFGS stops anyway, and says so.
const MAX_ITERATIONS: usize = 1000;
/// Features up to this many numbers are worked on in f64 (half a gigabyte), larger sets in f32.
const DOUBLE_UP_TO: i64 = 1 << 26;
/// Rows classified at a time.
const CHUNK: i64 = 4096;
/// Rows that an objective looks at at a time.
const ROWS: i64 = 1 << 16;

/// An official protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Official {
    /// DeepMind's.
    Byol,
    /// Its authors'.
    Simsiam,
}

/// One linear layer: logits = x · Wᵀ + b.
#[derive(Debug)]
pub struct Linear {
    /// [C, D]
    weight: Tensor,
    /// [C]
    bias: Tensor,
}

impl Linear {
    /// How many of `queries` are classified correctly.
    pub fn correct(&self, queries: &Labelled) -> Result<i64, WorkerError> {
        let mut correct = 0;
        for begin in (0..queries.len()).step_by(CHUNK as usize) {
            let n = CHUNK.min(queries.len() - begin);
            let x = queries.features.f_narrow(0, begin, n)?.f_to_kind(self.weight.kind())?;
            let predicted = x.f_linear(&self.weight, Some(&self.bias))?.f_argmax(1, false)?;
            let truth = queries.labels.f_narrow(0, begin, n)?;
            correct += predicted.f_eq_tensor(&truth)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        }
        Ok(correct)
    }
}

/// The optimum of logistic regression on `bank`: mean cross-entropy + |W|²/2n, W in units of standardised features.
pub fn logistic(bank: &Labelled, num_classes: i64) -> Result<Linear, WorkerError> {
    let (n, dim) = bank.features.size2()?;
    let kind = if n * dim <= DOUBLE_UP_TO { Kind::Double } else { Kind::Float };
    let x = bank.features.f_to_kind(kind)?;
    let (variance, mean) = x.f_var_mean_correction(Some([0i64].as_slice()), 0, true)?; // [1, D]
    let std = variance.f_sqrt()?;
    let std = std.f_where_self(&std.f_gt(0.0)?, &std.f_ones_like()?)?;
    let x = (x - &mean) / &std;

    // θ: the weights row by row, then the biases.
    let len = num_classes * dim;
    let objective = |theta: &Tensor| -> Result<(f64, Tensor), WorkerError> {
        let weight = theta.f_narrow(0, 0, len)?.f_view([num_classes, dim])?;
        let bias = theta.f_narrow(0, len, num_classes)?;
        let columns = weight.f_to_kind(kind)?.f_tr()?;
        let mut value = weight.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])? / (2.0 * n as f64);
        let (mut of_weight, mut of_bias) = (&weight / n as f64, bias.f_zeros_like()?);
        // Scores in f64 of all images at once would be larger than the features.
        for begin in (0..n).step_by(ROWS as usize) {
            let rows = ROWS.min(n - begin);
            let x = x.f_narrow(0, begin, rows)?;
            let onehot =
                bank.labels.f_narrow(0, begin, rows)?.f_one_hot(num_classes)?.f_to_kind(Kind::Double)?; // [R, C]
            let log_p =
                (x.f_matmul(&columns)?.f_to_kind(Kind::Double)? + &bias).f_log_softmax(1, Kind::Double)?;
            value -= log_p.f_mul(&onehot)?.f_sum(Kind::Double)?.f_double_value(&[])? / n as f64;
            let error = (log_p.f_exp()? - onehot) / n as f64;
            of_weight += error.f_to_kind(kind)?.f_tr()?.f_matmul(&x)?.f_to_kind(Kind::Double)?;
            of_bias += error.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
        }
        Ok((value, Tensor::f_cat(&[of_weight.f_view([-1])?, of_bias], 0)?))
    };
    let start = Tensor::f_zeros([len + num_classes], (Kind::Double, Device::Cpu))?;
    let (theta, arrived) = lbfgs(start, objective)?;
    if !arrived {
        tracing::warn!(
            iterations = MAX_ITERATIONS,
            features = dim,
            "logistic regression stopped before its optimum"
        );
        complain!(
            "warning: logistic regression on {dim} features of an image stopped after {MAX_ITERATIONS} iterations, before its \
             optimum"
        );
    }

    // Standardisation becomes part of the layer, so that it takes features as they are.
    let weight = theta.f_narrow(0, 0, len)?.f_view([num_classes, dim])? / std.f_to_kind(Kind::Double)?;
    let shift = weight.f_matmul(&mean.f_to_kind(Kind::Double)?.f_tr()?)?.f_squeeze_dim(1)?;
    let bias = theta.f_narrow(0, len, num_classes)? - shift;
    Ok(Linear { weight, bias })
}

/// The minimum of a convex function by L-BFGS (Nocedal and Wright, "Numerical Optimization", algorithm 7.5), the step halved
/// until the function falls enough (algorithm 3.1). Whether it has arrived.
fn lbfgs(
    mut theta: Tensor,
    objective: impl Fn(&Tensor) -> Result<(f64, Tensor), WorkerError>,
) -> Result<(Tensor, bool), WorkerError> {
    let dot = |a: &Tensor, b: &Tensor| -> Result<f64, WorkerError> { Ok(a.f_dot(b)?.f_double_value(&[])?) };
    let (mut value, mut gradient) = objective(&theta)?;
    let mut pairs: std::collections::VecDeque<(Tensor, Tensor, f64)> = std::collections::VecDeque::new();
    for _ in 0..MAX_ITERATIONS {
        if gradient.f_abs()?.f_max()?.f_double_value(&[])? <= GRADIENT_TOLERANCE {
            return Ok((theta, true));
        }
        let mut direction = gradient.f_neg()?;
        let mut alphas = Vec::with_capacity(pairs.len());
        for (s, y, rho) in pairs.iter().rev() {
            let alpha = rho * dot(s, &direction)?;
            direction -= y * alpha;
            alphas.push(alpha);
        }
        match pairs.back() {
            Some((s, y, _)) => direction *= dot(s, y)? / dot(y, y)?,
            None => direction *= 1.0 / dot(&gradient, &gradient)?.sqrt(),
        }
        for ((s, y, rho), alpha) in pairs.iter().zip(alphas.iter().rev()) {
            let beta = rho * dot(y, &direction)?;
            direction += s * (alpha - beta);
        }
        let slope = dot(&gradient, &direction)?;
        let mut step = 1.0;
        let (next, next_value, next_gradient) = loop {
            let next = &theta + &direction * step;
            let (next_value, next_gradient) = objective(&next)?;
            if next_value <= value + 1e-4 * step * slope {
                break (next, next_value, next_gradient);
            }
            step /= 2.0;
            if step < 1e-10 {
                return Ok((theta, true)); // as low as rounding lets it fall
            }
        };
        let (s, y) = (&next - &theta, &next_gradient - &gradient);
        let curvature = dot(&s, &y)?;
        if curvature > 0.0 {
            pairs.push_back((s, y, 1.0 / curvature));
            if pairs.len() > MEMORY {
                pairs.pop_front();
            }
        }
        (theta, value, gradient) = (next, next_value, next_gradient);
    }
    Ok((theta, false))
}

/// The numbers of an official protocol.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    protocol: Official,
    /// Epochs in all.
    pub epochs: u64,
    /// Images a step.
    pub batch: u64,
    /// Learning rate at the start: the protocol's, for this batch.
    lr: f64,
}

impl Settings {
    /// Those of `protocol` for a bank of `bank` images; a shorter run than the protocol's where `epochs` says so.
    pub fn new(protocol: Official, bank: u64, epochs: Option<u64>) -> Self {
        let (usual, batch, base_lr) = match protocol {
            Official::Simsiam => (90, 4096, 0.1),
            Official::Byol => (80, 1024, 0.2),
        };
        let batch = bank.clamp(1, batch);
        Self { protocol, epochs: epochs.unwrap_or(usual), batch, lr: base_lr * batch as f64 / 256.0 }
    }

    /// In words.
    pub fn describe(&self) -> String {
        let rule = match self.protocol {
            Official::Simsiam => "SimSiam's protocol: SGD with LARC, momentum 0.9",
            Official::Byol => "BYOL's protocol: SGD with Nesterov momentum 0.9",
        };
        format!("{rule}, lr {}, cosine, {} epochs, batch {}", self.lr, self.epochs, self.batch)
    }

    /// The views it trains on: the official crop and flip, and no colours changed.
    pub fn views(&self, views: &Views) -> Views {
        let (definition, resize) = match self.protocol {
            Official::Simsiam => (Definition::Torchvision, Interpolation::Bilinear),
            Official::Byol => (Definition::Byol, Interpolation::Bicubic),
        };
        Views {
            definition,
            resize,
            crop_area: [0.08, 1.0],
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            flip: 0.5,
            jitter: 0.0,
            grayscale: 0.0,
            blur: [0.0; 2],
            solarize: [0.0; 2],
            ..views.clone()
        }
    }

    fn lr_at(&self, step: u64, steps_per_epoch: u64) -> f64 {
        let done = match self.protocol {
            Official::Simsiam => (step / steps_per_epoch) as f64 / self.epochs as f64,
            Official::Byol => step as f64 / (self.epochs * steps_per_epoch) as f64,
        };
        self.lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

/// A classifier in training.
#[derive(Debug)]
pub struct Training {
    settings: Settings,
    steps_per_epoch: u64,
    step: u64,
    layer: Linear,
    momentum: [Tensor; 2],
}

impl Training {
    /// Before the first step; a function of the seed.
    pub fn new(
        settings: Settings,
        bank: u64,
        dim: i64,
        classes: i64,
        seed: u64,
    ) -> Result<Self, WorkerError> {
        tch::manual_seed(seed.cast_signed());
        let options = (Kind::Float, Device::Cpu);
        let weight = match settings.protocol {
            Official::Simsiam => Tensor::f_randn([classes, dim], options)? * 0.01,
            // Haiku's Linear: a normal distribution of deviation 1/sqrt(D), cut at two deviations, between which
            // lies this part of it.
            Official::Byol => {
                const MASS: f64 = 0.954_499_736_103_641_6;
                let uniform = (Tensor::f_rand([classes, dim], options)? * 2.0 - 1.0) * MASS;
                uniform.f_erfinv()? * (2.0 / dim as f64).sqrt()
            }
        };
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, options);
        Ok(Self {
            settings,
            steps_per_epoch: bank.div_ceil(settings.batch),
            step: 0,
            layer: Linear { weight, bias: zeros(&[classes])? },
            momentum: [zeros(&[classes, dim])?, zeros(&[classes])?],
        })
    }

    /// One step on features [B, D] of these labels [B].
    pub fn step(&mut self, features: &Tensor, labels: &Tensor) -> Result<(), WorkerError> {
        let lr = self.settings.lr_at(self.step, self.steps_per_epoch);
        self.step += 1;
        let x = features.f_to_kind(Kind::Float)?;
        let classes = self.layer.bias.size()[0];
        let p = x.f_linear(&self.layer.weight, Some(&self.layer.bias))?.f_softmax(1, Kind::Float)?;
        let error = (p - labels.f_one_hot(classes)?) / x.size()[0] as f64; // [B, C]
        let gradients =
            [error.f_tr()?.f_matmul(&x)?, error.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?];
        let params = [&mut self.layer.weight, &mut self.layer.bias];
        for ((p, m), g) in params.into_iter().zip(&mut self.momentum).zip(gradients) {
            match self.settings.protocol {
                Official::Simsiam => {
                    // apex's LARC with clip=False: the gradient of a layer is scaled by trust · |p| / |g|.
                    let (size, length) = (p.f_norm()?.f_double_value(&[])?, g.f_norm()?.f_double_value(&[])?);
                    let adapted = size > 0.0 && length > 0.0;
                    let g = if adapted { g * (0.001 * size / (length + 1e-8)) } else { g };
                    *m *= 0.9;
                    *m += g;
                    *p -= &*m * lr;
                }
                Official::Byol => {
                    *m *= 0.9;
                    *m += &g;
                    *p -= (g + &*m * 0.9) * lr;
                }
            }
        }
        Ok(())
    }

    /// The classifier.
    pub fn finish(self) -> Linear {
        self.layer
    }
}

/// A protocol on features computed once: its optimizer and schedule, its images without crops and flips.
pub fn on_cached(
    settings: Settings,
    bank: &Labelled,
    num_classes: i64,
    seed: u64,
) -> Result<Linear, WorkerError> {
    let (n, dim) = bank.features.size2()?;
    let n = n.unsigned_abs();
    let order = Order::new(seed, n, n);
    let mut training = Training::new(settings, n, dim, num_classes, seed)?;
    for epoch in 0..settings.epochs {
        let (_, rows) = order.share(epoch, 0..n);
        let rows: Vec<i64> = rows.into_iter().map(u64::cast_signed).collect();
        for rows in rows.chunks(settings.batch as usize) {
            let rows = Tensor::f_from_slice(rows)?;
            let (x, labels) =
                (bank.features.f_index_select(0, &rows)?, bank.labels.f_index_select(0, &rows)?);
            training.step(&x, &labels)?;
        }
    }
    Ok(training.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two clouds of `n` points around ±(2, 1, 0), in f32.
    fn clouds(n: i64) -> Labelled {
        tch::manual_seed(5);
        let labels = Tensor::arange(2 * n, (Kind::Int64, Device::Cpu)).fmod(2);
        let centres = Tensor::from_slice(&[2.0f32, 1.0, 0.0, -2.0, -1.0, 0.0]).view([2, 3]);
        let noise = Tensor::randn([2 * n, 3], (Kind::Float, Device::Cpu)) * 2.0;
        Labelled { features: centres.index_select(0, &labels) + noise, labels }
    }

    #[test]
    fn logistic_regression_ends_where_its_gradient_is_zero() {
        let bank = clouds(200);
        let layer = logistic(&bank, 2).unwrap();
        // The same objective by autograd, written for unstandardised features.
        let x = bank.features.to_kind(Kind::Double);
        let std = x.std_dim(Some([0i64].as_slice()), false, true);
        let weight = layer.weight.copy().set_requires_grad(true);
        let bias = layer.bias.copy().set_requires_grad(true);
        let entropy = x.linear(&weight, Some(&bias)).cross_entropy_for_logits(&bank.labels);
        let loss = entropy + (&weight * &std).square().sum(Kind::Double) / 800.0;
        loss.backward();
        for gradient in [weight.grad(), bias.grad()] {
            assert!(gradient.abs().max().double_value(&[]) < 1e-4, "{gradient}");
        }
        let correct = layer.correct(&bank).unwrap();
        assert!((320..400).contains(&correct), "{correct} of 400");
        // A constant feature has no spread to be divided by.
        let constant = Tensor::cat(&[&bank.features, &Tensor::ones([400, 1], (Kind::Float, Device::Cpu))], 1);
        let wider = Labelled { features: constant, labels: bank.labels.copy() };
        assert_eq!(logistic(&wider, 2).unwrap().correct(&wider).unwrap(), correct);
    }

    #[test]
    fn official_steps_are_pytorchs() {
        for protocol in [Official::Byol, Official::Simsiam] {
            let bank = clouds(8);
            let settings = Settings::new(protocol, 16, Some(4));
            assert!((settings.lr - if protocol == Official::Byol { 0.0125 } else { 0.00625 }).abs() < 1e-12);
            let mut training = Training::new(settings, 16, 3, 2, 1).unwrap();
            let mut weight = training.layer.weight.copy().set_requires_grad(true);
            let mut bias = training.layer.bias.copy().set_requires_grad(true);
            let mut momentum = [weight.zeros_like(), bias.zeros_like()];
            for step in 0..4 {
                training.step(&bank.features, &bank.labels).unwrap();
                let loss = bank.features.linear(&weight, Some(&bias)).cross_entropy_for_logits(&bank.labels);
                let gradients = Tensor::run_backward(&[loss], &[&weight, &bias], false, false);
                let lr = settings.lr * 0.5 * (1.0 + (std::f64::consts::PI * f64::from(step) / 4.0).cos());
                tch::no_grad(|| {
                    for ((p, m), g) in [&mut weight, &mut bias].into_iter().zip(&mut momentum).zip(&gradients)
                    {
                        let (size, length) = (p.norm().double_value(&[]), g.norm().double_value(&[]));
                        let larc = if size > 0.0 { 0.001 * size / (length + 1e-8) } else { 1.0 };
                        let g = if protocol == Official::Simsiam { g * larc } else { g.copy() };
                        *m = &*m * 0.9 + &g;
                        let update = if protocol == Official::Byol { &*m * 0.9 + &g } else { m.copy() };
                        let _ = p.subtract_(&(update * lr));
                    }
                });
            }
            let difference = (&weight - &training.layer.weight).abs().max().double_value(&[]);
            assert!(difference < 1e-6, "{protocol:?}: {difference}");
            assert!((&bias - &training.layer.bias).abs().max().double_value(&[]) < 1e-6);
        }
    }

    #[test]
    fn a_protocol_on_cached_features_learns_and_repeats_itself() {
        let bank = clouds(500);
        let settings = Settings::new(Official::Byol, 1000, Some(10));
        let run = |seed| on_cached(settings, &bank, 2, seed).unwrap();
        let layer = run(3);
        assert!(layer.correct(&bank).unwrap() > 800);
        assert!(layer.weight.equal(&run(3).weight));
        assert!(!layer.weight.equal(&run(4).weight));
    }
}
