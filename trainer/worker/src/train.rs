//! Training: the step, and what happens between steps. Start reading at [`train`].

use std::time::Instant;

use mentee_cluster::{Phase, Progress, StopReason, WorkerEvent};
use mentee_config::exit_code;
use mentee_data::Batch;
use mentee_ssl::StepLoss;

use crate::agree::{self, Agreed};
use crate::checkpoints::Content;
use crate::error::WorkerError;
use crate::link::Reporter;
use crate::metrics::{self, Meter, TrainLine};
use crate::online::OnlineProbe;
use crate::setup::{self, Run};
use crate::stop::StopFlag;
use crate::world::World;
use crate::{TrainArgs, views};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Asked to stop; a checkpoint holds all that was done.
    Preempted,
}

/// Trains until every step of the plan is done, or until any rank is asked to stop.
fn train(run: &mut Run, reporter: &mut Reporter) -> Result<Outcome, WorkerError> {
    let end = run.plan.end_step();
    let mut meter = Meter::default();
    if run.next_step < end && agree::any(&*run.collectives, run.next_step, wants_stop(run, reporter))? {
        return Ok(preempted(run, reporter, "stopping before the first step")); // nothing was done since the last checkpoint
    }
    evaluate_if_missed(run, reporter)?;
    while run.next_step < end {
        let step = run.next_step;
        let start = Instant::now();
        let rates = run.schedule.at(step); // learning rate, weight decay, tau: pure functions of the step
        let at_step = |source| WorkerError::Step { step, source };

        reporter.begin_step();
        let (batch, views) = run.feed.next()?.ok_or_else(|| ended_early(step))?; // [2N, 3, H, W]
        show_batch(run, &batch)?;

        let told = |phase| {
            reporter.phase(phase);
            Ok(())
        };
        let fault = run.faults.of_gradient(step);
        let parts = run.learner.loss_and_gradient(&views, fault, told).map_err(at_step)?; // forward and backward
        if run.identity.world_size > 1 {
            reporter.phase(Phase::Reduce);
        }
        let communication = run.learner.sum_gradients(step)?; // every rank holds the mean gradient
        reporter.reduced(communication);
        let out = StepLoss::sum(&parts).map_err(at_step)?;
        let wants_stop = wants_stop(run, reporter);
        let agreed = agree::on_step(&*run.collectives, step, &out, wants_stop)?; // not finite on any rank: all end here
        let learner = &run.learner;
        let grad_norm =
            agree::on_gradient(&*run.collectives, step, &learner.state, || learner.own_was_finite())?;

        if let Some(probe) = &mut run.probe {
            probe.step(&*run.collectives, step, &parts, &batch.ids, &run.learner.rank_share)?;
        }
        reporter.phase(Phase::Update);
        run.learner.update(&rates, step, grad_norm).map_err(at_step)?; // the student, and the teacher behind it
        run.next_step = step + 1;

        let data_wait = batch.wait;
        drop((out, parts, views)); // all point into the batch
        run.feed.recycle(batch);
        run.faults.on_weights(step, &mut run.learner.state)?;
        run.faults.on_pace(step, reporter.own_time(communication));
        reporter.end_step(run.next_step, data_wait, communication);
        meter.add(start.elapsed(), data_wait, communication);
        record(run, reporter, &mut meter, &rates, &agreed, grad_norm)?;
        let is_last = agreed.stop || run.next_step == end;
        check_state(run, step, is_last)?;
        run.collapse.watch(step, agreed.z_std).map_err(|error| error.known(run.identity.rank == 0))?;
        let content = Content { state: &run.learner.state, probe: run.probe.as_ref(), counts: run.counts() };
        run.checkpoints.maybe_save(run.next_step, is_last, content, &mut run.metrics, reporter)?;
        if agreed.stop && run.next_step < end {
            return Ok(preempted(run, reporter, "stopping with a checkpoint"));
        }
        evaluate_if_due(run, reporter)?; // behind the checkpoint: who is stopped here loses nothing
    }
    Ok(Outcome::Done)
}

/// Names the damaged images that were replaced; the run's first views as a picture.
fn show_batch(run: &mut Run, batch: &Batch) -> Result<(), WorkerError> {
    run.skipped.note(batch);
    if batch.step == 0 && run.identity.rank == 0 {
        views::write_strip(&run.run_dir.join("views.png"), batch, &run.plan.recipe.views)?;
    }
    Ok(())
}

