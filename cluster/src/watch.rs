//! Whether the gang goes on, and who holds it up. Pure, as the coordinator is.
//!
//! | what is seen | is | after |
//! |---|---|---|
//! | nothing is heard of a rank, which sends a heartbeat every second | a stall of that rank | a quarter of `stall`, at least 5 s |
//! | no rank's step or phase changes | a stall of the rank that does not wait for others | `stall`, or ten times the longest recent step where that is longer |
//! | the same before the first step is done, or in a checkpoint | the same | ten times `stall` |
//! | the same in an evaluation | the same | thirty times `stall` |
//! | a rank's own work takes half as long again as that of the median rank | a straggler | three windows of eight steps |
//!
//! A rank's own work is its step without its waits for others: when one is slow all steps are, and only the slow one
//! is busy. On devices it is what the host does, and holds up the others only where the rank's device has to wait for it: who
//! is slow because its device is cannot be told, as devices wait for each other within their streams. Time in which this process itself did not run (a suspended job or laptop) is nobody's silence.

use std::time::Duration;

use crate::message::{Phase, Progress};

/// Ticks come every second; a longer pause is time in which this process did not run.
const TICK: Duration = Duration::from_secs(1);
const TICK_LATE: Duration = Duration::from_millis(2500);
/// Parts of `stall` after which a silent rank counts as stopped, and the least of it.
const SILENCE: u32 = 4;
const LEAST_SILENCE: Duration = Duration::from_secs(5);
/// A stall takes at least so many times the longest recent step.
const STEPS_LATE: u32 = 10;
/// Steps that are remembered for that, in reports.
const RECENT: usize = 32;
/// Multiples of `stall` for what takes long.
const SLOW_PHASE: u32 = 10;
const EVALUATION: u32 = 30;
/// Steps in a window of the stragglers' account.
const WINDOW: u64 = 8;
/// So many windows in a row make a straggler, and end one.
const WINDOWS: u8 = 3;
/// How much longer than the median's a straggler's own work takes, and by how much at least.
const RATIO: f64 = 1.5;
const LEAST_MS: f64 = 2.0;
/// A rank that waits for its device for so much of its own work is not what its device waits for.
const DEVICE_BUSY: f64 = 0.25;

/// The gang does not go on.
#[derive(Debug, Clone, PartialEq)]
pub struct Stall {
    /// The rank that holds it up.
    pub rank: u32,
    /// Steps it had completed.
    pub step: u64,
    /// What it was doing.
    pub phase: Phase,
    /// How it holds up the others.
    pub kind: StallKind,
    /// For so long.
    pub lasted: Duration,
}

/// The ways not to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StallKind {
    /// Nothing is heard of the rank: its process is stopped, or its machine is gone.
    Silent,
    /// It lives and does not get on.
    Stuck,
    /// Every rank waits for another; this one is furthest behind.
    AllWait,
}

/// How a rank's own work compares with that of the median rank, when that has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Pace {
    /// The rank.
    pub rank: u32,
    /// Steps it had completed.
    pub step: u64,
    /// Its own work, milliseconds a step.
    pub own_ms: f64,
    /// Of that, waiting for data.
    pub data_ms: f64,
    /// The median rank's own work, milliseconds a step.
    pub median_ms: f64,
    /// It is a straggler; `false`: no longer.
    pub slow: bool,
}

#[derive(Debug, Clone)]
struct Seen {
    heard: Duration,
    changed: Duration,
    step: u64,
    phase: Phase,
    waiting: bool,
    over: bool,
    own_ms: f64,
    data_ms: f64,
    device_ms: f64,
    /// Step, own, data and device milliseconds at the start of the window.
    base: (u64, [f64; 3]),
    ready: bool,
    /// Windows in a row that speak against what is believed of it.
    windows: u8,
    slow: bool,
}

/// Watches one start of the gang.
#[derive(Debug)]
pub struct Watch {
    stall: Duration,
    ranks: Vec<Seen>,
    /// When anything happened last.
    last: Duration,
    not_run: Duration,
    told: bool,
    /// Last change of any rank's step or phase.
    changed: Duration,
    /// The furthest step and when it was first seen.
    top: (u64, Duration),
    /// Nothing but steps since then.
    only_steps: bool,
    recent: Vec<Duration>,
    next_recent: usize,
    /// Ranks whose window is full.
    ready: usize,
}

