//! Which sample stands where in an epoch: a permutation that is computed, not stored.
//!
//! An epoch visits every sample in a pseudo-random order that depends on `(seed, epoch)` alone. Position `p` is
//! split into two digits of base `a = ceil(sqrt(n))` and sent through a Feistel network (Luby and Rackoff 1988)
//! whose round function is Philox; results that are not below `n` are sent through again (cycle walking, Black and
//! Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which keeps it a bijection on `[0, n)`. Since
//! `a² < n + 2√n + 1`, a second pass is rare. Memory is constant for any `n`, and any position costs the same, so
//! resuming in the middle re-reads nothing.

use crate::rng::{Stream, purpose};

/// Feistel rounds: four make a strong pseudo-random permutation; twice that, since tiny sets have tiny digits.
const ROUNDS: u32 = 8;

/// The order of samples over a run. Pure: a function of `(seed, num_samples, global_batch)`.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    num_samples: u64,
    global_batch: u64,
    /// ceil(sqrt(num_samples)): the base of the two digits.
    base: u64,
}

impl Order {
    /// An order of `num_samples` samples, `global_batch` of them a step.
    #[must_use]
    pub fn new(seed: u64, num_samples: u64, global_batch: u64) -> Self {
        let mut base = (num_samples as f64).sqrt() as u64;
        while u128::from(base) * u128::from(base) < u128::from(num_samples) {
            base += 1;
        }
        while base > 1 && u128::from(base - 1) * u128::from(base - 1) >= u128::from(num_samples) {
            base -= 1;
        }
        Self { seed, num_samples, global_batch, base }
    }

