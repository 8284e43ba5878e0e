//! `mentee report`: one page that needs nothing but itself. Curves are SVG drawn here, the example views are embedded,
//! colours follow the reader's light or dark setting, and it reads on a phone.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use mentee_checkpoint as checkpoint;

use crate::failure::Failure;
use crate::metrics::{Line, Metrics};
use crate::progress::clock;
use crate::rundir::{RunDir, write_atomically};
use crate::status::{State, Status};

/// A chart's size in its own units; text is sized for a phone, where one unit is one pixel.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;
/// More points than this in a line are merged: the eye sees no more.
const MAX_POINTS: usize = 400;

/// `mentee report RUN [--out FILE.html]`.
///
/// # Errors
/// When there is no run, or the page cannot be written.
pub fn command(path: &Path, out: Option<&Path>) -> Result<(), Failure> {
    let run = RunDir::existing(path)?;
    let page = render(&run)?;
    let default = run.report();
    let out = out.unwrap_or(&default);
    write_atomically(out, page.as_bytes()).map_err(|error| Failure::io("write", out, &error))?;
    println!("{}", out.display());
    Ok(())
}

/// The page.
///
/// # Errors
/// When the run cannot be read.
pub fn render(run: &RunDir) -> Result<String, Failure> {
    let metrics = Metrics::read(&run.metrics())?;
    let status = Status::read(run);
    let plan = std::fs::read_to_string(run.plan()).unwrap_or_default();
    let views = std::fs::read(run.views()).ok();
    let checkpoints = checkpoint::list(&run.checkpoints()).unwrap_or_default();
    let newest = checkpoints.iter().rev().find_map(|entry| entry.state.as_ref().ok());
    let name = status.as_ref().map_or_else(
        || run.path().file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned()),
        |status| status.name.clone(),
    );

    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{name} · mentee</title>\n\
         <style>{STYLE}</style></head><body><main>\n<h1>{name}</h1>\n",
        name = escape(&name)
    );
    summary(&mut page, &metrics, status.as_ref());
    evaluation(&mut page, &metrics);
    charts(&mut page, &metrics);
    if let Some(png) = views {
        let _ = write!(
            page,
            "<h2>Example views</h2>\n<p>What the student and the teacher see: both views of a few training images.</p>\n\
             <img class=\"views\" alt=\"example views\" src=\"data:image/png;base64,{}\">\n",
            base64(&png)
        );
    }
    restarts(&mut page, &metrics);
    let _ = write!(page, "<h2>Plan</h2>\n<table class=\"facts\">\n");
    let mut fact = |name: &str, value: &str| {
        let _ = writeln!(page, "<tr><th>{name}</th><td>{}</td></tr>", escape(value));
    };
    if let Some(manifest) = newest {
        fact("newest checkpoint", &format!("step {} of {} kept", manifest.meta.step, checkpoints.len()));
        fact("digest of its state", &manifest.state_digest);
        fact("plan hash", &manifest.meta.plan_hash);
        fact("data digest", &manifest.meta.data_digest);
        fact("written by", &format!("mentee {}", manifest.meta.mentee_version));
    }
    fact("page by", &format!("mentee {}", env!("CARGO_PKG_VERSION")));
    let _ = write!(
        page,
        "</table>\n<details><summary>plan.toml: the resolved recipe</summary><pre>{}</pre></details>\n\
         </main></body></html>\n",
        escape(&plan)
    );
    Ok(page)
}

