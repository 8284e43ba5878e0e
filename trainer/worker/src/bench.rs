//! `mentee-worker bench`: the training step on made-up views, without loader; the all-reduce; what checkpoints cost.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mentee_checkpoint::Counts;
use mentee_cluster::Phase;
use mentee_collectives::{Collectives, bench};
use mentee_commands::BenchCommand;
use mentee_commands::bench::{AllreduceArgs, CheckpointArgs, Gain, StepArgs};
use mentee_config::{Plan, Recipe, counted, exit_code, show};
use mentee_ssl::state::VIEWS;
use mentee_ssl::{Schedule, SslError, StepLoss};
use mentee_torch_ext::cuda;
use tch::{Device, Kind, Tensor};

use crate::checkpoints::{Checkpoints, Content, Settings};
use crate::device::{self, DeviceGroup};
use crate::error::WorkerError;
use crate::kernels::{Kernel, Kernels};
use crate::learner::Learner;
use crate::link::Reporter;
use crate::metrics::{self, Metrics};
use crate::stop::StopFlag;
use crate::world::World;
use crate::{agree, setup};

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
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<Kernels>,
}

#[derive(serde::Serialize)]
struct Breakdown {
    forward: f64,
    backward: f64,
    reduce: f64,
    update: f64,
}

/// That there are as many ranks as asked for.
fn check_workers(workers: Option<u32>, world: &World) -> Result<(), WorkerError> {
    match (workers, world.identity.world_size) {
        (Some(workers), started) if workers != started => Err(WorkerError::Usage(format!(
            "--workers {workers}, but this is one of {started} ranks: start it as `mentee bench … --workers {workers}`"
        ))),
        _ => Ok(()),
    }
}

/// Runs a benchmark.
pub fn command(command: &BenchCommand) -> Result<i32, WorkerError> {
    let world = World::find()?;
    let result = match command {
        BenchCommand::Step(args) => step(args, &world),
        BenchCommand::Checkpoint(args) => checkpoint(args, &world),
        BenchCommand::Allreduce(args) => all_reduce(args, &world),
    };
    match result {
        Ok(()) => {
            world.collectives.finish().map_err(|error| WorkerError::Failed(error.to_string()))?;
            Ok(exit_code::DONE)
        }
        Err(error) => Err(world.leave(error)),
    }
}

fn all_reduce(args: &AllreduceArgs, world: &World) -> Result<(), WorkerError> {
    check_workers(args.workers, world)?;
    if world.identity.world_size == 1 {
        return Err(WorkerError::Usage(
            "a world of one has nobody to sum with: use `mentee bench allreduce --workers 2`, or mpirun with several ranks"
                .into(),
        ));
    }
    let mut sets = args.sets.clone();
    sets.extend(args.device.iter().map(|device| format!("parallel.device={device}")));
    let recipe = Recipe::load(&args.recipe, &sets)?;
    let device = device::of_recipe(&recipe, &world.identity)?;
    let rows = match DeviceGroup::start(&world.collectives, &recipe, device, &world.waits)? {
        Some(group) => all_reduce_devices(group, device, args.seconds, world)?,
        None => bench::all_reduce(&*world.collectives, &bench::SIZES, args.seconds)?,
    };
    if world.identity.rank != 0 {
        return Ok(());
    }
    if args.json {
        let rows: Vec<String> = rows.iter().map(bench::Row::to_json).collect();
        show!("[{}]", rows.join(",\n "));
        return Ok(());
    }
    show!("{}", bench::HEADER);
    for row in &rows {
        show!("{row}");
    }
    Ok(())
}

/// In device memory, over the group that trains.
fn all_reduce_devices(
    group: DeviceGroup,
    device: Device,
    seconds: f64,
    world: &World,
) -> Result<Vec<bench::Row>, WorkerError> {
    let rows = bench::SIZES.iter().map(|&bytes| {
        let mut values = Tensor::f_zeros([bytes as i64 / 4], (Kind::Float, device))?;
        bench::measure_by(&*world.collectives, bytes, seconds, || group.sum(&mut values))
    });
    let rows = rows.collect::<Result<Vec<_>, WorkerError>>()?;
    group.finish()?;
    Ok(rows)
}

