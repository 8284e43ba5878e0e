//! From a command line to a [`Run`]: who this rank is, the network, the plan, the data, the state, and the step to
//! go on from. In that order, each failing with one line on one rank.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mentee_checkpoint::LocalDisk;
use mentee_cluster::{Identity, Phase, Shares, identity};
use mentee_collectives::checked::Checked;
use mentee_collectives::mpi::{self, Mpi};
use mentee_collectives::{Buffer, Collectives, Single};
use mentee_config::plan::share;
use mentee_config::{Plan, Recipe};
use mentee_data::{Loader, LoaderConfig, OnError, Source, Split, open_split, order};
use mentee_ssl::{Method, Schedule, State};
use mentee_torch_ext::StatReduce;

use crate::checkpoints::{self, Checkpoints, Settings};
use crate::error::WorkerError;
use crate::eval::Evaluator;
use crate::faults::Faults;
use crate::link::Reporter;
use crate::metrics::Metrics;
use crate::reducer::GradientReducer;
use crate::stop::StopFlag;
use crate::{TrainArgs, affinity, agree, logging, run_dir, snapshot};

/// Batches decoded ahead of the step.
const QUEUE_STEPS: usize = 3;

/// One rank of a run, ready for step `next_step`.
pub struct Run {
    pub identity: Identity,
    pub collectives: Arc<dyn Collectives>,
    pub plan: Plan,
    pub run_dir: PathBuf,
    pub schedule: Schedule,
    pub method: Box<dyn Method>,
    pub state: State,
    pub loader: Loader,
    /// This rank's positions within the global batch.
    pub rank_share: Range<u64>,
    pub reducer: GradientReducer,
    pub faults: Faults,
    /// Sums batch-norm statistics over ranks; none for a world of one or unsynchronised norms.
    pub stat_reduce: Option<StatReduce>,
    /// None when the recipe does not evaluate, or the images have no labels.
    pub evaluator: Option<Evaluator>,
    pub metrics: Metrics,
    pub checkpoints: Checkpoints,
    pub stop: StopFlag,
    /// Updates done so far.
    pub next_step: u64,
}

/// Who this rank is and the network it is part of.
pub struct Place {
    pub identity: Identity,
    pub collectives: Arc<dyn Collectives>,
}

/// Finds this rank's place. Starts MPI only when there is more than one rank.
pub fn place() -> Result<Place, WorkerError> {
    let identity = identity::discover(&|name| std::env::var(name).ok())?;
    let collectives: Arc<dyn Collectives> = if identity.world_size > 1 {
        Arc::new(Mpi::initialize(Some((identity.rank, identity.world_size)))?)
    } else {
        Arc::new(Single::new())
    };
    Ok(Place { identity, collectives })
}

/// Sets the compute threads and says how many decode threads there are to be.
pub fn threads(recipe: &Recipe, identity: &Identity) -> usize {
    let cores = affinity::cores(identity.local_size);
    let or_cores = |n: u64| if n == 0 { cores } else { n as usize };
    tch::set_num_threads(or_cores(recipe.parallel.threads) as i32);
    or_cores(recipe.parallel.decode_threads)
}

/// The closure by which batch norms sum their statistics over ranks.
pub fn stat_reduce(recipe: &Recipe, collectives: &Arc<dyn Collectives>) -> Option<StatReduce> {
    if !recipe.parallel.sync_batch_norm || collectives.world_size() == 1 {
        return None;
    }
    let collectives = collectives.clone();
    Some(Arc::new(move |values: &mut [f64]| match collectives.all_reduce_sum(Buffer::F64(values)) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, "batch-norm statistics");
            false
        }
    }))
}

/// What can be checked without any other rank: recipe, run directory, data.
pub struct Local {
    plan: Plan,
    run_dir: PathBuf,
    source: Arc<dyn Source>,
}

fn local(args: &TrainArgs, identity: &Identity) -> Result<Local, WorkerError> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let run_dir = args.run_dir.clone().unwrap_or_else(|| run_dir::default_path(&recipe));
    run_dir::check(&run_dir, &recipe)?;
    let source = open_split(&recipe.data.path, recipe.data.format, Split::Train)?
        .ok_or_else(|| WorkerError::Usage("data.path holds no training images".into()))?;
    let plan = Plan::new(recipe, source.len(), identity.world_size)?;
    if identity.rank == 0 {
        run_dir::create(&run_dir, &plan.recipe)?;
    }
    Ok(Local { plan, run_dir, source })
}

/// Reads what `args` names, starts the log, and joins the other ranks at the coordinator.
pub fn join(args: &TrainArgs, place: &Place) -> Result<(Local, Reporter), WorkerError> {
    let Place { identity, collectives } = place;
    let local = agree::together(&**collectives, local(args, identity))?;
    mpi::set_patience(Duration::from_secs_f64(local.plan.recipe.parallel.timeout_s));
    logging::start(&local.run_dir, identity.rank)?;
    let (plan_hash, data_digest) = (local.plan.recipe.hash(), local.source.digest());
    let mut reporter = Reporter::connect(identity, &**collectives, &plan_hash, &data_digest)?;
    reporter.phase(Phase::Starting);
    Ok((local, reporter))
}

