//! What workers and the coordinator say to each other. One JSON object a frame (see [`crate::wire`]); the table is
//! the protocol.
//!
//! | from → to | message | when |
//! |---|---|---|
//! | worker → coordinator | `hello` | first, once: token, protocol, rank, and what every rank must agree on |
//! | coordinator → worker | `go` | when every rank of the generation has said hello |
//! | coordinator → worker | `refused` | instead of `go`, with the reason; the connection is then closed |
//! | worker → coordinator | `progress` | at most ten times a second, less often in large worlds; once a second without news (heartbeat) |
//! | worker → coordinator | `event` | in order: checkpoint, eval, failed, finished |
//! | worker → coordinator | `share` | its share of a checkpoint is on disk, or could not be written |
//! | coordinator → worker 0 | `commit` | every rank's share of a step is on disk: write the manifest |
//! | coordinator → worker 0 | `abandon` | every rank has reported, and one could not write its share |
//! | coordinator → worker | `stop` | stop at a step boundary, checkpoint, exit 75 |

use serde::{Deserialize, Serialize};

/// Version of this table. Both sides must speak the same.
pub const PROTOCOL: u32 = 3;

/// Where a coordinator listens, and the proof that a worker belongs to its job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorAddress {
    /// `host:port`.
    pub host_port: String,
    /// The job's token; whoever does not know it is refused.
    pub token: String,
    /// Which start of the gang the worker belongs to; 0 for the first.
    pub generation: u32,
}

/// What a worker says first. Every rank must agree on world size, plan, data and version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// This worker's rank.
    pub rank: u32,
    /// Ranks it believes to be in the world.
    pub world_size: u32,
    /// Its machine, for messages.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// Hash of what decides the numbers (`Recipe::hash`).
    pub plan_hash: String,
    /// Which data set it reads (`Source::digest`).
    pub data_digest: String,
    /// Version of its mentee.
    pub version: String,
}

/// The answer when all ranks are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// Which start of the gang this is; 0 for the first.
    pub generation: u32,
}

/// What a rank is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Phase {
    /// Setting up: libraries, data, model, resume.
    #[default]
    Starting,
    /// Waiting for the loader's next batch.
    DataWait,
    /// Forward pass and loss.
    Forward,
    /// Backward pass.
    Backward,
    /// Waiting for gradients of other ranks.
    Reduce,
    /// Optimizer and teacher update.
    Update,
    /// Writing or reading a checkpoint.
    Checkpoint,
    /// Evaluating.
    Eval,
    /// Training is over.
    Done,
}

impl Phase {
    const ALL: [Phase; 9] = [
        Phase::Starting,
        Phase::DataWait,
        Phase::Forward,
        Phase::Backward,
        Phase::Reduce,
        Phase::Update,
        Phase::Checkpoint,
        Phase::Eval,
        Phase::Done,
    ];

    /// For an atomic; the inverse of `as u8`.
    pub(crate) fn from_u8(value: u8) -> Phase {
        Phase::ALL.get(usize::from(value)).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Starting => "starting",
            Phase::DataWait => "data wait",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Reduce => "reduce",
            Phase::Update => "update",
            Phase::Checkpoint => "checkpoint",
            Phase::Eval => "eval",
            Phase::Done => "done",
        })
    }
}

/// Where a rank's steps spent their time: means since its last report, milliseconds. What is left of `step_ms` went into
/// bookkeeping. A device works behind the program's back: forward is the time to hand it the work, and the wait for it to come to
/// the end of backward counts as backward.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StepTimes {
    /// Waiting for the loader, and making a batch of what it brought.
    pub data_wait_ms: f64,
    /// Forward pass and loss, without what `comm_ms` holds.
    pub forward_ms: f64,
    /// Backward pass, without what `comm_ms` holds.
    pub backward_ms: f64,
    /// Exchanging with other ranks and waiting for them: gradients, batch-norm statistics, agreement. A rank that waits
    /// less than the others is the one they wait for.
    pub comm_ms: f64,
    /// Optimizer, teacher, records.
    pub update_ms: f64,
}

impl StepTimes {
    /// What the rank itself needed: everything but [`StepTimes::comm_ms`]. All ranks take equally long for a step, as
    /// they wait for each other; this says for whom.
    pub fn own_ms(&self) -> f64 {
        self.data_wait_ms + self.forward_ms + self.backward_ms + self.update_ms
    }
}

/// Where a rank stands. Only the newest counts.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Steps completed.
    pub step: u64,
    /// The step that what follows is of, the last logged one: filled in where it is sent.
    #[serde(default)]
    pub logged: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epoch of that step, from 0.
    pub epoch: u64,
    /// Epochs of the whole run.
    pub epochs: u64,
    /// What the rank is doing.
    pub phase: Phase,
    /// Loss of that step, mean over the global batch.
    pub loss: Option<f64>,
    /// See `z_std` of metrics.jsonl: about 1 when healthy, 0 when collapsed.
    pub z_std: Option<f64>,
    /// Images a second, over all ranks.
    pub images_per_s: Option<f64>,
    /// Milliseconds of that step.
    pub step_ms: Option<f64>,
    /// In a call to the other ranks just now.
    #[serde(default)]
    pub waiting: bool,
    /// Milliseconds of all steps of this start, waits for other ranks and for the device left out.
    #[serde(default)]
    pub own_ms: f64,
    /// Of these, waiting for data.
    #[serde(default)]
    pub data_ms: f64,
    /// Milliseconds of all steps of this start in which this rank waited for its device; 0 on the processor.
    #[serde(default)]
    pub device_ms: f64,
    /// Where they went on this rank.
    pub times: Option<StepTimes>,
    /// Memory of this rank's process, MiB.
    pub rss_mb: Option<f64>,
}

