//! Learning rate, weight decay and tau: pure functions of the step.

use mentee_config::plan::Plan;
use mentee_config::recipe::{Decay, TauSchedule};

/// What one update uses.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Rates {
    /// Learning rate of everything but the predictor.
    pub lr: f64,
    /// Learning rate of the predictor.
    pub predictor_lr: f64,
    /// The teacher's momentum.
    pub tau: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

/// The schedules of a run.
#[derive(Debug, Clone)]
pub struct Schedule {
    plan: Plan,
}

impl Schedule {
    /// The schedules that the plan asks for.
    pub fn new(plan: &Plan) -> Self {
        Self { plan: plan.clone() }
    }

    /// The rates of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> Rates {
        let recipe = &self.plan.recipe;
        let method = &recipe.method;
        let lr = self.learning_rate(step);
        let span = recipe.schedule.epochs * self.plan.steps_per_epoch;
        Rates {
            lr,
            predictor_lr: if method.fixed_predictor_lr { self.plan.peak_lr } else { lr },
            // DeepMind's byol/utils/schedules.py, target_ema.
            tau: match method.tau_schedule {
                TauSchedule::Cosine => 1.0 - (1.0 - method.tau_base) * cosine_decay(step as f64, span as f64),
                TauSchedule::Constant => method.tau_base,
            },
            weight_decay: recipe.optimizer.weight_decay,
        }
    }

    /// Linear from 0 over the warm-up, then as the recipe's decay says (byol/utils/schedules.py, learning_schedule).
    fn learning_rate(&self, step: u64) -> f64 {
        let (plan, schedule) = (&self.plan, &self.plan.recipe.schedule);
        if step < plan.warmup_steps {
            return plan.peak_lr * step as f64 / plan.warmup_steps as f64;
        }
        let span = schedule.epochs * plan.steps_per_epoch;
        plan.peak_lr
            * match schedule.decay {
                Decay::Constant => 1.0,
                Decay::Cosine => {
                    cosine_decay((step - plan.warmup_steps) as f64, (span - plan.warmup_steps) as f64)
                }
                Decay::CosinePerEpoch => {
                    // SimSiam's, which has no warm-up; behind one, of the epochs that are left.
                    let (done, left) = (step - plan.warmup_steps, span - plan.warmup_steps);
                    let epoch = plan.steps_per_epoch;
                    cosine_decay((done / epoch) as f64, left as f64 / epoch as f64)
                }
            }
    }
}

/// (1 + cos(π·step/span)) / 2: from 1 to 0.
fn cosine_decay(step: f64, span: f64) -> f64 {
    let ratio = if span > 0.0 { (step / span).clamp(0.0, 1.0) } else { 1.0 };
    0.5 * (1.0 + libm::cos(std::f64::consts::PI * ratio)) // the same on every machine
}
