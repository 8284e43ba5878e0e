//! A recipe applied to a data set and a world: how many steps there are, and which samples of a batch are
//! whose.

use std::ops::Range;

use crate::error::ConfigError;
use crate::recipe::{NormStatistics, Recipe};

/// What is fixed before the first step. Nothing in here but the check depends on the number of ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What runs.
    pub recipe: Recipe,
    /// Training images.
    pub num_samples: u64,
    /// Updates an epoch: `num_samples / global_batch`. The samples left over do not fill a batch and are
    /// dropped; every epoch is shuffled anew, so they are other ones each time.
    pub steps_per_epoch: u64,
    /// The steps that the schedules of learning rate and tau span: `epochs * steps_per_epoch`.
    pub total_steps: u64,
    /// `warmup_epochs * steps_per_epoch`, rounded.
    pub warmup_steps: u64,
    /// The learning rate after warm-up: `base_lr * global_batch / 256`, the linear scaling rule of both
    /// papers.
    pub peak_lr: f64,
}

impl Plan {
    /// Checks the recipe once more and fits it to `num_samples` training images and `world_size` ranks.
    ///
    /// # Errors
    /// [`ConfigError::Plan`] if a batch is larger than the data set, or too small to give each rank a share.
    pub fn new(recipe: Recipe, num_samples: u64, world_size: u32) -> Result<Plan, ConfigError> {
        recipe.validate()?;
        let batch = recipe.schedule.global_batch;
        let bad_batch = |why: String| ConfigError::Plan { key: "schedule.global_batch", value: batch, why };
        if batch > num_samples {
            return Err(bad_batch(format!(
                "larger than the data set of {num_samples} images ({}); lower it, as not one batch would be \
                 full",
                recipe.data.path.display()
            )));
        }
        if world_size == 0 {
            return Err(bad_batch("a world of 0 ranks cannot share it; start at least one worker".into()));
        }
        // Unsynchronised statistics need two samples in every rank's share; synchronised ones two in all.
        let parallel = &recipe.parallel;
        let statistics = !parallel.sync_batch_norm && parallel.norm_statistics == NormStatistics::Batch;
        let per_rank = if statistics { 2 } else { 1 };
        if batch / u64::from(world_size) < per_rank {
            return Err(bad_batch(match per_rank {
                1 => format!("smaller than the world of {world_size} ranks; raise it or start fewer workers"),
                _ => format!(
                    "leaves fewer than 2 samples to some of {world_size} ranks, too few for batch-norm \
                     statistics with \
                     `parallel.sync_batch_norm` = false; raise it or start fewer workers"
                ),
            }));
        }
        let parts = recipe.parallel.micro_batches;
        if parallel.norm_statistics == NormStatistics::Batch && batch / parts < 2 {
            return Err(bad_batch(format!(
                "leaves fewer than 2 samples to a micro-batch, too few for batch-norm statistics; raise it or lower \
                 `parallel.micro_batches` = {parts}"
            )));
        }
        if batch / u64::from(world_size) / parts < per_rank {
            return Err(bad_batch(format!(
                "leaves fewer than {per_rank} samples to a micro-batch of some of {world_size} ranks; raise it or \
                 lower `parallel.micro_batches` = {parts}"
            )));
        }
        let steps_per_epoch = num_samples / batch;
        let epochs = recipe.schedule.epochs;
        let total_steps = epochs.checked_mul(steps_per_epoch).ok_or_else(|| ConfigError::Plan {
            key: "schedule.epochs",
            value: epochs,
            why: format!("times {steps_per_epoch} steps is beyond 64 bits; lower it"),
        })?;
        let warmup_steps = (recipe.schedule.warmup_epochs * steps_per_epoch as f64).round() as u64;
        let peak_lr = recipe.optimizer.base_lr * batch as f64 / 256.0;
        Ok(Plan { recipe, num_samples, steps_per_epoch, total_steps, warmup_steps, peak_lr })
    }

    /// The step before which the run ends: `total_steps`, or `schedule.max_steps` where that comes first.
    pub fn end_step(&self) -> u64 {
        match self.recipe.schedule.max_steps {
            0 => self.total_steps,
            max_steps => max_steps.min(self.total_steps),
        }
    }
}

/// The rows of a rank's share `own` that belong to micro-batch `part` of `parts`: those whose position within the
/// global batch is `part` modulo `parts`, so that a micro-batch is the same samples whatever the world. Returns the
/// first such row, counted from the share's start; the others follow at a distance of `parts`.
#[must_use]
pub fn first_row(own: &Range<u64>, part: u64, parts: u64) -> u64 {
    (part + parts - own.start % parts) % parts
}

