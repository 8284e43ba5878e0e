//! `mentee report`: one page that needs nothing but itself. Curves are SVG drawn here, the example views are embedded,
//! colours follow the reader's light or dark setting, and it reads on a phone. Several runs go into one page, their
//! curves over each other.

mod chart;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use mentee_checkpoint::{self as checkpoint, Manifest};
use mentee_cluster::StepTimes;

use self::chart::{COLOURS, Chart, Mark, MarkKind, Series};
use crate::curve::Points;
use crate::failure::Failure;
use crate::metrics::{Line, Metrics, Step};
use crate::progress::clock;
use crate::rundir::{RunDir, write_atomically};
use crate::snapshot::{self, Part};
use crate::status::{State, Status};

const STYLE: &str = include_str!("style.css");
/// Checkpoints that are marked on the curves; of more, the newest.
const MARKED_CHECKPOINTS: usize = 40;
/// Ranks whose time is drawn; of more, the slowest.
const DRAWN_RANKS: usize = 16;

/// `mentee report`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee report runs/try-3
  mentee report runs/try-3 runs/try-4 --out compared.html")]
pub struct ReportArgs {
    /// Run directories; several are compared on one page
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The page [default: RUN/report.html; of several runs: report.html here]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// `mentee report RUN... [--out FILE.html]`.
///
/// # Errors
/// When there is no run, or the page cannot be written.
pub fn command(args: &ReportArgs) -> Result<(), Failure> {
    let runs: Vec<RunDir> = args.runs.iter().map(|path| RunDir::existing(path)).collect::<Result<_, _>>()?;
    let page = render(&runs)?;
    let default = match &runs[..] {
        [run] => run.report(),
        _ => "report.html".into(),
    };
    let out = args.out.as_deref().unwrap_or(&default);
    write_atomically(out, page.as_bytes()).map_err(|error| Failure::io("write", out, &error))?;
    println!("{}", out.display());
    Ok(())
}

/// The page of one run, where it belongs.
///
/// # Errors
/// When it cannot be written.
pub fn write(dir: &RunDir) -> Result<(), Failure> {
    let page = render(std::slice::from_ref(dir))?;
    write_atomically(&dir.report(), page.as_bytes())
        .map_err(|error| Failure::io("write", &dir.report(), &error))
}

/// What a page says of one run.
struct Run {
    /// Its name, made unique among the runs of the page.
    label: String,
    colour: usize,
    metrics: Metrics,
    status: Option<Status>,
    plan: String,
    views: Option<Vec<u8>>,
    checkpoints: Vec<u64>,
    newest: Option<Manifest>,
    times: BTreeMap<u32, StepTimes>,
}

impl Run {
    fn read(dir: &RunDir) -> Result<Run, Failure> {
        let status = Status::read(dir);
        let checkpoints = checkpoint::list(&dir.checkpoints()).unwrap_or_default();
        let label = status.as_ref().map_or_else(|| folder_name(dir), |status| status.name.clone());
        Ok(Run {
            label,
            colour: 0,
            metrics: Metrics::read(&dir.metrics())?,
            status,
            plan: std::fs::read_to_string(dir.plan()).unwrap_or_default(),
            views: std::fs::read(dir.views()).ok(),
            checkpoints: checkpoints
                .iter()
                .filter(|entry| entry.state.is_ok())
                .map(|entry| entry.step)
                .collect(),
            newest: checkpoints.into_iter().rev().find_map(|entry| entry.state.ok()),
            times: snapshot::times_by_rank(dir)?,
        })
    }

    fn series(&self, number: fn(&Step) -> Option<f64>) -> Series {
        let points =
            self.metrics.train().filter_map(|line| Some((line.step as f64, number(line)?))).collect();
        Series::new(&self.label, points).coloured(self.colour)
    }

    fn evals(&self, key: &str) -> Points {
        self.metrics.eval().filter_map(|line| Some((line.step as f64, line.number(key)?))).collect()
    }

