//! Recipes from files, from the built-in set, and from the `plan.toml` of a run directory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::defaults;
use crate::error::{ConfigError, Place};
use crate::file::Entries;
use crate::recipe::Recipe;
use crate::schema;

/// Names and texts of the recipes in `configs/recipes/`.
macro_rules! recipes {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../recipes/", $name, ".toml")))),*] };
}
const BUILT_IN: &[(&str, &str)] = recipes![
    "byol-cifar10-resnet18",
    "byol-cifar10-small",
    "byol-imagenet-resnet50-100ep",
    "byol-imagenet-resnet50-300ep",
    "byol-imagenet-resnet50-1000ep",
    "demo",
    "mocov3-cifar10-small",
    "mocov3-imagenet-resnet50",
    "simsiam-cifar10-resnet18",
    "simsiam-imagenet-resnet50",
];

/// The longest recipe or plan: a hundred times what one of every key with every comment takes.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a recipe, to be resolved with several kinds of `--set`: a pipe is read once.
#[derive(Debug, Clone)]
pub struct RecipeText {
    text: String,
    /// As messages name it.
    path: PathBuf,
    /// The run's, where the text has none.
    name: String,
}

impl RecipeText {
    /// As [`Recipe::load`] finds it.
    ///
    /// # Errors
    /// [`ConfigError::NotFound`] and [`ConfigError::Read`].
    pub fn read(name_or_path: &str) -> Result<Self, ConfigError> {
        let path = Path::new(name_or_path);
        let is_name = !name_or_path.contains('/') && !name_or_path.ends_with(".toml");
        if is_name && !path.is_file() {
            let built_in = BUILT_IN.iter().find(|(name, _)| *name == name_or_path);
            let (name, text) = built_in.ok_or_else(|| not_found(name_or_path, name_or_path))?;
            let path = format!("built-in {name}.toml").into();
            return Ok(Self { text: (*text).to_owned(), path, name: (*name).to_owned() });
        }
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let text = read(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => not_found(name_or_path, &name),
            _ => ConfigError::Read { path: path.to_owned(), source },
        })?;
        Ok(Self { text, path: path.to_owned(), name })
    }

    /// The recipe, with `--set section.key=value` arguments applied in order.
    ///
    /// # Errors
    /// Those of [`Recipe::load`] but the ones above.
    pub fn resolve(&self, sets: &[String]) -> Result<Recipe, ConfigError> {
        resolve(&self.text, &self.path, &self.name, sets)
    }
}

impl Recipe {
    /// Reads the recipe in a file, or the built-in one of that name, applies `--set section.key=value`
    /// arguments in order, fills in the defaults and checks everything. A resolved recipe (`plan.toml`) is a
    /// recipe too.
    ///
    /// A name without `/` and `.toml` that is no file means a built-in recipe.
    ///
    /// # Errors Any [`ConfigError`] but those of a plan.
    pub fn load(name_or_path: &str, sets: &[String]) -> Result<Recipe, ConfigError> {
        RecipeText::read(name_or_path)?.resolve(sets)
    }

    /// Reads a `plan.toml`: like a recipe, but every key must be there, as a default may change between
    /// versions of mentee and a run's plan may not. Keys that came after it was written have the values that stand in
    /// `configs/defaults/before.toml`.
    ///
    /// # Errors [`ConfigError::Missing`] for a key that is not there, else as [`Recipe::load`].
    pub fn from_plan(path: &Path) -> Result<Recipe, ConfigError> {
        let text = read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Recipe::from_plan_text(&text, path)
    }

    /// Reads the text of a plan that lies elsewhere, such as inside a checkpoint; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Recipe::from_plan`].
    pub fn from_plan_text(text: &str, path: &Path) -> Result<Recipe, ConfigError> {
        let mut entries = Entries::parse(text, path)?;
        defaults::fill_from_before(&mut entries);
        if let Some(key) = schema::KEYS.iter().find(|key| !entries.0.contains_key(key.path)) {
            return Err(ConfigError::Missing {
                key: key.path.to_owned(),
                place: Place::file(path),
                hint: "a plan holds every key; it was altered, or written by another version of mentee"
                    .into(),
            });
        }
        Recipe::from_entries(entries)
    }

