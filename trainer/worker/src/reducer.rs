//! The mean gradient over the global batch, on every rank, while backward still runs.
//!
//! Each rank's loss is its share of the mean over the global batch (a sum over its samples divided by the global
//! batch), so the sum of all ranks' gradients is the mean gradient even when shares are unequal. Gradients lie in
//! one flat buffer, cut into buckets, which are reduced in place:
//!
//! ```text
//!   backward   ──► last block ──► … ──► first block ──► done
//!   hooks            bucket 0 is full     bucket n-1 is full
//!   this thread      └─► sum of bucket 0 ─► sum of bucket 1 ─► … (always in this order, on every rank)
//! ```
//!
//! One communication thread sums buckets in a lane of its own, so that batch norms can sum their statistics at the
//! same time on the thread that runs backward.
//!
//! On devices the hooks themselves put the sums on a communication stream, each behind an event of the stream that computes;
//! the update's stream waits for the last of them, and no thread is needed.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mentee_collectives::{Buffer, CollectiveError, Collectives};
use mentee_ssl::gradients::Gradients;
use mentee_ssl::layout::Layout;
use mentee_ssl::{SslError, State};
use mentee_torch_ext::{FlatSlice, SharedFlat, over_memory};
use tch::{Device, Tensor};

use crate::ahead::Ahead;
use crate::device::DeviceGroup;
use crate::error::WorkerError;
use crate::faults::{GradientFault, LAST};
use crate::lane::{Communication, CudaStreams, DeviceLane};

/// The first bucket has at most so many MiB, so that communication starts early.
const FIRST_BUCKET_MIB: f64 = 1.0;

/// A stretch of the flat gradient that is summed at once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bucket {
    range: Range<i64>,
    /// Indices of the parameters in it.
    parameters: Vec<usize>,
}

/// Cuts the flat gradient into buckets, in about the order in which backward fills them: from the end of the
/// convolution and linear parameters to their beginning, then what lies behind them (the norms, which are small).
/// `first` and `size` are elements; a parameter larger than that is a bucket of its own.
fn buckets(layout: &Layout, first: i64, size: i64) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut end = layout.compute_len;
    let mut parameters = Vec::new();
    let mut places: Vec<_> = layout.trained().filter(|(_, p)| p.range.start < layout.compute_len).collect();
    places.sort_by_key(|(_, place)| place.range.start);
    for (index, place) in places.into_iter().rev() {
        let limit = if buckets.is_empty() { first } else { size };
        if !parameters.is_empty() && end - place.range.start > limit {
            // The parameter that would overflow the bucket opens the next one; its padding stays behind it.
            let begin = next_start(layout, place.range.end);
            buckets.push(Bucket { range: begin..end, parameters: std::mem::take(&mut parameters) });
            end = begin;
        }
        parameters.push(index);
    }
    buckets.push(Bucket { range: 0..end, parameters });
    let norms: Vec<usize> = layout
        .trained()
        .filter(|(_, p)| p.range.start >= layout.compute_len)
        .map(|(index, _)| index)
        .collect();
    if layout.len > layout.compute_len {
        buckets.push(Bucket { range: layout.compute_len..layout.len, parameters: norms });
    }
    buckets
}

/// Where the parameter behind one that ends at `end` begins.
fn next_start(layout: &Layout, end: i64) -> i64 {
    layout.params().map(|place| place.range.start).filter(|&start| start >= end).min().unwrap_or(end)
}

/// How long the communication thread took for a bucket.
type Outcome = Result<Duration, CollectiveError>;

/// What the hooks of backward and the training loop share.
struct Round {
    /// All gradients.
    flat: Tensor,
    buckets: Vec<Bucket>,
    /// Of every parameter, by its index.
    bucket_of: Vec<Option<usize>>,
    /// Parameters of every bucket whose gradients are to come.
    missing: Vec<usize>,
    /// The next bucket to be summed.
    next: usize,
    /// Whether this backward pass is the last of its step.
    last_pass: bool,
    queue: Option<Sender<Range<usize>>>,
    /// On devices, instead of the queue.
    device: Option<DeviceLane<CudaStreams>>,
    /// On devices: batch-norm statistics of the same pass.
    statistics: Option<Arc<Ahead>>,
    /// What is to go wrong in this step.
    fault: Option<GradientFault>,
}

impl Round {
    fn begin(&mut self) {
        for (missing, bucket) in self.missing.iter_mut().zip(&self.buckets) {
            *missing = bucket.parameters.len();
        }
        self.next = 0;
        self.last_pass = false;
    }

    fn ready(&mut self, parameter: usize) {
        let Some(bucket) = self.bucket_of.get(parameter).copied().flatten().filter(|_| self.last_pass) else {
            return;
        };
        self.missing[bucket] = self.missing[bucket].saturating_sub(1);
        while self.next < self.buckets.len() && self.missing[self.next] == 0 {
            self.send();
        }
    }

