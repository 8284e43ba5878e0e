//! `mentee monitor`: a run in a terminal. It reads the run directory and nothing else, so it works over ssh, from any
//! machine that sees the directory, while the run lives and after it has ended.
//!
//! [`draw`] makes a [`Snapshot`] visible in a buffer of any size and knows neither terminal nor files.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mentee_cluster::Phase;
use mentee_cluster::words::clock;
use mentee_config::{exit_code, show};
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph, Widget};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::curve;
use crate::failure::Failure;
use crate::logs::{self, Level};
use crate::metrics::{Metrics, Step};
use crate::printable::{on_a_terminal, printable};
use crate::rundir::RunDir;
use crate::snapshot::{RankRow, Snapshot, Watch};
use crate::status::State;

/// How often the directory is read.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// So many times as long as a drawing takes, nothing is done after it: a million steps are not drawn again every second,
const REST: u32 = 9;
/// but at least so often.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(10);
/// Without a step for so long, and for ten steps' time, a run that should go on is said to stand still.
const STILL: f64 = 30.0;
/// Characters of the name of other data that an evaluation was made on.
const MOST_OF_DATA: usize = 24;
/// Lines for why a run failed.
const MOST_OF_FAILURE: usize = 6;
/// Width of a snapshot that goes to no terminal.
const PLAIN_WIDTH: u16 = 80;

/// `mentee monitor`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Keys: q quits, tab turns to other curves, arrows and page keys scroll through the ranks.
It reads the run directory only, so it works over ssh and after the run has ended."
)]
pub struct MonitorArgs {
    /// A run directory
    pub run: PathBuf,
    /// Print one snapshot as plain text and end; so also when the output is no terminal
    #[arg(long)]
    pub once: bool,
}

/// `mentee monitor RUN [--once]`.
///
/// # Errors
/// When there is no run, or the terminal cannot be used.
pub fn command(args: &MonitorArgs) -> Result<(), Failure> {
    let mut watch = Watch::new(RunDir::existing(&args.run)?);
    if args.once || !on_a_terminal() {
        let width = ratatui::crossterm::terminal::size().ok().filter(|_| std::io::stdout().is_terminal());
        show!("{}", plain(watch.look()?, width.map_or(PLAIN_WIDTH, |(width, _)| width)).trim_end());
        return Ok(());
    }
    let cannot = |error: std::io::Error| Failure::failed(format!("cannot use the terminal: {error}"));
    // Whoever ends it so wants the terminal back as well.
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP, SIGINT] {
        // A second one ends it at once: a file system may not answer.
        signal_hook::flag::register_conditional_shutdown(signal, exit_code::FAILED, ended.clone())
            .map_err(cannot)?;
        signal_hook::flag::register(signal, ended.clone()).map_err(cannot)?;
    }
    end_with_the_terminal();
    let mut terminal = ratatui::try_init().map_err(cannot)?;
    let result = show(&mut terminal, &mut watch, &ended);
    ratatui::restore();
    result
}

/// Ends this process when its terminal is gone: a window closed, a connection lost. The library that reads its keys would read
/// on and on, at the cost of a core, and look at no flag meanwhile (crossterm 0.29); there is nothing to give back.
fn end_with_the_terminal() {
    let wait = || {
        let mut terminal = libc::pollfd { fd: libc::STDOUT_FILENO, events: 0, revents: 0 };
        // SAFETY: one entry, which outlives the call. No events are asked for, so that it returns for a hang-up, or a signal.
        while unsafe { libc::poll(&raw mut terminal, 1, -1) } <= 0 {}
        std::process::exit(exit_code::FAILED);
    };
    // Where no thread is to be had, it is ended by hand.
    drop(std::thread::Builder::new().spawn(wait));
}

