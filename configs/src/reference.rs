//! The table of every key, as `docs/recipes.md` holds it.

use std::fmt::Write;

use crate::defaults::{self, layer};
use crate::error::ConfigError;
use crate::recipe::Recipe;
use crate::schema::{Decides, KEYS, Kind};

const HEAD: &str = "\
# Recipes

<!-- Written by a test from the table of keys: BLESS=1 cargo test --release -p mentee-config -->

A recipe is a TOML file. What it leaves out is filled in from the method's defaults, from the preset of the
views and from what holds for all (`configs/defaults/`); what it writes wins over those, and
`--set section.key=value` wins over the file. What a method's defaults say of views (MoCo v3's do) goes with its own preset: a
recipe that names another `views.preset` has that one as it is. A value after `--set` is read as TOML; what is not TOML is a
string as it stands, so quotes can be left out. Unknown keys, wrong types and values out of range are refused
with exit code 2.

`data.path` and `eval.path` are relative to the current directory of the command, not to the recipe.

The resolved recipe is written to `RUN/plan.toml`. Keys marked • decide the numbers of a run: a run directory
is resumed only by a recipe that agrees in all of them.

Sources: `byol/…` are files of google-deepmind/deepmind-research, `main_simsiam.py` and `simsiam/…` of
facebookresearch/simsiam, `main_moco.py` of facebookresearch/moco-v3; \"the preset\" stands for the source at the head of
`configs/defaults/views-<preset>.toml`; \"ours\" comes from no paper.
";

/// The page in Markdown: every key with its values, default, unit, meaning and source, and the built-in
/// recipes.
///
/// # Errors Only if a file in `configs/defaults/` is not right, which the tests exclude.
pub fn markdown() -> Result<String, ConfigError> {
    let mut page = HEAD.to_owned();
    let mut section = "";
    for key in KEYS {
        if key.section() != section {
            section = key.section();
            let _ = write!(
                page,
                "\n## [{section}]\n\n| key | | value | default | unit | meaning | source of the default |\n\
                 |---|---|---|---|---|---|---|\n"
            );
        }
        let mark = if key.decides == Decides::Yes { "•" } else { "" };
        let cells = [
            format!("`{}`", key.name()),
            mark.into(),
            values(&key.kind),
            default(key.path)?,
            key.unit.into(),
            key.meaning.into(),
            key.source.into(),
        ];
        let _ = writeln!(page, "| {} |", cells.join(" | "));
    }
    page.push_str(
        "\n## Rules between keys\n\n\
         - `method.stop_gradient` = false needs `method.teacher` = \"shared\", and another method than \"mocov3\".\n\
         - `method.fixed_predictor_lr` = true needs `method.predictor` = true.\n\
         - Keys that do nothing are refused where they are written: `method.tau_base` and `method.tau_schedule` under another\n  \
           teacher than \"ema\", `method.temperature` under another method than \"mocov3\", `method.predictor_hidden` without a\n  \
           predictor, `method.projector_hidden` with one layer, `optimizer.betas`, `momentum` and `lars_eta` under an optimizer\n  \
           that has none, `parallel.sync_batch_norm` = true with `parallel.norm_statistics` = \"running\". A `--set` that makes a key\n  \
           of the recipe's file idle is no such case.\n\
         - `schedule.warmup_epochs` is less than `schedule.epochs`.\n\
         - `model.backbone` = \"resnet20\" needs `model.stem` = \"cifar\".\n\
         - `model.stem` = \"imagenet\" needs `views.size` of 32 or more.\n\
         - `eval.knn_bank` is 0 or at least `eval.knn_k`.\n\
         - `schedule.global_batch` is at most the number of training images, and at least the number of \
         ranks (twice that\n  \
           with `parallel.sync_batch_norm` = false).\n\
         - `optimizer.base_lr` and `optimizer.weight_decay` have no default under another optimizer than the \
         method's.\n\
         \n## Built-in recipes\n\nThey can be given by name: `mentee run demo`. Their files are in \
         `configs/recipes/`.\n\n",
    );
    for name in Recipe::built_in_names() {
        let _ = writeln!(page, "- `{name}`");
    }
    Ok(page)
}

fn values(kind: &Kind) -> String {
    match (kind, kind.range()) {
        (Kind::Choice(words), _) => {
            words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
        }
        (Kind::Name | Kind::Reals { .. } | Kind::Path { may_be_empty: false }, range) => range,
        (_, range) if range.is_empty() => kind.expected(),
        (_, range) => format!("{} {range}", kind.expected()),
    }
}

/// The default as the layers hold it: one value, or one for each method or preset, those with equal values
/// together.
fn default(path: &str) -> Result<String, ConfigError> {
    let mut by_value: Vec<(String, Vec<&str>)> = Vec::new();
    for (layers, prefix) in [(defaults::METHODS, ""), (defaults::VIEWS, "views-"), (defaults::BASE, "")] {
        for (name, _) in layers {
            if let Some(entry) = layer(layers, name)?.0.get(path) {
                let value = match entry.value {
                    toml::Value::Float(small) if small != 0.0 && small.abs() < 1e-3 => format!("`{small:e}`"),
                    ref value => format!("`{value}`"),
                };
                let whose = name.strip_prefix(prefix).unwrap_or(name);
                match by_value.iter_mut().find(|(known, _)| *known == value) {
                    Some((_, names)) => names.push(whose),
                    None => by_value.push((value, vec![whose])),
                }
            }
        }
    }
    Ok(match &by_value[..] {
        [] if path == "run.name" => String::new(),
        [] => "**required**".into(),
        [(value, _)] => value.clone(),
        _ => {
            let of_each = by_value.iter().map(|(value, names)| match &names[..] {
                ["base"] => format!("else {value}"),
                names => {
                    let names: Vec<_> = names.iter().filter(|name| **name != "base").copied().collect();
                    format!("{}: {value}", names.join(", "))
                }
            });
            of_each.collect::<Vec<_>>().join("; ")
        }
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_in_docs_is_this_one() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/recipes.md");
        let page = super::markdown().unwrap();
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &page).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == page, "docs/recipes.md is stale: BLESS=1 cargo test --release -p mentee-config");
    }
}
