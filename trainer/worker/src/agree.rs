//! What all ranks must agree on: before the first step that they are about to do the same, and at every step whether
//! to go on.

use std::collections::BTreeMap;

use mentee_collectives::{Buffer, Collectives};
use mentee_config::Recipe;
use mentee_ssl::loss::l2_normalise;
use mentee_ssl::{State, StepLoss};
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::snapshot::{self, DIGEST_LEN};

/// Compares every rank's recipe with rank 0's, before anything that depends on it: ranks that disagree on when to check,
/// to save or to evaluate would wait for each other in different calls, or add up what does not belong together.
pub fn on_recipe(collectives: &dyn Collectives, recipe: &Recipe) -> Result<(), WorkerError> {
    // Another version may have other keys, so that it comes first.
    let mut own = vec![("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
    own.extend(recipe.shared().into_iter().map(|(key, value)| (key.to_owned(), value)));
    let all: Vec<Vec<(String, String)>> = gather(collectives, 0, &own, "recipe")?;
    let (first, rest) = all.split_at(1);
    for (rank, theirs) in rest.iter().enumerate() {
        let pairs = theirs.iter().zip(&first[0]);
        if let Some(((what, found), (_, expected))) = pairs.into_iter().find(|(a, b)| a != b) {
            let (what, found, expected) = (what.clone(), found.clone(), expected.clone());
            let error = WorkerError::Disagreement { rank: rank + 1, what, found, expected };
            return Err(error.known(collectives.rank() == 0));
        }
    }
    Ok(())
}

/// What every rank has of `what`.
pub fn gather<T: serde::Serialize + serde::de::DeserializeOwned>(
    collectives: &dyn Collectives,
    step: u64,
    own: &T,
    what: &str,
) -> Result<Vec<T>, WorkerError> {
    let bytes = serde_json::to_vec(own).map_err(|error| WorkerError::Failed(error.to_string()))?;
    let all = collectives.all_gather(&bytes).map_err(|source| WorkerError::Collective { step, source })?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| {
            WorkerError::Failed(format!(
                "rank {rank} sent no valid {what} ({error}); use one version of mentee"
            ))
        })
    };
    all.iter().enumerate().map(read).collect()
}

/// What every rank must have alike before step 0, beside the recipe.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Start {
    pub version: String,
    pub plan_hash: String,
    pub data_digest: String,
    pub next_step: u64,
    /// Of student, teacher, momentum and running statistics.
    pub state_digest: String,
}

/// Compares every rank's start with rank 0's.
pub fn on_start(collectives: &dyn Collectives, own: &Start) -> Result<(), WorkerError> {
    let starts = gather(collectives, own.next_step, own, "start")?;
    let first = &starts[0];
    for (rank, start) in starts.iter().enumerate() {
        let pairs = [
            ("version", &start.version, &first.version),
            ("plan hash", &start.plan_hash, &first.plan_hash),
            ("data digest", &start.data_digest, &first.data_digest),
            ("next step", &start.next_step.to_string(), &first.next_step.to_string()),
            ("digest of the initial state", &start.state_digest, &first.state_digest),
        ];
        for (what, found, expected) in pairs {
            if found != expected {
                let (what, found, expected) = (what.to_owned(), found.clone(), expected.clone());
                let error = WorkerError::Disagreement { rank, what, found, expected };
                return Err(error.known(collectives.rank() == 0));
            }
        }
    }
    Ok(())
}

/// Ranks compute all on the processor or all on devices of their own: what they sum, and by what way, depends on it. `slot`
/// tells devices apart.
pub fn on_device(
    collectives: &dyn Collectives,
    device: Device,
    slot: Option<String>,
) -> Result<(), WorkerError> {
    let own = (device == Device::Cpu, slot);
    let all: Vec<(bool, Option<String>)> = gather(collectives, 0, &own, "kind of device")?;
    let ranks: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].0).collect();
    if !ranks.is_empty() && ranks.len() < all.len() {
        // Said by a rank that has none: its machine is the one to look at.
        let says = collectives.rank() as usize == ranks[0];
        return Err(WorkerError::MixedDevices { ranks: numbers(ranks.into_iter()) }.known(says));
    }
    let mut of_slot = BTreeMap::<&String, Vec<usize>>::new();
    for (rank, slot) in all.iter().enumerate().filter_map(|(rank, (_, slot))| Some((rank, slot.as_ref()?))) {
        of_slot.entry(slot).or_default().push(rank);
    }
    match of_slot.into_iter().find(|(_, ranks)| ranks.len() > 1) {
        Some((slot, ranks)) => {
            let says = collectives.rank() as usize == ranks[0];
            let (ranks, slot) = (numbers(ranks.into_iter()), slot.clone());
            Err(WorkerError::SharedDevice { ranks, slot }.known(says))
        }
        None => Ok(()),
    }
}

