//! How many cores this rank may use.

use mentee_cluster::identity::affinity_advice;
use mentee_cluster::{Identity, server};
use mentee_collectives::shm::core_mask;
use mentee_collectives::{CollectiveError, Collectives};
use serde::{Deserialize, Serialize};

/// What a rank has to run on.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Place {
    host: String,
    /// Numbers of the cores it may use.
    cores: Vec<usize>,
    /// How many a quota leaves of those, where there is one.
    quota: Option<usize>,
}

impl Place {
    fn here() -> Self {
        let mask = core_mask();
        let cores: Vec<usize> =
            (0..8 * mask.len()).filter(|core| mask[core / 8] >> (core % 8) & 1 == 1).collect();
        let usable = std::thread::available_parallelism().map_or(1, usize::from);
        let quota = (usable < cores.len() || cores.is_empty()).then_some(usable);
        Self { host: server::hostname(), cores, quota }
    }
}

/// The cores this rank may use, those that others may use too divided among them; at least 1. All ranks call it at the same
/// point.
///
/// A launcher that bound each rank to cores of its own has divided them already. One that did not may stand in a container, a job
/// or a `taskset` that has a part of the machine, which its ranks share.
pub fn cores(collectives: &dyn Collectives) -> Result<usize, CollectiveError> {
    let own = Place::here();
    if collectives.world_size() == 1 {
        return Ok(share(&own, std::slice::from_ref(&own)));
    }
    // What others sent was written by this very function.
    let all = collectives.all_gather(&serde_json::to_vec(&own).unwrap_or_default())?;
    let all: Vec<Place> = all.iter().filter_map(|bytes| serde_json::from_slice(bytes).ok()).collect();
    Ok(share(&own, &all))
}

/// Of `all` ranks' places that of `own`.
fn share(own: &Place, all: &[Place]) -> usize {
    let here: Vec<&Place> = all.iter().filter(|place| place.host == own.host).collect();
    let users = |core: &usize| here.iter().filter(|place| place.cores.contains(core)).count().max(1);
    let shares: f64 = own.cores.iter().map(|core| 1.0 / users(core) as f64).sum();
    // Ranks that share their cores share a quota on them; ranks that do not have one each.
    let share_cores = own.cores.iter().any(|core| users(core) > 1) || own.cores.is_empty();
    let quota = own.quota.map(|quota| if share_cores { quota / here.len().max(1) } else { quota });
    // Sums of 1/n are a little off.
    ((shares + 1e-6) as usize).min(quota.unwrap_or(usize::MAX)).max(1)
}

/// What to say when this rank was bound to too few cores; `None` when all is well. It needs as many as the recipe's larger
/// number of threads, and two in any case: one computes while another decodes.
pub fn advice(identity: &Identity, threads: u64, decode_threads: u64) -> Option<String> {
    let (allowed, online) = allowed_and_online();
    let wanted = usize::try_from(threads.max(decode_threads).max(2)).unwrap_or(usize::MAX);
    affinity_advice(identity, allowed, online, wanted)
}

/// The cores this process may run on, and those of the machine.
fn allowed_and_online() -> (usize, usize) {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: sysconf only reads.
    let online = usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1);
    (allowed, online)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(host: &str, cores: std::ops::Range<usize>, quota: Option<usize>) -> Place {
        Place { host: host.into(), cores: cores.collect(), quota }
    }

    fn shares(all: &[Place]) -> Vec<usize> {
        all.iter().map(|own| share(own, all)).collect()
    }

    #[test]
    fn cores_that_ranks_share_are_divided_and_those_of_their_own_are_not() {
        let one = place("a", 0..64, None);
        assert_eq!(shares(&[one]), [64]);
        // All of a machine, or all of a part of it that a container has.
        assert_eq!(shares(&vec![place("a", 0..64, None); 4]), [16; 4]);
        assert_eq!(shares(&vec![place("a", 16..32, None); 4]), [4; 4]);
        assert_eq!(shares(&vec![place("a", 0..2, None); 3]), [1; 3]);
        // Bound by the launcher, and on two machines.
        assert_eq!(shares(&[place("a", 0..8, None), place("a", 8..16, None)]), [8, 8]);
        assert_eq!(shares(&[place("a", 0..8, None), place("b", 0..8, None)]), [8, 8]);
        assert_eq!(shares(&[place("a", 0..8, None), place("a", 4..8, None)]), [6, 2]);
        // A quota of a container counts for all ranks in it.
        assert_eq!(shares(&vec![place("a", 0..64, Some(8)); 4]), [2; 4]);
        assert_eq!(shares(&[place("a", 0..8, Some(2)), place("a", 8..16, Some(2))]), [2, 2]);
        // Where the system does not say which cores there are.
        assert_eq!(shares(&vec![place("a", 0..0, Some(8)); 2]), [1, 1]);
        assert!(!Place::here().cores.is_empty());
    }
}