fn summary(page: &mut String, metrics: &Metrics, status: Option<&Status>) {
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
    let rates: Vec<f64> = metrics.train().filter_map(|line| line.number("images_per_s")).collect();
    if let Some(rate) = median(rates) {
        chips.push((format!("{rate:.0} images/s (median)"), ""));
    }
    let times: Vec<f64> = metrics.train().filter_map(|line| line.number("time")).collect();
    if let (Some(first), Some(last)) = (times.first(), times.last())
        && let Ok(time) = Duration::try_from_secs_f64(last - first)
    {
        chips.push((format!("{} from first to last step", clock(time)), ""));
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

fn evaluation(page: &mut String, metrics: &Metrics) {
    let Some(last) = metrics.last_eval() else { return };
    let _ = write!(
        page,
        "<h2>Evaluation</h2>\n<table>\n<tr><th>step</th><th>trained</th><th>random init</th><th>raw pixels</th>"
    );
    let linear = metrics.eval().any(|line| line.number("linear_top1").is_some());
    let _ = writeln!(page, "{}</tr>", if linear { "<th>linear</th>" } else { "" });
    for line in metrics.eval() {
        let cell = |key: &str| line.number(key).map_or("–".into(), |value| format!("{value:.1} %"));
        let _ = write!(page, "<tr><td>{}</td>", line.step);
        for key in ["knn_top1", "knn_random_init", "knn_raw_pixels"] {
            let _ = write!(page, "<td>{}</td>", cell(key));
        }
        let _ = writeln!(
            page,
            "{}</tr>",
            if linear { format!("<td>{}</td>", cell("linear_top1")) } else { String::new() }
        );
    }
    let _ = writeln!(page, "</table>");
    if let Some(protocol) = last.text("protocol") {
        let _ = writeln!(page, "<p class=\"note\">kNN top-1; protocol: {}</p>", escape(protocol));
    }
}

fn charts(page: &mut String, metrics: &Metrics) {
    let train = |key: &str| points(metrics.train(), key);
    let eval = |key: &str| points(metrics.eval(), key);
    let marks: Vec<f64> = metrics.restarts().iter().map(|line| line.step as f64).collect();
    let all = [
        Chart::new("Loss", vec![Series::new("loss", train("loss"))]),
        Chart::new(
            "kNN top-1, percent",
            vec![
                Series::new("trained", eval("knn_top1")),
                Series::dashed("random init", eval("knn_random_init")),
                Series::dashed("raw pixels", eval("knn_raw_pixels")),
            ],
        ),
        Chart {
            include: Some([0.0, 1.1]),
            ..Chart::new(
                "z_std: about 1 when healthy, 0 when collapsed",
                vec![Series::new("z_std", train("z_std"))],
            )
        },
        Chart::new("Learning rate", vec![Series::new("lr", train("lr"))]),
        Chart::new("Teacher momentum tau", vec![Series::new("tau", train("tau"))]),
        Chart::new("Gradient norm", vec![Series::new("grad_norm", train("grad_norm"))]),
        Chart {
            include: Some([0.0, 0.0]),
            ..Chart::new("Images a second", vec![Series::new("images_per_s", train("images_per_s"))])
        },
    ];
    let _ = write!(page, "<h2>Curves</h2>\n<div class=\"charts\">\n");
    for chart in all {
        chart.draw(page, &marks);
    }
    let _ = write!(
        page,
        "</div>\n<p class=\"note\">Over steps.{}</p>\n",
        if marks.is_empty() { "" } else { " Vertical lines: restarts." }
    );
}

fn restarts(page: &mut String, metrics: &Metrics) {
    if metrics.restarts().is_empty() {
        return;
    }
    let _ =
        write!(page, "<h2>Restarts</h2>\n<table>\n<tr><th>from step</th><th>start</th><th>why</th></tr>\n");
    for line in metrics.restarts() {
        let generation = line.number("generation").map_or("?".into(), |number| format!("{number:.0}"));
        let reason = escape(line.text("reason").unwrap_or("unknown"));
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{generation}</td><td class=\"text\">{reason}</td></tr>",
            line.step
        );
    }
    let _ = writeln!(page, "</table>");
}

type Points = Vec<(f64, f64)>;

fn points<'a>(lines: impl Iterator<Item = &'a Line>, key: &str) -> Points {
    lines.filter_map(|line| Some((line.step as f64, line.number(key)?))).collect()
}

struct Series {
    name: &'static str,
    points: Points,
    dashed: bool,
}

impl Series {
    fn new(name: &'static str, points: Points) -> Series {
        Series { name, points, dashed: false }
    }

