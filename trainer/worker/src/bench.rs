//! `mentee-worker bench step`: the training step on made-up views, without loader and checkpoints.

use std::time::Instant;

use mentee_collectives::bench;
use mentee_config::plan::share;
use mentee_config::{Plan, Recipe, exit_code};
use mentee_ssl::state::VIEWS;
use mentee_torch_ext::cuda;
use tch::{Device, Kind, Tensor};

use crate::device::{self, DeviceGroup};
use crate::error::WorkerError;
use crate::passes::Passes;
use crate::reducer::GradientReducer;
use crate::{agree, metrics, setup};

/// What to measure.
#[derive(clap::Subcommand)]
pub enum BenchCommand {
    /// The training step: forward, backward, reduction, update, teacher.
    Step(StepArgs),
    /// The all-reduce over the ranks of this world, from 4 KiB to 400 MiB.
    Allreduce(AllreduceArgs),
}

/// `bench allreduce`
#[derive(clap::Args)]
pub struct AllreduceArgs {
    /// About how long each size is measured, seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// How many ranks take part; `mentee bench` starts them.
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Whose memory is summed: `cuda` is that of the ranks' devices, over NCCL.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = ["cpu", "cuda"])]
    device: String,
    /// One JSON object a size.
    #[arg(long)]
    json: bool,
}

/// What makes a step fast and can be left out. (A message a tensor instead of large buckets is
/// `--set parallel.bucket_mib=1e-9`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Gain {
    /// Sums gradients after the backward pass instead of beside it.
    Overlap,
    /// Launches a device's kernels one by one instead of as one graph.
    Graph,
    /// Passes the two views through each network one after the other.
    OnePass,
}

