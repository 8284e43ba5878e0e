//! The views: crop, flip, colour jitter, grayscale, blur, solarize, normalise. Two views are drawn from an image.
//!
//! Two definitions, chosen by `views.definition`; they differ in more than their numbers:
//!
//! | step | [`Definition::Byol`] | [`Definition::Torchvision`] |
//! |---|---|---|
//! | crop | area and log-ratio drawn once, sides clipped to the image | ten tries, then a centre crop |
//! | brightness | `x + delta` | `x · factor` |
//! | contrast | about each channel's mean | about the mean of the gray image |
//! | saturation | S of HSV times a factor | blend with the gray image |
//! | hue | rotation of H | rotation of H |
//! | grayscale | .2989 .5870 .1140 | .299 .587 .114 |
//! | blur | 2·int(size/20)+1 taps, zero padding | Gaussian to 4 sigma, edges repeated |
//! | order | flip, jitter, gray, blur, solarize | jitter, gray, blur, solarize, flip |
//!
//! Sources. Byol: `byol/utils/augmentations.py` and `byol/utils/dataset.py` of google-deepmind/deepmind-research,
//! and arXiv:2006.07733, appendix B. Torchvision: `RandomResizedCrop` and `ColorJitter` of torchvision 0.26,
//! `main_simsiam.py` and `simsiam/loader.py` of facebookresearch/simsiam, and arXiv:2011.10566, section 3.
//!
//! Where this differs from those, on purpose:
//! - Resizing is antialiased (as PIL does it) under both definitions; TensorFlow's `tf.image.resize` does not
//!   antialias. The two agree whenever a crop is enlarged. Its result has 8 bits a channel; all else is f32.
//! - torchvision on PIL images rounds to 8 bits after every operation, and PIL's `GaussianBlur` is three box blurs;
//!   here colours stay f32 and the blur is the Gaussian those boxes stand for.
//! - Flipping is done while the resized image is widened to f32, not at its place in the order: it commutes with
//!   every step above.
//!
//! Draws ([`ViewDraw`]) are separate from what is done with them ([`Augmenter::apply`]): the first is a pure
//! function of the image's size and the key, and every quantity has a slot of its own, so that a changed
//! probability of one step leaves the draws of the others alone.

use mentee_config::recipe::{Definition, Interpolation, Views};

pub use crate::decode::CropBox;
use crate::decode::{PlanarImage, RgbImage};
use crate::math;
use crate::resize::{Area, Resizer};
use crate::rng::Stream;

/// What keys the randomness of one view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewKey {
    /// `run.seed`.
    pub seed: u64,
    /// The epoch.
    pub epoch: u64,
    /// The sample's index in its source.
    pub sample: u64,
    /// 0 or 1.
    pub view: u8,
}

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

/// Everything random about one view, decided.
#[derive(Debug, Clone, PartialEq)]
pub struct ViewDraw {
    /// Which part of the image is resized to the view.
    pub crop: CropBox,
    /// Mirrored left to right.
    pub flip: bool,
    /// Colour operations in the order they are applied; empty when this view is not jittered.
    pub jitter: Vec<ColourOp>,
    /// Reduced to gray.
    pub grayscale: bool,
    /// Standard deviation of the blur, pixels of the view.
    pub blur: Option<f64>,
    /// Values of 0.5 and above inverted.
    pub solarize: bool,
}

/// Slots of the draws within a view's [`Stream`]. Fixed: changing one changes every run.
mod slot {
    pub const FLIP: u32 = 0;
    pub const JITTER: u32 = 1;
    pub const ORDER: u32 = 2; // and the two after it
    pub const BRIGHTNESS: u32 = 5;
    pub const CONTRAST: u32 = 6;
    pub const SATURATION: u32 = 7;
    pub const HUE: u32 = 8;
    pub const GRAYSCALE: u32 = 9;
    pub const BLUR: u32 = 10;
    pub const SIGMA: u32 = 11;
    pub const SOLARIZE: u32 = 12;
    /// Four for each try: area, ratio, column, row.
    pub const CROP: u32 = 16;
}