    fn marks(&self) -> Vec<Mark> {
        let mark = |step: u64, kind, title| Mark { at: step as f64, kind, title };
        let newest = self.checkpoints.iter().rev().take(MARKED_CHECKPOINTS);
        let checkpoints = newest
            .map(|&step| mark(step, MarkKind::Checkpoint, format!("step {step}: a checkpoint that is kept")));
        let restarts = self.metrics.restarts().iter().map(|line| {
            let why = line.text("reason").unwrap_or("unknown");
            mark(line.step, MarkKind::Restart, format!("restart from step {}: {why}", line.step))
        });
        let worlds = self.metrics.world_changes().into_iter().map(|(step, from, to)| {
            mark(step, MarkKind::World, format!("step {step}: {from} ranks before, {to} from here on"))
        });
        checkpoints.chain(restarts).chain(worlds).collect()
    }
}

fn folder_name(dir: &RunDir) -> String {
    dir.path().file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned())
}

/// The page of one run or several.
///
/// # Errors
/// When a run cannot be read.
pub fn render(dirs: &[RunDir]) -> Result<String, Failure> {
    let mut runs: Vec<Run> = dirs.iter().map(Run::read).collect::<Result<_, _>>()?;
    // Runs of one recipe are told apart by their folders.
    let names: Vec<String> = runs.iter().map(|run| run.label.clone()).collect();
    for (index, (run, dir)) in runs.iter_mut().zip(dirs).enumerate() {
        run.colour = index % COLOURS;
        if names.iter().filter(|name| **name == run.label).count() > 1 {
            run.label = folder_name(dir);
        }
    }
    let title = match &runs[..] {
        [run] => run.label.clone(),
        _ => format!("{} runs", runs.len()),
    };
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title} · mentee</title>\n\
         <style>{STYLE}</style></head><body><main>\n<h1>{title}</h1>\n",
        title = escape(&title)
    );
    if let [run] = &runs[..] {
        summary(&mut page, run);
        evaluation(&mut page, run);
        curves(&mut page, &runs);
        details(&mut page, run);
    } else {
        comparison(&mut page, &runs);
        curves(&mut page, &runs);
        differences(&mut page, &runs);
        for run in &runs {
            let _ = writeln!(page, "<details class=\"run\"><summary>{}</summary>", escape(&run.label));
            summary(&mut page, run);
            evaluation(&mut page, run);
            details(&mut page, run);
            let _ = writeln!(page, "</details>");
        }
    }
    let _ = write!(
        page,
        "<p class=\"note\">Page by mentee {}.</p>\n</main></body></html>\n",
        env!("CARGO_PKG_VERSION")
    );
    Ok(page)
}

fn summary(page: &mut String, run: &Run) {
    let (metrics, status) = (&run.metrics, run.status.as_ref());
    let mut chips: Vec<(String, &str)> = Vec::new();
    if let Some(status) = status {
        let kind = match status.state {
            State::Done => "good",
            State::Failed => "bad",
            _ => "",
        };
        chips.push((status.state.to_string(), kind));
        chips.push((format!("{} worker{}", status.workers, if status.workers == 1 { "" } else { "s" }), ""));
    }
    if let Some(last) = metrics.last_train() {
        chips.push((format!("step {}", last.step), ""));
        let mut number = |name: &str, key: &str, digits: usize| {
            if let Some(value) = last.number(key) {
                chips.push((format!("{name} {value:.digits$}"), ""));
            }
        };
        number("loss", "loss", 4);
        number("z_std", "z_std", 2);
    }
    if let Some(rate) = metrics.median(|line| line.images_per_s) {
        chips.push((format!("{rate:.0} images/s (median)"), ""));
    }
    if let Some(time) = elapsed(metrics) {
        chips.push((format!("{} of training", clock(time)), ""));
    }
    if !metrics.restarts().is_empty() {
        let count = metrics.restarts().len();
        chips.push((format!("{count} restart{}", if count == 1 { "" } else { "s" }), ""));
    }
    let _ = writeln!(page, "<p class=\"chips\">");
    for (text, kind) in chips {
        let _ = writeln!(page, "<span class=\"{kind}\">{}</span>", escape(&text));
    }
    let _ = writeln!(page, "</p>");
    if let Some(error) = status.and_then(|status| status.error.as_ref()) {
        let _ = writeln!(page, "<p class=\"error\">error: {}</p>", escape(error));
    }
}

