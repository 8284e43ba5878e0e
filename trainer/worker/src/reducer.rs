//! The mean gradient over the global batch, on every rank.
//!
//! Each rank's loss is its share of the mean over the global batch (a sum over its samples divided by the global
//! batch), so the sum of all ranks' gradients is the mean gradient even when shares are unequal. Gradients lie in
//! one flat buffer, which is reduced in place.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mentee_collectives::{Buffer, CollectiveError, Collectives};
use mentee_ssl::params::Gradients;
use mentee_torch_ext as ext;
use tch::Kind;

/// Sums gradients over ranks.
pub struct GradientReducer {
    collectives: Arc<dyn Collectives>,
}

impl GradientReducer {
    /// Over this group.
    pub fn new(collectives: Arc<dyn Collectives>) -> Self {
        Self { collectives }
    }

    /// After backward: every rank holds the sum. Returns the time that training waited for it.
    pub fn finish(&self, gradients: &mut Gradients) -> Result<Duration, CollectiveError> {
        if self.collectives.world_size() == 1 {
            return Ok(Duration::ZERO);
        }
        let start = Instant::now();
        match gradients.flat.kind() {
            Kind::Double => {
                self.collectives.all_reduce_sum(Buffer::F64(ext::slice_f64(&mut gradients.flat)))?
            }
            _ => self.collectives.all_reduce_sum(Buffer::F32(ext::slice_f32(&mut gradients.flat)))?,
        }
        Ok(start.elapsed())
    }
}
