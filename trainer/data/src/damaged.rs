//! Damaged samples: what one does, and which were met.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mentee_config::recipe;

use crate::error::DataError;

/// What a damaged sample does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Ends the loader with its error.
    Fail,
    /// Is replaced ([`crate::Order::replacement`]), up to so many different ones; then it ends the loader after all.
    Skip {
        /// How many.
        budget: u64,
    },
}

impl OnError {
    /// As a recipe says.
    #[must_use]
    pub fn of(data: &recipe::Data) -> Self {
        match data.on_error {
            recipe::OnDataError::Fail => Self::Fail,
            recipe::OnDataError::Skip => Self::Skip { budget: data.max_skipped },
        }
    }
}

/// Damaged samples that were met, and what the next one does.
#[derive(Debug)]
pub struct Damaged {
    on_error: OnError,
    found: Mutex<BTreeMap<u64, String>>,
}

impl Damaged {
    /// None was met yet.
    #[must_use]
    pub fn new(on_error: OnError) -> Self {
        Self { on_error, found: Mutex::default() }
    }

    /// Those met so far, by their index in the source: shard or file, key, and what is wrong.
    #[must_use]
    pub fn found(&self) -> BTreeMap<u64, String> {
        self.lock().clone()
    }

    /// Whether sample `id` was met and is damaged.
    #[must_use]
    pub fn contains(&self, id: u64) -> bool {
        self.lock().contains_key(&id)
    }

    /// Notes that sample `id` is passed over.
    ///
    /// # Errors
    /// `error` itself where it is not passed over; [`DataError::TooManyBad`] beyond the budget.
    pub(crate) fn pass_over(&self, id: u64, error: DataError) -> Result<(), DataError> {
        let (OnError::Skip { budget }, DataError::BadSample { .. }) = (self.on_error, &error) else {
            return Err(error);
        };
        let mut all = self.lock();
        all.insert(id, error.brief());
        let found = all.len() as u64;
        if found > budget {
            return Err(DataError::TooManyBad { found, budget, last: error.brief() });
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