/// Networks, their state, and views made up once.
struct Rig {
    plan: Plan,
    device: Device,
    learner: Learner,
    schedule: Schedule,
    views: Tensor,
    collectives: Arc<dyn Collectives>,
    /// Lives as long as the reducer does.
    _group: Option<DeviceGroup>,
    /// Each phase is waited for.
    profile: bool,
    /// Of the last step.
    loss: f64,
}

impl Rig {
    fn new(
        recipe: Recipe,
        steps: u64,
        world: &World,
        without: &[Gain],
        profile: bool,
    ) -> Result<Self, WorkerError> {
        let (identity, collectives) = (world.identity, world.collectives.clone());
        let batch = recipe.schedule.global_batch;
        let plan = Plan::new(recipe, batch.saturating_mul(steps.max(1)), identity.world_size)?;
        let recipe = &plan.recipe;
        setup::threads(recipe, &*collectives)?;
        let device = device::of_recipe(recipe, &identity)?;
        let group = DeviceGroup::start(&collectives, recipe, device, &world.waits)?;
        let (method, mut state) = mentee_ssl::state::on(recipe, device)?;
        state.one_pass = !without.contains(&Gain::OnePass);
        let may_record = !profile && !without.contains(&Gain::Graph);
        let mut learner =
            Learner::new(&plan, (method, state), &collectives, group.as_ref(), (device, may_record))?;
        learner.overlaps = !without.contains(&Gain::Overlap);

        let own = &learner.rank_share;
        let side = i64::from(recipe.views.size);
        let shape = [VIEWS * (own.end - own.start) as i64, side, side, 3];
        tch::manual_seed(1);
        let views = Tensor::randn(shape, (Kind::Float, Device::Cpu)).permute([0, 3, 1, 2]);
        let kinds = mentee_ssl::state::kinds(recipe.parallel.precision);
        let kind = if device == Device::Cpu { kinds.master } else { kinds.compute };
        Ok(Self {
            learner,
            schedule: Schedule::new(&plan),
            views: views.f_to_device(device)?.f_to_kind(kind)?,
            plan,
            device,
            collectives,
            _group: group,
            profile,
            loss: f64::NAN,
        })
    }

    /// [forward, backward, reduce, update, all, communication], milliseconds.
    fn step(&mut self, n: u64) -> Result<[f64; 6], WorkerError> {
        let Self { learner, views, collectives, .. } = self;
        let (device, profile) = (self.device, self.profile);
        let wait = || -> Result<(), SslError> {
            if let Device::Cuda(index) = device
                && profile
            {
                cuda::synchronise(index)?;
            }
            Ok(())
        };
        let at_step = |source| WorkerError::Step { step: n, source };
        let rates = self.schedule.at(n);
        let start = Instant::now();
        let (mut forward, mut began) = (Duration::ZERO, None);
        let parts = learner.loss_and_gradient(views, None, |phase| {
            wait()?;
            match phase {
                Phase::Forward => began = Some(Instant::now()),
                _ => forward += began.take().map_or(Duration::ZERO, |began| began.elapsed()),
            }
            Ok(())
        });
        let parts = parts.map_err(at_step)?;
        let backward = start.elapsed();
        let communication = learner.sum_gradients(n)?;
        let out = StepLoss::sum(&parts).map_err(at_step)?;
        self.loss = agree::on_step(&**collectives, n, &out, false)?.loss;
        let grad_norm = agree::on_gradient(&**collectives, n, &learner.state, || learner.own_was_finite())?;
        let updating = start.elapsed();
        learner.update(&rates, n, grad_norm).map_err(at_step)?;
        wait().map_err(at_step)?;
        let end = start.elapsed();
        let times =
            [forward, backward - forward, communication.exposed, end - updating, end, communication.total];
        Ok(times.map(|time| time.as_secs_f64() * 1e3))
    }

