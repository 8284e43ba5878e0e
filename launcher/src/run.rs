//! `mentee run`: looks at recipe, data and directory, starts the supervision, and puts a Slurm job back into the queue.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mentee_checkpoint::{self as checkpoint, Entry};
use mentee_cluster::server;
use mentee_config::replace::write_if_other;
use mentee_config::{Plan, Recipe, complain, counted, exit_code, say};
use mentee_data::open_training;

use crate::engine::{self, Engine, Layout};
use crate::failure::Failure;
use crate::interface;
use crate::left_memory;
use crate::logs;
use crate::metrics::Metrics;
use crate::processes::end_leftovers;
use crate::prometheus;
use crate::ready;
use crate::rundir::RunDir;
use crate::shell::{Job, supervise};
use crate::slurm::{self, Record};
use crate::status::{State, Status};
use crate::supervise::STOP_GRACE;

/// How long a job that was put back into the queue waits for its directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(300);

/// What to run and how.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee run byol-cifar10-small --workers 2 --set data.path=data/cifar10
  mentee run my-recipe.toml --run-dir runs/try-3 --set optimizer.base_lr=0.2 --metrics-address 9477

Ctrl-C: a checkpoint at the next step, then exit code 75; the same command goes on from there.")]
pub struct RunArgs {
    /// A recipe: the path of a .toml file, or the name of a built-in one
    pub recipe: String,
    /// Worker processes that share each batch
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub workers: u32,
    /// How they are started
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// Where the run lives; a run that is there already is resumed [default: runs/<name of the recipe>]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// How often crashes are answered with another start from the last checkpoint, in all
    #[arg(long, default_value_t = 3, value_name = "K")]
    pub max_restarts: u32,
    /// What a stop may take at least, from the first signal to the last checkpoint, before the workers are ended; three steps, where
    /// they take longer
    #[arg(long, default_value_t = STOP_GRACE.as_secs(), value_name = "SECONDS")]
    pub stop_grace: u64,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// One more argument for mpirun or srun; may be given several times
    #[arg(long = "engine-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub engine_args: Vec<String>,
    /// Where the workers reach this process: an address or the name of a network interface of this machine [default: the
    /// loopback for workers here; any, by this machine's name, for srun]
    #[arg(long, value_name = "ADDRESS")]
    pub interface: Option<String>,
    /// Serve the run's numbers to Prometheus over HTTP: a port (on the loopback only), or ADDRESS:PORT, where 0.0.0.0 is
    /// every interface of this machine [default: not at all]
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    pub metrics_address: Option<String>,
    /// In a Slurm job: after SIGUSR1, put the job back into the queue with a checkpoint taken
    #[arg(long)]
    pub requeue: bool,
}

/// How a run ended, for commands that go on from there.
#[derive(Debug)]
pub struct Ended {
    /// The run directory.
    pub dir: RunDir,
    /// See [`mentee_config::exit_code`]; 0 or 75.
    pub exit_code: i32,
}