/// A name for this start of the run: the same on all its ranks, and none that another start has.
pub fn attempt(collectives: &dyn Collectives) -> Result<String, WorkerError> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let own = format!("{}-{:x}", std::process::id(), now.as_nanos());
    let all = collectives.all_gather(own.as_bytes())?;
    Ok(String::from_utf8_lossy(&all[0]).into_owned())
}

/// All ranks take their own `result` together: when one has failed, all fail, with the failure of the lowest of them.
/// So a mistake that every rank finds is reported once, and no rank waits for one that is gone.
pub fn together<T>(collectives: &dyn Collectives, result: Result<T, WorkerError>) -> Result<T, WorkerError> {
    let own = result.as_ref().err().map_or(0, WorkerError::exit_code);
    let all = collectives.all_gather(&own.to_le_bytes())?;
    if result.is_err() && all.iter().any(|bytes| bytes.len() != size_of_val(&own)) {
        return result; // some rank is elsewhere, because this one failed
    }
    let mut failed = None;
    for (rank, bytes) in all.iter().enumerate() {
        // A rank that is elsewhere has sent what belongs there.
        let exit_code = bytes.as_slice().try_into().map(i32::from_le_bytes).map_err(|_| {
            WorkerError::Failed(format!(
                "rank {rank} is not where rank {} is: {} bytes from it instead of an exit code; start all ranks with the same \
                 recipe, data and version",
                collectives.rank(),
                bytes.len()
            ))
        })?;
        if exit_code != 0 {
            failed.get_or_insert((rank, exit_code));
        }
    }
    match (result, failed) {
        (result, None) => result,
        (Err(error), Some((rank, _))) if rank == collectives.rank() as usize => Err(error.known(true)),
        (_, Some((_, exit_code))) => Err(WorkerError::Known { says: None, exit_code }),
    }
}

/// Whether any rank says so.
pub fn any(collectives: &dyn Collectives, step: u64, own: bool) -> Result<bool, WorkerError> {
    let all = collectives
        .all_gather(&[u8::from(own)])
        .map_err(|source| WorkerError::Collective { step, source })?;
    Ok(all.iter().any(|said| said.contains(&1)))
}

/// What the ranks agreed on after one backward pass.
#[derive(Debug, Clone, Copy)]
pub struct Agreed {
    /// Mean over the global batch.
    pub loss: f64,
    /// Standard deviation of the L2-normalised student projections over the global batch, mean over dimensions,
    /// times sqrt(D): about 1 when healthy, 0 when collapsed.
    pub z_std: f64,
    /// Some rank was asked to stop.
    pub stop: bool,
}

/// One small all-reduce: the loss, its spread, and whether anyone wants to stop. An error when the loss of any rank
/// is not finite.
pub fn on_step(
    collectives: &dyn Collectives,
    step: u64,
    own: &StepLoss,
    stop: bool,
) -> Result<Agreed, WorkerError> {
    let (world, rank) = (collectives.world_size() as usize, collectives.rank() as usize);
    let z = l2_normalise(&own.projections).map_err(|source| WorkerError::Step { step, source })?;
    let z = z.f_to_kind(Kind::Double)?; // [V·N, D]
    let sums = z.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
    let squares = z.f_square()?.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
    let loss = own.loss.f_to_kind(Kind::Double)?.f_view([1])?;
    // Together: from a device they come in one copy, which waits until the passes are done.
    let all = Vec::<f64>::try_from(Tensor::f_cat(&[loss, sums, squares], 0)?)?;
    let (share, moments) = (all[0], &all[1..]);
    let dim = moments.len() / 2;

    // [loss, stop, rows, not finite by rank, sums, squares]
    let mut message = vec![0.0; 3 + world];
    message[0] = if share.is_finite() { share } else { 0.0 };
    message[1] = f64::from(u8::from(stop));
    message[2] = z.size()[0] as f64;
    message[3 + rank] = f64::from(u8::from(!share.is_finite()));
    message.extend(moments);
    collectives
        .all_reduce_sum(Buffer::F64(&mut message))
        .map_err(|source| WorkerError::Collective { step, source })?;

    let bad = numbers((0..world).filter(|r| message[3 + r] > 0.0));
    if !bad.is_empty() {
        let error = WorkerError::LossNotFinite { step, ranks: bad };
        return Err(error.known(rank == 0));
    }
    let rows = message[2];
    let (sums, squares) = message[3 + world..].split_at(dim);
    let spread: f64 = sums
        .iter()
        .zip(squares)
        .map(|(sum, square)| ((square / rows - (sum / rows).powi(2)).max(0.0) * rows / (rows - 1.0)).sqrt())
        .sum();
    Ok(Agreed { loss: message[0], z_std: spread / dim as f64 * (dim as f64).sqrt(), stop: message[1] > 0.0 })
}

