//! Collectives on the memory of a device: enqueued on a stream, complete when the stream gets there.
//!
//! ```text
//!   backward (stream A) ──event──► communication stream: sum of bucket 0, sum of bucket 1, …
//!                                        │ event behind each
//!   update (stream A)   ◄────────────────┘          host: wait(ticket, event) only where it needs the result
//! ```
//!
//! Beside [`crate::Collectives`], not instead of it: host memory, agreement at the start, digests and the orderly end
//! stay there. What differs:
//!
//! - A call returns when the operation is *on the stream*; who reads the result on another stream waits for an event
//!   recorded behind it, and the host, where it must, by [`DeviceCollectives::wait`].
//! - The order of additions is the library's own. Every rank receives the same bits, and the same inputs give the same
//!   sum again as long as topology, algorithm and message length are the same; it is **not** the rank order that
//!   [`crate::Collectives::all_reduce_sum`] promises.
//! - A rank that fails does not wake the others by itself: each calls [`DeviceCollectives::abort`].

use std::{
    ffi::c_void,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{CollectiveError, Operation, nccl::LibraryError};

/// A group of ranks, each with a device of its own, that exchange device memory in the order of streams.
///
/// All ranks make the same calls in the same order, per lane, with the same lengths and types. An error is final: the
/// rank calls [`DeviceCollectives::abort`] and ends.
pub trait DeviceCollectives: Send + Sync {
    /// This process's number in the group, `0..world_size`.
    fn rank(&self) -> u32;

    /// How many ranks the group has; at least 1.
    fn world_size(&self) -> u32;

    /// Enqueues on `stream`: each element becomes its sum over all ranks, in place.
    ///
    /// Work enqueued on `stream` before has finished with the buffer when the sum begins; an event recorded on it
    /// after this call returned is complete when the sum is. One lane keeps to one stream.
    ///
    /// # Errors
    /// When the library refuses the call, does not put it on the stream in time, or the group has ended.
    fn all_reduce_sum(&self, buffer: DeviceBuffer, stream: Stream) -> Result<Ticket, DeviceError>;

    /// Enqueues on `stream`: the buffer of rank `root` is copied to all ranks.
    ///
    /// # Errors
    /// As [`DeviceCollectives::all_reduce_sum`]; also when `root` is not a rank of the group.
    fn broadcast(&self, buffer: DeviceBuffer, root: u32, stream: Stream) -> Result<Ticket, DeviceError>;

    /// Leaves the event recorded behind an operation with the history, so that a later report says which operation
    /// the device has reached. Only for that: nothing waits.
    fn watch(&self, ticket: Ticket, event: Arc<dyn Event>);

    /// Waits on the host until `event`, recorded behind the operation, is complete; watches for errors of the network
    /// and for [`DeviceCollectives::abort`] by another thread meanwhile.
    ///
    /// # Errors
    /// With the report of what is not complete: when the library reports an error, when the event fails, when the
    /// group was aborted, and after `patience`. The caller aborts then; the memory is the device's until it has.
    fn wait(&self, ticket: Ticket, event: &dyn Event, patience: Duration) -> Result<(), DeviceError>;

    /// Asks once for errors that came up since the last call; never waits. For whoever waits by other means than
    /// [`DeviceCollectives::wait`].
    ///
    /// # Errors
    /// As [`DeviceCollectives::wait`], but for `patience`.
    fn check(&self) -> Result<(), DeviceError>;

    /// Opens a second line of calls among the same ranks, for another thread and another stream. Every rank calls this
    /// at the same place among its calls to the host's group, with the same name and the same current device as at
    /// the start.
    ///
    /// Two lanes at work on one device at once hang when the devices start their kernels in different orders and one
    /// does not fit beside the other: let every rank enqueue in one order over all lanes, or set
    /// `NCCL_LAUNCH_ORDER_IMPLICIT=1` (NCCL 2.26 and newer).
    ///
    /// # Errors
    /// When a rank does not take part, names another lane, or the library fails.
    fn lane(&self, name: &str) -> Result<Arc<dyn DeviceCollectives>, DeviceError>;

    /// The orderly end of the group and its lanes: every rank calls it once on the group, after its last operation is
    /// complete and every thread is done with the lanes.
    ///
    /// # Errors
    /// When called on a lane, after the end, or when the library does not finish in time; abort then.
    fn finish(&self) -> Result<(), DeviceError>;

    /// Ends the group and its lanes on this rank without waiting for other ranks, from any thread, as often as one
    /// likes. Operations on streams stop where they are, and their results are void.
    ///
    /// Ends the process with `exit_code` when the library does not let go in time: a device that hangs, or a thread
    /// that is stuck inside the library.
    ///
    /// # Errors
    /// When the library reports an error; the group has ended all the same.
    fn abort(&self, exit_code: i32) -> Result<(), DeviceError>;
}

/// The type of elements in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceType {
    /// 4-byte floats.
    F32,
    /// 8-byte floats.
    F64,
    /// bfloat16: 2 bytes; sums are rounded to it.
    Bf16,
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceType::F32 => "f32",
            DeviceType::F64 => "f64",
            DeviceType::Bf16 => "bf16",
        })
    }
}

