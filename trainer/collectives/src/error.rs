//! What can go wrong between ranks. Every message names the operation, the rank and the number of its call.

use std::{fmt, time::Duration};

/// The collective operations, for messages and for checking that ranks agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// [`crate::Collectives::all_reduce_sum`]
    AllReduceSum,
    /// [`crate::Collectives::broadcast`]
    Broadcast,
    /// [`crate::Collectives::all_gather`]
    AllGather,
    /// [`crate::Collectives::barrier`]
    Barrier,
    /// [`crate::Collectives::finish`]
    Finish,
    /// [`crate::Collectives::lane`]
    Lane,
}

impl Operation {
    /// The operations by their code on the wire.
    pub(crate) const ALL: [Operation; 6] = [
        Operation::AllReduceSum,
        Operation::Broadcast,
        Operation::AllGather,
        Operation::Barrier,
        Operation::Finish,
        Operation::Lane,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::AllReduceSum => "all-reduce",
            Operation::Broadcast => "broadcast",
            Operation::AllGather => "all-gather",
            Operation::Barrier => "barrier",
            Operation::Finish => "finish",
            Operation::Lane => "lane",
        })
    }
}

/// A collective that did not succeed, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation} (call {call}{}) failed on rank {rank} of {world_size}: {kind}", on_lane(lane))]
pub struct CollectiveError {
    /// The operation.
    pub operation: Operation,
    /// Which call of this rank on this lane it was, counted from 0.
    pub call: u64,
    /// The lane it was on; `None` for the group itself.
    pub lane: Option<String>,
    /// The rank that reports it.
    pub rank: u32,
    /// The size of the group.
    pub world_size: u32,
    /// What happened.
    pub kind: ErrorKind,
}

/// The ways in which a collective fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Not all ranks arrived in time.
    #[error("waited {:.1} s for {}; see in its log what it was doing", waited.as_secs_f64(), absent(missing))]
    Timeout {
        /// How long this rank waited.
        waited: Duration,
        /// The ranks that had not arrived; empty when it is not known which.
        missing: Vec<u32>,
    },
    /// A peer reported that it cannot go on.
    #[error("rank {rank} failed: {reason}")]
    PeerFailed {
        /// The rank that failed first.
        rank: u32,
        /// Its own account.
        reason: String,
    },
    /// A peer ended while others still counted on it.
    #[error("rank {rank} has left the group; the ranks do not make the same calls")]
    PeerLeft {
        /// The rank that left.
        rank: u32,
    },
    /// Two ranks made different calls at the same point.
    #[error("rank {first} calls {first_call}, rank {second} calls {second_call}")]
    Disagreement {
        /// The lower of the two ranks.
        first: u32,
        /// What it called.
        first_call: String,
        /// A rank that differs from it.
        second: u32,
        /// What that one called.
        second_call: String,
    },
    /// The root of a broadcast is no rank.
    #[error("root {root} is not a rank of this group")]
    NoSuchRoot {
        /// The root asked for.
        root: u32,
    },
    /// The MPI library returned an error code.
    #[error("MPI error {code}: {text}")]
    Mpi {
        /// The code as the library returned it.
        code: i32,
        /// The library's text for that code.
        text: String,
    },
    /// The group was shut down before this call.
    #[error("the group was shut down before")]
    Finished,
    /// Only the thread that started MPI may shut it down (MPI-3.1, section 12.4.3).
    #[error("called from another thread than the one that started MPI; call it there")]
    WrongThread,
    /// A lane was still at work when the group was to end.
    #[error("lane {lane} is in use; wait for the thread that uses it first")]
    LaneInUse {
        /// The name of the lane.
        lane: String,
    },
    /// A lane does not end by itself.
    #[error("a lane ends together with its group; call it there")]
    OnLane,
    /// A failure asked for by a test, see [`crate::faulty`].
    #[error("failure injected by a test")]
    Injected,
}

fn on_lane(lane: &Option<String>) -> String {
    lane.as_ref().map(|name| format!(" on lane {name}")).unwrap_or_default()
}

fn absent(ranks: &[u32]) -> String {
    if ranks.is_empty() { "another rank".to_owned() } else { format!("rank {}", list(ranks)) }
}

fn list(ranks: &[u32]) -> String {
    ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// Why the group could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The environment and MPI do not describe the same world, for example when `srun` starts ranks that MPI
    /// does not know of and each becomes a world of its own.
    #[error(
        "the environment says rank {environment_rank} of {environment_world}, but MPI says rank {mpi_rank} of {mpi_world}; \
         start the ranks with the mpirun of the MPI library this program is linked to"
    )]
    WorldMismatch {
        /// The rank that the launcher's variables give.
        environment_rank: u32,
        /// The world size that the launcher's variables give.
        environment_world: u32,
        /// The rank in MPI's world.
        mpi_rank: u32,
        /// The size of MPI's world.
        mpi_world: u32,
    },
    /// MPI can be started once in the life of a process.
    #[error("MPI was already started in this process; it can be started only once")]
    AlreadyStarted,
    /// The MPI library does not allow calls from more than one thread.
    #[error(
        "the MPI library grants thread level {granted}, but Serialized is needed; use an MPI library with thread support"
    )]
    ThreadLevel {
        /// The level granted.
        granted: String,
    },
    /// The MPI library failed while starting.
    #[error("MPI error {code} while starting: {text}")]
    Mpi {
        /// The code as the library returned it.
        code: i32,
        /// The library's text for that code.
        text: String,
    },
    /// The program was compiled without the feature `mpi`.
    #[error("this program was built without MPI; build it with the feature \"mpi\" or run a world of one")]
    NotBuilt,
}
