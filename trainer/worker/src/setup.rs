//! From a command line to a [`Run`]: who this rank is, the network, the plan, the data, the state, and the step to
//! go on from. In that order, each failing with one line on one rank.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mentee_checkpoint::{Counts, LocalDisk, Meta};
use mentee_cluster::{Identity, Phase, Shares};
use mentee_collectives::checked::Checked;
use mentee_collectives::{Collectives, mpi};
use mentee_config::{Plan, Recipe};
use mentee_data::{LoaderConfig, OnError, Source, open_training, order};
use mentee_ssl::{Schedule, State};

use crate::checkpoints::{Checkpoints, Settings};
use crate::collapse::CollapseWatch;
use crate::device::{self, DeviceGroup};
use crate::error::WorkerError;
use crate::eval::Evaluator;
use crate::faults::Faults;
use crate::feed::Feed;
use crate::learner::Learner;
use crate::link::Reporter;
use crate::metrics::Metrics;
use crate::online::OnlineProbe;
use crate::skipped::SkippedImages;
use crate::stop::StopFlag;
use crate::world::World;
use crate::{TrainArgs, affinity, agree, import, logging, run_dir, snapshot};

/// Batches decoded ahead of the step.
const QUEUE_STEPS: usize = 3;

/// One rank of a run, ready for step `next_step`.
pub struct Run {
    pub identity: Identity,
    pub collectives: Arc<dyn Collectives>,
    pub plan: Plan,
    pub run_dir: PathBuf,
    pub schedule: Schedule,
    pub learner: Learner,
    pub feed: Feed,
    pub skipped: SkippedImages,
    pub faults: Faults,
    /// None when the recipe does not evaluate, or not all images have labels that mean the same in bank and queries.
    pub evaluator: Option<Evaluator>,
    /// None when the recipe has none, or the images have no labels.
    pub probe: Option<OnlineProbe>,
    /// The ranks' devices, where there are several.
    pub group: Option<DeviceGroup>,
    pub metrics: Metrics,
    pub checkpoints: Checkpoints,
    pub collapse: CollapseWatch,
    pub stop: StopFlag,
    /// Updates done so far.
    pub next_step: u64,
}

impl Run {
    /// What is counted over several steps.
    pub fn counts(&self) -> Counts {
        let [online_correct, online_views] = self.probe.as_ref().map_or([0; 2], OnlineProbe::counts);
        Counts { collapsed_steps: self.collapse.below, online_correct, online_views }
    }
}

/// Sets the compute threads and says how many decode threads there are to be. All ranks call it at the same point.
pub fn threads(recipe: &Recipe, collectives: &dyn Collectives) -> Result<usize, WorkerError> {
    let cores = affinity::cores(collectives)?;
    let or_cores = |n: u64| if n == 0 { cores } else { n as usize };
    tch::set_num_threads(or_cores(recipe.parallel.threads) as i32);
    Ok(or_cores(recipe.parallel.decode_threads))
}

/// What each rank finds by itself: recipe, run directory, data.
pub struct Local {
    plan: Plan,
    run_dir: PathBuf,
    source: Arc<dyn Source>,
}

fn read_recipe(args: &TrainArgs) -> Result<Recipe, WorkerError> {
    let mut recipe = Recipe::load(&args.recipe, &args.sets)?;
    // A run is resumed from anywhere; its plan must mean the same place then.
    recipe.make_paths_absolute()?;
    Ok(recipe)
}

fn local(args: &TrainArgs, recipe: Recipe, identity: &Identity) -> Result<Local, WorkerError> {
    let run_dir = args.run_dir.clone().unwrap_or_else(|| run_dir::default_path(&recipe));
    run_dir::check(&run_dir, &recipe)?;
    let source = open_training(&recipe)?;
    let plan = Plan::new(recipe, source.len(), identity.world_size)?;
    // Before `plan.toml` names them.
    let entries = mentee_checkpoint::list(&run_dir::checkpoints(&run_dir))?;
    let (images, path) = (source.digest(), &plan.recipe.data.path);
    if let Some(refusal) = mentee_checkpoint::refusal_of_images(&entries, &images, path, &run_dir) {
        return Err(WorkerError::OtherData(refusal));
    }
    if identity.rank == 0 {
        if !Reporter::is_supervised() {
            run_dir::lock(&run_dir)?;
        }
        run_dir::create(&run_dir, &plan.recipe)?;
    }
    Ok(Local { plan, run_dir, source })
}

