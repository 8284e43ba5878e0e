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

    /// A sample of 16 bits.
    pub(super) fn of_16(&self, value: u16) -> u8 {
        match self.range {
            Some(range) => scaled(f64::from(value), range),
            None => (value >> 8) as u8,
        }
    }
}

/// Where `value` lies between the two, in 255ths; what is no number is 0.
pub(super) fn scaled(value: f64, [low, high]: [f64; 2]) -> u8 {
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
        assert_eq!([0, 4095, 2048, 9000].map(|value| twelve.of_16(value)), [0, 255, 128, 255]);
        assert_eq!([0, 4095, 65535].map(|value| Reading::default().of_16(value)), [0, 15, 255]);
        assert_eq!(Reading::default().changed(), None);
        assert_eq!(
            Reading { bands: Some([4, 3, 2]), ..twelve }.changed().unwrap(),
            "values 0 to 4095 of deep images as 0 to 255, bands 4, 3, 2 as red, green, blue"
        );
    }
}
