//! Reading `metrics.jsonl`: one JSON object a line. A line that a killed worker left unfinished is skipped. A step that
//! comes again after a restart replaces the earlier one and everything behind it: the run went on from there. An
//! evaluation on other data than the recipe's stands beside the run's own and replaces none.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::printable::printable;

/// A gap between two lines that is longer than so much of what its steps take, and than [`IDLE_S`], is no training.
const IDLE: f64 = 10.0;
/// See [`IDLE`]; seconds.
const IDLE_S: f64 = 30.0;

/// The accuracies that every evaluation may have, trained ones beside their floors: keys of its line, and what people are told.
pub const ACCURACIES: [(&str, &str); 6] = [
    ("knn_top1", "kNN top-1, trained"),
    ("knn_random_init", "kNN top-1, random init"),
    ("knn_raw_pixels", "kNN top-1, raw pixels"),
    ("linear_top1", "linear top-1, trained"),
    ("linear_random_init", "linear, random init"),
    ("linear_raw_pixels", "linear, raw pixels"),
];

/// Read at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// One line, whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its step.
    pub step: u64,
    /// All of it.
    #[serde(rename = "values")]
    pub object: Map<String, Value>,
}

impl Line {
    fn parse(text: &str) -> Option<Line> {
        let object: Map<String, Value> = serde_json::from_str(text).ok()?;
        Some(Line { step: object.get("step")?.as_u64()?, object })
    }

    /// A number of it.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.object.get(key)?.as_f64()
    }

    /// A text of it.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.object.get(key)?.as_str()
    }

    /// Of an evaluation on other data than the recipe's: ` on DATA`; else nothing.
    pub fn on(&self) -> String {
        self.text("data").map_or(String::new(), |data| format!(" on {data}"))
    }

    /// Several numbers of it; empty when there are none.
    pub fn numbers(&self, key: &str) -> Vec<f64> {
        let list = self.object.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_f64).collect()
    }

    /// An eval line as a table for people: the number, its floors, its protocol.
    pub fn table(&self) -> Vec<String> {
        let mut lines: Vec<String> = ACCURACIES
            .iter()
            .filter_map(|(key, name)| Some(format!("{name:<24}{:>6.1} %", self.number(key)?)))
            .collect();
        if let Some(protocol) = self.text("protocol") {
            lines.push(format!("protocol: {}", printable(protocol)));
        }
        lines
    }
}

/// The numbers of a train line. Runs of a million steps are kept whole, so texts and unknown keys are not.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the keys are those of metrics.jsonl")]
pub struct Step {
    pub step: u64,
    pub time: Option<f64>,
    pub loss: Option<f64>,
    pub lr: Option<f64>,
    pub tau: Option<f64>,
    pub grad_norm: Option<f64>,
    pub z_std: Option<f64>,
    pub images_per_s: Option<f64>,
    pub step_ms: Option<f64>,
    pub data_wait_ms: Option<f64>,
    pub comm_exposed_ms: Option<f64>,
    pub world_size: Option<u32>,
}

/// What every line has.
#[derive(Deserialize)]
struct Head<'a> {
    kind: &'a str,
    step: u64,
}

/// A run's metrics, read as they grow.
#[derive(Debug, Default)]
pub struct Metrics {
    /// In order; none where only the last is wanted.
    train: Vec<Step>,
    without_steps: bool,
    last_train: Option<Line>,
    eval: BTreeMap<u64, Line>,
    /// On other data, each data set once a step, as last recorded.
    elsewhere: BTreeMap<u64, Vec<Line>>,
    checkpoints: BTreeMap<u64, Line>,
    restarts: Vec<Line>,
    offset: u64,
    partial: Vec<u8>,
}

