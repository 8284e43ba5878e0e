//! The world of one: every operation is complete, and trivial.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Buffer, CollectiveError, Collectives, ErrorKind, Operation};

/// A group of one rank. Needs no network and no library.
#[derive(Debug, Default)]
pub struct Single {
    calls: AtomicU64,
    finished: AtomicBool,
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
            Some(kind) => Err(CollectiveError { operation, call, rank: 0, world_size: 1, kind }),
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

    fn finish(&self) -> Result<(), CollectiveError> {
        self.call(Operation::Finish, None)?;
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
    fn nothing_works_after_the_end() {
        let group = Single::new();
        group.finish().unwrap();
        assert_eq!(group.barrier().unwrap_err().kind, ErrorKind::Finished);
        assert_eq!(group.finish().unwrap_err().kind, ErrorKind::Finished);
    }
}
