//! The last operations of a group and its lanes, for the report of a hang.

use std::{
    collections::VecDeque,
    fmt::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    DeviceType, Event, Operation, Ticket,
    device::{Record, RecordState},
};

/// How many operations of a line are remembered.
pub const HISTORY: usize = 64;

/// A ring of operations for each line of calls. Its lock is its own, so that a report can be made while a thread is stuck inside NCCL.
#[derive(Default)]
pub(super) struct History(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    lines: Vec<Line>,
}

/// The group's own calls, or those of a lane.
struct Line {
    name: Option<Arc<str>>,
    entries: VecDeque<Entry>,
    /// Operations that it has had.
    count: u64,
    /// Somebody asks which of them are complete.
    is_watched: bool,
}

struct Entry {
    record: Record,
    event: Option<Arc<dyn Event>>,
}

impl History {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Consistent between any two statements below.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new line of calls; lines are numbered in this order.
    pub(super) fn line(&self, name: Option<Arc<str>>) -> usize {
        let mut inner = self.lock();
        inner.lines.push(Line { name, entries: VecDeque::new(), count: 0, is_watched: false });
        inner.lines.len() - 1
    }

    /// "the group" or "lane NAME".
    pub(super) fn name(&self, line: usize) -> String {
        match self.lock().lines.get(line).and_then(|line| line.name.clone()) {
            Some(name) => format!("lane {name}"),
            None => "the group".to_owned(),
        }
    }

    /// Remembers that an operation was called.
    pub(super) fn called(
        &self,
        line: usize,
        operation: Operation,
        elements: usize,
        element_type: DeviceType,
    ) -> Ticket {
        let mut inner = self.lock();
        let Line { name, entries, count, .. } = &mut inner.lines[line];
        let (lane, number) = (name.clone(), *count);
        *count += 1;
        let (called, state) = (Instant::now(), RecordState::Called);
        let record = Record { number, operation, elements, element_type, lane, called, state };
        if entries.len() == HISTORY {
            entries.pop_front();
        }
        entries.push_back(Entry { record, event: None });
        Ticket { line, number }
    }

    /// The library has put it on its stream.
    pub(super) fn enqueued(&self, ticket: Ticket) {
        if let Some(entry) = self.lock().find(ticket) {
            entry.record.state = RecordState::Enqueued(Instant::now());
        }
    }

    /// Somebody waits for an operation.
    pub(super) fn asked(&self, ticket: Ticket) {
        self.lock().lines[ticket.line].is_watched = true;
    }

    /// Keeps the event recorded behind an operation.
    pub(super) fn watch(&self, ticket: Ticket, event: Arc<dyn Event>) {
        let mut inner = self.lock();
        inner.lines[ticket.line].is_watched = true;
        if let Some(entry) = inner.find(ticket) {
            entry.event = Some(event);
        }
    }

    /// The stream has passed it, and so everything before it on its lane.
    pub(super) fn complete(&self, ticket: Ticket) {
        let seen = RecordState::Complete(Instant::now());
        let mut inner = self.lock();
        let line = &mut inner.lines[ticket.line];
        line.is_watched = true;
        for entry in &mut line.entries {
            let before = entry.record.number <= ticket.number;
            if before && !matches!(entry.record.state, RecordState::Complete(_)) {
                entry.record.state = seen;
                entry.event = None;
            }
        }
    }

    /// Asks the events that were left here. What the device says against one shows elsewhere.
    pub(super) fn look(&self) {
        let waiting: Vec<(Ticket, Arc<dyn Event>)> = {
            let inner = self.lock();
            let entries = inner
                .lines
                .iter()
                .enumerate()
                .flat_map(|(line, of)| of.entries.iter().map(move |e| (line, e)));
            entries
                .filter_map(|(line, entry)| {
                    Some((Ticket { line, number: entry.record.number }, entry.event.clone()?))
                })
                .collect()
        };
        for (ticket, event) in waiting {
            if event.is_complete() == Ok(true) {
                self.complete(ticket);
            }
        }
    }

    /// The operations that are remembered, oldest first.
    pub(super) fn records(&self) -> Vec<Record> {
        let inner = self.lock();
        let entries = inner.lines.iter().flat_map(|line| &line.entries);
        let mut records: Vec<Record> = entries.map(|entry| entry.record.clone()).collect();
        records.sort_by_key(|record| record.called);
        records
    }

    /// What one operation is: "all-reduce 117 of 2,359,296 f32 on lane gradients".
    pub(super) fn describe(&self, ticket: Ticket) -> String {
        match self.lock().find(ticket) {
            Some(entry) => describe(&entry.record),
            None => format!("operation {}", ticket.number),
        }
    }

    /// What is not complete, per lane the oldest and how many follow; on one line. Empty if nothing is open. Of a lane of which
    /// nobody knows what is complete, as batch-norm statistics in the order of the stream that computes, the last that was called.
    pub(super) fn report(&self, rank: u32) -> String {
        let (inner, now) = (self.lock(), Instant::now());
        let mut report = String::new();
        for line in &inner.lines {
            let is_open = |entry: &&Entry| !matches!(entry.record.state, RecordState::Complete(_));
            let mut open = line.entries.iter().filter(is_open);
            let first = if line.is_watched { open.next() } else { open.next_back() };
            let Some(Entry { record, .. }) = first else { continue };
            let start = if report.is_empty() { format!("rank {rank}: ") } else { "; ".to_owned() };
            let (how, since) = match record.state {
                RecordState::Enqueued(at) => ("enqueued", at),
                _ => ("called", record.called),
            };
            // Writing to a string cannot fail.
            let _ = write!(report, "{start}{} {how} {} ago, ", describe(record), age(now - since));
            report.push_str(match (how, line.is_watched) {
                ("enqueued", true) => "not complete",
                ("enqueued", false) => "the last",
                _ => "not on the stream yet",
            });
            let behind = if line.is_watched { open.count() } else { 0 };
            let last = line.entries.iter().rfind(|entry| !is_open(entry));
            let mut notes = Vec::new();
            if behind > 0 {
                notes.push(format!("{behind} behind it"));
            }
            if let Some(Entry { record, .. }) = last
                && let RecordState::Complete(seen) = record.state
            {
                notes.push(format!(
                    "{} {} seen complete {} ago",
                    record.operation,
                    record.number,
                    age(now - seen)
                ));
            }
            if !notes.is_empty() {
                let _ = write!(report, " ({})", notes.join(", "));
            }
        }
        report
    }
}

