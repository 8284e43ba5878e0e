//! What a user wrote, as `section.key` → value with the place it stands in. Keys and types are checked here.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Value;
use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, Place, printable};
use crate::schema::{self, Key};

/// Values by their key's path. Any key may be absent.
#[derive(Default)]
pub(crate) struct Entries(pub BTreeMap<&'static str, Entry>);

/// One value and where it comes from.
#[derive(Clone)]
pub(crate) struct Entry {
    pub value: Value,
    pub place: Place,
}

impl Entries {
    /// Reads a recipe, plan or layer of defaults.
    pub fn parse(text: &str, path: &Path) -> Result<Entries, ConfigError> {
        let at = |offset: usize| Place::File { path: path.to_owned(), line: Some(line_of(text, offset)) };
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            place: error.span().map_or_else(|| Place::file(path), |span| at(span.start)),
            message: error.message().trim().replace('\n', "; "),
        })?;
        let mut entries = Entries::default();
        for (section, offset, content) in in_file_order(document.get_ref()) {
            let known = schema::sections().contains(&section);
            match content {
                DeValue::Table(_) if !known => {
                    return Err(ConfigError::Unknown {
                        what: format!("section `[{}]`", printable(section)),
                        place: at(offset),
                        hint: schema::suggest_section(section),
                    });
                }
                DeValue::Table(keys) => {
                    for (name, offset, value) in in_file_order(keys) {
                        let key = known_key(&format!("{section}.{name}"), || at(offset))?;
                        entries.put(key, to_value(value), at(offset))?;
                    }
                }
                _ if known => {
                    return Err(ConfigError::Type {
                        key: section.to_owned(),
                        place: at(offset),
                        expected: format!("a section, [{section}]"),
                        found: "a value".into(),
                    });
                }
                _ => {
                    known_key(section, || at(offset))?;
                }
            }
        }
        Ok(entries)
    }

    /// Applies `--set section.key=value`. The value is read as TOML; what is not TOML is a string as it
    /// stands.
    pub fn set(&mut self, argument: &str) -> Result<(), ConfigError> {
        let (path, text) =
            argument.split_once('=').ok_or_else(|| ConfigError::Set { argument: argument.to_owned() })?;
        let (path, text) = (path.trim(), text.trim());
        let place = Place::Set(argument.to_owned());
        let key = known_key(path, || place.clone())?;
        let bare = || Value::String(text.to_owned());
        let parsed = DeValue::parse(text).map(|value| to_value(value.get_ref())).unwrap_or_else(|_| bare());
        // A folder may be called 2024: what is meant as a string need not be quoted.
        let wants_text =
            matches!(key.kind, schema::Kind::Name | schema::Kind::Path { .. } | schema::Kind::Choice(_));
        let value = if wants_text && !parsed.is_str() { bare() } else { parsed };
        self.put(key, value, place)
    }

    fn put(&mut self, key: &'static Key, value: Value, place: Place) -> Result<(), ConfigError> {
        match key.kind.accept(value) {
            Ok(value) => {
                self.0.insert(key.path, Entry { value, place });
                Ok(())
            }
            Err(mismatch) => Err(ConfigError::Type {
                key: key.path.to_owned(),
                place,
                expected: mismatch.expected,
                found: mismatch.found,
            }),
        }
    }

    /// The word or path given for a key.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.0.get(path)?.value.as_str()
    }

    /// Where a key's value comes from, if it has one.
    pub fn place(&self, path: &str) -> Option<&Place> {
        self.0.get(path).map(|entry| &entry.place)
    }

    /// Where each key's value comes from.
    pub fn places(&self) -> BTreeMap<&'static str, Place> {
        self.0.iter().map(|(path, entry)| (*path, entry.place.clone())).collect()
    }

    /// As the two levels of tables that a recipe is.
    pub fn into_table(self) -> toml::Table {
        let mut table = toml::Table::new();
        for key in schema::KEYS {
            if let Some(entry) = self.0.get(key.path) {
                let section = table.entry(key.section()).or_insert_with(|| Value::Table(toml::Table::new()));
                if let Value::Table(section) = section {
                    section.insert(key.name().to_owned(), entry.value.clone());
                }
            }
        }
        table
    }
}

fn known_key(path: &str, place: impl Fn() -> Place) -> Result<&'static Key, ConfigError> {
    schema::find(path).ok_or_else(|| {
        let (section, name) = path.split_once('.').unwrap_or(("", path));
        let known_section = section.is_empty() || schema::sections().contains(&section);
        let hint = if known_section || schema::KEYS.iter().any(|key| key.name() == name) {
            schema::suggest_key(section, name)
        } else {
            schema::suggest_section(section)
        };
        ConfigError::Unknown { what: format!("key `{}`", printable(path)), place: place(), hint }
    })
}

/// The first mistake in a file is the one reported, so keys come as they are written, not by name.
fn in_file_order<'a>(table: &'a DeTable<'_>) -> Vec<(&'a str, usize, &'a DeValue<'a>)> {
    let mut keys: Vec<_> = table
        .iter()
        .map(|(key, value)| (key.get_ref().as_ref(), key.span().start, value.get_ref()))
        .collect();
    keys.sort_by_key(|(_, offset, _)| *offset);
    keys
}

/// Counted from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

fn to_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        // A number beyond 64 bits becomes a real one, so that the type error names it.
        DeValue::Integer(whole) => match i64::from_str_radix(whole.as_str(), whole.radix()) {
            Ok(whole) => Value::Integer(whole),
            Err(_) => Value::Float(whole.as_str().parse().unwrap_or(f64::INFINITY)),
        },
        DeValue::Float(real) => Value::Float(real.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(switch) => Value::Boolean(*switch),
        DeValue::Datetime(date) => Value::Datetime(*date),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| to_value(item.get_ref())).collect()),
        DeValue::Table(_) => Value::Table(toml::Table::new()),
    }
}