    /// Hands the next bucket to the communication thread.
    fn send(&mut self) {
        let bucket = self.next;
        let range = self.buckets[bucket].range.clone();
        self.next += 1;
        if matches!(self.fault, Some(GradientFault::SkipBucket(skipped)) if bucket == skipped) {
            return;
        }
        if let Some(lane) = &mut self.device {
            return lane.send(&self.flat, range);
        }
        let Some(queue) = &self.queue else { return };
        // A thread that is gone has left its reason in the outcomes.
        let _ = queue.send(range.start as usize..range.end as usize);
    }
}

/// Sums gradients over ranks.
pub struct GradientReducer {
    round: Arc<Mutex<Round>>,
    lane: Option<HostLane>,
}

struct HostLane {
    outcomes: Receiver<Outcome>,
    buckets: usize,
    /// Buckets of this step whose outcome is to come.
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl GradientReducer {
    /// Over this group, in buckets of `bucket_mib`; over that of the devices, where the state is on one. Every rank calls
    /// it at the same point.
    pub fn new(
        collectives: &Arc<dyn Collectives>,
        group: Option<&DeviceGroup>,
        state: &mut State,
        bucket_mib: f64,
    ) -> Result<Self, WorkerError> {
        let layout = state.student.weights.layout.clone();
        let bytes = state.gradients.flat.kind().elt_size_in_bytes() as f64;
        let elements = |mib: f64| (mib * f64::from(1 << 20) / bytes) as i64;
        let buckets = buckets(&layout, elements(bucket_mib.min(FIRST_BUCKET_MIB)), elements(bucket_mib));
        let mut bucket_of = Vec::new();
        for (bucket, parameters) in buckets.iter().map(|b| &b.parameters).enumerate() {
            for &parameter in parameters {
                bucket_of.resize(bucket_of.len().max(parameter + 1), None);
                bucket_of[parameter] = Some(bucket);
            }
        }
        let count = buckets.len();
        let device = match (group, state.device()) {
            (Some(group), Device::Cuda(index)) => {
                let streams = CudaStreams::new(index)?;
                Some(DeviceLane::new(group.gradients.clone(), streams, group.patience))
            }
            _ => None,
        };
        let (lane, queue) = if device.is_none() && collectives.world_size() > 1 {
            let (queue, ranges) = channel();
            let (report, outcomes) = channel();
            let collectives = collectives.lane("gradients")?;
            share_memory(&*collectives, state)?;
            let flat = SharedFlat::new(&state.gradients.flat);
            let thread = std::thread::Builder::new()
                .name("gradients".into())
                .spawn(move || sum_all(&*collectives, &flat, &ranges, &report))
                .map_err(|error| WorkerError::Failed(format!("failed to start a thread: {error}")))?;
            (Some(HostLane { outcomes, buckets: count, in_flight: 0, thread: Some(thread) }), Some(queue))
        } else {
            (None, None)
        };
        let round = Arc::new(Mutex::new(Round {
            flat: state.gradients.flat.shallow_clone(),
            missing: vec![0; count],
            buckets,
            bucket_of,
            next: count,
            last_pass: false,
            queue,
            device,
            statistics: group.map(|group| group.ahead().clone()),
            fault: None,
        }));
        if collectives.world_size() > 1 {
            let hooked = round.clone();
            state.gradients.on_arrival(Box::new(move |parameter| lock(&hooked).ready(parameter)));
        }
        Ok(Self { round, lane })
    }

    /// Before the first backward pass of a step. `fault` goes wrong in this step.
    pub fn begin(&mut self, gradients: &Gradients, fault: Option<GradientFault>) {
        let mut round = lock(&self.round);
        round.begin();
        let last = round.buckets.len() - 1;
        let fault = match fault {
            Some(GradientFault::SkipBucket(LAST)) => Some(GradientFault::SkipBucket(last)),
            fault => fault,
        };
        round.fault = fault;
        if fault == Some(GradientFault::Nan) {
            round.buckets[0].parameters.last().into_iter().for_each(|&parameter| gradients.spoil(parameter));
        }
        if let Some(lane) = &mut round.device {
            lane.begin();
        }
        drop(round);
        if let Some(lane) = &mut self.lane {
            let skipped = matches!(fault, Some(GradientFault::SkipBucket(n)) if n < lane.buckets);
            lane.in_flight = lane.buckets - usize::from(skipped);
        }
    }

    /// Before the last backward pass of a step: from here on, a gradient that is complete is final.
    pub fn last_pass(&self) {
        lock(&self.round).last_pass = true;
    }

    /// After the last backward pass: every rank holds the sum.
    pub fn finish(&mut self, state: &mut State, step: u64) -> Result<Communication, WorkerError> {
        let start = Instant::now();
        {
            let mut round = lock(&self.round);
            // Parameters that the loss does not depend on have no gradient to wait for.
            let (gradients, layout) = (&mut state.gradients, &state.student.weights.layout);
            gradients.complete(layout).map_err(|source| WorkerError::Step { step, source })?;
            while round.next < round.buckets.len() {
                round.send();
            }
            if let Some(statistics) = &round.statistics {
                statistics
                    .mark()
                    .map_err(|source| WorkerError::DeviceCollective { step, source: Box::new(source) })?;
            }
            if let Some(lane) = &mut round.device {
                return lane.finish(step);
            }
        }
        let Some(lane) = &mut self.lane else { return Ok(Communication::default()) };
        let mut total = Duration::ZERO;
        while lane.in_flight > 0 {
            total += lane
                .outcomes
                .recv()
                .map_err(|_| WorkerError::Failed(format!("step {step}: the communication thread is gone")))?
                .map_err(|source| WorkerError::Collective { step, source })?;
            lane.in_flight -= 1;
        }
        let exposed = start.elapsed();
        // What is waited for also counts where the thread that sums was late.
        Ok(Communication { total: total.max(exposed), exposed, device: Duration::ZERO })
    }

    /// Whether this rank's own gradient of the last step was finite before it was summed.
    pub fn own_was_finite(&self, gradients: &Gradients) -> bool {
        // Asked for only when the sum is not. On a device without others nobody has looked: it is the sum.
        match &lock(&self.round).device {
            Some(lane) => lane.was_finite().unwrap_or(false),
            None => gradients.were_finite() && !gradients.flat.device().is_cuda(),
        }
    }
}

impl Drop for GradientReducer {
    fn drop(&mut self) {
        lock(&self.round).queue = None;
        let Some(lane) = &mut self.lane else { return };
        // Between steps the thread waits for work and ends with the queue. After a failure it may wait for a rank that
        // never comes: the process then ends without it.
        if let Some(thread) = lane.thread.take().filter(|_| lane.in_flight == 0) {
            let _ = thread.join();
        }
    }
}

fn lock(round: &Mutex<Round>) -> std::sync::MutexGuard<'_, Round> {
    round.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moves the gradients to memory that the group sums faster, where it has any.
fn share_memory(collectives: &dyn Collectives, state: &mut State) -> Result<(), WorkerError> {
    let flat = &state.gradients.flat;
    let (len, kind) = (flat.numel(), flat.kind());
    let memory = collectives.memory(len * kind.elt_size_in_bytes())?;
    let Some(memory) = memory else { return Ok(()) };
    // SAFETY: it is that long, aligned to a line, and lives as long as `memory`. Other ranks write to a bucket of it in
    // sums only, which this rank joins when it is done with the bucket, and leaves when they are.
    let flat = unsafe { over_memory(memory.as_ptr(), len as i64, kind, memory) };
    let moved = flat.map_err(SslError::from).and_then(|flat| state.move_gradients(flat));
    Ok(moved?)
}

/// The communication thread: sums every range that comes, until the queue ends or a sum fails.
fn sum_all(
    collectives: &dyn Collectives,
    flat: &SharedFlat,
    ranges: &Receiver<Range<usize>>,
    report: &Sender<Outcome>,
) {
    for range in ranges {
        let start = Instant::now();
        // SAFETY: a range is sent once a step, when all its gradients are complete; until its outcome is received
        // nobody else touches it.
        let result = collectives.all_reduce_sum(match unsafe { flat.range(range) } {
            FlatSlice::F32(slice) => Buffer::F32(slice),
            FlatSlice::F64(slice) => Buffer::F64(slice),
        });
        let failed = result.is_err();
        let outcome = result.map(|()| start.elapsed());
        if report.send(outcome).is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_the_gradient_once_in_reverse_order() {
        let recipe = mentee_config::Recipe::load("demo", &[]).unwrap();
        let (_, state) = mentee_ssl::state::new(&recipe).unwrap();
        let layout = &state.student.weights.layout;
        for (first, size) in [(1, 1), (10_000, 50_000), (1 << 40, 1 << 40)] {
            let buckets = buckets(layout, first, size);
            let (norms, weights) = buckets.split_last().unwrap();
            assert_eq!(norms.range, layout.compute_len..layout.len);
            assert_eq!(weights[0].range.end, layout.compute_len);
            assert_eq!(weights.last().unwrap().range.start, 0);
            assert!(weights.windows(2).all(|pair| pair[0].range.start == pair[1].range.end));
            let mut all: Vec<usize> = buckets.iter().flat_map(|b| b.parameters.clone()).collect();
            all.sort_unstable();
            assert_eq!(all, layout.trained().map(|(index, _)| index).collect::<Vec<_>>());
            for bucket in &buckets {
                for (_, place) in layout.trained().filter(|(index, _)| bucket.parameters.contains(index)) {
                    assert!(bucket.range.start <= place.range.start && place.range.end <= bucket.range.end);
                }
                let len = bucket.range.end - bucket.range.start;
                assert!(bucket.parameters.len() == 1 || len <= size.max(first) || bucket == norms);
            }
        }
        assert_eq!(buckets(layout, 1 << 40, 1 << 40).len(), 2);
    }
}