/// torchvision's `RandomResizedCrop` gives up after so many tries.
const CROP_TRIES: u32 = 10;

/// A blur tap lighter than this fraction of the middle one is below what f32 can add to it.
const NEGLIGIBLE_TAP: f64 = 1e-8;

/// Work memory of one thread, reused from image to image.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: Resizer,
    /// A part that was given interleaved.
    part: PlanarImage,
    /// `[3, H, W]`, in [0, 1].
    planes: Vec<f32>,
    /// `[H + 2 · radius, W]`, one plane between the two passes of a blur.
    plane: Vec<f32>,
    /// One row and its padding.
    row: Vec<f32>,
}

/// Draws and makes views as a recipe's `[views]` says.
#[derive(Debug, Clone)]
pub struct Augmenter {
    views: Views,
    size: usize,
    log_ratio: [f64; 2],
    normalise: Normalise,
}

impl Augmenter {
    /// An augmenter for these settings.
    #[must_use]
    pub fn new(views: &Views) -> Self {
        Self {
            size: views.size as usize,
            log_ratio: views.crop_ratio.map(math::ln),
            normalise: Normalise::new(views),
            views: views.clone(),
        }
    }

    /// Floats in a view: size · size · 3.
    #[must_use]
    pub fn view_len(&self) -> usize {
        self.size * self.size * 3
    }

    /// Makes view `key.view` of `image`: `[H, W, 3]` normalised floats into `out`.
    ///
    /// # Panics
    /// If `out` is not [`Self::view_len`] long or `image` has no pixels (decoding never yields one).
    pub fn view(&self, scratch: &mut Scratch, image: &RgbImage, key: ViewKey, out: &mut [f32]) {
        let draw = self.draw(image.width, image.height, key);
        self.apply(scratch, image, &draw, out);
    }

    /// Decides everything random about a view of an image of `width` x `height` pixels.
    #[must_use]
    pub fn draw(&self, width: u32, height: u32, key: ViewKey) -> ViewDraw {
        let v = &self.views;
        let view = usize::from(key.view).min(1);
        let draws = Stream::new(key.seed, key.epoch, key.sample, key.view);
        let crop = match v.definition {
            Definition::Byol => self.crop_byol(width, height, &draws),
            Definition::Torchvision => self.crop_torchvision(width, height, &draws),
        };
        let jitter = if draws.chance(slot::JITTER, v.jitter) { self.jitter(&draws) } else { Vec::new() };
        let [low, high] = v.blur_sigma;
        ViewDraw {
            crop,
            flip: draws.chance(slot::FLIP, v.flip),
            jitter,
            grayscale: draws.chance(slot::GRAYSCALE, v.grayscale),
            blur: draws.chance(slot::BLUR, v.blur[view]).then(|| draws.between(slot::SIGMA, low, high)),
            solarize: draws.chance(slot::SOLARIZE, v.solarize[view]),
        }
    }

    /// `_decode_and_random_crop` of DeepMind's `dataset.py`: no retries; a side longer than the image is cut.
    fn crop_byol(&self, width: u32, height: u32, draws: &Stream) -> CropBox {
        let (w, h) = self.drawn_sides(width, height, draws, 0);
        let w = (w.min(f64::from(width)) as u32).max(1);
        let h = (h.min(f64::from(height)) as u32).max(1);
        Self::place(width, height, w, h, draws, 0)
    }

    /// `RandomResizedCrop.get_params` of torchvision.
    fn crop_torchvision(&self, width: u32, height: u32, draws: &Stream) -> CropBox {
        for attempt in 0..CROP_TRIES {
            let (w, h) = self.drawn_sides(width, height, draws, attempt);
            if w >= 1.0 && h >= 1.0 && w <= f64::from(width) && h <= f64::from(height) {
                return Self::place(width, height, w as u32, h as u32, draws, attempt);
            }
        }
        let [low, high] = self.views.crop_ratio;
        let ratio = f64::from(width) / f64::from(height);
        let (w, h) = if ratio < low {
            (width, (f64::from(width) / low).round_ties_even() as u32)
        } else if ratio > high {
            ((f64::from(height) * high).round_ties_even() as u32, height)
        } else {
            (width, height)
        };
        let (w, h) = (w.clamp(1, width), h.clamp(1, height));
        CropBox { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h }
    }