fn elapsed(metrics: &Metrics) -> Option<Duration> {
    Duration::try_from_secs_f64(metrics.training_s()?).ok()
}

/// Columns of the table of evaluations that a run has: those every run knows, then whatever else is an accuracy.
fn accuracies(metrics: &Metrics) -> Vec<(String, String)> {
    let known = [
        ("knn_top1", "kNN, trained"),
        ("knn_random_init", "kNN, random init"),
        ("knn_raw_pixels", "kNN, raw pixels"),
        ("linear_top1", "linear"),
    ];
    let mut columns: Vec<(String, String)> =
        known.iter().map(|(key, name)| ((*key).to_owned(), (*name).to_owned())).collect();
    for line in metrics.eval() {
        for (key, value) in &line.object {
            if value.is_number() && key.contains("top") && !columns.iter().any(|(known, _)| known == key) {
                columns.push((key.clone(), key.replace('_', " ")));
            }
        }
    }
    columns.retain(|(key, _)| metrics.eval().any(|line| line.number(key).is_some()));
    columns
}

fn evaluation(page: &mut String, run: &Run) {
    let Some(last) = run.metrics.last_eval() else { return };
    let columns = accuracies(&run.metrics);
    let _ = write!(page, "<h2>Evaluation</h2>\n<table>\n<tr><th>step</th>");
    for (_, name) in &columns {
        let _ = write!(page, "<th>{}</th>", escape(name));
    }
    let _ = writeln!(page, "</tr>");
    for line in run.metrics.eval() {
        let _ = write!(page, "<tr><td>{}</td>", line.step);
        for (key, _) in &columns {
            let _ = write!(page, "<td>{}</td>", percent(line, key));
        }
        let _ = writeln!(page, "</tr>");
    }
    let _ = writeln!(page, "</table>");
    let protocols = last.object.iter().filter(|(key, _)| key.contains("protocol"));
    for (key, text) in protocols.filter_map(|(key, value)| Some((key, value.as_str()?))) {
        let _ = writeln!(page, "<p class=\"note\">{}: {}</p>", escape(&key.replace('_', " ")), escape(text));
    }
    let _ = writeln!(
        page,
        "<p class=\"note\">Top-1 accuracy in percent. Random init and raw pixels are the floors: what the same vote gets \
         right without any training.</p>"
    );
}

fn percent(line: &Line, key: &str) -> String {
    line.number(key).map_or("–".into(), |value| format!("{value:.1} %"))
}

/// One row a run.
fn comparison(page: &mut String, runs: &[Run]) {
    let _ = writeln!(
        page,
        "<table>\n<tr><th>run</th><th>state</th><th>steps</th><th>loss</th><th>z_std</th><th>kNN</th><th>random init</th>\
         <th>linear</th><th>images/s</th><th>workers</th><th>time</th><th>restarts</th></tr>"
    );
    for run in runs {
        let (metrics, status) = (&run.metrics, run.status.as_ref());
        let last = |key: &str, digits: usize| {
            let value = metrics.last_train().and_then(|line| line.number(key));
            value.map_or("–".into(), |value| format!("{value:.digits$}"))
        };
        let eval = |key: &str| metrics.last_eval().map_or("–".into(), |line| percent(line, key));
        let cells = [
            status.map_or("–", |status| status.state.word()).to_owned(),
            metrics.last_train().map_or("–".into(), |line| line.step.to_string()),
            last("loss", 4),
            last("z_std", 2),
            eval("knn_top1"),
            eval("knn_random_init"),
            eval("linear_top1"),
            metrics.median(|line| line.images_per_s).map_or("–".into(), |rate| format!("{rate:.0}")),
            last("world_size", 0),
            elapsed(metrics).map_or("–".into(), clock),
            metrics.restarts().len().to_string(),
        ];
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        let _ = writeln!(
            page,
            "<tr><td><i class=\"key c{}\"></i>{}</td>{cells}</tr>",
            run.colour,
            escape(&run.label)
        );
    }
    let _ = writeln!(page, "</table>");
}

