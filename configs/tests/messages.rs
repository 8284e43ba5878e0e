//! Every way a recipe can be wrong, and the line the user then reads.

use std::path::Path;

use mentee_config::Recipe;
use mentee_config::recipe::{Device, OnDataError};

/// Smallest recipe that loads.
const SMALL: &str = "[data]\npath = \"images\"\n[method]\nname = \"byol\"\n";

/// The message for a file of that text; the file's folder is cut from it.
fn message(text: &str, sets: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("my.toml");
    std::fs::write(&path, text).unwrap();
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    let error = Recipe::load(path.to_str().unwrap(), &sets).expect_err(text);
    let line = error.to_string().replace(&format!("{}/", folder.path().display()), "");
    assert!(!line.contains('\n'), "one line: {line}");
    line
}

#[track_caller]
fn says(text: &str, expected: &str) {
    assert_eq!(message(text, &[]), expected);
}

#[track_caller]
fn set_says(set: &str, expected: &str) {
    assert_eq!(message(SMALL, &[set]), expected);
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    says(
        "[data]\npath = \"x\"\n\n[optimizer]\nbase_lrr = 0.3\n",
        "unknown key `optimizer.base_lrr` in my.toml (line 5): did you mean `base_lr`?",
    );
    says(
        "[optimizer]\nlr = 0.3\n",
        "unknown key `optimizer.lr` in my.toml (line 2): did you mean `base_lr`?",
    );
    says(
        "[schedule]\nbatch_size = 8\n",
        "unknown key `schedule.batch_size` in my.toml (line 2): did you mean `global_batch`?",
    );
    says(
        "[optimizer]\nepochs = 3\n",
        "unknown key `optimizer.epochs` in my.toml (line 2): did you mean `schedule.epochs`?",
    );
    says(
        "[optimizer]\nwarmup = 3\n",
        "unknown key `optimizer.warmup` in my.toml (line 2): did you mean `schedule.warmup_epochs`?",
    );
    says("epochs = 3\n", "unknown key `epochs` in my.toml (line 1): did you mean `schedule.epochs`?");
    says(
        "[checkpoint]\nzzzzzzzz = 1\n",
        "unknown key `checkpoint.zzzzzzzz` in my.toml (line 2): [checkpoint] has every_epochs, every_steps, \
         keep, wait_for_room_s",
    );
    says(
        "[views]\n[views.crop]\narea = 1\n",
        "unknown key `views.crop` in my.toml (line 2): did you mean `crop_area`?",
    );
}

#[test]
fn unknown_sections_name_the_nearest_known_one() {
    says(
        "[optimiser]\nx = 1\n",
        "unknown section `[optimiser]` in my.toml (line 1): did you mean `[optimizer]`?",
    );
    says(
        "[cluster]\nx = 1\n",
        "unknown section `[cluster]` in my.toml (line 1): the sections are run, data, views, model, method, \
         optimizer, \
         schedule, parallel, checkpoint, eval",
    );
}

#[test]
fn the_first_mistake_in_the_file_is_named() {
    says(
        "[schedule]\nepochz = 3\n[optimizer]\nbase_lrr = 1\n",
        "unknown key `schedule.epochz` in my.toml (line 2): did you mean `epochs`?",
    );
}

