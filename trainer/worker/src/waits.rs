//! What a rank waits for: its calls to the other ranks, how long they took, and the first that failed.
//!
//! A step fails with whatever broke in it. When that was a call within a pass (batch norms sum their statistics in the
//! middle of forward and backward) libtorch only knows that the pass was ended; the reason stands here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mentee_cluster::Vitals;
use mentee_collectives::{Buffer, CollectiveError, Collectives, SharedMemory};

use crate::error::WorkerError;

/// The account of one rank's calls.
#[derive(Debug, Default)]
pub struct Waits {
    /// What the link tells of this rank.
    pub vitals: Arc<Vitals>,
    micros: AtomicU64,
    device_micros: AtomicU64,
    failed: Mutex<Option<CollectiveError>>,
}

impl Waits {
    /// Time spent in calls so far, those of lanes left out.
    pub fn total(&self) -> Duration {
        Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }

    /// Time that this thread waited for its own device so far, on which others may be waited for.
    pub fn device(&self) -> Duration {
        Duration::from_micros(self.device_micros.load(Ordering::Relaxed))
    }

    /// A wait for this rank's device: for what it has to do itself and for what it gets from others, which nobody can tell apart.
    pub fn of_device<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.timed(&self.device_micros, wait)
    }

    fn timed<T>(&self, account: &AtomicU64, wait: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        self.vitals.waiting(true);
        let result = wait();
        self.vitals.waiting(false);
        account.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        result
    }

    /// The error of a step that ended in a call which failed: that call's.
    pub fn explain(&self, error: WorkerError) -> WorkerError {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (error, failed) {
            (WorkerError::Step { step, .. }, Some(source)) => WorkerError::Collective { step, source },
            (error, _) => error,
        }
    }

    fn call<T>(&self, call: impl FnOnce() -> Result<T, CollectiveError>) -> Result<T, CollectiveError> {
        let result = self.timed(&self.micros, call);
        if let Err(error) = &result {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert_with(|| error.clone());
        }
        result
    }
}

/// A group whose calls are counted.
pub struct Watched {
    inner: Arc<dyn Collectives>,
    waits: Arc<Waits>,
}

impl Watched {
    /// Counts the calls of `inner` in `waits`.
    pub fn new(inner: Arc<dyn Collectives>, waits: Arc<Waits>) -> Self {
        Self { inner, waits }
    }
}

impl Collectives for Watched {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.waits.call(|| self.inner.all_reduce_sum(buffer))
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.waits.call(|| self.inner.broadcast(buffer, root))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.waits.call(|| self.inner.all_gather(bytes))
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.waits.call(|| self.inner.barrier())
    }

    fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
        self.inner.memory(bytes)
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        self.inner.lane(name)
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.inner.finish()
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mentee_collectives::{ErrorKind, Operation, Single};
    use mentee_ssl::SslError;

    #[test]
    fn a_pass_that_a_call_ended_is_that_calls_failure() {
        let waits = Waits::default();
        let torch =
            || WorkerError::Step { step: 4, source: SslError::from(tch::TchError::Torch("x".into())) };
        assert!(matches!(waits.explain(torch()), WorkerError::Step { step: 4, .. }), "its own");
        let error = |call| CollectiveError {
            operation: Operation::AllReduceSum,
            call,
            lane: None,
            rank: 0,
            world_size: 2,
            kind: ErrorKind::Timeout { waited: Duration::from_secs(3), missing: vec![1] },
        };
        for call in [7, 8] {
            assert!(waits.call(|| Err::<(), _>(error(call))).is_err());
        }
        let explained = waits.explain(torch());
        assert_eq!(explained.peers(), Some(vec![1]));
        assert!(
            matches!(explained, WorkerError::Collective { step: 4, source } if source.call == 7),
            "the first call that failed"
        );
    }

    #[test]
    fn calls_are_timed() {
        let waits = Arc::new(Waits::default());
        waits
            .call(|| {
                std::thread::sleep(Duration::from_millis(20));
                Ok(())
            })
            .unwrap();
        assert!(waits.total() >= Duration::from_millis(20));
        let watched = Watched::new(Arc::new(Single::new()), waits);
        assert_eq!(watched.all_gather(&[1]).unwrap(), [vec![1]]);
    }
}
