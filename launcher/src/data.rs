//! `mentee data`: what is in a data set, whether it is whole, and which rank gets which sample when.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mentee_config::recipe::DataFormat;
use mentee_config::say::Results;
use mentee_config::{Plan, Recipe, counted, exit_code, plan, show};
use mentee_data::decode::Reading;
use mentee_data::digest::{OrderDigest, Running};
use mentee_data::{OnError, check, open_training, order as order_of};

use crate::failure::Failure;
use crate::progress::Counter;
use crate::shard::{ReadingArgs, format, human_bytes};

/// `mentee data`.
#[derive(Debug, clap::Subcommand)]
pub enum DataCommand {
    /// Reads every shard and decodes every image; names everything that is wrong
    Verify {
        /// A data set
        #[arg(value_name = "DIR")]
        path: PathBuf,
        /// What it is, when it cannot be told by looking
        #[arg(long, value_parser = format(), default_value = "auto", value_name = "FORMAT")]
        format: DataFormat,
    },
    /// Says what is in a data set: classes, sizes, colours
    Stats {
        /// A data set
        #[arg(value_name = "DIR")]
        path: PathBuf,
        /// What it is, when it cannot be told by looking
        #[arg(long, value_parser = format(), default_value = "auto", value_name = "FORMAT")]
        format: DataFormat,
        /// As one JSON array, an object a part
        #[arg(long)]
        json: bool,
        /// Also write a contact sheet of up to 64 images, as PNG
        #[arg(long, value_name = "FILE.png")]
        sheet: Option<PathBuf>,
        #[command(flatten)]
        reading: ReadingArgs,
    },
    /// Prints the sample ids each rank gets, step by step
    Order(OrderArgs),
}