#[test]
fn wrong_types_say_what_was_expected_and_found() {
    says(
        "[schedule]\nepochs = \"ten\"\n",
        "`schedule.epochs` in my.toml (line 2): expected a whole number, found the string \"ten\"",
    );
    says(
        "[schedule]\nepochs = 1.5\n",
        "`schedule.epochs` in my.toml (line 2): expected a whole number, found the number 1.5",
    );
    says(
        "[schedule]\nepochs = 99999999999999999999\n",
        "`schedule.epochs` in my.toml (line 2): expected a whole number below 2^63, found 1e20",
    );
    says(
        "[optimizer]\nbase_lr = true\n",
        "`optimizer.base_lr` in my.toml (line 2): expected a number, found true",
    );
    says("[run]\nname = 3\n", "`run.name` in my.toml (line 2): expected a string, found the number 3");
    says(
        "[parallel]\nsync_batch_norm = 1\n",
        "`parallel.sync_batch_norm` in my.toml (line 2): expected true or false, found the number 1",
    );
    says(
        "[views]\nblur = 0.5\n",
        "`views.blur` in my.toml (line 2): expected an array of 2 numbers, found the number 0.5",
    );
    says(
        "[views]\nblur = [0.5]\n",
        "`views.blur` in my.toml (line 2): expected an array of 2 numbers, found an array of 1 value",
    );
    says(
        "[views]\nblur = [0.5, \"half\"]\n",
        "`views.blur` in my.toml (line 2): expected an array of 2 numbers, found an array of 2 values",
    );
    says(
        "[run]\nname = 2026-11-23\n",
        "`run.name` in my.toml (line 2): expected a string, found the date 2026-11-23",
    );
    says("[data]\n[data.path]\nx = 1\n", "`data.path` in my.toml (line 2): expected a string, found a table");
    says(
        "optimizer = \"lars\"\n",
        "`optimizer` in my.toml (line 1): expected a section, [optimizer], found a value",
    );
}

#[test]
fn unknown_words_name_the_known_ones() {
    says(
        "[method]\nname = \"boyl\"\n",
        "`method.name` in my.toml (line 2): expected one of \"byol\", \"simsiam\", \"mocov3\", found the string \
         \"boyl\": did you \
         mean \"byol\"?",
    );
    says(
        "[parallel]\nprecision = \"fp16\"\n",
        "`parallel.precision` in my.toml (line 2): expected one of \"f32\", \"bf16\", \"f64\", found the \
         string \
         \"fp16\": did you mean \"bf16\"?",
    );
    says(
        "[optimizer]\nname = \"rmsprop\"\n",
        "`optimizer.name` in my.toml (line 2): expected one of \"lars\", \"sgd\", \"adamw\", found the \
         string \
         \"rmsprop\"",
    );
}