impl Metrics {
    /// Reads a file; no file is no metrics.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read(path: &Path) -> Result<Metrics, Failure> {
        let mut metrics = Metrics::default();
        metrics.read_on(path)?;
        Ok(metrics)
    }

    /// The same without [`Self::train`] and what is told from it: of a run of any length a few kilobytes.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read_without_steps(path: &Path) -> Result<Metrics, Failure> {
        let mut metrics = Metrics { without_steps: true, ..Metrics::default() };
        metrics.read_on(path)?;
        Ok(metrics)
    }

    /// Reads what the file has got since the last call.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read_on(&mut self, path: &Path) -> Result<(), Failure> {
        match self.read_lines(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::io("read", path, &error))
            }
            _ => Ok(()),
        }
    }

    fn read_lines(&mut self, path: &Path) -> std::io::Result<()> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() < self.offset {
            // Another file.
            *self = Metrics { without_steps: self.without_steps, ..Metrics::default() };
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut file = BufReader::with_capacity(BUFFER_BYTES, file);
        let mut last_train = None;
        loop {
            self.offset += file.read_until(b'\n', &mut self.partial)? as u64;
            if self.partial.last() != Some(&b'\n') {
                break;
            }
            let mut line = std::mem::take(&mut self.partial);
            if self.add(&String::from_utf8_lossy(&line)) {
                std::mem::swap(last_train.get_or_insert_with(Vec::new), &mut line);
            }
            line.clear();
            self.partial = line;
        }
        if let Some(line) = last_train.and_then(|line| Line::parse(&String::from_utf8_lossy(&line))) {
            self.last_train = Some(line);
        }
        Ok(())
    }

    /// Takes a line in, and says whether it is a step's.
    fn add(&mut self, line: &str) -> bool {
        let Ok(Head { kind, step }) = serde_json::from_str(line) else { return false };
        if kind == "train" {
            return self.add_step(line, step);
        }
        let Some(line) = Line::parse(line) else { return false };
        match kind {
            "eval" if line.text("data").is_some() => {
                let lines = self.elsewhere.entry(step).or_default();
                lines.retain(|known| known.text("data") != line.text("data"));
                lines.push(line);
            }
            "eval" => drop(self.eval.insert(step, line)),
            "checkpoint" => drop(self.checkpoints.insert(step, line)),
            "restart" => self.restarts.push(line),
            _ => {}
        }
        false
    }

    fn add_step(&mut self, line: &str, step: u64) -> bool {
        if !self.without_steps {
            let Ok(train) = serde_json::from_str::<Step>(line) else { return false };
            let before = match self.train.last() {
                Some(last) if last.step >= step => self.train.partition_point(|known| known.step < step),
                _ => self.train.len(),
            };
            self.train.truncate(before);
            self.train.push(train);
        }
        // What a stretch that was lost had measured and saved goes with it.
        self.eval.split_off(&step);
        self.elsewhere.split_off(&step);
        self.checkpoints.split_off(&step);
        true
    }

    /// Every logged step, in order.
    pub fn train(&self) -> impl DoubleEndedIterator<Item = &Step> + Clone {
        self.train.iter()
    }

    /// Evaluations on the recipe's data, in order.
    pub fn eval(&self) -> impl Iterator<Item = &Line> {
        self.eval.values()
    }

    /// Those on other data, in order.
    pub fn eval_elsewhere(&self) -> impl Iterator<Item = &Line> {
        self.elsewhere.values().flatten()
    }

    /// Both, by step.
    pub fn eval_anywhere(&self) -> Vec<&Line> {
        let mut lines: Vec<&Line> = self.eval().chain(self.eval_elsewhere()).collect();
        lines.sort_by_key(|line| line.step);
        lines
    }

    /// The evaluation to show of a run that stands at `step`: its newest, on other data where that step has none of its own.
    pub fn eval_to_show(&self, step: u64) -> Option<&Line> {
        let own = self.eval.range(..=step).next_back().map(|(_, line)| line);
        let other = self.elsewhere.range(..=step).next_back().and_then(|(_, lines)| lines.last());
        other.into_iter().chain(own).max_by_key(|line| line.step)
    }

    /// Checkpoints, in order, also those that are gone.
    pub fn checkpoints(&self) -> impl DoubleEndedIterator<Item = &Line> {
        self.checkpoints.values()
    }

    /// Restarts, in the order they happened.
    pub fn restarts(&self) -> &[Line] {
        &self.restarts
    }

    /// The newest step.
    pub fn last_train(&self) -> Option<&Line> {
        self.last_train.as_ref()
    }

    /// The newest evaluation on the recipe's data.
    pub fn last_eval(&self) -> Option<&Line> {
        self.eval.values().next_back()
    }

    /// Seconds of training from the first to the last logged step: of a gap far longer than its steps (a stop, a wait in
    /// a queue, a long evaluation) these alone count.
    pub fn training_s(&self) -> Option<f64> {
        let mut lines = self.train().filter_map(|line| Some((line.step, line.time?, line.step_ms)));
        let (mut step, mut time, _) = lines.next()?;
        let mut sum = 0.0;
        for (next, at, step_ms) in lines {
            let gap = (at - time).max(0.0);
            let steps = step_ms.map_or(f64::INFINITY, |ms| (next - step) as f64 * ms / 1e3);
            sum += if gap > IDLE_S && gap > IDLE * steps { steps } else { gap };
            (step, time) = (next, at);
        }
        Some(sum)
    }

    /// When it last wrote that something was done: a step, an evaluation, a checkpoint.
    pub fn last_time(&self) -> Option<f64> {
        let others = [self.last_eval(), self.checkpoints().next_back()].map(|line| line?.number("time"));
        let train = self.train().next_back().and_then(|line| line.time);
        others.into_iter().chain([train]).flatten().reduce(f64::max)
    }

    /// Where the number of ranks changed: the first step with another number, the number before, the number from there.
    pub fn world_changes(&self) -> Vec<(u64, u32, u32)> {
        let sizes: Vec<(u64, u32)> =
            self.train.iter().filter_map(|line| Some((line.step, line.world_size?))).collect();
        let changes = sizes.windows(2).filter(|pair| pair[0].1 != pair[1].1);
        changes.map(|pair| (pair[1].0, pair[0].1, pair[1].1)).collect()
    }

    /// The middle one of a number of every step.
    pub fn median(&self, number: impl Fn(&Step) -> Option<f64>) -> Option<f64> {
        let mut values: Vec<f64> = self.train().filter_map(number).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Metrics {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, text).expect("written");
        Metrics::read(&path).expect("read")
    }

    #[test]
    fn a_step_that_ran_again_counts_and_half_lines_do_not() {
        let metrics = parse(
            "{\"kind\":\"train\",\"step\":1,\"loss\":2.0,\"world_size\":4}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":1.5,\"world_size\":4}\n\
             {\"kind\":\"train\",\"step\":3,\"loss\":1.4,\"world_size\":4}\n\
             {\"kind\":\"checkpoint\",\"step\":1}\n\
             {\"kind\":\"checkpoint\",\"step\":3}\n\
             {\"kind\":\"eval\",\"step\":3,\"knn_top1\":99}\n\
             {\"kind\":\"train\",\"step\":4,\"lo\n\
             {\"kind\":\"restart\",\"step\":1,\"generation\":1}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":1.25,\"world_size\":2}\n\
             {\"kind\":\"eval\",\"step\":2,\"knn_top1\":51.25,\"knn_raw_pixels\":20,\"protocol\":\"k = 200\"}\n\
             {\"kind\":\"unknown\",\"step\":9}\n[]\n",
        );
        let losses: Vec<f64> = metrics.train().filter_map(|line| line.loss).collect();
        assert_eq!(losses, [2.0, 1.25], "the run stands at step 2");
        assert_eq!(metrics.last_train().expect("one").step, 2);
        assert_eq!(metrics.checkpoints.keys().collect::<Vec<_>>(), [&1], "that of step 3 was lost with it");
        assert_eq!(metrics.restarts().len(), 1);
        assert_eq!(metrics.world_changes(), [(2, 4, 2)]);
        let eval = metrics.last_eval().expect("one");
        assert_eq!(
            eval.table(),
            ["kNN top-1, trained        51.2 %", "kNN top-1, raw pixels     20.0 %", "protocol: k = 200"]
        );
    }

    #[test]
    fn without_its_steps_a_run_says_the_same_of_everything_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let text = "{\"kind\":\"eval\",\"step\":1,\"knn_top1\":1}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":2.0}\n\
             {\"kind\":\"eval\",\"step\":2,\"knn_top1\":2}\n\
             {\"kind\":\"restart\",\"step\":1,\"generation\":1}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":1.5}\n\
             {\"kind\":\"checkpoint\",\"step\":2}\n\
             {\"kind\":\"train\",\"st";
        std::fs::write(&path, text).expect("written");
        let (with, without) =
            (Metrics::read(&path).expect("read"), Metrics::read_without_steps(&path).expect("read"));
        assert_eq!((with.train().count(), without.train().count()), (1, 0));
        assert_eq!(without.last_train().expect("one").number("loss"), Some(1.5));
        assert_eq!(without.last_eval().expect("one").step, 1, "that of step 2 was lost");
        assert_eq!(with.last_train(), without.last_train());
        assert_eq!(with.last_eval(), without.last_eval());
        assert_eq!(with.checkpoints().collect::<Vec<_>>(), without.checkpoints().collect::<Vec<_>>());
        assert_eq!(with.restarts(), without.restarts());
    }

    #[test]
    fn an_evaluation_on_other_data_replaces_none_of_the_runs_own() {
        let own = "{\"kind\":\"eval\",\"step\":2,\"knn_top1\":50}\n";
        let other = "{\"kind\":\"eval\",\"step\":2,\"knn_top1\":99,\"data\":\"/b\"}\n";
        for text in [own.to_owned() + other, other.to_owned() + own] {
            let metrics = parse(&text);
            assert_eq!(metrics.last_eval().expect("one").number("knn_top1"), Some(50.0), "{text}");
            assert_eq!(metrics.eval_to_show(9).expect("one").number("knn_top1"), Some(50.0), "{text}");
            assert_eq!(metrics.eval_anywhere().len(), 2);
        }
        let at = |step: u32, data: &str, top1: u32| {
            format!("{{\"kind\":\"eval\",\"step\":{step},\"knn_top1\":{top1},\"data\":\"{data}\"}}\n")
        };
        let metrics = parse(&[own, &at(4, "/c", 1), &at(4, "/b", 2), &at(4, "/c", 3)].concat());
        let shown =
            |step| metrics.eval_to_show(step).map(|line| (line.step, line.on(), line.number("knn_top1")));
        assert_eq!(shown(4), Some((4, " on /c".into(), Some(3.0))), "none of its own at that step");
        assert_eq!(shown(3), Some((2, String::new(), Some(50.0))));
        assert_eq!(shown(1), None);
        assert_eq!(metrics.eval_elsewhere().count(), 2, "a data set counts once");
        // A stretch that was lost takes them with it.
        let metrics = parse(&(at(4, "/c", 1) + "{\"kind\":\"train\",\"step\":3}\n"));
        assert_eq!(metrics.eval_to_show(9), None);
    }

    #[test]
    fn time_in_which_nothing_ran_is_no_training() {
        let line = |step: u32, time: f64| {
            format!("{{\"kind\":\"train\",\"step\":{step},\"time\":{time},\"step_ms\":2000}}\n")
        };
        let day = 86_400.0;
        let text: String = [(1, 0.0), (2, 2.0), (12, 25.0), (13, day), (14, day + 3.0)]
            .map(|(step, at)| line(step, at))
            .concat();
        let metrics = parse(&text);
        assert_eq!(metrics.training_s(), Some(2.0 + 23.0 + 2.0 + 3.0));
        assert_eq!(metrics.last_time(), Some(day + 3.0));
        assert_eq!(parse(&line(1, 5.0)).training_s(), Some(0.0));
        assert_eq!(parse("").training_s(), None);
        let text = line(1, 5.0) + "{\"kind\":\"eval\",\"step\":1,\"time\":70}\n";
        assert_eq!(parse(&text).last_time(), Some(70.0));
    }

    #[test]
    fn a_file_is_read_on_as_it_grows() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::default();
        metrics.read_on(&path).expect("no file is no metrics");
        let steps = |metrics: &Metrics| metrics.train().map(|line| line.step).collect::<Vec<_>>();
        std::fs::write(&path, "{\"kind\":\"train\",\"step\":1}\n{\"kind\":\"train\",").expect("written");
        metrics.read_on(&path).expect("read");
        assert_eq!(steps(&metrics), [1]);
        std::fs::write(&path, "{\"kind\":\"train\",\"step\":1}\n{\"kind\":\"train\",\"step\":2}\n")
            .expect("written");
        metrics.read_on(&path).expect("read");
        assert_eq!(steps(&metrics), [1, 2]);
        std::fs::write(&path, "{\"kind\":\"train\",\"step\":7}\n").expect("written");
        metrics.read_on(&path).expect("read");
        assert_eq!(steps(&metrics), [7], "another file");
    }
}