/// What must not be lost: delivered in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// A checkpoint is complete on disk.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Its folder.
        path: String,
        /// Digest of all state.
        digest: String,
    },
    /// An evaluation is done; percent.
    Eval {
        /// Step it was made at.
        step: u64,
        /// Epochs completed then.
        epoch: u64,
        /// Weighted kNN on frozen features.
        knn_top1: f64,
        /// The same on the encoder's initial weights.
        knn_random_init: Option<f64>,
        /// The same on raw pixels.
        knn_raw_pixels: Option<f64>,
        /// How it was measured.
        protocol: String,
    },
    /// This rank cannot go on.
    Failed {
        /// Step it was at.
        step: u64,
        /// What it was doing.
        phase: Phase,
        /// One line: what, where, what to do.
        message: String,
        /// Code it is about to exit with.
        exit_code: i32,
        /// The ranks whose failure this one follows from, empty when it is not known which; `None` when it is
        /// the rank's own.
        #[serde(default)]
        peers: Option<Vec<u32>>,
    },
    /// This rank is done and about to exit.
    Finished {
        /// 0, or 75 when it stopped on request.
        exit_code: i32,
    },
}

/// A file that a rank has written, as the checkpoint's manifest will list it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its bytes, hexadecimal.
    pub blake3: String,
}

/// What became of a rank's share of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Share {
    /// It is on the disk.
    Written {
        /// Where; none when there are more ranks than tensors.
        file: Option<ShareFile>,
    },
    /// It could not be written.
    Failed {
        /// Why, as one line.
        reason: String,
    },
}

/// Longest text of a worker that is sent, kept and passed on, bytes.
const MAX_TEXT: usize = 2000;
/// Most ranks that one event names.
const MAX_RANKS: usize = 64;

impl WorkerEvent {
    /// Cuts texts to a length that fits a frame.
    pub(crate) fn clip(&mut self) {
        match self {
            WorkerEvent::Checkpoint { path, digest, .. } => {
                clip(path);
                clip(digest);
            }
            WorkerEvent::Eval { protocol, .. } => clip(protocol),
            WorkerEvent::Failed { message, peers, .. } => {
                clip(message);
                peers.iter_mut().for_each(|peers| peers.truncate(MAX_RANKS));
            }
            WorkerEvent::Finished { .. } => {}
        }
    }
}

impl Share {
    /// Cuts texts to a length that fits a frame.
    pub(crate) fn clip(&mut self) {
        match self {
            Share::Written { file: Some(file) } => {
                clip(&mut file.name);
                clip(&mut file.blake3);
            }
            Share::Written { file: None } => {}
            Share::Failed { reason } => clip(reason),
        }
    }
}

/// Cuts a peer's text at [`MAX_TEXT`].
pub(crate) fn clip(text: &mut String) {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
}

/// Worker → coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToCoordinator {
    /// First message.
    Hello {
        /// [`PROTOCOL`] of the worker.
        protocol: u32,
        /// The job's token.
        token: String,
        /// The start of the gang it was made for.
        generation: u32,
        /// The rest.
        hello: Hello,
    },
    /// Newest state, or a heartbeat.
    Progress {
        /// The state.
        progress: Progress,
    },
    /// An event, in order.
    Event {
        /// The event.
        event: WorkerEvent,
    },
    /// What became of this rank's share of a checkpoint; in order with events.
    Share {
        /// The checkpoint's step.
        step: u64,
        /// What became of it.
        share: Share,
    },
}

/// Of a refusal without a code.
fn failed() -> i32 {
    mentee_config::exit_code::FAILED
}

/// Coordinator → worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToWorker {
    /// Everyone is there.
    Go {
        /// The start of the gang.
        generation: u32,
    },
    /// Not in this job.
    Refused {
        /// Why, as one line.
        reason: String,
        /// What the worker is to exit with.
        #[serde(default = "failed")]
        exit_code: i32,
    },
    /// To rank 0: the checkpoint of this step is complete but for its manifest.
    Commit {
        /// The step.
        step: u64,
        /// Every rank's file, in the order of ranks.
        files: Vec<ShareFile>,
    },
    /// To rank 0: the checkpoint of this step cannot become complete.
    Abandon {
        /// The step.
        step: u64,
        /// Which rank failed and why, as one line.
        reason: String,
    },
    /// Stop at a step boundary with a checkpoint.
    Stop {
        /// Why, for the log.
        reason: String,
    },
}