/// What the user has chosen to see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct View {
    /// The first rank of the table.
    first_rank: usize,
    /// How far the curves are turned on.
    curve: usize,
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    watch: &mut Watch,
    ended: &AtomicBool,
) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| Failure::failed(format!("cannot use the terminal: {error}"));
    let mut view = View::default();
    loop {
        let snapshot = watch.look()?;
        let looked = Instant::now();
        loop {
            if ended.load(Ordering::Relaxed) {
                return Ok(());
            }
            let begun = Instant::now();
            terminal.draw(|frame| draw(snapshot, view, frame.area(), frame.buffer_mut())).map_err(cannot)?;
            let every = (REST * begun.elapsed()).clamp(LOOK_EVERY, LOOK_AT_LEAST_EVERY);
            let left = every.saturating_sub(looked.elapsed());
            if left.is_zero() || !event::poll(left).map_err(cannot)? {
                break;
            }
            if let Event::Key(key) = event::read().map_err(cannot)?
                && key.kind == KeyEventKind::Press
            {
                let last = snapshot.ranks.len().saturating_sub(1);
                match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Tab => view.curve += 1,
                    KeyCode::Down => view.first_rank = (view.first_rank + 1).min(last),
                    KeyCode::Up => view.first_rank = view.first_rank.saturating_sub(1),
                    KeyCode::PageDown => view.first_rank = (view.first_rank + 10).min(last),
                    KeyCode::PageUp => view.first_rank = view.first_rank.saturating_sub(10),
                    KeyCode::Home => view.first_rank = 0,
                    _ => {}
                }
            }
        }
    }
}

