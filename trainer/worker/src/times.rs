//! Where a rank's time goes, phase by phase.
//!
//! Every change of phase is a tick of [`Clock`]. Batch norms wait for other ranks in the middle of forward and backward;
//! they add to [`Waited`], and the clock books that time as communication instead.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mentee_cluster::{Phase, StepTimes};

/// The target of the lines in the ranks' logs that say where time went.
pub const TARGET: &str = "mentee_worker::times";
/// How often a rank writes one.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Time spent in exchanges that happen within another phase.
#[derive(Debug, Clone, Default)]
pub struct Waited(Arc<AtomicU64>); // nanoseconds

impl Waited {
    /// Adds one exchange.
    pub fn add(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn so_far(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// Sums by what they were spent on.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    data: Duration,
    forward: Duration,
    backward: Duration,
    comm: Duration,
    update: Duration,
}

impl Spent {
    fn add(&mut self, other: &Spent) {
        self.data += other.data;
        self.forward += other.forward;
        self.backward += other.backward;
        self.comm += other.comm;
        self.update += other.update;
    }

    fn per_step(&self, steps: u32) -> StepTimes {
        let mean = |total: Duration| total.as_secs_f64() * 1e3 / f64::from(steps.max(1));
        StepTimes {
            data_wait_ms: mean(self.data),
            forward_ms: mean(self.forward),
            backward_ms: mean(self.backward),
            comm_ms: mean(self.comm),
            update_ms: mean(self.update),
        }
    }
}

/// Books time by phase.
#[derive(Debug)]
pub struct Clock {
    phase: Phase,
    since: Instant,
    waited: Waited,
    waited_before: Duration,
    spent: Spent,
    /// Since the last line in the log: steps, and the times of those that were taken already.
    logged: (Instant, u32, Spent),
}

impl Clock {
    /// Starts at `now`, outside of any step.
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Starting,
            since: now,
            waited: Waited::default(),
            waited_before: Duration::ZERO,
            spent: Spent::default(),
            logged: (now, 0, Spent::default()),
        }
    }

    /// Where exchanges within a phase are to be added.
    pub fn waited(&self) -> Waited {
        self.waited.clone()
    }

    /// From `now` on the rank is in `phase`.
    pub fn enter(&mut self, now: Instant, phase: Phase) {
        let waited = self.waited.so_far();
        let within = waited - self.waited_before;
        let time = now.saturating_duration_since(self.since);
        let own = time.saturating_sub(within);
        let spent = &mut self.spent;
        match self.phase {
            Phase::DataWait => spent.data += own,
            Phase::Forward => spent.forward += own,
            Phase::Backward => spent.backward += own,
            Phase::Reduce => spent.comm += own,
            Phase::Update => spent.update += own,
            // No part of a step.
            Phase::Starting | Phase::Checkpoint | Phase::Eval | Phase::Done => {}
        }
        if !matches!(self.phase, Phase::Starting | Phase::Checkpoint | Phase::Eval | Phase::Done) {
            spent.comm += time - own;
        }
        (self.phase, self.since, self.waited_before) = (phase, now, waited);
    }

    /// Means over the `steps` since the last call.
    pub fn take(&mut self, now: Instant, steps: u32) -> StepTimes {
        self.enter(now, self.phase);
        let spent = std::mem::take(&mut self.spent);
        self.logged.1 += steps;
        self.logged.2.add(&spent);
        spent.per_step(steps)
    }

    /// Means since the last line in the log and the steps they are of, when another is due or `last`.
    pub fn due(&mut self, now: Instant, last: bool) -> Option<(u32, StepTimes)> {
        let (since, steps, spent) = self.logged;
        if steps == 0 || !last && now.saturating_duration_since(since) < LOG_EVERY {
            return None;
        }
        self.logged = (now, 0, Spent::default());
        Some((steps, spent.per_step(steps)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_booked_where_it_was_spent() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut clock = Clock::new(start);
        let waited = clock.waited();
        clock.enter(at(100), Phase::DataWait); // setting up is no part of a step
        for step in 0..2 {
            let at = |ms: u64| at(100 + 100 * step + ms);
            clock.enter(at(10), Phase::Forward);
            waited.add(Duration::from_millis(5)); // statistics of a batch norm
            clock.enter(at(40), Phase::Backward);
            waited.add(Duration::from_millis(10));
            clock.enter(at(80), Phase::Reduce);
            clock.enter(at(95), Phase::Update);
            clock.enter(at(100), Phase::DataWait);
        }
        let times = clock.take(at(300), 2);
        let expected = StepTimes {
            data_wait_ms: 10.0,
            forward_ms: 25.0,
            backward_ms: 30.0,
            comm_ms: 30.0,
            update_ms: 5.0,
        };
        assert_eq!(times, expected);
        assert_eq!(times.own_ms(), 70.0);
        assert_eq!(clock.due(at(300), false), None, "too early");
        assert_eq!(clock.due(at(300), true), Some((2, expected)));
        assert_eq!(clock.due(at(300), true), None, "nothing new");

        clock.enter(at(310), Phase::Checkpoint);
        clock.enter(at(900), Phase::DataWait);
        assert_eq!(clock.take(at(900), 1).own_ms(), 10.0, "a checkpoint is no part of a step");
        assert_eq!(clock.due(at(20_000), false).map(|(steps, _)| steps), Some(1));
    }
}
