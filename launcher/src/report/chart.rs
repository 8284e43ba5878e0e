//! Curves as SVG, drawn here: nothing is loaded, and one size serves a phone and a desk.

use std::fmt::Write as _;

use super::escape;
use crate::curve::{self, Points, decimals, nice_step, number, thin};

/// A chart's size in its own units; text is sized for a phone, where one unit is one pixel.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;
/// More points than this in a line are merged: the eye sees no more.
const MAX_POINTS: usize = 400;
/// A curve with more points than this has its mean drawn over it.
const NOISY: usize = 100;
/// Colours that style.css has; runs beyond them share.
pub const COLOURS: usize = 8;

/// One line.
#[derive(Debug, Clone)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Steps and values.
    pub points: Points,
    /// Which of the [`COLOURS`].
    pub colour: usize,
    /// A floor or the like.
    pub dashed: bool,
}

impl Series {
    /// A line in the first colour.
    pub fn new(name: &str, points: Points) -> Series {
        Series { name: name.to_owned(), points, colour: 0, dashed: false }
    }

    /// In another colour.
    pub fn coloured(self, colour: usize) -> Series {
        Series { colour: colour % COLOURS, ..self }
    }

    /// Dashed.
    pub fn dashed(self) -> Series {
        Series { dashed: true, ..self }
    }
}

/// Something that happened at a step.
#[derive(Debug, Clone)]
pub struct Mark {
    /// The step.
    pub at: f64,
    /// What it looks like.
    pub kind: MarkKind,
    /// What a pointer that rests on it is told.
    pub title: String,
}

/// See [`Mark`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkKind {
    /// A line from top to bottom.
    Restart,
    /// The same in another colour.
    World,
    /// A tick on the axis.
    Checkpoint,
}

/// Lines over one axis of steps.
#[derive(Debug, Clone, Default)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// The lines.
    pub series: Vec<Series>,
    /// Values the axis must reach.
    pub include: Option<[f64; 2]>,
    /// Noisy values: their running mean is drawn over them.
    pub smooth: bool,
    /// Values are logarithms to base ten.
    pub log: bool,
    /// Whether a legend tells the lines apart.
    pub legend: bool,
}

impl Chart {
    /// With a legend when there are several lines.
    pub fn new(title: &str, series: Vec<Series>) -> Chart {
        Chart { title: title.to_owned(), legend: series.len() > 1, series, ..Chart::default() }
    }

    /// Nothing when there is nothing to draw.
    pub fn draw(&self, page: &mut String, marks: &[Mark]) {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let values = all().map(|point| point.1).chain(self.include.into_iter().flatten());
        let (Some((first, last)), Some((low, high))) =
            (curve::range(all().map(|point| point.0)), curve::range(values))
        else {
            return;
        };
        let (first, last) = if first == last { curve::around(first, 0.5) } else { (first, last) };
        // Axes end on a tick, so that the scale can be read at both ends.
        let (low, high, step) = curve::axis(low, high, 4.0);
        let x = |value: f64| LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);

        let _ = write!(
            page,
            "<figure><figcaption>{}</figcaption>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
            escape(&self.title),
            escape(&self.title)
        );
        for tick in 0..=((high - low) / step).round() as u32 {
            let value = low + f64::from(tick) * step;
            let label = if self.log { power_of_ten(value) } else { number(value, decimals(step)) };
            let at = y(value);
            let _ = writeln!(
                page,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                WIDTH - RIGHT,
                LEFT - 5.0,
                at + 3.5,
            );
        }
        for value in curve::ticks(first, last, nice_step(last - first, 4.0).max(1.0)) {
            let _ = writeln!(
                page,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                x(value),
                HEIGHT - BOTTOM + 16.0,
                number(value, 0)
            );
        }
        // What happened before the first logged step, as a restart from step 0, lies on the left edge.
        for mark in marks.iter().filter(|mark| mark.at <= last) {
            let (class, top) = match mark.kind {
                MarkKind::Restart => ("restart", TOP),
                MarkKind::World => ("world", TOP),
                MarkKind::Checkpoint => ("saved", HEIGHT - BOTTOM - 6.0),
            };
            let at = x(mark.at.max(first));
            let _ = writeln!(
                page,
                "<line class=\"mark {class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\"><title>{}</title></line>",
                HEIGHT - BOTTOM,
                escape(&mark.title)
            );
        }
        for series in &self.series {
            self.draw_line(page, series, &x, &y);
        }
        let _ = writeln!(page, "</svg>");
        if self.legend {
            legend(page, &self.series);
        }
        let _ = writeln!(page, "</figure>");
    }

    fn draw_line(&self, page: &mut String, series: &Series, x: &dyn Fn(f64) -> f64, y: &dyn Fn(f64) -> f64) {
        let colour = series.colour;
        let finite: Points = series.points.iter().copied().filter(|point| point.1.is_finite()).collect();
        if let [(at_x, at_y)] = finite[..] {
            let _ = writeln!(
                page,
                "<circle class=\"dot c{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                x(at_x),
                y(at_y)
            );
            return;
        }
        let mut line = |points: &[(f64, f64)], class: &str| {
            let path: Vec<String> = thin(points.iter().copied(), MAX_POINTS)
                .iter()
                .map(|&(px, py)| format!("{:.1},{:.1}", x(px), y(py)))
                .collect();
            let _ =
                writeln!(page, "<polyline class=\"line c{colour}{class}\" points=\"{}\"/>", path.join(" "));
        };
        let dash = if series.dashed { " dashed" } else { "" };
        if self.smooth && finite.len() > NOISY {
            line(&finite, " faint");
            line(&running_mean(&finite), dash);
        } else {
            line(&finite, dash);
        }
    }
}

