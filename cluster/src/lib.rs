//! How the processes of one job find each other and agree: who am I ([`identity`]), who keeps the job together
//! ([`coordinator`]), and the wire between the two ([`server`] beside the coordinator, [`link`] in each worker).
//!
//! ```text
//!  worker process                                     supervisor, or rank 0 of a bare `mpirun`
//!  training thread ─► Link ─ one thread ══ TCP ══ server (sockets, clock) ─► coordinator (pure) ─► Output
//! ```
//!
//! Nothing here knows torch or MPI. Every decision is in `coordinator.rs` and tested without a socket.

// Words for people are their owners' business, and `println!` panics when nobody reads them.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod coordinator;
pub mod identity;
pub mod limits;
pub mod link;
pub mod lock;
pub mod message;
pub mod server;
pub mod vitals;
pub mod watch;
pub mod wire;
pub mod words;

pub use coordinator::{Agreement, Coordinator, Output};
pub use identity::{Identity, IdentityError, discover};
pub use link::{LastWords, Link, LinkError, NoCommit, Shares, StopReason, Verdict};
pub use lock::{Lock, LockError};
pub use message::{CoordinatorAddress, Go, Hello, Phase, Progress, Share, ShareFile, StepTimes, WorkerEvent};
pub use server::{CoordinatorHandle, Events};
pub use vitals::Vitals;
pub use watch::{Pace, Stall, StallKind};