impl Inner {
    fn find(&mut self, ticket: Ticket) -> Option<&mut Entry> {
        self.lines[ticket.line].entries.iter_mut().rfind(|entry| entry.record.number == ticket.number)
    }
}

fn describe(record: &Record) -> String {
    let Record { number, operation, elements, element_type, lane, .. } = record;
    let lane = lane.as_ref().map(|name| format!(" on lane {name}")).unwrap_or_default();
    format!("{operation} {number} of {} {element_type}{lane}", grouped(*elements))
}

/// 2359296 as "2,359,296".
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn age(age: Duration) -> String {
    let seconds = age.as_secs_f64();
    if seconds < 9.95 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EventError;

    struct Fixed(Result<bool, EventError>);

    impl Event for Fixed {
        fn is_complete(&self) -> Result<bool, EventError> {
            self.0.clone()
        }
    }

    fn shift(history: &History, by: Duration) {
        for entry in history.lock().lines.iter_mut().flat_map(|line| &mut line.entries) {
            entry.record.called -= by;
            if let RecordState::Enqueued(at) | RecordState::Complete(at) = &mut entry.record.state {
                *at -= by;
            }
        }
    }

    #[test]
    fn a_report_names_the_oldest_open_operation_of_each_lane() {
        let history = History::default();
        let (group, lane) = (history.line(None), history.line(Some("gradients".into())));
        assert_eq!(history.report(3), "");
        for _ in 0..3 {
            let ticket = history.called(lane, Operation::AllReduceSum, 2_359_296, DeviceType::F32);
            history.enqueued(ticket);
        }
        history.complete(Ticket { line: lane, number: 0 });
        history.called(group, Operation::Broadcast, 999, DeviceType::Bf16);
        shift(&history, Duration::from_millis(31_200));
        assert_eq!(
            history.report(3),
            "rank 3: broadcast 0 of 999 bf16 called 31 s ago, not on the stream yet; \
             all-reduce 1 of 2,359,296 f32 on lane gradients enqueued 31 s ago, not complete \
             (1 behind it, all-reduce 0 seen complete 31 s ago)"
        );
        // What nobody asks after may long be complete: the last says how far this rank came.
        for _ in 0..2 * HISTORY {
            let ticket = history.called(group, Operation::AllReduceSum, 8, DeviceType::F64);
            history.enqueued(ticket);
        }
        let report = history.report(3);
        assert!(
            report.starts_with(
                "rank 3: all-reduce 128 of 8 f64 enqueued 0.0 s ago, the last; all-reduce 1 of 2"
            ),
            "{report}"
        );
        assert_eq!(
            history.describe(Ticket { line: lane, number: 1 }),
            "all-reduce 1 of 2,359,296 f32 on lane gradients"
        );
        assert_eq!(history.name(group), "the group");
        assert_eq!(history.name(lane), "lane gradients");
    }

    #[test]
    fn events_left_here_move_the_report() {
        let history = History::default();
        let line = history.line(None);
        let states = [Ok(true), Ok(true), Ok(false), Err(EventError("illegal".to_owned()))];
        for state in states {
            let ticket = history.called(line, Operation::AllReduceSum, 1, DeviceType::F64);
            history.enqueued(ticket);
            history.watch(ticket, Arc::new(Fixed(state)));
        }
        assert!(
            history.report(0).starts_with("rank 0: all-reduce 0 of 1 f64 enqueued 0.0 s ago, not complete")
        );
        history.look();
        assert!(history.report(0).starts_with("rank 0: all-reduce 2 "), "{}", history.report(0));
        let complete = |record: &Record| matches!(record.state, RecordState::Complete(_));
        assert_eq!(history.records().iter().map(complete).collect::<Vec<_>>(), [true, true, false, false]);
    }

    #[test]
    fn the_ring_forgets_the_oldest() {
        let history = History::default();
        let line = history.line(None);
        for _ in 0..HISTORY + 6 {
            history.called(line, Operation::AllReduceSum, 1, DeviceType::F32);
        }
        let numbers: Vec<u64> = history.records().iter().map(|record| record.number).collect();
        assert_eq!(numbers, (6..(HISTORY + 6) as u64).collect::<Vec<_>>());
        // What is forgotten can still be reported on, without harm.
        let forgotten = Ticket { line, number: 0 };
        history.enqueued(forgotten);
        history.complete(forgotten);
        assert_eq!(history.describe(forgotten), "operation 0");
        assert!(history.report(0).contains("all-reduce 6 "), "{}", history.report(0));
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (2_359_296, "2,359,296")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(age(Duration::from_millis(9960)), "10 s");
        assert_eq!(age(Duration::from_millis(9940)), "9.9 s");
    }
}