fn curves(page: &mut String, runs: &[Run]) {
    let alone = runs.len() == 1;
    let each =
        |number: fn(&Step) -> Option<f64>| runs.iter().map(|run| run.series(number)).collect::<Vec<_>>();
    let knn: Vec<Series> = match runs {
        [run] => vec![
            Series::new("trained", run.evals("knn_top1")),
            Series::new("random init", run.evals("knn_random_init")).coloured(1).dashed(),
            Series::new("raw pixels", run.evals("knn_raw_pixels")).coloured(2).dashed(),
            Series::new("linear", run.evals("linear_top1")).coloured(3),
        ],
        _ => runs
            .iter()
            .map(|run| Series::new(&run.label, run.evals("knn_top1")).coloured(run.colour))
            .collect(),
    };
    let chart = |title: &str, series: Vec<Series>| Chart { legend: false, ..Chart::new(title, series) };
    let all = [
        Chart { smooth: true, ..chart("Loss", each(|line| line.loss)) },
        Chart { legend: alone, ..chart("kNN top-1, percent", knn) },
        Chart {
            include: Some([0.0, 1.0]),
            ..chart("z_std: 1 healthy, 0 collapsed", each(|line| line.z_std))
        },
        chart("Learning rate", each(|line| line.lr)),
        chart("Teacher momentum tau", each(|line| line.tau)),
        Chart { smooth: true, ..chart("Gradient norm", each(|line| line.grad_norm)) },
        Chart {
            include: Some([0.0, 0.0]),
            smooth: true,
            ..chart("Images a second", each(|line| line.images_per_s))
        },
        spectra(runs),
    ];
    let marks: Vec<Mark> = match runs {
        [run] => run.marks(),
        // Whose they are could not be told; every run's own section lists them.
        _ => Vec::new(),
    };
    let _ = writeln!(page, "<h2>Curves</h2>");
    if !alone {
        chart::legend(page, &each(|line| line.loss.or(line.time)));
    }
    let _ = writeln!(page, "<div class=\"charts\">");
    for chart in all {
        let marks: &[Mark] = if chart.log { &[] } else { &marks };
        chart.draw(page, marks);
    }
    let _ = writeln!(page, "</div>\n<p class=\"legend\"><span>Over steps.</span>");
    let kinds = [
        (MarkKind::Restart, "restart", "restart"),
        (MarkKind::World, "world", "another number of ranks"),
        (MarkKind::Checkpoint, "saved", "checkpoint that is kept"),
    ];
    for (kind, class, text) in kinds {
        if marks.iter().any(|mark| mark.kind == kind) {
            let _ = writeln!(page, "<span><i class=\"key {class}\"></i>{text}</span>");
        }
    }
    let _ = writeln!(page, "</p>");
}

/// Singular values of the features, largest first: of one run at its first and last evaluation, of several at the last.
fn spectra(runs: &[Run]) -> Chart {
    let series = |name: &str, line: &Line| {
        let points = line.numbers("spectrum").into_iter().zip(1u32..);
        let points: Points = points
            .filter(|(value, _)| *value > 0.0)
            .map(|(value, at)| (f64::from(at), value.log10().max(-9.0)))
            .collect();
        Series::new(name, points)
    };
    let with_spectrum = |run: &Run| -> Vec<Line> {
        run.metrics.eval().filter(|line| !line.numbers("spectrum").is_empty()).cloned().collect()
    };
    let mut lines: Vec<Series> = Vec::new();
    let mut title = "Singular values of the features, by place".to_owned();
    if let [run] = runs {
        let evals = with_spectrum(run);
        if let (Some(first), Some(last)) = (evals.first(), evals.last()) {
            lines.push(series(&format!("at step {}", last.step), last));
            if first.step != last.step {
                lines.push(series(&format!("at step {}", first.step), first).coloured(2).dashed());
            }
            let values = last.numbers("spectrum");
            let _ = write!(title, "; effective rank {:.0} of {}", effective_rank(&values), values.len());
        }
    } else {
        for run in runs {
            let evals = with_spectrum(run);
            lines.extend(evals.last().map(|last| series(&run.label, last).coloured(run.colour)));
        }
    }
    Chart { log: true, legend: runs.len() == 1, ..Chart::new(&title, lines) }
}

