//! How a run looks while it runs: a bar on a terminal, plain lines in a pipe or a log file.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use mentee_cluster::words::{self, Lines};
use mentee_cluster::{Progress, WorkerEvent};
use mentee_config::say;

/// Shows rank 0's progress.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    /// Lines on stdout: where there is no bar, or where stdout is a file beside it.
    lines: bool,
    words: Lines,
}

impl Display {
    /// A bar on stderr when that is a terminal that can show one; lines on stdout when that is a file, or there is no bar. There
    /// is none where stdout is a pipe, which may end on the same terminal (`mentee run … | tee log`).
    pub fn new() -> Display {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {pos}/{len}  {msg}")
            .expect("the template is constant and valid");
        bar.set_style(style);
        let stdout = std::io::stdout().as_fd().try_clone_to_owned();
        let stdout = stdout.and_then(|stdout| Ok(File::from(stdout).metadata()?.file_type())).ok();
        let (is_file, is_pipe) =
            stdout.map_or((false, false), |it| (it.is_file(), it.is_fifo() || it.is_socket()));
        // TERM=dumb is a terminal too.
        let bar = Some(bar).filter(|bar| !bar.is_hidden() && !is_pipe);
        let lines = bar.is_none() || is_file;
        Display { bar, lines, words: Lines::new(Instant::now()) }
    }

    /// Takes rank 0's newest state.
    pub fn progress(&mut self, progress: &Progress) {
        if progress.total_steps == 0 {
            return; // a heartbeat of a rank that has not reported a step yet
        }
        let now = Instant::now();
        self.words.note(now, progress);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_steps);
            bar.set_position(progress.step);
            bar.set_message(self.words.describe(progress));
        }
        if self.lines
            && let Some(line) = self.words.due(now, progress)
        {
            say!("{line}");
        }
    }

    /// Takes an event worth a line.
    pub fn event(&self, event: &WorkerEvent) {
        if let Some(line) = words::evaluated(event) {
            self.say(&line);
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
        self.words.restart();
    }

    /// How long the rest takes, once the speed is known.
    pub fn time_left(&self, progress: &Progress) -> Option<Duration> {
        self.words.left(progress)
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
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
