//! What becomes of samples of more than 8 bits and of bands, where it is not left to the rule for all.

/// How deep and many-banded images become RGB of 8 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// The values that become 0 and 255, of samples of more than 8 bits, with a sign or with fractions; in between it is linear, beyond
    /// cut off. `None`: the high byte of 16 bits.
    pub range: Option<[f64; 2]>,
    /// The bands of a TIFF, from 1, that count as red, green and blue. `None`: those that its colours say.
    pub bands: Option<[u16; 3]>,
}

impl Reading {
    /// What is done, in words; none where nothing is.
    #[must_use]
    pub fn changed(&self) -> Option<String> {
        let range =
            self.range.map(|[low, high]| format!("values {low} to {high} of deep images as 0 to 255"));
        let bands = self.bands.map(|[r, g, b]| format!("bands {r}, {g}, {b} as red, green, blue"));
        let words: Vec<String> = range.into_iter().chain(bands).collect();
        (!words.is_empty()).then(|| words.join(", "))
    }
}

/// A [`Reading`] at work; it may note the values that it meets.
pub(super) struct Taker<'a> {
    pub(super) reading: Reading,
    pub(super) values: Option<&'a mut Values>,
}

impl Taker<'_> {
    /// A sample of 16 bits.
    pub(super) fn of_16(&mut self, value: u16) -> u8 {
        match self.reading.range {
            Some(range) => self.of(f64::from(value), range),
            None => (value >> 8) as u8,
        }
    }

    /// A sample, by the range.
    pub(super) fn of(&mut self, value: f64, range: [f64; 2]) -> u8 {
        if let Some(values) = &mut self.values {
            values.note(value);
        }
        scaled(value, range)
    }
}

/// Values kept of an image to tell their quantiles, about.
const KEPT: usize = 4096;

/// The values of deep images.
#[derive(Debug)]
pub(crate) struct Values {
    pub(crate) images: u64,
    lowest: f64,
    highest: f64,
    /// Some, each with the number of values that it stands for.
    kept: Vec<(f64, f64)>,
    /// Values of the image that is being looked at.
    seen: u64,
    draws: u64,
}

impl Default for Values {
    fn default() -> Self {
        let (lowest, highest) = (f64::INFINITY, f64::NEG_INFINITY);
        Self { images: 0, lowest, highest, kept: Vec::new(), seen: 0, draws: 1 }
    }
}

impl Values {
    /// Of an image.
    pub(super) fn of_one() -> Self {
        Self { images: 1, ..Self::default() }
    }

    /// Algorithm R (Vitter, 1985): every value is as likely to be kept. The same ones each time.
    fn note(&mut self, value: f64) {
        if !value.is_finite() {
            return;
        }
        self.lowest = self.lowest.min(value);
        self.highest = self.highest.max(value);
        self.seen += 1;
        if self.kept.len() < KEPT {
            self.kept.push((value, 1.0));
            return;
        }
        // Knuth's multiplier; the high bits of the product are those that are random.
        self.draws =
            self.draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let place = ((u128::from(self.draws) * u128::from(self.seen)) >> 64) as usize;
        if let Some(kept) = self.kept.get_mut(place) {
            kept.0 = value;
        }
    }

    /// Adds those of another image.
    pub(crate) fn add(&mut self, other: Self) {
        self.images += other.images;
        self.lowest = self.lowest.min(other.lowest);
        self.highest = self.highest.max(other.highest);
        let weight = other.seen as f64 / other.kept.len().max(1) as f64;
        self.kept.extend(other.kept.into_iter().map(|(value, _)| (value, weight)));
    }

    /// What they are; none where there are none.
    pub(crate) fn told(&mut self) -> Option<String> {
        self.kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total: f64 = self.kept.iter().map(|kept| kept.1).sum();
        let at = |share: f64| {
            let mut left = share * total;
            self.kept.iter().find(|kept| {
                left -= kept.1;
                left < 0.0
            })
        };
        let (low, high) = (at(0.01)?.0, at(0.99)?.0);
        let [lowest, highest, low, high] = [self.lowest, self.highest, low, high].map(number);
        Some(format!("values from {lowest} to {highest}, 98 % of them from {low} to {high}"))
    }
}

/// A number in a few digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        1e-3..1e9 => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ => format!("{value:.3e}"),
    }
}

/// Where `value` lies between the two, in 255ths; what is no number is 0.
fn scaled(value: f64, [low, high]: [f64; 2]) -> u8 {
    // A cast cuts off, and makes NaN 0.
    ((value - low) / (high - low) * 255.0).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_linear_and_cut_off() {
        let to = |value| scaled(value, [-1000.0, 400.0]);
        assert_eq!([-2000.0, -1000.0, -300.0, 400.0, 1e30].map(to), [0, 0, 128, 255, 255]);
        assert_eq!([f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(to), [0, 255, 0]);
        let twelve = Reading { range: Some([0.0, 4095.0]), bands: None };
        let by = |reading, value| Taker { reading, values: None }.of_16(value);
        assert_eq!([0, 4095, 2048, 9000].map(|value| by(twelve, value)), [0, 255, 128, 255]);
        assert_eq!([0, 4095, 65535].map(|value| by(Reading::default(), value)), [0, 15, 255]);
        assert_eq!(Reading::default().changed(), None);
        assert_eq!(
            Reading { bands: Some([4, 3, 2]), ..twelve }.changed().unwrap(),
            "values 0 to 4095 of deep images as 0 to 255, bands 4, 3, 2 as red, green, blue"
        );
    }

    #[test]
    fn values_of_images_of_any_size_are_told() {
        let of = |values: &mut dyn Iterator<Item = f64>| {
            let mut all = Values::of_one();
            values.for_each(|value| all.note(value));
            all
        };
        assert_eq!(Values::default().told(), None);
        let mut one = of(&mut [f64::NAN, -0.25, 3.0].into_iter());
        assert_eq!(one.told().unwrap(), "values from -0.25 to 3, 98 % of them from -0.25 to 3");
        let many = of(&mut (0..100_000).map(f64::from));
        assert_eq!(many.kept.len(), KEPT);
        one = many;
        let mut all = Values::default();
        all.add(one);
        all.add(of(&mut [-7.0].into_iter()));
        let told = all.told().unwrap();
        assert_eq!(all.images, 2);
        assert!(told.starts_with("values from -7 to 99999, 98 % of them from "), "{told}");
        let ends: Vec<f64> = told.rsplit(' ').filter_map(|word| word.parse().ok()).take(2).collect();
        assert!((ends[0] - 99_000.0).abs() < 500.0 && (ends[1] - 1000.0).abs() < 500.0, "{told}");
        // Columns of a power of two, and images of unlike sizes.
        let mut edge = Values::default();
        edge.add(of(&mut (0..1 << 20).map(|i| if i % 1024 == 1023 { 0.0 } else { 1000.0 })));
        assert!(edge.told().unwrap().ends_with("98 % of them from 1000 to 1000"));
        edge.add(of(&mut std::iter::repeat_n(3.0, 100)));
        assert!(edge.told().unwrap().ends_with("98 % of them from 1000 to 1000"));
        let mut small = Values::default();
        small.add(of(&mut [4e-5, -1e-6, 123_456.789_01].into_iter()));
        assert_eq!(
            small.told().unwrap(),
            "values from -1.000e-6 to 123456.789, 98 % of them from -1.000e-6 to 123456.789"
        );
    }
}