#[test]
fn ranges_name_key_value_and_range() {
    for (section, line, expected) in [
        ("method", "tau_base = 2", "`method.tau_base` = 2.0 in my.toml (line 6): must be in [0, 1]"),
        ("method", "tau_base = nan", "`method.tau_base` = nan in my.toml (line 6): must be in [0, 1]"),
        (
            "method",
            "projector_layers = 0",
            "`method.projector_layers` = 0 in my.toml (line 6): must be in [1, 8]",
        ),
        (
            "method",
            "projector_out = 0",
            "`method.projector_out` = 0 in my.toml (line 6): must be in [1, 65536]",
        ),
        (
            "schedule",
            "global_batch = 0",
            "`schedule.global_batch` = 0 in my.toml (line 6): must be in [2, 16777216]",
        ),
        ("schedule", "epochs = 0", "`schedule.epochs` = 0 in my.toml (line 6): must be in [1, 1000000]"),
        ("schedule", "epochs = -3", "`schedule.epochs` = -3 in my.toml (line 6): must be in [1, 1000000]"),
        (
            "schedule",
            "warmup_epochs = -1",
            "`schedule.warmup_epochs` = -1.0 in my.toml (line 6): must be at least 0 and finite",
        ),
        (
            "optimizer",
            "base_lr = 0",
            "`optimizer.base_lr` = 0.0 in my.toml (line 6): must be greater than 0 and finite",
        ),
        (
            "optimizer",
            "base_lr = inf",
            "`optimizer.base_lr` = inf in my.toml (line 6): must be greater than 0 and finite",
        ),
        ("optimizer", "momentum = 1", "`optimizer.momentum` = 1.0 in my.toml (line 6): must be in [0, 1)"),
        (
            "optimizer",
            "betas = [0.9, 1]",
            "`optimizer.betas` = [0.9, 1.0] in my.toml (line 6): must be 2 numbers in [0, 1)",
        ),
        ("views", "flip = 1.5", "`views.flip` = 1.5 in my.toml (line 6): must be in [0, 1]"),
        ("views", "hue = 0.6", "`views.hue` = 0.6 in my.toml (line 6): must be in [0, 0.5]"),
        ("views", "size = 4", "`views.size` = 4 in my.toml (line 6): must be in [8, 2048]"),
        (
            "views",
            "crop_area = [1, 0.08]",
            "`views.crop_area` = [1.0, 0.08] in my.toml (line 6): must be 2 numbers in (0, 1], the smaller \
             one first",
        ),
        (
            "views",
            "blur = [1, -0.1]",
            "`views.blur` = [1.0, -0.1] in my.toml (line 6): must be 2 numbers in [0, 1]",
        ),
        (
            "views",
            "std = [0.2, 0.0, 0.2]",
            "`views.std` = [0.2, 0.0, 0.2] in my.toml (line 6): must be 3 numbers in (0, 1]",
        ),
        ("run", "seed = -1", "`run.seed` = -1 in my.toml (line 6): must be at least 0"),
        ("run", "log_every_steps = 0", "`run.log_every_steps` = 0 in my.toml (line 6): must be at least 1"),
        (
            "run",
            r#"name = "a\nb""#,
            r#"`run.name` = "a\nb" in my.toml (line 6): must be a name without `/`, control characters or a leading dot"#,
        ),
        (
            "run",
            "name = \"a/b\"",
            "`run.name` = \"a/b\" in my.toml (line 6): must be a name without `/`, control characters or a \
             leading dot",
        ),
        ("checkpoint", "keep = -1", "`checkpoint.keep` = -1 in my.toml (line 6): must be at least 0"),
        ("eval", "knn_k = 0", "`eval.knn_k` = 0 in my.toml (line 6): must be at least 1"),
        (
            "eval",
            "knn_temperature = 0",
            "`eval.knn_temperature` = 0.0 in my.toml (line 6): must be greater than 0 and finite",
        ),
        ("parallel", "threads = 5000", "`parallel.threads` = 5000 in my.toml (line 6): must be in [0, 4096]"),
    ] {
        // The line in question is always the sixth.
        let text = if section == "method" {
            format!("[data]\npath = \"images\"\n\n[method]\nname = \"byol\"\n{line}\n")
        } else {
            format!("{SMALL}[{section}]\n{line}\n")
        };
        says(&text, expected);
    }
    says(
        "[data]\npath = \"\"\n[method]\nname = \"byol\"\n",
        "`data.path` = \"\" in my.toml (line 2): must be a path, not empty",
    );
}

#[test]
fn missing_keys_say_what_they_are_for() {
    says("[data]\npath = \"x\"\n", "missing key `method.name` in my.toml: byol, simsiam or mocov3");
    says(
        "[method]\nname = \"byol\"\n",
        "missing key `data.path` in my.toml: training images; a folder with `train/` (and `test/`, `testing/`, `val/`, `valid/` or \
         `validation/`) means that split; relative to the current directory",
    );
    set_says(
        "optimizer.name=adamw",
        "missing key `optimizer.base_lr` in my.toml: byol has a default for the optimizer lars, none for \
         adamw; give it a \
         value",
    );
    says("", "missing key `method.name` in my.toml: byol, simsiam or mocov3");
}

