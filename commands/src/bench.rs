//! `mentee bench`: the measurements that need libtorch or MPI.

use std::path::PathBuf;

use crate::positive;

/// More steps or checkpoints than anyone waits for; sums and products of two such numbers are exact.
const MOST: u64 = 1_000_000;
/// Workers that `mentee bench allreduce` starts unless told otherwise: one has nobody to sum with.
const ALLREDUCE_WORKERS: u32 = 2;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// The training step: forward, backward, reduction, update, teacher
    Step(StepArgs),
    /// What checkpoints cost the training step
    Checkpoint(CheckpointArgs),
    /// The all-reduce over several ranks, from 4 KiB to 400 MiB
    Allreduce(AllreduceArgs),
}

impl BenchCommand {
    /// How many workers `mentee` starts for it.
    pub fn workers(&self) -> u32 {
        match self {
            Self::Step(args) => args.workers.unwrap_or(1),
            Self::Checkpoint(args) => args.workers.unwrap_or(1),
            Self::Allreduce(args) => args.workers.unwrap_or(ALLREDUCE_WORKERS),
        }
    }
}

/// `bench step`
#[derive(Debug, clap::Args)]
pub struct StepArgs {
    /// The recipe whose networks, batch and precision are measured
    #[arg(default_value = "byol-cifar10-small")]
    pub recipe: String,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Measured steps
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST))]
    pub steps: u64,
    /// Steps before those
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(..=MOST))]
    pub warmup: u64,
    /// Worker processes that share the batch [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub workers: Option<u32>,
    /// Leaves out what makes the step fast, to see what it buys
    #[arg(long, value_enum, value_name = "WHAT")]
    pub without: Vec<Gain>,
    /// Waits for the device after each phase, so that the breakdown is the device's own; the step itself gets slower
    #[arg(long)]
    pub profile: bool,
    /// Measures as many steps again and lists what ran on the device, or libtorch's operators on the processor
    #[arg(long)]
    pub kernels: bool,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What makes a step fast and can be left out. (A message a tensor instead of large buckets is
/// `--set parallel.bucket_mib=1e-9`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Gain {
    /// sums gradients after the backward pass instead of beside it
    Overlap,
    /// launches a device's kernels one by one instead of as one graph
    Graph,
    /// passes the two views through each network one after the other
    OnePass,
}

/// `bench checkpoint`
#[derive(Debug, clap::Args)]
pub struct CheckpointArgs {
    /// The recipe whose networks, batch and precision are measured
    #[arg(default_value = "byol-imagenet-resnet50-100ep")]
    pub recipe: String,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Steps from one checkpoint to the next, and before the first
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST))]
    pub every: u64,
    /// Checkpoints to write
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST))]
    pub checkpoints: u64,
    /// Steps before the measured ones
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(..=MOST))]
    pub warmup: u64,
    /// Where they are written: a folder that is not there, and is removed afterwards [default: one for temporary files]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Worker processes that share the batch and the checkpoint [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub workers: Option<u32>,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `bench allreduce`
#[derive(Debug, clap::Args)]
pub struct AllreduceArgs {
    /// The recipe whose device is measured
    #[arg(default_value = "byol-cifar10-small")]
    pub recipe: String,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// About how long each size is measured, seconds
    #[arg(long, default_value_t = 1.0, value_name = "S", value_parser = positive)]
    pub seconds: f64,
    /// Worker processes that take part [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub workers: Option<u32>,
    /// Whose memory is summed instead of that of the recipe's device: `cuda` is that of the ranks' devices, over NCCL
    #[arg(long, value_name = "DEVICE", value_parser = ["cpu", "cuda"])]
    pub device: Option<String>,
    /// As one JSON array, an object a size
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        bench: BenchCommand,
    }

    fn parsed(line: &str) -> Result<BenchCommand, String> {
        let words = std::iter::once("bench").chain(line.split(' '));
        Cli::try_parse_from(words).map(|cli| cli.bench).map_err(|error| error.to_string())
    }

    #[test]
    fn workers_as_asked_for_or_as_few_as_make_sense() {
        let of = |line: &str| parsed(line).expect(line).workers();
        assert_eq!(of("step --steps 3 --workers 2 --json"), 2);
        assert_eq!(of("checkpoint --workers=3"), 3);
        assert_eq!(of("allreduce --workers=4"), 4);
        assert_eq!((of("step"), of("checkpoint"), of("allreduce")), (1, 1, 2));
    }

    #[test]
    fn numbers_that_measure_nothing_or_never_end_are_refused() {
        for line in [
            "step --steps 0",
            "step --steps 18446744073709551615",
            "step --warmup 18446744073709551615",
            "step --workers 0",
            "checkpoint --every 0",
            "checkpoint --every 18446744073709551615",
            "checkpoint --checkpoints 18446744073709551615",
            "checkpoint --warmup 18446744073709551615",
            "checkpoint --workers 0",
            "allreduce --seconds nan",
            "allreduce --seconds=-1",
            "allreduce --seconds inf",
            "allreduce --workers 1",
        ] {
            let error = parsed(line).expect_err(line);
            assert!(error.starts_with("error: invalid value"), "{line}: {error}");
        }
        for line in ["step --warmup 0 --steps 1000000", "checkpoint --every 1", "allreduce --seconds 0.001"] {
            parsed(line).expect(line);
        }
    }
}
