//! A Gaussian blur of rows that arrive in order: across as they come, down as soon as the rows below are there.
//!
//! Only as many rows are kept as the widest blur looks at, so that they stay in the nearest caches.

use std::ops::Range;

use mentee_config::recipe::Definition;

use crate::math;

/// A blur tap lighter than this fraction of the middle one is below what f32 can add to it.
const NEGLIGIBLE_TAP: f64 = 1e-8;

/// What a blur sees beyond the border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edge {
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

/// Weights of a blur of a view of `size` x `size`, and what it sees beyond the border. One weight: it does nothing.
pub(crate) fn weights(definition: Definition, sigma: f64, size: usize) -> (Vec<f32>, Edge) {
    let (radius, edge) = match definition {
        Definition::Byol => (size / 20, Edge::Zero),
        Definition::Torchvision => ((4.0 * sigma).ceil() as usize, Edge::Repeat),
    };
    (taps(sigma, radius), edge)
}

/// Floats of a row that are blurred together, in registers.
const STRIP: usize = 32;

/// Work memory of a blur, reused from view to view.
#[derive(Debug, Default)]
pub(crate) struct Blur {
    taps: Vec<f32>,
    edge: Option<Edge>,
    size: usize,
    /// Rows kept, a power of two.
    kept: usize,
    /// `[3, strips, kept + 1]`: rows blurred across, in strips of some columns; row y stands at y modulo `kept`, then one of
    /// zeros. What a strip of rows looks at is together, in the nearest cache. The last strip may be wider than the view.
    ring: Vec<[f32; STRIP]>,
    /// One row and its padding.
    row: Vec<f32>,
    /// Where in a strip the rows are that some rows look at, from the top.
    lines: Vec<usize>,
}

impl Blur {
    /// Begins a view of `size` x `size`, made `rows` rows at a time at most. `false`: the blur is too narrow to do anything.
    pub(crate) fn begin(&mut self, definition: Definition, sigma: f64, size: usize, rows: usize) -> bool {
        let (taps, edge) = weights(definition, sigma, size);
        self.taps = taps;
        self.edge = Some(edge);
        self.size = size;
        self.kept = (2 * self.radius() + 1 + rows).next_power_of_two();
        let strips = self.strips();
        self.ring.resize(3 * strips * (self.kept + 1), [0.0; STRIP]);
        self.ring.chunks_exact_mut(self.kept + 1).for_each(|strip| strip[self.kept] = [0.0; STRIP]);
        self.row.resize(strips * STRIP + 2 * self.radius(), 0.0);
        self.taps.len() > 1
    }

    fn strips(&self) -> usize {
        self.size.div_ceil(STRIP)
    }

    /// Rows below that a row looks at.
    pub(crate) fn radius(&self) -> usize {
        self.taps.len() - 1
    }

    /// Takes row `y` of a channel. `WIDE`: the processor has AVX2.
    #[inline(always)]
    pub(crate) fn take<const WIDE: bool>(&mut self, channel: usize, y: usize, line: &[f32]) {
        let (size, radius, strips) = (self.size, self.radius(), self.strips());
        let (left, right) = match self.edge {
            Some(Edge::Repeat) => (line[0], line[size - 1]),
            _ => (0.0, 0.0),
        };
        let row = &mut self.row[..strips * STRIP + 2 * radius];
        row[..radius].fill(left);
        row[radius..radius + size].copy_from_slice(line);
        row[radius + size..].fill(right);
        let ring = &mut self.ring[channel * strips * (self.kept + 1)..];
        for (strip, start) in ring.chunks_exact_mut(self.kept + 1).zip((0..strips).map(|strip| strip * STRIP))
        {
            let (row, out) = (&row[start..start + STRIP + 2 * radius], &mut strip[y % self.kept]);
            #[cfg(target_arch = "x86_64")]
            if WIDE {
                // SAFETY: the processor has AVX2.
                unsafe { x86::across(row, &self.taps, out) };
                continue;
            }
            across(row, &self.taps, out);
        }
    }