/// `mentee run`.
///
/// # Errors
/// [`Failure`] with the run's exit code. What can be told from the recipe, the data and the directory is told before
/// anything is written or started.
pub fn command(args: &RunArgs) -> Result<Ended, Failure> {
    let allocation = slurm::allocation();
    let engine = engine::choose(args.engine, args.workers, allocation.as_ref())?;
    let interface = match &args.interface {
        Some(interface) => Some(interface::address("--interface", interface)?),
        None if engine::reaches_other_nodes(engine, allocation.as_ref()) => None,
        None => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    };
    let metrics_address = args.metrics_address.as_deref().map(prometheus::address).transpose()?;
    let metrics_listener = metrics_address.map(prometheus::bind).transpose()?;
    if args.requeue && allocation.is_none() {
        return Err(Failure::usage("--requeue is for Slurm jobs, and this is none: leave it out"));
    }
    let mut recipe = Recipe::load(&args.recipe, &args.sets)?;
    // A run is resumed from anywhere; its plan must mean the same place then.
    recipe.make_paths_absolute()?;
    let dir = args.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.run.name));
    let dir = RunDir::at(&dir)?;
    dir.check_recipe(&recipe)?;
    // One that goes on has no need of the weights it started from, nor one that is finished of what it classified.
    let is_new = checkpoint::list(&dir.checkpoints())?.is_empty();
    let source = open_training(&recipe)?;
    if is_new {
        ready::held_out(&recipe)?;
        ready::weights(&recipe)?;
    }
    let plan = Plan::new(recipe, source.len(), args.workers)?;
    let images = source.digest();
    drop(source);
    let tools = engine::find_tools(engine, &args.engine_args)?;

    // What is refused above leaves no directory behind. Under the lock some of it is asked again: another run may have begun there.
    server::allow_open_files(args.workers).map_err(|error| Failure::failed(error.to_string()))?;
    // The machine that a job was taken from may still hold it: a file system gives up the locks of one it does not hear in minutes.
    let came_back = allocation.as_ref().is_some_and(|allocation| allocation.restarts > 0);
    let lock = dir.lock(if came_back { LOCK_PATIENCE } else { Duration::ZERO })?;
    dir.check_recipe(&plan.recipe)?;
    end_leftovers(&dir)?;
    left_memory::clean(&dir);
    let checkpoints = checkpoint::list(&dir.checkpoints())?;
    let refusal = checkpoint::refusal_of_images(&checkpoints, &images, &plan.recipe.data.path, dir.path());
    if let Some(line) = refusal {
        return Err(Failure { exit_code: exit_code::DATA, line });
    }
    let at_end = checkpoints.iter().any(|entry| entry.step >= plan.end_step() && is_intact(entry));
    if at_end && is_evaluated(&dir, &plan)? {
        let steps = counted(plan.end_step(), "step");
        say!("{} is finished ({steps}): nothing to do", dir.path().display());
        return Ok(Ended { dir, exit_code: exit_code::DONE });
    }
    if !is_new {
        ready::held_out(&plan.recipe)?;
    }
    // A disk without room is no reason not to go on: the run waits for room itself.
    write_if_other(&dir.plan(), plan.recipe.to_toml().as_bytes())
        .map_err(|error| Failure::io("write", &dir.plan(), &error))?;
    logs::write_here(&dir);
    if let Some(allocation) = allocation.as_ref().filter(|_| dir.script().is_file() || dir.slurm().is_file())
    {
        // The script may have been submitted again, by hand.
        if let Err(failure) = Record::of_job(&dir, allocation).write(&dir) {
            complain!("warning: {}: `mentee status` may name another job", failure.line);
        }
    }

    // One thread: the parent-death signal of the workers is tied to the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the supervisor: {error}")))?;
    let first_step = dir.newest_step();
    let layout =
        Layout { nodes: allocation.as_ref().map_or(1, |it| it.nodes.len() as u32), left_out: Vec::new() };
    let job = Job {
        dir: &dir,
        lock: &lock,
        plan: &plan,
        tools,
        engine,
        interface,
        allocation: allocation.as_ref(),
        workers: args.workers,
        layout,
        stop_grace: Duration::from_secs(args.stop_grace),
    };
    let (exit_code, stopped_by) = runtime.block_on(supervise(job, args.max_restarts, metrics_listener))?;
    if let Some(allocation) = allocation.filter(|_| args.requeue)
        && exit_code == exit_code::PREEMPTED
        && slurm::goes_back(&stopped_by)
    {
        slurm::put_back(&dir, &allocation, first_step, dir.newest_step(), &stopped_by)?;
    }
    Ok(Ended { dir, exit_code })
}

/// Whether nothing is left to do for a run with all its steps done: it said so, or its last evaluation is there.
fn is_evaluated(dir: &RunDir, plan: &Plan) -> Result<bool, Failure> {
    let said = Status::read(dir).is_some_and(|status| matches!(status.state, State::Done));
    if said || plan.recipe.eval.knn_every_epochs == 0 {
        return Ok(true);
    }
    Ok(Metrics::read_without_steps(&dir.metrics())?
        .last_eval()
        .is_some_and(|eval| eval.step >= plan.end_step()))
}

/// Whether a checkpoint holds what was written, down to its last byte.
fn is_intact(entry: &Entry) -> bool {
    checkpoint::open(&entry.path).is_ok_and(|checkpoint| checkpoint.verify().is_ok())
}
