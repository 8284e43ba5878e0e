//! Images as an evaluation sees them: no randomness, every image once, in the order asked for; and as a classifier on
//! frozen features is trained on them: random crops and flips, every epoch in an order of its own.

pub(crate) mod view;

use std::ops::Range;
use std::sync::Arc;

use mentee_config::recipe::Views;

use crate::augment::{Augmenter, ViewKey};
use crate::damaged::{Damaged, OnError};
use crate::error::DataError;
use crate::order::Order;
use crate::pool::{Filled, Pool, Scratch, Work};
use crate::source::Source;

pub use view::{EvalScratch, EvalView, SMALL, shorter_side};

/// Batches that are decoded ahead.
const QUEUE: usize = 3;

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
        let Filled { mut ids, buffer, .. } = filled;
        let mut images = buffer.into_vec();
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
