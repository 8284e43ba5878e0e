//! How fast views are made on this machine: images per second of processor time, where that time goes, and what more
//! threads bring. Two views of one image count as one image.
//!
//! The unit is processor time, not wall time: a machine that is shared with others changes the second by half and the
//! first by little.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mentee_config::recipe::Views;
use serde::Serialize;

use crate::augment::Augmenter;
use crate::damaged::OnError;
use crate::error::DataError;
use crate::loader::{Loader, LoaderConfig, NUM_VIEWS, Stage, two_views};
use crate::order::Order;
use crate::pool::Scratch;
use crate::source::Source;

/// What to measure.
#[derive(Clone)]
pub struct LoaderBench {
    /// Where samples come from.
    pub source: Arc<dyn Source>,
    /// The augmentations.
    pub views: Views,
    /// Keys order and augmentations.
    pub seed: u64,
    /// Images in each measurement.
    pub images: u64,
    /// Measurements of everything, in turns; medians are reported.
    pub rounds: usize,
    /// Numbers of decode threads to measure the whole loader with.
    pub threads: Vec<usize>,
}

/// What was measured: medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoaderReport {
    /// Rounds.
    pub n: usize,
    /// Images in each measurement.
    pub images: u64,
    /// Images per second of processor time, one thread, without the loader's queue.
    pub images_per_cpu_s: f64,
    /// Images per second of wall time, the same.
    pub images_per_s: f64,
    /// Microseconds of processor time per image (both views) in each stage.
    pub stages_us: Stages,
    /// The whole loader.
    pub threads: Vec<Threads>,
}

/// Microseconds of processor time per image, both views together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    /// From the file or shard into memory.
    pub read: f64,
    /// Encoded bytes to the pixels both crops need.
    pub decode: f64,
    /// Both crops to the size of a view.
    pub resize: f64,
    /// Flip, colours, blur, solarize, normalise.
    pub colour: f64,
}

/// The loader with some number of decode threads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Threads {
    /// Decode threads.
    pub threads: usize,
    /// Images per second of wall time.
    pub images_per_s: f64,
    /// Images per second of processor time of all threads.
    pub images_per_cpu_s: f64,
}

const STAGES: [Stage; 4] = [Stage::Read, Stage::Decode, Stage::Resize, Stage::Full];

/// Measures. `progress` hears (done, total) measurements.
///
/// # Errors
/// [`DataError`] of a sample that cannot be used.
pub fn loader(bench: &LoaderBench, progress: &mut dyn FnMut(u64, u64)) -> Result<LoaderReport, DataError> {
    let augmenter = Augmenter::new(&bench.views);
    let order = Order::new(bench.seed, bench.source.len(), 1);
    let mut scratch = Scratch::default();
    let mut out = vec![0.0; NUM_VIEWS * augmenter.view_len()];
    let mut run = |stage: Stage, images: u64| -> Result<(f64, f64), DataError> {
        let (wall, cpu) = (Instant::now(), cpu_time());
        for position in 0..images {
            let (epoch, at) = (position / bench.source.len(), position % bench.source.len());
            let id = order.sample(epoch, at);
            let (first, second) = out.split_at_mut(augmenter.view_len());
            two_views(
                &*bench.source,
                &augmenter,
                bench.seed,
                &mut scratch,
                epoch,
                id,
                stage,
                &mut [first, second],
            )?;
        }
        Ok((seconds(cpu_time() - cpu), seconds(wall.elapsed())))
    };
    let total = (bench.rounds * (STAGES.len() + bench.threads.len())) as u64;
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };
    // Files into the page cache, tables and buffers into memory.
    run(Stage::Full, bench.images.min(64))?;
    run(Stage::Read, bench.images)?;
    let mut stages: [Vec<f64>; STAGES.len()] = Default::default();
    let mut walls = Vec::new();
    let mut threads = vec![(Vec::new(), Vec::new()); bench.threads.len()];
    for _ in 0..bench.rounds.max(1) {
        for (stage, times) in STAGES.into_iter().zip(&mut stages) {
            let (cpu, wall) = run(stage, bench.images)?;
            times.push(cpu / bench.images as f64);
            if stage == Stage::Full {
                walls.push(wall / bench.images as f64);
            }
            step();
        }
        for (&count, (walls, cpus)) in bench.threads.iter().zip(&mut threads) {
            let (cpu, wall, images) = whole(bench, count)?;
            walls.push(images / wall);
            cpus.push(images / cpu);
            step();
        }
    }
    let [read, decode, resize, full] = stages.map(median);
    let us = |seconds: f64| (seconds * 1e6).max(0.0);
    Ok(LoaderReport {
        n: bench.rounds.max(1),
        images: bench.images,
        images_per_cpu_s: 1.0 / full,
        images_per_s: 1.0 / median(walls),
        stages_us: Stages {
            read: us(read),
            decode: us(decode - read),
            resize: us(resize - decode),
            colour: us(full - resize),
        },
        threads: bench
            .threads
            .iter()
            .zip(threads)
            .map(|(&threads, (walls, cpus))| Threads {
                threads,
                images_per_s: median(walls),
                images_per_cpu_s: median(cpus),
            })
            .collect(),
    })
}

/// Processor and wall seconds of the loader for as many whole batches as `bench.images` fill, and how many images: from its
/// start to the last batch, with none made before or beyond, so that a queue of ready batches counts for nothing.
fn whole(bench: &LoaderBench, threads: usize) -> Result<(f64, f64, f64), DataError> {
    let batch = 64.min(bench.images).min(bench.source.len()).max(1);
    let steps = (bench.images / batch).max(1);
    let (wall, cpu) = (Instant::now(), cpu_time());
    let mut loader = Loader::new(LoaderConfig {
        source: Arc::clone(&bench.source),
        order: Order::new(bench.seed, bench.source.len(), batch),
        views: bench.views.clone(),
        seed: bench.seed,
        rank_share: 0..batch,
        first_step: 0,
        last_step: steps,
        threads,
        on_error: OnError::Fail,
        queue_steps: 2,
    })?;
    while let Some(batch) = loader.next()? {
        loader.recycle(batch);
    }
    Ok((seconds(cpu_time() - cpu), seconds(wall.elapsed()), (steps * batch) as f64))
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64().max(1e-9)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Processor time of this process, all threads.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that the call may write to.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    if failed != 0 {
        return Duration::ZERO;
    }
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}