/// The snapshot as lines of text, as high as it needs to be.
fn plain(snapshot: &Snapshot, width: u16) -> String {
    let width = width.clamp(40, 400);
    let notes = snapshot.notes.len().clamp(1, 8) as u16 + failure(snapshot, width).len() as u16;
    let height = HEAD + 9 + (2 + snapshot.ranks.len().clamp(1, 2000) as u16) + (1 + notes);
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    sections(snapshot, View::default(), area, notes, &mut buffer);
    let mut text = String::new();
    for y in 0..area.height {
        let line: String = (0..area.width).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Lines above the curves.
const HEAD: u16 = 4;

/// Draws the whole screen; what does not fit is left out, least important first.
pub fn draw(snapshot: &Snapshot, view: View, area: Rect, buffer: &mut Buffer) {
    let [main, keys] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(area);
    let notes = match main.height {
        0..20 => 1,
        20..30 => 3,
        30..45 => 6,
        _ => 10,
    };
    let failure = failure(snapshot, main.width).len() as u16;
    let notes = (notes + failure.saturating_sub(1)).min(snapshot.notes.len().max(1) as u16 + failure);
    sections(snapshot, view, main, notes, buffer);
    Line::from(" q quit   tab other curves   ↑ ↓ ranks".dim()).render(keys, buffer);
}

fn sections(snapshot: &Snapshot, view: View, area: Rect, notes: u16, buffer: &mut Buffer) {
    let ranks = snapshot.ranks.len().max(1) as u16;
    let rest = area.height.saturating_sub(HEAD + 1 + notes);
    // Curves get at least six lines, or half of a low screen; ranks that do not fit can be scrolled to.
    let table = (2 + ranks).min(rest.saturating_sub(6).max(rest / 2));
    let [head, curves, table, events] = Layout::vertical([
        Constraint::Length(HEAD),
        Constraint::Min(0),
        Constraint::Length(table),
        Constraint::Length(1 + notes),
    ])
    .areas(area);
    draw_head(snapshot, head, buffer);
    draw_curves(snapshot, view.curve, curves, buffer);
    draw_ranks(snapshot, view.first_rank, table, buffer);
    draw_events(snapshot, events, buffer);
}

/// Lines of text into an area, cut where they do not fit.
fn lines(lines: Vec<Line<'_>>, area: Rect, buffer: &mut Buffer) {
    Paragraph::new(lines).render(area, buffer);
}

/// The heading of a section, with a rule to the right end.
fn heading(text: &str, more: Vec<Span<'static>>, width: u16) -> Line<'static> {
    let mut spans = vec![format!("── {text} ").dim()];
    spans.extend(more);
    let used: usize = spans.iter().map(Span::width).sum();
    spans.push("─".repeat(usize::from(width).saturating_sub(used)).dim());
    Line::from(spans)
}

fn state_of(snapshot: &Snapshot) -> (String, Color) {
    let Some(status) = &snapshot.status else { return ("no supervisor".into(), Color::Blue) };
    let text = status.state.to_string();
    let text = text.split(" (").next().unwrap_or_default().to_owned();
    let colour = match status.state {
        State::Running | State::Done => Color::Green,
        State::Starting | State::Stopping | State::Restarting | State::Preempted => Color::Yellow,
        State::Failed | State::Interrupted => Color::Red,
    };
    (text, colour)
}

fn draw_head(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let (state, colour) = state_of(snapshot);
    let mut title = vec![
        format!(" {} ", printable(&snapshot.name)).bold(),
        Span::styled(format!(" {state} "), Style::new().fg(Color::Black).bg(colour)),
    ];
    if let Some(status) = &snapshot.status {
        let plural =
            |count: u32, thing: &str| format!("{count} {thing}{}", if count == 1 { "" } else { "s" });
        title.push(format!("  {} on {}", plural(status.workers, "worker"), printable(&status.host)).into());
        let restarts = snapshot.metrics.restarts().len() as u32;
        if restarts > 0 {
            title.push("  ".into());
            title.push(plural(restarts, "restart").yellow());
        }
    }
    if let Some(seconds) = still_for(snapshot) {
        title.push(format!("  no step for {}", clock(Duration::from_secs_f64(seconds))).red());
    }
    let lines_of_head = vec![
        Line::from(title),
        progress(snapshot, area.width),
        numbers(snapshot, area.width),
        evaluation(snapshot),
    ];
    lines(lines_of_head, area, buffer);
}

/// How long a run that should go on has made no step, when that is too long.
fn still_for(snapshot: &Snapshot) -> Option<f64> {
    let status = snapshot.status.as_ref().filter(|status| status.state == State::Running)?;
    // These take as long as they take; a rank that hangs in one is the coordinator's to notice.
    let busy = |row: &RankRow| matches!(row.phase, Some(Phase::Eval | Phase::Checkpoint));
    if snapshot.ranks.values().any(busy) {
        return None;
    }
    let last = snapshot.metrics.train().next_back()?;
    // What was written before this start says nothing of it.
    let since = snapshot.now - snapshot.metrics.last_time()?.max(status.going_since);
    // With sparse logging, what the supervisor hears counts.
    let every =
        snapshot.metrics.train().rev().take(2).map(|line| line.step).reduce(|a, b| a - b).unwrap_or(1) as f64;
    (since > STILL && since > 10.0 * every * last.step_ms? / 1e3).then_some(since)
}

fn progress(snapshot: &Snapshot, width: u16) -> Line<'static> {
    let step = snapshot.step();
    let mut text = match snapshot.total_steps {
        Some(total) => format!(" {:5.1} %  step {step}/{total}", 100.0 * step as f64 / total.max(1) as f64),
        None => format!(" step {step}"),
    };
    if let (Some(last), Some(epochs)) = (snapshot.metrics.last_train(), snapshot.epochs) {
        let epoch = last.number("epoch").map_or(0, |epoch| epoch as u64 + 1);
        text.push_str(&format!("  epoch {epoch}/{epochs}"));
    }
    let duration = |seconds: f64| Duration::try_from_secs_f64(seconds).ok().map(clock);
    if let Some(elapsed) = snapshot.metrics.training_s().and_then(duration) {
        text.push_str(&format!("  {elapsed} so far"));
    }
    let left = snapshot.status.as_ref().filter(|_| snapshot.is_alive()).and_then(|status| status.eta_s);
    if let Some(left) = left.and_then(duration) {
        text.push_str(&format!("  {left} to go"));
    }
    let Some(total) = snapshot.total_steps else { return Line::from(text) };
    let room = usize::from(width).saturating_sub(text.chars().count() + 2).min(60);
    let done = ((step as f64 / total.max(1) as f64).min(1.0) * room as f64).round() as usize;
    Line::from(vec![" ".into(), "█".repeat(done).green(), "░".repeat(room - done).dim(), text.into()])
}

fn numbers(snapshot: &Snapshot, width: u16) -> Line<'static> {
    let Some(last) = snapshot.metrics.last_train() else { return Line::from(" no step yet".dim()) };
    let mut spans: Vec<Span<'static>> = vec![" ".into()];
    let mut add = |name: &str, key: &str, digits: usize, unit: &str| {
        if let Some(value) = last.number(key) {
            let text = if value != 0.0 && !(0.001..1e7).contains(&value.abs()) {
                format!("{value:.2e}")
            } else {
                format!("{value:.digits$}")
            };
            let value =
                if key == "z_std" && value < snapshot.collapsed_below { text.red() } else { text.bold() };
            let name = format!("{name}{}", if name.is_empty() { "" } else { " " });
            let more = [name.dim(), value, format!("{unit}  ").dim()];
            // What does not fit is left out whole.
            let used: usize = spans.iter().chain(&more).map(Span::width).sum();
            if used <= usize::from(width) + 2 {
                spans.extend(more);
            }
        }
    };
    add("loss", "loss", 4, "");
    add("z_std", "z_std", 3, "");
    add("lr", "lr", 4, "");
    add("tau", "tau", 4, "");
    add("", "images_per_s", 0, " images/s");
    add("", "step_ms", 1, " ms/step");
    add("grad", "grad_norm", 3, "");
    Line::from(spans)
}

fn evaluation(snapshot: &Snapshot) -> Line<'static> {
    let Some(eval) = snapshot.metrics.eval_to_show(u64::MAX) else {
        return Line::from(" kNN not evaluated yet".dim());
    };
    let mut spans = vec![" kNN ".dim()];
    let percent = |key: &str| eval.number(key).map(|value| format!("{value:.1}"));
    spans.push(format!("{} %", percent("knn_top1").unwrap_or("–".into())).bold());
    spans.push(format!(" at step {}", eval.step).dim());
    if let Some(data) = eval.text("data") {
        // The end of a path says more than its beginning, and the floors want room too.
        let data = printable(data);
        let cut = data.chars().count().saturating_sub(MOST_OF_DATA);
        let end: String = data.chars().skip(if cut > 0 { cut + 1 } else { 0 }).collect();
        spans.push(format!(" on {}{end}", if cut > 0 { "…" } else { "" }).yellow());
    }
    for (name, key) in
        [("random init", "knn_random_init"), ("raw pixels", "knn_raw_pixels"), ("linear", "linear_top1")]
    {
        if let Some(value) = percent(key) {
            spans.push(format!("  {name} {value}").into());
        }
    }
    Line::from(spans)
}

