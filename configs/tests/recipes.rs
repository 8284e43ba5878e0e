//! The built-in recipes, what fills a short one in, the round trip through `plan.toml`, and which keys make a
//! run.

use std::path::Path;

use mentee_config::recipe::*;
use mentee_config::{ConfigError, Plan};
use toml::Value;

fn load(name: &str, sets: &[&str]) -> Result<Recipe, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    Recipe::load(name, &sets)
}

/// A recipe of two lines, in a file called `short.toml`.
fn short(method: &str, sets: &[&str]) -> Recipe {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short.toml");
    std::fs::write(&path, format!("[data]\npath = \"images\"\n[method]\nname = \"{method}\"\n")).unwrap();
    load(path.to_str().unwrap(), sets).unwrap()
}

#[test]
fn every_recipe_file_is_built_in_and_resolves() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut files: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    files.sort();
    let mut built_in: Vec<_> = Recipe::built_in_names().collect();
    built_in.sort();
    assert_eq!(files, built_in);
    for name in built_in {
        let by_name = load(name, &[]).unwrap();
        let by_path = load(folder.join(format!("{name}.toml")).to_str().unwrap(), &[]).unwrap();
        assert_eq!(by_name, by_path);
        assert_eq!(by_name.run.name, name);
        Plan::new(by_name, 50_000, 2).unwrap();
    }
}

#[test]
fn byol_on_imagenet_has_deepminds_presets() {
    // byol/configs/byol.py: _LR_PRESETS, _WD_PRESETS, _EMA_PRESETS.
    for (epochs, base_lr, weight_decay, tau_base) in
        [(100, 0.45, 1e-6, 0.99), (300, 0.3, 1e-6, 0.99), (1000, 0.2, 1.5e-6, 0.996)]
    {
        let recipe = load(&format!("byol-imagenet-resnet50-{epochs}ep"), &[]).unwrap();
        let Recipe { views, model, method, optimizer, schedule, parallel, .. } = recipe;
        assert_eq!((schedule.epochs, schedule.global_batch, schedule.warmup_epochs), (epochs, 4096, 10.0));
        assert_eq!((schedule.decay, schedule.max_steps), (Decay::Cosine, 0));
        assert_eq!(
            optimizer,
            Optimizer {
                name: OptimizerName::Lars,
                base_lr,
                momentum: 0.9,
                weight_decay,
                lars_eta: 1e-3,
                exclude_bias_and_norm: true,
                betas: [0.9, 0.999],
                clip_norm: 0.0,
            }
        );
        assert_eq!(
            method,
            Method {
                name: MethodName::Byol,
                projector_layers: 2,
                projector_hidden: 4096,
                projector_out: 256,
                predictor_hidden: 4096,
                predictor: true,
                stop_gradient: true,
                teacher: Teacher::Ema,
                tau_base,
                tau_schedule: TauSchedule::Cosine,
                fixed_predictor_lr: false,
                temperature: 1.0,
            }
        );
        assert_eq!(
            model,
            Model {
                backbone: Backbone::Resnet50,
                stem: Stem::Imagenet,
                zero_init_residual: true,
                init: "".into(),
            }
        );
        assert_eq!(
            views,
            Views {
                preset: ViewPreset::Byol,
                definition: Definition::Byol,
                size: 224,
                resize: Interpolation::Bicubic,
                crop_area: [0.08, 1.0],
                crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
                flip: 0.5,
                jitter: 0.8,
                brightness: 0.4,
                contrast: 0.4,
                saturation: 0.2,
                hue: 0.1,
                grayscale: 0.2,
                blur: [1.0, 0.1],
                blur_sigma: [0.1, 2.0],
                solarize: [0.0, 0.2],
                mean: [0.485, 0.456, 0.406],
                std: [0.229, 0.224, 0.225],
            }
        );
        assert_eq!((parallel.precision, parallel.sync_batch_norm), (Precision::F32, true));
    }
}

