//! Gradient buckets on a device: each is summed on a communication stream as soon as the stream that computes has completed it.
//!
//! ```text
//!   compute        backward … bucket 0 full ─┐ … bucket 1 full ─┐ …       ┌─► update
//!                                            ▼ event            ▼ event   │ event behind the last sum
//!   communication                            sum of bucket 0 ─► sum of bucket 1 ─► …
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mentee_collectives::{
    DeviceBuffer, DeviceCollectives, DeviceError, DeviceType, Event, EventError, Stream, Ticket,
};
use mentee_ssl::SslError;
use mentee_torch_ext::cuda;
use tch::{Kind, Tensor};

use crate::device::CudaMark;
use crate::error::WorkerError;

/// What communication cost in one step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Communication {
    /// Time spent summing gradients.
    pub total: Duration,
    /// The part of it that training waited for.
    pub exposed: Duration,
    /// Before that, the wait for this rank's own device to come to the end of backward.
    pub device: Duration,
}

/// The two streams of a lane.
pub trait Streams {
    /// A point on one of them.
    type Mark: Event + 'static;

    /// Behind what this thread's stream has been given.
    fn behind_compute(&self) -> Result<Self::Mark, SslError>;
    /// Behind what the communication stream has been given.
    fn behind_communication(&self) -> Result<Self::Mark, SslError>;
    /// What this thread's stream is given from now on waits for the mark.
    fn hold_compute(&self, mark: &Self::Mark) -> Result<(), SslError>;
    /// What the communication stream is given from now on waits for the mark.
    fn hold_communication(&self, mark: &Self::Mark) -> Result<(), SslError>;
    /// The communication stream.
    fn communication(&self) -> Stream;
}

/// libtorch's streams on one device.
pub struct CudaStreams {
    index: usize,
    communication: cuda::Stream,
    /// CUDA's name for it.
    handle: Stream,
}

impl CudaStreams {
    /// With a communication stream of its own.
    pub fn new(index: usize) -> Result<Self, SslError> {
        let communication = cuda::Stream::new(index)?;
        let before = communication.enter()?;
        let current = cuda::Stream::current(index);
        before.enter()?;
        let (_, handle) = current?;
        // SAFETY: libtorch's pool keeps its streams as long as the process.
        let handle = unsafe { Stream::from_raw(handle) };
        Ok(Self { index, communication, handle })
    }
}

impl Streams for CudaStreams {
    type Mark = CudaMark;

    fn behind_compute(&self) -> Result<CudaMark, SslError> {
        let (compute, _) = cuda::Stream::current(self.index)?;
        Ok(CudaMark(cuda::Event::record(compute)?))
    }

    fn behind_communication(&self) -> Result<CudaMark, SslError> {
        Ok(CudaMark(cuda::Event::record(self.communication)?))
    }

    fn hold_compute(&self, mark: &CudaMark) -> Result<(), SslError> {
        let (compute, _) = cuda::Stream::current(self.index)?;
        Ok(mark.0.block(compute)?)
    }

    fn hold_communication(&self, mark: &CudaMark) -> Result<(), SslError> {
        Ok(mark.0.block(self.communication)?)
    }

    fn communication(&self) -> Stream {
        self.handle
    }
}

/// See the module.
pub struct DeviceLane<S: Streams> {
    group: Arc<dyn DeviceCollectives>,
    streams: S,
    patience: Duration,
    /// Of every bucket, whether this rank's own gradient was finite: on the device.
    finite: Vec<Tensor>,
    /// The last sum and the point behind it.
    last: Option<(Ticket, Arc<S::Mark>)>,
    /// The first failure within a hook.
    failure: Option<Failure>,
}

enum Failure {
    Torch(SslError),
    Group(DeviceError),
}

impl From<SslError> for Failure {
    fn from(error: SslError) -> Self {
        Self::Torch(error)
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Group(error)
    }
}

impl Failure {
    fn at(self, step: u64) -> WorkerError {
        match self {
            Self::Torch(source) => WorkerError::Step { step, source },
            Self::Group(source) => WorkerError::DeviceCollective { step, source: Box::new(source) },
        }
    }
}

/// The end of the sums, and when backward was seen to have ended before.
struct Ends<M> {
    backward: M,
    sums: Arc<M>,
    backward_seen: Mutex<Option<Instant>>,
}

impl<M: Event> Event for Ends<M> {
    fn is_complete(&self) -> Result<bool, EventError> {
        let mut seen = self.backward_seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.is_none() && self.backward.is_complete()? {
            *seen = Some(Instant::now());
        }
        self.sums.is_complete()
    }
}

