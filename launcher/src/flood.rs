//! Warnings of many ranks on one terminal: what all of them say is said once, and no more lines than a person reads.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The same words again within this time are only counted.
const AGAIN: Duration = Duration::from_secs(60);
/// So many lines in [`WINDOW`] are shown.
const MOST: usize = 5;
/// See [`MOST`].
const WINDOW: Duration = Duration::from_secs(10);
/// Words that are remembered.
const MEMORY: usize = 1000;

/// Decides what is shown.
#[derive(Debug, Default)]
pub struct Flood {
    seen: HashMap<String, Instant>,
    shown: Vec<Instant>,
    held_back: usize,
}

impl Flood {
    /// What to show for a line that comes at `now`: itself, after a word on those that were held back, or nothing.
    pub fn pass(&mut self, now: Instant, line: &str) -> Vec<String> {
        let words = key(line);
        if self.seen.len() > MEMORY {
            self.seen.retain(|_, at| now.saturating_duration_since(*at) < AGAIN);
        }
        let known = self.seen.get(&words).is_some_and(|&at| now.saturating_duration_since(at) < AGAIN);
        self.shown.retain(|&at| now.saturating_duration_since(at) < WINDOW);
        if known || self.shown.len() >= MOST || self.seen.len() > MEMORY {
            self.held_back += 1;
            return Vec::new();
        }
        self.seen.insert(words, now);
        self.shown.push(now);
        self.left().into_iter().chain([line.to_owned()]).collect()
    }

    /// A word on what was held back since the last one.
    pub fn left(&mut self) -> Option<String> {
        let count = std::mem::take(&mut self.held_back);
        (count > 0).then(|| {
            let plural = if count == 1 { "" } else { "s" };
            format!("({count} more warning{plural} like these: mentee logs RUN --level warn)")
        })
    }
}

/// A line without its numbers: what ranks, steps and samples have in common.
fn key(line: &str) -> String {
    line.chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_ranks_say_is_said_once() {
        let (mut flood, now) = (Flood::default(), Instant::now());
        let line = |rank: u32| format!("warning: rank {rank}: 4 threads on 2 cores");
        assert_eq!(flood.pass(now, &line(0)), [line(0)]);
        for rank in 1..64 {
            assert!(flood.pass(now, &line(rank)).is_empty());
        }
        let other = flood.pass(now, "warning: rank 1: another");
        assert_eq!(other.len(), 2);
        assert!(other[0].starts_with("(63 more warnings"), "{other:?}");
        assert_eq!(flood.pass(now + AGAIN, &line(5)), [line(5)], "a minute later it is news again");
        assert_eq!(flood.left(), None);
    }

    #[test]
    fn many_different_warnings_are_held_back() {
        let (mut flood, now) = (Flood::default(), Instant::now());
        let name = |n: u8| format!("warning: {}", char::from(b'a' + n));
        let shown = (0..26).filter(|&n| !flood.pass(now, &name(n)).is_empty()).count();
        assert_eq!(shown, MOST);
        assert_eq!(flood.pass(now + WINDOW, &name(20)).len(), 2, "and shown when it is calm again");
    }
}