    /// Makes `rows` of a channel, whose neighbours within the view have been taken: `[rows, size]`. `WIDE` as above.
    #[inline(always)]
    pub(crate) fn make<const WIDE: bool>(&mut self, channel: usize, rows: Range<usize>, out: &mut [f32]) {
        let strips = self.strips();
        let Self { taps, edge, size, kept, ring, lines, .. } = self;
        let (radius, last) = (taps.len() - 1, *size as isize - 1);
        lines.clear();
        lines.extend((rows.start..rows.end + 2 * radius).map(|y| {
            let y = y as isize - radius as isize;
            let inside = y.clamp(0, last);
            if inside != y && *edge == Some(Edge::Zero) { *kept } else { inside as usize % *kept }
        }));
        assert!(lines.iter().all(|line| line <= kept));
        let ring = ring[channel * strips * (*kept + 1)..].chunks_exact(*kept + 1).take(strips);
        for (rows, left) in ring.zip((0..).step_by(STRIP)) {
            let strip = Strip { rows, lines, taps };
            let (out, columns) = (&mut out[left..], STRIP.min(*size - left));
            #[cfg(target_arch = "x86_64")]
            if WIDE {
                // SAFETY: the processor has AVX2; a strip has `kept + 1` rows.
                unsafe { x86::down(strip, out, *size, columns) };
                continue;
            }
            down(strip, out, *size, columns);
        }
    }
}

/// Rows of a strip that some rows of the view look at.
#[derive(Clone, Copy)]
struct Strip<'a> {
    rows: &'a [[f32; STRIP]],
    /// Places in `rows`: row i of the view looks at those from `lines[i]` on, twice the radius and one.
    lines: &'a [usize],
    taps: &'a [f32],
}

/// `Σ_k taps[|k|] · at(middle + k)`, the middle first and then outwards.
#[inline(always)]
fn blurred<'a>(taps: &[f32], middle: usize, at: impl Fn(usize) -> &'a [f32; STRIP]) -> [f32; STRIP] {
    let mut sum = at(middle).map(|x| x * taps[0]);
    for (k, &tap) in (1..).zip(&taps[1..]) {
        let (before, after) = (at(middle - k), at(middle + k));
        for i in 0..STRIP {
            sum[i] += tap * (before[i] + after[i]);
        }
    }
    sum
}

/// A strip of a row; `from` has the radius more on both sides.
fn across(from: &[f32], taps: &[f32], out: &mut [f32; STRIP]) {
    *out =
        blurred(taps, taps.len() - 1, |start| from[start..].first_chunk().expect("a strip and its padding"));
}

/// A strip of rows: the first `columns` of each to `out`, `stride` apart.
fn down(strip: Strip<'_>, out: &mut [f32], stride: usize, columns: usize) {
    let radius = strip.taps.len() - 1;
    for (lines, out) in strip.lines.windows(2 * radius + 1).zip(out.chunks_mut(stride)) {
        let sum = blurred(strip.taps, radius, |line| &strip.rows[lines[line]]);
        out[..columns].copy_from_slice(&sum[..columns]);
    }
}

