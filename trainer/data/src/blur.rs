//! A Gaussian blur of rows that arrive in order: across as they come, down as soon as the rows below are there.
//!
//! Only as many rows are kept as the widest blur looks at, so that they stay in the nearest caches.

use mentee_config::recipe::Definition;

use crate::colour::{WIDE, block};
use crate::math;

/// A blur tap lighter than this fraction of the middle one is below what f32 can add to it.
const NEGLIGIBLE_TAP: f64 = 1e-8;

/// What a blur sees beyond the border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    /// Nothing, as `padding="SAME"` of a convolution: borders darken.
    Zero,
    /// The border pixel, as PIL.
    Repeat,
}

/// Weights of a Gaussian from its middle outwards, at most `radius` steps, normalised over both sides; negligible
/// ones are left off.
fn taps(sigma: f64, radius: usize) -> Vec<f32> {
    let weights: Vec<f64> = (0..=radius)
        .map(|k| math::exp(-((k * k) as f64) / (2.0 * sigma * sigma)))
        .take_while(|&w| w > NEGLIGIBLE_TAP)
        .collect();
    let sum = weights[0] + 2.0 * weights[1..].iter().sum::<f64>();
    weights.iter().map(|w| (w / sum) as f32).collect()
}

/// Work memory of a blur, reused from view to view.
#[derive(Debug, Default)]
pub(crate) struct Blur {
    taps: Vec<f32>,
    edge: Option<Edge>,
    size: usize,
    /// Rows kept, a power of two.
    kept: usize,
    /// `[3, kept, size]`: rows blurred across; row y stands at y modulo `kept`. Then a row of zeros.
    ring: Vec<f32>,
    /// One row and its padding.
    row: Vec<f32>,
    /// Where in `ring` the rows are that a row looks at, from the top.
    lines: Vec<usize>,
}

impl Blur {
    /// Begins a view of `size` x `size`. `false`: the blur is too narrow to do anything.
    pub(crate) fn begin(&mut self, definition: Definition, sigma: f64, size: usize, rows: usize) -> bool {
        let (radius, edge) = match definition {
            Definition::Byol => (size / 20, Edge::Zero),
            Definition::Torchvision => ((4.0 * sigma).ceil() as usize, Edge::Repeat),
        };
        self.taps = taps(sigma, radius);
        self.edge = Some(edge);
        self.size = size;
        self.kept = (2 * self.radius() + 1 + rows).next_power_of_two();
        let zeros = 3 * self.kept * size;
        self.ring.resize(zeros + size, 0.0);
        self.ring[zeros..].fill(0.0);
        self.row.resize(size + 2 * self.radius(), 0.0);
        self.taps.len() > 1
    }

    /// Rows below that a row looks at.
    pub(crate) fn radius(&self) -> usize {
        self.taps.len() - 1
    }

    /// Takes row `y` of a channel.
    #[inline(always)]
    pub(crate) fn take(&mut self, channel: usize, y: usize, line: &[f32]) {
        let (size, radius) = (self.size, self.radius());
        let (left, right) = match self.edge {
            Some(Edge::Repeat) => (line[0], line[size - 1]),
            _ => (0.0, 0.0),
        };
        let row = &mut self.row[..size + 2 * radius];
        row[..radius].fill(left);
        row[radius..radius + size].copy_from_slice(line);
        row[radius + size..].fill(right);
        let at = (channel * self.kept + y % self.kept) * size;
        across(row, radius, &self.taps, &mut self.ring[at..at + size]);
    }

    /// Makes row `y` of a channel, whose neighbours within the view have been taken.
    #[inline(always)]
    pub(crate) fn make(&mut self, channel: usize, y: usize, out: &mut [f32]) {
        let Self { taps, edge, size, kept, ring, lines, .. } = self;
        let (radius, last) = (taps.len() - 1, *size as isize - 1);
        lines.clear();
        lines.extend((0..2 * radius + 1).map(|k| {
            let y = (y + k) as isize - radius as isize;
            let inside = y.clamp(0, last);
            if inside != y && *edge == Some(Edge::Zero) {
                3 * *kept * *size
            } else {
                (channel * *kept + inside as usize % *kept) * *size
            }
        }));
        let (above, below) = (&lines[..radius], &lines[radius + 1..]);
        let middle = lines[radius];
        let mut start = 0;
        let mut blocks = out[..*size].chunks_exact_mut(WIDE);
        for out in &mut blocks {
            let mut sum = block(ring, middle + start);
            sum.iter_mut().for_each(|x| *x *= taps[0]);
            for ((before, after), &tap) in above.iter().rev().zip(below).zip(&taps[1..]) {
                let (before, after) = (block(ring, before + start), block(ring, after + start));
                for i in 0..WIDE {
                    sum[i] += tap * (before[i] + after[i]);
                }
            }
            out.copy_from_slice(&sum);
            start += WIDE;
        }
        for (at, out) in (start..).zip(blocks.into_remainder()) {
            *out = taps[0] * ring[middle + at];
            for ((before, after), &tap) in above.iter().rev().zip(below).zip(&taps[1..]) {
                *out += tap * (ring[before + at] + ring[after + at]);
            }
        }
    }
}

/// `out[i] = Σ_k taps[|k|] · from[middle + i + k]`, the middle first and then outwards.
#[inline(always)]
fn across(from: &[f32], middle: usize, taps: &[f32], out: &mut [f32]) {
    let mut blocks = out.chunks_exact_mut(WIDE);
    let mut start = middle;
    for out in &mut blocks {
        let mut sum = block(from, start);
        sum.iter_mut().for_each(|x| *x *= taps[0]);
        for (k, &tap) in (1..).zip(&taps[1..]) {
            let (before, after) = (block(from, start - k), block(from, start + k));
            for i in 0..WIDE {
                sum[i] += tap * (before[i] + after[i]);
            }
        }
        out.copy_from_slice(&sum);
        start += WIDE;
    }
    for (at, out) in (start..).zip(blocks.into_remainder()) {
        *out = taps[0] * from[at];
        for (k, &tap) in (1..).zip(&taps[1..]) {
            *out += tap * (from[at - k] + from[at + k]);
        }
    }
}