/// `mentee data order`.
#[derive(Debug, clap::Args)]
pub struct OrderArgs {
    /// A recipe: the path of a .toml file, or the name of a built-in one
    pub recipe: String,
    /// Ranks
    #[arg(long, default_value_t = 1, value_name = "W", value_parser = clap::value_parser!(u32).range(1..))]
    pub world: u32,
    /// Stop after so many epochs [default: those of the recipe, 1 with --hash]
    #[arg(long, value_name = "E")]
    pub epochs: Option<u64>,
    /// Begin at this step, from 0
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub from_step: u64,
    /// One digest of ids and both views' bytes, in global order
    #[arg(long)]
    pub hash: bool,
    /// With --hash: from step S on with W ranks, as after a resume; may be given several times
    #[arg(long, value_name = "S:W", value_parser = change, requires = "hash")]
    pub resume: Vec<(u64, u32)>,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

fn change(text: &str) -> Result<(u64, u32), String> {
    let (step, world) = text.split_once(':').ok_or("a step and a number of ranks, as 300:4")?;
    match (step.parse(), world.parse()) {
        (Ok(step), Ok(world)) if world > 0 => Ok((step, world)),
        _ => Err("a step and a number of ranks, as 300:4".to_owned()),
    }
}

/// `mentee data …`.
///
/// # Errors
/// [`Failure`] with exit code 3 when data is missing or damaged.
pub fn command(command: &DataCommand) -> Result<(), Failure> {
    match command {
        DataCommand::Verify { path, format } => verify(path, *format),
        DataCommand::Stats { path, format, json, sheet, reading } => {
            let reading = reading.reading();
            if let Some(sheet) = sheet {
                let png =
                    check::contact_sheet(path, *format, reading).map_err(|error| error.with_key("DIR"))?;
                std::fs::write(sheet, png).map_err(|error| Failure::io("write", sheet, &error))?;
            }
            stats(path, *format, reading, *json)
        }
        DataCommand::Order(args) => order(args),
    }
}

fn images_in_files(images: u64, files: u64) -> String {
    format!("{} in {}", counted(images, "image"), counted(files, "file"))
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn verify(path: &Path, format: DataFormat) -> Result<(), Failure> {
    let counter = Mutex::new(Counter::new("images"));
    let report = check::verify(path, format, threads(), &|done, total| {
        counter.lock().unwrap_or_else(std::sync::PoisonError::into_inner).at(done, total);
    });
    counter.lock().unwrap_or_else(std::sync::PoisonError::into_inner).finish();
    let report = report.map_err(|error| error.with_key("DIR"))?;
    for line in report.notes.iter().chain(&report.problems) {
        show!("{line}");
    }
    let looked_at =
        format!("{}, {}", images_in_files(report.samples, report.files), human_bytes(report.bytes));
    match report.problems.len() {
        0 => {
            show!("{}: all well: {looked_at}", path.display());
            Ok(())
        }
        problems if problems == report.refused => Err(Failure::failed(format!(
            "{}: {} could not be looked at among {looked_at}: look again when the system lets it",
            path.display(),
            counted(problems as u64, "place")
        ))),
        problems => Err(Failure {
            exit_code: exit_code::DATA,
            line: format!(
                "{}: {} among {looked_at}: repair or remove what is named above",
                path.display(),
                counted(problems as u64, "problem")
            ),
        }),
    }
}

fn stats(path: &Path, format: DataFormat, reading: Reading, json: bool) -> Result<(), Failure> {
    let parts = check::stats(path, format, reading, threads()).map_err(|error| error.with_key("DIR"))?;
    if json {
        show!("{:#}", serde_json::json!(parts));
        return Ok(());
    }
    for part in parts {
        show!("{}", part.part);
        show!("  {}, {}", images_in_files(part.samples, part.files), human_bytes(part.bytes));
        let sides = |[small, median, large]: [u32; 3]| format!("{small} to {large}, median {median}");
        show!("  width {}; height {} (of {} decoded)", sides(part.width), sides(part.height), part.decoded);
        let three = |values: [f64; 3]| values.map(|value| format!("{value:.4}")).join(", ");
        show!("  mean [{}]  std [{}]  (RGB in [0, 1])", three(part.mean), three(part.std));
        if part.classes.is_empty() {
            show!("  no labels");
        } else {
            show!("  {}:", counted(part.classes.len() as u64, "class"));
            // More than a screenful says less than its ends.
            let shown = if part.classes.len() > 40 { 20 } else { part.classes.len() };
            for (name, count) in &part.classes[..shown] {
                show!("    {count:>8}  {name}");
            }
            if shown < part.classes.len() {
                show!("    … {} more (--json lists all)", part.classes.len() - shown);
            }
        }
        if part.unlabelled > 0 {
            show!("  {} without a label", counted(part.unlabelled, "image"));
        }
        show!("  digest {}", part.digest);
        for note in &part.notes {
            show!("  {note}");
        }
    }
    Ok(())
}

fn order(args: &OrderArgs) -> Result<(), Failure> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let source = open_training(&recipe)?;
    let plan = Plan::new(recipe, source.len(), args.world)?;
    let Plan { recipe, steps_per_epoch, .. } = &plan;
    let batch = recipe.schedule.global_batch;
    let order = order_of(&*source, recipe.data.order, recipe.run.seed, batch);
    let default_epochs = if args.hash { 1 } else { recipe.schedule.epochs };
    let end = args.epochs.unwrap_or(default_epochs).saturating_mul(*steps_per_epoch);
    let steps = args.from_step..end;
    if steps.is_empty() {
        return Err(Failure::usage(format!(
            "--from-step {}: the last step is {}",
            args.from_step,
            end.saturating_sub(1)
        )));
    }
    let shares: Vec<_> = (0..args.world).map(|rank| plan::share(batch, rank, args.world)).collect();
    if args.hash {
        let mut counter = Counter::new("steps");
        let mut running = Running::default();
        // Each stretch with its own ranks, every one with a loader that starts where the last had come to.
        let mut changes = args.resume.clone();
        changes.retain(|(step, _)| steps.contains(step));
        changes.sort_unstable();
        let (mut from, mut world) = (steps.start, args.world);
        for (until, next_world) in changes.into_iter().chain([(steps.end, args.world)]) {
            let digest = OrderDigest {
                source: source.clone(),
                order: order.clone(),
                views: recipe.views.clone(),
                seed: recipe.run.seed,
                shares: (0..world).map(|rank| plan::share(batch, rank, world)).collect(),
                steps: from..until,
                on_error: OnError::of(&recipe.data),
                threads: threads(),
            };
            let (before, total) = (from - steps.start, steps.end - steps.start);
            digest.update(&mut running, &mut |done, _| counter.at(before + done, total))?;
            (from, world) = (until, next_world);
        }
        counter.finish();
        show!("{}", running.finish());
        return Ok(());
    }
    let mut out = Results::new();
    for step in steps {
        for (rank, share) in shares.iter().enumerate() {
            let (epoch, ids) = order.share(step, share.clone());
            let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
            out.line(format_args!("step {step} epoch {epoch} rank {rank}: {}", ids.join(" ")));
        }
    }
    out.flush();
    Ok(())
}
