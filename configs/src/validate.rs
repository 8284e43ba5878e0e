//! Ranges of single values, from the table of keys, and every rule between values, as one list.

use std::collections::BTreeMap;

use toml::Value;

use crate::error::{ConfigError, Place};
use crate::file::Entries;
use crate::recipe::{Backbone, MethodName, NormStatistics, OptimizerName, Recipe, Stem, Teacher};
use crate::schema;

impl Recipe {
    /// Checks every range and every rule between keys. What [`Recipe::load`] returns has passed already; this
    /// is for recipes changed or made in Rust.
    ///
    /// # Errors [`ConfigError::Range`] or [`ConfigError::Conflict`], naming the first key that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let table = self.to_table()?;
        for key in schema::KEYS {
            if let Some(value) = table.get(key.section()).and_then(|section| section.get(key.name())) {
                in_range(key, value, || Place::Recipe)?;
            }
        }
        self.conflicts(|_| Place::Recipe)
    }

    /// The same for what was read, so that an error says where the value stands.
    pub(crate) fn from_entries(entries: Entries) -> Result<Recipe, ConfigError> {
        for key in schema::KEYS {
            if let Some(entry) = entries.0.get(key.path) {
                in_range(key, &entry.value, || entry.place.clone())?;
            }
        }
        let places = entries.places();
        let recipe = Recipe::from_table(entries.into_table())?;
        recipe.conflicts(|path| places.get(path).cloned().unwrap_or(Place::Recipe))?;
        Ok(recipe)
    }

    /// Refuses a key that was written and that another one makes idle: who wrote it expects something of it. What a file
    /// holds beside a `--set` that makes it idle stays, so that one argument switches a part of a recipe off; so does what a
    /// plan holds.
    pub(crate) fn refuse_idle(
        &self,
        is_plan: bool,
        places: &BTreeMap<&'static str, Place>,
    ) -> Result<(), ConfigError> {
        let (method, optimizer) = (&self.method, self.optimizer.name);
        let idle: &[(bool, &[&str], &str)] = &[
            (method.teacher != Teacher::Ema, &["method.tau_base", "method.tau_schedule"], "method.teacher"),
            (method.name != MethodName::Mocov3, &["method.temperature"], "method.name"),
            (!method.predictor, &["method.predictor_hidden"], "method.predictor"),
            (method.projector_layers == 1, &["method.projector_hidden"], "method.projector_layers"),
            (optimizer != OptimizerName::Adamw, &["optimizer.betas"], "optimizer.name"),
            (optimizer == OptimizerName::Adamw, &["optimizer.momentum"], "optimizer.name"),
            (optimizer != OptimizerName::Lars, &["optimizer.lars_eta"], "optimizer.name"),
            (
                self.parallel.norm_statistics == NormStatistics::Running && self.parallel.sync_batch_norm,
                &["parallel.sync_batch_norm"],
                "parallel.norm_statistics",
            ),
        ];
        let table = self.to_table()?;
        let value = |path: &str| {
            let key = schema::find(path)?;
            Some(schema::one_line(table.get(key.section())?.get(key.name())?))
        };
        let by_set = |path: &str| matches!(places.get(path), Some(Place::Set(_)));
        let written = |path: &str| by_set(path) || matches!(places.get(path), Some(Place::File { .. }));
        for &(_, keys, because) in idle.iter().filter(|(is_idle, ..)| *is_idle) {
            for key in keys.iter().filter(|key| written(key)) {
                // Another method brings another teacher, optimizer and predictor.
                let switched_off = by_set(because) || by_set("method.name");
                if by_set(key) || !(is_plan || switched_off) {
                    return Err(ConfigError::Conflict {
                        key: (*key).to_owned(),
                        value: value(key).unwrap_or_default(),
                        place: places.get(key).cloned().unwrap_or(Place::Recipe),
                        why: format!(
                            "it does nothing with `{because}` = {}; leave it out",
                            value(because).unwrap_or_default()
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// The rules between keys. Each names the key to change, its value, and the value that forbids it.
    fn conflicts(&self, place: impl Fn(&str) -> Place) -> Result<(), ConfigError> {
        let conflict = |key: &str, value: String, why: String| {
            Err(ConfigError::Conflict { key: key.to_owned(), value, place: place(key), why })
        };
        let (method, schedule) = (&self.method, &self.schedule);

        if !method.stop_gradient && method.teacher != Teacher::Shared {
            let why = "gradients can only flow into a target that is the student itself; set \
                       `method.teacher` = \"shared\"";
            return conflict("method.stop_gradient", "false".into(), why.into());
        }
        if !method.stop_gradient && method.name == MethodName::Mocov3 {
            let why = "the keys of `method.name` = \"mocov3\" never have a gradient; leave it out";
            return conflict("method.stop_gradient", "false".into(), why.into());
        }
        if method.fixed_predictor_lr && !method.predictor {
            let why = "there is no predictor as `method.predictor` = false; leave one of them out";
            return conflict("method.fixed_predictor_lr", "true".into(), why.into());
        }
        if schedule.warmup_epochs >= schedule.epochs as f64 {
            let why = format!(
                "warm-up must end before the run of `schedule.epochs` = {} does; lower it",
                schedule.epochs
            );
            return conflict("schedule.warmup_epochs", Value::Float(schedule.warmup_epochs).to_string(), why);
        }
        if self.model.backbone == Backbone::Resnet20 && self.model.stem != Stem::Cifar {
            let why =
                "`model.backbone` = \"resnet20\" is made for small images and has only the stem \"cifar\"";
            return conflict("model.stem", "\"imagenet\"".into(), why.into());
        }
        if self.model.stem == Stem::Imagenet && self.views.size < 32 {
            let why = "the stem \"imagenet\" and four stages halve a view five times, so it needs 32 pixels; \
                       raise it or \
                       set `model.stem` = \"cifar\"";
            return conflict("views.size", self.views.size.to_string(), why.into());
        }
        if self.eval.knn_bank > 0 && self.eval.knn_bank < self.eval.knn_k {
            let why =
                format!("smaller than the `eval.knn_k` = {} neighbours that vote; raise it", self.eval.knn_k);
            return conflict("eval.knn_bank", self.eval.knn_bank.to_string(), why);
        }
        Ok(())
    }
}

fn in_range(key: &schema::Key, value: &Value, place: impl Fn() -> Place) -> Result<(), ConfigError> {
    match key.kind.refusal(value) {
        None => Ok(()),
        Some(allowed) => Err(ConfigError::Range {
            key: key.path.to_owned(),
            value: schema::one_line(value),
            place: place(),
            allowed,
        }),
    }
}
