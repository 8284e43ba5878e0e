//! Running statistics of batch norms.

use mentee_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::SslError;
use crate::layout::{Layout, StatId};

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
