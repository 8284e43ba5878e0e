//! `mentee bench`: what this machine can do. The loader and the coordinator are measured here, without libtorch; the
//! rest is forwarded to `mentee-worker`.

mod coordinator;

use std::path::PathBuf;

use mentee_config::recipe::DataFormat;
use mentee_config::{Recipe, counted, show};
use mentee_data::bench::{LoaderBench, LoaderReport};
use mentee_data::{DataError, Split, bench, open_split};

use crate::failure::Failure;
use crate::progress::Counter;
use crate::shard::format;

pub use coordinator::command as coordinator;

/// Shown below the help of `mentee bench`.
pub const EXAMPLES: &str = "Examples:
  mentee bench step byol-cifar10-resnet18 --set parallel.precision=bf16
  mentee bench allreduce --workers 4
  mentee bench loader --data data/shards --threads 1,2,4";

/// More images than anyone waits for.
const MOST_IMAGES: u64 = 1_000_000_000;
/// More threads than any machine has processors.
const MOST_THREADS: i64 = 4096;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Reading, decoding and augmenting, alone and by the whole loader
    Loader(LoaderArgs),
    #[command(flatten)]
    Worker(mentee_commands::BenchCommand),
    /// How many workers one supervisor can look after
    Coordinator(coordinator::CoordinatorArgs),
}

/// `mentee bench loader`.
#[derive(Debug, clap::Args)]
pub struct LoaderArgs {
    /// A recipe: the path of a .toml file, or the name of a built-in one
    #[arg(default_value = "byol-imagenet-resnet50-100ep")]
    recipe: String,
    /// A data set instead of the recipe's
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// What the data set is, when it cannot be told by looking
    #[arg(long, value_parser = format(), default_value = "auto", value_name = "FORMAT")]
    format: DataFormat,
    /// Images in each measurement [default: what takes about a second]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_IMAGES))]
    images: Option<u64>,
    /// Measurements of everything, in turns; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Numbers of decode threads to measure the whole loader with [default: 1, 2, 4, … up to the processors]
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = clap::value_parser!(u32).range(0..=MOST_THREADS))]
    threads: Option<Vec<u32>>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
}

/// `mentee bench loader …`.
///
/// # Errors
/// [`Failure`] with exit code 2 for a bad recipe, 3 for bad data.
pub fn loader(args: &LoaderArgs) -> Result<(), Failure> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let (path, data_format) = match &args.data {
        Some(path) => (path.clone(), args.format),
        None => (recipe.data.path.clone(), recipe.data.format),
    };
    let source = open_split(&path, data_format, Split::Train)?
        .ok_or(DataError::Missing { key: "data.path".into(), path })?;
    let images = args.images.unwrap_or(if recipe.views.size > 64 { 400 } else { 20_000 });
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match &args.threads {
        Some(threads) => threads.iter().filter(|&&n| n > 0).map(|&n| n as usize).collect(),
        None => std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n <= processors).collect(),
    };
    let what = LoaderBench {
        source,
        views: recipe.views,
        seed: recipe.run.seed,
        images,
        rounds: args.rounds as usize,
        threads,
    };
    let mut counter = Counter::new("measurements");
    let report = bench::loader(&what, &mut |done, total| counter.at(done, total));
    counter.finish();
    print(&report?, args.json);
    Ok(())
}

fn print(report: &LoaderReport, json: bool) {
    if json {
        show!("{}", serde_json::json!(report));
        return;
    }
    show!(
        "{:.0} images per CPU-second, {:.0} images per second (both views of {} images, medians of {})",
        report.images_per_cpu_s,
        report.images_per_s,
        report.images,
        report.n
    );
    let stages = &report.stages_us;
    show!(
        "microseconds of CPU per image: read {:.1}, decode {:.1}, resize {:.1}, colour and blur {:.1}",
        stages.read,
        stages.decode,
        stages.resize,
        stages.colour
    );
    for line in &report.threads {
        show!(
            "{}: {:.0} images/s, {:.0} per CPU-second",
            counted(line.threads as u64, "decode thread"),
            line.images_per_s,
            line.images_per_cpu_s
        );
    }
}
