//! Watches for collapse: projections that hardly differ from image to image (arXiv:2011.10566, section 4.1).

use mentee_config::recipe::{self, OnCollapse};

use crate::error::WorkerError;

/// Counts the steps on end with a `z_std` below the threshold. Every rank sees the same values.
pub struct CollapseWatch {
    threshold: f64,
    /// 0 = off.
    patience: u64,
    then: OnCollapse,
    below: u64,
}

impl CollapseWatch {
    /// As `[run]` says.
    pub fn new(settings: &recipe::Run) -> Self {
        Self {
            threshold: settings.collapse_z_std,
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
        if self.patience == 0 || self.below != self.patience {
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
        let mut recipe = mentee_config::Recipe::load("demo", &[]).unwrap().run;
        (recipe.collapse_z_std, recipe.collapse_steps, recipe.on_collapse) = (0.1, 3, then);
        let mut watch = CollapseWatch::new(&recipe);
        (0u64..).zip(values).find(|(step, z_std)| watch.watch(*step, **z_std).is_err()).map(|(step, _)| step)
    }

    #[test]
    fn stops_after_so_many_steps_on_end_and_not_before() {
        assert_eq!(watch(OnCollapse::Stop, &[0.05, 0.05, 0.05]), Some(2));
        assert_eq!(watch(OnCollapse::Stop, &[0.05, 0.05, 0.2, 0.05, 0.05]), None);
        assert_eq!(watch(OnCollapse::Stop, &[0.0, 0.05, 0.2, 0.05, 0.05, 0.05]), Some(5));
        assert_eq!(watch(OnCollapse::Warn, &[0.0; 9]), None);
    }
}