/// The exponential of the entropy of the singular values, taken as shares of their sum (Roy and Vetterli, 2007).
fn effective_rank(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let entropy: f64 = values
        .iter()
        .map(|value| value / sum)
        .filter(|share| *share > 0.0)
        .map(|share| -share * share.ln())
        .sum();
    entropy.exp()
}

/// Where a step's time goes: names and classes.
const PARTS: [(&str, Part); 5] = [
    ("waiting for data", |times| times.data_wait_ms),
    ("forward", |times| times.forward_ms),
    ("backward", |times| times.backward_ms),
    ("other ranks", |times| times.comm_ms),
    ("update", |times| times.update_ms),
];

fn time_per_rank(page: &mut String, run: &Run) {
    if run.times.is_empty() {
        return;
    }
    let mut ranks: Vec<(&u32, &StepTimes)> = run.times.iter().collect();
    ranks.sort_by(|a, b| b.1.own_ms().total_cmp(&a.1.own_ms()));
    ranks.truncate(DRAWN_RANKS);
    ranks.sort_by_key(|(rank, _)| **rank);
    let whole = |times: &StepTimes| times.own_ms() + times.comm_ms;
    let longest = ranks.iter().map(|(_, times)| whole(times)).fold(0.0, f64::max);
    let _ = writeln!(page, "<h2>Where time went</h2>\n<div class=\"ranks\">");
    for (rank, times) in &ranks {
        let _ = write!(page, "<span>rank {rank}</span><span class=\"bar\">");
        for (index, (name, part)) in PARTS.iter().enumerate() {
            let share = 100.0 * part(times) / longest.max(1e-9);
            let _ = write!(
                page,
                "<i class=\"t{index}\" style=\"width:{share:.2}%\" title=\"{name}: {:.1} ms\"></i>",
                part(times)
            );
        }
        let _ = writeln!(page, "</span><span>{:.1} ms</span>", whole(times));
    }
    let _ = writeln!(page, "</div>\n<p class=\"legend\">");
    for (index, (name, _)) in PARTS.iter().enumerate() {
        let _ = write!(page, "<span><i class=\"box t{index}\"></i>{name}</span>");
    }
    let _ = write!(page, "</p>\n<table>\n<tr><th>ms a step</th>");
    for (name, _) in PARTS {
        let _ = write!(page, "<th>{name}</th>");
    }
    let _ = writeln!(page, "</tr>");
    for (rank, times) in &ranks {
        let cells: String = PARTS.iter().map(|(_, part)| format!("<td>{:.1}</td>", part(times))).collect();
        let _ = writeln!(page, "<tr><td>rank {rank}</td>{cells}</tr>");
    }
    let more = run.times.len().saturating_sub(ranks.len());
    let more = if more > 0 {
        format!(" The {DRAWN_RANKS} slowest of {} ranks.", run.times.len())
    } else {
        String::new()
    };
    let _ = writeln!(
        page,
        "</table>\n<p class=\"note\">Means over the run. Other ranks: exchanging gradients and statistics, and waiting for \
         whoever is slower.{more}</p>"
    );
}

