//! Where a device's time goes: what `bench step --kernels` says.

use std::collections::HashMap;

use mentee_torch_ext::ProfiledEvent;

/// What ran during some steps; per step.
#[derive(Debug, serde::Serialize)]
pub struct Kernels {
    /// From the first one's start to the last one's end, milliseconds.
    pub span_ms: f64,
    /// During which something ran, milliseconds.
    pub busy_ms: f64,
    /// The rest, percent of the span.
    pub idle_percent: f64,
    /// The longest first.
    pub each: Vec<Kernel>,
}

/// Everything of one name.
#[derive(Debug, PartialEq, serde::Serialize)]
pub struct Kernel {
    /// As the compiler or the library names it.
    pub name: String,
    /// All its runs together, milliseconds a step.
    pub ms: f64,
    /// Runs a step.
    pub calls: f64,
}

impl Kernels {
    /// Of what ran in `steps` steps.
    pub fn of(mut events: Vec<ProfiledEvent>, steps: u64) -> Self {
        let a_step = |ns: u64| ns as f64 / 1e6 / steps as f64;
        events.sort_by_key(|event| event.start_ns);
        let first = events.first().map_or(0, |event| event.start_ns);
        let (mut busy, mut end) = (0, first);
        let mut of_name: HashMap<String, (u64, u64)> = HashMap::new();
        for ProfiledEvent { name, start_ns, duration_ns } in events {
            let until = start_ns + duration_ns;
            busy += until.saturating_sub(start_ns.max(end));
            end = end.max(until);
            let (ns, calls) = of_name.entry(name).or_default();
            *ns += duration_ns;
            *calls += 1;
        }
        let mut each: Vec<Kernel> = of_name
            .into_iter()
            .map(|(name, (ns, calls))| Kernel { name, ms: a_step(ns), calls: calls as f64 / steps as f64 })
            .collect();
        each.sort_by(|a, b| b.ms.total_cmp(&a.ms).then_with(|| a.name.cmp(&b.name)));
        let (span_ms, busy_ms) = (a_step(end - first), a_step(busy));
        let idle_percent = if span_ms > 0.0 { 100.0 * (span_ms - busy_ms) / span_ms } else { 0.0 };
        Self { span_ms, busy_ms, idle_percent, each }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, start_ms: u64, ms: u64) -> ProfiledEvent {
        ProfiledEvent { name: name.to_owned(), start_ns: start_ms * 1_000_000, duration_ns: ms * 1_000_000 }
    }

    #[test]
    fn times_are_summed_by_name_and_what_overlaps_counts_once() {
        // 10..14, 12..13 within it, 13..17 half beyond it, then nothing until 18..20.
        let events = vec![event("b", 18, 2), event("a", 10, 4), event("copy", 12, 1), event("a", 13, 4)];
        let found = Kernels::of(events, 2);
        assert_eq!((found.span_ms, found.busy_ms, found.idle_percent), (5.0, 4.5, 10.0));
        let names: Vec<_> =
            found.each.iter().map(|kernel| (&*kernel.name, kernel.ms, kernel.calls)).collect();
        assert_eq!(names, [("a", 4.0, 1.0), ("b", 1.0, 0.5), ("copy", 0.5, 0.5)]);
    }

    #[test]
    fn nothing_ran() {
        let found = Kernels::of(Vec::new(), 3);
        assert_eq!((found.span_ms, found.busy_ms, found.idle_percent), (0.0, 0.0, 0.0));
        assert!(found.each.is_empty());
    }
}