/// That all ranks hold the same, and what they read is good enough: before a checkpoint, and every so many steps.
fn check_state(run: &mut Run, step: u64, is_last: bool) -> Result<(), WorkerError> {
    let recipe = &run.plan.recipe;
    let by_step = is_multiple(run.next_step, recipe.parallel.check_every_steps);
    if by_step || run.checkpoints.is_due(run.next_step, is_last) {
        agree::on_statistics(&*run.collectives, step, recipe, &mut run.learner.state)?;
        agree::on_weights(&*run.collectives, step, &run.learner.state)?;
        run.skipped.check(&*run.collectives, step)?;
    }
    Ok(())
}

/// Whether this rank was asked to stop.
fn wants_stop(run: &Run, reporter: &Reporter) -> bool {
    run.stop.is_set() || reporter.stop_requested()
}

fn preempted(run: &Run, reporter: &Reporter, how: &str) -> Outcome {
    let step = run.next_step;
    match reporter.stop_reason() {
        // Who asked for it need not be warned.
        Some(reason @ StopReason::Requested(_)) => tracing::info!(step, %reason, "{how}"),
        Some(reason) => tracing::warn!(step, %reason, "{how}"),
        None => tracing::warn!(step, reason = "another rank or a signal", "{how}"),
    }
    Outcome::Preempted
}

fn ended_early(step: u64) -> WorkerError {
    WorkerError::Failed(format!("step {step}: the loader ended before the plan did"))
}

/// Tells everyone who watches how the step went.
fn record(
    run: &mut Run,
    reporter: &mut Reporter,
    meter: &mut Meter,
    rates: &mentee_ssl::Rates,
    agreed: &Agreed,
    grad_norm: f64,
) -> Result<(), WorkerError> {
    let (plan, done) = (&run.plan, run.next_step);
    if !done.is_multiple_of(plan.recipe.run.log_every_steps) && done != plan.end_step() {
        return Ok(());
    }
    let means = meter.take();
    let (times, rss_mb) = (reporter.take_times(means.steps), metrics::rss_mb());
    let epoch = (done - 1) / plan.steps_per_epoch;
    let images_per_s = plan.recipe.schedule.global_batch as f64 * 1e3 / means.step_ms;
    run.metrics.write(&TrainLine {
        kind: "train",
        step: done,
        epoch,
        time: metrics::now(),
        loss: agreed.loss,
        lr: rates.lr,
        tau: rates.tau,
        grad_norm,
        z_std: agreed.z_std,
        online_top1: run.probe.as_mut().and_then(OnlineProbe::take_top1),
        images_per_s,
        step_ms: means.step_ms,
        data_wait_ms: means.data_wait_ms,
        comm_total_ms: means.comm_total_ms,
        comm_exposed_ms: means.comm_exposed_ms,
        forward_ms: times.forward_ms,
        backward_ms: times.backward_ms,
        comm_ms: times.comm_ms,
        update_ms: times.update_ms,
        world_size: run.identity.world_size,
        rss_mb,
    })?;
    reporter.step(Progress {
        step: done,
        total_steps: plan.end_step(),
        epoch,
        epochs: plan.recipe.schedule.epochs,
        phase: Phase::Update,
        loss: Some(agreed.loss),
        z_std: Some(agreed.z_std),
        images_per_s: Some(images_per_s),
        step_ms: Some(means.step_ms),
        times: Some(times),
        rss_mb: Some(rss_mb),
        ..Progress::default()
    });
    Ok(())
}

/// The evaluation at the step of the checkpoint that a run goes on from, if it was stopped before it had that.
fn evaluate_if_missed(run: &mut Run, reporter: &mut Reporter) -> Result<(), WorkerError> {
    if run.next_step == 0 || run.evaluator.is_none() || !is_evaluation_due(run) {
        return Ok(());
    }
    let missed = run.identity.rank == 0 && !metrics::has_eval(&run.run_dir, run.next_step)?;
    if agree::any(&*run.collectives, run.next_step, missed)? {
        evaluate_if_due(run, reporter)?;
    }
    Ok(())
}