/// Everything about one run but its curves.
fn details(page: &mut String, run: &Run) {
    time_per_rank(page, run);
    if let Some(png) = &run.views {
        let _ = write!(
            page,
            "<h2>Example views</h2>\n<p>What the student and the teacher see: both views of a few training images.</p>\n\
             <img class=\"views\" alt=\"example views\" src=\"data:image/png;base64,{}\">\n",
            base64(png)
        );
    }
    events(page, run);
    let _ = write!(page, "<h2>Plan</h2>\n<table class=\"facts\">\n");
    let mut fact = |name: &str, value: &str| {
        let _ = writeln!(page, "<tr><th>{name}</th><td>{}</td></tr>", escape(value));
    };
    if let Some(manifest) = &run.newest {
        fact("newest checkpoint", &format!("step {}; {} kept", manifest.meta.step, run.checkpoints.len()));
        fact("digest of its state", &manifest.state_digest);
        fact("plan hash", &manifest.meta.plan_hash);
        fact("data digest", &manifest.meta.data_digest);
        fact("written by", &format!("mentee {}", manifest.meta.mentee_version));
    }
    let _ = write!(
        page,
        "</table>\n<details><summary>plan.toml: the resolved recipe</summary><pre>{}</pre></details>\n",
        escape(&run.plan)
    );
}

/// What is marked on the curves, in words.
fn events(page: &mut String, run: &Run) {
    let restarts = run.metrics.restarts().iter().map(|line| {
        let start =
            line.number("generation").map_or(String::new(), |number| format!("restart {number:.0}: "));
        (line.step, format!("{start}{}", line.text("reason").unwrap_or("unknown")))
    });
    let worlds = run.metrics.world_changes();
    let worlds =
        worlds.iter().map(|(step, from, to)| (*step, format!("{to} ranks from here on, {from} before")));
    let mut rows: Vec<(u64, String)> = restarts.chain(worlds).collect();
    if rows.is_empty() {
        return;
    }
    rows.sort_by_key(|row| row.0);
    let _ = writeln!(page, "<h2>Events</h2>\n<table>\n<tr><th>step</th><th class=\"text\">what</th></tr>");
    for (step, what) in rows {
        let _ = writeln!(page, "<tr><td>{step}</td><td class=\"text\">{}</td></tr>", escape(&what));
    }
    let _ = writeln!(page, "</table>");
}

/// The keys of the plans in which the runs differ.
fn differences(page: &mut String, runs: &[Run]) {
    let plans: Vec<BTreeMap<String, String>> = runs.iter().map(|run| keys_of(&run.plan)).collect();
    let keys: std::collections::BTreeSet<&String> = plans.iter().flat_map(BTreeMap::keys).collect();
    let differ: Vec<&String> = keys
        .into_iter()
        .filter(|key| plans.iter().any(|plan| plan.get(*key) != plans[0].get(*key)))
        .collect();
    let _ = writeln!(page, "<h2>Where the plans differ</h2>");
    if differ.is_empty() {
        let _ = writeln!(page, "<p>Nowhere: all runs have the same plan.</p>");
        return;
    }
    let names: String = runs.iter().map(|run| format!("<th>{}</th>", escape(&run.label))).collect();
    let _ = writeln!(page, "<table>\n<tr><th>key</th>{names}</tr>");
    for key in differ {
        let cells: String = plans
            .iter()
            .map(|plan| format!("<td>{}</td>", escape(plan.get(key).map_or("–", String::as_str))))
            .collect();
        let _ = writeln!(page, "<tr><td>{}</td>{cells}</tr>", escape(key));
    }
    let _ = writeln!(page, "</table>");
}

