//! An image as an evaluation sees it.
//!
//! The view is torchvision's standard one: the shorter side resized to `size · 256/224`, the centre `size` x `size`
//! cut out, normalised. Small views (below [`SMALL`] pixels, as for CIFAR) are resized to `size` itself, and an
//! image that is `size` x `size` already is taken as it is.

use mentee_config::recipe::{Interpolation, Views};

use crate::augment::Normalise;
use crate::decode::{CropBox, PlanarImage, RgbImage};
use crate::resize::{Area, Resizer, TILE};

/// Views below this side lose nothing to a margin: they are not resized to 256/224 first.
pub const SMALL: u32 = 64;

/// Makes evaluation views.
#[derive(Debug, Clone)]
pub struct EvalView {
    size: usize,
    interpolation: Interpolation,
    normalise: Normalise,
}

/// What the shorter side of an image is resized to before the centre `size` x `size` is cut out.
#[must_use]
pub fn shorter_side(size: u64) -> u64 {
    if size < u64::from(SMALL) { size } else { (size * 256 + 112) / 224 }
}

impl EvalView {
    /// For these settings (`size`, `resize`, `mean` and `std` count).
    #[must_use]
    pub fn new(views: &Views) -> Self {
        Self { size: views.size as usize, interpolation: views.resize, normalise: Normalise::new(views) }
    }

    /// Floats in a view: size · size · 3.
    #[must_use]
    pub fn view_len(&self) -> usize {
        self.size * self.size * 3
    }

    /// The part of a `width` x `height` image that is resized to the view: (x, y, width, height), pixels.
    #[must_use]
    pub fn crop(&self, width: u32, height: u32) -> (f64, f64, f64, f64) {
        let size = self.size as u64;
        let short = shorter_side(size);
        let (width, height) = (u64::from(width), u64::from(height));
        // torchvision: the shorter side becomes `short`, the longer int(short · long / short side).
        let (resized_w, resized_h) = if width <= height {
            (short, (short * height / width).max(size))
        } else {
            ((short * width / height).max(size), short)
        };
        if (width, height) == (size, size) {
            return (0.0, 0.0, width as f64, height as f64);
        }
        let axis = |length: u64, resized: u64| {
            let scale = length as f64 / resized as f64;
            let offset = ((resized - size) as f64 / 2.0).round_ties_even();
            (offset * scale, size as f64 * scale)
        };
        let (x, w) = axis(width, resized_w);
        let (y, h) = axis(height, resized_h);
        (x, y, w.min(width as f64 - x), h.min(height as f64 - y))
    }

    /// The evaluation view of `image`: `[H, W, 3]` normalised floats into `out`.
    ///
    /// # Panics
    /// If `out` is not [`Self::view_len`] long, or `image` has no pixels.
    pub fn view(&self, work: &mut EvalScratch, image: &RgbImage, out: &mut [f32]) {
        assert_eq!(out.len(), self.view_len(), "a view is [H, W, 3]");
        let whole = CropBox::whole(image.width, image.height);
        let (x, y, width, height) = self.crop(image.width, image.height);
        let EvalScratch { resizer, part, planes } = work;
        part.take(image, whole);
        planes.resize(self.view_len(), 0.0);
        let area = Area { x, y, width, height };
        resizer.begin(part, whole, area, self.interpolation, false, self.size);
        for top in (0..self.size).step_by(TILE) {
            resizer.rows(part, whole, top, TILE.min(self.size - top), self.size, planes);
        }
        for (channel, plane) in planes.chunks_exact(self.size * self.size).enumerate() {
            for (pixel, &x) in out.chunks_exact_mut(3).zip(plane) {
                pixel[channel] = self.normalise.of(channel, x);
            }
        }
    }
}

/// Work memory of [`EvalView::view`].
#[derive(Debug, Default)]
pub struct EvalScratch {
    resizer: Resizer,
    part: PlanarImage,
    planes: Vec<f32>,
}
