//! One digest of everything a run's data path delivers: the proof that order and augmentations depend on nothing
//! but the recipe.

use std::ops::Range;
use std::sync::Arc;

use mentee_config::recipe::Views;

use crate::damaged::OnError;
use crate::error::DataError;
use crate::loader::{Loader, LoaderConfig, NUM_VIEWS};
use crate::order::Order;
use crate::source::Source;

/// What to digest, and with how many ranks.
#[derive(Clone)]
pub struct OrderDigest {
    /// Where samples come from.
    pub source: Arc<dyn Source>,
    /// Which sample stands where.
    pub order: Order,
    /// The augmentations.
    pub views: Views,
    /// Keys the augmentations.
    pub seed: u64,
    /// Each rank's positions within the global batch, in rank order; together they are the whole batch.
    pub shares: Vec<Range<u64>>,
    /// The steps to digest.
    pub steps: Range<u64>,
    /// What a damaged sample does.
    pub on_error: OnError,
    /// Decode threads over all ranks.
    pub threads: usize,
}

/// A digest that can be carried on in the middle: at another world size, in another call.
#[derive(Debug, Clone, Default)]
pub struct Running(blake3::Hasher);

impl Running {
    /// The digest so far, hex.
    #[must_use]
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

impl OrderDigest {
    /// Digests the steps: in global order, each sample's id (u64, little-endian) and the bytes of both its views
    /// (f32, little-endian, `[H, W, C]`). Every rank's batches come from a loader of its own, as in training.
    /// `progress` hears (done, total) steps.
    ///
    /// # Errors
    /// [`DataError`] of the first sample that cannot be used.
    pub fn update(&self, running: &mut Running, progress: &mut dyn FnMut(u64, u64)) -> Result<(), DataError> {
        let view_len = (self.views.size as usize).pow(2) * 3;
        let ranks = self.shares.len().max(1);
        let mut loaders = self
            .shares
            .iter()
            .map(|share| {
                Loader::new(LoaderConfig {
                    source: Arc::clone(&self.source),
                    order: self.order.clone(),
                    views: self.views.clone(),
                    seed: self.seed,
                    rank_share: share.clone(),
                    first_step: self.steps.start,
                    last_step: self.steps.end,
                    threads: (self.threads / ranks).max(1),
                    on_error: self.on_error,
                    queue_steps: 2,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut bytes = Vec::with_capacity(4 * view_len);
        let total = self.steps.end.saturating_sub(self.steps.start);
        for done in 0..total {
            for loader in &mut loaders {
                let Some(batch) = loader.next()? else { continue };
                let n = batch.ids.len();
                for (i, id) in batch.ids.iter().enumerate() {
                    running.0.update(&id.to_le_bytes());
                    for view in 0..NUM_VIEWS {
                        bytes.clear();
                        let floats = &batch.views[(view * n + i) * view_len..][..view_len];
                        bytes.extend(floats.iter().flat_map(|x| x.to_le_bytes()));
                        running.0.update(&bytes);
                    }
                }
                loader.recycle(batch);
            }
            progress(done + 1, total);
        }
        Ok(())
    }
}
