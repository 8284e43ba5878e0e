//! `mentee trace`.

use std::path::PathBuf;

/// Records views, weights, losses and gradients of a few steps, for checks against another implementation
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee trace byol-cifar10-small --steps 2 --out trace --set data.path=data/cifar10
  mentee trace runs/try-3/plan.toml --out trace --set parallel.precision=f64")]
pub struct TraceArgs {
    /// A recipe: the path of a .toml file, as a run's plan.toml, or the name of a built-in one
    pub recipe: String,
    /// Steps to record
    #[arg(long, default_value_t = 5, value_name = "K", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// A new folder, or an empty one
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}
