//! How many cores this rank may use.

use mentee_cluster::Identity;
use mentee_cluster::identity::affinity_advice;

/// The cores this process may run on, divided among the ranks of this machine that share them; at least 1.
///
/// A launcher that bound each rank to cores of its own has divided them already: then a rank sees fewer cores than
/// the machine has, and they are all its own.
pub fn cores(local_size: u32) -> usize {
    let (allowed, online) = allowed_and_online();
    if allowed < online { allowed } else { (allowed / local_size.max(1) as usize).max(1) }
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