#[test]
fn simsiam_has_the_official_values() {
    let recipe = load("simsiam-imagenet-resnet50", &[]).unwrap();
    assert_eq!((recipe.schedule.epochs, recipe.schedule.global_batch), (100, 512));
    assert_eq!((recipe.schedule.warmup_epochs, recipe.schedule.decay), (0.0, Decay::CosinePerEpoch));
    let sgd = |base_lr, weight_decay| Optimizer {
        name: OptimizerName::Sgd,
        base_lr,
        momentum: 0.9,
        weight_decay,
        lars_eta: 1e-3,
        exclude_bias_and_norm: false,
        betas: [0.9, 0.999],
        clip_norm: 0.0,
    };
    assert_eq!(recipe.optimizer, sgd(0.05, 1e-4));
    let Method { projector_layers, projector_hidden, projector_out, predictor_hidden, .. } = recipe.method;
    assert_eq!((projector_layers, projector_hidden, projector_out, predictor_hidden), (3, 2048, 2048, 512));
    assert_eq!((recipe.method.teacher, recipe.method.fixed_predictor_lr), (Teacher::Shared, true));
    assert!(recipe.model.zero_init_residual);
    let Views { definition, resize, crop_area, saturation, hue, blur, solarize, .. } = recipe.views;
    assert_eq!(
        (definition, resize, crop_area),
        (Definition::Torchvision, Interpolation::Bilinear, [0.2, 1.0])
    );
    assert_eq!((saturation, hue, blur, solarize), (0.4, 0.1, [0.5, 0.5], [0.0, 0.0]));

    let recipe = load("simsiam-cifar10-resnet18", &[]).unwrap();
    assert_eq!(
        (recipe.schedule.epochs, recipe.schedule.global_batch, recipe.method.projector_layers),
        (800, 512, 2)
    );
    assert_eq!(recipe.optimizer, sgd(0.03, 5e-4));
    assert_eq!((recipe.views.size, recipe.views.blur, recipe.views.crop_area), (32, [0.0, 0.0], [0.2, 1.0]));
    assert_eq!((recipe.model.backbone, recipe.model.stem), (Backbone::Resnet18, Stem::Cifar));
}

#[test]
fn a_short_recipe_is_the_methods_reference() {
    let mut byol = load("byol-imagenet-resnet50-100ep", &["data.path=images"]).unwrap();
    byol.run.name = "short".into();
    assert_eq!(short("byol", &[]), byol);
    let mut simsiam = load("simsiam-imagenet-resnet50", &["data.path=images"]).unwrap();
    simsiam.run.name = "short".into();
    assert_eq!(short("simsiam", &[]), simsiam);
}

#[test]
fn defaults_follow_what_is_given() {
    let cifar = short("byol", &["views.preset=byol-cifar"]);
    assert_eq!((cifar.views.size, cifar.views.blur, cifar.model.stem), (32, [0.0, 0.0], Stem::Cifar));
    // What is given stays, whatever the preset says.
    let large = short("byol", &["views.preset=byol-cifar", "views.size=64", "model.stem=imagenet"]);
    assert_eq!((large.views.size, large.model.stem), (64, Stem::Imagenet));
    assert_eq!(short("byol", &["model.backbone=resnet20"]).model.stem, Stem::Cifar);
    assert!(!short("simsiam", &["method.predictor=false"]).method.fixed_predictor_lr);
    // Another optimizer than the method's: its rate and decay are asked for, its exclusion is the usual one.
    let sets = ["optimizer.name=lars", "optimizer.base_lr=0.3", "optimizer.weight_decay=1e-6"];
    assert!(short("simsiam", &sets).optimizer.exclude_bias_and_norm);
    assert!(!short("simsiam", &["optimizer.name=sgd"]).optimizer.exclude_bias_and_norm);
}

#[test]
fn the_small_recipes_differ_in_the_method_alone() {
    let changed = load("byol-cifar10-small", &["method.name=mocov3", "method.temperature=0.2"]).unwrap();
    let mocov3 = load("mocov3-cifar10-small", &[]).unwrap();
    assert_eq!(mocov3.first_difference(&changed), None);
    assert_eq!((&mocov3.parallel, &mocov3.eval), (&changed.parallel, &changed.eval));
}