/// Which colour is whose.
pub fn legend(page: &mut String, series: &[Series]) {
    let _ = write!(page, "<p class=\"legend\">");
    for series in series.iter().filter(|series| !series.points.is_empty()) {
        let dashed = if series.dashed { " dashed" } else { "" };
        let _ = write!(
            page,
            "<span><i class=\"key c{}{dashed}\"></i>{}</span>",
            series.colour,
            escape(&series.name)
        );
    }
    let _ = writeln!(page, "</p>");
}

/// As short as it can be told: `1`, `0.32`, `0.001`, `1e-6`.
fn power_of_ten(exponent: f64) -> String {
    if exponent < -3.5 {
        format!("1e{exponent:.0}")
    } else {
        number(10f64.powf(exponent), decimals(10f64.powf(exponent)) + usize::from(exponent.fract() != 0.0))
    }
}

/// The mean of each point and those around it, a fiftieth of the curve in all; fewer at the ends.
fn running_mean(points: &[(f64, f64)]) -> Points {
    let half = (points.len() / 100).max(1);
    let mut sums = vec![0.0];
    for point in points {
        sums.push(sums[sums.len() - 1] + point.1);
    }
    (0..points.len())
        .map(|at| {
            let half = half.min(at).min(points.len() - 1 - at);
            let (from, to) = (at - half, at + half + 1);
            (points[at].0, (sums[to] - sums[from]) / (to - from) as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_keeps_a_line_a_line_and_both_ends() {
        let line: Points = (0..1000).map(|step| (f64::from(step), 3.0 * f64::from(step) - 7.0)).collect();
        for (mean, point) in running_mean(&line).iter().zip(&line) {
            assert!(mean.0 == point.0 && (mean.1 - point.1).abs() < 1e-9, "{mean:?} {point:?}");
        }
        let noise: Points = (0..1000).map(|step| (f64::from(step), f64::from(step % 2))).collect();
        assert!(running_mean(&noise)[100..900].iter().all(|mean| (mean.1 - 0.5).abs() < 0.05));
    }

    #[test]
    fn marks_before_the_curve_lie_on_its_edge_and_those_behind_it_are_left_out() {
        let chart = Chart::new("x", vec![Series::new("x", vec![(10.0, 1.0), (20.0, 2.0)])]);
        let mark = |at, kind| Mark { at, kind, title: "<t>".into() };
        let mut page = String::new();
        chart.draw(
            &mut page,
            &[mark(0.0, MarkKind::Restart), mark(15.0, MarkKind::World), mark(25.0, MarkKind::Checkpoint)],
        );
        assert!(page.contains("mark restart\" x1=\"58.0\"") && page.contains("mark world"), "{page}");
        assert!(!page.contains("mark saved"), "{page}");
        assert!(page.contains("&lt;t&gt;"));
    }

    #[test]
    fn steps_beyond_all_bounds_have_their_ticks_too() {
        let ticks = |steps: &[f64]| {
            let points = steps.iter().map(|&step| (step, 1.0)).collect();
            let mut page = String::new();
            Chart::new("x", vec![Series::new("x", points)]).draw(&mut page, &[]);
            assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
            page.matches("text-anchor=\"middle\"").count()
        };
        assert_eq!(ticks(&[5.0]), 1);
        assert_eq!(ticks(&[0.0, 100.0]), 3);
        for steps in [&[1e17][..], &[1e17, 1e17 + 16.0], &[0.0, 1e17], &[u64::MAX as f64]] {
            assert!((1..20).contains(&ticks(steps)), "{steps:?}");
        }
    }

    #[test]
    fn powers_of_ten_read_well() {
        let table = [
            (0.0, "1"),
            (-0.5, "0.32"),
            (-1.0, "0.1"),
            (-1.5, "0.032"),
            (-3.0, "0.001"),
            (-6.0, "1e-6"),
            (2.0, "100"),
        ];
        for (exponent, text) in table {
            assert_eq!(power_of_ten(exponent), text);
        }
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let mut page = String::new();
        Chart::new("x", vec![Series::new("x", vec![(1.0, f64::NAN)])]).draw(&mut page, &[]);
        Chart::new("x", Vec::new()).draw(&mut page, &[]);
        assert!(page.is_empty(), "{page}");
    }
}