    /// Width and height of one drawn crop, rounded half to even as both Python and TensorFlow do.
    fn drawn_sides(&self, width: u32, height: u32, draws: &Stream, attempt: u32) -> (f64, f64) {
        let [smallest, largest] = self.views.crop_area;
        let first = slot::CROP + 4 * attempt;
        let area = f64::from(width) * f64::from(height) * draws.between(first, smallest, largest);
        let ratio = math::exp(draws.between(first + 1, self.log_ratio[0], self.log_ratio[1]));
        ((area * ratio).sqrt().round_ties_even(), (area / ratio).sqrt().round_ties_even())
    }

    fn place(width: u32, height: u32, w: u32, h: u32, draws: &Stream, attempt: u32) -> CropBox {
        let first = slot::CROP + 4 * attempt;
        let x = draws.below(first + 2, u64::from(width - w) + 1) as u32;
        let y = draws.below(first + 3, u64::from(height - h) + 1) as u32;
        CropBox { x, y, width: w, height: h }
    }

    fn jitter(&self, draws: &Stream) -> Vec<ColourOp> {
        let v = &self.views;
        let mut order = [0, 1, 2, 3];
        for i in 0..3 {
            order.swap(i, i + draws.below(slot::ORDER + i as u32, 4 - i as u64) as usize);
        }
        let about = |slot, centre: f64, reach: f64, least: f64| {
            draws.between(slot, (centre - reach).max(least), centre + reach) as f32
        };
        order
            .into_iter()
            .filter_map(|op| match op {
                0 if v.brightness > 0.0 => Some(ColourOp::Brightness(match v.definition {
                    Definition::Byol => about(slot::BRIGHTNESS, 0.0, v.brightness, f64::NEG_INFINITY),
                    Definition::Torchvision => about(slot::BRIGHTNESS, 1.0, v.brightness, 0.0),
                })),
                1 if v.contrast > 0.0 => {
                    Some(ColourOp::Contrast(about(slot::CONTRAST, 1.0, v.contrast, 0.0)))
                }
                2 if v.saturation > 0.0 => {
                    Some(ColourOp::Saturation(about(slot::SATURATION, 1.0, v.saturation, 0.0)))
                }
                3 if v.hue > 0.0 => Some(ColourOp::Hue(about(slot::HUE, 0.0, v.hue, f64::NEG_INFINITY))),
                _ => None,
            })
            .collect()
    }

    /// Makes the view that `draw` describes: `[H, W, 3]` normalised floats into `out`.
    ///
    /// # Panics
    /// If `out` is not [`Self::view_len`] long, or `draw.crop` is not within `image`.
    pub fn apply(&self, scratch: &mut Scratch, image: &RgbImage, draw: &ViewDraw, out: &mut [f32]) {
        let mut planes = std::mem::take(&mut scratch.part);
        planes.take(image, draw.crop);
        self.apply_part(scratch, &planes, draw, out);
        scratch.part = planes;
    }

    /// As [`Self::apply`], from the part of the image that is at hand.
    ///
    /// # Panics
    /// If `out` is not [`Self::view_len`] long, or `draw.crop` is not within `image.part`.
    pub fn apply_part(&self, scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw, out: &mut [f32]) {
        assert_eq!(out.len(), self.view_len(), "a view is [H, W, 3]");
        assert!(image.part.contains(draw.crop), "a crop lies within what was decoded");
        resize(scratch, image, draw, self.views.resize, self.size);
        colour_and_write(self, scratch, draw, out);
    }
}

impl Augmenter {
    /// The resize alone, for the bench.
    pub(crate) fn resize_part(&self, scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw) {
        resize(scratch, image, draw, self.views.resize, self.size);
    }
}

/// The drawn crop at the view's size into `scratch.planes`.
fn resize(scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw, how: Interpolation, size: usize) {
    let CropBox { width, height, .. } = draw.crop;
    scratch.planes.resize(3 * size * size, 0.0);
    let area = Area::from(CropBox::whole(width, height));
    scratch.resizer.resize(image, draw.crop, area, how, draw.flip, &mut scratch.planes, size);
}

