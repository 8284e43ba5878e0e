//! A decorator that makes one call of one rank go wrong, for tests of what the rest does then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{Buffer, CollectiveError, Collectives, ErrorKind, Operation, SharedMemory, buffer::with_slice};

/// How a call goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The call returns [`ErrorKind::Injected`] without reaching the group.
    Fail,
    /// The call waits this long first.
    Delay(Duration),
    /// The call never returns and never reaches the group.
    Hang,
    /// The call succeeds, and afterwards the lowest bit of the first element on this rank is inverted: a
    /// silent memory error. An operation without data is left as it is.
    Corrupt,
}

/// One fault: what happens, and at which call of which rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The rank it hits.
    pub rank: u32,
    /// The lane it hits, by its name; `None`: the group itself.
    pub lane: Option<&'static str>,
    /// The call it hits, counted from 0 over all operations of that rank there.
    pub call: u64,
    /// What happens.
    pub kind: FaultKind,
}

/// The decorator.
#[derive(Debug)]
pub struct Faulty<C> {
    inner: C,
    lane: Option<String>,
    /// Those of this rank, for all lanes.
    faults: Vec<Fault>,
    calls: AtomicU64,
}

impl<C: Collectives> Faulty<C> {
    /// Hits `inner` with those of the `faults` that are for its rank.
    pub fn new(inner: C, faults: &[Fault]) -> Self {
        let rank = inner.rank();
        let faults = faults.iter().copied().filter(|fault| fault.rank == rank).collect();
        Faulty { inner, lane: None, faults, calls: AtomicU64::new(0) }
    }

    /// Lets this call's fault happen, as far as it comes before the call. `true`: the result has to be
    /// corrupted.
    fn before(&self, operation: Operation) -> Result<bool, CollectiveError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut corrupt = false;
        for fault in
            self.faults.iter().filter(|fault| fault.lane == self.lane.as_deref() && fault.call == call)
        {
            match fault.kind {
                FaultKind::Fail => {
                    return Err(CollectiveError {
                        operation,
                        call,
                        lane: self.lane.clone(),
                        rank: self.rank(),
                        world_size: self.world_size(),
                        kind: ErrorKind::Injected,
                    });
                }
                FaultKind::Delay(duration) => thread::sleep(duration),
                FaultKind::Hang => loop {
                    thread::park();
                },
                FaultKind::Corrupt => corrupt = true,
            }
        }
        Ok(corrupt)
    }
}

/// A number whose lowest bit can be inverted.
trait Flip {
    fn flip(&mut self);
}

impl Flip for f32 {
    fn flip(&mut self) {
        *self = f32::from_bits(self.to_bits() ^ 1);
    }
}

impl Flip for f64 {
    fn flip(&mut self) {
        *self = f64::from_bits(self.to_bits() ^ 1);
    }
}

impl Flip for u64 {
    fn flip(&mut self) {
        *self ^= 1;
    }
}

impl Flip for u8 {
    fn flip(&mut self) {
        *self ^= 1;
    }
}

fn corrupt(buffer: Buffer<'_>) {
    with_slice!(buffer, slice => if let Some(first) = slice.first_mut() {
        first.flip();
    });
}

impl<C: Collectives> Collectives for Faulty<C> {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, mut buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        let hit = self.before(Operation::AllReduceSum)?;
        self.inner.all_reduce_sum(buffer.reborrow())?;
        if hit {
            corrupt(buffer);
        }
        Ok(())
    }

    fn broadcast(&self, mut buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        let hit = self.before(Operation::Broadcast)?;
        self.inner.broadcast(buffer.reborrow(), root)?;
        if hit {
            corrupt(buffer);
        }
        Ok(())
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let hit = self.before(Operation::AllGather)?;
        let mut all = self.inner.all_gather(bytes)?;
        if hit && let Some(part) = all.iter_mut().find(|part| !part.is_empty()) {
            corrupt(part.into());
        }
        Ok(all)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.before(Operation::Barrier)?;
        self.inner.barrier()
    }

    fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
        self.inner.memory(bytes)
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        self.before(Operation::Lane)?;
        let inner = self.inner.lane(name)?;
        Ok(Arc::new(Faulty { lane: Some(name.to_owned()), ..Faulty::new(inner, &self.faults) }))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.before(Operation::Finish)?;
        self.inner.finish()
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::threads;

    fn at(rank: u32, call: u64, kind: FaultKind) -> [Fault; 1] {
        [Fault { rank, lane: None, call, kind }]
    }

    #[test]
    fn a_failed_call_hits_one_rank_and_its_peers_learn_of_it() {
        let results = threads::run(2, Duration::from_secs(60), |rank| {
            let group = Faulty::new(rank, &at(1, 1, FaultKind::Fail));
            group.barrier().unwrap();
            group.barrier().map_err(|error| error.kind)
        });
        assert_eq!(results, [Err(ErrorKind::PeerLeft { rank: 1 }), Err(ErrorKind::Injected)]);
    }

    #[test]
    fn a_fault_on_a_lane_counts_the_calls_of_that_lane() {
        let fault = Fault { rank: 1, lane: Some("gradients"), call: 1, kind: FaultKind::Fail };
        let results = threads::run(2, Duration::from_secs(60), |rank| {
            let group = Faulty::new(rank, &[fault]);
            let (other, lane) = (group.lane("other").unwrap(), group.lane("gradients").unwrap());
            for _ in 0..3 {
                group.barrier().unwrap();
                other.barrier().unwrap();
            }
            lane.barrier().unwrap();
            lane.barrier()
        });
        let error = results[1].as_ref().unwrap_err();
        assert_eq!(
            error.to_string(),
            "barrier (call 1 on lane gradients) failed on rank 1 of 2: failure injected by a test"
        );
        assert_eq!(results[0].as_ref().unwrap_err().kind, ErrorKind::PeerLeft { rank: 1 });
    }

    #[test]
    fn a_delay_slows_the_group_down() {
        let began = Instant::now();
        let delay = Duration::from_millis(80);
        let results = threads::run(2, Duration::from_secs(60), |rank| {
            Faulty::new(rank, &at(0, 0, FaultKind::Delay(delay))).barrier()
        });
        assert!(results.iter().all(Result::is_ok));
        assert!(began.elapsed() >= delay);
    }

    #[test]
    fn a_hang_is_a_timeout_for_the_others() {
        let mut ranks = threads::group(2, Duration::from_millis(50)).into_iter();
        let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
        // Never joined: it hangs until the test process ends.
        thread::spawn(move || Faulty::new(second, &at(1, 0, FaultKind::Hang)).barrier());
        let ErrorKind::Timeout { missing, .. } = first.barrier().unwrap_err().kind else {
            panic!("no timeout")
        };
        assert_eq!(missing, [1]);
    }

    #[test]
    fn corruption_changes_one_bit_on_one_rank() {
        let results = threads::run(2, Duration::from_secs(60), |rank| {
            let group = Faulty::new(rank, &at(1, 0, FaultKind::Corrupt));
            let mut values = vec![1.0f32, 2.0];
            group.all_reduce_sum((&mut values).into()).unwrap();
            values
        });
        assert_eq!(results[0], [2.0, 4.0]);
        assert_eq!(results[1][0].to_bits(), 2.0f32.to_bits() ^ 1);
        assert_eq!(results[1][1], 4.0);
    }
}