impl Watch {
    /// Of `world_size` ranks that go at `now`; see the module for `stall`.
    pub fn new(stall: Duration, world_size: u32, now: Duration) -> Watch {
        let seen = Seen {
            heard: now,
            changed: now,
            step: 0,
            phase: Phase::Starting,
            waiting: false,
            over: false,
            own_ms: 0.0,
            data_ms: 0.0,
            device_ms: 0.0,
            base: (0, [0.0; 3]),
            ready: false,
            windows: 0,
            slow: false,
        };
        Watch {
            stall,
            ranks: vec![seen; world_size as usize],
            last: now,
            not_run: Duration::ZERO,
            told: false,
            changed: now,
            top: (0, now),
            only_steps: false,
            recent: Vec::new(),
            next_recent: 0,
            ready: 0,
        }
    }

    /// A rank's newest state. Returns whose pace has changed; looks at all ranks only when the windows of all are full.
    pub fn progress(&mut self, now: Duration, rank: u32, progress: &Progress) -> Vec<Pace> {
        let now = self.clock(now);
        let Some(seen) = self.ranks.get_mut(rank as usize) else { return Vec::new() };
        seen.heard = now;
        seen.waiting = progress.waiting || progress.phase == Phase::Reduce;
        if (seen.step, seen.phase) != (progress.step, progress.phase) {
            if seen.phase == Phase::Starting {
                // The first step that is known of: of the run when it starts, later when it is resumed.
                seen.base = (progress.step, [progress.own_ms, progress.data_ms, progress.device_ms]);
            }
            (seen.step, seen.phase, seen.changed) = (progress.step, progress.phase, now);
            self.changed = now;
        }
        (seen.own_ms, seen.data_ms, seen.device_ms) = (progress.own_ms, progress.data_ms, progress.device_ms);
        let full = progress.step >= seen.base.0.saturating_add(WINDOW) && !seen.ready;
        if full {
            seen.ready = true;
            self.ready += 1;
        }
        let step = seen.step;
        self.learn(now, step);
        self.only_steps &= !matches!(progress.phase, Phase::Starting | Phase::Checkpoint | Phase::Eval);
        if self.ready == self.ranks.len() { self.compare() } else { Vec::new() }
    }

    /// The rank is done or has failed: nothing more is expected of it.
    pub fn over(&mut self, rank: u32) {
        if let Some(seen) = self.ranks.get_mut(rank as usize) {
            seen.over = true;
        }
    }

    /// Time passes. A stall is told once.
    pub fn tick(&mut self, now: Duration) -> Option<Stall> {
        let now = self.clock(now);
        if self.told {
            return None;
        }
        let stall = self.silent(now).or_else(|| self.stuck(now));
        self.told = stall.is_some();
        stall
    }

    /// The time that this process has run.
    fn clock(&mut self, now: Duration) -> Duration {
        let pause = now.saturating_sub(self.last);
        self.last = now;
        if pause > TICK_LATE {
            self.not_run += pause - TICK;
        }
        now.saturating_sub(self.not_run)
    }

    fn silent(&self, now: Duration) -> Option<Stall> {
        let limit = (self.stall / SILENCE).max(LEAST_SILENCE);
        let (rank, seen) = self.awaited().min_by_key(|(_, seen)| seen.heard)?;
        let lasted = now.saturating_sub(seen.heard);
        (lasted >= limit).then(|| stall_of(rank, seen, StallKind::Silent, lasted))
    }

    fn stuck(&self, now: Duration) -> Option<Stall> {
        let limit = self.awaited().map(|(_, seen)| self.patience(seen)).max()?;
        let lasted = now.saturating_sub(self.changed);
        if lasted < limit {
            return None;
        }
        // Furthest behind, and there for the longest time.
        let behind = |(_, seen): &(usize, &Seen)| (seen.step, seen.changed);
        let busy = self.awaited().filter(|(_, seen)| !seen.waiting).min_by_key(behind);
        match busy {
            Some((rank, seen)) => Some(stall_of(rank, seen, StallKind::Stuck, lasted)),
            None => self
                .awaited()
                .min_by_key(behind)
                .map(|(n, seen)| stall_of(n, seen, StallKind::AllWait, lasted)),
        }
    }

