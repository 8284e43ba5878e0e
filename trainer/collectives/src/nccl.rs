//! NVIDIA's NCCL, opened at run time: sums and broadcasts between GPUs.
//!
//! ```text
//!   Library        the libnccl.so.2 of this process: libtorch's own copy, where there is one
//!      ▼
//!   Communicator   DeviceCollectives: non-blocking calls under a deadline, hang reports, abort
//!      │  ▲ lane
//!      └──┘        a communicator of its own, with an id of its own
//! ```
//!
//! Nothing of NVIDIA's is needed to build this crate or to start a program with it: all functions are looked up when
//! [`Library::open`] is called.
//!
//! # How it keeps out of hangs
//!
//! NCCL waits for other ranks wherever it can. So communicators are created with `blocking = 0`: every call returns at
//! once, and [`Communicator`] asks `ncclCommGetAsyncError` under a deadline of its own until the call is through
//! (NCCL user guide, "Fault tolerance"). A thread is inside NCCL for one such short call at a time, under one lock for
//! the group and all its lanes, so that `abort` finds nobody else in there. `ncclCommAbort` itself may wait, for a device
//! that hangs for example: a timer then ends the process.
//!
//! # Why lanes are not made by `ncclCommSplit`
//!
//! A lane exchanges an id of its own over the host's group and starts as the group did: one way in, and the one that
//! every version of NCCL has had. `ncclCommSplit` would save milliseconds once; but in non-blocking mode it writes the new
//! communicator from a thread of its own at some later time, occupies the parent until then, and a split that hangs leaves
//! no handle by which to abort it.

mod communicator;
mod ffi;
mod history;
mod library;

pub use communicator::{Communicator, Options};
pub use history::HISTORY;
pub use library::{Found, Library, LibraryError, OLDEST, Search, Version};