#[test]
fn rules_between_keys_name_both() {
    set_says(
        "method.stop_gradient=false",
        "`method.stop_gradient` = false in --set method.stop_gradient=false: gradients can only flow into a \
         target that is \
         the student itself; set `method.teacher` = \"shared\"",
    );
    assert_eq!(
        message(SMALL, &["method.predictor=false", "method.fixed_predictor_lr=true"]),
        "`method.fixed_predictor_lr` = true in --set method.fixed_predictor_lr=true: there is no predictor \
         as \
         `method.predictor` = false; leave one of them out"
    );
    set_says(
        "schedule.epochs=10",
        "`schedule.warmup_epochs` = 10.0 in the defaults: warm-up must end before the run of \
         `schedule.epochs` = 10 does; \
         lower it",
    );
    assert_eq!(
        message(SMALL, &["model.backbone=resnet20", "model.stem=imagenet"]),
        "`model.stem` = \"imagenet\" in --set model.stem=imagenet: `model.backbone` = \"resnet20\" is made \
         for small images \
         and has only the stem \"cifar\""
    );
    set_says(
        "views.size=16",
        "`views.size` = 16 in --set views.size=16: the stem \"imagenet\" and four stages halve a view five \
         times, so it \
         needs 32 pixels; raise it or set `model.stem` = \"cifar\"",
    );
    set_says(
        "eval.knn_bank=100",
        "`eval.knn_bank` = 100 in --set eval.knn_bank=100: smaller than the `eval.knn_k` = 200 neighbours \
         that vote; raise \
         it",
    );
}

#[test]
fn keys_that_do_nothing_are_refused_where_they_are_written() {
    for (sets, key, because) in [
        (
            &["method.teacher=shared", "method.tau_base=0.9"][..],
            "method.tau_base",
            "`method.teacher` = \"shared\"",
        ),
        (
            &["method.teacher=copy-each-epoch", "method.tau_schedule=constant"],
            "method.tau_schedule",
            "`method.teacher` = \"copy-each-epoch\"",
        ),
        (&["method.temperature=0.2"], "method.temperature", "`method.name` = \"byol\""),
        (
            &["method.predictor=false", "method.predictor_hidden=8"],
            "method.predictor_hidden",
            "`method.predictor` = false",
        ),
        (
            &["method.projector_layers=1", "method.projector_hidden=8"],
            "method.projector_hidden",
            "`method.projector_layers` = 1",
        ),
        (&["optimizer.betas=[0.9, 0.95]"], "optimizer.betas", "`optimizer.name` = \"lars\""),
        (
            &[
                "optimizer.name=adamw",
                "optimizer.base_lr=1",
                "optimizer.weight_decay=0",
                "optimizer.momentum=0.8",
            ],
            "optimizer.momentum",
            "`optimizer.name` = \"adamw\"",
        ),
        (
            &[
                "optimizer.name=sgd",
                "optimizer.base_lr=1",
                "optimizer.weight_decay=0",
                "optimizer.lars_eta=1",
            ],
            "optimizer.lars_eta",
            "`optimizer.name` = \"sgd\"",
        ),
        (
            &["parallel.norm_statistics=running", "parallel.sync_batch_norm=true"],
            "parallel.sync_batch_norm",
            "`parallel.norm_statistics` = \"running\"",
        ),
    ] {
        let line = message(SMALL, sets);
        assert!(
            line.starts_with(&format!("`{key}` = "))
                && line.contains(" in --set ")
                && line.ends_with(&format!("it does nothing with {because}; leave it out")),
            "{line}"
        );
    }
    says(
        "[data]\npath = \"images\"\n[method]\nname = \"byol\"\ntemperature = 0.2\n",
        "`method.temperature` = 0.2 in my.toml (line 5): it does nothing with `method.name` = \"byol\"; leave it out",
    );
}