/// The positions within a global batch that `rank` of `world` works on: `[rank*B/W, (rank+1)*B/W)`.
///
/// The shares of all ranks follow each other without gap or overlap; their lengths differ by one at most.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn share(global_batch: u64, rank: u32, world: u32) -> Range<u64> {
    assert!(rank < world, "rank {rank} of a world of {world}");
    let start = |rank: u64| (u128::from(rank) * u128::from(global_batch) / u128::from(world)) as u64;
    start(rank.into())..start(u64::from(rank) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_are_the_same_samples_for_every_world() {
        let positions = |world: u32, part: u64| -> Vec<u64> {
            (0..world)
                .flat_map(|rank| {
                    let own = share(23, rank, world);
                    let first = first_row(&own, part, 4);
                    (own.start + first..own.end).step_by(4)
                })
                .collect()
        };
        for part in 0..4 {
            let alone = positions(1, part);
            assert!(alone.iter().all(|p| p % 4 == part) && alone.len() >= 5);
            assert!((2..=5).all(|world| positions(world, part) == alone));
        }
    }

    fn recipe(sets: &[&str]) -> Recipe {
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        Recipe::load("byol-imagenet-resnet50-100ep", &sets).unwrap()
    }

    #[test]
    fn counts_steps_and_scales_the_learning_rate() {
        // 1,281,167 images of ImageNet in batches of 4096: 312 full ones.
        let plan = Plan::new(recipe(&[]), 1_281_167, 8).unwrap();
        assert_eq!(plan.steps_per_epoch, 312);
        assert_eq!(plan.total_steps, 31_200);
        assert_eq!(plan.warmup_steps, 3_120);
        assert!((plan.peak_lr - 7.2).abs() < 1e-12);
        assert_eq!(plan.end_step(), 31_200);
    }

    #[test]
    fn max_steps_ends_early_and_changes_no_schedule() {
        let plan = Plan::new(recipe(&["schedule.max_steps=50"]), 1_281_167, 1).unwrap();
        assert_eq!((plan.end_step(), plan.total_steps, plan.warmup_steps), (50, 31_200, 3_120));
        let plan = Plan::new(recipe(&["schedule.max_steps=999999"]), 1_281_167, 1).unwrap();
        assert_eq!(plan.end_step(), 31_200);
    }

    #[test]
    fn a_fraction_of_an_epoch_of_warmup_is_rounded_to_steps() {
        let sets = ["schedule.global_batch=30", "schedule.warmup_epochs=0.25"];
        assert_eq!(Plan::new(recipe(&sets), 300, 1).unwrap().warmup_steps, 3); // 2.5 steps
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let message = |sets: &[&str], num_samples, world| {
            Plan::new(recipe(sets), num_samples, world).unwrap_err().to_string()
        };
        assert_eq!(
            message(&["data.path=photos"], 100, 1),
            "`schedule.global_batch` = 4096: larger than the data set of 100 images (photos); lower it, as \
             not one \
             batch would be full"
        );
        assert_eq!(
            message(&["schedule.global_batch=4"], 100, 5),
            "`schedule.global_batch` = 4: smaller than the world of 5 ranks; raise it or start fewer workers"
        );
        assert_eq!(
            message(&["schedule.global_batch=4", "parallel.sync_batch_norm=false"], 100, 3),
            "`schedule.global_batch` = 4: leaves fewer than 2 samples to some of 3 ranks, too few for \
             batch-norm \
             statistics with `parallel.sync_batch_norm` = false; raise it or start fewer workers"
        );
        assert_eq!(
            message(&["schedule.global_batch=4"], 100, 0),
            "`schedule.global_batch` = 4: a world of 0 ranks cannot share it; start at least one worker"
        );
        assert_eq!(
            message(&["schedule.global_batch=2"], u64::MAX, 1),
            "`schedule.epochs` = 100: times 9223372036854775807 steps is beyond 64 bits; lower it"
        );
        assert_eq!(
            message(&["schedule.global_batch=4", "parallel.micro_batches=3"], 100, 1),
            "`schedule.global_batch` = 4: leaves fewer than 2 samples to a micro-batch, too few for batch-norm statistics; \
             raise it or lower `parallel.micro_batches` = 3"
        );
        assert!(Plan::new(recipe(&["schedule.global_batch=4", "parallel.micro_batches=2"]), 100, 2).is_ok());
        assert!(Plan::new(recipe(&["schedule.global_batch=5"]), 5, 5).is_ok());
        assert!(
            Plan::new(recipe(&["schedule.global_batch=6", "parallel.sync_batch_norm=false"]), 6, 3).is_ok()
        );
    }

    #[test]
    fn a_recipe_spoiled_in_rust_is_refused() {
        let mut spoiled = recipe(&[]);
        spoiled.method.tau_base = 2.0;
        assert_eq!(
            Plan::new(spoiled, 10_000, 1).unwrap_err().to_string(),
            "`method.tau_base` = 2.0 in the recipe: must be in [0, 1]"
        );
    }

    #[test]
    fn shares_cover_every_batch_exactly() {
        let batches = (1..=130).chain([4095, 4096, 4097, 1 << 24, u64::from(u32::MAX) * 3, u64::MAX]);
        for batch in batches {
            for world in (1..=67).chain([1000, 4096]) {
                let mut next = 0;
                let (mut shortest, mut longest) = (u64::MAX, 0);
                for rank in 0..world {
                    let share = share(batch, rank, world);
                    assert_eq!(share.start, next, "batch {batch}, rank {rank} of {world}");
                    assert!(share.end >= share.start);
                    next = share.end;
                    shortest = shortest.min(share.end - share.start);
                    longest = longest.max(share.end - share.start);
                }
                assert_eq!(next, batch, "batch {batch}, world {world}");
                assert!(longest - shortest <= 1, "batch {batch}, world {world}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "rank 2 of a world of 2")]
    fn a_rank_outside_the_world_has_no_share() {
        share(8, 2, 2);
    }
}
