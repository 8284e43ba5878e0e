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

use std::ops::Range;

use mentee_config::recipe::{Definition, Views};

use crate::blur::Blur;
pub use crate::colour::ColourOp;
use crate::colour::{Mean, Planes, clip};
pub use crate::decode::CropBox;
use crate::decode::{PlanarImage, RgbImage};
use crate::math;
use crate::resize::{Area, Filter, Resizer, TILE};
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

/// Work memory of one thread, reused from image to image.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: Resizer,
    /// A part that was given interleaved.
    part: PlanarImage,
    /// `[3, H, W]`, in [0, 1].
    planes: Vec<f32>,
    blur: Blur,
    /// `[3, TILE, W]`, rows that have been blurred.
    blurred: Vec<f32>,
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
        self.begin(scratch, image, draw);
        make(self, scratch, image, draw, out);
    }

    /// The resize alone, for the bench.
    pub(crate) fn resize_part(&self, scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw) {
        self.begin(scratch, image, draw);
        for top in (0..self.size).step_by(TILE) {
            let rows = TILE.min(self.size - top);
            scratch.resizer.rows(image, draw.crop, top, rows, self.size, &mut scratch.planes);
        }
    }

    fn begin(&self, scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw) {
        scratch.planes.resize(3 * self.size * self.size, 0.0);
        let area = area_of(draw.crop);
        scratch.resizer.begin(image, draw.crop, area, self.views.resize, draw.flip, self.size);
    }

    /// The weights by which a crop is resized: first down, then across.
    pub(crate) fn filters<'a>(&self, resizer: &'a mut Resizer, draw: &ViewDraw) -> [&'a Filter; 2] {
        resizer.weigh(draw.crop, area_of(draw.crop), self.views.resize, draw.flip, self.size)
    }

    /// The settings.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }
}

/// All of a crop, from its own corner.
fn area_of(crop: CropBox) -> Area {
    Area::from(CropBox::whole(crop.width, crop.height))
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

/// Mean and 1/std of the channels, as views are normalised by them.
#[must_use]
pub fn normalisation(views: &Views) -> [[f32; 3]; 2] {
    let Normalise { mean, inverse_std } = Normalise::new(views);
    [mean, inverse_std]
}

/// All of a view, a few rows at a time, so that they are worked on in the nearest caches: resized, coloured, blurred and
/// written. Contrast alone needs the whole view before it goes on. With AVX2 where there is one: the same operations in
/// the same order on wider registers (no fused multiply-add), so the same bits.
fn make(augmenter: &Augmenter, scratch: &mut Scratch, image: &PlanarImage, draw: &ViewDraw, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(
            augmenter: &Augmenter,
            scratch: &mut Scratch,
            image: &PlanarImage,
            draw: &ViewDraw,
            out: &mut [f32],
        ) {
            make_on::<true>(augmenter, scratch, image, draw, out);
        }
        if crate::cpu::has_avx2() {
            // SAFETY: the processor has AVX2, the only thing `wide` asks for.
            return unsafe { wide(augmenter, scratch, image, draw, out) };
        }
    }
    make_on::<false>(augmenter, scratch, image, draw, out);
}

