//! Batch-norm statistics on devices, and how far the host may run ahead of them.
//!
//! Sums of statistics go onto the stream that computes, and the host does not wait for them. But a stream takes about a
//! thousand launches, which a deep network has between two waits: the next launch then waits inside the driver, where no
//! deadline holds. So a mark is left behind every [`EVERY`] sums, and the host waits for the oldest of [`MARKS`], under the
//! deadline that all sums have. The device notices nothing: it always has at least so much work before it.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mentee_collectives::{
    DeviceBuffer, DeviceCollectives, DeviceError, DeviceErrorKind, DeviceType, Event, EventError, Stream,
    Ticket,
};
use mentee_ssl::SslError;
use mentee_torch_ext::DeviceReduce;

use crate::error::WorkerError;
use crate::waits::Waits;

/// Sums between two marks: of a norm and its passes there are about ten launches each.
const EVERY: u64 = 16;
/// Marks that the device may be behind.
const MARKS: usize = 2;

/// A point behind all that this thread's stream has been given.
pub type Mark = Box<dyn Fn() -> Result<Arc<dyn Event>, SslError> + Send + Sync>;

/// See the module.
pub struct Ahead {
    group: Arc<dyn DeviceCollectives>,
    mark: Mark,
    patience: Duration,
    waits: Arc<Waits>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last sum that was called.
    last: Option<Ticket>,
    /// Points behind sums, oldest first, that nobody has waited for.
    marks: VecDeque<(Ticket, Arc<dyn Event>)>,
    /// The first failure.
    failed: Option<DeviceError>,
}

impl Ahead {
    /// Of sums over `group`; a rank waits for the others as long as `patience`, which `waits` hears of.
    pub fn new(
        group: Arc<dyn DeviceCollectives>,
        mark: Mark,
        patience: Duration,
        waits: Arc<Waits>,
    ) -> Arc<Self> {
        Arc::new(Self { group, mark, patience, waits, state: Mutex::default() })
    }

    /// The closure by which batch norms sum their statistics.
    pub fn reduce(self: &Arc<Self>) -> DeviceReduce {
        let ahead = self.clone();
        Arc::new(move |values: *mut c_void, n: usize, stream: *mut c_void| {
            // SAFETY: n doubles that live until libtorch's stream has passed their use.
            let (buffer, stream) =
                unsafe { (DeviceBuffer::new(values, n, DeviceType::F64), Stream::from_raw(stream)) };
            ahead.noted(ahead.sum(buffer, stream)).is_ok()
        })
    }

    fn sum(&self, buffer: DeviceBuffer, stream: Stream) -> Result<(), DeviceError> {
        let ticket = self.group.all_reduce_sum(buffer, stream)?;
        self.lock().last = Some(ticket);
        if ticket.number() % EVERY != EVERY - 1 {
            return Ok(());
        }
        let mark = self.watched(ticket)?;
        let oldest = {
            let mut state = self.lock();
            state.marks.push_back((ticket, mark));
            if state.marks.len() > MARKS { state.marks.pop_front() } else { None }
        };
        oldest.map_or(Ok(()), |(ticket, mark)| self.wait(ticket, &*mark))
    }

    /// Leaves a mark behind what the stream has been given, for the report of a hang elsewhere: it says how far sums have come.
    pub fn mark(&self) -> Result<(), DeviceError> {
        let last = self.lock().last;
        last.map_or(Ok(()), |ticket| self.watched(ticket).map(drop))
    }

    /// Waits until the stream that computes has passed all it was given: before a copy to host memory, which would wait
    /// without end for a rank that did not come to a sum of statistics.
    pub fn settle(&self) -> Result<(), WorkerError> {
        let Some(ticket) = self.lock().last else { return Ok(()) }; // no other rank is waited for
        let waited = self.behind().and_then(|mark| self.wait(ticket, &*mark));
        self.noted(waited).map_err(|said| WorkerError::Failed(said.to_string()))
    }

    /// The error of a step that ended because statistics could not be summed: that of the sum.
    pub fn explain(&self, error: WorkerError) -> WorkerError {
        match (error, self.lock().failed.take()) {
            (WorkerError::Step { step, .. }, Some(source)) => {
                WorkerError::DeviceCollective { step, source: Box::new(source) }
            }
            (error, _) => error,
        }
    }

    fn wait(&self, ticket: Ticket, mark: &dyn Event) -> Result<(), DeviceError> {
        self.waits.of_device(|| self.group.wait(ticket, mark, self.patience))
    }

    fn watched(&self, ticket: Ticket) -> Result<Arc<dyn Event>, DeviceError> {
        let mark = self.behind()?;
        self.group.watch(ticket, mark.clone());
        Ok(mark)
    }

