//! Reading what a run leaves behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use crate::process::{LIMIT, Running};

/// Every complete line of `metrics.jsonl`, in order; empty when there is no such file yet.
pub fn metrics(run_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete
        .lines()
        .map(|line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("metrics.jsonl: {error}: {line}"))
        })
        .collect()
}

/// Loss by step. After a restart the last line of a step counts.
pub fn losses(run_dir: &Path) -> BTreeMap<u64, f64> {
    metrics(run_dir)
        .iter()
        .filter(|line| line["kind"] == "train")
        .map(|line| {
            let step = line["step"].as_u64().unwrap_or_else(|| panic!("no step in {line}"));
            let loss = line["loss"].as_f64().unwrap_or_else(|| panic!("no loss in {line}"));
            (step, loss)
        })
        .collect()
}

/// Waits until the run has logged at least `count` train lines; panics when it ends or hangs before.
pub fn wait_for_lines(run_dir: &Path, count: usize, running: &mut Running) {
    let since = Instant::now();
    loop {
        let lines = metrics(run_dir).iter().filter(|line| line["kind"] == "train").count();
        if lines >= count {
            return;
        }
        assert!(!running.has_ended(), "the run ended after {lines} of {count} steps");
        assert!(since.elapsed() < LIMIT, "no {count} steps within {LIMIT:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The complete checkpoints, oldest first: step and folder.
pub fn checkpoints(run_dir: &Path) -> Vec<(u64, PathBuf)> {
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(run_dir.join("checkpoints"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect::<Vec<_>>())
        .unwrap_or_default()
        .into_iter()
        .filter(|path| path.join("manifest.json").is_file())
        .filter_map(|path| {
            let step = path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    found.sort();
    found
}

/// The newest checkpoint's step and the digest of all its state.
pub fn final_state(run_dir: &Path) -> (u64, String) {
    let (step, path) = checkpoints(run_dir).pop().expect("a checkpoint");
    let manifest = fs::read_to_string(path.join("manifest.json")).expect("the manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("the manifest is JSON");
    let digest = manifest["state_digest"].as_str().unwrap_or_else(|| panic!("no state_digest in {manifest}"));
    (step, digest.to_owned())
}

/// What says how a run directory stands just now, and is written anew by every command.
const CURRENT: [&str; 3] = [".lock", "status.json", "report.html"];

/// The contents of every file below `dir`, by path relative to it, without those of [`CURRENT`].
pub fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(base: &Path, dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(base, &path, found);
            } else if !CURRENT.iter().any(|name| entry.file_name() == *name) {
                let name = path.strip_prefix(base).expect("below the base").to_path_buf();
                found.insert(name, fs::read(&path).expect("a readable file"));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// Panics unless every file of `before` is still there: lines may have been added to logs and metrics, nothing else changed.
pub fn assert_kept(before: &BTreeMap<PathBuf, Vec<u8>>, dir: &Path) {
    let after = snapshot(dir);
    for (path, bytes) in before {
        let now = after.get(path).unwrap_or_else(|| panic!("{} is gone", path.display()));
        let kept = if path.extension().is_some_and(|e| e == "jsonl" || e == "log") {
            now.starts_with(bytes)
        } else {
            now == bytes
        };
        assert!(kept, "{} was changed", path.display());
    }
}