#[test]
fn a_preset_that_is_not_the_methods_is_taken_as_it_is() {
    let byol = load("byol-cifar10-small", &[]).unwrap();
    let mocov3 = load("byol-cifar10-small", &["method.name=mocov3"]).unwrap();
    assert_eq!(mocov3.views, byol.views);
    let named = short("mocov3", &["views.preset=byol"]);
    assert_eq!(named.views, short("mocov3", &[]).views);
    assert_eq!((named.views.resize, named.views.crop_area), (Interpolation::Bilinear, [0.2, 1.0]));
}

#[test]
fn a_key_that_a_set_makes_idle_stays_and_a_plan_may_hold_idle_keys() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    for set in
        ["method.teacher=shared", "method.predictor=false", "method.projector_layers=1", "optimizer.name=sgd"]
    {
        // This recipe's file writes tau, both widths, momentum and LARS's coefficient.
        let recipe =
            load("byol-imagenet-resnet50-100ep", &[set, "optimizer.base_lr=1", "optimizer.weight_decay=0"]);
        let recipe = recipe.unwrap();
        std::fs::write(&path, recipe.to_toml()).unwrap();
        let plan = Recipe::from_plan(&path).unwrap();
        let as_recipe = load(path.to_str().unwrap(), &["run.log_every_steps=5"]).unwrap();
        assert_eq!((plan.hash(), as_recipe.hash()), (recipe.hash(), recipe.hash()), "{set}");
    }
    // Another method, which brings another teacher, in one argument.
    for name in ["byol-cifar10-small", "byol-cifar10-resnet18", "simsiam-cifar10-resnet18"] {
        for method in ["byol", "simsiam", "mocov3"] {
            if let Err(error) = load(name, &[&format!("method.name={method}")]) {
                assert!(!error.to_string().contains("does nothing"), "{name}, {method}: {error}");
            }
        }
    }
    load("byol-cifar10-small", &["method.name=simsiam"]).unwrap();
}

#[test]
fn the_asymmetries_can_all_be_switched() {
    for (name, sets) in [
        ("byol", &["method.predictor=false"][..]),
        ("byol", &["method.teacher=shared", "method.stop_gradient=false"]),
        ("byol", &["method.teacher=copy-each-epoch"]),
        ("simsiam", &["method.predictor=false"]),
        ("simsiam", &["method.stop_gradient=false"]),
        ("simsiam", &["method.teacher=ema"]),
    ] {
        short(name, sets);
    }
    // As README has it, with any of the built-in recipes.
    for name in Recipe::built_in_names() {
        for sets in [
            &["method.predictor=false"][..],
            &["method.teacher=shared"],
            &["method.stop_gradient=false", "method.teacher=shared"],
        ] {
            let loaded = load(name, sets);
            assert!(
                loaded.is_ok() || (name.starts_with("mocov3") && sets.len() == 2),
                "{name} {sets:?}: {:?}",
                loaded.err()
            );
        }
    }
}

#[test]
fn set_reads_toml_or_a_bare_string_and_the_last_one_wins() {
    let sets = [
        "schedule.epochs=20",
        "schedule.epochs = 30",
        "data.path=/images/2024 (new)",
        "eval.path=2024",
        "run.name=\"quoted = name\"",
        "model.backbone=resnet18",
        "views.blur=[0, 0.5]",
        "parallel.sync_batch_norm=false",
        "optimizer.base_lr=1",
        "run.seed=0x10",
        "schedule.max_steps=1_000",
    ];
    let recipe = short("byol", &sets);
    assert_eq!(recipe.schedule.epochs, 30);
    assert_eq!(recipe.data.path, Path::new("/images/2024 (new)"));
    assert_eq!(recipe.eval.path, Path::new("2024"));
    assert_eq!(recipe.run.name, "quoted = name");
    assert_eq!(recipe.model.backbone, Backbone::Resnet18);
    assert_eq!(recipe.views.blur, [0.0, 0.5]);
    assert!(!recipe.parallel.sync_batch_norm);
    assert_eq!(recipe.optimizer.base_lr, 1.0);
    assert_eq!((recipe.run.seed, recipe.schedule.max_steps), (16, 1000));
}

