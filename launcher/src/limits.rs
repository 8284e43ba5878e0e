//! What the system allows this process, and what it has used.

use std::time::Duration;

use crate::failure::Failure;

/// Allows this process so many open files, as far as the system lets it.
///
/// # Errors
/// [`Failure`] when the hard limit is lower.
pub fn allow_open_files(count: u64) -> Result<(), Failure> {
    mentee_cluster::limits::allow_open_files(count, count).map_err(|error| Failure::failed(error.to_string()))
}

/// A write beyond a limit on the size of files (`ulimit -f`) is an error from now on, and ends this process no more. What it starts
/// does not inherit that, as it would an ignored signal.
pub fn outlive_file_size_limit() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the handler does nothing, which is safe whatever it interrupts.
    unsafe { libc::signal(libc::SIGXFSZ, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t) };
}

/// Processor time of all threads of this process so far.
pub fn processor_time() -> Duration {
    // SAFETY: all zeros is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place for the answer.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) } != 0 {
        return Duration::ZERO;
    }
    let time = |value: libc::timeval| {
        Duration::from_secs(value.tv_sec as u64) + Duration::from_micros(value.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Memory of this process in use, MiB (0 where /proc does not say).
pub fn memory_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0.0_f64) / 1024.0
}