    /// How long a rank may stay as it is.
    fn patience(&self, seen: &Seen) -> Duration {
        match seen.phase {
            Phase::Eval => self.stall.saturating_mul(EVALUATION),
            Phase::Starting | Phase::Checkpoint => self.stall.saturating_mul(SLOW_PHASE),
            _ => match self.recent.iter().max() {
                Some(&longest) => self.stall.max(longest.saturating_mul(STEPS_LATE)),
                None => self.stall.saturating_mul(SLOW_PHASE),
            },
        }
    }

    fn awaited(&self) -> impl Iterator<Item = (usize, &Seen)> {
        self.ranks.iter().enumerate().filter(|(_, seen)| !seen.over && seen.phase != Phase::Done)
    }

    /// Takes the time of the steps since the last report that had news of them.
    fn learn(&mut self, now: Duration, step: u64) {
        let (top, at) = self.top;
        if step <= top {
            return;
        }
        let each = now.saturating_sub(at) / u32::try_from(step - top).unwrap_or(u32::MAX);
        if self.only_steps {
            if self.recent.len() < RECENT {
                self.recent.push(each);
            } else {
                self.recent[self.next_recent] = each;
            }
            self.next_recent = (self.next_recent + 1) % RECENT;
        }
        self.top = (step, now);
        self.only_steps = true;
    }

    /// Every rank's window is full: compares them, and opens the next.
    fn compare(&mut self) -> Vec<Pace> {
        self.ready = 0;
        let each: Vec<[f64; 3]> = self
            .ranks
            .iter_mut()
            .map(|seen| {
                let now = [seen.own_ms, seen.data_ms, seen.device_ms];
                let (step, before) = std::mem::replace(&mut seen.base, (seen.step, now));
                seen.ready = false;
                let steps = seen.step.saturating_sub(step).max(1) as f64;
                std::array::from_fn(|n| (now[n] - before[n]) / steps)
            })
            .collect();
        let mut sorted: Vec<f64> = each.iter().map(|[own, ..]| *own).collect();
        // Of two ranks the faster one is what the other is compared with.
        let (_, &mut median_ms, _) = sorted.select_nth_unstable_by((each.len() - 1) / 2, f64::total_cmp);
        let mut news = Vec::new();
        for (rank, (seen, [own_ms, data_ms, device_ms])) in self.ranks.iter_mut().zip(each).enumerate() {
            let slow = own_ms > RATIO * median_ms
                && own_ms > median_ms + LEAST_MS
                && device_ms <= DEVICE_BUSY * own_ms;
            seen.windows = if slow == seen.slow { 0 } else { seen.windows + 1 };
            if seen.windows == WINDOWS {
                (seen.slow, seen.windows) = (slow, 0);
                news.push(Pace { rank: rank as u32, step: seen.step, own_ms, data_ms, median_ms, slow });
            }
        }
        news
    }
}