/// The norm of the mean gradient, which every rank holds; an error when it is not finite, naming the first such tensor
/// and the ranks whose own gradient was not (`own_was_finite`).
pub fn on_gradient(
    collectives: &dyn Collectives,
    step: u64,
    state: &State,
    own_was_finite: impl FnOnce() -> bool,
) -> Result<f64, WorkerError> {
    let at_step = |source| WorkerError::Step { step, source };
    let norm = state.grad_norm().map_err(at_step)?;
    if norm.is_finite() {
        return Ok(norm);
    }
    // Every rank holds the same sum, so all of them come here together.
    let tensor = state.non_finite_gradient().map_err(at_step)?;
    let all = collectives
        .all_gather(&[u8::from(own_was_finite())])
        .map_err(|source| WorkerError::Collective { step, source })?;
    let ranks = numbers((0..all.len()).filter(|&rank| all[rank] == [0]));
    Err(WorkerError::GradientNotFinite { step, tensor, ranks }.known(collectives.rank() == 0))
}

fn numbers(ranks: impl Iterator<Item = usize>) -> String {
    ranks.map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ")
}

/// Running statistics become the mean over ranks, where norms are not synchronised and each rank has its own. As they are
/// moving averages, it makes no difference how often that is done.
pub fn on_statistics(
    collectives: &dyn Collectives,
    step: u64,
    recipe: &Recipe,
    state: &mut State,
) -> Result<(), WorkerError> {
    if collectives.world_size() == 1 || recipe.parallel.sync_batch_norm {
        return Ok(());
    }
    let at_step = |source| WorkerError::Step { step, source };
    for network in std::iter::once(&mut state.student).chain(&mut state.teacher) {
        let layers = network.stats.layers().map_err(at_step)?;
        let mut all: Vec<f64> =
            layers.iter().flat_map(|layer| [&layer.mean[..], &layer.variance].concat()).collect();
        collectives
            .all_reduce_sum((&mut all).into())
            .map_err(|source| WorkerError::Collective { step, source })?;
        all.iter_mut().for_each(|sum| *sum /= f64::from(collectives.world_size()));
        let mut means = BTreeMap::new();
        let mut rest = &all[..];
        for layer in &layers {
            let (mean, after) = rest.split_at(layer.mean.len());
            let (variance, after) = after.split_at(layer.variance.len());
            means.insert(layer.name.as_str(), (mean.to_vec(), variance.to_vec()));
            rest = after;
        }
        network.stats.load(|name| Ok(means[name].clone())).map_err(at_step)?;
    }
    Ok(())
}

/// Compares student, teacher, momentum and running statistics across ranks. An error names the first tensor that
/// differs, and the ranks that hold something else than most (of two, the second).
pub fn on_weights(collectives: &dyn Collectives, step: u64, state: &State) -> Result<(), WorkerError> {
    if collectives.world_size() == 1 {
        return Ok(());
    }
    let failed = |source| WorkerError::Collective { step, source };
    let digests = snapshot::tensor_digests(state)?;
    let mut whole = blake3::Hasher::new();
    digests.iter().for_each(|(_, digest)| {
        whole.update(digest);
    });
    let all = collectives.all_gather(whole.finalize().as_bytes()).map_err(failed)?;
    if all.iter().all(|other| *other == all[0]) {
        return Ok(());
    }
    let own: Vec<u8> = digests.iter().flat_map(|(_, digest)| *digest).collect();
    let all = collectives.all_gather(&own).map_err(failed)?;
    for (n, (tensor, _)) in digests.iter().enumerate() {
        let of: Vec<&[u8]> = all.iter().map(|digests| &digests[n * DIGEST_LEN..][..DIGEST_LEN]).collect();
        if let Some(ranks) = odd_ones(&of) {
            let error = WorkerError::WeightsDiffer {
                step,
                tensor: tensor.clone(),
                ranks: numbers(ranks.into_iter()),
            };
            return Err(error.known(collectives.rank() == 0));
        }
    }
    Err(WorkerError::Failed(format!("step {step}: the ranks' weights differed and no longer do")))
}

