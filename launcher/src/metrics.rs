//! Reading `metrics.jsonl`: one JSON object a line. A line that a killed worker left unfinished is skipped; of a step
//! that ran twice, the last line counts.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::failure::Failure;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its step.
    pub step: u64,
    /// All of it.
    #[serde(rename = "values")]
    pub object: Map<String, Value>,
}

impl Line {
    /// A number of it.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.object.get(key)?.as_f64()
    }

    /// A text of it.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.object.get(key)?.as_str()
    }

    /// An eval line as a table for people: the number, its floors, its protocol.
    pub fn table(&self) -> Vec<String> {
        let rows = [
            ("kNN top-1, trained", "knn_top1"),
            ("kNN top-1, random init", "knn_random_init"),
            ("kNN top-1, raw pixels", "knn_raw_pixels"),
            ("linear top-1, trained", "linear_top1"),
            ("linear, random init", "linear_random_init"),
            ("linear, raw pixels", "linear_raw_pixels"),
        ];
        let mut lines: Vec<String> = rows
            .iter()
            .filter_map(|(name, key)| Some(format!("{name:<24}{:>6.1} %", self.number(key)?)))
            .collect();
        if let Some(protocol) = self.text("protocol") {
            lines.push(format!("protocol: {protocol}"));
        }
        lines
    }
}

/// A run's metrics.
#[derive(Debug, Default)]
pub struct Metrics {
    train: BTreeMap<u64, Line>,
    eval: BTreeMap<u64, Line>,
    restarts: Vec<Line>,
}

impl Metrics {
    /// Reads a file; no file is no metrics.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read(path: &Path) -> Result<Metrics, Failure> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(Metrics::parse(&String::from_utf8_lossy(&bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Metrics::default()),
            Err(error) => Err(Failure::io("read", path, &error)),
        }
    }

    fn parse(text: &str) -> Metrics {
        let mut metrics = Metrics::default();
        for line in text.lines() {
            let Ok(Value::Object(object)) = serde_json::from_str(line) else { continue };
            let Some(step) = object.get("step").and_then(Value::as_u64) else { continue };
            let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
            let line = Line { step, object };
            match kind.as_str() {
                "train" => drop(metrics.train.insert(step, line)),
                "eval" => drop(metrics.eval.insert(step, line)),
                "restart" => metrics.restarts.push(line),
                _ => {}
            }
        }
        metrics
    }

    /// One line a logged step, in order.
    pub fn train(&self) -> impl Iterator<Item = &Line> {
        self.train.values()
    }

    /// Evaluations, in order.
    pub fn eval(&self) -> impl Iterator<Item = &Line> {
        self.eval.values()
    }

    /// Restarts, in the order they happened.
    pub fn restarts(&self) -> &[Line] {
        &self.restarts
    }

    /// The newest step.
    pub fn last_train(&self) -> Option<&Line> {
        self.train.values().next_back()
    }

    /// The newest evaluation.
    pub fn last_eval(&self) -> Option<&Line> {
        self.eval.values().next_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_a_step_counts_and_half_lines_do_not() {
        let metrics = Metrics::parse(
            "{\"kind\":\"train\",\"step\":1,\"loss\":2.0}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":1.5}\n\
             {\"kind\":\"train\",\"step\":3,\"lo\n\
             {\"kind\":\"restart\",\"step\":1,\"generation\":1}\n\
             {\"kind\":\"train\",\"step\":2,\"loss\":1.25}\n\
             {\"kind\":\"eval\",\"step\":2,\"knn_top1\":51.25,\"knn_raw_pixels\":20,\"protocol\":\"k = 200\"}\n\
             {\"kind\":\"unknown\",\"step\":9}\n[]\n",
        );
        let losses: Vec<f64> = metrics.train().filter_map(|line| line.number("loss")).collect();
        assert_eq!(losses, [2.0, 1.25]);
        assert_eq!(metrics.restarts().len(), 1);
        let eval = metrics.last_eval().expect("one");
        assert_eq!(
            eval.table(),
            ["kNN top-1, trained        51.2 %", "kNN top-1, raw pixels     20.0 %", "protocol: k = 200"]
        );
    }
}
