//! A decorator that makes the ranks compare their calls before each one.
//!
//! A rank that skips a bucket or sends another length corrupts sums or hangs, far from the cause. With this
//! around it, the same mistake is an error at the first call that differs, which names two ranks and what
//! each wanted. It costs one small all-gather a call.
//!
//! A lane is checked by itself, on the lane; the error names it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Buffer, CollectiveError, Collectives, ElementType, ErrorKind, Operation, SharedMemory};

/// What a rank is about to do: equal on all ranks, or they do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    /// Type and number of the elements, where they have to agree.
    payload: Option<(ElementType, u64)>,
    root: Option<u32>,
}

impl Call {
    pub(crate) const BYTES: usize = 22;

    pub(crate) fn all_reduce_sum(buffer: &Buffer<'_>) -> Self {
        let payload = Some((buffer.element_type(), buffer.len() as u64));
        Call { operation: Operation::AllReduceSum, payload, root: None }
    }

    pub(crate) fn broadcast(buffer: &Buffer<'_>, root: u32) -> Self {
        let payload = Some((buffer.element_type(), buffer.len() as u64));
        Call { operation: Operation::Broadcast, payload, root: Some(root) }
    }

    /// An operation without a buffer whose length has to agree.
    pub(crate) fn plain(operation: Operation) -> Self {
        Call { operation, payload: None, root: None }
    }

    /// The first pair of ranks whose calls differ, as an error.
    pub(crate) fn first_difference(calls: &[Call]) -> Option<ErrorKind> {
        let first_call = calls.first()?;
        let second = calls.iter().position(|call| call != first_call)?;
        Some(ErrorKind::Disagreement {
            first: 0,
            first_call: first_call.to_string(),
            second: second as u32,
            second_call: calls[second].to_string(),
        })
    }

    /// Operation, type and root as bytes (255 for none), then the length, little endian.
    pub(crate) fn to_bytes(self, number: u64) -> [u8; Call::BYTES] {
        let mut bytes = [255u8; Call::BYTES];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes[8] = Operation::ALL.iter().position(|op| *op == self.operation).unwrap_or(255) as u8;
        let (element, len) = match self.payload {
            Some((element, len)) => (ElementType::ALL.iter().position(|e| *e == element), len),
            None => (None, 0),
        };
        bytes[9] = element.unwrap_or(255) as u8;
        bytes[10..18].copy_from_slice(&len.to_le_bytes());
        bytes[18..].copy_from_slice(&self.root.unwrap_or(u32::MAX).to_le_bytes());
        bytes
    }

    pub(crate) fn describe(bytes: &[u8]) -> String {
        let Ok(bytes) = <&[u8; Call::BYTES]>::try_from(bytes) else {
            return format!("an unchecked all-gather of {} bytes", bytes.len());
        };
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let root = u32::from_le_bytes(std::array::from_fn(|i| bytes[18 + i]));
        let Some(&operation) = Operation::ALL.get(bytes[8] as usize) else {
            return "an unknown operation".into();
        };
        let payload = ElementType::ALL.get(bytes[9] as usize).map(|element| (*element, word(10)));
        let call = Call { operation, payload, root: (root != u32::MAX).then_some(root) };
        format!("{call} as its call {}", word(0))
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.operation)?;
        if let Some((element, len)) = self.payload {
            write!(f, " of {len} {element}")?;
        }
        if let Some(root) = self.root {
            write!(f, " from rank {root}")?;
        }
        Ok(())
    }
}

/// The decorator. All ranks of a group wear it, or none.
#[derive(Debug)]
pub struct Checked<C> {
    inner: C,
    lane: Option<String>,
    calls: AtomicU64,
    /// Keeps a comparison and the operation it belongs to together when several threads call.
    turn: Mutex<()>,
}

impl<C: Collectives> Checked<C> {
    /// Compares the calls of `inner` across ranks from here on.
    pub fn new(inner: C) -> Self {
        Checked { inner, lane: None, calls: AtomicU64::new(0), turn: Mutex::new(()) }
    }

    fn compare<R>(
        &self,
        call: Call,
        work: impl FnOnce() -> Result<R, CollectiveError>,
    ) -> Result<R, CollectiveError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let calls = self.inner.all_gather(&call.to_bytes(number))?;
        match difference(&calls, Call::describe) {
            None => work(),
            Some(kind) => Err(self.error(call.operation, number, kind)),
        }
    }

    fn error(&self, operation: Operation, call: u64, kind: ErrorKind) -> CollectiveError {
        CollectiveError {
            operation,
            call,
            lane: self.lane.clone(),
            rank: self.rank(),
            world_size: self.world_size(),
            kind,
        }
    }
}