fn stall_of(rank: usize, seen: &Seen, kind: StallKind, lasted: Duration) -> Stall {
    Stall { rank: rank as u32, step: seen.step, phase: seen.phase, kind, lasted }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(60);

    fn at(step: u64, phase: Phase, waiting: bool) -> Progress {
        Progress { step, phase, waiting, ..Progress::default() }
    }

    /// A gang in time: every second every rank but the silent says what `says` makes of its rank and the second.
    fn watched(
        seconds: std::ops::Range<u64>,
        watch: &mut Watch,
        says: impl Fn(u32, u64) -> Option<Progress>,
    ) -> Option<(u64, Stall)> {
        for second in seconds {
            let now = Duration::from_secs(second);
            for rank in 0..watch.ranks.len() as u32 {
                if let Some(progress) = says(rank, second) {
                    watch.progress(now, rank, &progress);
                }
            }
            if let Some(stall) = watch.tick(now) {
                return Some((second, stall));
            }
        }
        None
    }

    /// Trains at a step a second up to step 20, then is at what `then` says.
    fn after_20(then: impl Fn(u32, u64) -> Option<Progress>) -> Option<(u64, Stall)> {
        let mut watch = Watch::new(STALL, 3, Duration::ZERO);
        watched(0..4000, &mut watch, |rank, second| match second {
            0..=20 => Some(at(second, Phase::Forward, false)),
            _ => then(rank, second),
        })
    }

    #[test]
    fn a_rank_that_is_silent_is_named_after_a_quarter() {
        let (second, stall) = after_20(|rank, second| match (rank, second) {
            (1, _) => None,
            _ => Some(at(21, Phase::Reduce, true)),
        })
        .expect("a stall");
        assert_eq!((second, stall.rank, stall.step), (35, 1, 20));
        assert_eq!((stall.kind, stall.phase), (StallKind::Silent, Phase::Forward));
        assert_eq!(stall.lasted, Duration::from_secs(15));
    }

    #[test]
    fn a_rank_that_lives_and_is_stuck_is_told_from_those_that_wait_for_it() {
        // Rank 2 hangs in its own forward pass; the others are in the same phase, waiting for its statistics.
        let (second, stall) = after_20(|rank, _| Some(at(20, Phase::Forward, rank != 2))).expect("a stall");
        assert_eq!((second, stall.rank, stall.kind), (80, 2, StallKind::Stuck));
        // The others are done with the step and wait for gradients, which `Reduce` says by itself.
        let (_, stall) = after_20(|rank, _| match rank {
            0 => Some(at(20, Phase::Backward, false)),
            _ => Some(at(20, Phase::Reduce, false)),
        })
        .expect("a stall");
        assert_eq!((stall.rank, stall.phase), (0, Phase::Backward));
        let (_, stall) = after_20(|rank, _| {
            Some(at(
                if rank == 1 { 20 } else { 21 },
                if rank == 1 { Phase::Reduce } else { Phase::Forward },
                true,
            ))
        })
        .expect("a stall");
        assert_eq!((stall.rank, stall.kind), (1, StallKind::AllWait), "the one that is behind");
    }

    #[test]
    fn what_takes_long_is_given_longer() {
        let phase = |phase| after_20(move |_, _| Some(at(20, phase, false))).expect("a stall").0;
        assert_eq!(phase(Phase::Checkpoint), 21 + 600);
        assert_eq!(phase(Phase::Eval), 21 + 1800);
        // One rank writes, the others are back at work and wait.
        let (second, stall) = after_20(|rank, _| match rank {
            0 => Some(at(20, Phase::Checkpoint, false)),
            _ => Some(at(20, Phase::Forward, true)),
        })
        .expect("a stall");
        assert_eq!((second, stall.rank, stall.phase), (21 + 600, 0, Phase::Checkpoint));
        // Before any step is known.
        let mut watch = Watch::new(STALL, 2, Duration::ZERO);
        let (second, stall) =
            watched(0..4000, &mut watch, |rank, _| Some(at(0, Phase::Forward, rank == 0))).expect("a stall");
        assert_eq!((second, stall.rank), (600, 1));
    }

    #[test]
    fn slow_steps_make_a_longer_deadline_and_checkpoints_do_not() {
        // A step takes 20 s, and a checkpoint of 200 s lies between two of them.
        let says = |second: u64| match second {
            0..100 => at(second / 20, Phase::Forward, false),
            100..300 => at(5, Phase::Checkpoint, false),
            300..400 => at(5 + (second - 300) / 20, Phase::Forward, false),
            _ => at(10, Phase::Backward, false),
        };
        let mut watch = Watch::new(STALL, 1, Duration::ZERO);
        let (second, _) = watched(0..4000, &mut watch, |_, second| Some(says(second))).expect("a stall");
        assert_eq!(second, 400 + 10 * 20);
    }

    #[test]
    fn a_gang_that_trains_or_is_over_is_no_stall() {
        let mut watch = Watch::new(STALL, 2, Duration::ZERO);
        let trains = |_, second| Some(at(second / 50, Phase::Forward, false));
        assert_eq!(watched(0..3000, &mut watch, trains), None);
        watch.over(0);
        assert_eq!(
            watched(3000..3010, &mut watch, |rank, _| (rank == 1).then(|| at(60, Phase::Done, false))),
            None
        );
        assert_eq!(watched(3010..9000, &mut watch, |_, _| None), None);
    }

    #[test]
    fn time_in_which_nobody_ran_is_nobodys_silence() {
        let mut watch = Watch::new(STALL, 2, Duration::ZERO);
        assert_eq!(watched(0..100, &mut watch, |_, second| Some(at(second, Phase::Forward, false))), None);
        // The job is suspended for an hour; the first tick comes before any heartbeat.
        assert_eq!(watch.tick(Duration::from_secs(3700)), None);
        assert_eq!(
            watched(3701..3800, &mut watch, |_, second| Some(at(second, Phase::Forward, false))),
            None
        );
        assert!(watched(3800..4000, &mut watch, |_, _| None).is_some(), "and it still watches");
    }

    #[test]
    fn a_stall_is_told_once() {
        let mut watch = Watch::new(STALL, 2, Duration::ZERO);
        assert!(watched(0..100, &mut watch, |_, _| None).is_some());
        assert_eq!(watched(100..9000, &mut watch, |_, _| None), None);
    }

    /// Steps of `ms` milliseconds of own work for each rank; returns what is said, with the step it is said at.
    fn paces(steps: u64, ms: impl Fn(usize, u64) -> f64, world_size: usize) -> Vec<(u64, u32, bool)> {
        let mut watch = Watch::new(STALL, world_size as u32, Duration::ZERO);
        let mut own = vec![0.0; world_size];
        let mut said = Vec::new();
        for step in 1..=steps {
            for (rank, own) in own.iter_mut().enumerate() {
                *own += ms(rank, step);
                // Reports come every few steps.
                if step % 3 == rank as u64 % 3 {
                    let progress = Progress { own_ms: *own, ..at(step, Phase::Update, false) };
                    let news = watch.progress(Duration::from_millis(100 * step), rank as u32, &progress);
                    said.extend(news.into_iter().map(|pace| (step, pace.rank, pace.slow)));
                }
            }
        }
        said
    }

    #[test]
    fn a_straggler_is_named_within_50_steps_and_once() {
        for world_size in [2, 3, 8] {
            // From step 101 on rank 1 takes three times as long.
            let said = paces(400, |rank, step| if rank == 1 && step > 100 { 90.0 } else { 30.0 }, world_size);
            assert!(matches!(said[..], [(101..=150, 1, true)]), "world of {world_size}: {said:?}");
        }
    }

    #[test]
    fn one_that_recovers_is_one_no_longer() {
        let said = paces(400, |rank, step| if rank == 0 && step < 200 { 90.0 } else { 30.0 }, 2);
        assert!(matches!(said[..], [(1..=50, 0, true), (200..=250, 0, false)]), "{said:?}");
    }

    #[test]
    fn a_slow_moment_noise_and_equals_are_no_stragglers() {
        assert_eq!(paces(400, |rank, step| if rank == 1 && step % 60 < 8 { 90.0 } else { 30.0 }, 4), []);
        assert_eq!(paces(400, |rank, step| 30.0 + ((step * 7 + rank as u64 * 13) % 11) as f64, 4), []);
        assert_eq!(paces(400, |rank, _| if rank == 1 { 1.5 } else { 0.1 }, 4), [], "too little to matter");
        assert_eq!(paces(400, |_, _| 30.0, 1), []);
    }

    #[test]
    fn a_host_whose_device_is_busy_anyway_holds_nobody_up() {
        let said = |device: f64| {
            let mut watch = Watch::new(STALL, 2, Duration::ZERO);
            let mut news = Vec::new();
            for step in 1..=100u64 {
                for rank in 0..2 {
                    let steps = step as f64;
                    // Rank 1's host needs twice as long; its device has less to wait for, or nothing.
                    let (own_ms, device_ms) =
                        if rank == 1 { (20.0 * steps, device * steps) } else { (10.0 * steps, 50.0 * steps) };
                    let progress = Progress { own_ms, device_ms, ..at(step, Phase::Update, false) };
                    news.extend(watch.progress(Duration::from_millis(60 * step), rank, &progress));
                }
            }
            news.into_iter().map(|pace| (pace.rank, pace.slow)).collect::<Vec<_>>()
        };
        assert_eq!(said(40.0), []);
        assert_eq!(said(1.0), [(1, true)]);
    }

    #[test]
    fn memory_and_numbers_are_bounded_whatever_a_rank_says() {
        let mut watch = Watch::new(STALL, 2, Duration::ZERO);
        for (second, step) in [(1, u64::MAX - 8), (2, 0), (3, u64::MAX - 8), (0, 5)] {
            for rank in [0, 1, 7] {
                let own_ms = if rank == 0 { f64::NAN } else { f64::INFINITY };
                let progress = Progress { own_ms, ..at(step, Phase::Update, false) };
                watch.progress(Duration::from_secs(second), rank, &progress);
                watch.tick(Duration::from_secs(second));
                watch.over(rank + 1);
            }
        }
        assert!(watch.recent.len() <= RECENT);
    }
}
