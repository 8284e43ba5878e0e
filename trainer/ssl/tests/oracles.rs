//! Networks, losses, schedules and updates against closed forms and plain tensor operations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mentee_config::recipe::{Decay, NormStatistics};
use mentee_config::{Plan, Recipe};
use mentee_ssl::layers::{GatherRows, OverRanks, Pass};
use mentee_ssl::loss::{cosine, swap_views};
use mentee_ssl::{Schedule, SslError, State};
use tch::{Device, Kind, Tensor};

/// libtorch has one random generator a process: tests that draw from it take turns.
fn serial() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn recipe(sets: &[&str]) -> Recipe {
    let mut all = vec!["parallel.precision=f64", "schedule.warmup_epochs=0", "views.size=32"];
    all.extend(sets);
    let sets: Vec<String> = all.into_iter().map(String::from).collect();
    Recipe::load("byol-cifar10-small", &sets).unwrap()
}

fn views(samples: i64, seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn([2 * samples, 8, 8, 3], (Kind::Double, Device::Cpu)).permute([0, 3, 1, 2])
}

fn named(state: &State) -> BTreeMap<String, Tensor> {
    state.tensors().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn parameter_counts_are_torchvisions_without_the_classifier() {
    let _turn = serial();
    // sum(p.numel() for p in torchvision.models.resnetX().parameters()) minus fc's.
    for (backbone, expected) in [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
    ] {
        let sets = [&format!("model.backbone={backbone}") as &str, "model.stem=imagenet"];
        let (_, state) = mentee_ssl::state::new(&recipe(&sets)).unwrap();
        let count: i64 = state
            .student
            .weights
            .layout
            .params()
            .filter(|place| place.declaration.name.starts_with("backbone."))
            .map(|place| place.range.end - place.range.start)
            .sum();
        assert_eq!(count, expected, "{backbone}");
    }
}

#[test]
fn names_are_torchvisions() {
    let _turn = serial();
    let sets = ["model.backbone=resnet50", "model.stem=imagenet"];
    let (_, state) = mentee_ssl::state::new(&recipe(&sets)).unwrap();
    let tensors = named(&state);
    for (name, shape) in [
        ("student.backbone.conv1.weight", vec![64, 3, 7, 7]),
        ("student.backbone.bn1.running_mean", vec![64]),
        ("student.backbone.layer1.0.downsample.0.weight", vec![256, 64, 1, 1]),
        ("student.backbone.layer4.2.bn3.weight", vec![2048]),
        ("student.backbone.layer2.0.conv2.weight", vec![128, 128, 3, 3]),
        ("student.projector.0.bias", vec![512]),
        ("student.projector.1.running_var", vec![512]),
        ("student.projector.3.weight", vec![128, 512]),
        ("student.predictor.0.weight", vec![512, 128]),
        ("teacher.projector.3.weight", vec![128, 512]),
        ("momentum.student.predictor.3.weight", vec![128, 512]),
    ] {
        let tensor = tensors.get(name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(tensor.size(), shape, "{name}");
    }
    assert!(!tensors.contains_key("student.projector.3.bias"), "BYOL's last layers have no bias");
    assert!(!tensors.keys().any(|name| name.starts_with("teacher.predictor")));
}

#[test]
fn byols_loss_is_0_for_equal_and_8_for_opposite_directions() {
    let _turn = serial();
    let a = Tensor::from_slice(&[3.0, 4.0, 1.0, 0.0, 3.0, 4.0, 1.0, 0.0]).view([4, 2]);
    let (same, opposite) = (&a * 7.0, &a * -0.5);
    let byol = |p: &Tensor, t: &Tensor| {
        let cosines = cosine(p, &swap_views(t).unwrap()).unwrap();
        (cosines * -2.0 + 2.0).sum(Kind::Double).double_value(&[]) / 2.0
    };
    assert!(byol(&a, &same).abs() < 1e-12);
    assert!((byol(&a, &opposite) - 8.0).abs() < 1e-12);
    // Row 0 of view 1 is compared with row 0 of view 2.
    let swapped = swap_views(&Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]).view([4, 1])).unwrap();
    assert!(swapped.equal(&Tensor::from_slice(&[3.0, 4.0, 1.0, 2.0]).view([4, 1])));
}

