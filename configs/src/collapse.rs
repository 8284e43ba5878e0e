//! From which `z_std` on projections count as collapsed (arXiv:2011.10566, section 4.1).

use crate::recipe::{MethodName, NormStatistics, Recipe};

/// Rows that stand opposite the others in runs that had collapsed, at most: one to four were seen at 64 (ResNet-20, no
/// stop-gradient).
const OPPOSITE: f64 = 4.0;
/// Rows below which a norm makes the healthy look as the collapsed do.
const LEAST_ROWS: f64 = 16.0;

impl Recipe {
    /// Below this `z_std` projections have collapsed, on so many ranks: `run.collapse_z_std` of the way from what a constant has to
    /// 1. 0: never.
    #[must_use]
    pub fn collapsed_below(&self, world_size: u32) -> f64 {
        let (share, floor) = (self.run.collapse_z_std, self.constant_z_std(world_size));
        if share > 0.0 { floor + share * (1.0 - floor) } else { 0.0 }
    }

    /// What is left of `z_std` when projections are constant. SimSiam's and MoCo v3's end in a norm without scale and offset, which
    /// makes the mean of each channel 0 over its B rows: of rows that hardly differ a few are blown up, and stand opposite the
    /// others. Where they are a share p of all, the deviation of such a direction is 2 sqrt(p (1 - p)).
    fn constant_z_std(&self, world_size: u32) -> f64 {
        let (method, parallel, schedule) = (&self.method, &self.parallel, &self.schedule);
        let ends_in_norm = match method.name {
            MethodName::Byol => false,
            MethodName::Simsiam | MethodName::Mocov3 => true,
        };
        let ranks = if parallel.sync_batch_norm { 1 } else { world_size.max(1) };
        let rows = schedule.global_batch as f64 / parallel.micro_batches as f64 / f64::from(ranks);
        if !ends_in_norm || parallel.norm_statistics == NormStatistics::Running || rows < LEAST_ROWS {
            return 0.0;
        }
        let share = OPPOSITE / rows;
        2.0 * (share * (1.0 - share)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_norm_raises_what_counts_as_collapsed() {
        let load = |name: &str, sets: &[&str]| {
            let mut all = vec!["schedule.global_batch=64"];
            all.extend(sets);
            Recipe::load(name, &all.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
        };
        let simsiam = load("simsiam-cifar10-resnet18", &[]);
        assert_eq!(simsiam.collapsed_below(2), simsiam.collapsed_below(1), "norms over all ranks");
        assert_eq!(load("byol-cifar10-resnet18", &[]).collapsed_below(1), 0.1);
        assert_eq!(load("simsiam-cifar10-resnet18", &["run.collapse_z_std=0"]).collapsed_below(1), 0.0);
        let mocov3 = load("mocov3-cifar10-small", &["parallel.micro_batches=2"]);
        let smaller = load("mocov3-cifar10-small", &["schedule.global_batch=32"]);
        assert_eq!(mocov3.collapsed_below(1), smaller.collapsed_below(1));
        let apart = load("mocov3-cifar10-small", &["parallel.sync_batch_norm=false"]);
        assert_eq!(apart.collapsed_below(2), smaller.collapsed_below(1));
        assert_eq!(load("mocov3-cifar10-small", &["schedule.global_batch=4"]).collapsed_below(1), 0.1);
    }
}
