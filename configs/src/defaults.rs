//! Fills in what a recipe leaves out: from the method, from the preset of the views, from what holds for all.

use std::path::Path;

use toml::Value;

use crate::error::{ConfigError, Place};
use crate::file::{Entries, Entry};
use crate::schema;

/// Names and texts of the layers in `configs/defaults/`.
macro_rules! layers {
    ($($name:literal),*) => { &[$(($name, include_str!(concat!("../defaults/", $name, ".toml")))),*] };
}
pub(crate) const BASE: &[(&str, &str)] = layers!["base"];
pub(crate) const METHODS: &[(&str, &str)] = layers!["byol", "simsiam", "mocov3"];
pub(crate) const VIEWS: &[(&str, &str)] =
    layers!["views-byol", "views-simsiam", "views-byol-cifar", "views-simsiam-cifar"];

/// A method's layer holds these for its own optimizer; under another one its learning rate would be wrong by
/// orders of magnitude, so it is asked for instead.
const OF_THE_METHODS_OPTIMIZER: &[&str] =
    &["optimizer.base_lr", "optimizer.weight_decay", "optimizer.exclude_bias_and_norm"];

/// Completes the entries of the recipe called `name`, read from `path`; a value that is there stays.
pub(crate) fn fill(entries: &mut Entries, path: &Path, name: &str) -> Result<(), ConfigError> {
    let method = entries
        .text("method.name")
        .ok_or_else(|| missing("method.name", path, "byol, simsiam or mocov3"))?
        .to_owned();

    let mut of_method = layer(METHODS, &method)?;
    let own_optimizer = of_method.text("optimizer.name").map(str::to_owned);
    if entries.text("optimizer.name").is_some_and(|name| Some(name) != own_optimizer.as_deref()) {
        of_method.0.retain(|key, _| !OF_THE_METHODS_OPTIMIZER.contains(key));
    }
    // A rate for a predictor that is not there is a contradiction only where the user wrote it, and not in a file whose
    // predictor a --set takes away.
    if let Some(entry) = entries.0.get("method.predictor").filter(|it| it.value == Value::Boolean(false)) {
        let by_set = matches!(entry.place, Place::Set(_));
        if by_set && !matches!(entries.place("method.fixed_predictor_lr"), Some(Place::Set(_))) {
            default(entries, "method.fixed_predictor_lr", Value::Boolean(false));
        }
        default(&mut of_method, "method.fixed_predictor_lr", Value::Boolean(false));
    }
    // What a method changes in views it changes in its own preset: another one is taken as it is.
    if entries.text("views.preset").is_some_and(|preset| Some(preset) != of_method.text("views.preset")) {
        of_method.0.retain(|key, _| !key.starts_with("views."));
    }
    add(entries, of_method);

    let preset = entries.text("views.preset").unwrap_or_default().to_owned();
    let mut of_preset = layer(VIEWS, &format!("views-{preset}"))?;
    if entries.text("model.backbone") == Some("resnet20") {
        default(&mut of_preset, "model.stem", Value::String("cifar".into()));
    }
    add(entries, of_preset);
    add(entries, layer(BASE, "base")?);
    if !entries.0.contains_key("run.name") {
        default(entries, "run.name", Value::String(name.to_owned()));
    }

    match schema::KEYS.iter().find(|key| !entries.0.contains_key(key.path)) {
        None => Ok(()),
        Some(key) if OF_THE_METHODS_OPTIMIZER.contains(&key.path) => {
            let (chosen, own) =
                (entries.text("optimizer.name").unwrap_or_default(), own_optimizer.unwrap_or_default());
            let why =
                format!("{method} has a default for the optimizer {own}, none for {chosen}; give it a value");
            Err(missing(key.path, path, &why))
        }
        Some(key) => Err(missing(key.path, path, key.meaning)),
    }
}

/// What held before some keys came.
///
/// # Panics
/// Never: the text is part of the program, and tests read it.
pub(crate) fn before() -> Entries {
    layer(layers!["before"], "before").expect("a layer of this program")
}

/// Adds what an older plan lacks.
pub(crate) fn fill_from_before(plan: &mut Entries) {
    add(plan, before());
}

/// A layer of that name, each value marked as a default.
pub(crate) fn layer(layers: &[(&str, &str)], name: &str) -> Result<Entries, ConfigError> {
    let (name, text) = layers
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| ConfigError::Schema(format!("no layer of defaults is called {name}")))?;
    let mut entries = Entries::parse(text, Path::new(&format!("defaults/{name}.toml")))?;
    for entry in entries.0.values_mut() {
        entry.place = Place::Default;
    }
    Ok(entries)
}

fn add(entries: &mut Entries, layer: Entries) {
    for (key, entry) in layer.0 {
        entries.0.entry(key).or_insert(entry);
    }
}

fn default(entries: &mut Entries, key: &'static str, value: Value) {
    entries.0.insert(key, Entry { value, place: Place::Default });
}

fn missing(key: &str, path: &Path, hint: &str) -> ConfigError {
    ConfigError::Missing { key: key.to_owned(), place: Place::file(path), hint: hint.to_owned() }
}
