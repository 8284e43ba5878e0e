//! A step keeps no memory. Alone in its program, so that nobody else's memory is counted.

use mentee_config::{Plan, Recipe};
use mentee_ssl::layers::OverRanks;
use mentee_ssl::{Schedule, State};
use tch::{Device, Kind, Tensor};

const STEPS: u64 = 200;
/// Less than 64 bytes a step.
const SLACK: usize = 64 * STEPS as usize;

/// Bytes that the program has been given and has not given back.
fn live() -> usize {
    // SAFETY: no preconditions.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

#[test]
fn steps_keep_no_memory() {
    let sets = ["parallel.precision=f32", "views.size=32", "schedule.global_batch=8"].map(String::from);
    let recipe = Recipe::load("byol-cifar10-small", &sets).unwrap();
    let plan = Plan::new(recipe, 1 << 20, 1).unwrap();
    let recipe = &plan.recipe;
    let schedule = Schedule::new(&plan);
    let (method, mut state): (_, State) = mentee_ssl::state::new(recipe).unwrap();
    let views = Tensor::randn([2 * 8, 8, 8, 3], (Kind::Float, Device::Cpu)).permute([0, 3, 1, 2]);
    let mut steps = |from: u64| {
        for step in from..from + STEPS {
            let statistics = recipe.parallel.norm_statistics;
            let out = state.loss(&*method, &views, 8, statistics, &OverRanks::ALONE).unwrap();
            state.backward(&out.loss, 0).unwrap();
            let layout = state.student.weights.layout.clone();
            state.gradients.complete(&layout).unwrap();
            let norm = state.grad_norm().unwrap();
            state.clip_gradients(norm, 1.0).unwrap();
            state.update(&schedule.at(step), step).unwrap();
            state.move_teacher(recipe.method.teacher, &schedule.at(step), false).unwrap();
        }
        live()
    };
    let warm = steps(0);
    let end = steps(STEPS);
    assert!(end <= warm + SLACK, "{} bytes after {STEPS} steps, {} after as many more", warm, end);
}