    fn behind(&self) -> Result<Arc<dyn Event>, DeviceError> {
        (self.mark)().map_err(|error| DeviceError {
            call: "a mark behind batch-norm statistics".into(),
            rank: self.group.rank(),
            world_size: self.group.world_size(),
            kind: DeviceErrorKind::Device(EventError(error.to_string())),
            report: Box::default(),
        })
    }

    /// Keeps the first failure: libtorch only hears that there is one.
    fn noted<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if let Err(error) = &result {
            self.lock().failed.get_or_insert_with(|| error.clone());
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Sums that are complete at once, but for those behind a hung one.
    #[derive(Default)]
    struct Fake {
        sums: AtomicU64,
        waited: Mutex<Vec<u64>>,
        watched: Mutex<Vec<u64>>,
        hangs_at: Option<u64>,
    }

    struct Done;

    impl Event for Done {
        fn is_complete(&self) -> Result<bool, EventError> {
            Ok(true)
        }
    }

    impl DeviceCollectives for Fake {
        fn rank(&self) -> u32 {
            0
        }
        fn world_size(&self) -> u32 {
            2
        }
        fn all_reduce_sum(&self, _: DeviceBuffer, _: Stream) -> Result<Ticket, DeviceError> {
            Ok(Ticket::numbered(self.sums.fetch_add(1, Ordering::Relaxed)))
        }
        fn broadcast(&self, _: DeviceBuffer, _: u32, _: Stream) -> Result<Ticket, DeviceError> {
            unreachable!()
        }
        fn watch(&self, ticket: Ticket, _: Arc<dyn Event>) {
            self.watched.lock().unwrap().push(ticket.number());
        }
        fn wait(&self, ticket: Ticket, _: &dyn Event, patience: Duration) -> Result<(), DeviceError> {
            self.waited.lock().unwrap().push(ticket.number());
            if self.hangs_at.is_none_or(|sum| ticket.number() < sum) {
                return Ok(());
            }
            let kind = DeviceErrorKind::NotComplete { waited: patience };
            let call = format!("sum {}", ticket.number()).into();
            Err(DeviceError { call, rank: 0, world_size: 2, kind, report: Box::default() })
        }
        fn check(&self) -> Result<(), DeviceError> {
            Ok(())
        }
        fn lane(&self, _: &str) -> Result<Arc<dyn DeviceCollectives>, DeviceError> {
            unreachable!()
        }
        fn finish(&self) -> Result<(), DeviceError> {
            Ok(())
        }
        fn abort(&self, _: i32) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    fn ahead(hangs_at: Option<u64>) -> (Arc<Ahead>, Arc<Fake>) {
        let fake = Arc::new(Fake { hangs_at, ..Fake::default() });
        let mark: Mark = Box::new(|| Ok(Arc::new(Done)));
        (Ahead::new(fake.clone(), mark, Duration::from_secs(7), Arc::default()), fake)
    }

    #[test]
    fn the_host_is_a_few_dozen_sums_ahead_and_no_more() {
        let (ahead, fake) = ahead(None);
        let reduce = ahead.reduce();
        let mut furthest = 0;
        for sum in 0..200u64 {
            assert!(reduce(std::ptr::null_mut(), 8, std::ptr::null_mut()));
            let seen = fake.waited.lock().unwrap().last().map_or(0, |last| last + 1);
            furthest = furthest.max(sum + 1 - seen);
        }
        assert_eq!(furthest, EVERY * (MARKS as u64 + 1) - 1);
        assert_eq!(fake.waited.lock().unwrap()[..3], [15, 31, 47]);
        ahead.mark().unwrap();
        assert_eq!(fake.watched.lock().unwrap().last(), Some(&199));
        ahead.settle().unwrap();
        assert_eq!(fake.waited.lock().unwrap().last(), Some(&199));
    }

    #[test]
    fn a_rank_that_does_not_come_ends_the_pass_with_the_sum_that_hangs() {
        let (ahead, _) = ahead(Some(20));
        let reduce = ahead.reduce();
        let done = (0..200).take_while(|_| reduce(std::ptr::null_mut(), 8, std::ptr::null_mut())).count();
        assert_eq!(done, 63, "16 sums a mark, the fourth of which waits for the second");
        let torch = WorkerError::Step { step: 4, source: SslError::from(tch::TchError::Torch("x".into())) };
        let error = ahead.explain(torch);
        assert!(error.to_string().contains("sum 31"), "{error}");
        assert!(matches!(error, WorkerError::DeviceCollective { step: 4, .. }));
    }

    #[test]
    fn without_any_sum_nobody_is_waited_for() {
        let (ahead, fake) = ahead(Some(0));
        ahead.mark().unwrap();
        ahead.settle().unwrap();
        assert!(fake.waited.lock().unwrap().is_empty());
    }
}
