//! What curves need, on paper and in a terminal: fewer points without lost spikes, and ticks that are round numbers.

/// Steps and values.
pub type Points = Vec<(f64, f64)>;

/// Merges neighbours into their lowest and highest, in order, until there are at most about `most`: no spike is lost.
pub fn thin(points: impl Iterator<Item = (f64, f64)> + Clone, most: usize) -> Points {
    let count = points.clone().count();
    if count <= most {
        return points.collect();
    }
    let size = count.div_ceil((most / 2).max(1));
    let mut thinned = Points::new();
    let mut points = points.peekable();
    // Many lines of a long run: none of them is copied.
    while points.peek().is_some() {
        let chunk = points.by_ref().take(size).map(|point| (point, point));
        let ends = chunk.reduce(|(low, high), (point, _)| {
            let is_below = |a: (f64, f64), b: (f64, f64)| a.1.total_cmp(&b.1).is_lt();
            (if is_below(point, low) { point } else { low }, if is_below(point, high) { high } else { point })
        });
        let mut pair: Points = ends.into_iter().flat_map(|(low, high)| [low, high]).collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair.dedup();
        thinned.extend(pair);
    }
    thinned
}

/// Lowest and highest; none when nothing is finite.
pub fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// `margin` below a finite value and above it, or more where so little does not tell such numbers apart: never the same twice.
pub fn around(value: f64, margin: f64) -> (f64, f64) {
    let margin = margin.max(f64::EPSILON * value.abs());
    (value - margin, value + margin)
}

/// The whole multiples of `step` from `first` to `last`, also where a step is too little to tell such numbers apart.
pub fn ticks(first: f64, last: f64, step: f64) -> impl Iterator<Item = f64> {
    let start = (first / step).ceil() * step;
    let ticks = 0..=((last - first) / step) as u32;
    ticks.map(move |tick| start + f64::from(tick) * step).take_while(move |value| *value <= last)
}

/// Widened to whole multiples of a round step, of which about `parts` fit: the axis and the step between its ticks.
pub fn axis(low: f64, high: f64, parts: f64) -> (f64, f64, f64) {
    let (mut low, mut high) = (low, high);
    if high - low <= f64::EPSILON * high.abs().max(low.abs()) {
        let margin = if high == 0.0 { 1.0 } else { 0.05 * high.abs() };
        (low, high) = (low - margin, high + margin);
    }
    let step = nice_step(high - low, parts);
    ((low / step).floor() * step, (high / step).ceil() * step, step)
}

/// 1, 2 or 5 times a power of ten, about `range / parts`.
pub fn nice_step(range: f64, parts: f64) -> f64 {
    let rough = range / parts;
    let power = 10f64.powf(rough.log10().floor());
    let factor =
        [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

/// So many places tell ticks apart that are `step` apart.
pub fn decimals(step: f64) -> usize {
    (-step.log10().floor()).clamp(0.0, 9.0) as usize
}

/// As short as a tick wants to be: `0.25`, `21.4k`, `1.2M`, `5.0e22`.
pub fn number(value: f64, digits: usize) -> String {
    match value.abs() {
        1e9.. => format!("{value:.1e}"),
        1e6.. => format!("{}M", four_digits(value / 1e6)),
        1e4.. => format!("{}k", four_digits(value / 1e3)),
        _ => format!("{:.digits$}", if value == 0.0 { 0.0 } else { value }),
    }
}

/// Of a number from 1 to 1000: `1.234`, `21.4`, `500`.
fn four_digits(value: f64) -> String {
    let places = (3.0 - value.abs().log10().floor()).clamp(1.0, 3.0) as usize;
    format!("{value:.places$}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        for (range, step) in [(1.0, 0.5), (4.0, 1.0), (100.0, 50.0), (0.003, 0.001), (7.9, 2.0), (1e6, 5e5)] {
            assert!((nice_step(range, 4.0) - step).abs() < step * 1e-9, "{range}: {}", nice_step(range, 4.0));
        }
        assert_eq!(number(0.25, decimals(0.05)), "0.25");
        assert_eq!(number(20_000.0, 0), "20k");
        let ticks = [10_000.0, 10_500.0, -11_000.0, 100_500.0, 999_999.0, 1.25e6, 4e7];
        assert_eq!(
            ticks.map(|tick| number(tick, 0)),
            ["10k", "10.5k", "-11k", "100.5k", "1000k", "1.25M", "40M"]
        );
        assert_eq!(number(5e22, 0), "5.0e22", "of a run that diverges");
        assert_eq!(number(-0.0, 1), "0.0");
    }

    #[test]
    fn ticks_lie_between_the_ends_and_end() {
        let all = |first, last, step| ticks(first, last, step).collect::<Vec<f64>>();
        assert_eq!(all(3.0, 10.0, 2.0), [4.0, 6.0, 8.0, 10.0]);
        assert_eq!(all(0.0, 4.0, 2.0), [0.0, 2.0, 4.0]);
        assert!(all(4.5, 4.9, 1.0).is_empty());
        assert_eq!(all(1e17, 1e17 + 16.0, 5.0).len(), 4, "a step that adds nothing");
        let (low, high) = around(u64::MAX as f64, 0.5);
        assert!(low < high);
        assert_eq!(around(3.0, 0.5), (2.5, 3.5));
    }

    #[test]
    fn axes_hold_their_values_also_when_there_is_one() {
        for (low, high) in [(0.3, 2.7), (5.0, 5.0), (0.0, 0.0), (-1e-7, 3e-7)] {
            let (from, to, step) = axis(low, high, 4.0);
            assert!(from <= low && high <= to && from < to && step > 0.0, "{low} {high}: {from} {to} {step}");
        }
        assert_eq!(range([f64::NAN, 2.0, 1.0].into_iter()), Some((1.0, 2.0)));
        assert_eq!(range(std::iter::empty()), None);
    }

    #[test]
    fn thinning_keeps_order_ends_and_spikes() {
        let mut points: Points = (0..10_000).map(|step| (f64::from(step), 1.0)).collect();
        points[1234].1 = 99.0;
        points[5678].1 = -99.0;
        let thinned = thin(points.iter().copied(), 400);
        assert!(thinned.len() <= 402);
        assert!(thinned.is_sorted_by(|a, b| a.0 <= b.0));
        assert!(thinned.contains(&(1234.0, 99.0)) && thinned.contains(&(5678.0, -99.0)));
    }
}