    fn dashed(name: &'static str, points: Points) -> Series {
        Series { name, points, dashed: true }
    }
}

struct Chart {
    title: &'static str,
    series: Vec<Series>,
    /// Values the axis must reach.
    include: Option<[f64; 2]>,
}

impl Chart {
    fn new(title: &'static str, series: Vec<Series>) -> Chart {
        Chart { title, series, include: None }
    }

    /// Nothing when there is nothing to draw.
    fn draw(&self, page: &mut String, marks: &[f64]) {
        let all = || self.series.iter().flat_map(|series| &series.points);
        if all().next().is_none() {
            return;
        }
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            })
        };
        let (first, last) = range(&mut all().map(|point| point.0));
        let (first, last) = if first == last { (first - 0.5, last + 0.5) } else { (first, last) };
        let (mut low, mut high) =
            range(&mut all().map(|point| point.1).chain(self.include.into_iter().flatten()));
        if high - low <= f64::EPSILON * high.abs().max(low.abs()) {
            let margin = if high == 0.0 { 1.0 } else { 0.05 * high.abs() };
            (low, high) = (low - margin, high + margin);
        }
        let step = nice_step(high - low, 4.0);
        // Axes end on a tick, so that the scale can be read at both ends.
        let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        let x = |value: f64| LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);

        let _ = write!(
            page,
            "<figure><figcaption>{}</figcaption>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
            escape(self.title),
            escape(self.title)
        );
        let digits = decimals(step);
        for tick in 0..=((high - low) / step).round() as u32 {
            let value = low + f64::from(tick) * step;
            let at = y(value);
            let _ = writeln!(
                page,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 5.0,
                at + 3.5,
                number(value, digits)
            );
        }
        let step = nice_step(last - first, 4.0).max(1.0);
        let mut value = (first / step).ceil() * step;
        while value <= last {
            let _ = writeln!(
                page,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                x(value),
                HEIGHT - BOTTOM + 16.0,
                number(value, 0)
            );
            value += step;
        }
        for &mark in marks.iter().filter(|mark| (first..=last).contains(*mark)) {
            let at = x(mark);
            let _ = writeln!(
                page,
                "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\"/>",
                HEIGHT - BOTTOM
            );
        }
        for (index, series) in self.series.iter().enumerate() {
            let points = thin(&series.points);
            let dash = if series.dashed { " dashed" } else { "" };
            if let [(at_x, at_y)] = points[..] {
                let _ = writeln!(
                    page,
                    "<circle class=\"dot c{index}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                    x(at_x),
                    y(at_y)
                );
                continue;
            }
            let path: Vec<String> =
                points.iter().map(|&(px, py)| format!("{:.1},{:.1}", x(px), y(py))).collect();
            let _ = writeln!(page, "<polyline class=\"line c{index}{dash}\" points=\"{}\"/>", path.join(" "));
        }
        let _ = writeln!(page, "</svg>");
        if self.series.len() > 1 {
            let _ = write!(page, "<p class=\"legend\">");
            for (index, series) in
                self.series.iter().enumerate().filter(|(_, series)| !series.points.is_empty())
            {
                let _ = write!(page, "<span class=\"key c{index}\"></span>{} ", escape(series.name));
            }
            let _ = writeln!(page, "</p>");
        }
        let _ = writeln!(page, "</figure>");
    }
}

/// Merges neighbours into their lowest and highest, in order: no spike is lost.
fn thin(points: &[(f64, f64)]) -> Points {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let size = points.len().div_ceil(MAX_POINTS / 2);
    points
        .chunks(size)
        .flat_map(|chunk| {
            let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
            let low = chunk.iter().min_by(by_value).copied();
            let high = chunk.iter().max_by(by_value).copied();
            let mut pair: Points = low.into_iter().chain(high).collect();
            pair.sort_by(|a, b| a.0.total_cmp(&b.0));
            pair.dedup();
            pair
        })
        .collect()
}