type Number = fn(&Step) -> Option<f64>;
/// Lowest and highest value that an axis must reach.
type Include = Option<(f64, f64)>;

/// Name, number, values the axis must reach.
const CURVES: [(&str, Number, Include); 6] = [
    ("loss", |line| line.loss, None),
    ("z_std", |line| line.z_std, Some((0.0, 1.0))),
    ("images/s", |line| line.images_per_s, Some((0.0, 0.0))),
    ("learning rate", |line| line.lr, Some((0.0, 0.0))),
    ("tau", |line| line.tau, None),
    ("gradient norm", |line| line.grad_norm, None),
];

fn draw_curves(snapshot: &Snapshot, turned: usize, area: Rect, buffer: &mut Buffer) {
    if area.height < 3 {
        return;
    }
    let count = match area.width {
        0..60 => 1,
        60..115 => 2,
        115..155 => 3,
        _ => 4,
    };
    let columns = Layout::horizontal(vec![Constraint::Ratio(1, count); count as usize]).split(area);
    for (index, column) in columns.iter().enumerate() {
        let (name, number, include) = CURVES[(index + turned * columns.len()) % CURVES.len()];
        draw_curve(&snapshot.metrics, name, number, include, *column, buffer);
    }
}

fn draw_curve(
    metrics: &Metrics,
    name: &str,
    number: Number,
    include: Include,
    area: Rect,
    buffer: &mut Buffer,
) {
    let mut points =
        metrics.train().filter_map(|line| Some((line.step as f64, number(line).filter(|v| v.is_finite())?)));
    let title = heading(name, Vec::new(), area.width.saturating_sub(1));
    // Braille has two points a column.
    let thinned = curve::thin(points.clone(), 2 * usize::from(area.width).max(2));
    let values =
        thinned.iter().map(|point| point.1).chain(include.into_iter().flat_map(|(low, high)| [low, high]));
    let ends = points.clone().next().zip(points.next_back());
    let (Some((first, last)), Some((low, high))) =
        (ends.map(|(first, last)| (first.0, last.0)), curve::range(values))
    else {
        lines(vec![title, Line::from(" nothing yet".dim())], area, buffer);
        return;
    };
    let margin = if low == high { 0.05 * high.abs().max(1e-3) } else { 0.0 };
    let (low, high) = (low - margin, high + margin);
    let middle = (low + high) / 2.0;
    let digits = curve::decimals((high - low) / 20.0);
    let last = if first == last { curve::around(last, 1.0).1 } else { last };
    let restarts: Vec<[(f64, f64); 2]> =
        metrics.restarts().iter().map(|line| [(line.step as f64, low), (line.step as f64, high)]).collect();
    let mut sets: Vec<Dataset<'_>> = restarts
        .iter()
        .map(|line| {
            Dataset::default()
                .marker(Marker::Dot)
                .graph_type(GraphType::Line)
                .style(Style::new().red())
                .data(line)
        })
        .collect();
    let graph = if thinned.len() == 1 { GraphType::Scatter } else { GraphType::Line };
    sets.push(
        Dataset::default()
            .marker(Marker::Braille)
            .graph_type(graph)
            .style(Style::new().cyan())
            .data(&thinned),
    );
    let labels = [low, middle, high].map(|value| curve::number(value, digits));
    Chart::new(sets)
        .block(Block::new().title(title))
        .x_axis(
            Axis::default()
                .bounds([first, last])
                .labels([curve::number(first, 0), curve::number(last, 0)])
                .style(Style::new().dim()),
        )
        .y_axis(Axis::default().bounds([low, high]).labels(labels).style(Style::new().dim()))
        .render(area, buffer);
}

