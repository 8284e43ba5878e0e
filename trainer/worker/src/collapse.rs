//! Watches for collapse: projections that hardly differ from image to image (arXiv:2011.10566, section 4.1).

use mentee_config::Recipe;
use mentee_config::recipe::OnCollapse;

use crate::error::WorkerError;

/// Counts the steps on end with a `z_std` below the threshold. Every rank sees the same values.
pub struct CollapseWatch {
    threshold: f64,
    /// 0 = off.
    patience: u64,
    then: OnCollapse,
    /// So many so far.
    pub below: u64,
}

impl CollapseWatch {
    /// As `[run]` says, of so many ranks.
    pub fn new(recipe: &Recipe, world_size: u32) -> Self {
        let settings = &recipe.run;
        Self {
            threshold: recipe.collapsed_below(world_size),
            patience: settings.collapse_steps,
            then: settings.on_collapse,
            below: 0,
        }
    }

    /// After `step`. Warns once each time the patience is over; an error when the recipe asks for one.
    pub fn watch(&mut self, step: u64, z_std: f64) -> Result<(), WorkerError> {
        if z_std >= self.threshold {
            self.below = 0;
            return Ok(());
        }
        self.below += 1;
        // A run that was warned may be continued by one that is to stop, with less patience too.
        let is_over = match self.then {
            OnCollapse::Stop => self.below >= self.patience,
            OnCollapse::Warn => self.below == self.patience,
        };
        if self.patience == 0 || !is_over {
            return Ok(());
        }
        let error = WorkerError::Collapsed { step, z_std, threshold: self.threshold, steps: self.patience };
        match self.then {
            OnCollapse::Stop => Err(error),
            OnCollapse::Warn => {
                tracing::warn!("{error}");
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(then: OnCollapse, values: &[f64]) -> Option<u64> {
        let mut recipe = Recipe::load("demo", &[]).unwrap();
        let run = &mut recipe.run;
        (run.collapse_z_std, run.collapse_steps, run.on_collapse) = (0.1, 3, then);
        let mut watch = CollapseWatch::new(&recipe, 1);
        (0u64..).zip(values).find(|(step, z_std)| watch.watch(*step, **z_std).is_err()).map(|(step, _)| step)
    }

    #[test]
    fn stops_after_so_many_steps_on_end_and_not_before() {
        assert_eq!(watch(OnCollapse::Stop, &[0.05, 0.05, 0.05]), Some(2));
        assert_eq!(watch(OnCollapse::Stop, &[0.05, 0.05, 0.2, 0.05, 0.05]), None);
        assert_eq!(watch(OnCollapse::Stop, &[0.0, 0.05, 0.2, 0.05, 0.05, 0.05]), Some(5));
        assert_eq!(watch(OnCollapse::Warn, &[0.0; 9]), None);
        let mut recipe = Recipe::load("demo", &[]).unwrap();
        (recipe.run.collapse_steps, recipe.run.on_collapse) = (3, OnCollapse::Stop);
        let mut late = CollapseWatch { below: 7, ..CollapseWatch::new(&recipe, 1) };
        assert!(late.watch(9, 0.0).is_err(), "a run that had been warned");
    }

    #[test]
    fn what_a_last_norm_leaves_of_a_constant_counts_as_collapsed() {
        use tch::{Device, Kind, Tensor};

        // Projections of one view that differ by rounding: in one row.
        let (rows, dim) = (64, 32);
        let z = Tensor::ones([rows, dim], (Kind::Double, Device::Cpu));
        let mut first = z.get(0);
        first += Tensor::randn([dim], (Kind::Double, Device::Cpu)) * 1e-3;
        let z = (&z - z.mean_dim([0i64].as_slice(), true, Kind::Double))
            / z.std_dim([0i64].as_slice(), false, true);
        let z = mentee_ssl::loss::l2_normalise(&z).unwrap();
        let z_std = z.std_dim([0i64].as_slice(), false, false).mean(Kind::Double).double_value(&[]);
        let z_std = z_std * (dim as f64).sqrt();

        assert!((z_std - 2.0 * (1.0 / 64.0 * (63.0f64 / 64.0)).sqrt()).abs() < 1e-9, "{z_std}");
        let simsiam =
            Recipe::load("simsiam-cifar10-resnet18", &["schedule.global_batch=64".to_owned()]).unwrap();
        let threshold = CollapseWatch::new(&simsiam, 1).threshold;
        assert!(threshold > 2.0 * z_std && threshold < 0.6);
    }
}
