//! How long a wait has taken, without the time in which this process did not run: a job that is suspended for an hour
//! (`scontrol suspend`, SIGSTOP to all) has not waited for anybody.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Every wait looks at the clock many times a second; what is longer between two looks was a stop.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A wait.
pub(crate) struct Waited {
    last: Cell<Instant>,
    total: Cell<Duration>,
}

impl Waited {
    pub(crate) fn begin() -> Self {
        Waited { last: Cell::new(Instant::now()), total: Cell::default() }
    }

    /// How long it has taken.
    pub(crate) fn look(&self) -> Duration {
        self.look_at(Instant::now())
    }

    fn look_at(&self, now: Instant) -> Duration {
        let pause = now.saturating_duration_since(self.last.replace(now));
        self.total.set(self.total.get() + pause.min(LONGEST_PAUSE));
        self.total.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_no_wait() {
        let waited = Waited::begin();
        let mut now = waited.last.get();
        for tenths in 1..=30 {
            now += Duration::from_millis(100);
            assert_eq!(waited.look_at(now), Duration::from_millis(100 * tenths));
        }
        now += Duration::from_secs(3600);
        assert_eq!(waited.look_at(now), Duration::from_secs(3) + LONGEST_PAUSE);
        now += Duration::from_millis(100);
        assert_eq!(waited.look_at(now), Duration::from_millis(3100) + LONGEST_PAUSE);
    }
}