fn draw_ranks(snapshot: &Snapshot, first: usize, area: Rect, buffer: &mut Buffer) {
    if area.height < 2 {
        return;
    }
    let slow = snapshot.stragglers();
    let mut more = Vec::new();
    if let Some(worst) = slow.first() {
        more.push(format!("{worst}").yellow());
        if slow.len() > 1 {
            more.push(format!(" (and {} more)", slow.len() - 1).yellow());
        }
        more.push(" ".into());
    }
    // The names of the columns go before the last rank does.
    let named = area.height > 2;
    let rows = usize::from(area.height - 1) - usize::from(named);
    let count = snapshot.ranks.len();
    let first = first.min(count.saturating_sub(rows));
    let title = if count > rows {
        format!("ranks {first} to {} of {count}", (first + rows).saturating_sub(1))
    } else {
        "ranks".into()
    };
    let mut text = vec![heading(&title, more, area.width)];
    if count == 0 {
        text.push(Line::from(" nothing is known of them yet".dim()));
        lines(text, area, buffer);
        return;
    }
    let header = format!(
        " {:>4} {:<10} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>6} {:>6}  {}",
        "rank", "phase", "step", "ms/step", "data", "forward", "backw.", "comm.", "update", "MiB", "host"
    );
    if named {
        text.push(Line::from(header.dim()));
    }
    for (rank, row) in snapshot.ranks.iter().skip(first).take(rows) {
        let style =
            if slow.iter().any(|slow| slow.rank == *rank) { Style::new().yellow() } else { Style::new() };
        text.push(Line::styled(rank_line(*rank, row, snapshot.is_alive()), style));
    }
    lines(text, area, buffer);
}