/// `bench step`
#[derive(clap::Args)]
pub struct StepArgs {
    /// The recipe whose networks, batch and precision are measured.
    #[arg(default_value = "byol-cifar10-small")]
    recipe: String,
    /// Changes one key of the recipe.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Measured steps.
    #[arg(long, default_value_t = 10)]
    steps: u64,
    /// Steps before those.
    #[arg(long, default_value_t = 3)]
    warmup: u64,
    /// How many ranks share the batch; `mentee bench` starts them.
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Leaves out what makes the step fast, to see what it buys.
    #[arg(long, value_enum, value_name = "WHAT")]
    without: Vec<Gain>,
    /// Waits for the device after each phase, so that the breakdown is the device's own; the step itself gets slower.
    #[arg(long)]
    profile: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Medians over the measured steps.
#[derive(serde::Serialize)]
struct Report {
    images_per_s: f64,
    step_ms: f64,
    breakdown_ms: Breakdown,
    /// Summing gradients; what of it training waited for is the breakdown's `reduce`.
    communication_ms: f64,
    peak_rss_mb: f64,
    /// Most memory of tensors on the device; none on the processor.
    peak_device_mb: Option<f64>,
    device: String,
    /// Of the last step.
    loss: f64,
    n: u64,
    world_size: u32,
    threads: i32,
}

#[derive(serde::Serialize)]
struct Breakdown {
    forward: f64,
    backward: f64,
    reduce: f64,
    update: f64,
}

/// That there are as many ranks as asked for.
fn check_workers(workers: Option<u32>, place: &setup::Place) -> Result<(), WorkerError> {
    match (workers, place.identity.world_size) {
        (Some(workers), started) if workers != started => Err(WorkerError::Usage(format!(
            "--workers {workers}, but this is one of {started} ranks: start it as `mentee bench … --workers {workers}`"
        ))),
        _ => Ok(()),
    }
}

/// Runs a benchmark.
pub fn command(command: &BenchCommand) -> Result<i32, WorkerError> {
    let place = setup::place()?;
    let result = match command {
        BenchCommand::Step(args) => step(args, &place),
        BenchCommand::Allreduce(args) => all_reduce(args, &place),
    };
    match result {
        Ok(()) => {
            place.collectives.finish().map_err(|error| WorkerError::Failed(error.to_string()))?;
            Ok(exit_code::DONE)
        }
        Err(error) => Err(agree::leave(&*place.collectives, error)),
    }
}

fn all_reduce(args: &AllreduceArgs, place: &setup::Place) -> Result<(), WorkerError> {
    check_workers(args.workers, place)?;
    let rows = if args.device == "cuda" {
        all_reduce_devices(args.seconds, place)?
    } else {
        bench::all_reduce(&*place.collectives, &bench::SIZES, args.seconds)
            .map_err(|source| WorkerError::Collective { step: 0, source })?
    };
    if place.identity.rank != 0 {
        return Ok(());
    }
    if !args.json {
        println!("{}", bench::HEADER);
    }
    for row in &rows {
        if args.json {
            println!("{}", row.to_json());
        } else {
            println!("{row}");
        }
    }
    Ok(())
}

/// In device memory, over the group that trains.
fn all_reduce_devices(seconds: f64, place: &setup::Place) -> Result<Vec<bench::Row>, WorkerError> {
    let recipe = Recipe::load("byol-cifar10-small", &["parallel.device=cuda".to_owned()])?;
    let device = device::of_recipe(&recipe, &place.identity)?;
    let Some(group) = DeviceGroup::start(&place.collectives, &recipe, device)? else {
        return Err(WorkerError::Usage(
            "a world of one has nobody to sum with: give --workers 2 or more".into(),
        ));
    };
    let rows = bench::SIZES.iter().map(|&bytes| {
        let mut values = Tensor::f_zeros([bytes as i64 / 4], (Kind::Float, device))?;
        bench::measure_by(&*place.collectives, bytes, seconds, || group.sum(&mut values))
    });
    let rows = rows.collect::<Result<Vec<_>, WorkerError>>()?;
    group.finish()?;
    Ok(rows)
}

fn step(args: &StepArgs, place: &setup::Place) -> Result<(), WorkerError> {
    check_workers(args.workers, place)?;
    let (identity, collectives) = (place.identity, &place.collectives);
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let batch = recipe.schedule.global_batch;
    let plan = Plan::new(recipe, batch.saturating_mul(args.steps.max(1)), identity.world_size)?;
    let recipe = &plan.recipe;
    setup::threads(recipe, &identity);
    let device = device::of_recipe(recipe, &identity)?;
    let group = DeviceGroup::start(collectives, recipe, device)?;
    let (method, mut state) = mentee_ssl::state::on(recipe, device)?;
    state.one_pass = !args.without.contains(&Gain::OnePass);
    let mut reducer =
        GradientReducer::new(collectives, group.as_ref(), &mut state, recipe.parallel.bucket_mib)?;
    let stat_reduce = setup::stat_reduce(recipe, collectives, group.as_ref());
    let schedule = mentee_ssl::Schedule::new(&plan);

    let own = share(batch, identity.rank, identity.world_size);
    let side = i64::from(recipe.views.size);
    let shape = [VIEWS * (own.end - own.start) as i64, side, side, 3];
    tch::manual_seed(1);
    let views = Tensor::randn(shape, (Kind::Float, Device::Cpu)).permute([0, 3, 1, 2]);
    let kinds = mentee_ssl::state::kinds(recipe.parallel.precision);
    let kind = if device == Device::Cpu { kinds.master } else { kinds.compute };
    let views = views.f_to_device(device)?.f_to_kind(kind)?;
    let may_record = collectives.world_size() == 1 && !args.profile && !args.without.contains(&Gain::Graph);
    let mut passes = Passes::new(device, may_record)?;
    let wait = || -> Result<(), WorkerError> {
        if let Device::Cuda(index) = device
            && args.profile
        {
            cuda::synchronise(index)?;
        }
        Ok(())
    };

    // [forward, backward, reduce, update, all, communication] of each measured step, milliseconds.
    let mut times: Vec<[f64; 6]> = Vec::new();
    let mut loss = f64::NAN;
    for n in 0..args.warmup + args.steps {
        let at_step = |source| WorkerError::Step { step: n, source };
        let rates = schedule.at(n);
        let start = Instant::now();
        reducer.begin(&mut state.gradients, None).map_err(at_step)?;
        if !args.without.contains(&Gain::Overlap) {
            reducer.last_pass();
        }
        let mut forward = start.elapsed();
        let out = passes.run(&views, |views| -> Result<_, WorkerError> {
            let out =
                state.loss(&*method, views, batch, recipe.parallel.norm_statistics, stat_reduce.as_ref())?;
            wait()?;
            forward = start.elapsed();
            state.backward(&out.loss)?;
            Ok(out)
        })?;
        wait()?;
        let backward = start.elapsed();
        let communication = reducer.finish(n)?;
        loss = agree::on_step(&**collectives, n, &out, false)?.loss;
        agree::on_gradient(&**collectives, n, &state, || reducer.own_was_finite())?;
        let updating = start.elapsed();
        state.update(&rates, n).map_err(at_step)?;
        state.move_teacher(recipe.method.teacher, &rates, false).map_err(at_step)?;
        wait()?;
        let end = start.elapsed();
        if n >= args.warmup {
            times.push(
                [
                    forward,
                    backward - forward,
                    communication.exposed,
                    end - updating,
                    end,
                    communication.total,
                ]
                .map(|time| time.as_secs_f64() * 1e3),
            );
        }
    }
    let median = |of: &dyn Fn(&[f64; 6]) -> f64| {
        let mut values: Vec<f64> = times.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let step_ms = median(&|t| t[4]);
    let report = Report {
        images_per_s: batch as f64 * 1e3 / step_ms,
        step_ms,
        communication_ms: median(&|t| t[5]),
        breakdown_ms: Breakdown {
            forward: median(&|t| t[0]),
            backward: median(&|t| t[1]),
            reduce: median(&|t| t[2]),
            update: median(&|t| t[3]),
        },
        peak_rss_mb: metrics::peak_rss_mb(),
        peak_device_mb: match device {
            Device::Cuda(index) => {
                cuda::peak_bytes(index).ok().map(|bytes| bytes as f64 / f64::from(1 << 20))
            }
            _ => None,
        },
        device: format!("{device:?}").to_lowercase(),
        loss,
        n: args.steps,
        world_size: identity.world_size,
        threads: tch::get_num_threads(),
    };
    if identity.rank != 0 {
        return Ok(());
    }
    if args.json {
        let text = serde_json::to_string(&report).map_err(|error| WorkerError::Failed(error.to_string()))?;
        println!("{text}");
    } else {
        let Breakdown { forward, backward, reduce, update } = report.breakdown_ms;
        println!(
            "{:.1} images/s · step {step_ms:.1} ms (forward {forward:.1}, backward {backward:.1}, reduce \
             {reduce:.1} of {:.1}, update {update:.1}) · peak {:.0} MiB · {} ranks of {} threads · n = {}",
            report.images_per_s,
            report.communication_ms,
            report.peak_rss_mb,
            report.world_size,
            report.threads,
            report.n
        );
    }
    Ok(())
}
