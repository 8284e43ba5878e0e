//! Images as an evaluation sees them: no randomness, every image once, in the order asked for; and as a classifier on
//! frozen features is trained on them: random crops and flips, every epoch in an order of its own.
//!
//! The view is torchvision's standard one: the shorter side resized to `size · 256/224`, the centre `size` x `size`
//! cut out, normalised. Small views (below [`SMALL`] pixels, as for CIFAR) are resized to `size` itself, and an
//! image that is `size` x `size` already is taken as it is.

use std::ops::Range;
use std::sync::Arc;

use mentee_config::recipe::{Interpolation, Views};

use crate::augment::{Augmenter, Normalise, ViewKey};
use crate::decode::{CropBox, PlanarImage, RgbImage};
use crate::error::DataError;
use crate::loader::{Damaged, OnError};
use crate::order::Order;
use crate::pool::{Filled, Pool, Scratch, Work};
use crate::resize::{Area, Resizer, TILE};
use crate::source::Source;

/// Views below this side lose nothing to a margin: they are not resized to 256/224 first.
pub const SMALL: u32 = 64;

/// Batches that are decoded ahead.
const QUEUE: usize = 3;

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

/// A few labelled images.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalBatch {
    /// Which samples. `[N]`
    pub ids: Vec<u64>,
    /// Their classes. `[N]`
    pub labels: Vec<u32>,
    /// Normalised, channels last. `[N, H, W, C]`
    pub images: Vec<f32>,
}

/// How [`eval_images`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvalOptions {
    /// Images in a batch; the last may have fewer.
    pub batch: usize,
    /// Decode threads; 0 counts as 1.
    pub threads: usize,
}

/// The images `indices` of `source`, in that order, in batches. Every one must be labelled. Those that are `damaged`, or
/// are found to be, are left out: their batches are smaller, the others' the same, so that every call with the same
/// `damaged` gives the same batches.
///
/// # Errors
/// [`DataError::NoLabel`] naming the first unlabelled one; [`DataError::Thread`]. The iterator yields
/// [`DataError`] for an image that cannot be used and is not left out, and ends there.
pub fn eval_images(
    source: Arc<dyn Source>,
    indices: Vec<u64>,
    views: &Views,
    options: EvalOptions,
    damaged: Arc<Damaged>,
) -> Result<EvalImages, DataError> {
    all_labelled(&*source, &indices)?;
    let batch = options.batch.max(1);
    let (view, own) = (EvalView::new(views), source.clone());
    let work = EvalWork { view, source: own, indices, batch, damaged: damaged.clone() };
    let pool = Pool::start(Box::new(work), options.threads, QUEUE, batch)?;
    Ok(EvalImages { pool, source, damaged, done: false })
}

/// The images `indices` of `source`, `epochs` times, each time in another order and in another view as `views` says: the
/// batches of one epoch after those of the other. Order and views are functions of (seed, epoch, sample). None is left out.
///
/// # Errors
/// As [`eval_images`].
pub fn training_images(
    source: Arc<dyn Source>,
    indices: Vec<u64>,
    views: &Views,
    seed: u64,
    epochs: u64,
    options: EvalOptions,
) -> Result<EvalImages, DataError> {
    all_labelled(&*source, &indices)?;
    let (count, batch) = (indices.len() as u64, options.batch.max(1));
    let work = TrainingWork {
        augmenter: Augmenter::new(views),
        source: source.clone(),
        order: Order::new(seed, count, count),
        steps_per_epoch: count.div_ceil(batch as u64),
        indices,
        batch: batch as u64,
        seed,
        epochs,
    };
    let pool = Pool::start(Box::new(work), options.threads, QUEUE, batch)?;
    Ok(EvalImages { pool, source, damaged: Arc::new(Damaged::new(OnError::Fail)), done: false })
}

/// Whether the images `indices` of `source` all have labels.
///
/// # Errors
/// [`DataError::NoLabel`] naming the first that has none.
pub fn all_labelled(source: &dyn Source, indices: &[u64]) -> Result<(), DataError> {
    match indices.iter().find(|&&index| source.label(index).is_none()) {
        Some(&index) => Err(DataError::NoLabel { sample: source.key(index) }),
        None => Ok(()),
    }
}

/// The batches of [`eval_images`] and [`training_images`].
pub struct EvalImages {
    pool: Pool,
    source: Arc<dyn Source>,
    damaged: Arc<Damaged>,
    done: bool,
}

