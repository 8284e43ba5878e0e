//! How many cores this rank may use.

/// The cores this process may run on, divided among the ranks of this machine that share them; at least 1.
///
/// A launcher that bound each rank to cores of its own has divided them already: then a rank sees fewer cores than
/// the machine has, and they are all its own.
pub fn cores(local_size: u32) -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: sysconf only reads.
    let online = usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1);
    if allowed < online { allowed } else { (allowed / local_size.max(1) as usize).max(1) }
}
