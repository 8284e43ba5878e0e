//! A run in words, the same whoever says them: `mentee run`, or rank 0 of a run that has no supervisor.

use std::time::{Duration, Instant};

use crate::message::{Progress, WorkerEvent};

/// The lines of a run, thinned out as it grows long.
#[derive(Debug)]
pub struct Lines {
    started: Instant,
    last_line: Option<Instant>,
    last_step: Option<u64>,
    eta: Eta,
}

impl Lines {
    /// Of a run that starts `now`.
    pub fn new(now: Instant) -> Lines {
        Lines { started: now, last_line: None, last_step: None, eta: Eta::default() }
    }

    /// Takes rank 0's newest state.
    pub fn note(&mut self, now: Instant, progress: &Progress) {
        self.eta.note(now, progress);
    }

    /// The line that is due: of the step whose loss is known, which is not always the newest.
    pub fn due(&mut self, now: Instant, progress: &Progress) -> Option<String> {
        let Progress { logged, total_steps, .. } = *progress;
        let due = self.last_line.is_none_or(|line| now - line >= pause(now - self.started));
        if logged == 0 || self.last_step == Some(logged) || !(due || logged == total_steps) {
            return None;
        }
        self.last_line = Some(now);
        self.last_step = Some(logged);
        Some(format!("step {logged}/{total_steps}  {}", self.describe(progress)))
    }

    /// Epoch, loss, z_std, throughput and the time left, as far as they are known.
    pub fn describe(&self, progress: &Progress) -> String {
        let mut text = format!("epoch {}/{}", (progress.epoch + 1).min(progress.epochs), progress.epochs);
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str("  ");
                text.push_str(name);
                text.push_str(&value);
            }
        };
        add("loss ", progress.loss.map(|loss| format!("{loss:.4}")));
        add("z_std ", progress.z_std.map(|z_std| format!("{z_std:.2}")));
        add("", progress.images_per_s.map(|rate| format!("{rate:.0} images/s")));
        add("ETA ", self.left(progress).map(clock));
        text
    }

    /// How long the rest takes, once the speed is known.
    pub fn left(&self, progress: &Progress) -> Option<Duration> {
        self.eta.left(progress)
    }

    /// The ranks start again: speeds are measured anew.
    pub fn restart(&mut self) {
        self.eta = Eta::default();
        self.last_step = None;
    }
}

/// What an evaluation found; none for other events.
pub fn evaluated(event: &WorkerEvent) -> Option<String> {
    let WorkerEvent::Eval { step, knn_top1, knn_random_init, knn_raw_pixels, .. } = event else {
        return None;
    };
    let floor = |name: &str, value: &Option<f64>| value.map(|value| format!("{name} {value:.1}"));
    let floors = [floor("random init", knn_random_init), floor("raw pixels", knn_raw_pixels)];
    let floors: Vec<String> = floors.into_iter().flatten().collect();
    let floors = if floors.is_empty() { String::new() } else { format!(" ({})", floors.join(", ")) };
    Some(format!("kNN top-1 at step {step}: {knn_top1:.1} %{floors}"))
}

/// Time left, from the steps this start of the gang has made.
#[derive(Debug, Default)]
struct Eta {
    first: Option<(Instant, u64)>,
    rate: Option<f64>, // steps a second
}

impl Eta {
    fn note(&mut self, now: Instant, progress: &Progress) {
        if progress.total_steps == 0 {
            return; // a heartbeat of a rank that is still setting up
        }
        let &mut (since, from) = self.first.get_or_insert((now, progress.step));
        let elapsed = (now - since).as_secs_f64();
        if progress.step > from && elapsed > 0.5 {
            self.rate = Some((progress.step - from) as f64 / elapsed);
        }
    }

    fn left(&self, progress: &Progress) -> Option<Duration> {
        let left = progress.total_steps.saturating_sub(progress.step) as f64 / self.rate?;
        Duration::try_from_secs_f64(left).ok()
    }
}

/// Between plain lines: 2 s at first, a minute after half an hour; a log of days stays readable.
fn pause(elapsed: Duration) -> Duration {
    (elapsed / 30).clamp(Duration::from_secs(2), Duration::from_secs(60))
}

/// `0:07`, `12:30`, `3:05:00`, `2 d 3 h`.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match hours {
        0 => format!("{minutes}:{:02}", seconds % 60),
        1..48 => format!("{hours}:{minutes:02}:{:02}", seconds % 60),
        _ => format!("{} d {} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        let table = [(0, "0:00"), (7, "0:07"), (750, "12:30"), (11_100, "3:05:00"), (184_000, "2 d 3 h")];
        for (seconds, text) in table {
            assert_eq!(clock(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn the_time_left_follows_the_rate() {
        let mut eta = Eta::default();
        let start = Instant::now();
        let at = |step| Progress { step, total_steps: 100, ..Progress::default() };
        eta.note(start, &Progress::default());
        eta.note(start, &at(40));
        assert_eq!(eta.left(&at(40)), None);
        eta.note(start + Duration::from_secs(10), &at(60));
        assert_eq!(eta.left(&at(60)), Some(Duration::from_secs(20)));
        assert_eq!(eta.left(&at(200)), Some(Duration::ZERO));
    }

    #[test]
    fn a_line_is_of_the_step_whose_loss_it_gives() {
        let start = Instant::now();
        let mut lines = Lines::new(start);
        let at = |step, logged| Progress {
            step,
            logged,
            total_steps: 6,
            epochs: 1,
            loss: (logged > 0).then_some(logged as f64),
            ..Progress::default()
        };
        assert_eq!(lines.due(start, &at(1, 0)), None, "nothing is logged yet");
        let mut line = |ms, progress| lines.due(start + Duration::from_millis(ms), &progress);
        assert_eq!(line(10, at(1, 1)).as_deref(), Some("step 1/6  epoch 1/1  loss 1.0000"));
        assert_eq!(line(4000, at(5, 4)).as_deref(), Some("step 4/6  epoch 1/1  loss 4.0000"));
        // The last step is done, its loss not known yet; then it is, at once.
        assert_eq!(line(4010, at(6, 5)), None);
        assert_eq!(line(4020, at(6, 6)).as_deref(), Some("step 6/6  epoch 1/1  loss 6.0000"));
        assert_eq!(line(9000, at(6, 6)), None, "once");
    }

    #[test]
    fn lines_thin_out() {
        assert_eq!(pause(Duration::ZERO), Duration::from_secs(2));
        assert_eq!(pause(Duration::from_secs(600)), Duration::from_secs(20));
        assert_eq!(pause(Duration::from_secs(100_000)), Duration::from_secs(60));
    }
}
