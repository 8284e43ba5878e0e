//! What a training step does to the networks. [`crate::train`] says in which order; `bench` and `trace` take the same steps.

use std::ops::Range;
use std::sync::Arc;

use mentee_cluster::Phase;
use mentee_collectives::Collectives;
use mentee_config::Plan;
use mentee_config::plan::share;
use mentee_ssl::layers::OverRanks;
use mentee_ssl::{Method, Rates, SslError, State, StepLoss};
use tch::{Device, Tensor};

use crate::device::DeviceGroup;
use crate::error::WorkerError;
use crate::faults::GradientFault;
use crate::lane::Communication;
use crate::passes::Passes;
use crate::reducer::GradientReducer;
use crate::{across, views};

/// One rank's networks and what trains them.
pub struct Learner {
    pub method: Box<dyn Method>,
    pub state: State,
    pub passes: Passes,
    pub reducer: GradientReducer,
    /// Whether gradients are summed over ranks while backward goes on; else behind it.
    pub overlaps: bool,
    /// This rank's positions within the global batch.
    pub rank_share: Range<u64>,
    /// What the networks get from the other ranks.
    over_ranks: OverRanks,
    plan: Plan,
}

impl Learner {
    /// Every rank calls it at the same point. `may_record`: whether a device's work may be recorded as a graph.
    pub fn new(
        plan: &Plan,
        (method, mut state): (Box<dyn Method>, State),
        collectives: &Arc<dyn Collectives>,
        group: Option<&DeviceGroup>,
        (device, may_record): (Device, bool),
    ) -> Result<Self, WorkerError> {
        let recipe = &plan.recipe;
        let (rank, world_size) = (collectives.rank(), collectives.world_size());
        // Several ranks would have to record their sums as well; several parts differ in size.
        let may_record = may_record && world_size == 1 && recipe.parallel.micro_batches == 1;
        Ok(Self {
            passes: Passes::new(device, may_record)?,
            reducer: GradientReducer::new(collectives, group, &mut state, recipe.parallel.bucket_mib)?,
            overlaps: true,
            rank_share: share(recipe.schedule.global_batch, rank, world_size),
            over_ranks: across::over_ranks(recipe, collectives, group),
            plan: plan.clone(),
            method,
            state,
        })
    }

    /// This rank's part of the loss of `views` [V·N, 3, H, W], micro-batch by micro-batch, and of its gradient. `phase` is told
    /// what begins. `fault` goes wrong in this step.
    pub fn loss_and_gradient(
        &mut self,
        views: &Tensor,
        fault: Option<GradientFault>,
        mut phase: impl FnMut(Phase) -> Result<(), SslError>,
    ) -> Result<Vec<StepLoss>, SslError> {
        let Self { method, state, passes, reducer, over_ranks, .. } = self;
        let recipe = &self.plan.recipe;
        let (global_batch, statistics) = (recipe.schedule.global_batch, recipe.parallel.norm_statistics);
        reducer.begin(&state.gradients, fault);
        let micro_batches = views::micro_batches(views, &self.rank_share, recipe.parallel.micro_batches)?;
        let mut parts = Vec::with_capacity(micro_batches.len());
        for (n, views) in micro_batches.iter().enumerate() {
            phase(Phase::Forward)?;
            let part = passes.run(views, |views| {
                let part = state.loss(&**method, views, global_batch, statistics, over_ranks)?; // the paper's equation
                phase(Phase::Backward)?;
                if self.overlaps && n + 1 == micro_batches.len() {
                    reducer.last_pass(); // from here on, gradients are summed over ranks as they are completed
                }
                state.backward(&part.loss, n)?;
                Ok::<_, SslError>(part)
            })?;
            parts.push(part);
        }
        phase(Phase::Backward)?; // also where both passes were recorded before, and are at work on a device
        Ok(parts)
    }

    /// Every rank holds the gradient of the mean over the global batch.
    pub fn sum_gradients(&mut self, step: u64) -> Result<Communication, WorkerError> {
        self.reducer.finish(&mut self.state, step)
    }

    /// Whether this rank's own gradient was finite before it was summed.
    pub fn own_was_finite(&self) -> bool {
        self.reducer.own_was_finite(&self.state.gradients)
    }

    /// The student moves against the gradient, whose norm is `grad_norm`, and the teacher follows it.
    pub fn update(&mut self, rates: &Rates, step: u64, grad_norm: f64) -> Result<(), SslError> {
        let recipe = &self.plan.recipe;
        let epoch_ends = (step + 1).is_multiple_of(self.plan.steps_per_epoch);
        self.state.clip_gradients(grad_norm, recipe.optimizer.clip_norm)?;
        self.state.update(rates, step)?;
        self.state.move_teacher(recipe.method.teacher, rates, epoch_ends) // teacher ← tau·teacher + (1 − tau)·student
    }
}
