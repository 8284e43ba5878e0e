//! The same class in two sets: by its name.
//!
//! Every set numbers its classes for itself, and a folder passes over those without images: what is number 1 among the
//! training images may be another class than number 1 among the held-out ones.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::DataError;
use crate::source::{Encoding, Source};

/// `held_out` with labels that are the training images' numbers of its classes, found by name. Where one of the two
/// names no classes ([`Source::names_classes`]), or calls them by numbers and the other does not, numbers are all there is:
/// `held_out` as it is.
///
/// # Errors
/// [`DataError::UnknownClass`] naming the first sample whose class `train` does not have.
pub fn with_classes_of(train: &dyn Source, held_out: Arc<dyn Source>) -> Result<Arc<dyn Source>, DataError> {
    let comparable = train.names_classes()
        && held_out.names_classes()
        && are_numbers(train.classes()) == are_numbers(held_out.classes());
    if !comparable || train.classes() == held_out.classes() {
        return Ok(held_out);
    }
    let number: HashMap<&String, u32> = train.classes().iter().zip(0..).collect();
    let numbers: Vec<Option<u32>> = held_out.classes().iter().map(|name| number.get(name).copied()).collect();
    for index in 0..held_out.len() {
        let unknown = held_out.label(index).filter(|&label| numbers[label as usize].is_none());
        if let Some(label) = unknown {
            let class = held_out.classes()[label as usize].clone();
            return Err(DataError::UnknownClass { sample: held_out.key(index), class });
        }
    }
    Ok(Arc::new(Renumbered { source: held_out, numbers, classes: train.classes().to_vec() }))
}

/// As shards of a set that names no classes have them.
fn are_numbers(classes: &[String]) -> bool {
    classes.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A source whose classes have other numbers.
struct Renumbered {
    source: Arc<dyn Source>,
    /// The new number of each class; none for a class without images.
    numbers: Vec<Option<u32>>,
    /// In the order of the new numbers.
    classes: Vec<String>,
}

impl Source for Renumbered {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        self.source.read_into(index, buffer)
    }

    fn label(&self, index: u64) -> Option<u32> {
        self.numbers[self.source.label(index)? as usize]
    }

    fn key(&self, index: u64) -> String {
        self.source.key(index)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn names_classes(&self) -> bool {
        true
    }

    fn digest(&self) -> String {
        self.source.digest()
    }

    fn stored(&self) -> (u64, u64) {
        self.source.stored()
    }

    fn changed(&self) -> Option<String> {
        self.source.changed()
    }

    fn passed_over(&self) -> Option<String> {
        self.source.passed_over()
    }

    fn shards(&self) -> Vec<u64> {
        self.source.shards()
    }
}
