//! Damaged images that training passes over, of all ranks together: whether a set is too bad does not depend on how many there are.

use std::collections::BTreeMap;

use mentee_collectives::Collectives;
use mentee_config::recipe::{self, OnDataError};
use mentee_data::{Batch, DataError, Skipped};

use crate::agree;
use crate::error::WorkerError;

/// Those that were met since the start.
pub struct SkippedImages {
    /// None where the first one ends the run.
    budget: Option<u64>,
    /// By number in the set, with place and reason.
    all: BTreeMap<u64, String>,
    /// Of these, what the other ranks have not heard of.
    news: Vec<(u64, String)>,
}

impl SkippedImages {
    /// As many as a recipe allows.
    pub fn new(data: &recipe::Data) -> Self {
        let budget = (data.on_error == OnDataError::Skip).then_some(data.max_skipped);
        Self { budget, all: BTreeMap::new(), news: Vec::new() }
    }

    /// Names those of a batch.
    pub fn note(&mut self, batch: &Batch) {
        for Skipped { id, instead, damaged, .. } in &batch.skipped {
            let reasons: Vec<&str> = damaged.iter().map(|(_, reason)| reason.as_str()).collect();
            let reason = reasons.join("; then ");
            tracing::warn!(step = batch.step, sample = id, instead, reason, "skipped a damaged image");
            for (id, reason) in damaged {
                if self.all.insert(*id, reason.clone()).is_none() {
                    self.news.push((*id, reason.clone()));
                }
            }
        }
    }

    /// That they are not too many. Every rank calls it at the same step.
    pub fn check(&mut self, collectives: &dyn Collectives, step: u64) -> Result<(), WorkerError> {
        let Some(budget) = self.budget else { return Ok(()) };
        let news = std::mem::take(&mut self.news);
        let mut last = None;
        for (id, reason) in
            agree::gather(collectives, step, &news, "list of damaged images")?.into_iter().flatten()
        {
            last = Some(reason.clone());
            self.all.insert(id, reason);
        }
        let found = self.all.len() as u64;
        match last {
            Some(last) if found > budget => {
                let error = WorkerError::from(DataError::TooManyBad { found, budget, last });
                Err(error.known(collectives.rank() == 0))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mentee_collectives::threads;
    use mentee_config::{Recipe, exit_code};

    use super::*;

    fn batch(step: u64, ids: &[u64]) -> Batch {
        // The last is what was to replace the one before it, and torn as well.
        let damaged: Vec<_> = ids.iter().map(|&id| (id, format!("set:{id}: torn"))).collect();
        let skipped =
            damaged.first().map(|&(id, _)| Skipped { place: 0, id, instead: 0, damaged: damaged.clone() });
        Batch {
            step,
            epoch: 0,
            ids: ids.to_vec(),
            skipped: skipped.into_iter().collect(),
            views: mentee_data::Memory::default(),
            wait: Duration::ZERO,
        }
    }

    /// What each of three ranks ends with, that has met these.
    fn ends(most: u64, met: [&[u64]; 3]) -> Vec<Result<(), WorkerError>> {
        let sets = ["data.on_error=skip".to_owned(), format!("data.max_skipped={most}")];
        let data = Recipe::load("demo", &sets).expect("a recipe").data;
        threads::run(3, Duration::from_secs(5), |group| {
            let mut skipped = SkippedImages::new(&data);
            skipped.note(&batch(0, met[group.rank() as usize]));
            skipped.check(&group, 1)?;
            // Met again, by another rank.
            skipped.note(&batch(1, met[(group.rank() as usize + 1) % 3]));
            skipped.check(&group, 2)
        })
    }

    #[test]
    fn damaged_images_of_all_ranks_count_once() {
        assert!(ends(3, [&[4, 9], &[9], &[2]]).iter().all(Result::is_ok));
        let errors: Vec<_> = ends(2, [&[4, 9], &[9], &[2]]).into_iter().filter_map(Result::err).collect();
        assert_eq!(errors.iter().map(WorkerError::exit_code).collect::<Vec<_>>(), [exit_code::DATA; 3]);
        let said: Vec<_> =
            errors.iter().filter(|error| !error.is_silent()).map(ToString::to_string).collect();
        assert_eq!(said.len(), 1);
        assert!(
            said[0].starts_with("3 damaged samples, data.max_skipped is 2; the last: set:2: torn"),
            "{said:?}"
        );
    }
}
