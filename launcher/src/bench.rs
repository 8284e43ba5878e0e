//! `mentee bench`: what this machine can do. The loader and the coordinator are measured here, without libtorch; the
//! rest is forwarded to `mentee-worker`.

mod coordinator;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use mentee_config::recipe::DataFormat;
use mentee_config::{Recipe, show};
use mentee_data::bench::{LoaderBench, LoaderReport, loader};
use mentee_data::{DataError, Split, open_split};

use crate::failure::{Failure, parser_said};
use crate::progress::Counter;
use crate::shard::format;

/// `mentee bench loader`: how fast this machine decodes and augments.
#[derive(Debug, Parser)]
#[command(name = "mentee bench loader", disable_version_flag = true)]
struct LoaderArgs {
    /// A recipe: the path of a .toml file, or the name of a built-in one
    #[arg(default_value = "byol-imagenet-resnet50-100ep")]
    recipe: String,
    /// A data set instead of the recipe's
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// What the data set is, when it cannot be told by looking
    #[arg(long, value_parser = format, default_value = "auto", value_name = "FORMAT")]
    format: DataFormat,
    /// Images in each measurement [default: what takes about a second]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    images: Option<u64>,
    /// Measurements of everything, in turns; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Numbers of decode threads to measure the whole loader with [default: 1, 2, 4, … up to the processors]
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = clap::value_parser!(u32).range(0..))]
    threads: Option<Vec<u32>>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
}

/// Whether these arguments of `bench` are served here.
pub fn is_here(arguments: &[OsString]) -> bool {
    arguments.first().is_some_and(|first| first == "loader" || first == "coordinator")
}

/// How many workers the arguments of `bench` ask for; what cannot be read is left to the worker to refuse.
pub fn workers(arguments: &[OsString]) -> u32 {
    let mut words = arguments.iter().filter_map(|word| word.to_str());
    while let Some(word) = words.next() {
        let value = match word.split_once('=') {
            Some(("--workers", value)) => Some(value),
            None if word == "--workers" => words.next(),
            _ => None,
        };
        if let Some(value) = value {
            return value.parse().unwrap_or(1);
        }
    }
    1
}

/// `mentee bench loader …` or `mentee bench coordinator …`; `arguments` begin with that word. Returns the exit code of the
/// argument parser when that has said all there is to say.
///
/// # Errors
/// [`Failure`] with exit code 2 for a bad recipe, 3 for bad data.
pub fn command(arguments: &[OsString]) -> Result<Option<i32>, Failure> {
    if arguments.first().is_some_and(|first| first == "coordinator") {
        return coordinator::command(arguments);
    }
    let args = match LoaderArgs::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => return Ok(Some(parser_said(&error))),
    };
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let (path, data_format) = match args.data {
        Some(path) => (path, args.format),
        None => (recipe.data.path.clone(), recipe.data.format),
    };
    let source = open_split(&path, data_format, Split::Train)?
        .ok_or(DataError::Missing { key: "data.path".into(), path })?;
    let images = args.images.unwrap_or(if recipe.views.size > 64 { 400 } else { 20_000 });
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match args.threads {
        Some(threads) => threads.into_iter().filter(|&n| n > 0).map(|n| n as usize).collect(),
        None => std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n <= processors).collect(),
    };
    let bench = LoaderBench {
        source,
        views: recipe.views,
        seed: recipe.run.seed,
        images,
        rounds: args.rounds as usize,
        threads,
    };
    let mut counter = Counter::new("measurements");
    let report = loader(&bench, &mut |done, total| counter.at(done, total));
    counter.finish();
    print(&report?, args.json);
    Ok(None)
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
            "{} decode threads: {:.0} images/s, {:.0} per CPU-second",
            line.threads,
            line.images_per_s,
            line.images_per_cpu_s
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_wherever_they_stand() {
        let of = |line: &str| workers(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(of("step --steps 3 --workers 2 --json"), 2);
        assert_eq!(of("allreduce --workers=4"), 4);
        assert_eq!(of("step"), 1);
        assert_eq!(of("step --workers many"), 1);
        assert_eq!(of("step --workers"), 1);
    }
}