impl EvalImages {
    /// What was filled, with its labels and without the places of damaged images.
    fn batch(&self, filled: Filled) -> Result<EvalBatch, DataError> {
        let Filled { mut ids, buffer: mut images, .. } = filled;
        let usable: Vec<bool> = ids.iter().map(|&id| !self.damaged.contains(id)).collect();
        if usable.contains(&false) {
            let view = images.len() / ids.len();
            let views = images.chunks_exact(view).zip(&usable).filter(|(_, usable)| **usable);
            images = views.flat_map(|(view, _)| view).copied().collect();
            ids = ids.into_iter().zip(&usable).filter(|(_, usable)| **usable).map(|(id, _)| id).collect();
        }
        let label = |&id: &u64| {
            self.source.label(id).ok_or_else(|| DataError::NoLabel { sample: self.source.key(id) })
        };
        let labels = ids.iter().map(label).collect::<Result<Vec<u32>, _>>()?;
        Ok(EvalBatch { ids, labels, images })
    }
}

impl Iterator for EvalImages {
    type Item = Result<EvalBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            match self.pool.next() {
                Ok(Some(filled)) => match self.batch(filled) {
                    Ok(batch) if batch.ids.is_empty() => {} // all of it was damaged
                    batch => return Some(batch),
                },
                Ok(None) => self.done = true,
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

struct EvalWork {
    view: EvalView,
    source: Arc<dyn Source>,
    indices: Vec<u64>,
    batch: usize,
    damaged: Arc<Damaged>,
}

impl Work for EvalWork {
    fn sample_len(&self) -> usize {
        self.view.view_len()
    }

    fn planes(&self) -> usize {
        1
    }

    fn steps(&self) -> Range<u64> {
        0..self.indices.len().div_ceil(self.batch) as u64
    }

    fn samples(&self, step: u64) -> (u64, Vec<u64>) {
        let first = step as usize * self.batch;
        (0, self.indices[first..(first + self.batch).min(self.indices.len())].to_vec())
    }

    /// An accuracy over other images than were asked for would be another number: what is left out has no replacement.
    fn instead(&self, _epoch: u64, _id: u64, _attempt: u32, error: DataError) -> Result<u64, DataError> {
        Err(error)
    }

    fn fill(
        &self,
        scratch: &mut Scratch,
        _epoch: u64,
        id: u64,
        out: &mut [&mut [f32]],
    ) -> Result<(), DataError> {
        // The place of a damaged image stays as it is: `EvalImages` takes it out.
        if self.damaged.contains(id) {
            return Ok(());
        }
        match scratch.reader.whole(&*self.source, id, &mut scratch.image) {
            Ok(()) => self.view.view(&mut scratch.eval, &scratch.image, &mut *out[0]),
            Err(error) => self.damaged.pass_over(id, error)?,
        }
        Ok(())
    }
}

struct TrainingWork {
    augmenter: Augmenter,
    source: Arc<dyn Source>,
    /// An epoch is one step of it.
    order: Order,
    steps_per_epoch: u64,
    indices: Vec<u64>,
    batch: u64,
    seed: u64,
    epochs: u64,
}

impl Work for TrainingWork {
    fn sample_len(&self) -> usize {
        self.augmenter.view_len()
    }

    fn planes(&self) -> usize {
        1
    }

    fn steps(&self) -> Range<u64> {
        0..self.epochs * self.steps_per_epoch
    }

    fn samples(&self, step: u64) -> (u64, Vec<u64>) {
        let epoch = step / self.steps_per_epoch;
        let first = step % self.steps_per_epoch * self.batch;
        let last = (first + self.batch).min(self.indices.len() as u64);
        let (_, places) = self.order.share(epoch, first..last);
        (epoch, places.into_iter().map(|place| self.indices[place as usize]).collect())
    }

    fn instead(&self, _epoch: u64, _id: u64, _attempt: u32, error: DataError) -> Result<u64, DataError> {
        Err(error)
    }

    fn fill(
        &self,
        scratch: &mut Scratch,
        epoch: u64,
        id: u64,
        out: &mut [&mut [f32]],
    ) -> Result<(), DataError> {
        let Scratch { reader, planes, augment, .. } = scratch;
        let mut draw = None;
        let part = |width, height| {
            let key = ViewKey { seed: self.seed, epoch, sample: id, view: 0 };
            draw.insert(self.augmenter.draw(width, height, key)).crop
        };
        reader.part(&*self.source, id, part, planes)?;
        if let Some(draw) = &draw {
            self.augmenter.apply_part(augment, planes, draw, &mut *out[0]);
        }
        Ok(())
    }
}
