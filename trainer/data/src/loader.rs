//! Batches of augmented views, in step order, made ahead of time by decode threads.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mentee_config::recipe::Views;

use crate::augment::{Augmenter, ViewDraw, ViewKey};
use crate::damaged::{Damaged, OnError};
use crate::decode::CropBox;
use crate::error::DataError;
use crate::memory::Memory;
use crate::order::Order;
pub use crate::pool::Skipped;
use crate::pool::{Pool, Scratch, Work};
use crate::source::Source;

/// Views drawn from every image.
pub const NUM_VIEWS: usize = 2;

/// What a [`Loader`] delivers, and with what.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Where samples come from.
    pub source: Arc<dyn Source>,
    /// Which sample stands where.
    pub order: Order,
    /// The augmentations.
    pub views: Views,
    /// Keys the augmentations (`run.seed`).
    pub seed: u64,
    /// This rank's positions within the global batch.
    pub rank_share: Range<u64>,
    /// The first step delivered: 0, or where a checkpoint left off. Costs nothing to be anywhere.
    pub first_step: u64,
    /// One past the last step delivered.
    pub last_step: u64,
    /// Decode threads; 0 counts as 1.
    pub threads: usize,
    /// What a damaged sample does.
    pub on_error: OnError,
    /// Batches held ahead, finished or being filled; 0 counts as 1. Bounds the memory.
    pub queue_steps: usize,
}

/// One rank's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The step.
    pub step: u64,
    /// Its epoch.
    pub epoch: u64,
    /// The samples, in the order of the global batch. `[N]`
    pub ids: Vec<u64>,
    /// Damaged samples among them that were replaced; `ids` has the replacements.
    pub skipped: Vec<Skipped>,
    /// Normalised views, channels last. `[V, N, H, W, C]`, V = 2, C = 3
    pub views: Memory,
    /// How long [`Loader::next`] blocked for it.
    pub wait: Duration,
}

/// See the module. Dropping it stops and joins its threads, after the samples they are at.
pub struct Loader {
    pool: Pool,
}

struct TwoViews {
    config: LoaderConfig,
    augmenter: Augmenter,
    damaged: Damaged,
}

impl Work for TwoViews {
    fn sample_len(&self) -> usize {
        self.augmenter.view_len()
    }

    fn planes(&self) -> usize {
        NUM_VIEWS
    }

    fn steps(&self) -> Range<u64> {
        self.config.first_step..self.config.last_step
    }

    fn samples(&self, step: u64) -> (u64, Vec<u64>) {
        self.config.order.share(step, self.config.rank_share.clone())
    }

    fn instead(&self, epoch: u64, id: u64, attempt: u32, error: DataError) -> Result<u64, DataError> {
        let order = &self.config.order;
        let damaged = if attempt == 0 { id } else { order.replacement(epoch, id, attempt - 1) };
        self.damaged.pass_over(damaged, error)?;
        Ok(order.replacement(epoch, id, attempt))
    }

    fn fill(
        &self,
        scratch: &mut Scratch,
        epoch: u64,
        id: u64,
        out: &mut [&mut [f32]],
    ) -> Result<(), DataError> {
        let Self { config, augmenter, .. } = self;
        two_views(&*config.source, augmenter, config.seed, scratch, epoch, id, Stage::Full, out)
    }
}

/// Where to stop: each stage does all that is before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Read,
    Decode,
    Resize,
    Full,
}

/// Makes both views of sample `id`, up to `stage`: decodes what the two crops cover together, once.
#[expect(clippy::too_many_arguments, reason = "the loader's and the bench's own; every one is another thing")]
pub(crate) fn two_views(
    source: &dyn Source,
    augmenter: &Augmenter,
    seed: u64,
    scratch: &mut Scratch,
    epoch: u64,
    id: u64,
    stage: Stage,
    out: &mut [&mut [f32]],
) -> Result<(), DataError> {
    let Scratch { reader, planes, augment, .. } = scratch;
    if stage == Stage::Read {
        return reader.bytes(source, id);
    }
    let mut draws: Vec<ViewDraw> = Vec::with_capacity(NUM_VIEWS);
    let both = |width, height| {
        draws.extend(
            (0..NUM_VIEWS as u8)
                .map(|view| augmenter.draw(width, height, ViewKey { seed, epoch, sample: id, view })),
        );
        draws.iter().map(|draw| draw.crop).reduce(CropBox::union).unwrap_or(CropBox::whole(width, height))
    };
    reader.part(source, id, both, planes)?;
    if stage == Stage::Decode {
        return Ok(());
    }
    for (draw, out) in draws.iter().zip(out) {
        if stage == Stage::Resize {
            augmenter.resize_part(augment, planes, draw);
        } else {
            augmenter.apply_part(augment, planes, draw, out);
        }
    }
    Ok(())
}

impl Loader {
    /// Starts the decode threads.
    ///
    /// # Errors
    /// [`DataError::Thread`] when the system refuses one.
    pub fn new(config: LoaderConfig) -> Result<Self, DataError> {
        let share = config.rank_share.end.saturating_sub(config.rank_share.start) as usize;
        let (threads, queue) = (config.threads, config.queue_steps);
        let (augmenter, damaged) = (Augmenter::new(&config.views), Damaged::new(config.on_error));
        let pool = Pool::start(Box::new(TwoViews { config, augmenter, damaged }), threads, queue, share)?;
        Ok(Self { pool })
    }

    /// The next step's batch; `None` after the last. Blocks until it is ready; [`Batch::wait`] says how long.
    ///
    /// # Errors
    /// [`DataError`] of the first sample, in order, that cannot be read or decoded; again on every further call.
    #[expect(clippy::should_implement_trait, reason = "an iterator could not lend `recycle`")]
    pub fn next(&mut self) -> Result<Option<Batch>, DataError> {
        Ok(self.pool.next()?.map(|filled| Batch {
            step: filled.step,
            epoch: filled.epoch,
            ids: filled.ids,
            skipped: filled.skipped,
            views: filled.buffer,
            wait: filled.wait,
        }))
    }

    /// Gives a batch's memory back, to be filled again.
    pub fn recycle(&self, batch: Batch) {
        self.pool.recycle(batch.views);
    }
}
