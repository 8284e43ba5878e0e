//! What stands in for MPI when the feature `mpi` is off: the same type, which cannot be constructed.

use std::sync::Arc;

use crate::{Buffer, CollectiveError, Collectives, StartError};

/// A rank of an MPI world; this build has none.
#[derive(Debug)]
pub enum Mpi {}

impl Mpi {
    /// Always an error in this build.
    ///
    /// # Errors
    /// [`StartError::NotBuilt`].
    pub fn initialize(_expected: Option<(u32, u32)>) -> Result<Mpi, StartError> {
        Err(StartError::NotBuilt)
    }
}

impl Collectives for Mpi {
    fn rank(&self) -> u32 {
        match *self {}
    }

    fn world_size(&self) -> u32 {
        match *self {}
    }

    fn all_reduce_sum(&self, _buffer: Buffer<'_>) -> Result<(), CollectiveError> {
        match *self {}
    }

    fn broadcast(&self, _buffer: Buffer<'_>, _root: u32) -> Result<(), CollectiveError> {
        match *self {}
    }

    fn all_gather(&self, _bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        match *self {}
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        match *self {}
    }

    fn lane(&self, _name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
        match *self {}
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        match *self {}
    }

    fn abort(&self, _code: i32) -> ! {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constructor_says_what_is_missing() {
        assert_eq!(Mpi::initialize(None).unwrap_err(), StartError::NotBuilt);
    }
}