#[test]
fn a_recipe_comes_back_from_its_plan_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let awkward = [
        "optimizer.base_lr=0.1234567890123456789",
        "optimizer.weight_decay=5e-324",
        "optimizer.momentum=0.30000000000000004",
        "run.collapse_z_std=1e300",
        "run.seed=9223372036854775807",
        "data.path=C:\\images \"of\" 'é'\t#1",
    ];
    for name in Recipe::built_in_names() {
        for sets in [&awkward[..], &[]] {
            let recipe = load(name, sets).unwrap();
            std::fs::write(&path, recipe.to_toml()).unwrap();
            let as_plan = Recipe::from_plan(&path).unwrap();
            assert_eq!(as_plan, recipe);
            assert_eq!(as_plan.to_toml(), recipe.to_toml());
            // A plan is a recipe too, and overrides apply to it.
            assert_eq!(load(path.to_str().unwrap(), &[]).unwrap(), recipe);
            let longer = load(path.to_str().unwrap(), &["schedule.epochs=4321"]).unwrap();
            assert_eq!(longer.schedule.epochs, 4321);
            as_plan.validate().unwrap();
        }
    }
}

/// Some other value of the same type and within the same range, so that the recipe stays valid.
fn other_value(key: &str, value: &Value) -> Value {
    let word = match key {
        "data.format" => "tar",
        "data.order" => "windowed",
        "data.on_error" => "skip",
        "data.resident" => "auto",
        "views.preset" => "simsiam",
        "views.definition" => "torchvision",
        "views.resize" => "bilinear",
        "model.backbone" => "resnet101",
        "model.stem" => "cifar",
        "method.name" => "simsiam",
        "method.teacher" => "shared",
        "method.tau_schedule" => "constant",
        "optimizer.name" => "adamw",
        "schedule.decay" => "constant",
        "parallel.precision" => "f64",
        "parallel.norm_statistics" => "running",
        "parallel.device" => "cpu",
        "run.on_collapse" => "stop",
        _ => "other",
    };
    match value {
        Value::String(_) => Value::String(word.into()),
        Value::Integer(whole) if key == "eval.knn_bank" => Value::Integer(whole + 1000),
        Value::Integer(whole) => Value::Integer(whole + 1),
        Value::Float(real) => Value::Float(other_real(*real)),
        Value::Boolean(switch) => Value::Boolean(!switch),
        Value::Array(items) => {
            let mut items = items.clone();
            items[0] = Value::Float(other_real(items[0].as_float().unwrap()));
            Value::Array(items)
        }
        other => panic!("{key} = {other}"),
    }
}

fn other_real(real: f64) -> f64 {
    if real == 0.0 { 0.125 } else { real * 0.75 }
}

#[test]
fn mocov3_has_the_official_values() {
    let recipe = load("mocov3-imagenet-resnet50", &[]).unwrap();
    let method = &recipe.method;
    assert_eq!((method.projector_hidden, method.projector_out, method.predictor_hidden), (4096, 256, 4096));
    assert_eq!((method.temperature, method.tau_base, method.teacher), (1.0, 0.99, Teacher::Ema));
    assert_eq!((recipe.optimizer.base_lr, recipe.optimizer.weight_decay), (0.6, 1e-6));
    assert_eq!(
        (recipe.views.crop_area, recipe.views.blur, recipe.views.solarize),
        ([0.2, 1.0], [1.0, 0.1], [0.0, 0.2])
    );
    // A recipe that names the method alone has them too.
    let mut named = load("mocov3-imagenet-resnet50", &["data.path=images"]).unwrap();
    named.run.name = "short".into();
    assert_eq!(short("mocov3", &[]), named);
    let error = load("mocov3-imagenet-resnet50", &["method.teacher=shared", "method.stop_gradient=false"]);
    assert!(error.unwrap_err().to_string().contains("never have a gradient"));
}

