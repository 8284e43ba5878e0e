//! When two recipes are the same run: equal in every key that decides the numbers.

use std::path::Path;

use crate::defaults;
use crate::error::ConfigError;
use crate::recipe::Recipe;
use crate::schema::{Decides, KEYS, Key};

/// What every machine may have its own of: where its images lie, and how many threads it gives them. Not `model.init`:
/// it decides by its path, so that ranks must have the same.
const PER_MACHINE: [&str; 4] = ["data.path", "parallel.threads", "parallel.decode_threads", "eval.path"];

impl Recipe {
    /// 16 hexadecimal digits over everything that decides the loss curve: every key marked • in docs/recipes.md. Not the data
    /// (its own digest says what it is), not names, threads, logging, checkpoints or evaluation; nor `views.preset`, as the
    /// values that it stands for are in there. Of `model.init` it is the path.
    ///
    /// # Panics
    /// As [`Recipe::to_toml`].
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let before = defaults::before();
        for (key, value) in self.deciding() {
            if before.0.get(key).is_some_and(|entry| entry.value.to_string() == value) {
                continue; // as it was when there was no such key: so is the hash
            }
            hasher.update(format!("{key} = {value}\n").as_bytes());
        }
        hasher.finalize().to_hex()[..16].to_owned()
    }

    /// The first deciding key in which this recipe ("here") differs from `other` ("there"):
    /// `schedule.global_batch = 256 there, 128 here`.
    ///
    /// # Panics
    /// As [`Recipe::to_toml`].
    pub fn first_difference(&self, other: &Recipe) -> Option<String> {
        self.deciding()
            .into_iter()
            .zip(other.deciding())
            .find(|(here, there)| here != there)
            .map(|((key, here), (_, there))| format!("{key} = {there} there, {here} here"))
    }

    /// How this recipe differs from that of the run in `run_dir`, as [`Recipe::first_difference`] says it. A run that has made
    /// neither a step nor a checkpoint has nothing to lose: its recipe may be corrected.
    ///
    /// # Errors
    /// As [`Recipe::from_plan`].
    pub fn difference_to_run(&self, run_dir: &Path) -> Result<Option<String>, ConfigError> {
        let plan = run_dir.join("plan.toml");
        let has_metrics = run_dir.join("metrics.jsonl").metadata().is_ok_and(|file| file.len() > 0);
        let has_checkpoint =
            || run_dir.join("checkpoints").read_dir().is_ok_and(|mut entries| entries.next().is_some());
        if !plan.exists() || !(has_metrics || has_checkpoint()) {
            return Ok(None);
        }
        Ok(self.first_difference(&Recipe::from_plan(&plan)?))
    }

    /// What the ranks of a run must have alike, keys with their values in the order of the table of keys: all but what each machine
    /// may have its own of. Keys that decide no number are among it, as many of them decide what ranks do together, and when.
    ///
    /// # Panics
    /// As [`Recipe::to_toml`].
    pub fn shared(&self) -> Vec<(&'static str, String)> {
        self.values(|key| !PER_MACHINE.contains(&key.path))
    }

    /// The deciding keys and their values.
    fn deciding(&self) -> Vec<(&'static str, String)> {
        self.values(|key| key.decides == Decides::Yes)
    }

    /// The values of the keys that are `wanted` as TOML writes them, in the order of the table of keys.
    fn values(&self, wanted: impl Fn(&Key) -> bool) -> Vec<(&'static str, String)> {
        let table = self.to_table().expect("a validated recipe can be written as TOML");
        KEYS.iter()
            .filter(|key| wanted(key))
            .map(|key| (key.path, table[key.section()][key.name()].to_string()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_has_done_nothing_is_of_any_recipe() {
        let run_dir = std::env::temp_dir().join(format!("mentee-difference-{}", std::process::id()));
        std::fs::create_dir_all(run_dir.join("checkpoints")).unwrap();
        let recipe = |set: &str| Recipe::load("demo", &[set.to_owned()]).unwrap();
        let (own, other) = (recipe("run.seed=1"), recipe("run.seed=2"));
        assert_eq!(own.difference_to_run(&run_dir).unwrap(), None, "no run");
        std::fs::write(run_dir.join("plan.toml"), other.to_toml()).unwrap();
        std::fs::write(run_dir.join("metrics.jsonl"), "").unwrap();
        assert_eq!(own.difference_to_run(&run_dir).unwrap(), None, "no step");
        let differs = Some("run.seed = 2 there, 1 here".to_owned());
        std::fs::write(run_dir.join("metrics.jsonl"), "{}\n").unwrap();
        assert_eq!(own.difference_to_run(&run_dir).unwrap(), differs);
        assert_eq!(other.difference_to_run(&run_dir).unwrap(), None);
        std::fs::remove_file(run_dir.join("metrics.jsonl")).unwrap();
        std::fs::create_dir(run_dir.join("checkpoints/step-00000001")).unwrap();
        assert_eq!(own.difference_to_run(&run_dir).unwrap(), differs);
        std::fs::remove_dir_all(&run_dir).unwrap();
    }
}