fn rank_line(rank: u32, row: &RankRow, alive: bool) -> String {
    let ms = |value: Option<f64>| match value {
        Some(value) if value < 1e4 => format!("{value:.1}"),
        Some(value) => format!("{value:.0}"),
        None => "–".into(),
    };
    let part = |part: fn(&mentee_cluster::StepTimes) -> f64| ms(row.times.as_ref().map(part));
    // What a rank did when the run ended is history, unless it had come to its end.
    let phase = match row.phase {
        Some(Phase::Done) => "done".to_owned(),
        Some(phase) if alive => phase.to_string(),
        Some(phase) => format!("({phase})"),
        None => "–".into(),
    };
    format!(
        " {rank:>4} {phase:<10} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>6} {:>6}  {}",
        row.step,
        ms(row.step_ms),
        part(|times| times.data_wait_ms),
        part(|times| times.forward_ms),
        part(|times| times.backward_ms),
        part(|times| times.comm_ms),
        part(|times| times.update_ms),
        row.rss_mb.map_or("–".into(), |mb| format!("{mb:.0}")),
        printable(row.host.as_deref().unwrap_or_default()),
    )
}

fn draw_events(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    if area.height < 2 {
        return;
    }
    let mut text = vec![heading("events, UTC", Vec::new(), area.width)];
    let room = usize::from(area.height - 1);
    // How it ended is the most important.
    let mut shown: Vec<Line<'_>> =
        failure(snapshot, area.width).into_iter().map(|line| Line::from(line.red())).collect();
    shown.truncate(room);
    let newest = snapshot.notes.iter().rev().take(room.saturating_sub(shown.len()));
    let events: Vec<Line<'_>> = newest
        .map(|note| {
            let line = format!(" {} {}", when(note.time, snapshot.now), printable(&note.text));
            match note.level {
                Level::Error => Line::from(line.red()),
                Level::Warn => Line::from(line.yellow()),
                _ => Line::from(line),
            }
        })
        .collect();
    text.extend(events.into_iter().rev());
    text.extend(shown);
    if text.len() == 1 {
        text.push(Line::from(" none".dim()));
    }
    lines(text, area, buffer);
}

/// Why it failed, and what to do, cut into lines; none of a run that did not.
fn failure(snapshot: &Snapshot, width: u16) -> Vec<String> {
    let Some(error) = snapshot.status.as_ref().and_then(|status| status.error.as_ref()) else {
        return Vec::new();
    };
    let mut lines = vec![" failed:".to_owned()];
    for word in printable(error).split(' ') {
        let last = lines.last_mut().expect("one to begin with");
        if last.chars().count() + 1 + word.chars().count() <= usize::from(width) {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(format!("   {word}"));
        }
    }
    lines.truncate(MOST_OF_FAILURE);
    lines
}

/// The time of day, as in the logs; the day too, unless it is that of `now`. Seconds since 1970, UTC.
fn when(time: f64, now: f64) -> String {
    let seconds = time.max(0.0) as u64;
    let of_day = format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    if (time / 86_400.0).floor() == (now / 86_400.0).floor() {
        return of_day;
    }
    let (_, month, day) = logs::date(time);
    format!("{month:02}-{day:02} {of_day}")
}

#[cfg(test)]
mod tests {
    use mentee_cluster::StepTimes;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::snapshot::Note;
    use crate::status::Status;