#[test]
fn set_names_the_key() {
    set_says(
        "optimizer.base_lrr=2",
        "unknown key `optimizer.base_lrr` in --set optimizer.base_lrr=2: did you mean `base_lr`?",
    );
    set_says(
        "optimiser.base_lr=2",
        "unknown key `optimiser.base_lr` in --set optimiser.base_lr=2: did you mean `optimizer.base_lr`?",
    );
    set_says(
        "optimiser.zzz=2",
        "unknown key `optimiser.zzz` in --set optimiser.zzz=2: did you mean `[optimizer]`?",
    );
    set_says("epochs=2", "unknown key `epochs` in --set epochs=2: did you mean `schedule.epochs`?");
    set_says(
        "schedule.epochs",
        "--set schedule.epochs: expected section.key=value, such as --set optimizer.base_lr=0.3",
    );
    set_says(
        "schedule.epochs=",
        "`schedule.epochs` in --set schedule.epochs=: expected a whole number, found the string \"\"",
    );
    set_says(
        "schedule.epochs=ten",
        "`schedule.epochs` in --set schedule.epochs=ten: expected a whole number, found the string \"ten\"",
    );
    set_says("method.tau_base=2", "`method.tau_base` = 2.0 in --set method.tau_base=2: must be in [0, 1]");
    // A value cannot smuggle in another key.
    set_says(
        "schedule.epochs=3\n[optimizer]",
        "`schedule.epochs` in --set schedule.epochs=3\\n[optimizer]: expected a whole number, found the \
         string \
         \"3\\n[optimizer]\"",
    );
}

#[test]
fn bad_toml_names_the_line() {
    let line = message("[data]\npath = \"x\"\n[method\n", &[]);
    assert!(line.starts_with("my.toml (line 3): not valid TOML: "), "{line}");
    let line = message("[data]\npath = \"x\"\npath = \"y\"\n", &[]);
    assert_eq!(line, "my.toml (line 3): not valid TOML: duplicate key");
}

#[test]
fn recipes_that_are_not_there() {
    let of = |name: &str| Recipe::load(name, &[]).unwrap_err().to_string();
    assert_eq!(
        of("byol-cifar10-smal"),
        "no recipe `byol-cifar10-smal`: did you mean the built-in `byol-cifar10-small`?"
    );
    assert_eq!(
        of("nowhere/demo.toml"),
        "no recipe `nowhere/demo.toml`: no such file; the built-in recipe is called `demo`, without a path"
    );
    assert!(
        of("nowhere/x.toml")
            .starts_with("no recipe `nowhere/x.toml`: no such file, and the built-in ones are byol-")
    );
    let folder = tempfile::tempdir().unwrap();
    let name = format!("{}/", folder.path().display());
    assert_eq!(
        of(&name),
        format!(
            "no recipe `{name}`: it is a folder: give the path of a .toml file, or the name of a built-in recipe"
        )
    );
    std::fs::write(folder.path().join("plan.toml"), "").unwrap();
    let plan = format!("no recipe `{name}`: it is the folder of a run, whose recipe is {name}plan.toml");
    assert_eq!(of(&name), plan);
    let not_text = folder.path().join("x.toml");
    std::fs::write(&not_text, [0xff, 0xfe]).unwrap();
    assert!(of(not_text.to_str().unwrap()).starts_with("cannot read "));
}