/// `section.key` and value, as written.
fn keys_of(plan: &str) -> BTreeMap<String, String> {
    let Ok(table) = plan.parse::<toml::Table>() else { return BTreeMap::new() };
    let sections = table.into_iter().filter_map(|(section, keys)| Some((section, keys.as_table()?.clone())));
    sections
        .flat_map(|(section, keys)| {
            keys.into_iter().map(move |(key, value)| (format!("{section}.{key}"), value.to_string()))
        })
        .collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0u32, |group, &byte| group << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = LETTERS[(group >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render_one(run: &RunDir) -> Result<String, Failure> {
        render(std::slice::from_ref(run))
    }

    #[test]
    fn base64_of_the_rfc() {
        let table = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in table {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn a_page_needs_nothing_but_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        let mut text = String::new();
        for step in 1..=50 {
            let _ = writeln!(
                text,
                "{{\"kind\":\"train\",\"step\":{step},\"epoch\":0,\"time\":{step},\"loss\":{},\"lr\":0.1,\"tau\":0.99,\
                 \"z_std\":0.9,\"images_per_s\":100,\"grad_norm\":1.5}}",
                2.0 / f64::from(step)
            );
        }
        text.push_str("{\"kind\":\"eval\",\"step\":50,\"knn_top1\":51.2,\"knn_random_init\":30,\"protocol\":\"k < 200\"}\n");
        text.push_str("{\"kind\":\"restart\",\"step\":20,\"generation\":1,\"reason\":\"rank 1 <died>\"}\n");
        std::fs::write(run.metrics(), text).expect("written");
        std::fs::write(run.plan(), "[run]\nname = \"a <b>\"\n").expect("written");
        std::fs::write(run.views(), b"png").expect("written");
        let page = render_one(&run).expect("a page");
        assert_eq!(page.matches("<svg").count(), 7);
        for part in [
            "51.2 %",
            "30.0 %",
            "k &lt; 200",
            "rank 1 &lt;died&gt;",
            "a &lt;b&gt;",
            "base64,cG5n",
            "class=\"mark restart\"",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(
            !page.contains("http") && !page.contains("NaN") && !page.contains("inf"),
            "self-contained and finite"
        );
    }

    #[test]
    fn an_empty_run_has_a_page_too() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        let page = render_one(&run).expect("a page");
        assert!(page.starts_with("<!doctype html>") && !page.contains("<svg"));
    }

    #[test]
    fn several_runs_share_charts_and_say_where_their_plans_differ() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs: Vec<RunDir> = ["a", "b"]
            .iter()
            .map(|name| {
                let dir = folder.path().join(name);
                std::fs::create_dir_all(dir.join("logs")).expect("made");
                let run = RunDir::at(&dir).expect("a path");
                let lines = "{\"kind\":\"train\",\"step\":1,\"loss\":2}\n{\"kind\":\"train\",\"step\":2,\"loss\":1}\n";
                std::fs::write(run.metrics(), lines).expect("written");
                std::fs::write(run.plan(), format!("[run]\nname = \"{name}\"\nseed = 3\n")).expect("written");
                run
            })
            .collect();
        let page = render(&runs).expect("a page");
        assert_eq!(page.matches("<svg").count(), 1, "only losses");
        assert_eq!(page.matches("<polyline").count(), 2);
        assert!(page.contains("line c0") && page.contains("line c1") && page.contains("run.name"), "{page}");
        assert!(!page.contains("run.seed"), "the same in both");
    }

    #[test]
    fn the_spectrum_and_times_of_ranks_are_drawn_when_they_are_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        std::fs::create_dir(run.logs()).expect("made");
        std::fs::write(
            run.metrics(),
            "{\"kind\":\"eval\",\"step\":5,\"linear_top1\":61.5,\"probe_top5\":90,\"spectrum\":[1.0,0.5,0.25,0.0]}\n",
        )
        .expect("written");
        std::fs::write(
            run.rank_log(1),
            "{\"timestamp\":\"2026-01-02T03:04:05Z\",\"level\":\"DEBUG\",\"target\":\"mentee_worker::times\",\"step\":5,\
             \"steps\":5,\"data_wait_ms\":1,\"forward_ms\":2,\"backward_ms\":3,\"comm_ms\":4,\"update_ms\":5.25}\n",
        )
        .expect("written");
        let page = render_one(&run).expect("a page");
        assert!(
            page.contains("effective rank 3 of 4") && page.contains("61.5 %") && page.contains("probe top5"),
            "{page}"
        );
        assert!(page.contains("<td>rank 1</td><td>1.0</td>") && page.contains("<td>5.2</td>"), "{page}");
        assert_eq!(effective_rank(&[1.0, 1.0, 1.0, 1.0]).round(), 4.0);
    }
}