/// Reads what `args` names, starts the log, and joins the other ranks at the coordinator.
pub fn join(args: &TrainArgs, world: &World) -> Result<(Local, Reporter), WorkerError> {
    let World { identity, collectives, .. } = world;
    let recipe = agree::together(&**collectives, read_recipe(args))?;
    agree::on_recipe(&**collectives, &recipe)?;
    let local = agree::together(&**collectives, local(args, recipe, identity))?;
    mpi::set_patience(Duration::from_secs_f64(local.plan.recipe.parallel.timeout_s));
    let supervised = Reporter::is_supervised();
    let hosts = !supervised && identity.rank == 0 && identity.world_size > 1;
    logging::start(&local.run_dir, identity.rank, supervised, hosts)?;
    let (plan_hash, data_digest) = (local.plan.recipe.hash(), local.source.digest());
    let mut reporter = Reporter::connect(world, &plan_hash, &data_digest)?;
    reporter.phase(Phase::Starting);
    Ok((local, reporter))
}

/// Sets up this rank of the run, from its newest checkpoint where there is one. `shares`: the way to the coordinator that
/// commits checkpoints. `stop`: what signals ask for.
pub fn run(local: Local, world: &World, shares: Option<Shares>, stop: StopFlag) -> Result<Run, WorkerError> {
    let Local { plan, run_dir, source } = local;
    let (identity, collectives) = (world.identity, world.collectives.clone());
    let recipe = &plan.recipe;
    let decode_threads = threads(recipe, &*collectives)?;
    let device = agree::together(&*collectives, device::of_recipe(recipe, &identity))?;
    let slot = agree::together(&*collectives, device::slot(device))?;
    agree::on_device(&*collectives, device, slot)?;
    let group = DeviceGroup::start(&collectives, recipe, device, &world.waits)?;
    let parallel = &recipe.parallel;
    if let Some(advice) = affinity::advice(&identity, parallel.threads, parallel.decode_threads) {
        tracing::warn!("{advice}");
    }
    if let Some(line) = source.passed_over().filter(|_| identity.rank == 0) {
        tracing::warn!("{line}");
    }
    let (plan_hash, data_digest) = (recipe.hash(), source.digest());
    tracing::info!(
        rank = identity.rank,
        world_size = identity.world_size,
        launcher = identity.source,
        device = ?device,
        exchange = world.exchange,
        compute_threads = tch::get_num_threads(),
        decode_threads,
        plan_hash,
        data_digest,
        images = source.len(),
        "starting"
    );

    let (method, mut state) = mentee_ssl::state::on(recipe, device)?;
    let dim = method.networks().backbone.feature_dim;
    let mut probe = OnlineProbe::of_run(recipe, source.clone(), dim)?;
    state.keep_features = probe.is_some();
    let attempt = agree::attempt(&*collectives)?;
    let cleaned = match identity.rank {
        0 => mentee_checkpoint::clean(&LocalDisk, &run_dir::checkpoints(&run_dir)),
        _ => Ok(Vec::new()),
    };
    for left in agree::together(&*collectives, cleaned.map_err(WorkerError::from))? {
        tracing::warn!("{left}: it takes room and does no other harm");
    }
    let resumed = resume(&mut state, probe.as_mut(), &run_dir, &plan);
    let (next_step, counts) = agree::together(&*collectives, resumed)?;
    if let Some(probe) = &mut probe {
        probe.count_on([counts.online_correct, counts.online_views]);
    }
    let has_steps = || run_dir.join("metrics.jsonl").metadata().is_ok_and(|file| file.len() > 0);
    if next_step == 0 && identity.rank == 0 && has_steps() {
        let run_dir = run_dir.display();
        tracing::warn!("{run_dir} has steps and no checkpoint of them: the run begins again at step 0");
    }
    let mut collapse = CollapseWatch::new(recipe, identity.world_size);
    collapse.below = counts.collapsed_steps;
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
        total_steps = plan.end_step(),
        parameters = state.student.weights.layout.num_parameters(),
        state_digest = own.state_digest,
        "ready"
    );

    let order = order(&*source, recipe.data.order, recipe.run.seed, recipe.schedule.global_batch);
    let learner = Learner::new(&plan, (method, state), &collectives, group.as_ref(), (device, true))?;
    let loader = LoaderConfig {
        source: source.clone(),
        order,
        views: recipe.views.clone(),
        seed: recipe.run.seed,
        rank_share: learner.rank_share.clone(),
        first_step: next_step,
        last_step: plan.end_step(),
        threads: decode_threads,
        on_error: OnError::of(&recipe.data),
        queue_steps: QUEUE_STEPS,
    };
    let feed = Feed::new(loader, recipe, device)?;
    let evaluator = Evaluator::of_run(&*collectives, recipe, source, decode_threads, device)?;
    let faults = Faults::from_env(identity.rank)?;
    let settings = Settings {
        without_room: faults.without_room(),
        ..Settings::new(&plan, &run_dir, identity.world_size, &data_digest, attempt)
    };
    Ok(Run {
        checkpoints: Checkpoints::new(
            settings,
            &learner.state,
            probe.as_ref(),
            collectives.clone(),
            shares,
            stop.clone(),
        )?,
        schedule: Schedule::new(&plan),
        feed,
        skipped: SkippedImages::new(&recipe.data),
        faults,
        metrics: Metrics::open(&run_dir, identity.rank, next_step)?,
        collapse,
        stop,
        identity,
        collectives,
        plan,
        run_dir,
        learner,
        group,
        evaluator,
        probe,
        next_step,
    })
}

