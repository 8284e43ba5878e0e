//! What a rank's link thread tells of it without asking the training thread: a few atomics, stored to at any time and
//! read when a report or a heartbeat is sent.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::message::{Phase, Progress};

/// Where a rank is just now.
#[derive(Debug, Default)]
pub struct Vitals {
    step: AtomicU64,
    phase: AtomicU8,
    waiting: AtomicBool,
    own_micros: AtomicU64,
    data_micros: AtomicU64,
    device_micros: AtomicU64,
}

impl Vitals {
    /// Steps completed.
    pub fn step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Steps completed, as told by [`Vitals::step`].
    pub fn steps(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// What the rank does.
    pub fn phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Whether it waits for other ranks in a call to them.
    pub fn waiting(&self, waiting: bool) {
        self.waiting.store(waiting, Ordering::Relaxed);
    }

    /// Adds a step's own work, waits for other ranks and for the device left out, the part of it that waited for data, and the
    /// wait for the device.
    pub fn worked(&self, own: Duration, data: Duration, device: Duration) {
        self.device_micros.fetch_add(device.as_micros() as u64, Ordering::Relaxed);
        self.own_micros.fetch_add(own.as_micros() as u64, Ordering::Relaxed);
        self.data_micros.fetch_add(data.as_micros() as u64, Ordering::Relaxed);
    }

    /// A report with what is known here.
    pub(crate) fn fill(&self, report: Progress) -> Progress {
        let ms = |micros: &AtomicU64| micros.load(Ordering::Relaxed) as f64 / 1e3;
        Progress {
            step: self.steps(),
            logged: report.step,
            phase: Phase::from_u8(self.phase.load(Ordering::Relaxed)),
            waiting: self.waiting.load(Ordering::Relaxed),
            own_ms: ms(&self.own_micros),
            data_ms: ms(&self.data_micros),
            device_ms: ms(&self.device_micros),
            ..report
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_which_step_its_numbers_are_of() {
        let vitals = Vitals::default();
        vitals.step(6);
        let filled = vitals.fill(Progress { step: 5, loss: Some(3.5), ..Progress::default() });
        assert_eq!((filled.step, filled.logged, filled.loss), (6, 5, Some(3.5)));
    }
}
