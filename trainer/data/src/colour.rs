//! Colours of a view, some rows at a time: jitter and gray, by either definition (see [`crate::augment`]).
//!
//! Plain loops over blocks that a compiler turns into vector code; nothing is fused or reordered, so the results are the
//! same at any register width.

use std::ops::Range;

use mentee_config::recipe::Definition;

/// One colour operation with its drawn strength.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ColourOp {
    /// Byol: added to every channel; Torchvision: multiplied.
    Brightness(f32),
    /// Factor about the mean.
    Contrast(f32),
    /// Factor of saturation.
    Saturation(f32),
    /// Rotation of hue, in turns.
    Hue(f32),
}

/// Weights of red, green and blue in gray: JAX and torchvision tensors; PIL (ITU-R 601-2).
pub(crate) const GRAY_TENSOR: [f32; 3] = [0.2989, 0.5870, 0.1140];
pub(crate) const GRAY_PIL: [f32; 3] = [0.299, 0.587, 0.114];

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
pub(crate) fn clip(x: f32) -> f32 {
    max(min(x, 1.0), 0.0)
}

/// Floats that are worked on together, in registers.
const WIDE: usize = 16;

#[inline(always)]
fn block(from: &[f32], start: usize) -> [f32; WIDE] {
    let mut block = [0.0; WIDE];
    block.copy_from_slice(&from[start..start + WIDE]);
    block
}

/// The three channels of some rows of a view being made, each `[rows, W]`.
pub(crate) struct Planes<'a> {
    pub(crate) r: &'a mut [f32],
    pub(crate) g: &'a mut [f32],
    pub(crate) b: &'a mut [f32],
}

impl<'a> Planes<'a> {
    /// The rows at `range` (in pixels) of `[3, H, W]`.
    #[inline(always)]
    pub(crate) fn of(planes: &'a mut [f32], range: Range<usize>) -> Self {
        let len = planes.len() / 3;
        let (r, rest) = planes.split_at_mut(len);
        let (g, b) = rest.split_at_mut(len);
        Self { r: &mut r[range.clone()], g: &mut g[range.clone()], b: &mut b[range] }
    }

    /// One operation of a jitter; `means` are those of the whole channels, which contrast alone looks at.
    #[inline(always)]
    pub(crate) fn jitter(&mut self, op: ColourOp, definition: Definition, means: [f32; 3]) {
        match (op, definition) {
            (ColourOp::Brightness(delta), Definition::Byol) => self.each(|x| clip(x + delta)),
            (ColourOp::Brightness(factor), Definition::Torchvision) => self.each(|x| clip(x * factor)),
            (ColourOp::Contrast(factor), Definition::Byol) => self.contrast_byol(factor, means),
            (ColourOp::Contrast(factor), Definition::Torchvision) => self.contrast_torchvision(factor, means),
            (ColourOp::Saturation(factor), Definition::Byol) => self.saturation_byol(factor),
            (ColourOp::Saturation(factor), Definition::Torchvision) => self.saturation_torchvision(factor),
            (ColourOp::Hue(turns), _) => self.hue(turns),
        }
    }

    #[inline(always)]
    fn each(&mut self, f: impl Fn(f32) -> f32) {
        for plane in [&mut *self.r, &mut *self.g, &mut *self.b] {
            plane.iter_mut().for_each(|x| *x = f(*x));
        }
    }

    /// Blocks of pixels are taken out, changed and put back: the three planes cannot be seen to be apart otherwise,
    /// and nothing would be vectorised.
    #[inline(always)]
    fn each_pixel(&mut self, f: impl Fn(f32, f32, f32) -> (f32, f32, f32)) {
        let (mut r, mut g, mut b) =
            (self.r.chunks_exact_mut(WIDE), self.g.chunks_exact_mut(WIDE), self.b.chunks_exact_mut(WIDE));
        for ((r, g), b) in r.by_ref().zip(g.by_ref()).zip(b.by_ref()) {
            let (mut x, mut y, mut z) = (block(r, 0), block(g, 0), block(b, 0));
            for i in 0..WIDE {
                (x[i], y[i], z[i]) = f(x[i], y[i], z[i]);
            }
            r.copy_from_slice(&x);
            g.copy_from_slice(&y);
            b.copy_from_slice(&z);
        }
        for ((r, g), b) in r.into_remainder().iter_mut().zip(g.into_remainder()).zip(b.into_remainder()) {
            (*r, *g, *b) = f(*r, *g, *b);
        }
    }