/// A stretch of device memory: an address, a number of elements, their type.
///
/// Deliberately not a borrow: the device works on the memory long after the call that named it has returned.
#[derive(Debug, Clone, Copy)]
pub struct DeviceBuffer {
    pub(crate) pointer: *mut c_void,
    pub(crate) len: usize,
    pub(crate) element: DeviceType,
}

impl DeviceBuffer {
    /// Names `len` elements of type `element` at `pointer`.
    ///
    /// # Safety
    /// `pointer` is memory of the device that was current when the group started, aligned for `element`, with room for
    /// `len` of them. From the call that is given this value until the stream of that call has passed the operation
    /// (or [`DeviceCollectives::abort`] has returned), the memory stays allocated, and nobody else reads or writes it
    /// but work that the stream orders before or after.
    pub unsafe fn new(pointer: *mut c_void, len: usize, element: DeviceType) -> DeviceBuffer {
        DeviceBuffer { pointer, len, element }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The type of the elements.
    pub fn element_type(&self) -> DeviceType {
        self.element
    }
}

// SAFETY: an address on the device, which no host thread dereferences.
unsafe impl Send for DeviceBuffer {}
// SAFETY: as above.
unsafe impl Sync for DeviceBuffer {}

/// A stream of the device, `cudaStream_t`; the null stream is one as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub(crate) *mut c_void);

impl Stream {
    /// Names a stream by its handle.
    ///
    /// # Safety
    /// `handle` is a stream of the device that was current when the group started, or null, and lives until everything
    /// enqueued on it through this value is complete or the group has ended.
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle)
    }
}

// SAFETY: CUDA's streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the handle itself is never written.
unsafe impl Sync for Stream {}

/// A point on a stream, recorded behind an operation: a CUDA event.
pub trait Event: Send + Sync {
    /// Whether the stream has passed the point. Does not wait.
    ///
    /// # Errors
    /// What the device reports, such as an illegal access of an earlier kernel.
    fn is_complete(&self) -> Result<bool, EventError>;
}

/// The device reports a failure instead of an event's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EventError(pub String);

/// Names one operation of a group: what was enqueued, on which lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) line: usize,
    pub(crate) number: u64,
}

impl Ticket {
    /// Of no group that there is: for tests of what works with groups.
    #[doc(hidden)]
    pub fn numbered(number: u64) -> Ticket {
        Ticket { line: 0, number }
    }

    /// The operation's number on its lane, counted from 0.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// One enqueued operation, as the history keeps it.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its number on its lane, counted from 0.
    pub number: u64,
    /// What it is.
    pub operation: Operation,
    /// How many elements it works on.
    pub elements: usize,
    /// Of which type.
    pub element_type: DeviceType,
    /// The lane; `None` for the group itself.
    pub lane: Option<Arc<str>>,
    /// When the call began.
    pub called: Instant,
    /// How far it has come.
    pub state: RecordState,
}

/// How far an operation has come, as far as this host knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordState {
    /// The library has not put it on the stream yet.
    Called,
    /// On the stream, since then.
    Enqueued(Instant),
    /// The stream has passed it; seen then, not necessarily completed then.
    Complete(Instant),
}

