//! `mentee report`: one page that needs nothing but itself. Curves are SVG drawn here, the example views are embedded,
//! colours follow the reader's light or dark setting, and it reads on a phone. Several runs go into one page, their
//! curves over each other.

mod chart;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mentee_checkpoint::{self as checkpoint, Manifest};
use mentee_cluster::StepTimes;
use mentee_cluster::words::clock;
use mentee_config::replace::write_atomically;
use mentee_config::{counted, show};

use self::chart::{COLOURS, Chart, Mark, MarkKind, Series};
use crate::curve::Points;
use crate::failure::Failure;
use crate::metrics::{ACCURACIES, Line, Metrics, Step};
use crate::rundir::RunDir;
use crate::snapshot::{self, Part};
use crate::status::{State, Status};

const STYLE: &str = include_str!("style.css");
/// Checkpoints that are marked on the curves; of more, the newest.
const MARKED_CHECKPOINTS: usize = 40;
/// Ranks whose time is drawn; of more, the slowest.
const DRAWN_RANKS: usize = 16;
/// Steps of one protocol that are listed; of more, the first and the last.
const LISTED_STEPS: usize = 6;
/// So many singular values stand in an eval line, of however many features (`eval/spectrum.rs` of the worker).
const MOST_VALUES: usize = 128;

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
    show!("{}", out.display());
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
        self.line(self.metrics.train().filter_map(|line| Some((line.step as f64, number(line)?))).collect())
    }

    fn line(&self, points: Points) -> Series {
        Series::new(&self.label, points).coloured(self.colour)
    }

    fn evals(&self, key: &str) -> Points {
        self.metrics.eval().filter_map(|line| Some((line.step as f64, line.number(key)?))).collect()
    }

    /// The same on other data, a curve for each.
    fn evals_elsewhere(&self, key: &str) -> Vec<(String, Points)> {
        let mut curves: Vec<(String, Points)> = Vec::new();
        for line in self.metrics.eval_elsewhere() {
            let (on, Some(value)) = (line.on(), line.number(key)) else { continue };
            let point = (line.step as f64, value);
            match curves.iter_mut().find(|(known, _)| *known == on) {
                Some((_, points)) => points.push(point),
                None => curves.push((on, vec![point])),
            }
        }
        curves
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
            let ranks = counted(from.into(), "rank");
            mark(step, MarkKind::World, format!("step {step}: {ranks} before, {to} from here on"))
        });
        checkpoints.chain(restarts).chain(worlds).collect()
    }
}

fn folder_name(dir: &RunDir) -> String {
    dir.path().file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned())
}

/// Runs' names, or, where several have the same, as much of the end of their paths as tells them apart.
fn labels(names: &[String], paths: &[&Path]) -> Vec<String> {
    let end = |path: &Path, parts: usize| -> PathBuf {
        let all = path.components().count();
        path.components().skip(all.saturating_sub(parts)).collect()
    };
    let is_taken = |at: usize, label: &Path, parts: usize| {
        let others = (0..names.len()).filter(|other| *other != at);
        others.into_iter().any(|other| Path::new(&names[other]) == label || end(paths[other], parts) == label)
    };
    let label = |at: usize| {
        if names.iter().filter(|name| **name == names[at]).count() == 1 {
            return names[at].clone();
        }
        let all = paths[at].components().count();
        let parts = (1..all).find(|&parts| !is_taken(at, &end(paths[at], parts), parts)).unwrap_or(all);
        end(paths[at], parts).display().to_string()
    };
    (0..names.len()).map(label).collect()
}

