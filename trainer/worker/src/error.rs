//! What ends a worker, and with which exit code.

use std::path::PathBuf;

use mentee_checkpoint::CheckpointError;
use mentee_cluster::{IdentityError, LinkError};
use mentee_collectives::{CollectiveError, DeviceErrorKind, ErrorKind, StartError};
use mentee_config::{ConfigError, exit_code};
use mentee_data::DataError;
use mentee_ssl::SslError;

/// NCCL's `ncclUnhandledCudaError`: a call of its own to this rank's device has failed.
const CUDA_FAILED: i32 = 1;

/// Everything a worker can fail with: one line each. Fields `step` are the updates done when the step began, as everywhere;
/// what is found behind its update is told with the number that `metrics.jsonl` gives that.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(
        "{run_dir}: is a run of another recipe ({difference}); choose another --run-dir, or go back to its plan.toml"
    )]
    OtherRecipe { run_dir: PathBuf, difference: String },
    #[error(
        "{checkpoint}: is a checkpoint of another recipe ({difference}); choose another --run-dir, or go back to that recipe"
    )]
    OtherRecipesCheckpoint { checkpoint: PathBuf, difference: String },
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("{0}")]
    OtherData(String),
    #[error("{0}: no checkpoint there; give a run directory or one of its checkpoints")]
    NoCheckpoint(PathBuf),
    #[error("{0}{advice}", advice = advice(.0))]
    Checkpoint(#[from] CheckpointError),
    #[error(
        "no checkpoint of step {step}: {source}; any older one is intact: {}start again",
        if source.is_no_room() { "make room there and " } else { "" }
    )]
    NotSaved { step: u64, source: CheckpointError },
    #[error("{path}: {source}; this checkpoint does not fit the recipe it names")]
    CheckpointContent { path: PathBuf, source: SslError },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(
        "rank {rank}: {what} = {found} there, {expected} on rank 0; start all ranks with the same recipe, data and version"
    )]
    Disagreement { rank: usize, what: String, found: String, expected: String },
    #[error(
        "rank {ranks}: no usable NVIDIA device there, the other ranks have one; see `mentee doctor` on that machine, or set parallel.device = \"cpu\""
    )]
    MixedDevices { ranks: String },
    #[error(
        "rank {ranks}: share one device ({slot}), and NCCL takes one rank a device; start as many workers as there are devices, or \
         set parallel.device = \"cpu\""
    )]
    SharedDevice { ranks: String, slot: String },
    #[error("step {step}: {source}")]
    Collective { step: u64, source: CollectiveError },
    /// Outside of any step.
    #[error(transparent)]
    Outside(CollectiveError),
    #[error("step {step}: {source}")]
    DeviceCollective { step: u64, source: Box<mentee_collectives::DeviceError> },
    #[error("step {step}: {source}")]
    Step { step: u64, source: SslError },
    #[error(transparent)]
    Ssl(#[from] SslError),
    #[error(
        "after step {step}: the loss on rank {ranks} is not finite, no rank was updated; {}", against_infinity(*.step)
    )]
    LossNotFinite { step: u64, ranks: String },
    #[error(
        "after step {step}: the gradient of {tensor} is not finite (it comes from rank {ranks}), no rank was updated; {}",
        against_infinity(*.step)
    )]
    GradientNotFinite { step: u64, tensor: String, ranks: String },
    #[error(
        "the features of {0} are not finite: the encoder has diverged; go back to an older checkpoint, lower optimizer.base_lr, or \
         lengthen schedule.warmup_epochs"
    )]
    FeaturesNotFinite(String),
    #[error(
        "step {}: z_std is {z_std:.3}, below {threshold:.3} for {steps} steps: the projections have collapsed; see the asymmetries in [method], or set run.on_collapse", .step + 1
    )]
    Collapsed { step: u64, z_std: f64, threshold: f64, steps: u64 },
    #[error(
        "step {}: {tensor} on rank {ranks} is not what the other ranks hold; no checkpoint was written of it, start again from the last one (a fault of memory or of the network: watch those ranks' machines)", .step + 1
    )]
    WeightsDiffer { step: u64, tensor: String, ranks: String },
    #[error(
        "model.init = {path}: {problem}; give the weights of this model.backbone under torchvision's names"
    )]
    Import { path: PathBuf, problem: String },
    #[error("failed to {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    Failed(String),
    /// Every rank knows of the failure; one of them says it.
    #[error("{}", says.as_ref().map_or("another rank failed and has said why".to_owned(), |e| e.to_string()))]
    Known { says: Option<Box<WorkerError>>, exit_code: i32 },
}

/// The ranks that a failed call follows from, as [`WorkerError::peers`] has them.
pub fn missed(kind: &ErrorKind) -> Option<Vec<u32>> {
    match kind {
        ErrorKind::Timeout { missing, .. } => Some(missing.clone()),
        ErrorKind::PeerFailed { rank, .. } | ErrorKind::PeerLeft { rank } => Some(vec![*rank]),
        // What MPI says of a peer that is gone depends on the library and the network.
        ErrorKind::Mpi { .. } => Some(Vec::new()),
        _ => None,
    }
}

/// What to do about a checkpoint that cannot be used.
fn advice(error: &CheckpointError) -> &'static str {
    match error {
        _ if error.is_passing() => "; see to that and start again: the checkpoints may be intact",
        CheckpointError::NoneUsable { .. } => "", // says it
        _ => "; restore or remove that checkpoint to go on from an older one",
    }
}