    /// What runs in `steps` steps from `first` on.
    fn kernels(&mut self, first: u64, steps: u64) -> Result<Kernels, WorkerError> {
        let on_device = self.device != Device::Cpu;
        let ((), events) = mentee_torch_ext::profile(on_device, || -> Result<_, WorkerError> {
            for n in first..first + steps {
                self.step(n)?;
            }
            match self.device {
                Device::Cuda(index) => Ok(cuda::synchronise(index)?),
                _ => Ok(()),
            }
        })?;
        Ok(Kernels::of(events, steps))
    }
}

/// "2 ranks of 1 thread"
fn size(ranks: u32, threads: i32) -> String {
    format!("{} of {}", counted(ranks.into(), "rank"), counted(threads.max(0) as u64, "thread"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// What checkpoints cost. All of rank 0; milliseconds.
#[derive(serde::Serialize)]
struct CheckpointReport {
    /// Of the whole state.
    state_mb: f64,
    /// Median of the steps during which nothing is written.
    step_ms: f64,
    /// Longest time that training stood still for a checkpoint, in its copy and for the one before it.
    longest_stall_ms: f64,
    /// Each checkpoint's.
    stalls_ms: Vec<f64>,
    /// What steps took longer while a checkpoint was written, all together.
    slowed_ms: f64,
    /// From the copy to the commit, each checkpoint's.
    write_ms: Vec<f64>,
    /// Stalls and slower steps, of the time from the first checkpoint on.
    cost_percent: f64,
    every: u64,
    n: u64,
    world_size: u32,
    threads: i32,
}

fn checkpoint(args: &CheckpointArgs, world: &World) -> Result<(), WorkerError> {
    check_workers(args.workers, world)?;
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let steps = args.every * (args.checkpoints + 1);
    let mut rig = Rig::new(recipe, args.warmup + steps, world, &[], false)?;
    let attempt = agree::attempt(&*world.collectives)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => std::env::temp_dir().join(format!("mentee-bench-{attempt}")),
    };
    let rank = world.identity.rank;
    let made = match rank {
        0 => std::fs::create_dir(&out).map_err(WorkerError::io("create", &out)),
        _ => Ok(()),
    };
    agree::together(&*world.collectives, made)?;
    let result = write_checkpoints(args, &mut rig, world, attempt, &out);
    // Only ranks that all know of a failure may wait for each other.
    if result.is_ok() {
        world.collectives.barrier()?;
    }
    if rank == 0 {
        std::fs::remove_dir_all(&out).map_err(WorkerError::io("remove", &out))?;
    }
    let report = result?;
    if rank != 0 {
        return Ok(());
    }
    if args.json {
        show!("{}", serde_json::to_string(&report).map_err(|error| WorkerError::Failed(error.to_string()))?);
    } else {
        let CheckpointReport { state_mb, step_ms, longest_stall_ms, slowed_ms, write_ms, .. } = &report;
        show!(
            "{:.2} % of the time · longest stall {longest_stall_ms:.0} ms · steps of {step_ms:.0} ms slower by {slowed_ms:.0} ms \
             in all · {state_mb:.0} MB written in {:.1} s beside training · {} checkpoints, one every {} steps · {}",
            report.cost_percent,
            median(write_ms.clone()) / 1e3,
            report.n,
            report.every,
            size(report.world_size, report.threads),
        );
    }
    Ok(())
}

fn write_checkpoints(
    args: &CheckpointArgs,
    rig: &mut Rig,
    world: &World,
    attempt: String,
    out: &Path,
) -> Result<CheckpointReport, WorkerError> {
    let (rank, world_size) = (world.identity.rank, world.identity.world_size);
    let plan_hash = rig.plan.recipe.hash();
    let mut reporter = Reporter::connect(world, &plan_hash, "made up")?;
    let mut metrics = Metrics::open(out, rank, 0)?;
    let settings = Settings {
        every_steps: args.every,
        every_epochs: 0,
        ..Settings::new(&rig.plan, out, world_size, "made up", attempt)
    };
    let mut checkpoints = Checkpoints::new(
        settings,
        &rig.learner.state,
        None,
        rig.collectives.clone(),
        reporter.shares(),
        StopFlag::default(),
    )?;
    for n in 0..args.warmup {
        rig.step(n)?;
    }
    let (mut quiet, mut beside, mut stalls) = (Vec::new(), Vec::new(), Vec::new());
    let mut first = Instant::now();
    for n in 0..args.every * (args.checkpoints + 1) {
        // After so many steps: none after the last one, which would have no steps beside it.
        let is_due = checkpoints.is_due(n, false) && n > 0;
        if is_due && world_size > 1 {
            agree::on_weights(&*rig.collectives, n, &rig.learner.state)?;
        }
        if is_due && stalls.is_empty() {
            first = Instant::now();
        }
        let start = Instant::now();
        if n > 0 {
            let content = Content { state: &rig.learner.state, probe: None, counts: Counts::default() };
            checkpoints.maybe_save(n, false, content, &mut metrics, &mut reporter)?;
        }
        if is_due {
            stalls.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let written_beside = checkpoints.is_under_way();
        let step_ms = rig.step(args.warmup + n)?[4];
        if written_beside { &mut beside } else { &mut quiet }.push(step_ms);
    }
    let whole_ms = first.elapsed().as_secs_f64() * 1e3;
    checkpoints.finish(&mut metrics, &mut reporter)?;
    reporter.close();

    let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let write_ms = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["write_ms"].as_f64())
        .collect();
    let step_ms = median(quiet);
    let slowed_ms = beside.iter().map(|ms| ms - step_ms).sum::<f64>();
    let tensors = rig.learner.state.tensors()?;
    let bytes: usize =
        tensors.iter().map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum();
    Ok(CheckpointReport {
        state_mb: bytes as f64 / 1e6,
        step_ms,
        longest_stall_ms: stalls.iter().copied().fold(0.0, f64::max),
        cost_percent: (stalls.iter().sum::<f64>() + slowed_ms) / whole_ms * 100.0,
        stalls_ms: stalls,
        slowed_ms,
        write_ms,
        every: args.every,
        n: args.checkpoints,
        world_size,
        threads: tch::get_num_threads(),
    })
}

fn step(args: &StepArgs, world: &World) -> Result<(), WorkerError> {
    check_workers(args.workers, world)?;
    let identity = world.identity;
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let batch = recipe.schedule.global_batch;
    let mut rig = Rig::new(recipe, args.steps, world, &args.without, args.profile)?;
    // Of each measured step.
    let mut times: Vec<[f64; 6]> = Vec::new();
    for n in 0..args.warmup + args.steps {
        let time = rig.step(n)?;
        if n >= args.warmup {
            times.push(time);
        }
    }
    let kernels = match args.kernels {
        true => Some(rig.kernels(args.warmup + args.steps, args.steps)?),
        false => None,
    };
    let median = |of: &dyn Fn(&[f64; 6]) -> f64| median(times.iter().map(of).collect());
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
        peak_device_mb: match rig.device {
            Device::Cuda(index) => {
                cuda::peak_bytes(index).ok().map(|bytes| bytes as f64 / f64::from(1 << 20))
            }
            _ => None,
        },
        device: format!("{:?}", rig.device).to_lowercase(),
        loss: rig.loss,
        n: args.steps,
        world_size: identity.world_size,
        threads: tch::get_num_threads(),
        kernels,
    };
    if identity.rank != 0 {
        return Ok(());
    }
    if args.json {
        let text = serde_json::to_string(&report).map_err(|error| WorkerError::Failed(error.to_string()))?;
        show!("{text}");
    } else {
        let Breakdown { forward, backward, reduce, update } = report.breakdown_ms;
        show!(
            "{:.1} images/s · step {step_ms:.1} ms (forward {forward:.1}, backward {backward:.1}, reduce \
             {reduce:.1} of {:.1}, update {update:.1}) · peak {:.0} MiB · {} · n = {}",
            report.images_per_s,
            report.communication_ms,
            report.peak_rss_mb,
            size(report.world_size, report.threads),
            report.n
        );
        if let Some(Kernels { busy_ms, span_ms, idle_percent, each }) = &report.kernels {
            show!("busy {busy_ms:.2} of {span_ms:.2} ms a step, idle {idle_percent:.1} %");
            show!("{:>9} {:>7}", "ms", "calls");
            for Kernel { name, ms, calls } in each {
                show!("{ms:9.3} {calls:7.1}  {name}");
            }
        }
    }
    Ok(())
}