/// Whether an evaluation belongs to the step that the run is at: on all ranks alike.
fn is_evaluation_due(run: &Run) -> bool {
    let every = run.plan.recipe.eval.knn_every_epochs.saturating_mul(run.plan.steps_per_epoch);
    is_multiple(run.next_step, every) || run.next_step == run.plan.end_step()
}

/// kNN every so many epochs, and at the end of a run that evaluates at all.
fn evaluate_if_due(run: &mut Run, reporter: &mut Reporter) -> Result<(), WorkerError> {
    let epoch = run.next_step / run.plan.steps_per_epoch;
    let due = is_evaluation_due(run);
    let Some(evaluator) = run.evaluator.as_mut().filter(|_| due) else { return Ok(()) };
    reporter.phase(Phase::Eval);
    run.checkpoints.finish(&mut run.metrics, reporter)?;
    run.learner.passes.forget(); // its memory is not the evaluation's
    agree::on_statistics(&*run.collectives, run.next_step, &run.plan.recipe, &mut run.learner.state)?;
    let learner = &run.learner;
    let line = evaluator.knn(&*run.collectives, &*learner.method, &learner.state, run.next_step, epoch)?;
    run.metrics.write(&line)?;
    if run.identity.rank != 0 {
        return Ok(());
    }
    reporter.event(WorkerEvent::Eval {
        step: line.step,
        epoch: line.epoch,
        knn_top1: line.knn_top1.unwrap_or_default(),
        knn_random_init: line.knn_random_init,
        knn_raw_pixels: line.knn_raw_pixels,
        protocol: line.protocol,
    });
    Ok(())
}

/// Whether `count` is a multiple of `n`, of which 0 means never.
fn is_multiple(count: u64, n: u64) -> bool {
    n > 0 && count.is_multiple_of(n)
}

/// The whole run. When all ranks end together, a checkpoint under way is completed first.
fn run_to_end(run: &mut Run, reporter: &mut Reporter) -> Result<Outcome, WorkerError> {
    let outcome = train(run, reporter);
    if run.identity.world_size > 1 && outcome.as_ref().is_err_and(|error| !error.is_known()) {
        return outcome; // the others may be gone, and would be waited for
    }
    let finished = run.checkpoints.finish(&mut run.metrics, reporter);
    let outcome = outcome.and_then(|outcome| finished.map(|()| outcome))?;
    let written = run.metrics.finish();
    match outcome {
        // What was measured last counts only when it can be read.
        Outcome::Done => agree::together(&*run.collectives, written)?,
        Outcome::Preempted => {
            drop(written.inspect_err(|error| tracing::warn!("{error}: the last lines are lost")))
        }
    }
    Ok(outcome)
}

/// One rank, from the command line to its exit code.
pub fn command(args: &TrainArgs) -> Result<i32, WorkerError> {
    let stop = StopFlag::install()?; // before what takes time: a signal from here on loses nothing
    let world = World::find()?;
    let (local, mut reporter) = match setup::join(args, &world) {
        Ok(joined) => joined,
        Err(error) => return Err(world.leave(error)),
    };
    let shares = reporter.shares();
    let outcome = setup::run(local, &world, shares, stop).and_then(|mut run| {
        reporter.resumed(run.next_step);
        let outcome = run_to_end(&mut run, &mut reporter);
        let Some(group) = &run.group else { return outcome };
        match outcome {
            Ok(outcome) => group.finish().map(|()| outcome),
            Err(error) => {
                let error = world.waits.explain(group.ahead().explain(error));
                reporter.fails(&error); // before what may not return
                group.abort(error.exit_code());
                Err(error)
            }
        }
    });
    match outcome {
        Ok(outcome) => {
            let exit_code =
                if outcome == Outcome::Preempted { exit_code::PREEMPTED } else { exit_code::DONE };
            tracing::info!(exit_code, "finished");
            reporter.phase(Phase::Done);
            reporter.event(WorkerEvent::Finished { exit_code });
            reporter.close();
            world.collectives.finish().map_err(|error| WorkerError::Failed(error.to_string()))?;
            Ok(exit_code)
        }
        Err(error) => {
            let error = world.waits.explain(error);
            reporter.failed(&error);
            Err(world.leave(error))
        }
    }
}