#[test]
fn the_hash_depends_on_what_decides_the_numbers_and_on_nothing_else() {
    let no_matter = [
        "run.name",
        "run.log_every_steps",
        "data.path",
        "data.format",
        "data.on_error",
        "data.max_skipped",
        "data.resident",
        "data.resident_mib",
        "views.preset",
        "schedule.max_steps",
        "parallel.device",
        "parallel.threads",
        "parallel.decode_threads",
        "parallel.bucket_mib",
        "parallel.overlap_teacher",
        "parallel.check_every_steps",
        "parallel.check_collectives",
        "parallel.timeout_s",
        "parallel.stall_s",
        "run.collapse_z_std",
        "run.collapse_steps",
        "run.on_collapse",
        "checkpoint.every_epochs",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "checkpoint.wait_for_room_s",
        "eval.path",
        "eval.knn_every_epochs",
        "eval.knn_k",
        "eval.knn_temperature",
        "eval.knn_bank",
        "eval.online_probe",
    ];
    let recipe = load("byol-imagenet-resnet50-100ep", &[]).unwrap();
    let hash = recipe.hash();
    assert_eq!(hash.len(), 16);
    assert!(hash.bytes().all(|digit| digit.is_ascii_hexdigit()));
    assert_eq!(recipe.first_difference(&recipe), None);

    let (mut seen, mut hashes) = (0, std::collections::BTreeSet::new());
    let table = toml::Table::try_from(&recipe).unwrap();
    for (section, keys) in &table {
        for (name, value) in keys.as_table().unwrap() {
            let key = format!("{section}.{name}");
            let other = other_value(&key, value);
            assert_ne!(&other, value, "{key}");
            let mut changed = table.clone();
            changed[section][name] = other.clone();
            let changed: Recipe = changed.try_into().unwrap();
            if no_matter.contains(&key.as_str()) {
                assert_eq!(changed.hash(), hash, "{key}");
                assert_eq!(changed.first_difference(&recipe), None, "{key}");
            } else {
                assert_ne!(changed.hash(), hash, "{key}");
                assert!(hashes.insert(changed.hash()), "{key}");
                assert_eq!(
                    changed.first_difference(&recipe),
                    Some(format!("{key} = {value} there, {other} here"))
                );
            }
            seen += 1;
        }
    }
    assert_eq!(seen, no_matter.len() + hashes.len());
}

#[test]
fn ranks_share_every_key_but_those_of_a_machine() {
    let recipe = load("byol-imagenet-resnet50-100ep", &[]).unwrap();
    let table = toml::Table::try_from(&recipe).unwrap();
    let mut own = Vec::new();
    for (section, keys) in &table {
        for (name, value) in keys.as_table().unwrap() {
            let key = format!("{section}.{name}");
            let mut changed = table.clone();
            changed[section][name] = other_value(&key, value);
            let changed: Recipe = changed.try_into().unwrap();
            if changed.shared() == recipe.shared() {
                own.push(key);
            }
        }
    }
    own.sort();
    assert_eq!(
        own,
        ["data.path", "eval.path", "parallel.decode_threads", "parallel.threads"],
        "what each machine may have its own of"
    );
}

#[test]
fn the_hash_of_a_recipe_stays_between_versions() {
    // A run directory holds this number; when it changes, no run of an earlier version can be resumed.
    assert_eq!(load("byol-imagenet-resnet50-100ep", &[]).unwrap().hash(), "af27b4894f595042");
}

#[test]
fn a_seed_that_toml_cannot_hold_is_an_error() {
    let mut recipe = load("demo", &[]).unwrap();
    recipe.run.seed = u64::MAX;
    let message = recipe.validate().unwrap_err().to_string();
    assert!(
        message.ends_with("must be what TOML can hold: whole numbers below 2^63 and UTF-8 paths"),
        "{message}"
    );
    assert!(!message.contains('\n'), "{message}");
}
