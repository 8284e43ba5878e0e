//! Collective operations on plain host memory: what the training step needs from a network, and nothing else.
//!
//! ```text
//!   worker ──► dyn Collectives ◄── shm     (ranks of one machine: through its memory)
//!                   ▲          ◄── checked (do all ranks make the same call?)
//!                   │          ◄── faulty  (fail, delay, hang, corrupt at (rank, lane, call))
//!       ┌───────────┼───────────┐
//!    single        mpi       threads
//!  world of one  processes   ranks as threads of one process, for tests
//! ```
//!
//! The memory of devices has a trait of its own beside it, [`DeviceCollectives`], with [`nccl`] behind it.
//!
//! # The contract of every implementation
//!
//! - All ranks of the world make the same calls in the same order with the same lengths and element types.
//!   [`checked::Checked`] verifies that; [`threads`] and [`shm`] always do; the others rely on it.
//! - [`Collectives::all_reduce_sum`] adds **in rank order**, `((x₀ + x₁) + x₂) + …`, element by element, and
//!   every rank receives the same bits. So the result depends on the values and the world size, not on the
//!   implementation, the message length, its alignment or the time of day: [`threads`], [`mpi`] and [`shm`] agree
//!   bit for bit.
//! - An error is final: the group may have ended the operation on some ranks and not on others. Nothing is
//!   retried in here; the whole gang restarts from a checkpoint.
//! - Calls are safe from any thread, one at a time per value; a second caller waits for the first. Threads that
//!   must not wait for one another take a lane each: [`Collectives::lane`].

pub mod bench;
mod buffer;
pub mod checked;
mod device;
mod error;
pub mod faulty;
pub mod mpi;
pub mod nccl;
pub mod shm;
mod single;
pub mod threads;
mod waited;

pub use buffer::{Buffer, ElementType};
pub use device::{
    DeviceBuffer, DeviceCollectives, DeviceError, DeviceErrorKind, DeviceType, Event, EventError, Record,
    RecordState, Stream, Ticket,
};
pub use error::{CollectiveError, ErrorKind, Operation, StartError};
pub use shm::SharedMemory;
pub use single::Single;

use std::sync::Arc;

/// A group of ranks that can exchange data. See the crate documentation for the contract.
pub trait Collectives: Send + Sync {
    /// This process's number in the group, `0..world_size`.
    fn rank(&self) -> u32;

    /// How many ranks the group has; at least 1.
    fn world_size(&self) -> u32;

    /// Replaces each element by its sum over all ranks, added in rank order; integers wrap around.
    ///
    /// # Errors
    /// When a peer failed, left or did not arrive in time, when the ranks were found to make different calls,
    /// or when the network library reports a failure. What `buffer` holds is then unspecified.
    fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError>;

    /// Copies the buffer of rank `root` to all ranks.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce_sum`]; also when `root` is not a rank of the group.
    fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError>;

    /// Gives every rank the bytes of all ranks, in rank order. The lengths may differ from rank to rank.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce_sum`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce_sum`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// Memory of `bytes` bytes on each rank, of which slices are summed faster than of any other; none where the group has
    /// nothing of the kind. The sums may run on the group or on any lane, and cover the same part of it on every rank. Every
    /// rank calls this at the same place among its calls, whatever line they are on, and with the same length.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce_sum`].
    fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
        let _ = bytes;
        Ok(None)
    }

    /// Opens a second line of calls among the same ranks, for another thread. Every rank calls this, at the same
    /// place among its calls and with the same name.
    ///
    /// Calls on a lane are ordered among themselves only: rank 0 may be in a call of the lane while rank 1 is
    /// in one of the group, and neither waits for the other. A lane counts its calls by itself, and its errors
    /// name it. It waits more patiently than the group does: it leaves the core to a thread that computes.
    ///
    /// A lane lives as long as its group, whether it is dropped before or not: open few, and keep them.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce_sum`].
    fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError>;

    /// The orderly end: every rank calls it once, after its last operation; later operations are refused, also
    /// those of lanes.
    ///
    /// A rank that ends because of an error must **not** call this (it would wait for the others) but
    /// [`Collectives::abort`], or end its process with a code other than 0.
    ///
    /// # Errors
    /// When the network library cannot be shut down, when it was shut down before, when a lane is in use, or when
    /// called on a lane.
    fn finish(&self) -> Result<(), CollectiveError>;

    /// Ends every rank of the group at once, with all lanes, without waiting for anyone; `code` becomes the exit code where
    /// the implementation can hand it on.
    fn abort(&self, code: i32) -> !;
}

macro_rules! forward_collectives {
    ($($pointer:ident),*) => {$(
        impl<C: Collectives + ?Sized> Collectives for $pointer<C> {
            fn rank(&self) -> u32 {
                (**self).rank()
            }
            fn world_size(&self) -> u32 {
                (**self).world_size()
            }
            fn all_reduce_sum(&self, buffer: Buffer<'_>) -> Result<(), CollectiveError> {
                (**self).all_reduce_sum(buffer)
            }
            fn broadcast(&self, buffer: Buffer<'_>, root: u32) -> Result<(), CollectiveError> {
                (**self).broadcast(buffer, root)
            }
            fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
                (**self).all_gather(bytes)
            }
            fn barrier(&self) -> Result<(), CollectiveError> {
                (**self).barrier()
            }
            fn memory(&self, bytes: usize) -> Result<Option<SharedMemory>, CollectiveError> {
                (**self).memory(bytes)
            }
            fn lane(&self, name: &str) -> Result<Arc<dyn Collectives>, CollectiveError> {
                (**self).lane(name)
            }
            fn finish(&self) -> Result<(), CollectiveError> {
                (**self).finish()
            }
            fn abort(&self, code: i32) -> ! {
                (**self).abort(code)
            }
        }
    )*};
}

forward_collectives!(Box, Arc);
