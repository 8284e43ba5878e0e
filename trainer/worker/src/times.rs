//! Where a rank's time goes, phase by phase.
//!
//! Every change of phase is a tick of [`Clock`]. Batch norms wait for other ranks in the middle of forward and backward:
//! what [`Waits`](crate::waits::Waits) has counted within a phase is booked as communication instead.

use std::time::{Duration, Instant};

use mentee_cluster::{Phase, StepTimes};

/// The target of the lines in the ranks' logs that say where time went.
pub const TARGET: &str = "mentee_worker::times";
/// How often a rank writes one.
const LOG_EVERY: Duration = Duration::from_secs(10);

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
    /// Spent in calls to other ranks until then.
    waited: Duration,
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
            waited: Duration::ZERO,
            spent: Spent::default(),
            logged: (now, 0, Spent::default()),
        }
    }

    /// From `now` on the rank is in `phase`; `waited`: spent in calls to other ranks so far.
    pub fn enter(&mut self, now: Instant, waited: Duration, phase: Phase) {
        let within = waited.saturating_sub(self.waited);
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
        (self.phase, self.since, self.waited) = (phase, now, waited);
    }

    /// Of what was booked as communication up to `now`, so much was backward, on a device.
    pub fn was_backward(&mut self, now: Instant, waited: Duration, time: Duration) {
        self.enter(now, waited, self.phase);
        let time = time.min(self.spent.comm);
        self.spent.comm -= time;
        self.spent.backward += time;
    }

    /// Means over the `steps` since the last call.
    pub fn take(&mut self, now: Instant, waited: Duration, steps: u32) -> StepTimes {
        self.enter(now, waited, self.phase);
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
        let ms = Duration::from_millis;
        let mut clock = Clock::new(start);
        clock.enter(at(100), ms(0), Phase::DataWait); // setting up is no part of a step
        for step in 0..2 {
            let (at, waited) = (|ms: u64| at(100 + 100 * step + ms), 15 * step);
            clock.enter(at(10), ms(waited), Phase::Forward);
            clock.enter(at(40), ms(waited + 5), Phase::Backward); // 5 ms for statistics of a batch norm
            clock.enter(at(80), ms(waited + 15), Phase::Reduce);
            clock.enter(at(95), ms(waited + 15), Phase::Update);
            clock.enter(at(100), ms(waited + 15), Phase::DataWait);
        }
        let times = clock.take(at(300), ms(30), 2);
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

        clock.enter(at(310), ms(30), Phase::Checkpoint);
        clock.enter(at(900), ms(300), Phase::DataWait);
        assert_eq!(clock.take(at(900), ms(300), 1).own_ms(), 10.0, "a checkpoint is no part of a step");
        assert_eq!(clock.due(at(20_000), false).map(|(steps, _)| steps), Some(1));

        let mut clock = Clock::new(start);
        clock.enter(start, ms(0), Phase::Reduce);
        clock.was_backward(at(8), ms(0), ms(6));
        clock.enter(at(10), ms(0), Phase::Update);
        let times = clock.take(at(10), ms(0), 1);
        assert_eq!((times.backward_ms, times.comm_ms), (6.0, 4.0), "a device's wait");
    }
}