/// (x − mean) / std per channel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalise {
    mean: [f32; 3],
    inverse_std: [f32; 3],
}

impl Normalise {
    pub(crate) fn new(views: &Views) -> Self {
        Self { mean: views.mean.map(|m| m as f32), inverse_std: views.std.map(|s| (1.0 / s) as f32) }
    }

    #[inline(always)]
    pub(crate) fn of(&self, channel: usize, x: f32) -> f32 {
        (x - self.mean[channel]) * self.inverse_std[channel]
    }
}

/// Everything after the resize. With AVX2 where there is one: the same operations in the same order on wider
/// registers (no fused multiply-add), so the same bits.
fn colour_and_write(augmenter: &Augmenter, scratch: &mut Scratch, draw: &ViewDraw, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2(augmenter: &Augmenter, scratch: &mut Scratch, draw: &ViewDraw, out: &mut [f32]) {
            colour_and_write_on(augmenter, scratch, draw, out);
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, the only thing `with_avx2` asks for.
            return unsafe { with_avx2(augmenter, scratch, draw, out) };
        }
    }
    colour_and_write_on(augmenter, scratch, draw, out);
}

#[inline(always)]
fn colour_and_write_on(augmenter: &Augmenter, scratch: &mut Scratch, draw: &ViewDraw, out: &mut [f32]) {
    let size = augmenter.size;
    let mut planes = Planes::of(&mut scratch.planes, size * size);
    let definition = augmenter.views.definition;
    for &op in &draw.jitter {
        match (op, definition) {
            (ColourOp::Brightness(delta), Definition::Byol) => planes.each(|x| clip(x + delta)),
            (ColourOp::Brightness(factor), Definition::Torchvision) => planes.each(|x| clip(x * factor)),
            (ColourOp::Contrast(factor), Definition::Byol) => planes.contrast_byol(factor),
            (ColourOp::Contrast(factor), Definition::Torchvision) => planes.contrast_torchvision(factor),
            (ColourOp::Saturation(factor), Definition::Byol) => planes.saturation_byol(factor),
            (ColourOp::Saturation(factor), Definition::Torchvision) => planes.saturation_torchvision(factor),
            (ColourOp::Hue(turns), _) => planes.hue(turns),
        }
    }
    if draw.grayscale {
        planes.grayscale(match definition {
            Definition::Byol => GRAY_TENSOR,
            Definition::Torchvision => GRAY_PIL,
        });
    }
    if let Some(sigma) = draw.blur {
        let (taps, edge) = match definition {
            Definition::Byol => (gaussian_taps(sigma, size / 20), Edge::Zero),
            Definition::Torchvision => (gaussian_taps(sigma, (4.0 * sigma).ceil() as usize), Edge::Repeat),
        };
        if taps.len() > 1 {
            for plane in [&mut *planes.r, &mut *planes.g, &mut *planes.b] {
                blur(plane, size, &taps, edge, &mut scratch.plane, &mut scratch.row);
            }
        }
    }
    write(&planes, draw.solarize, augmenter.normalise, out);
}

/// Weights of red, green and blue in gray: JAX and torchvision tensors; PIL (ITU-R 601-2).
const GRAY_TENSOR: [f32; 3] = [0.2989, 0.5870, 0.1140];
const GRAY_PIL: [f32; 3] = [0.299, 0.587, 0.114];

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn clip(x: f32) -> f32 {
    max(min(x, 1.0), 0.0)
}

/// Floats that are worked on together, in registers.
const WIDE: usize = 32;

#[inline(always)]
fn block(from: &[f32], start: usize) -> [f32; WIDE] {
    let mut block = [0.0; WIDE];
    block.copy_from_slice(&from[start..start + WIDE]);
    block
}

/// The three channels of a view being made, each `[H, W]`.
struct Planes<'a> {
    r: &'a mut [f32],
    g: &'a mut [f32],
    b: &'a mut [f32],
}

