//! `mentee-worker trace`: what a few steps read and what they make of it, so that another implementation can be held
//! against this one. `tests/replay.py` does that with PyTorch.
//!
//! ```text
//! DIR/trace.json                        the recipe; of every step: loss, rates, samples
//! DIR/step-0000/views.safetensors       views [2N, 3, H, W]: view 1 of all samples, then view 2
//! DIR/step-0000/before.safetensors      student, teacher, momentum, running statistics, as in a checkpoint
//! DIR/step-0000/gradients.safetensors   of the student's parameters
//! DIR/step-0000/after.safetensors       as before, after the update
//! ```

use std::path::Path;
use std::sync::Arc;

use mentee_cluster::Identity;
use mentee_collectives::{Collectives, Single};
use mentee_commands::TraceArgs;
use mentee_config::{Plan, Recipe, counted, exit_code, say};
use mentee_data::{LoaderConfig, OnError, open_training, order};
use mentee_ssl::layout::view;
use mentee_ssl::{Rates, Schedule, State, StepLoss};
use tch::Tensor;

use crate::dense::write;
use crate::error::WorkerError;
use crate::feed::Feed;
use crate::learner::Learner;
use crate::{device, import, setup};

/// Batches decoded ahead.
const QUEUE_STEPS: usize = 1;

/// `trace.json`
#[derive(serde::Serialize)]
struct Trace {
    mentee_version: &'static str,
    plan_hash: String,
    data_digest: String,
    /// Every key of the recipe.
    recipe: Recipe,
    steps: Vec<Step>,
}

#[derive(serde::Serialize)]
struct Step {
    step: u64,
    epoch: u64,
    /// Mean over the batch.
    loss: f64,
    /// As in `metrics.jsonl`.
    lr: f64,
    tau: f64,
    /// All that the update used.
    rates: Rates,
    /// The batch, by number within the data set.
    samples: Vec<u64>,
}

/// The student's, under their names.
fn gradients(state: &State) -> Result<Vec<(String, Tensor)>, WorkerError> {
    let places = state.student.weights.layout.params();
    places
        .map(|place| {
            let name = format!("student.{}", place.declaration.name);
            Ok((name, view(&state.gradients.flat, place)?))
        })
        .collect()
}

/// Makes `path`, unless it is there and empty.
fn new_folder(path: &Path) -> Result<(), WorkerError> {
    std::fs::create_dir_all(path).map_err(WorkerError::io("create", path))?;
    if std::fs::read_dir(path).map_err(WorkerError::io("read", path))?.next().is_some() {
        return Err(WorkerError::Usage(format!("{} is not empty; give another --out", path.display())));
    }
    Ok(())
}

/// Trains the first steps of a recipe on one rank and writes down everything.
pub fn command(args: &TraceArgs) -> Result<i32, WorkerError> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    if recipe.parallel.micro_batches != 1 {
        return Err(WorkerError::Usage(
            "a trace records one pass a step: set parallel.micro_batches=1".into(),
        ));
    }
    let source = open_training(&recipe)?;
    let plan = Plan::new(recipe, source.len(), 1)?;
    let recipe = &plan.recipe;
    new_folder(&args.out)?;
    let steps = args.steps.min(plan.end_step());
    let collectives: Arc<dyn Collectives> = Arc::new(Single::new());
    let decode_threads = setup::threads(recipe, &*collectives)?;
    let alone = Identity { rank: 0, world_size: 1, local_rank: 0, local_size: 1, source: "trace" };
    let device = device::of_recipe(recipe, &alone)?;
    let (method, mut state) = mentee_ssl::state::on(recipe, device)?;
    import::of_recipe(&mut state, recipe)?;
    let mut learner = Learner::new(&plan, (method, state), &collectives, None, (device, false))?;
    let (schedule, global_batch) = (Schedule::new(&plan), recipe.schedule.global_batch);
    let loader = LoaderConfig {
        order: order(&*source, recipe.data.order, recipe.run.seed, global_batch),
        source: source.clone(),
        views: recipe.views.clone(),
        seed: recipe.run.seed,
        rank_share: 0..global_batch,
        first_step: 0,
        last_step: steps,
        threads: decode_threads,
        on_error: OnError::of(&recipe.data),
        queue_steps: QUEUE_STEPS,
    };
    let mut feed = Feed::new(loader, recipe, device)?;
    let mut trace = Trace {
        mentee_version: env!("CARGO_PKG_VERSION"),
        plan_hash: recipe.hash(),
        data_digest: source.digest(),
        recipe: recipe.clone(),
        steps: Vec::new(),
    };
    while let Some((batch, views)) = feed.next()? {
        let step = batch.step;
        let folder = args.out.join(format!("step-{step:04}"));
        std::fs::create_dir(&folder).map_err(WorkerError::io("create", &folder))?;
        let at_step = |source| WorkerError::Step { step, source };
        let kind = learner.state.student.weights.master.kind();
        write(&folder.join("views.safetensors"), [("views".to_owned(), views.f_to_kind(kind)?)])?;
        write(&folder.join("before.safetensors"), learner.state.tensors()?)?;

        let parts = learner.loss_and_gradient(&views, None, |_| Ok(())).map_err(at_step)?;
        learner.sum_gradients(step)?;
        let out = StepLoss::sum(&parts).map_err(at_step)?;
        write(&folder.join("gradients.safetensors"), gradients(&learner.state)?)?;

        let rates = schedule.at(step);
        let grad_norm = learner.state.grad_norm().map_err(at_step)?;
        learner.update(&rates, step, grad_norm).map_err(at_step)?;
        write(&folder.join("after.safetensors"), learner.state.tensors()?)?;
        let (loss, epoch, samples) = (out.loss.f_double_value(&[])?, batch.epoch, batch.ids.clone());
        trace.steps.push(Step { step, epoch, loss, lr: rates.lr, tau: rates.tau, rates, samples });
        drop((out, parts, views)); // all point into the batch
        feed.recycle(batch);
    }
    let path = args.out.join("trace.json");
    let text =
        serde_json::to_string_pretty(&trace).map_err(|error| WorkerError::Failed(error.to_string()))?;
    std::fs::write(&path, text).map_err(WorkerError::io("write", &path))?;
    say!(
        "{}: {}; `python tests/replay.py {}`, with PyTorch, repeats them",
        path.display(),
        counted(steps, "step"),
        args.out.display()
    );
    Ok(exit_code::DONE)
}