    #[inline(always)]
    fn contrast_byol(&mut self, factor: f32, means: [f32; 3]) {
        for (plane, mean) in [&mut *self.r, &mut *self.g, &mut *self.b].into_iter().zip(means) {
            plane.iter_mut().for_each(|x| *x = clip(factor * (*x - mean) + mean));
        }
    }

    #[inline(always)]
    fn contrast_torchvision(&mut self, factor: f32, means: [f32; 3]) {
        let [wr, wg, wb] = GRAY_PIL;
        // The mean is linear: the gray image's mean is the gray of the means.
        let mean = wr * means[0] + wg * means[1] + wb * means[2];
        self.each(|x| clip(factor * x + (1.0 - factor) * mean));
    }

    /// HSV with S' = clip(S · factor), H and V kept. In RGB every channel is V − (V − x) with V − x proportional to
    /// S, so the conversion there and back is the one factor S'/S = min(factor, 1/S).
    #[inline(always)]
    fn saturation_byol(&mut self, factor: f32) {
        self.each_pixel(|r, g, b| {
            let v = max(max(r, g), b);
            let range = v - min(min(r, g), b);
            let ratio = if range > 0.0 { min(factor, v / range) } else { 0.0 };
            // Never above V, but rounding may take it below 0.
            (max(v - (v - r) * ratio, 0.0), max(v - (v - g) * ratio, 0.0), max(v - (v - b) * ratio, 0.0))
        });
    }

    #[inline(always)]
    fn saturation_torchvision(&mut self, factor: f32) {
        let [wr, wg, wb] = GRAY_PIL;
        self.each_pixel(|r, g, b| {
            let gray = (1.0 - factor) * (wr * r + wg * g + wb * b);
            (clip(factor * r + gray), clip(factor * g + gray), clip(factor * b + gray))
        });
    }

    /// H' = H + turns (mod 1) in HSV.
    #[inline(always)]
    fn hue(&mut self, turns: f32) {
        self.each_pixel(|r, g, b| {
            let v = max(max(r, g), b);
            let range = v - min(min(r, g), b);
            let inverse = if range > 0.0 { 1.0 / range } else { 0.0 };
            // Hue in sixths of a turn.
            let on_r = (g - b) * inverse;
            let on_g = (b - r) * inverse + 2.0;
            let on_b = (r - g) * inverse + 4.0;
            let h = if r == v {
                on_r
            } else if g == v {
                on_g
            } else {
                on_b
            };
            let h = h + 6.0 * turns;
            // |turns| <= 0.5 and h in [−1, 5]: one correction each way brings it into [0, 6).
            let h = if h < 0.0 { h + 6.0 } else { h };
            let h = if h >= 6.0 { h - 6.0 } else { h };
            // Channel n of HSV: V − range · clip(min(k, 4 − k)), k = (n + h) mod 6, n = 5, 3, 1.
            let channel = |n: f32| {
                let k = n + h;
                let k = if k >= 6.0 { k - 6.0 } else { k };
                // Between V − range and V: no need to clip it.
                v - range * clip(min(k, 4.0 - k))
            };
            (channel(5.0), channel(3.0), channel(1.0))
        });
    }

    #[inline(always)]
    pub(crate) fn grayscale(&mut self, definition: Definition) {
        let weights = match definition {
            Definition::Byol => GRAY_TENSOR,
            Definition::Torchvision => GRAY_PIL,
        };
        self.each_pixel(|r, g, b| {
            let gray = clip(weights[0] * r + weights[1] * g + weights[2] * b);
            (gray, gray, gray)
        });
    }
}

/// Mean of a plane whose rows arrive one by one: sixteen running sums (so that the order of additions is fixed at any
/// register width and whatever the rows), emptied into f64 often enough to lose nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mean {
    total: f64,
    done: usize,
}

impl Mean {
    const LANES: usize = 16;
    const BLOCK: usize = 64 * Self::LANES;

    /// The first `until` values of `plane` are there.
    #[inline(always)]
    pub(crate) fn advance(&mut self, plane: &[f32], until: usize) {
        while self.done < until && (until - self.done >= Self::BLOCK || until == plane.len()) {
            let end = (self.done + Self::BLOCK).min(until);
            let block = &plane[self.done..end];
            let mut sums = [0.0f32; Self::LANES];
            let lanes = block.chunks_exact(Self::LANES);
            let rest: f64 = lanes.remainder().iter().map(|&x| f64::from(x)).sum();
            for lane in lanes {
                for (sum, x) in sums.iter_mut().zip(lane) {
                    *sum += x;
                }
            }
            self.total += rest + sums.iter().map(|&x| f64::from(x)).sum::<f64>();
            self.done = end;
        }
    }

    pub(crate) fn get(&self) -> f32 {
        (self.total / self.done as f64) as f32
    }
}