    /// Samples of the data set.
    #[must_use]
    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    /// Samples a step, over all ranks.
    #[must_use]
    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// Full batches in an epoch. The samples left over (`num_samples % global_batch`) sit that epoch out; which
    /// ones differs from epoch to epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.num_samples.checked_div(self.global_batch).unwrap_or(0)
    }

    /// The sample at `position` (below `num_samples`) of `epoch`.
    #[must_use]
    pub fn sample(&self, epoch: u64, position: u64) -> u64 {
        debug_assert!(position < self.num_samples);
        let a = self.base;
        let mut x = position;
        loop {
            let (mut high, mut low) = (x / a, x % a);
            for round in 0..ROUNDS {
                let mixed = Stream::new(self.seed, epoch, low, purpose::ORDER).block(round);
                let mixed = u64::from(mixed[0]) | u64::from(mixed[1]) << 32;
                let shift = ((u128::from(mixed) * u128::from(a)) >> 64) as u64;
                (high, low) = (low, (high + shift) % a);
            }
            let y = u128::from(high) * u128::from(a) + u128::from(low);
            if y < u128::from(self.num_samples) {
                return y as u64;
            }
            // y >= num_samples, yet below a², which exceeds u64 only for num_samples > 2^64 − 2^33.
            x = y as u64;
        }
    }

    /// Epoch and position of the first sample of `step`. Needs at least one step an epoch.
    #[must_use]
    pub fn start(&self, step: u64) -> (u64, u64) {
        let steps = self.steps_per_epoch().max(1);
        (step / steps, (step % steps) * self.global_batch)
    }

    /// The global batch of `step`: its epoch, and its sample ids in order.
    #[must_use]
    pub fn batch(&self, step: u64) -> (u64, Vec<u64>) {
        let (epoch, start) = self.start(step);
        (epoch, (start..start + self.global_batch).map(|position| self.sample(epoch, position)).collect())
    }

    /// The part `share` (positions within the global batch) of the batch of `step`.
    #[must_use]
    pub fn share(&self, step: u64, share: std::ops::Range<u64>) -> (u64, Vec<u64>) {
        let (epoch, start) = self.start(step);
        (epoch, share.map(|i| self.sample(epoch, start + i)).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assert_bijection(seed: u64, epoch: u64, n: u64) {
        let order = Order::new(seed, n, 1);
        let mut seen = vec![false; n as usize];
        for position in 0..n {
            let sample = order.sample(epoch, position);
            assert!(sample < n, "{sample} of {n}");
            assert!(!std::mem::replace(&mut seen[sample as usize], true), "{sample} twice of {n}");
        }
    }

    #[test]
    fn every_small_set_is_permuted() {
        for n in 1..200 {
            assert_bijection(3, n % 5, n);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]
        #[test]
        fn any_set_is_permuted(seed: u64, epoch in 0u64..1000, n in 1u64..4000) {
            assert_bijection(seed, epoch, n);
        }

        /// Far too large to enumerate: distinct positions still go to distinct samples in range.
        #[test]
        fn huge_sets_cost_nothing(seed: u64, start in 0u64..900_000_000_000) {
            let order = Order::new(seed, 1_000_000_000_000, 4096);
            let mut samples: Vec<u64> = (start..start + 500).map(|p| order.sample(1, p)).collect();
            prop_assert!(samples.iter().all(|&s| s < 1_000_000_000_000));
            samples.sort_unstable();
            samples.dedup();
            prop_assert_eq!(samples.len(), 500);
        }

        /// Over any world size and any resume point an epoch visits no sample twice, in the same global order.
        #[test]
        fn shares_join_to_the_global_batch(n in 8u64..300, batch in 1u64..9, world in 1u64..9, step in 0u64..70) {
            let order = Order::new(5, n, batch);
            let (epoch, whole) = order.batch(step);
            let mut joined = Vec::new();
            for rank in 0..world {
                let (e, part) = order.share(step, rank * batch / world..(rank + 1) * batch / world);
                prop_assert_eq!(e, epoch);
                joined.extend(part);
            }
            prop_assert_eq!(joined, whole);
        }
    }

    #[test]
    fn an_epoch_covers_all_but_the_remainder() {
        let order = Order::new(11, 103, 10);
        assert_eq!(order.steps_per_epoch(), 10);
        let mut left_out = std::collections::BTreeSet::new();
        for epoch in 0..20 {
            let mut seen: Vec<u64> = (0..10).flat_map(|s| order.batch(epoch * 10 + s).1).collect();
            assert!((0..10).all(|s| order.batch(epoch * 10 + s).0 == epoch));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 100);
            left_out.extend((0..103).filter(|id| !seen.contains(id)));
        }
        assert!(left_out.len() > 20, "the remainder changes from epoch to epoch: {left_out:?}");
    }

    #[test]
    fn epochs_and_seeds_differ_and_positions_are_uniform() {
        let n = 16u64;
        let order = Order::new(9, n, 4);
        let list = |order: &Order, epoch| (0..n).map(|p| order.sample(epoch, p)).collect::<Vec<_>>();
        assert_ne!(list(&order, 0), list(&order, 1));
        assert_ne!(list(&order, 0), list(&Order::new(10, n, 4), 0));
        // Where does sample s go? Chi-square of 16 x 16 cells over 4000 epochs, 225 degrees of freedom.
        let epochs = 4000;
        let mut counts = vec![0f64; (n * n) as usize];
        for epoch in 0..epochs {
            for (p, s) in list(&order, epoch).into_iter().enumerate() {
                counts[p * n as usize + s as usize] += 1.0;
            }
        }
        let expected = epochs as f64 / n as f64;
        let chi2: f64 = counts.iter().map(|c| (c - expected) * (c - expected) / expected).sum();
        assert!(chi2 < 225.0 + 5.0 * (2.0f64 * 225.0).sqrt(), "{chi2}");
    }

    #[test]
    fn the_largest_sets_do_not_overflow() {
        for n in [1, 2, u64::from(u32::MAX), 1 << 40, u64::MAX >> 1] {
            let order = Order::new(1, n, 1);
            assert!(order.sample(0, n - 1) < n);
            assert!(order.sample(0, n / 2) < n);
        }
        assert_eq!(Order::new(0, 0, 4).steps_per_epoch(), 0);
        assert_eq!(Order::new(0, 3, 4).steps_per_epoch(), 0);
    }
}