    /// A run of four ranks in the middle, one of them slow.
    fn snapshot() -> Snapshot {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut text = String::new();
        for step in 1..=450u32 {
            text.push_str(&format!(
                "{{\"kind\":\"train\",\"step\":{step},\"epoch\":{},\"time\":{},\"loss\":{},\"lr\":0.25,\"tau\":0.9931,\
                 \"grad_norm\":1.5,\"z_std\":0.93,\"images_per_s\":580.4,\"step_ms\":441.2,\"world_size\":4}}\n",
                step / 50,
                1000.0 + f64::from(step) * 0.44,
                2.0 / f64::from(step).sqrt(),
            ));
        }
        text.push_str(
            "{\"kind\":\"restart\",\"step\":200,\"time\":1090,\"generation\":1,\"reason\":\"rank 1 died\"}\n",
        );
        text.push_str(
            "{\"kind\":\"eval\",\"step\":400,\"time\":1180,\"knn_top1\":41.6,\"knn_random_init\":27.0,\"knn_raw_pixels\":35.8}\n",
        );
        std::fs::write(&path, text).expect("written");
        let times = |data_wait_ms| StepTimes {
            data_wait_ms,
            forward_ms: 150.5,
            backward_ms: 230.0,
            comm_ms: 60.0 - data_wait_ms / 3.0,
            update_ms: 8.0,
        };
        let mut status = Status::new("byol", 4);
        (status.state, status.host) = (State::Running, "node1".into());
        (status.progress.total_steps, status.progress.step, status.eta_s) = (1000, 450, Some(242.0));
        let ranks = (0..4).map(|rank| {
            let row = RankRow {
                host: Some("node1".into()),
                phase: Some(Phase::Backward),
                step: 450,
                step_ms: Some(441.2),
                times: Some(times(if rank == 2 { 180.0 } else { 0.5 })),
                rss_mb: Some(812.0),
            };
            (rank, row)
        });
        Snapshot {
            name: "byol".into(),
            now: 1198.5,
            status: Some(status),
            metrics: Metrics::read(&path).expect("read"),
            total_steps: Some(1000),
            epochs: Some(20),
            collapsed_below: 0.1,
            ranks: ranks.collect(),
            notes: vec![Note {
                time: 1090.0,
                level: Level::Warn,
                text: "restart from step 200: rank 1 died".into(),
            }],
        }
    }

