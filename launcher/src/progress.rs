//! How a run looks while it runs: a bar on a terminal, plain lines in a pipe or a log file.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use mentee_cluster::{Progress, WorkerEvent};
use mentee_config::say;

/// Shows rank 0's progress.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    /// Lines on stdout: where there is no bar, or where stdout is a file beside it.
    lines: bool,
    started: Instant,
    last_line: Option<Instant>,
    last_step: Option<u64>,
    eta: Eta,
}

impl Display {
    /// A bar on stderr when that is a terminal that can show one; lines on stdout when that is none, or there is no bar.
    pub fn new() -> Display {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {pos}/{len}  {msg}")
            .expect("the template is constant and valid");
        bar.set_style(style);
        // TERM=dumb is a terminal too.
        let bar = Some(bar).filter(|bar| !bar.is_hidden());
        let lines = bar.is_none() || !std::io::stdout().is_terminal();
        Display { bar, lines, started: Instant::now(), last_line: None, last_step: None, eta: Eta::default() }
    }

    /// Takes rank 0's newest state.
    pub fn progress(&mut self, progress: &Progress) {
        if progress.total_steps == 0 {
            return; // a heartbeat of a rank that has not reported a step yet
        }
        let now = Instant::now();
        self.eta.note(now, progress);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_steps);
            bar.set_position(progress.step);
            bar.set_message(self.describe(progress));
        }
        if self.lines
            && let Some(line) = self.line(now, progress)
        {
            say!("{line}");
        }
    }

    /// The line that is due: of the step whose loss is known, which is not always the newest.
    fn line(&mut self, now: Instant, progress: &Progress) -> Option<String> {
        let Progress { logged, total_steps, .. } = *progress;
        let due = self.last_line.is_none_or(|line| now - line >= pause(now - self.started));
        if logged == 0 || self.last_step == Some(logged) || !(due || logged == total_steps) {
            return None;
        }
        self.last_line = Some(now);
        self.last_step = Some(logged);
        Some(format!("step {logged}/{total_steps}  {}", self.describe(progress)))
    }

    /// Takes an event worth a line.
    pub fn event(&self, event: &WorkerEvent) {
        if let WorkerEvent::Eval { step, knn_top1, knn_random_init, knn_raw_pixels, .. } = event {
            let floor = |name: &str, value: &Option<f64>| value.map(|value| format!("{name} {value:.1}"));
            let floors: Vec<String> =
                [floor("random init", knn_random_init), floor("raw pixels", knn_raw_pixels)]
                    .into_iter()
                    .flatten()
                    .collect();
            let floors = if floors.is_empty() { String::new() } else { format!(" ({})", floors.join(", ")) };
            self.say(&format!("kNN top-1 at step {step}: {knn_top1:.1} %{floors}"));
        }
    }

    /// A line for people, above the bar where there is one.
    pub fn say(&self, line: &str) {
        self.print(line, line);
    }

    /// The same line for the bar's terminal and for a file.
    fn print(&self, shown: &str, line: &str) {
        if let Some(bar) = &self.bar {
            bar.println(shown);
        }
        if self.lines {
            say!("{line}");
        }
    }

    /// A warning, in colour where there is one.
    pub fn warn(&self, line: &str) {
        let in_colour = std::env::var_os("NO_COLOR").is_none();
        let shown = if in_colour { format!("\x1b[33m{line}\x1b[0m") } else { line.to_owned() };
        self.print(&shown, line);
    }

    /// The gang starts again: speeds are measured anew.
    pub fn restart(&mut self) {
        self.eta = Eta::default();
        self.last_step = None;
    }

    /// How long the rest takes, once the speed is known.
    pub fn time_left(&self, progress: &Progress) -> Option<Duration> {
        self.eta.left(progress)
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn describe(&self, progress: &Progress) -> String {
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
        add("ETA ", self.eta.left(progress).map(clock));
        text
    }
}

/// Time left, from the steps this start of the gang has made.
#[derive(Debug, Default)]
pub struct Eta {
    first: Option<(Instant, u64)>,
    rate: Option<f64>, // steps a second
}

impl Eta {
    /// Takes a state.
    pub fn note(&mut self, now: Instant, progress: &Progress) {
        if progress.total_steps == 0 {
            return; // a heartbeat of a rank that is still setting up
        }
        let &mut (since, from) = self.first.get_or_insert((now, progress.step));
        let elapsed = (now - since).as_secs_f64();
        if progress.step > from && elapsed > 0.5 {
            self.rate = Some((progress.step - from) as f64 / elapsed);
        }
    }

    /// How long the rest takes at this rate.
    pub fn left(&self, progress: &Progress) -> Option<Duration> {
        let left = progress.total_steps.saturating_sub(progress.step) as f64 / self.rate?;
        Duration::try_from_secs_f64(left).ok()
    }
}

/// Shows how far a command with a known number of things to do is; on a terminal only.
#[derive(Debug)]
pub struct Counter {
    bar: Option<ProgressBar>,
}

impl Counter {
    /// Counts `things`.
    pub fn new(things: &str) -> Counter {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = format!("{{wide_bar:.cyan/blue}} {{pos}}/{{len}} {things}  {{eta}}");
            ProgressBar::new(0).with_style(
                ProgressStyle::with_template(&template).expect("the template holds nothing but a plain word"),
            )
        });
        Counter { bar }
    }

    /// `done` of `total`.
    pub fn at(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
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
        let mut display = Display {
            bar: None,
            lines: true,
            started: start,
            last_line: None,
            last_step: None,
            eta: Eta::default(),
        };
        let at = |step, logged| Progress {
            step,
            logged,
            total_steps: 6,
            epochs: 1,
            loss: (logged > 0).then_some(logged as f64),
            ..Progress::default()
        };
        assert_eq!(display.line(start, &at(1, 0)), None, "nothing is logged yet");
        let mut line = |ms, progress| display.line(start + Duration::from_millis(ms), &progress);
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