impl<S: Streams> DeviceLane<S> {
    /// Sums over `group`; a rank waits for the others as long as `patience`.
    pub fn new(group: Arc<dyn DeviceCollectives>, streams: S, patience: Duration) -> Self {
        Self { group, streams, patience, finite: Vec::new(), last: None, failure: None }
    }

    /// Before the first bucket of a step.
    pub fn begin(&mut self) {
        self.finite.clear();
        self.last = None;
    }

    /// Puts the sum of a bucket, which this thread's stream completes, on the communication stream. A failure is that of
    /// [`Self::finish`].
    pub fn send(&mut self, flat: &Tensor, range: Range<i64>) {
        if self.failure.is_none() {
            self.failure = self.put(flat, range).err();
        }
    }

    fn put(&mut self, flat: &Tensor, range: Range<i64>) -> Result<(), Failure> {
        let len = range.end - range.start;
        let bucket = flat.f_narrow(0, range.start, len)?;
        self.finite.push(bucket.f_isfinite()?.f_all()?);
        let element = if flat.kind() == Kind::Double { DeviceType::F64 } else { DeviceType::F32 };
        self.streams.hold_communication(&self.streams.behind_compute()?)?;
        // SAFETY: the flat gradient lives as long as the run; nobody touches this part of it before `finish`.
        let buffer = unsafe { DeviceBuffer::new(bucket.data_ptr(), len as usize, element) };
        let ticket = self.group.all_reduce_sum(buffer, self.streams.communication())?;
        let done = Arc::new(self.streams.behind_communication()?);
        self.group.watch(ticket, done.clone());
        self.last = Some((ticket, done));
        Ok(())
    }

    /// Lets this thread's stream wait for the sums, and waits on the host until they are there, under a deadline.
    pub fn finish(&mut self, step: u64) -> Result<Communication, WorkerError> {
        self.wait().map_err(|failure| failure.at(step))
    }

    fn wait(&mut self) -> Result<Communication, Failure> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let Some((ticket, sums)) = self.last.take() else { return Ok(Communication::default()) };
        let backward = self.streams.behind_compute()?;
        self.streams.hold_compute(&sums)?;
        let ends = Ends { backward, sums, backward_seen: Mutex::default() };
        let start = Instant::now();
        self.group.wait(ticket, &ends, self.patience)?;
        // The streams' own times are not measured: what of it training waited for is what the host sees.
        let seen = *ends.backward_seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = seen.unwrap_or_else(Instant::now);
        let exposed = seen.elapsed();
        Ok(Communication { total: exposed, exposed, device: seen - start })
    }

    /// Whether this rank's own gradient of the last step was finite before it was summed.
    pub fn was_finite(&self) -> Result<bool, tch::TchError> {
        if self.finite.is_empty() {
            return Ok(true);
        }
        Ok(Tensor::f_stack(&self.finite, 0)?.f_all()?.f_int64_value(&[])? != 0)
    }
}

#[cfg(test)]
mod tests {
    use mentee_collectives::DeviceErrorKind;
    use tch::Device;

    use super::*;

    /// What was asked of the streams and of the group, in order.
    type Log = Arc<Mutex<Vec<String>>>;

    struct FakeStreams {
        log: Log,
        marks: Mutex<u32>,
    }

    /// Its number; complete as soon as it is looked at.
    struct FakeMark(u32);

    impl Event for FakeMark {
        fn is_complete(&self) -> Result<bool, EventError> {
            Ok(true)
        }
    }

    impl FakeStreams {
        fn mark(&self, behind: &str) -> FakeMark {
            let mut marks = self.marks.lock().unwrap();
            *marks += 1;
            self.log.lock().unwrap().push(format!("mark {} behind {behind}", *marks));
            FakeMark(*marks)
        }

        fn hold(&self, stream: &str, mark: &FakeMark) {
            self.log.lock().unwrap().push(format!("{stream} waits for {}", mark.0));
        }
    }

    impl Streams for FakeStreams {
        type Mark = FakeMark;

        fn behind_compute(&self) -> Result<FakeMark, SslError> {
            Ok(self.mark("compute"))
        }

        fn behind_communication(&self) -> Result<FakeMark, SslError> {
            Ok(self.mark("communication"))
        }

        fn hold_compute(&self, mark: &FakeMark) -> Result<(), SslError> {
            self.hold("compute", mark);
            Ok(())
        }

        fn hold_communication(&self, mark: &FakeMark) -> Result<(), SslError> {
            self.hold("communication", mark);
            Ok(())
        }

        fn communication(&self) -> Stream {
            // SAFETY: the fake group looks at no stream.
            unsafe { Stream::from_raw(std::ptr::null_mut()) }
        }
    }