#[test]
fn schedules_are_deepminds() {
    let _turn = serial();
    let mut sets = vec!["schedule.epochs=100", "schedule.global_batch=256", "optimizer.base_lr=0.4"];
    sets.push("method.tau_base=0.99");
    let mut recipe = recipe(&sets);
    recipe.schedule.warmup_epochs = 10.0;
    let plan = Plan::new(recipe.clone(), 2560, 1).unwrap();
    let schedule = Schedule::new(&plan);
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    close(schedule.at(0).lr, 0.0);
    close(schedule.at(50).lr, 0.2);
    close(schedule.at(100).lr, 0.4);
    close(schedule.at(550).lr, 0.2);
    close(schedule.at(1000).lr, 0.0);
    close(schedule.at(0).tau, 0.99);
    close(schedule.at(500).tau, 0.995);
    close(schedule.at(1000).tau, 1.0);

    // SimSiam's, from the peak that a warm-up ends at: epoch by epoch over those that are left.
    recipe.schedule.decay = Decay::CosinePerEpoch;
    let schedule = Schedule::new(&Plan::new(recipe.clone(), 2560, 1).unwrap());
    for (step, lr) in [(99, 0.396), (100, 0.4), (109, 0.4), (550, 0.2), (559, 0.2)] {
        close(schedule.at(step).lr, lr);
    }
    assert!(schedule.at(549).lr > schedule.at(550).lr);
    // Without one, over all of them (main_simsiam.py, adjust_learning_rate).
    recipe.schedule.warmup_epochs = 0.0;
    let schedule = Schedule::new(&Plan::new(recipe, 2560, 1).unwrap());
    for (step, epoch) in [(0, 0.0), (9, 0.0), (10, 1.0), (999, 99.0)] {
        close(schedule.at(step).lr, 0.4 * 0.5 * (1.0 + (std::f64::consts::PI * epoch / 100.0).cos()));
    }
}

/// Gradients of one loss in the flat buffer.
fn backward(state: &mut State, loss: &Tensor) {
    state.backward(loss, 0).unwrap();
    state.gradients.complete(&state.student.weights.layout).unwrap();
}

#[test]
fn parts_of_a_step_in_bf16_are_added_up_in_f32() {
    let _turn = serial();
    const PARTS: i64 = 16;
    let (method, mut state) = mentee_ssl::state::new(&recipe(&["parallel.precision=bf16"])).unwrap();
    let len = state.student.weights.layout.len;
    let loss = |state: &mut State, part: i64| {
        let views = views(4, 100 + part).to_kind(Kind::Float);
        state
            .loss(&*method, &views, 4 * PARTS.cast_unsigned(), NormStatistics::Batch, &OverRanks::ALONE)
            .unwrap()
            .loss
    };
    // Each part alone is what bf16 makes of it; their sum in f32 has no error of bf16's but those.
    let mut expected = Tensor::zeros([len], (Kind::Float, Device::Cpu));
    for part in 0..PARTS {
        let loss = loss(&mut state, part);
        backward(&mut state, &loss);
        expected += &state.gradients.flat;
    }
    for part in 0..PARTS {
        let loss = loss(&mut state, part);
        state.backward(&loss, part as usize).unwrap();
    }
    assert!(expected.norm().double_value(&[]) > 0.0);
    assert_eq!(max_difference(&state.gradients.flat, &expected), 0.0);
    // The next step starts from nothing.
    let mut once = || {
        let loss = loss(&mut state, 0);
        backward(&mut state, &loss);
        state.gradients.flat.copy()
    };
    assert_eq!(max_difference(&once(), &once()), 0.0);
}

