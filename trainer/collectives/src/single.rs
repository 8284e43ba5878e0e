//! The world of one: every operation is complete, and trivial.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{Buffer, CollectiveError, Collectives, ErrorKind, Operation};

/// A group of one rank. Needs no network and no library.
#[derive(Debug, Default)]
pub struct Single {
    calls: AtomicU64,
    lane: Option<String>,
    /// Shared with the lanes.
    finished: Arc<AtomicBool>,
}

impl Single {
    /// The group that holds only this process.
    pub fn new() -> Self {
        Self::default()
    }

    fn call(&self, operation: Operation, problem: Option<ErrorKind>) -> Result<(), CollectiveError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let finished = self.finished.load(Ordering::Relaxed).then_some(ErrorKind::Finished);
        match finished.or(problem) {
            None => Ok(()),
            Some(kind) => {
                let lane = self.lane.clone();
                Err(CollectiveError { operation, call, lane, rank: 0, world_size: 1, kind })
            }
        }
    }
}

impl Collectives for Single {
    fn rank(&self) -> u32 {
        0
    }

    fn world_size(&self) -> u32 {
        1
    }

    fn all_reduce_sum(&self, _buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        self.call(Operation::AllReduceSum, None)
    }

    fn broadcast(&self, _buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
        self.call(Operation::Broadcast, (root != 0).then_some(ErrorKind::NoSuchRoot { root }))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.call(Operation::AllGather, None)?;
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.call(Operation::Barrier, None)
    }

    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        self.call(Operation::Lane, None)?;
        let finished = Arc::clone(&self.finished);
        Ok(Arc::new(Single { calls: AtomicU64::new(0), lane: Some(name.to_owned()), finished }))
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.call(Operation::Finish, self.lane.is_some().then_some(ErrorKind::OnLane))?;
        self.finished.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_of_one_is_complete() {
        let group = Single::new();
        let mut values = vec![1.5f32, -2.0];
        group.all_reduce_sum((&mut values).into()).unwrap();
        group.broadcast((&mut values).into(), 0).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        assert_eq!(group.all_gather(b"abc").unwrap(), [b"abc"]);
        group.barrier().unwrap();
    }

    #[test]
    fn errors_name_the_call_and_the_root() {
        let group = Single::new();
        group.barrier().unwrap();
        let error = group.broadcast((&mut vec![0u8]).into(), 3).unwrap_err();
        assert_eq!(
            error.to_string(),
            "broadcast (call 1) failed on rank 0 of 1: root 3 is not a rank of this group"
        );
    }

    #[test]
    fn a_lane_is_named_and_ends_with_its_group() {
        let group = Single::new();
        let lane = group.lane("gradients").unwrap();
        lane.barrier().unwrap();
        assert_eq!(lane.finish().unwrap_err().kind, ErrorKind::OnLane);
        group.finish().unwrap();
        let error = lane.barrier().unwrap_err();
        assert_eq!(
            error.to_string(),
            "barrier (call 2 on lane gradients) failed on rank 0 of 1: the group was shut down before"
        );
    }

    #[test]
    fn nothing_works_after_the_end() {
        let group = Single::new();
        group.finish().unwrap();
        assert_eq!(group.barrier().unwrap_err().kind, ErrorKind::Finished);
        assert_eq!(group.finish().unwrap_err().kind, ErrorKind::Finished);
    }
}