    struct FakeGroup {
        log: Log,
        /// The sum that fails.
        fails_at: Option<usize>,
        sums: Mutex<usize>,
    }

    impl FakeGroup {
        fn error() -> DeviceError {
            DeviceError {
                call: "sum".into(),
                rank: 0,
                world_size: 2,
                kind: DeviceErrorKind::Aborted,
                report: Box::default(),
            }
        }
    }

    impl DeviceCollectives for FakeGroup {
        fn rank(&self) -> u32 {
            0
        }

        fn world_size(&self) -> u32 {
            2
        }

        fn all_reduce_sum(&self, buffer: DeviceBuffer, _: Stream) -> Result<Ticket, DeviceError> {
            let mut sums = self.sums.lock().unwrap();
            if self.fails_at == Some(*sums) {
                return Err(Self::error());
            }
            *sums += 1;
            self.log.lock().unwrap().push(format!("sum of {} {}", buffer.len(), buffer.element_type()));
            Ok(Ticket::numbered(*sums as u64))
        }

        fn broadcast(&self, _: DeviceBuffer, _: u32, _: Stream) -> Result<Ticket, DeviceError> {
            Err(Self::error())
        }

        fn watch(&self, ticket: Ticket, _: Arc<dyn Event>) {
            self.log.lock().unwrap().push(format!("watch sum {}", ticket.number()));
        }

        fn wait(&self, ticket: Ticket, event: &dyn Event, _: Duration) -> Result<(), DeviceError> {
            assert!(event.is_complete().unwrap());
            self.log.lock().unwrap().push(format!("host waits for sum {}", ticket.number()));
            Ok(())
        }

        fn check(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn lane(&self, _: &str) -> Result<Arc<dyn DeviceCollectives>, DeviceError> {
            Err(Self::error())
        }

        fn finish(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn abort(&self, _: i32) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    fn lane(fails_at: Option<usize>) -> (DeviceLane<FakeStreams>, Log) {
        let log = Log::default();
        let group = Arc::new(FakeGroup { log: log.clone(), fails_at, sums: Mutex::default() });
        let streams = FakeStreams { log: log.clone(), marks: Mutex::default() };
        (DeviceLane::new(group, streams, Duration::from_secs(1)), log)
    }

    #[test]
    fn every_sum_waits_for_its_bucket_and_the_update_for_the_last_sum() {
        let (mut lane, log) = lane(None);
        let flat = Tensor::ones([10], (Kind::Float, Device::Cpu));
        for _ in 0..2 {
            lane.begin();
            lane.send(&flat, 4..10);
            lane.send(&flat, 0..4);
            lane.finish(0).unwrap();
            assert!(lane.was_finite().unwrap());
        }
        let step = |mark: u32, sum: u32| {
            [
                format!("mark {} behind compute", mark + 1),
                format!("communication waits for {}", mark + 1),
                "sum of 6 f32".into(),
                format!("mark {} behind communication", mark + 2),
                format!("watch sum {}", sum + 1),
                format!("mark {} behind compute", mark + 3),
                format!("communication waits for {}", mark + 3),
                "sum of 4 f32".into(),
                format!("mark {} behind communication", mark + 4),
                format!("watch sum {}", sum + 2),
                format!("mark {} behind compute", mark + 5),
                format!("compute waits for {}", mark + 4),
                format!("host waits for sum {}", sum + 2),
            ]
        };
        assert_eq!(*log.lock().unwrap(), [step(0, 0), step(5, 2)].concat());
    }

    #[test]
    fn a_sum_that_fails_ends_the_step_and_nothing_is_put_behind_it() {
        let (mut lane, log) = lane(Some(1));
        let flat = Tensor::ones([10], (Kind::Double, Device::Cpu));
        for range in [8..10, 4..8, 0..4] {
            lane.send(&flat, range);
        }
        let error = lane.finish(7).unwrap_err();
        assert!(matches!(error, WorkerError::DeviceCollective { step: 7, .. }), "{error}");
        assert_eq!(error.peers(), Some(Vec::new()));
        let sums = log.lock().unwrap().iter().filter(|line| line.starts_with("sum")).count();
        assert_eq!(sums, 1);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_seen_before_it_is_summed() {
        let (mut lane, _) = lane(None);
        let flat = Tensor::from_slice(&[1.0f32, 2.0, f32::NAN]);
        lane.send(&flat, 0..2);
        assert!(lane.was_finite().unwrap());
        lane.send(&flat, 2..3);
        assert!(!lane.was_finite().unwrap());
        lane.begin();
        assert!(lane.was_finite().unwrap());
    }
}