impl<'a> Planes<'a> {
    #[inline(always)]
    fn of(planes: &'a mut [f32], len: usize) -> Self {
        let (r, rest) = planes.split_at_mut(len);
        let (g, b) = rest.split_at_mut(len);
        Self { r, g, b }
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
    fn contrast_byol(&mut self, factor: f32) {
        for plane in [&mut *self.r, &mut *self.g, &mut *self.b] {
            let mean = mean(plane);
            plane.iter_mut().for_each(|x| *x = clip(factor * (*x - mean) + mean));
        }
    }

    #[inline(always)]
    fn contrast_torchvision(&mut self, factor: f32) {
        let [wr, wg, wb] = GRAY_PIL;
        // The mean is linear: the gray image's mean is the gray of the means.
        let mean = wr * mean(self.r) + wg * mean(self.g) + wb * mean(self.b);
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
            (clip(v - (v - r) * ratio), clip(v - (v - g) * ratio), clip(v - (v - b) * ratio))
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
                clip(v - range * clip(min(k, 4.0 - k)))
            };
            (channel(5.0), channel(3.0), channel(1.0))
        });
    }

    #[inline(always)]
    fn grayscale(&mut self, weights: [f32; 3]) {
        self.each_pixel(|r, g, b| {
            let gray = clip(weights[0] * r + weights[1] * g + weights[2] * b);
            (gray, gray, gray)
        });
    }
}