/// What to do about values that are not finite.
fn against_infinity(step: u64) -> &'static str {
    match step {
        // Nothing has been learned yet that could have been too much.
        0 => {
            "it is the first update: look at the images (mentee data verify), model.init, views.mean, views.std and method.temperature"
        }
        _ => "lower optimizer.base_lr, or lengthen schedule.warmup_epochs",
    }
}

impl WorkerError {
    /// The documented code of a process that ends with this.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_)
            | Self::Identity(_)
            | Self::OtherRecipe { .. }
            | Self::OtherRecipesCheckpoint { .. }
            | Self::SharedDevice { .. }
            | Self::Import { .. } => exit_code::USAGE,
            // What MPI says while it starts may be that another rank is gone.
            Self::Start(StartError::Mpi { .. }) => exit_code::FAILED,
            Self::Start(_) => exit_code::USAGE,
            Self::Config(error) => error.exit_code(),
            Self::Data(error) => error.exit_code(),
            Self::OtherData(_) => exit_code::DATA,
            Self::Checkpoint(error) if error.is_passing() => exit_code::FAILED,
            Self::Checkpoint(_) | Self::CheckpointContent { .. } | Self::NoCheckpoint(_) => {
                exit_code::CHECKPOINT
            }
            Self::LossNotFinite { .. }
            | Self::GradientNotFinite { .. }
            | Self::FeaturesNotFinite(_)
            | Self::Collapsed { .. } => exit_code::DIVERGED,
            Self::Disagreement { what, .. } => match what.as_str() {
                "data digest" => exit_code::DATA,
                "next step" | "digest of the initial state" => exit_code::FAILED,
                _ => exit_code::USAGE, // the version, the plan, a key of the recipe
            },
            Self::Link(LinkError::Refused { exit_code, .. }) | Self::Known { exit_code, .. } => *exit_code,
            _ => exit_code::FAILED,
        }
    }

    /// Marks a failure that every rank has found; the rank for which `says` holds reports it.
    pub fn known(self, says: bool) -> Self {
        let exit_code = self.exit_code();
        Self::Known { says: says.then(|| Box::new(self)), exit_code }
    }

    /// The ranks that this failure follows from, empty when it is not known which; none when it is this rank's own.
    pub fn peers(&self) -> Option<Vec<u32>> {
        if let Self::DeviceCollective { source, .. } = self {
            return match source.kind {
                // The device itself, or this rank's set-up.
                DeviceErrorKind::Device(_)
                | DeviceErrorKind::Library(_)
                | DeviceErrorKind::BlockingForced { .. }
                | DeviceErrorKind::Call { code: CUDA_FAILED, .. }
                | DeviceErrorKind::Asynchronous { code: CUDA_FAILED, .. } => None,
                _ => Some(Vec::new()), // NCCL says that a peer is gone, not which
            };
        }
        let (Self::Collective { source, .. } | Self::Outside(source)) = self else { return None };
        missed(&source.kind)
    }

    /// Whether every rank has found it.
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Known { .. })
    }

    /// Whether another rank reports it.
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::Known { says: None, .. })
    }

    /// For `map_err` on file operations.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

impl From<mentee_collectives::CollectiveError> for WorkerError {
    /// Outside of any step.
    fn from(source: mentee_collectives::CollectiveError) -> Self {
        Self::Outside(source)
    }
}

impl From<tch::TchError> for WorkerError {
    fn from(error: tch::TchError) -> Self {
        Self::Ssl(error.into())
    }
}

impl From<mentee_torch_ext::TorchError> for WorkerError {
    fn from(error: mentee_torch_ext::TorchError) -> Self {
        Self::Ssl(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_differ_end_with_the_code_of_what_differs() {
        let refused = |exit_code| LinkError::Refused {
            rank: 1,
            address: "here:1".into(),
            reason: "no".into(),
            exit_code,
        };
        assert_eq!(WorkerError::from(refused(3)).exit_code(), exit_code::DATA);
        assert_eq!(WorkerError::from(refused(2)).exit_code(), exit_code::USAGE);
        let table =
            [("version", 2), ("plan hash", 2), ("eval.path", 2), ("data digest", 3), ("next step", 1)];
        for (what, code) in table {
            let (found, expected) = ("a".into(), "b".into());
            let error = WorkerError::Disagreement { rank: 1, what: what.into(), found, expected };
            assert_eq!(error.known(true).exit_code(), code, "{what}");
        }
    }

    #[test]
    fn a_rank_lost_while_mpi_starts_is_a_failure_and_another_world_bad_usage() {
        let lost = StartError::Mpi { code: 15, text: "MPI_Comm_split_type".into() };
        assert_eq!(WorkerError::from(lost).exit_code(), exit_code::FAILED);
        assert_eq!(WorkerError::from(StartError::NotBuilt).exit_code(), exit_code::USAGE);
    }

    #[test]
    fn only_a_damaged_checkpoint_is_a_run_that_cannot_go_on() {
        let folder = || PathBuf::from("step-00000003");
        let io = || CheckpointError::Io {
            action: "read",
            path: folder(),
            source: std::io::ErrorKind::StaleNetworkFileHandle.into(),
        };
        let damaged = || CheckpointError::NoManifest { folder: folder() };
        let none = |reasons| CheckpointError::NoneUsable { folder: folder(), reasons };
        for (error, code) in [
            (io(), exit_code::FAILED),
            (CheckpointError::OutOfMemory { path: folder(), bytes: 9 }, exit_code::FAILED),
            (none(vec![io(), io()]), exit_code::FAILED),
            (none(vec![io(), damaged()]), exit_code::CHECKPOINT),
            (damaged(), exit_code::CHECKPOINT),
        ] {
            let error = WorkerError::from(error);
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