/// The ranks that hold something else than most, the lowest rank's value winning a tie; none when all agree.
fn odd_ones(values: &[&[u8]]) -> Option<Vec<usize>> {
    let count = |value: &[u8]| values.iter().filter(|other| **other == value).count();
    let most = values.iter().map(|value| count(value)).max()?;
    let common = *values.iter().find(|value| count(value) == most)?;
    let odd: Vec<usize> = (0..values.len()).filter(|&rank| values[rank] != common).collect();
    (!odd.is_empty()).then_some(odd)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mentee_collectives::threads;
    use mentee_config::exit_code;

    use super::*;

    /// What the ranks of a world make of `check`, each given its rank.
    fn ranks<T: Send>(
        world: u32,
        check: impl Fn(&dyn Collectives, u32) -> Result<T, WorkerError> + Sync,
    ) -> Vec<Result<T, WorkerError>> {
        threads::run(world, Duration::from_secs(5), |group| check(&group, group.rank()))
    }

    /// Every rank ends with `exit_code`, and the one that says why with `line`.
    fn assert_one_says<T>(results: Vec<Result<T, WorkerError>>, exit_code: i32, line: &str) {
        let errors: Vec<_> = results.into_iter().filter_map(Result::err).collect();
        assert!(errors.iter().all(|error| error.exit_code() == exit_code), "{errors:?}");
        let said: Vec<_> =
            errors.iter().filter(|error| !error.is_silent()).map(ToString::to_string).collect();
        assert_eq!(said, [line]);
    }

    #[test]
    fn recipes_differ_in_the_first_key_that_is_no_machines_own() {
        let of = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
            Recipe::load("demo", &sets).unwrap()
        };
        let own = of(&["data.path=/here", "parallel.threads=3", "parallel.decode_threads=1"]);
        let check = |stale: &[&str]| {
            let stale = of(stale);
            ranks(3, |group, rank| on_recipe(group, if rank == 2 { &stale } else { &own }))
        };
        assert!(check(&["data.path=/there", "parallel.threads=2"]).iter().all(Result::is_ok));
        // None of these decides a number, all of them what the ranks do together.
        for set in ["checkpoint.every_steps=7", "parallel.check_every_steps=7", "schedule.max_steps=7"] {
            let (key, _) = set.split_once('=').unwrap();
            let there = own.shared().into_iter().find(|(name, _)| *name == key).unwrap().1;
            let line = format!(
                "rank 2: {key} = 7 there, {there} on rank 0; start all ranks with the same recipe, data and version"
            );
            assert_one_says(check(&[set]), exit_code::USAGE, &line);
        }
    }

    #[test]
    fn ranks_without_a_device_among_ranks_with_one_are_named() {
        let check = |odd: &[u32]| {
            ranks(4, |group, rank| {
                on_device(group, if odd.contains(&rank) { Device::Cpu } else { Device::Cuda(0) }, None)
            })
        };
        assert!(check(&[]).iter().all(Result::is_ok));
        assert!(check(&[0, 1, 2, 3]).iter().all(Result::is_ok));
        let results = check(&[1, 3]);
        assert!(!results[1].as_ref().unwrap_err().is_silent(), "the first of those without");
        assert_one_says(
            results,
            1,
            "rank 1, 3: no usable NVIDIA device there, the other ranks have one; see `mentee doctor` on that machine, or set \
             parallel.device = \"cpu\"",
        );
    }

    #[test]
    fn ranks_that_share_a_device_are_named() {
        let check = |slots: [&'static str; 4]| {
            ranks(4, move |group, rank| {
                on_device(group, Device::Cuda(0), Some(slots[rank as usize].to_owned()))
            })
        };
        assert!(check(["a", "b", "c", "d"]).iter().all(Result::is_ok));
        let results = check(["a of n1", "b of n1", "a of n2", "b of n1"]);
        assert!(!results[1].as_ref().unwrap_err().is_silent(), "the first of those");
        assert_one_says(
            results,
            exit_code::USAGE,
            "rank 1, 3: share one device (b of n1), and NCCL takes one rank a device; start as many workers as there are \
             devices, or set parallel.device = \"cpu\"",
        );
    }

    #[test]
    fn an_answer_of_another_kind_is_no_agreement() {
        let results = ranks(2, |group, rank| match rank {
            0 => together(group, Ok(())),
            _ => attempt(group).map(drop),
        });
        let error = results[0].as_ref().unwrap_err().to_string();
        assert!(error.starts_with("rank 1 is not where rank 0 is: "), "{error}");
    }

    #[test]
    fn the_odd_ranks_are_those_outside_the_majority() {
        let of = |values: &[u8]| {
            let values: Vec<[u8; 1]> = values.iter().map(|v| [*v]).collect();
            odd_ones(&values.iter().map(|v| &v[..]).collect::<Vec<_>>())
        };
        assert_eq!(of(&[7, 7, 7]), None);
        assert_eq!(of(&[7]), None);
        assert_eq!(of(&[7, 8]), Some(vec![1]));
        assert_eq!(of(&[8, 7, 7]), Some(vec![0]));
        assert_eq!(of(&[7, 1, 7, 2]), Some(vec![1, 3]));
    }
}