/// Mean of a plane: sixteen running sums (so that the order of additions is fixed at any register width), emptied
/// into f64 often enough to lose nothing.
#[inline(always)]
fn mean(plane: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut total = 0.0f64;
    for block in plane.chunks(64 * LANES) {
        let mut sums = [0.0f32; LANES];
        let lanes = block.chunks_exact(LANES);
        let rest: f64 = lanes.remainder().iter().map(|&x| f64::from(x)).sum();
        for lane in lanes {
            for (sum, x) in sums.iter_mut().zip(lane) {
                *sum += x;
            }
        }
        total += rest + sums.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    (total / plane.len() as f64) as f32
}

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
fn gaussian_taps(sigma: f64, radius: usize) -> Vec<f32> {
    let weights: Vec<f64> = (0..=radius)
        .map(|k| math::exp(-((k * k) as f64) / (2.0 * sigma * sigma)))
        .take_while(|&w| w > NEGLIGIBLE_TAP)
        .collect();
    let sum = weights[0] + 2.0 * weights[1..].iter().sum::<f64>();
    weights.iter().map(|w| (w / sum) as f32).collect()
}

/// Separable blur of a `[size, size]` plane: rows, then columns. Taps that meet nothing beyond the border add a zero.
#[inline(always)]
fn blur(
    plane: &mut [f32],
    size: usize,
    taps: &[f32],
    edge: Edge,
    between: &mut Vec<f32>,
    row: &mut Vec<f32>,
) {
    let radius = taps.len() - 1;
    // Rows are stored `radius` lower, so that the rows beyond the border have a place.
    between.resize((size + 2 * radius) * size, 0.0);
    row.resize(size + 2 * radius, 0.0);
    for (line, out) in plane.chunks_exact(size).zip(between[radius * size..].chunks_exact_mut(size)) {
        let (left, right) = match edge {
            Edge::Zero => (0.0, 0.0),
            Edge::Repeat => (line[0], line[size - 1]),
        };
        row[..radius].fill(left);
        row[radius..radius + size].copy_from_slice(line);
        row[radius + size..radius + size + radius].fill(right);
        symmetric_sum(row, 1, radius, taps, out);
    }
    let (top, bottom) = (radius * size, (radius + size) * size);
    match edge {
        Edge::Zero => {
            between[..top].fill(0.0);
            between[bottom..bottom + top].fill(0.0);
        }
        Edge::Repeat => {
            for k in 0..radius {
                between.copy_within(top..top + size, k * size);
                between.copy_within(bottom - size..bottom, bottom + k * size);
            }
        }
    }
    for (y, out) in plane.chunks_exact_mut(size).enumerate() {
        symmetric_sum(between, size, (y + radius) * size, taps, out);
    }
}

/// `out[i] = Σ_k taps[|k|] · from[middle + i + k · stride]`, the middle first and then outwards.
#[inline(always)]
fn symmetric_sum(from: &[f32], stride: usize, middle: usize, taps: &[f32], out: &mut [f32]) {
    let mut blocks = out.chunks_exact_mut(WIDE);
    let mut start = middle;
    for out in &mut blocks {
        let mut sum = block(from, start);
        sum.iter_mut().for_each(|x| *x *= taps[0]);
        for (k, &tap) in (1..).zip(&taps[1..]) {
            let (before, after) = (block(from, start - k * stride), block(from, start + k * stride));
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
            *out += tap * (from[at - k * stride] + from[at + k * stride]);
        }
    }
}

/// `[3, H, W]` to normalised `[H, W, 3]`, solarized if asked (`where(x < 0.5, x, 1 − x)`), clipped.
#[inline(always)]
fn write(planes: &Planes<'_>, solarize: bool, normalise: Normalise, out: &mut [f32]) {
    // A threshold that no value reaches when it is off, rather than a branch for every value.
    let threshold = if solarize { 0.5 } else { f32::INFINITY };
    let value = |channel: usize, x: f32| {
        let x = if x >= threshold { 1.0 - x } else { x };
        normalise.of(channel, clip(x))
    };
    let whole = planes.r.len() / WIDE * WIDE;
    for (start, out) in (0..whole).step_by(WIDE).zip(out.chunks_exact_mut(3 * WIDE)) {
        let (mut r, mut g, mut b) = (block(planes.r, start), block(planes.g, start), block(planes.b, start));
        for i in 0..WIDE {
            (r[i], g[i], b[i]) = (value(0, r[i]), value(1, g[i]), value(2, b[i]));
        }
        for i in 0..WIDE {
            (out[3 * i], out[3 * i + 1], out[3 * i + 2]) = (r[i], g[i], b[i]);
        }
    }
    for (i, out) in (whole..planes.r.len()).zip(out[3 * whole..].chunks_exact_mut(3)) {
        for (channel, plane) in [&*planes.r, &*planes.g, &*planes.b].into_iter().enumerate() {
            out[channel] = value(channel, plane[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wider registers change no bit, so machines with and without AVX2 train on the same views.
    #[test]
    fn register_width_changes_nothing() {
        let views = Views {
            preset: mentee_config::recipe::ViewPreset::Byol,
            definition: Definition::Byol,
            size: 37,
            resize: Interpolation::Bicubic,
            crop_area: [0.08, 1.0],
            crop_ratio: [0.75, 4.0 / 3.0],
            flip: 0.5,
            jitter: 0.9,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.4,
            hue: 0.2,
            grayscale: 0.2,
            blur: [0.5, 0.5],
            blur_sigma: [0.1, 2.0],
            solarize: [0.3, 0.3],
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        };
        let data: Vec<u8> = (0..50)
            .flat_map(|block| Stream::new(1, 0, 0, 0).block(block))
            .flat_map(u32::to_le_bytes)
            .collect();
        let image = RgbImage { width: 16, height: 16, data: data[..16 * 16 * 3].to_vec() };
        for definition in [Definition::Byol, Definition::Torchvision] {
            let augmenter = Augmenter::new(&Views { definition, ..views.clone() });
            let (mut scratch, mut wide, mut narrow) =
                (Scratch::default(), vec![0.0; augmenter.view_len()], vec![0.0; augmenter.view_len()]);
            for sample in 0..200 {
                let draw = augmenter.draw(16, 16, ViewKey { seed: 0, epoch: 0, sample, view: 0 });
                let mut part = PlanarImage::default();
                part.take(&image, draw.crop);
                resize(&mut scratch, &part, &draw, Interpolation::Bicubic, augmenter.size);
                colour_and_write(&augmenter, &mut scratch, &draw, &mut wide);
                resize(&mut scratch, &part, &draw, Interpolation::Bicubic, augmenter.size);
                colour_and_write_on(&augmenter, &mut scratch, &draw, &mut narrow);
                assert!(
                    wide.iter().zip(&narrow).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{definition:?} {draw:?}"
                );
            }
        }
    }
}