/// The same additions and multiplications in the same order, eight at a time: the same bits.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{STRIP, Strip};

    /// Some columns of a row, in registers.
    type Row<const N: usize> = [__m256; N];

    /// # Safety
    /// `from` has `8 · N` floats.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load<const N: usize>(from: *const f32) -> Row<N> {
        // SAFETY: as the caller says.
        std::array::from_fn(|i| unsafe { _mm256_loadu_ps(from.add(8 * i)) })
    }

    /// # Safety
    /// `out` has `8 · N` floats.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store<const N: usize>(row: Row<N>, out: *mut f32) {
        for (i, x) in row.into_iter().enumerate() {
            // SAFETY: as the caller says.
            unsafe { _mm256_storeu_ps(out.add(8 * i), x) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn times<const N: usize>(row: Row<N>, tap: __m256) -> Row<N> {
        row.map(|x| _mm256_mul_ps(tap, x))
    }

    /// `sum + tap · (before + after)`
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add<const N: usize>(sum: Row<N>, tap: __m256, before: Row<N>, after: Row<N>) -> Row<N> {
        std::array::from_fn(|i| _mm256_add_ps(sum[i], _mm256_mul_ps(tap, _mm256_add_ps(before[i], after[i]))))
    }

    /// As [`super::blurred`].
    #[inline]
    #[target_feature(enable = "avx2")]
    fn blurred<const N: usize>(taps: &[f32], middle: usize, at: impl Fn(usize) -> Row<N>) -> Row<N> {
        let mut sum = times(at(middle), _mm256_set1_ps(taps[0]));
        for (k, &tap) in (1..).zip(&taps[1..]) {
            sum = add(sum, _mm256_set1_ps(tap), at(middle - k), at(middle + k));
        }
        sum
    }

    /// As [`super::across`].
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn across(from: &[f32], taps: &[f32], out: &mut [f32; STRIP]) {
        let radius = taps.len() - 1;
        assert!(from.len() >= STRIP + 2 * radius);
        // SAFETY: a strip that begins at most 2 · radius floats into `from`.
        let at = |start: usize| unsafe { load::<{ STRIP / 8 }>(from.as_ptr().add(start)) };
        // SAFETY: a strip.
        unsafe { store(blurred(taps, radius, at), out.as_mut_ptr()) };
    }

    /// As [`super::down`].
    ///
    /// # Safety
    /// `strip.lines` are places in `strip.rows`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn down(strip: Strip<'_>, out: &mut [f32], stride: usize, columns: usize) {
        let Strip { rows: strip, lines, taps } = strip;
        let radius = taps.len() - 1;
        let rows = lines.len() - 2 * radius;
        // Half a strip at a time, so that two rows of it and what they look at are in registers.
        const HALF: usize = STRIP / 2;
        for left in [0, HALF].into_iter().filter(|&left| left < columns) {
            // SAFETY: `line` is less than the number of lines, by the loops below; what it names is in the strip.
            let at = |line: usize| unsafe {
                load::<{ HALF / 8 }>(strip.get_unchecked(*lines.get_unchecked(line)).as_ptr().add(left))
            };
            let columns = HALF.min(columns - left);
            let mut put = |row: usize, sum: Row<{ HALF / 8 }>| {
                let out = &mut out[row * stride + left..][..columns];
                let mut whole = [0.0; HALF];
                let to = if columns == HALF { out.as_mut_ptr() } else { whole.as_mut_ptr() };
                // SAFETY: half a strip.
                unsafe { store(sum, to) };
                if columns < HALF {
                    out.copy_from_slice(&whole[..columns]);
                }
            };
            // Two rows together: what one of them looks at is what the other one looks at a tap later.
            for row in (0..rows - rows % 2).step_by(2) {
                let middle = row + radius;
                let (mut above, mut below) = (at(middle), at(middle + 1));
                let tap = _mm256_set1_ps(taps[0]);
                let (mut upper, mut lower) = (times(above, tap), times(below, tap));
                for (k, &tap) in (1..).zip(&taps[1..]) {
                    let tap = _mm256_set1_ps(tap);
                    let (higher, deeper) = (at(middle - k), at(middle + 1 + k));
                    upper = add(upper, tap, higher, below);
                    lower = add(lower, tap, above, deeper);
                    (above, below) = (higher, deeper);
                }
                put(row, upper);
                put(row + 1, lower);
            }
            if rows % 2 == 1 {
                put(rows - 1, blurred(taps, rows - 1 + radius, at));
            }
        }
    }
}