/// What went wrong in a device group, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed on rank {rank} of {world_size}: {kind}{}", appended(report))]
pub struct DeviceError {
    /// The call, with its number, size and lane where it has them.
    pub call: Box<str>,
    /// The rank that reports it.
    pub rank: u32,
    /// The size of the group.
    pub world_size: u32,
    /// What happened.
    pub kind: DeviceErrorKind,
    /// What this rank knows about operations that are not complete; may be empty.
    pub report: Box<str>,
}

fn appended(report: &str) -> String {
    if report.is_empty() { String::new() } else { format!("; {report}") }
}

/// The ways in which a device group fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceErrorKind {
    /// This rank has no library that it can use.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// Another rank said that it cannot take part.
    #[error("rank {rank} cannot take part: {reason}")]
    Peer {
        /// The lowest such rank.
        rank: u32,
        /// Its own account.
        reason: String,
    },
    /// Ranks have different versions of the library, which do not understand one another.
    #[error(
        "rank {first} has NCCL {first_version}, rank {second} has NCCL {second_version}; let all ranks load the same \
         library, see MENTEE_NCCL"
    )]
    Versions {
        /// The lower of two ranks that differ.
        first: u32,
        /// Its version.
        first_version: String,
        /// The lowest rank that differs from it.
        second: u32,
        /// Its version.
        second_version: String,
    },
    /// Ranks opened different things at the same point.
    #[error("rank {first} opens {first_name}, rank {second} opens {second_name}")]
    Names {
        /// The lower of two ranks that differ.
        first: u32,
        /// What it opened.
        first_name: String,
        /// The lowest rank that differs from it.
        second: u32,
        /// What that one opened.
        second_name: String,
    },
    /// The exchange over the host's group failed.
    #[error("{0}")]
    Host(Box<CollectiveError>),
    /// `NCCL_COMM_BLOCKING` would let calls wait without end.
    #[error("NCCL_COMM_BLOCKING={value} lets calls wait without a deadline; unset it")]
    BlockingForced {
        /// Its value.
        value: String,
    },
    /// A function of the library returned an error code.
    #[error("{function}: {text} ({code}){}", said(last))]
    Call {
        /// The function.
        function: &'static str,
        /// What it returned, `ncclResult_t`.
        code: i32,
        /// The library's text for that code.
        text: String,
        /// The library's account of its last error; may be empty.
        last: String,
    },
    /// The library reported an error outside of any call, most often of the network.
    #[error("NCCL reports on {line}: {text} ({code}){}", said(last))]
    Asynchronous {
        /// The lane, or the group.
        line: String,
        /// What it reported, `ncclResult_t`.
        code: i32,
        /// The library's text for that code.
        text: String,
        /// The library's account of its last error; may be empty.
        last: String,
    },
    /// A call that does not wait was still in progress after its time.
    #[error("{function} still in progress after {:.1} s; see in the logs of the other ranks where they are", waited.as_secs_f64())]
    InProgress {
        /// The function.
        function: &'static str,
        /// How long this rank waited.
        waited: Duration,
    },
    /// The device did not reach the end of the operation in time.
    #[error("not complete after {:.1} s", waited.as_secs_f64())]
    NotComplete {
        /// How long this rank waited.
        waited: Duration,
    },
    /// The device reports a failure.
    #[error("the device reports: {0}")]
    Device(EventError),
    /// Another thread has been inside the library for so long.
    #[error("another thread has been inside NCCL for {:.1} s", waited.as_secs_f64())]
    Stuck {
        /// How long this thread waited.
        waited: Duration,
    },
    /// The root of a broadcast is no rank.
    #[error("root {root} is not a rank of this group")]
    NoSuchRoot {
        /// The root asked for.
        root: u32,
    },
    /// The group was aborted.
    #[error("the group was aborted")]
    Aborted,
    /// The group was shut down before this call.
    #[error("the group was shut down before")]
    Finished,
    /// A lane does not end by itself.
    #[error("a lane ends together with its group; call it there")]
    OnLane,
}

fn said(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!(": {last}") }
}