#[test]
fn a_lars_step_and_the_teacher_follow_their_equations() {
    let _turn = serial();
    let sets = ["optimizer.name=lars", "optimizer.base_lr=0.3", "optimizer.weight_decay=1e-3"];
    let recipe = recipe(&sets);
    let plan = Plan::new(recipe.clone(), 1280, 1).unwrap();
    let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
    let rates = Schedule::new(&plan).at(3);
    // Two steps, so that momentum counts.
    for step in 0..2 {
        let before = named(&state);
        let out =
            state.loss(&*method, &views(4, 7 + step), 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
        backward(&mut state, &out.loss);
        let gradients: BTreeMap<String, Tensor> = state
            .student
            .weights
            .layout
            .params()
            .map(|place| {
                let gradient = mentee_ssl::layout::view(&state.gradients.flat, place).unwrap();
                (format!("student.{}", place.declaration.name), gradient.copy())
            })
            .collect();
        state.update(&rates, step.cast_unsigned()).unwrap();
        state.move_teacher(recipe.method.teacher, &rates, false).unwrap();
        let after = named(&state);
        for (name, gradient) in &gradients {
            let p = &before[name];
            let excluded = name.contains(".bn") || name.ends_with(".bias") || p.dim() == 1;
            let (wd, mut u) = (if excluded { 0.0 } else { 1e-3 }, gradient.copy());
            u += p * wd;
            if !excluded {
                let (p_norm, u_norm) = (p.norm().double_value(&[]), u.norm().double_value(&[]));
                u *= 1e-3 * p_norm / u_norm;
            }
            let momentum = &before[&format!("momentum.{name}")] * 0.9 + u;
            let expected = p - &momentum * rates.lr;
            assert!(max_difference(&after[name], &expected) < 1e-14, "{name}");
            assert!(max_difference(&after[&format!("momentum.{name}")], &momentum) < 1e-14, "{name}");
            if let Some(teacher) = before.get(&name.replace("student.", "teacher.")) {
                let expected = teacher * rates.tau + &after[name] * (1.0 - rates.tau);
                let teacher = &after[&name.replace("student.", "teacher.")];
                assert!(max_difference(teacher, &expected) < 1e-14, "teacher of {name}");
            }
        }
    }
}

#[test]
fn a_gradient_that_is_too_long_is_scaled_and_no_other_is_touched() {
    let _turn = serial();
    let (method, mut state) = mentee_ssl::state::new(&recipe(&[])).unwrap();
    let out = state.loss(&*method, &views(4, 7), 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
    backward(&mut state, &out.loss);
    let (norm, gradient) = (state.grad_norm().unwrap(), state.gradients.flat.copy());
    for longest in [0.0, norm + 1e-5] {
        state.clip_gradients(norm, longest).unwrap();
        assert!(state.gradients.flat.equal(&gradient), "{longest}");
    }
    state.clip_gradients(norm, norm / 4.0).unwrap();
    let (clipped, expected) = (state.grad_norm().unwrap(), norm / (norm + 1e-6) * norm / 4.0);
    assert!((clipped - expected).abs() < 1e-12 * norm, "{norm}: {clipped}");
    assert!(max_difference(&state.gradients.flat, &(gradient * (expected / norm))) < 1e-14);
}

#[test]
fn sgd_and_adamw_follow_pytorchs_equations() {
    let _turn = serial();
    for optimizer in ["sgd", "adamw"] {
        let name_set = format!("optimizer.name={optimizer}");
        let sets = [name_set.as_str(), "optimizer.weight_decay=0.01", "optimizer.base_lr=0.2"];
        let recipe = recipe(&sets);
        let plan = Plan::new(recipe.clone(), 1280, 1).unwrap();
        let rates = Schedule::new(&plan).at(0);
        let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
        let name = "student.backbone.layer2.0.conv1.weight";
        let (mut p, mut m, mut v) = (named(&state)[name].copy(), Tensor::from(0.0), Tensor::from(0.0));
        for step in 0..3u64 {
            let out = state
                .loss(&*method, &views(4, step as i64), 4, NormStatistics::Batch, &OverRanks::ALONE)
                .unwrap();
            backward(&mut state, &out.loss);
            let place = state.student.weights.layout.params().find(|p| name.ends_with(&p.declaration.name));
            let g = mentee_ssl::layout::view(&state.gradients.flat, place.unwrap()).unwrap().copy();
            state.update(&rates, step).unwrap();
            if optimizer == "sgd" {
                m = m * 0.9 + (&g + &p * 0.01);
                p -= &m * rates.lr;
            } else {
                m = m * 0.9 + &g * 0.1;
                v = v * 0.999 + g.square() * 0.001;
                let t = step as i32 + 1;
                let step = (&m / (1.0 - 0.9f64.powi(t))) / ((&v / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
                p = p * (1.0 - rates.lr * 0.01) - step * rates.lr;
            }
            assert!(max_difference(&named(&state)[name], &p) < 1e-13, "{optimizer} step {step}");
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let _turn = serial();
    let recipe = recipe(&[]);
    let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
    let batch = views(4, 3);
    let out = state.loss(&*method, &batch, 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
    backward(&mut state, &out.loss);
    let layout = state.student.weights.layout.clone();
    for name in
        ["backbone.conv1.weight", "backbone.layer3.0.bn2.bias", "projector.0.weight", "predictor.3.weight"]
    {
        let place = layout.params().find(|place| place.declaration.name == name).unwrap();
        let at = place.range.start + 1;
        let analytic = state.gradients.flat.double_value(&[at]);
        let mut loss_at = |shift: f64| {
            let mut element = state.student.weights.master.narrow(0, at, 1);
            let original = element.double_value(&[0]);
            tch::no_grad(|| element.copy_(&Tensor::from_slice(&[original + shift])));
            let loss = state
                .loss(&*method, &batch, 4, NormStatistics::Batch, &OverRanks::ALONE)
                .unwrap()
                .loss
                .double_value(&[]);
            let mut element = state.student.weights.master.narrow(0, at, 1);
            tch::no_grad(|| element.copy_(&Tensor::from_slice(&[original])));
            loss
        };
        let h = 1e-6;
        let numeric = (loss_at(h) - loss_at(-h)) / (2.0 * h);
        assert!(
            (analytic - numeric).abs() < 1e-6 * (1.0 + numeric.abs()),
            "{name}: {analytic} and {numeric}"
        );
    }
}

#[test]
fn without_stop_gradient_the_target_has_gradients_too() {
    let _turn = serial();
    let gradient = |sets: &[&str]| {
        let (method, mut state) = mentee_ssl::state::new(&recipe(sets)).unwrap();
        let out = state.loss(&*method, &views(4, 5), 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
        backward(&mut state, &out.loss);
        state.grad_norm().unwrap()
    };
    let with = gradient(&["method.teacher=shared"]);
    let without = gradient(&["method.teacher=shared", "method.stop_gradient=false"]);
    assert!((with - without).abs() > 1e-6, "{with} and {without}");
}

#[test]
fn a_copied_teacher_moves_only_at_an_epochs_end() {
    let _turn = serial();
    let recipe = recipe(&["method.teacher=copy-each-epoch"]);
    let plan = Plan::new(recipe.clone(), 1280, 1).unwrap();
    let rates = Schedule::new(&plan).at(0);
    let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
    let start = named(&state)["teacher.backbone.conv1.weight"].copy();
    let out = state.loss(&*method, &views(4, 1), 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
    backward(&mut state, &out.loss);
    state.update(&rates, 0).unwrap();
    state.move_teacher(recipe.method.teacher, &rates, false).unwrap();
    assert!(named(&state)["teacher.backbone.conv1.weight"].equal(&start));
    state.move_teacher(recipe.method.teacher, &rates, true).unwrap();
    let now = named(&state);
    assert!(now["teacher.backbone.conv1.weight"].equal(&now["student.backbone.conv1.weight"]));
    assert!(!now["teacher.backbone.conv1.weight"].equal(&start));
}

#[test]
fn a_loaded_state_goes_on_bit_for_bit() {
    let _turn = serial();
    for precision in ["parallel.precision=f32", "parallel.precision=bf16"] {
        let recipe = recipe(&[precision]);
        let plan = Plan::new(recipe.clone(), 1280, 1).unwrap();
        let schedule = Schedule::new(&plan);
        let run = |state: &mut State, method: &dyn mentee_ssl::Method, steps: std::ops::Range<u64>| {
            let mut last = 0.0;
            for step in steps {
                let batch = views(4, step as i64).to_kind(Kind::Float);
                let out = state.loss(method, &batch, 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
                last = out.loss.double_value(&[]);
                backward(state, &out.loss);
                state.update(&schedule.at(step), step).unwrap();
                state.move_teacher(recipe.method.teacher, &schedule.at(step), false).unwrap();
            }
            last
        };
        let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
        run(&mut state, &*method, 0..3);
        let saved = named(&state);
        let expected = run(&mut state, &*method, 3..6);

        let (method, mut other) = mentee_ssl::state::new(&recipe).unwrap();
        other.load(&saved).unwrap();
        assert_eq!(run(&mut other, &*method, 3..6), expected);
        for (name, tensor) in named(&state) {
            assert!(named(&other)[&name].equal(&tensor), "{name}");
        }
    }
}

#[test]
fn a_state_of_another_network_is_refused_by_name() {
    let _turn = serial();
    let (_, mut state) = mentee_ssl::state::new(&recipe(&[])).unwrap();
    let mut tensors = named(&state);
    let removed = tensors.remove("teacher.backbone.bn1.running_var").unwrap();
    let error = state.load(&tensors).unwrap_err().to_string();
    assert_eq!(error, "tensor `teacher.backbone.bn1.running_var`: missing");
    tensors.insert("teacher.backbone.bn1.running_var".into(), removed);
    tensors.insert("student.extra".into(), Tensor::from(1.0));
    let error = state.load(&tensors).unwrap_err().to_string();
    assert_eq!(error, "tensor `student.extra`: not part of this recipe");
}

/// Every row of [N, D] as numbers, L2-normalised.
fn unit_rows(x: &Tensor) -> Vec<Vec<f64>> {
    Vec::<Vec<f64>>::try_from(x)
        .unwrap()
        .into_iter()
        .map(|row| {
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.into_iter().map(|v| v / norm).collect()
        })
        .collect()
}

#[test]
fn mocov3s_loss_is_its_equation() {
    let _turn = serial();
    let recipe = recipe(&["method.name=mocov3", "method.temperature=0.4"]);
    let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
    let (n, batch) = (5, views(5, 3));
    let (mut stats, teacher) = (state.student.stats.clone(), state.teacher.as_ref().unwrap());
    let mut teacher_stats = teacher.stats.clone();
    let networks = method.networks();
    let (q, k) = {
        let student = Pass::train(&state.student.weights, &mut stats, 2, &OverRanks::ALONE);
        let teacher = Pass::train(&teacher.weights, &mut teacher_stats, 2, &OverRanks::ALONE);
        let z = networks.project(&student, &batch).unwrap();
        (networks.predict(&student, &z).unwrap(), networks.project(&teacher, &batch).unwrap())
    };
    let (q, k) = (unit_rows(&q), unit_rows(&k));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut expected = 0.0;
    for (queries, keys) in [(&q[..n], &k[n..]), (&q[n..], &k[..n])] {
        for (i, query) in queries.iter().enumerate() {
            let all: f64 = keys.iter().map(|key| (dot(query, key) / 0.4).exp()).sum();
            expected += 2.0 * 0.4 * (all.ln() - dot(query, &keys[i]) / 0.4) / n as f64;
        }
    }
    let found = state.loss(&*method, &batch, n as u64, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
    let loss = found.loss.double_value(&[]);
    assert!((loss - expected).abs() < 1e-12, "{loss} and {expected}");
    assert_eq!(found.projections.size(), [10, 128]);
}

#[test]
fn mocov3_over_two_ranks_is_mocov3_on_one() {
    let _turn = serial();
    let recipe = recipe(&["method.name=mocov3"]);
    let (method, mut state) = mentee_ssl::state::new(&recipe).unwrap();
    let batch = views(8, 3);
    let mut loss_and_gradient = |batch: &Tensor, gather: Option<Arc<GatherRows>>| {
        let over = OverRanks { reduce: None, gather };
        // Norms that do not look at the batch: the keys are all that ranks have in common.
        let out = state.loss(&*method, batch, 8, NormStatistics::Running, &over).unwrap();
        backward(&mut state, &out.loss);
        (out.loss.double_value(&[]), state.gradients.flat.copy())
    };
    let (whole, gradient) = loss_and_gradient(&batch, None);
    let both = batch.chunk(2, 0);
    let share = |rank: i64, rows: i64| {
        let first = if rank == 0 { 0 } else { 8 - rows };
        Tensor::cat(&[both[0].narrow(0, first, rows), both[1].narrow(0, first, rows)], 0)
    };
    // Shares of 3 and 5: first what each rank hands out, then what both get.
    let shares = [share(0, 3), share(1, 5)];
    let handed_out: Arc<Mutex<Vec<Tensor>>> = Arc::default();
    for share in &shares {
        let kept = handed_out.clone();
        let gather = move |rows: &Tensor| -> Result<(Tensor, i64), SslError> {
            kept.lock().unwrap().push(rows.copy());
            Ok((rows.copy(), 0))
        };
        let _ = loss_and_gradient(share, Some(Arc::new(gather)));
    }
    let (mut loss, mut sum) = (0.0, gradient.zeros_like());
    for (share, first) in shares.iter().zip([0i64, 3]) {
        let all = handed_out.clone();
        let gather = move |_: &Tensor| -> Result<(Tensor, i64), SslError> {
            Ok((Tensor::cat(&all.lock().unwrap(), 0), first))
        };
        let (part, gradient) = loss_and_gradient(share, Some(Arc::new(gather)));
        loss += part;
        sum += gradient;
    }
    assert!((loss - whole).abs() < 1e-12, "{loss} and {whole}");
    let difference = max_difference(&sum, &gradient);
    assert!(difference < 1e-12 && gradient.abs().max().double_value(&[]) > 1e-3, "{difference}");
}

#[test]
fn features_are_kept_on_request_and_change_nothing() {
    let _turn = serial();
    for one_pass in [true, false] {
        let step = |keep: bool| {
            let (method, mut state) = mentee_ssl::state::new(&recipe(&[])).unwrap();
            (state.one_pass, state.keep_features) = (one_pass, keep);
            let out =
                state.loss(&*method, &views(4, 5), 4, NormStatistics::Batch, &OverRanks::ALONE).unwrap();
            backward(&mut state, &out.loss);
            (out.loss.double_value(&[]), state.gradients.flat.copy(), out.features)
        };
        let (loss, gradient, none) = step(false);
        let (same_loss, same_gradient, features) = step(true);
        assert_eq!(loss, same_loss);
        assert!(gradient.equal(&same_gradient) && none.is_none());
        let features = features.unwrap();
        assert_eq!(features.size(), [8, 64]);
        assert!(!features.requires_grad());
    }
}