    /// The names that [`Recipe::load`] knows without a file.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// Makes the paths it holds mean the same from everywhere.
    ///
    /// # Errors
    /// [`ConfigError::Read`] if there is no current directory.
    pub fn make_paths_absolute(&mut self) -> Result<(), ConfigError> {
        for path in [&mut self.data.path, &mut self.eval.path, &mut self.model.init] {
            if !path.as_os_str().is_empty() {
                *path = std::path::absolute(&*path)
                    .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            }
        }
        Ok(())
    }

    /// As `plan.toml` holds it: every key with its value. [`Recipe::from_plan`] reads it back exactly.
    ///
    /// # Panics If the recipe was made in Rust and TOML cannot hold it, which [`Recipe::validate`] would have
    /// said: a seed beyond 63 bits or a path that is not UTF-8.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string(self).expect("a validated recipe can be written as TOML");
        format!(
            "# The resolved recipe: what really runs. Written by mentee {}; do not edit.\n\
             # Its hash, over all that decides the numbers: {}\n\n{body}",
            env!("CARGO_PKG_VERSION"),
            self.hash()
        )
    }

    pub(crate) fn to_table(&self) -> Result<toml::Table, ConfigError> {
        toml::Table::try_from(self).map_err(|error| ConfigError::Range {
            key: "recipe".into(),
            value: error.to_string().trim().replace('\n', "; "),
            place: Place::Recipe,
            allowed: "what TOML can hold: whole numbers below 2^63 and UTF-8 paths".into(),
        })
    }

    pub(crate) fn from_table(table: toml::Table) -> Result<Recipe, ConfigError> {
        Recipe::deserialize(table)
            .map_err(|error| ConfigError::Schema(error.to_string().trim().replace('\n', "; ")))
    }
}

/// The text of a recipe or plan, also from a pipe of the shell's (`/dev/stdin`, `<(…)`). A pipe that lies among files may never be
/// written to: it is not waited for.
fn read(path: &Path) -> io::Result<String> {
    let of_the_shell = ["/dev/stdin", "/dev/fd", "/proc"].iter().any(|place| path.starts_with(place));
    if path.metadata()?.file_type().is_fifo() && !of_the_shell {
        return Err(io::Error::other("is a pipe: give a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("longer than 1 MiB: no recipe is"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("is no text in UTF-8: no recipe"))
}

fn resolve(text: &str, path: &Path, name: &str, sets: &[String]) -> Result<Recipe, ConfigError> {
    let mut entries = Entries::parse(text, path)?;
    // A plan holds every key of its time, also those that nobody asked for.
    let later = defaults::before();
    let is_there = |key: &schema::Key| entries.0.contains_key(key.path) || later.0.contains_key(key.path);
    let is_plan = schema::KEYS.iter().all(is_there);
    if is_plan {
        defaults::fill_from_before(&mut entries);
    }
    for argument in sets {
        entries.set(argument)?;
    }
    defaults::fill(&mut entries, path, name)?;
    let places = entries.places();
    let recipe = Recipe::from_entries(entries)?;
    recipe.refuse_idle(is_plan, &places)?;
    Ok(recipe)
}

fn not_found(asked: &str, stem: &str) -> ConfigError {
    let hint = if Path::new(asked).is_dir() { folder(asked) } else { nothing_there(stem) };
    ConfigError::NotFound { name: asked.to_owned(), hint }
}

/// What to give in place of a folder.
fn folder(asked: &str) -> String {
    let plan = Path::new(asked).join("plan.toml");
    if plan.is_file() {
        format!("it is the folder of a run, whose recipe is {}", plan.display())
    } else {
        "it is a folder: give the path of a .toml file, or the name of a built-in recipe".to_owned()
    }
}

fn nothing_there(stem: &str) -> String {
    match schema::nearest(stem, Recipe::built_in_names()) {
        Some(near) if near == stem => {
            format!("no such file; the built-in recipe is called `{near}`, without a path")
        }
        Some(near) => format!("did you mean the built-in `{near}`?"),
        None => {
            let names: Vec<_> = Recipe::built_in_names().collect();
            format!("no such file, and the built-in ones are {}", names.join(", "))
        }
    }
}