#[inline(always)]
fn make_on<const WIDE: bool>(
    augmenter: &Augmenter,
    scratch: &mut Scratch,
    image: &PlanarImage,
    draw: &ViewDraw,
    out: &mut [f32],
) {
    let (size, definition) = (augmenter.size, augmenter.views.definition);
    let contrast = draw.jitter.iter().position(|op| matches!(op, ColourOp::Contrast(_)));
    let (before, after) = draw.jitter.split_at(contrast.unwrap_or(draw.jitter.len()));
    let Scratch { resizer, planes, blur, blurred, .. } = scratch;
    blurred.resize(3 * TILE * size, 0.0);
    let blurs = draw.blur.is_some_and(|sigma| blur.begin(definition, sigma, size, TILE));
    let mut finish = Finish { augmenter, draw, blur: blurs.then_some(blur), blurred, out };
    let tiles = (0..size).step_by(TILE).map(|top| top..(top + TILE).min(size));
    let mut means = [Mean::default(); 3];
    for rows in tiles.clone() {
        resizer.rows(image, draw.crop, rows.start, rows.len(), size, planes);
        let range = rows.start * size..rows.end * size;
        let mut part = Planes::of(planes, range.clone());
        before.iter().for_each(|&op| part.jitter(op, definition, [0.0; 3]));
        if contrast.is_none() {
            finish.rows::<WIDE>(rows, part);
        } else {
            means.iter_mut().zip(planes.chunks_exact(size * size)).for_each(|(m, p)| m.advance(p, range.end));
        }
    }
    if contrast.is_some() {
        let means = means.map(|mean| mean.get());
        for rows in tiles {
            let mut part = Planes::of(planes, rows.start * size..rows.end * size);
            after.iter().for_each(|&op| part.jitter(op, definition, means));
            finish.rows::<WIDE>(rows, part);
        }
    }
}

/// What comes after the jitter: gray, blur, and the rows to their place.
struct Finish<'a> {
    augmenter: &'a Augmenter,
    draw: &'a ViewDraw,
    /// When the view is blurred.
    blur: Option<&'a mut Blur>,
    /// `[3, TILE, W]`
    blurred: &'a mut [f32],
    out: &'a mut [f32],
}

impl Finish<'_> {
    /// Takes the next rows.
    #[inline(always)]
    fn rows<const WIDE: bool>(&mut self, rows: Range<usize>, mut planes: Planes<'_>) {
        let size = self.augmenter.size;
        let gray = self.draw.grayscale;
        if gray {
            planes.grayscale(self.augmenter.views.definition);
        }
        let lines = |i: usize| {
            let line = i * size..(i + 1) * size;
            [&planes.r[line.clone()], &planes.g[line.clone()], &planes.b[line]]
        };
        let Some(blur) = &mut self.blur else {
            for (i, y) in rows.enumerate() {
                write_row::<WIDE>(
                    lines(i),
                    self.draw.solarize,
                    self.augmenter.normalise,
                    row_of(self.out, y, size),
                );
            }
            return;
        };
        // Three equal channels are blurred as one.
        let channels = if gray { 1 } else { 3 };
        for (i, y) in rows.clone().enumerate() {
            for (channel, line) in lines(i).into_iter().enumerate().take(channels) {
                blur.take::<WIDE>(channel, y, line);
            }
        }
        // A row can be made once those that it looks at are there.
        let radius = blur.radius();
        let ready = |end: usize| if end == size { size } else { end.saturating_sub(radius) };
        let (mut top, end) = (ready(rows.start), ready(rows.end));
        while top < end {
            let rows = top..(top + TILE).min(end);
            let len = rows.len() * size;
            for (channel, lines) in self.blurred.chunks_exact_mut(TILE * size).enumerate().take(channels) {
                blur.make::<WIDE>(channel, rows.clone(), &mut lines[..len]);
            }
            for (i, y) in rows.enumerate() {
                let line = |channel: usize| &self.blurred[(channel % channels * TILE + i) * size..][..size];
                write_row::<WIDE>(
                    [line(0), line(1), line(2)],
                    self.draw.solarize,
                    self.augmenter.normalise,
                    row_of(self.out, y, size),
                );
            }
            top += TILE;
        }
    }
}

/// Row `y` of `[H, W, 3]`.
#[inline(always)]
fn row_of(out: &mut [f32], y: usize, size: usize) -> &mut [f32] {
    &mut out[3 * y * size..][..3 * size]
}