    fn screen(snapshot: &Snapshot, view: View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| draw(snapshot, view, frame.area(), frame.buffer_mut())).expect("drawn");
        terminal.backend().to_string()
    }

    #[test]
    fn everything_is_on_80_by_24() {
        let text = screen(&snapshot(), View::default(), 80, 24);
        for part in [
            "byol",
            "running",
            "4 workers",
            "1 restart",
            "45.0 %",
            "step 450/1000",
            "epoch 10/20",
            "3:17 so far",
            "4:02 to go",
            "loss 0.0943",
            "z_std 0.930",
            "lr 0.2500",
            "tau 0.9931",
            "580 images/s",
            "kNN 41.6 %",
            "random init 27.0",
            "rank 2 is slow",
            "waiting for data",
            "backward",
            "812",
            "rank 1 died",
            "00:18:10",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "no curve in\n{text}");
        for rank in 0..4 {
            assert!(
                text.lines().any(|line| line.trim_matches('"').starts_with(&format!("    {rank} backward"))),
                "{rank}\n{text}"
            );
        }
    }

    #[test]
    fn any_size_can_be_drawn() {
        let (full, empty) = (snapshot(), Snapshot::default());
        for (width, height) in [(1, 1), (10, 3), (40, 10), (80, 24), (132, 43), (160, 45), (300, 100)] {
            for turned in 0..3 {
                let view = View { first_rank: 3, curve: turned };
                screen(&full, view, width, height);
                screen(&empty, view, width, height);
            }
        }
        assert!(
            screen(&full, View::default(), 160, 45).contains("images/s ─"),
            "more curves on a wide screen"
        );
        assert!(screen(&full, View { curve: 1, first_rank: 0 }, 80, 24).contains("learning rate"));
    }

    #[test]
    fn ranks_that_do_not_fit_can_be_scrolled_to() {
        let mut many = snapshot();
        let row = many.ranks[&0].clone();
        many.ranks = (0..64).map(|rank| (rank, row.clone())).collect();
        let text = screen(&many, View { first_rank: 60, curve: 0 }, 80, 24);
        assert!(text.contains("of 64") && text.contains("   63 backward"), "{text}");
    }

    #[test]
    fn a_failed_run_says_why_and_a_plain_snapshot_shows_every_rank() {
        let mut failed = snapshot();
        if let Some(status) = &mut failed.status {
            status.state = State::Failed;
            status.error = Some("rank 1 on node1 at step 9 (forward): gone".into());
        }
        let text = plain(&failed, 80);
        assert!(text.contains("failed: rank 1 on node1 at step 9"), "{text}");
        assert!(text.contains("(backward)") && !text.contains("to go") && !text.contains('\u{1b}'), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn what_to_do_about_a_failure_is_not_cut_off() {
        let mut failed = snapshot();
        let why = "after step 1: the loss on rank 0 is not finite, no rank was updated; lower optimizer.base_lr, or \
                   lengthen schedule.warmup_epochs";
        if let Some(status) = &mut failed.status {
            (status.state, status.error) = (State::Failed, Some(why.into()));
        }
        for text in [plain(&failed, 80), screen(&failed, View::default(), 80, 24)] {
            let words: Vec<&str> = text.split(['"', ' ', '\n']).filter(|word| !word.is_empty()).collect();
            assert!(words.join(" ").contains(why), "{text}");
        }
        assert!(failure(&failed, 20).iter().all(|line| line.chars().count() <= 27), "a long word has a line");
        assert_eq!(failure(&snapshot(), 80), Vec::<String>::new());
    }

    #[test]
    fn a_low_screen_shows_a_rank_rather_than_names_of_columns() {
        let text = screen(&snapshot(), View::default(), 80, 12);
        assert!(text.contains("ranks 0 to 0 of 4") && text.contains("    0 backward"), "{text}");
    }

    #[test]
    fn numbers_of_a_run_that_diverges_leave_room_for_others() {
        let mut diverges = snapshot();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let line =
            "{\"kind\":\"train\",\"step\":1,\"loss\":3.9,\"lr\":6.25e28,\"tau\":0.99,\"grad_norm\":5e22}\n";
        std::fs::write(&path, line).expect("written");
        diverges.metrics = Metrics::read(&path).expect("read");
        let text = plain(&diverges, 80);
        assert!(text.contains("lr 6.25e28  tau 0.9900") && text.contains("grad 5.00e22"), "{text}");
    }

    #[test]
    fn an_event_of_another_day_has_its_date() {
        let day = 86_400.0;
        assert_eq!(when(20_785.0 * day + 3723.0, 20_786.0 * day - 1.0), "01:02:03");
        assert_eq!(when(20_785.0 * day + 3723.0, 20_786.0 * day), "11-28 01:02:03");
    }

    #[test]
    fn an_evaluation_on_other_data_is_named_and_control_characters_are_told() {
        let mut other = snapshot();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let line = "{\"kind\":\"eval\",\"step\":500,\"knn_top1\":71.5,\"knn_raw_pixels\":33.3,\"data\":\"/far/away/on/another/disk/photos\"}\n";
        std::fs::write(&path, line).expect("written");
        other.metrics = Metrics::read(&path).expect("read");
        other.name = "a\x1b[31mb\u{9b}2J".into();
        let text = plain(&other, 80);
        assert!(
            text.contains("kNN 71.5 % at step 500 on …/on/another/disk/photos  raw pixels 33.3"),
            "{text}"
        );
        assert!(text.contains("a\\x1b[31mb\\x9b2J"), "{text}");
    }

    #[test]
    fn standing_still_is_said() {
        let mut still = snapshot();
        assert_eq!(still_for(&still), None);
        still.now += 100.0;
        assert!(screen(&still, View::default(), 80, 24).contains("no step for 1:40"));
        // One rank evaluates, the others wait for it.
        still.ranks.entry(0).or_default().phase = Some(Phase::Eval);
        assert_eq!(still_for(&still), None);
        still.ranks.entry(0).or_default().phase = Some(Phase::DataWait);
        // Resumed after a day.
        still.now += 86_400.0;
        still.status.as_mut().expect("one").going_since = still.now - 10.0;
        assert_eq!(still_for(&still), None);
        still.now += 50.0;
        assert_eq!(still_for(&still), Some(60.0));
    }
}