/// Sets up this rank of the run, from its newest checkpoint where there is one. `shares`: the way to the coordinator that
/// commits checkpoints.
pub fn run(local: Local, place: &Place, shares: Option<Shares>) -> Result<Run, WorkerError> {
    let Local { plan, run_dir, source } = local;
    let (identity, collectives) = (place.identity, place.collectives.clone());
    let recipe = &plan.recipe;
    let decode_threads = threads(recipe, &identity);
    let parallel = &recipe.parallel;
    if let Some(advice) = affinity::advice(&identity, parallel.threads, parallel.decode_threads) {
        tracing::warn!("{advice}");
    }
    let (plan_hash, data_digest) = (recipe.hash(), source.digest());
    tracing::info!(
        rank = identity.rank,
        world_size = identity.world_size,
        launcher = identity.source,
        compute_threads = tch::get_num_threads(),
        decode_threads,
        plan_hash,
        data_digest,
        images = source.len(),
        "starting"
    );

    let (method, mut state) = mentee_ssl::state::new(recipe)?;
    let attempt = agree::attempt(&*collectives)?;
    let cleaned = match identity.rank {
        0 => mentee_checkpoint::clean(&LocalDisk, &checkpoints::folder(&run_dir)),
        _ => Ok(()),
    };
    agree::together(&*collectives, cleaned.map_err(WorkerError::from))?;
    let next_step = agree::together(&*collectives, resume(&mut state, &run_dir, &plan, &data_digest))?;
    let own = agree::Start {
        version: env!("CARGO_PKG_VERSION").into(),
        plan_hash,
        data_digest: data_digest.clone(),
        next_step,
        state_digest: snapshot::digest(&state)?,
    };
    agree::on_start(&*collectives, &own)?;
    let collectives: Arc<dyn Collectives> =
        if recipe.parallel.check_collectives { Arc::new(Checked::new(collectives)) } else { collectives };
    tracing::info!(
        next_step,
        total_steps = plan.total_steps,
        parameters = state.student.weights.layout.num_parameters(),
        state_digest = own.state_digest,
        "ready"
    );

    let order = order(&*source, recipe.data.order, recipe.run.seed, recipe.schedule.global_batch);
    let rank_share = share(recipe.schedule.global_batch, identity.rank, identity.world_size);
    let loader = Loader::new(LoaderConfig {
        source: source.clone(),
        order,
        views: recipe.views.clone(),
        seed: recipe.run.seed,
        rank_share: rank_share.clone(),
        first_step: next_step,
        last_step: plan.end_step(),
        threads: decode_threads,
        on_error: OnError::of(&recipe.data),
        queue_steps: QUEUE_STEPS,
    })?;
    let evaluator = agree::together(&*collectives, Evaluator::of_run(recipe, source, decode_threads))?;
    let faults = Faults::from_env(identity.rank)?;
    let settings = Settings {
        without_room: faults.without_room(),
        ..Settings::new(&plan, &run_dir, identity.world_size, &data_digest, attempt)
    };
    Ok(Run {
        checkpoints: Checkpoints::new(settings, &state, collectives.clone(), shares)?,
        schedule: Schedule::new(&plan),
        reducer: GradientReducer::new(&collectives, &mut state, recipe.parallel.bucket_mib)?,
        faults,
        rank_share: rank_share.clone(),
        stat_reduce: stat_reduce(recipe, &collectives),
        metrics: Metrics::open(&run_dir, identity.rank)?,
        stop: StopFlag::install()?,
        identity,
        collectives,
        plan,
        run_dir,
        method,
        state,
        loader,
        evaluator,
        next_step,
    })
}

/// Takes the state from the newest checkpoint, if there is one; the number of updates done.
fn resume(
    state: &mut State,
    run_dir: &std::path::Path,
    plan: &Plan,
    data_digest: &str,
) -> Result<u64, WorkerError> {
    let Some(newest) = mentee_checkpoint::newest(&checkpoints::folder(run_dir))? else { return Ok(0) };
    for (path, reason) in &newest.rejected {
        tracing::warn!(path = %path.display(), %reason, "passing over a checkpoint that cannot be used");
    }
    let checkpoint = newest.checkpoint;
    let meta = &checkpoint.manifest.meta;
    if meta.data_digest != data_digest {
        return Err(WorkerError::OtherData {
            run_dir: run_dir.to_owned(),
            data: plan.recipe.data.path.clone(),
            found: data_digest.to_owned(),
            expected: meta.data_digest.clone(),
        });
    }
    let step = meta.step;
    snapshot::load(state, &checkpoint)?;
    tracing::info!(step, "resumed from a checkpoint");
    Ok(step)
}