/// Takes the state from the newest checkpoint, if there is one, else the backbone from `model.init`; the number of updates
/// done, and what has been counted.
fn resume(
    state: &mut State,
    probe: Option<&mut OnlineProbe>,
    run_dir: &Path,
    plan: &Plan,
) -> Result<(u64, Counts), WorkerError> {
    let Some(newest) = mentee_checkpoint::newest(&run_dir::checkpoints(run_dir))? else {
        import::of_recipe(state, &plan.recipe)?;
        return Ok((0, Counts::default()));
    };
    for (path, reason) in &newest.rejected {
        tracing::warn!(path = %path.display(), %reason, "passing over a checkpoint that cannot be used");
    }
    let checkpoint = newest.checkpoint;
    let meta = &checkpoint.manifest.meta;
    if let Some(difference) = other_recipe(meta, &plan.recipe) {
        return Err(WorkerError::OtherRecipesCheckpoint { checkpoint: checkpoint.folder, difference });
    }
    let (step, counts) = (meta.step, meta.counts);
    snapshot::load(state, probe, &checkpoint.folder, newest.tensors)?;
    tracing::info!(step, "resumed from a checkpoint");
    Ok((step, counts))
}

/// How the recipe that a checkpoint was made by differs from this one in what decides the numbers.
fn other_recipe(meta: &Meta, recipe: &Recipe) -> Option<String> {
    let hash = recipe.hash();
    if meta.plan_hash == hash {
        return None;
    }
    // A plan that this version cannot read, or one that the hash does not belong to, names no key.
    let theirs = Recipe::from_plan_text(&meta.plan_toml, Path::new("its plan")).ok();
    let key = theirs.and_then(|theirs| recipe.first_difference(&theirs));
    Some(key.unwrap_or_else(|| format!("plan hash = {} there, {hash} here", meta.plan_hash)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_of_another_recipe_names_the_first_key_that_differs() {
        let recipe = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
            Recipe::load("demo", &sets).unwrap()
        };
        let meta = |recipe: &Recipe| Meta {
            step: 3,
            epoch: 0,
            world_size: 1,
            plan_hash: recipe.hash(),
            plan_toml: recipe.to_toml(),
            data_digest: String::new(),
            mentee_version: String::new(),
            counts: mentee_checkpoint::Counts::default(),
        };
        let own = recipe(&[]);
        assert_eq!(other_recipe(&meta(&recipe(&["checkpoint.keep=9"])), &own), None);
        let other = meta(&recipe(&["run.seed=77"]));
        let seed = own.run.seed;
        assert_eq!(other_recipe(&other, &own).unwrap(), format!("run.seed = 77 there, {seed} here"));
        let without_plan = Meta { plan_toml: String::new(), ..other };
        let hashes = format!("plan hash = {} there, {} here", without_plan.plan_hash, own.hash());
        assert_eq!(other_recipe(&without_plan, &own).unwrap(), hashes);
    }
}
