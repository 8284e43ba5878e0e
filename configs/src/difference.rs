//! When two recipes are the same run: equal in every key that decides the numbers.

use crate::recipe::{DataOrder, Recipe};
use crate::schema::{Decides, KEYS};

impl Recipe {
    /// 16 hexadecimal digits over everything that decides the loss curve: `run.seed`, `data.order`, `[views]`, `[model]`,
    /// `[method]`, `[optimizer]`, `[schedule]` without `max_steps`, `parallel.precision` and
    /// `parallel.sync_batch_norm`. Not the data (its own digest says what it is), not names, paths, threads,
    /// logging, checkpoints or evaluation; nor `views.preset`, as the values that it stands for are in there.
    ///
    /// # Panics As [`Recipe::to_toml`].
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        // These came after the first hashes: what there was before leaves them as they were.
        let as_before = |key: &str| match key {
            "data.order" => self.data.order == DataOrder::Global,
            "model.init" => self.model.init.as_os_str().is_empty(),
            "method.temperature" => self.method.temperature == 1.0,
            _ => false,
        };
        for (key, value) in self.deciding().into_iter().filter(|(key, _)| !as_before(key)) {
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

    /// The deciding keys and their values as TOML writes them, in the order of the table of keys.
    fn deciding(&self) -> Vec<(&'static str, String)> {
        let table = self.to_table().expect("a validated recipe can be written as TOML");
        KEYS.iter()
            .filter(|key| key.decides == Decides::Yes)
            .map(|key| (key.path, table[key.section()][key.name()].to_string()))
            .collect()
    }
}
