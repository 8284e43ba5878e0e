//! Which sample stands where in an epoch: a permutation that is computed, not stored.
//!
//! An epoch visits every sample in a pseudo-random order that depends on `(seed, epoch)` alone. Position `p` is
//! split into two digits of base `a = ceil(sqrt(n))` and sent through a Feistel network (Luby and Rackoff 1988)
//! whose round function is Philox; results that are not below `n` are sent through again (cycle walking, Black and
//! Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which keeps it a bijection on `[0, n)`. Since
//! `a² < n + 2√n + 1`, a second pass is rare. Memory is constant for any `n`, and any position costs the same, so
//! resuming in the middle re-reads nothing.
//!
//! The windowed order ([`Order::windowed`]) is made of the same permutations: of the shards, and of the positions within
//! each window of [`WINDOW`] samples. It costs memory by the number of shards, and any position still costs the same.
//!
//! Whatever the world size: a step's global batch is these positions in this order, and a rank takes its part of it. The
//! samples that do not fill a last batch sit the epoch out.

use std::sync::{Arc, Mutex, PoisonError};

use crate::rng::{Stream, purpose};

/// Feistel rounds: four make a strong pseudo-random permutation; twice that, since tiny sets have tiny digits.
const ROUNDS: u32 = 8;

/// Samples that [`Order::windowed`] shuffles together.
pub const WINDOW: u64 = 16_384;

/// A keyed permutation of `0 .. n`.
#[derive(Debug, Clone, Copy)]
struct Permutation {
    n: u64,
    /// ceil(sqrt(n)): the base of the two digits.
    base: u64,
}

impl Permutation {
    fn new(n: u64) -> Self {
        let mut base = (n as f64).sqrt() as u64;
        while u128::from(base) * u128::from(base) < u128::from(n) {
            base += 1;
        }
        while base > 1 && u128::from(base - 1) * u128::from(base - 1) >= u128::from(n) {
            base -= 1;
        }
        Self { n, base }
    }

    /// Where `position` (below `n`) goes. `part` tells apart permutations of one epoch: 0, 1, …
    fn at(&self, seed: u64, epoch: u64, part: u32, position: u64) -> u64 {
        debug_assert!(position < self.n);
        let a = self.base;
        let mut x = position;
        loop {
            let (mut high, mut low) = (x / a, x % a);
            for round in 0..ROUNDS {
                let block = part.wrapping_mul(ROUNDS).wrapping_add(round);
                let mixed = Stream::new(seed, epoch, low, purpose::ORDER).block(block);
                let mixed = u64::from(mixed[0]) | u64::from(mixed[1]) << 32;
                let shift = ((u128::from(mixed) * u128::from(a)) >> 64) as u64;
                (high, low) = (low, (high + shift) % a);
            }
            let y = u128::from(high) * u128::from(a) + u128::from(low);
            if y < u128::from(self.n) {
                return y as u64;
            }
            // y >= n, yet below a², which exceeds u64 only for n > 2^64 − 2^33.
            x = y as u64;
        }
    }
}

/// The order of samples over a run. Pure: a function of `(seed, num_samples, global_batch)`, and of the shards' sizes
/// when it is windowed.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    num_samples: u64,
    global_batch: u64,
    whole: Permutation,
    shards: Option<Arc<Shards>>,
}

/// What the windowed order knows of the shards.
#[derive(Debug)]
struct Shards {
    /// Where each shard's samples start, and the number of samples.
    starts: Vec<u64>,
    permutation: Permutation,
    /// The shards as an epoch visits them; of the epoch that was asked for last.
    visited: Mutex<(u64, Arc<Visit>)>,
}

/// One epoch's sequence of shards: which, and after how many samples it starts.
#[derive(Debug, Default)]
struct Visit {
    shards: Vec<u32>,
    starts: Vec<u64>,
}

impl Shards {
    fn visit(&self, seed: u64, epoch: u64) -> Arc<Visit> {
        let mut visited = self.visited.lock().unwrap_or_else(PoisonError::into_inner);
        if visited.0 != epoch || visited.1.shards.is_empty() {
            let count = self.starts.len() - 1;
            let mut visit = Visit { shards: Vec::with_capacity(count), starts: Vec::with_capacity(count) };
            let mut start = 0;
            for place in 0..count {
                let shard = self.permutation.at(seed, epoch, 0, place as u64) as usize;
                visit.shards.push(shard as u32);
                visit.starts.push(start);
                start += self.starts[shard + 1] - self.starts[shard];
            }
            *visited = (epoch, Arc::new(visit));
        }
        Arc::clone(&visited.1)
    }
}

impl Order {
    /// An order of `num_samples` samples, `global_batch` of them a step: one permutation of all.
    #[must_use]
    pub fn new(seed: u64, num_samples: u64, global_batch: u64) -> Self {
        Self { seed, num_samples, global_batch, whole: Permutation::new(num_samples), shards: None }
    }

