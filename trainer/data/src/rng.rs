//! Counter-based random numbers: a draw is a pure function of what it is for.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3) maps a
//! 128-bit counter and a 64-bit key to 128 random bits. Nothing is carried from draw to draw, so there is no order
//! of arrival to depend on: thread, rank and resume point cannot change a number.
//!
//! ```text
//! key     = seed (64 bits)
//! counter = subject (64: sample id) | epoch (32) | purpose (8: view) | block (24)
//! ```
//! Distinct `(subject, epoch, purpose, block)` are distinct counters, so no two draws share bits.

/// One block of Philox4x32-10: ten rounds on `counter` under `key`.
#[must_use]
#[inline]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// What draws are for. Views use their own number (0, 1, …); the rest stand at the top of the range.
pub mod purpose {
    /// The order of samples.
    pub const ORDER: u8 = 0xFF;
    /// The synthetic image set.
    pub const SYNTHETIC: u8 = 0xFE;
    /// What takes the place of a damaged sample.
    pub const REPLACEMENT: u8 = 0xFC;
}

/// All the randomness of one subject: an array of uniform draws, addressed by slot.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
}

impl Stream {
    /// The draws for `(seed, epoch, subject, purpose)`; an augmentation's are `(seed, epoch, sample, view)`.
    #[must_use]
    pub fn new(seed: u64, epoch: u64, subject: u64, purpose: u8) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [subject as u32, (subject >> 32) as u32, epoch as u32, u32::from(purpose) << 24],
        }
    }

    /// 128 random bits: block `index` (below 2^24).
    #[must_use]
    #[inline]
    pub fn block(&self, index: u32) -> [u32; 4] {
        let [c0, c1, c2, c3] = self.counter;
        philox4x32_10([c0, c1, c2, c3 | (index & 0x00FF_FFFF)], self.key)
    }

    /// 64 random bits: slot `slot` (two to a block).
    #[must_use]
    #[inline]
    pub fn bits(&self, slot: u32) -> u64 {
        let block = self.block(slot / 2);
        let half = (slot % 2) as usize * 2;
        u64::from(block[half]) | u64::from(block[half + 1]) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    #[must_use]
    pub fn uniform(&self, slot: u32) -> f64 {
        (self.bits(slot) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    #[must_use]
    pub fn between(&self, slot: u32, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform(slot)
    }

    /// Uniform integer in [0, n); 0 when `n` is 0. (Multiply-shift: biased by less than n / 2^64.)
    #[must_use]
    pub fn below(&self, slot: u32, n: u64) -> u64 {
        ((u128::from(self.bits(slot)) * u128::from(n)) >> 64) as u64
    }

    /// True with probability `p` (0: never, 1: always).
    #[must_use]
    pub fn chance(&self, slot: u32, p: f64) -> bool {
        self.uniform(slot) < p
    }
}

/// A [`Stream`] read front to back, for code whose number of draws is not fixed.
#[derive(Debug, Clone)]
pub struct Sequence {
    stream: Stream,
    slot: u32,
}

impl Sequence {
    /// Starts at slot 0 of `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, slot: 0 }
    }

    fn next_slot(&mut self) -> u32 {
        let slot = self.slot;
        self.slot += 1;
        slot
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        let slot = self.next_slot();
        self.stream.between(slot, low, high)
    }

    /// Uniform integer in [0, n).
    pub fn below(&mut self, n: u64) -> u64 {
        let slot = self.next_slot();
        self.stream.below(slot, n)
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        let slot = self.next_slot();
        self.stream.chance(slot, p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `philox4x32 10` lines of Random123's `tests/kat_vectors`.
    #[test]
    fn known_answers_of_random123() {
        let table = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in table {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn every_part_of_the_key_changes_the_draw() {
        let draw = |seed, epoch, sample, view, slot| Stream::new(seed, epoch, sample, view).bits(slot);
        let base = draw(1, 2, 3, 0, 4);
        assert_eq!(base, draw(1, 2, 3, 0, 4));
        let others = [
            draw(2, 2, 3, 0, 4),
            draw(1 + (1 << 32), 2, 3, 0, 4),
            draw(1, 3, 3, 0, 4),
            draw(1, 2, 4, 0, 4),
            draw(1, 2, 3 + (1 << 32), 0, 4),
            draw(1, 2, 3, 1, 4),
            draw(1, 2, 3, 0, 5),
            draw(1, 2, 3, 0, 6),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn uniform_is_uniform_enough() {
        let stream = Stream::new(7, 0, 0, 0);
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|i| stream.uniform(i)).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        let variance = draws.iter().map(|u| (u - 0.5) * (u - 0.5)).sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 0.003, "{variance}");
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        assert!((0..n).all(|i| stream.below(i, 10) < 10));
        assert!((0..n).all(|i| stream.chance(i, 1.0) && !stream.chance(i, 0.0)));
    }
}