/// A row of three channels to normalised `[W, 3]`, solarized if asked (`where(x < 0.5, x, 1 − x)`), clipped.
#[inline(always)]
fn write_row<const WIDE: bool>(
    [r, g, b]: [&[f32]; 3],
    solarize: bool,
    normalise: Normalise,
    out: &mut [f32],
) {
    // A threshold that no value reaches when it is off, rather than a branch for every value.
    let threshold = if solarize { 0.5 } else { f32::INFINITY };
    #[cfg(target_arch = "x86_64")]
    let done = if WIDE {
        // SAFETY: `WIDE` is set only where AVX2 was found.
        unsafe { x86::write_row(r, g, b, threshold, normalise, out) }
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    let value = |channel: usize, x: f32| {
        let x = if x >= threshold { 1.0 - x } else { x };
        normalise.of(channel, clip(x))
    };
    for (i, out) in (done..r.len()).zip(out[3 * done..].chunks_exact_mut(3)) {
        (out[0], out[1], out[2]) = (value(0, r[i]), value(1, g[i]), value(2, b[i]));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Normalise;

    /// As [`super::write_row`] for as many pixels as fill registers; returns how many.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn write_row(
        r: &[f32],
        g: &[f32],
        b: &[f32],
        threshold: f32,
        normalise: Normalise,
        out: &mut [f32],
    ) -> usize {
        let (zero, one) = (_mm256_setzero_ps(), _mm256_set1_ps(1.0));
        let threshold = _mm256_set1_ps(threshold);
        let whole = r.len() / 8;
        let lines = r.chunks_exact(8).zip(g.chunks_exact(8)).zip(b.chunks_exact(8));
        for (((r, g), b), out) in lines.zip(out.chunks_exact_mut(24)) {
            let value = |channel: usize, from: &[f32]| {
                // SAFETY: eight floats.
                let x = unsafe { _mm256_loadu_ps(from.as_ptr()) };
                let bright = _mm256_cmp_ps::<_CMP_GE_OQ>(x, threshold);
                let x = _mm256_blendv_ps(x, _mm256_sub_ps(one, x), bright);
                // The second operand wins when one is no number: as `clip` has it.
                let x = _mm256_max_ps(_mm256_min_ps(x, one), zero);
                let centred = _mm256_sub_ps(x, _mm256_set1_ps(normalise.mean[channel]));
                _mm256_mul_ps(centred, _mm256_set1_ps(normalise.inverse_std[channel]))
            };
            let (x, y, z) = (value(0, r), value(1, g), value(2, b));
            // Within each half: x0 y0 z0 x1 | y1 z1 x2 y2 | z2 x3 y3 z3.
            let xy = _mm256_shuffle_ps::<0b10_00_10_00>(x, y);
            let yz = _mm256_shuffle_ps::<0b11_01_11_01>(y, z);
            let zx = _mm256_shuffle_ps::<0b11_01_10_00>(z, x);
            let first = _mm256_shuffle_ps::<0b10_00_10_00>(xy, zx);
            let second = _mm256_shuffle_ps::<0b11_01_10_00>(yz, xy);
            let third = _mm256_shuffle_ps::<0b11_01_11_01>(zx, yz);
            let a = _mm256_permute2f128_ps::<0x20>(first, second);
            let b = _mm256_permute2f128_ps::<0x30>(third, first);
            let c = _mm256_permute2f128_ps::<0x31>(second, third);
            // SAFETY: 24 floats.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), a);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), b);
                _mm256_storeu_ps(out.as_mut_ptr().add(16), c);
            }
        }
        whole * 8
    }
}

#[cfg(test)]
mod tests {
    use mentee_config::recipe::Interpolation;

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
                augmenter.begin(&mut scratch, &part, &draw);
                make(&augmenter, &mut scratch, &part, &draw, &mut wide);
                make_on::<false>(&augmenter, &mut scratch, &part, &draw, &mut narrow);
                assert!(
                    wide.iter().zip(&narrow).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{definition:?} {draw:?}"
                );
            }
        }
    }
}
