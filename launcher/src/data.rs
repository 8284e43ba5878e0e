//! `mentee data`: what is in a data set, whether it is whole, and which rank gets which sample when.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mentee_config::recipe::DataFormat;
use mentee_config::{Plan, Recipe, exit_code, plan};
use mentee_data::digest::{OrderDigest, Running};
use mentee_data::{DataError, Order, Split, check, open_split};

use crate::failure::Failure;
use crate::progress::Counter;
use crate::shard::{format, human_bytes};

/// `mentee data`.
#[derive(Debug, clap::Subcommand)]
pub enum DataCommand {
    /// Reads every shard and decodes every image; names everything that is wrong
    Verify {
        /// A data set
        path: PathBuf,
        /// What it is, when it cannot be told by looking
        #[arg(long, value_parser = format, default_value = "auto", value_name = "FORMAT")]
        format: DataFormat,
    },
    /// Says what is in a data set: classes, sizes, colours
    Stats {
        /// A data set
        path: PathBuf,
        /// What it is, when it cannot be told by looking
        #[arg(long, value_parser = format, default_value = "auto", value_name = "FORMAT")]
        format: DataFormat,
        /// As one JSON array, an object a part
        #[arg(long)]
        json: bool,
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
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

/// `mentee data …`.
///
/// # Errors
/// [`Failure`] with exit code 3 when data is missing or damaged.
pub fn command(command: &DataCommand) -> Result<(), Failure> {
    match command {
        DataCommand::Verify { path, format } => verify(path, *format),
        DataCommand::Stats { path, format, json } => stats(path, *format, *json),
        DataCommand::Order(args) => order(args),
    }
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
    for problem in &report.problems {
        println!("{problem}");
    }
    let looked_at =
        format!("{} images in {} files, {}", report.samples, report.files, human_bytes(report.bytes));
    match report.problems.len() {
        0 => {
            println!("{}: all well: {looked_at}", path.display());
            Ok(())
        }
        problems => Err(Failure {
            exit_code: exit_code::DATA,
            line: format!(
                "{}: {problems} problems among {looked_at}: repair or remove what is named above",
                path.display()
            ),
        }),
    }
}

fn stats(path: &Path, format: DataFormat, json: bool) -> Result<(), Failure> {
    let parts = check::stats(path, format, threads()).map_err(|error| error.with_key("DIR"))?;
    if json {
        println!("{:#}", serde_json::json!(parts));
        return Ok(());
    }
    for part in parts {
        println!("{}", part.part);
        println!("  {} images in {} files, {}", part.samples, part.files, human_bytes(part.bytes));
        let sides = |[small, median, large]: [u32; 3]| format!("{small} to {large}, median {median}");
        println!(
            "  width {}; height {} (of {} decoded)",
            sides(part.width),
            sides(part.height),
            part.decoded
        );
        let three = |values: [f64; 3]| values.map(|value| format!("{value:.4}")).join(", ");
        println!("  mean [{}]  std [{}]  (RGB in [0, 1])", three(part.mean), three(part.std));
        if part.classes.is_empty() {
            println!("  no labels");
        } else {
            println!("  {} classes:", part.classes.len());
            // More than a screenful says less than its ends.
            let shown = if part.classes.len() > 40 { 20 } else { part.classes.len() };
            for (name, count) in &part.classes[..shown] {
                println!("    {count:>8}  {name}");
            }
            if shown < part.classes.len() {
                println!("    … {} more (--json lists all)", part.classes.len() - shown);
            }
        }
        if part.unlabelled > 0 {
            println!("  {} images without a label", part.unlabelled);
        }
        println!("  digest {}", part.digest);
    }
    Ok(())
}

fn order(args: &OrderArgs) -> Result<(), Failure> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let path = recipe.data.path.clone();
    let source = open_split(&path, recipe.data.format, Split::Train)?
        .ok_or(DataError::Missing { key: "data.path".into(), path })?;
    let plan = Plan::new(recipe, source.len(), args.world)?;
    let Plan { recipe, num_samples, steps_per_epoch, .. } = &plan;
    let batch = recipe.schedule.global_batch;
    let order = Order::new(recipe.run.seed, *num_samples, batch);
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
        let digest = OrderDigest {
            source,
            order,
            views: recipe.views.clone(),
            seed: recipe.run.seed,
            shares,
            steps,
            threads: threads(),
        };
        let mut counter = Counter::new("steps");
        let mut running = Running::default();
        let result = digest.update(&mut running, &mut |done, total| counter.at(done, total));
        counter.finish();
        result?;
        println!("{}", running.finish());
        return Ok(());
    }
    use std::io::Write;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for step in steps {
        for (rank, share) in shares.iter().enumerate() {
            let (epoch, ids) = order.share(step, share.clone());
            let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
            if writeln!(out, "step {step} epoch {epoch} rank {rank}: {}", ids.join(" ")).is_err() {
                return Ok(()); // the reader has seen enough (`| head`)
            }
        }
    }
    let _ = out.flush();
    Ok(())
}