/// The page of one run or several.
///
/// # Errors
/// When a run cannot be read.
pub fn render(dirs: &[RunDir]) -> Result<String, Failure> {
    let mut runs: Vec<Run> = dirs.iter().map(Run::read).collect::<Result<_, _>>()?;
    let names: Vec<String> = runs.iter().map(|run| run.label.clone()).collect();
    let paths: Vec<&Path> = dirs.iter().map(RunDir::path).collect();
    for (index, (run, label)) in runs.iter_mut().zip(labels(&names, &paths)).enumerate() {
        run.colour = index % COLOURS;
        run.label = label;
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

/// An accuracy's name where its place says that it is one: `kNN, random init`.
fn short(name: &str) -> String {
    name.replace(" top-1", "")
}

/// Columns of the table of evaluations that a run has: those every run knows, then whatever else is an accuracy.
fn accuracies(metrics: &Metrics) -> Vec<(String, String)> {
    let mut columns: Vec<(String, String)> =
        ACCURACIES.iter().map(|(key, name)| ((*key).to_owned(), short(name))).collect();
    let lines = metrics.eval_anywhere();
    for line in &lines {
        for (key, value) in &line.object {
            if value.is_number() && key.contains("top") && !columns.iter().any(|(known, _)| known == key) {
                columns.push((key.clone(), key.replace('_', " ")));
            }
        }
    }
    columns.retain(|(key, _)| lines.iter().any(|line| line.number(key).is_some()));
    columns
}

fn evaluation(page: &mut String, run: &Run) {
    let lines = run.metrics.eval_anywhere();
    if lines.is_empty() {
        return;
    }
    let columns = accuracies(&run.metrics);
    let _ = write!(page, "<h2>Evaluation</h2>\n<table>\n<tr><th>step</th>");
    for (_, name) in &columns {
        let _ = write!(page, "<th>{}</th>", escape(name));
    }
    let _ = writeln!(page, "</tr>");
    for line in lines {
        let _ = write!(page, "<tr><td>{}{}</td>", line.step, escape(&line.on()));
        for (key, _) in &columns {
            let _ = write!(page, "<td>{}</td>", percent(line, key));
        }
        let _ = writeln!(page, "</tr>");
    }
    let _ = writeln!(page, "</table>");
    for Protocol { key, text, on, steps } in protocols(&run.metrics) {
        let _ = writeln!(
            page,
            "<p class=\"note\">{}, {}{}: {}</p>",
            escape(&key.replace('_', " ")),
            in_words(&steps),
            escape(&on),
            escape(&text)
        );
    }
    let _ = writeln!(
        page,
        "<p class=\"note\">Top-1 accuracy in percent. Random init and raw pixels are the floors: what the same measure gets \
         right without any training (beside a linear classifier always by logistic regression).</p>"
    );
}

/// How accuracies were measured.
struct Protocol {
    key: String,
    text: String,
    /// [`Line::on`]
    on: String,
    steps: Vec<u64>,
}

/// Every protocol that accuracies of the run were measured by.
fn protocols(metrics: &Metrics) -> Vec<Protocol> {
    let mut found: Vec<Protocol> = Vec::new();
    for line in metrics.eval_anywhere() {
        for (key, value) in line.object.iter().filter(|(key, _)| key.contains("protocol")) {
            let Some(text) = value.as_str() else { continue };
            let on = line.on();
            match found.iter_mut().find(|known| known.key == *key && known.text == text && known.on == on) {
                Some(known) => known.steps.push(line.step),
                None => {
                    found.push(Protocol {
                        key: key.clone(),
                        text: text.to_owned(),
                        on,
                        steps: vec![line.step],
                    });
                }
            }
        }
    }
    found
}

/// `step 5`, `steps 5 and 10`, `7 evaluations of steps 5 to 35`.
fn in_words(steps: &[u64]) -> String {
    match steps {
        [step] => format!("step {step}"),
        [first, .., last] if steps.len() > LISTED_STEPS => {
            format!("{} evaluations of steps {first} to {last}", steps.len())
        }
        [before @ .., last] => {
            let before: Vec<String> = before.iter().map(u64::to_string).collect();
            format!("steps {} and {last}", before.join(", "))
        }
        [] => String::new(),
    }
}

fn percent(line: &Line, key: &str) -> String {
    line.number(key).map_or("–".into(), |value| format!("{value:.1} %"))
}

/// One row a run.
fn comparison(page: &mut String, runs: &[Run]) {
    let _ = writeln!(
        page,
        "<table>\n<tr><th>run</th><th>state</th><th>steps</th><th>loss</th><th>z_std</th><th>kNN</th><th>random init</th>\
         <th>linear</th><th>linear, random init</th><th>images/s</th><th>workers</th><th>time</th><th>restarts</th></tr>"
    );
    for run in runs {
        let (metrics, status) = (&run.metrics, run.status.as_ref());
        let last = |key: &str, digits: usize| {
            let value = metrics.last_train().and_then(|line| line.number(key));
            value.map_or("–".into(), |value| format!("{value:.digits$}"))
        };
        let eval = |key: &str| metrics.eval_to_show(u64::MAX).map_or("–".into(), |line| percent(line, key));
        let trained = |key: &str| {
            let line = metrics.eval_to_show(u64::MAX).filter(|line| line.number(key).is_some());
            eval(key) + &line.map_or(String::new(), Line::on)
        };
        let cells = [
            status.map_or("–", |status| status.state.word()).to_owned(),
            metrics.last_train().map_or("–".into(), |line| line.step.to_string()),
            last("loss", 4),
            last("z_std", 2),
            trained("knn_top1"),
            eval("knn_random_init"),
            trained("linear_top1"),
            eval("linear_random_init"),
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
    let accuracies: Vec<Series> = match runs {
        [run] => {
            let own = ACCURACIES.iter().enumerate().map(|(colour, (key, name))| {
                let name = short(name);
                let trained = name.strip_suffix(", trained");
                let series = Series::new(trained.unwrap_or(&name), run.evals(key)).coloured(colour);
                if trained.is_some() { series } else { series.dashed() }
            });
            let elsewhere = [("kNN", "knn_top1", 6), ("linear", "linear_top1", 7)];
            let elsewhere = elsewhere.into_iter().flat_map(|(name, key, colour)| {
                let curves = run.evals_elsewhere(key).into_iter();
                curves.map(move |(on, points)| Series::new(&format!("{name}{on}"), points).coloured(colour))
            });
            own.chain(elsewhere).collect()
        }
        _ => runs.iter().map(|run| run.line(run.evals("knn_top1"))).collect(),
    };
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
    // One after the other: the points of a chart are let go before those of the next are gathered.
    let mut draw = |chart: Chart| {
        let marks: &[Mark] = if chart.log { &[] } else { &marks };
        chart.draw(page, marks);
    };
    let chart = |title: &str, series: Vec<Series>| Chart { legend: false, ..Chart::new(title, series) };
    draw(Chart { smooth: true, ..chart("Loss", each(|line| line.loss)) });
    draw(Chart {
        legend: alone,
        ..chart(if alone { "Top-1, percent" } else { "kNN top-1, percent" }, accuracies)
    });
    draw(Chart {
        include: Some([0.0, 1.0]),
        ..chart("z_std: 1 healthy, 0 collapsed", each(|line| line.z_std))
    });
    draw(chart("Learning rate", each(|line| line.lr)));
    draw(chart("Teacher momentum tau", each(|line| line.tau)));
    draw(Chart { smooth: true, ..chart("Gradient norm", each(|line| line.grad_norm)) });
    draw(Chart {
        include: Some([0.0, 0.0]),
        smooth: true,
        ..chart("Images a second", each(|line| line.images_per_s))
    });
    draw(spectra(runs));
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
    // On other data only where the legend can say so.
    let with_spectrum = |run: &Run| -> Vec<Line> {
        let has_spectrum = |line: &&Line| !line.numbers("spectrum").is_empty();
        let own: Vec<Line> = run.metrics.eval().filter(has_spectrum).cloned().collect();
        if !own.is_empty() || runs.len() > 1 {
            return own;
        }
        run.metrics.eval_elsewhere().filter(has_spectrum).cloned().collect()
    };
    let mut lines: Vec<Series> = Vec::new();
    let mut title = "Singular values of the features, by place".to_owned();
    if let [run] = runs {
        let evals = with_spectrum(run);
        if let (Some(first), Some(last)) = (evals.first(), evals.last()) {
            let name = |line: &Line| format!("at step {}{}", line.step, line.on());
            lines.push(series(&name(last), last));
            if first.step != last.step {
                lines.push(series(&name(first), first).coloured(2).dashed());
            }
            if let Some(rank) = last.number("effective_rank") {
                let _ = write!(title, "; effective rank {rank:.1}");
            }
        }
    } else {
        for run in runs {
            let evals = with_spectrum(run);
            lines.extend(evals.last().map(|last| series(&run.label, last).coloured(run.colour)));
        }
    }
    let is_cut = |line: &Line| line.numbers("spectrum").len() >= MOST_VALUES;
    if runs.iter().any(|run| with_spectrum(run).iter().any(is_cut)) {
        title = title.replacen("Singular values", &format!("The first {MOST_VALUES} singular values"), 1);
    }
    Chart { log: true, legend: runs.len() == 1, ..Chart::new(&title, lines) }
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
    let worlds = worlds.iter().map(|&(step, from, to)| {
        (step, format!("{} from here on, {from} before", counted(to.into(), "rank")))
    });
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
            "{\"kind\":\"eval\",\"step\":5,\"linear_top1\":61.5,\"probe_top5\":90,\"spectrum\":[1.0,0.5,0.25,0.0],\"effective_rank\":2.6}\n",
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
            page.contains(">Singular values of the features, by place; effective rank 2.6<")
                && page.contains("61.5 %")
                && page.contains("probe top5"),
            "{page}"
        );
        assert!(page.contains("<td>rank 1</td><td>1.0</td>") && page.contains("<td>5.2</td>"), "{page}");
    }

    #[test]
    fn a_spectrum_that_is_cut_says_so_and_the_rank_is_the_lines_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        let values = vec!["1.0"; 128].join(",");
        let line = format!(
            "{{\"kind\":\"eval\",\"step\":5,\"knn_top1\":50,\"spectrum\":[{values}],\"effective_rank\":403.26}}\n"
        );
        std::fs::write(run.metrics(), line).expect("written");
        let page = render_one(&run).expect("a page");
        let title = ">The first 128 singular values of the features, by place; effective rank 403.3<";
        assert!(page.contains(title), "{page}");
    }

    #[test]
    fn accuracies_have_their_floors_and_every_protocol_its_steps() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        std::fs::write(
            run.metrics(),
            "{\"kind\":\"eval\",\"step\":5,\"knn_top1\":50,\"protocol\":\"k = 20\"}\n\
             {\"kind\":\"eval\",\"step\":7,\"knn_top1\":51,\"protocol\":\"k = 20\"}\n\
             {\"kind\":\"eval\",\"step\":9,\"linear_top1\":61.5,\"linear_random_init\":41.5,\"linear_raw_pixels\":31.5,\
             \"protocol\":\"logistic\"}\n",
        )
        .expect("written");
        let page = render_one(&run).expect("a page");
        for part in [
            "<th>linear, random init</th><th>linear, raw pixels</th>",
            "<td>61.5 %</td><td>41.5 %</td><td>31.5 %</td>",
            "protocol, steps 5 and 7: k = 20<",
            "protocol, step 9: logistic<",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert_eq!(in_words(&[1, 2, 3, 4, 5, 6, 8]), "7 evaluations of steps 1 to 8");
        assert_eq!(in_words(&[1, 2, 3]), "steps 1, 2 and 3");
    }

    #[test]
    fn evaluations_on_other_data_are_named_and_replace_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = |name: &str, text: &str| {
            std::fs::create_dir(folder.path().join(name)).expect("made");
            let run = RunDir::at(&folder.path().join(name)).expect("a path");
            std::fs::write(run.metrics(), text).expect("written");
            run
        };
        let other = "{\"kind\":\"eval\",\"step\":5,\"knn_top1\":99,\"knn_raw_pixels\":12,\"linear_top1\":98,\
                     \"spectrum\":[1.0,0.5],\"effective_rank\":1.9,\"protocol\":\"k = 20\",\"data\":\"/o<b>\"}\n";
        let own = "{\"kind\":\"eval\",\"step\":5,\"knn_top1\":50,\"protocol\":\"k = 20\"}\n";
        let both = run("both", &[own, other].concat());
        let page = render_one(&both).expect("a page");
        for part in [
            "<tr><td>5</td><td>50.0 %</td>",
            "<tr><td>5 on /o&lt;b&gt;</td><td>99.0 %</td>",
            "protocol, step 5: k = 20<",
            "protocol, step 5 on /o&lt;b&gt;: k = 20<",
            ">kNN on /o&lt;b&gt;<",
            ">linear on /o&lt;b&gt;<",
            ">at step 5 on /o&lt;b&gt;<",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains(">linear<"), "the run has none of its own: {page}");
        let elsewhere = run("elsewhere", other);
        let page = render(&[both, elsewhere]).expect("a page");
        let row = |name: &str| {
            let name = format!("</i>{name}</td>");
            page.lines().find(|line| line.starts_with("<tr>") && line.contains(&name)).expect("a row")
        };
        assert!(row("both").contains("<td>50.0 %</td><td>–</td><td>–</td><td>–</td>"), "{}", row("both"));
        let named = "<td>99.0 % on /o&lt;b&gt;</td><td>–</td><td>98.0 % on /o&lt;b&gt;</td><td>–</td>";
        assert!(row("elsewhere").contains(named), "{}", row("elsewhere"));
        // Curves that lie over each other are of the runs' own data, and so are singular values.
        let (_, curves) = page.split_once("<h2>Curves</h2>").expect("curves");
        let (curves, _) = curves.split_once("Where the plans differ").expect("what follows");
        assert_eq!(
            (curves.matches("class=\"dot").count(), curves.contains("Singular")),
            (1, false),
            "{curves}"
        );
    }

    #[test]
    fn runs_of_one_name_are_told_apart_by_their_paths() {
        let of = |names: &[&str], paths: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let paths: Vec<&Path> = paths.iter().map(Path::new).collect();
            labels(&names, &paths)
        };
        assert_eq!(of(&["x", "y"], &["/r/a/run", "/r/b/run"]), ["x", "y"]);
        assert_eq!(of(&["x", "x"], &["/r/1", "/r/2"]), ["1", "2"]);
        assert_eq!(of(&["x", "x", "x"], &["/r/a/run", "/r/b/run", "/r/c"]), ["a/run", "b/run", "c"]);
        assert_eq!(of(&["x", "x", "2"], &["/r/1", "/r/2", "/r/3"]), ["1", "r/2", "2"]);
        assert_eq!(of(&["x", "x"], &["/r/1", "/r/1"]), ["/r/1", "/r/1"]);
    }
}