#[test]
fn a_plan_must_be_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let plan = Recipe::load("demo", &[]).unwrap().to_toml();
    let of = |text: String| {
        std::fs::write(&path, text).unwrap();
        Recipe::from_plan(&path)
            .unwrap_err()
            .to_string()
            .replace(&format!("{}/", folder.path().display()), "")
    };
    assert_eq!(
        of(plan.replace("tau_base = 0.6\n", "")),
        "missing key `method.tau_base` in plan.toml: a plan holds every key; it was altered, or written by \
         another version \
         of mentee"
    );
    let line = plan.lines().position(|line| line.starts_with("tau_base")).unwrap() + 1;
    assert_eq!(
        of(plan.replace("tau_base = 0.6", "tau_base = 1.01")),
        format!("`method.tau_base` = 1.01 in plan.toml (line {line}): must be in [0, 1]")
    );
    assert_eq!(
        of(plan.replace("tau_base", "tau_bass")),
        format!("unknown key `method.tau_bass` in plan.toml (line {line}): did you mean `tau_base`?")
    );
    // But for the keys that came later: what held before them is known. This one is of the first version, and stays as it is.
    let first = include_str!("plan-of-the-first-version.toml");
    std::fs::write(&path, first).unwrap();
    let (as_plan, as_recipe) = (Recipe::from_plan(&path), Recipe::load(path.to_str().unwrap(), &[]));
    let (as_plan, as_recipe) = (as_plan.unwrap(), as_recipe.unwrap());
    assert_eq!(as_plan.to_toml(), as_recipe.to_toml());
    assert!(first.contains(&format!("decides the numbers: {}", as_plan.hash())), "{}", as_plan.hash());
    assert_eq!((as_plan.optimizer.clip_norm, as_plan.method.temperature), (0.0, 1.0));
    assert_eq!(as_plan.parallel.device, Device::Auto, "it holds that key");
    // One that is older still: without devices, deadlines, damaged images passed over, and the probe.
    let later = ["on_error =", "max_skipped =", "device =", "timeout_s =", "stall_s =", "online_probe ="];
    let is_older = |line: &&str| !later.iter().any(|key| line.starts_with(key));
    let older: Vec<&str> = first.lines().filter(is_older).collect();
    assert_eq!(older.len() + later.len(), first.lines().count());
    std::fs::write(&path, older.join("\n")).unwrap();
    let (older, as_recipe) = (Recipe::from_plan(&path), Recipe::load(path.to_str().unwrap(), &[]));
    let (older, as_recipe) = (older.unwrap(), as_recipe.unwrap());
    assert_eq!(older.to_toml(), as_recipe.to_toml());
    assert_eq!(older.hash(), as_plan.hash());
    assert_eq!((older.parallel.device, older.data.on_error), (Device::Cpu, OnDataError::Fail));
    assert!(!older.eval.online_probe && older.parallel.stall_s > 1e8 && older.parallel.timeout_s > 1e8);
    let missing = Recipe::from_plan(Path::new("nowhere/plan.toml")).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read nowhere/plan.toml: "), "{missing}");
}

#[test]
fn what_is_no_recipe_at_all_is_neither_waited_for_nor_read_for_ever() {
    let of = |path: &str| Recipe::load(path, &[]).unwrap_err().to_string();
    assert_eq!(of("/dev/zero"), "cannot read /dev/zero: longer than 1 MiB: no recipe is");
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let pipe = at("pipe.toml");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(of(&pipe), format!("cannot read {pipe}: is a pipe: give a file"));
    let plan = Recipe::from_plan(Path::new(&pipe)).unwrap_err().to_string();
    assert_eq!(plan, format!("cannot read {pipe}: is a pipe: give a file"));
    std::fs::write(at("long.toml"), format!("{SMALL}#{}", " ".repeat(1 << 20))).unwrap();
    assert!(of(&at("long.toml")).ends_with("longer than 1 MiB: no recipe is"));
    std::fs::write(at("latin.toml"), b"# caf\xe9").unwrap();
    assert!(of(&at("latin.toml")).ends_with("is no text in UTF-8: no recipe"));
}

#[test]
fn a_spoiled_file_is_an_error_of_one_line_and_never_a_panic() {
    let recipe =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/demo.toml")).unwrap();
    let text: String =
        recipe.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.toml");
    let (mut refused, mut taken) = (0, 0);
    let mut check = |spoiled: String| {
        std::fs::write(&path, &spoiled).unwrap();
        match Recipe::load(path.to_str().unwrap(), &[]) {
            Ok(recipe) => {
                taken += 1;
                recipe.validate().unwrap_or_else(|error| panic!("{error}\n{spoiled}"));
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().contains(['\n', '\0']), "{error}");
            }
        }
    };
    for (at, _) in text.char_indices() {
        check(text[..at].to_owned());
        for other in 0..3 {
            let other = ["", "\0", "\n", "\"", "=", "[", ".", "-", "9", "é"][(3 * at + other) % 10];
            check(format!("{}{other}{}", &text[..at], &text[at + 1..]));
        }
    }
    assert!(refused > 1000 && taken > 100, "{refused} refused, {taken} taken");
}
