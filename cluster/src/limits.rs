//! What the system allows this process.

use std::io;

/// Allows this process `wanted` open files, or as many as the system lets it have.
///
/// # Errors
/// When that is less than `needed`.
pub fn allow_open_files(wanted: u64, needed: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 || limit.rlim_cur >= wanted {
        return Ok(());
    }
    if limit.rlim_max < needed {
        return Err(io::Error::other(format!(
            "{needed} open files are needed, one for each worker's connection, and {} are allowed: raise `ulimit -Hn`, or \
             use fewer workers",
            limit.rlim_max
        )));
    }
    limit.rlim_cur = wanted.min(limit.rlim_max);
    // SAFETY: `limit` is valid and only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::other(format!("cannot raise the limit of open files to {wanted}: {error}")));
    }
    Ok(())
}