/// The first pair of ranks that sent different bytes, as an error.
fn difference(sent: &[Vec<u8>], describe: impl Fn(&[u8]) -> String) -> Option<ErrorKind> {
    let second = sent.iter().position(|other| *other != sent[0])?;
    Some(ErrorKind::Disagreement {
        first: 0,
        first_call: describe(&sent[0]),
        second: second as u32,
        second_call: describe(&sent[second]),
    })
}

impl<C: Collectives> Collectives for Checked<C> {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.compare(Call::all_reduce_sum(&buffer), || self.inner.all_reduce_sum(buffer))
    }

    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.compare(Call::broadcast(&buffer, root), || self.inner.broadcast(buffer, root))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.compare(Call::plain(Operation::AllGather), || self.inner.all_gather(bytes))
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.compare(Call::plain(Operation::Barrier), || self.inner.barrier())
    }

    fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
        self.inner.memory(bytes)
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        let inner = self.compare(Call::plain(Operation::Lane), || {
            let names = self.inner.all_gather(name.as_bytes())?;
            match difference(&names, |name| format!("lane {}", String::from_utf8_lossy(name))) {
                None => self.inner.lane(name),
                Some(kind) => Err(self.error(Operation::Lane, self.calls.load(Ordering::Relaxed) - 1, kind)),
            }
        })?;
        Ok(Arc::new(Checked { lane: Some(name.to_owned()), ..Checked::new(inner) }))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.compare(Call::plain(Operation::Finish), || self.inner.finish())
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::threads;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn equal_calls_pass_through() {
        let results = threads::run(3, PATIENCE, |rank| {
            let group = Checked::new(rank);
            let mut values = vec![1.0f64; 5];
            group.all_reduce_sum((&mut values).into())?;
            group.broadcast((&mut values).into(), 2)?;
            group.barrier()?;
            let all = group.all_gather(&[group.rank() as u8])?;
            group.finish()?;
            Ok::<_, CollectiveError>((values[0], all))
        });
        for result in results {
            assert_eq!(result.unwrap(), (3.0, vec![vec![0], vec![1], vec![2]]));
        }
    }

    #[test]
    fn a_skipped_call_is_an_error_on_every_rank_that_names_both() {
        let results = threads::run(3, PATIENCE, |rank| {
            let group = Checked::new(rank);
            let mut bucket = vec![0f32; 8];
            group.all_reduce_sum((&mut bucket).into())?;
            if group.rank() != 2 {
                group.all_reduce_sum((&mut bucket[..4]).into())?;
            }
            group.barrier()
        });
        for result in results {
            let text = result.unwrap_err().to_string();
            let expected =
                "rank 0 calls all-reduce of 4 f32 as its call 1, rank 2 calls barrier as its call 1";
            assert!(text.ends_with(expected), "{text}");
        }
    }

    #[test]
    fn a_skipped_call_on_a_lane_names_the_lane() {
        let results = threads::run(2, PATIENCE, |rank| {
            let group = Checked::new(rank);
            let lane = group.lane("gradients")?;
            lane.barrier()?;
            group.barrier()?; // not counted on the lane
            if group.rank() == 1 { lane.barrier() } else { lane.all_reduce_sum((&mut vec![0f32; 4]).into()) }
        });
        for (rank, result) in results.into_iter().enumerate() {
            let operation = ["all-reduce", "barrier"][rank];
            assert_eq!(
                result.unwrap_err().to_string(),
                format!(
                    "{operation} (call 1 on lane gradients) failed on rank {rank} of 2: \
                     rank 0 calls all-reduce of 4 f32 as its call 1, rank 1 calls barrier as its call 1"
                )
            );
        }
    }

    #[test]
    fn lanes_of_different_names_are_refused() {
        for checked in [false, true] {
            let results = threads::run(2, PATIENCE, |rank| {
                let name = ["statistics", "gradients"][rank.rank() as usize];
                if checked { Checked::new(rank).lane(name).map(drop) } else { rank.lane(name).map(drop) }
            });
            for result in results {
                let text = result.unwrap_err().to_string();
                assert!(
                    text.ends_with("rank 0 calls lane statistics, rank 1 calls lane gradients"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_different_root_is_noticed() {
        let results = threads::run(2, PATIENCE, |rank| {
            let root = rank.rank();
            Checked::new(rank).broadcast((&mut vec![0u64; 2]).into(), root)
        });
        let text = results[0].as_ref().unwrap_err().to_string();
        let expected = "rank 0 calls broadcast of 2 u64 from rank 0 as its call 0, rank 1 calls broadcast of 2 u64 from rank 1 as its call 0";
        assert!(text.ends_with(expected), "{text}");
    }
}
