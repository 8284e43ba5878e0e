//! Files that stay open between readings: of all sets together so many that half of what `ulimit -n` allows this process is left to
//! everything else. Those beyond are opened for every reading.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

/// More save nothing that could be measured.
const MOST: u64 = 512;

/// How many there are now.
static OPEN: AtomicU64 = AtomicU64::new(0);

/// One of them.
#[derive(Debug)]
pub(crate) struct KeptOpen(File);

impl KeptOpen {
    /// Keeps `file` open, or closes it where enough are.
    pub(crate) fn new(file: File) -> Option<Self> {
        let most = MOST.min(allowed() / 2);
        let one_more = |open| (open < most).then_some(open + 1);
        OPEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok().map(|_| Self(file))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for KeptOpen {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Files that this process may have open.
fn allowed() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return MOST;
    }
    limit.rlim_cur
}