/// 1, 2 or 5 times a power of ten, about `range / parts`.
fn nice_step(range: f64, parts: f64) -> f64 {
    let rough = range / parts;
    let power = 10f64.powf(rough.log10().floor());
    let factor =
        [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

fn decimals(step: f64) -> usize {
    (-step.log10().floor()).clamp(0.0, 9.0) as usize
}

fn number(value: f64, digits: usize) -> String {
    match value.abs() {
        1e6.. => format!("{:.1}M", value / 1e6),
        1e4.. => format!("{:.0}k", value / 1e3),
        _ => format!("{:.digits$}", if value == 0.0 { 0.0 } else { value }),
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
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

const STYLE: &str = "
:root{--bg:#fff;--fg:#1c2024;--soft:#60646c;--line:#e2e4e8;--card:#f7f8fa;--c0:#1463c9;--c1:#8a5a00;--c2:#6b6f76;
--good:#17703a;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e8eaee;--soft:#a0a5ae;--line:#2e3238;--card:#1c1f24;
--c0:#6cb0ff;--c1:#f0b64a;--c2:#a0a5ae;--good:#63c98a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
.chips{display:flex;flex-wrap:wrap;gap:.4rem;margin:.5rem 0}
.chips span{background:var(--card);border:1px solid var(--line);border-radius:1rem;padding:.1rem .7rem;font-size:.9rem}
.chips .good{color:var(--good);border-color:currentColor}
.chips .bad,.error{color:var(--bad);border-color:currentColor}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem;min-width:0}
figcaption{font-size:.9rem;font-weight:600}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--line)}
.mark{stroke:var(--bad);stroke-dasharray:2 3}
.tick{fill:var(--soft);font:11px system-ui,sans-serif}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.dashed{stroke-dasharray:5 4}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.legend{margin:.3rem 0 0;font-size:.85rem;color:var(--soft)}
.key{display:inline-block;width:.8rem;height:.2rem;margin:0 .3rem .25rem .6rem}
.key.c0{background:var(--c0)}.key.c1{background:var(--c1)}.key.c2{background:var(--c2)}
table{border-collapse:collapse;font-size:.95rem;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.25rem .8rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
.facts th,.facts td,td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
.note{color:var(--soft);font-size:.9rem}
.views{max-width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--line);border-radius:.3rem}
details{margin:1rem 0}
summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem;font-size:.85rem}
";

#[cfg(test)]
mod tests {
    use super::*;

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
    fn ticks_are_round_numbers() {
        for (range, step) in [(1.0, 0.5), (4.0, 1.0), (100.0, 50.0), (0.003, 0.001), (7.9, 2.0), (1e6, 5e5)] {
            assert!((nice_step(range, 4.0) - step).abs() < step * 1e-9, "{range}: {}", nice_step(range, 4.0));
        }
        assert_eq!(number(0.25, decimals(0.05)), "0.25");
        assert_eq!(number(20_000.0, 0), "20k");
        assert_eq!(number(-0.0, 1), "0.0");
    }

    #[test]
    fn thinning_keeps_order_ends_and_spikes() {
        let mut points: Points = (0..10_000).map(|step| (f64::from(step), 1.0)).collect();
        points[1234].1 = 99.0;
        points[5678].1 = -99.0;
        let thinned = thin(&points);
        assert!(thinned.len() <= MAX_POINTS + 2);
        assert!(thinned.is_sorted_by(|a, b| a.0 <= b.0));
        assert!(thinned.contains(&(1234.0, 99.0)) && thinned.contains(&(5678.0, -99.0)));
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
        let page = render(&run).expect("a page");
        assert_eq!(page.matches("<svg").count(), 7);
        for part in [
            "51.2 %",
            "30.0 %",
            "k &lt; 200",
            "rank 1 &lt;died&gt;",
            "a &lt;b&gt;",
            "base64,cG5n",
            "class=\"mark\"",
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
        let page = render(&run).expect("a page");
        assert!(page.starts_with("<!doctype html>") && !page.contains("<svg"));
    }
}