    /// The order for reading shard by shard: shards in random order; of their samples, laid end to end, every
    /// [`WINDOW`] are shuffled. At any time a window's samples lie in a few shards that follow each other.
    ///
    /// `shards` are the numbers of samples in each, in the order of their samples' indices; empty ones are allowed.
    #[must_use]
    pub fn windowed(seed: u64, shards: &[u64], global_batch: u64) -> Self {
        let mut starts = Vec::with_capacity(shards.len() + 1);
        let mut total = 0;
        starts.push(0);
        for &samples in shards.iter().filter(|&&samples| samples > 0) {
            total += samples;
            starts.push(total);
        }
        let permutation = Permutation::new(starts.len() as u64 - 1);
        let shards = Shards { starts, permutation, visited: Mutex::default() };
        Self { shards: Some(Arc::new(shards)), ..Self::new(seed, total, global_batch) }
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
        let Some(shards) = &self.shards else { return self.whole.at(self.seed, epoch, 0, position) };
        let window = position / WINDOW;
        let first = window * WINDOW;
        let within = Permutation::new(WINDOW.min(self.num_samples - first));
        // Part 0 is the shards'. (2^21 − 1 windows have keys of their own: 34 billion samples; then keys repeat.)
        let at = first + within.at(self.seed, epoch, 1 + window as u32, position - first);
        let visit = shards.visit(self.seed, epoch);
        let place = visit.starts.partition_point(|&start| start <= at) - 1;
        shards.starts[visit.shards[place] as usize] + (at - visit.starts[place])
    }

    /// The sample that takes the place of `sample` in `epoch` when that is damaged; `attempt` counts from 0, since the
    /// replacement may be damaged too. The same whatever the world size and the order of arrival.
    #[must_use]
    pub fn replacement(&self, epoch: u64, sample: u64, attempt: u32) -> u64 {
        Stream::new(self.seed, epoch, sample, purpose::REPLACEMENT).below(attempt, self.num_samples)
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

    /// Every sample once, shards one after the other, and far from sorted.
    #[test]
    fn the_windowed_order_stays_in_a_few_shards() {
        let shards: Vec<u64> = (0..120).map(|i| (i * 37) % 900).collect();
        let order = Order::windowed(3, &shards, 8);
        let n = order.num_samples();
        assert_eq!(n, shards.iter().sum::<u64>());
        let mut starts: Vec<u64> = vec![0];
        shards.iter().for_each(|samples| starts.push(starts[starts.len() - 1] + samples));
        let shard_of = |sample: u64| starts.partition_point(|&start| start <= sample) - 1;
        for epoch in 0..3 {
            let list: Vec<u64> = (0..n).map(|p| order.sample(epoch, p)).collect();
            let mut sorted = list.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..n), "each once");
            for window in list.chunks(WINDOW as usize) {
                let touched: std::collections::BTreeSet<usize> =
                    window.iter().map(|&sample| shard_of(sample)).collect();
                let whole: u64 = touched.iter().map(|&shard| shards[shard]).sum();
                assert!(
                    whole < window.len() as u64 + 2 * 900,
                    "a window reads whole shards but for its ends"
                );
                let ascending = window.windows(2).filter(|pair| pair[0] < pair[1]).count();
                assert!(ascending.abs_diff(window.len() / 2) < window.len() / 20, "shuffled: {ascending}");
            }
        }
        let epochs = |epoch| (0..50).map(|p| order.sample(epoch, p)).collect::<Vec<_>>();
        assert_ne!(epochs(0), epochs(1));
        assert_eq!(epochs(0), epochs(0), "asking for another epoch in between changes nothing");
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

    /// A trillion samples cost no memory: `cargo test … a_trillion -- --nocapture` says how long a million draws take.
    #[test]
    fn a_trillion_samples() {
        let pages = || -> u64 {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse().unwrap()
        };
        let before = pages();
        let started = std::time::Instant::now();
        let order = Order::new(1, 1_000_000_000_000, 4096);
        let sum = (0..1_000_000).fold(0u64, |sum, position| sum.wrapping_add(order.sample(0, position)));
        let took = started.elapsed();
        let grown = pages().saturating_sub(before) * 4;
        println!(
            "10^12 samples: {} bytes, 10^6 draws in {took:?}, resident memory grown by {grown} KiB",
            size_of::<Order>()
        );
        // Their mean is that of all, to a few standard errors (0.29 · 10^12 / 1000).
        assert!((sum as f64 / 1e6 / 5e11 - 1.0).abs() < 0.003, "{sum}");
        // Other tests run beside this one.
        assert!(grown < 64 << 10, "{grown} KiB");
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
