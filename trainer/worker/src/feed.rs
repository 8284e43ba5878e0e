//! Batches as tensors where the training step wants them. On a device a thread of its own copies the next batches there, on a
//! stream of its own, while the step computes; or has the device make them, once it holds the images.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mentee_config::Recipe;
use mentee_data::directions::Directed;
use mentee_data::held::Held;
use mentee_data::{Batch, Loader, LoaderConfig, Memory};
use mentee_torch_ext::cuda;
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::resident::{Maker, NotResident, OnDevice, Residence, Resident};
use crate::{device, views};

/// Batches on the device beside the one in use.
const AHEAD: usize = 2;

/// See the module.
pub enum Feed {
    /// Tensors are the batches' own memory, or in f64 copies.
    Host { loader: Loader, side: u32, kind: Kind },
    /// Tensors are copies.
    Device(DeviceFeed),
}

/// The receiving end of the copying thread.
pub struct DeviceFeed {
    batches: Receiver<Result<(Batch, Tensor), WorkerError>>,
    used: Option<Sender<Batch>>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Of a loader's batches on `device`, in the master type on the processor and as the network computes on a device.
    pub fn new(config: LoaderConfig, recipe: &Recipe, device: Device) -> Result<Self, WorkerError> {
        let kinds = mentee_ssl::state::kinds(recipe.parallel.precision);
        let side = recipe.views.size;
        let loader = Loader::new(config.clone())?;
        let Device::Cuda(index) = device else { return Ok(Self::Host { loader, side, kind: kinds.master }) };
        let kind = kinds.compute;
        let share = config.rank_share.end - config.rank_share.start;
        let residence = Residence::of(recipe, config);
        let (send, batches) = sync_channel(AHEAD - 1);
        let (used, back) = channel();
        let recipe = recipe.clone();
        let thread = std::thread::Builder::new()
            .name("feed".into())
            .spawn(move || {
                let result = device::enter(index, &recipe).and_then(|()| {
                    let stream = cuda::Stream::new(index)?;
                    stream.enter()?;
                    let hold = |held: &Held| OnDevice::hold(held, &recipe.views, share, kind, index);
                    Copying { side, kind, device, send: &send, back: &back }.all(loader, residence, hold)
                });
                if let Err(error) = result {
                    // Nobody listens when training has ended first.
                    let _ = send.send(Err(error));
                }
            })
            .map_err(|error| WorkerError::Failed(format!("failed to start a thread: {error}")))?;
        Ok(Self::Device(DeviceFeed { batches, used: Some(used), thread: Some(thread) }))
    }

    /// The next batch and its views [V·N, 3, H, W], channels-last in memory; none after the last. Blocks until it is there;
    /// the batch's `wait` says how long.
    pub fn next(&mut self) -> Result<Option<(Arc<Batch>, Tensor)>, WorkerError> {
        match self {
            Self::Host { loader, side, kind } => {
                let Some(batch) = loader.next()?.map(Arc::new) else { return Ok(None) };
                let views = views::tensor(&batch, *side, *kind)?;
                Ok(Some((batch, views)))
            }
            Self::Device(feed) => {
                let start = Instant::now();
                let Ok(next) = feed.batches.recv() else { return Ok(None) };
                let (mut batch, views) = next?;
                batch.wait = start.elapsed();
                Ok(Some((Arc::new(batch), views)))
            }
        }
    }

    /// Gives a batch's memory back, to be filled again, unless a tensor still has its part in it.
    pub fn recycle(&self, batch: Arc<Batch>) {
        let Some(batch) = Arc::into_inner(batch) else { return };
        match self {
            Self::Host { loader, .. } => loader.recycle(batch),
            Self::Device(feed) => {
                if let Some(used) = &feed.used {
                    // A thread that has ended needs none.
                    let _ = used.send(batch);
                }
            }
        }
    }
}

/// What the copying thread works with.
struct Copying<'a> {
    side: u32,
    kind: Kind,
    device: Device,
    send: &'a SyncSender<Result<(Batch, Tensor), WorkerError>>,
    back: &'a Receiver<Batch>,
}

impl Copying<'_> {
    /// Sends all batches: the loader's, until a device can make them itself, and as long as it can.
    fn all<M: Maker>(
        self,
        loader: Loader,
        mut residence: Residence,
        hold: impl Fn(&Held) -> Result<M, WorkerError>,
    ) -> Result<(), WorkerError> {
        let mut next = Some(loader);
        while let Some(mut loader) = next.take() {
            if let Some(resident) = self.loaded(&mut loader, &mut residence, &hold)? {
                drop(loader); // its threads and batches are wanted no more
                next = self.made(resident)?;
            }
        }
        Ok(())
    }

    /// Sends what the loader makes, until the device can: then what makes the rest.
    fn loaded<M: Maker>(
        &self,
        loader: &mut Loader,
        residence: &mut Residence,
        hold: impl Fn(&Held) -> Result<M, WorkerError>,
    ) -> Result<Option<Resident<M>>, WorkerError> {
        let mut pins = matches!(self.device, Device::Cuda(_));
        while let Some(mut batch) = loader.next()? {
            if pins {
                pins = pin(&mut batch.views);
            }
            let batch = Arc::new(batch);
            let views = views::tensor(&batch, self.side, Kind::Float)?
                .f_to_device(self.device)?
                .f_to_kind(self.kind)?;
            complete(self.device)?;
            let Some(batch) = Arc::into_inner(batch) else {
                return Err(WorkerError::Failed("a batch on a device is still its host memory".into()));
            };
            let resident = residence.after(batch.wait).and_then(|decoding| {
                let asked_for = decoding.asked_for;
                let resident = decoding.take_over(&hold, &batch, &views);
                resident.inspect_err(|reason| reason.tell(asked_for)).ok()
            });
            if self.send.send(Ok((batch, views))).is_err() {
                return Ok(None); // training has ended
            }
            if resident.is_some() {
                return Ok(resident);
            }
            self.back.try_iter().for_each(|batch| loader.recycle(batch));
        }
        Ok(None)
    }

    /// Sends what the device makes; a loader of what is left when it cannot go on.
    fn made<M: Maker>(&self, mut resident: Resident<M>) -> Result<Option<Loader>, WorkerError> {
        loop {
            let (directed, views) = match resident.next() {
                Ok(Some(next)) => next,
                Ok(None) => return Ok(None),
                Err(error) => {
                    NotResident::Refused(error).tell(true);
                    return resident.into_loader().map(Some);
                }
            };
            let Directed { step, epoch, ids, .. } = directed;
            // What a kernel does wrong is told here at the earliest, and leaves no device to go on with.
            complete(self.device).map_err(|error| {
                let line = format!("the device, making the views of step {step}: {error}; data.resident=never does without it");
                WorkerError::Failed(line)
            })?;
            let (skipped, wait) = (Vec::new(), Duration::ZERO);
            let batch = Batch { step, epoch, ids, skipped, views: Memory::default(), wait };
            if self.send.send(Ok((batch, views))).is_err() {
                return Ok(None);
            }
            self.back.try_iter().for_each(drop);
        }
    }
}

/// Has the device copy a batch from where it lies, which is done once for each memory that goes round. Whether that can be.
fn pin(views: &mut Memory) -> bool {
    // SAFETY: the memory lets go of what holds it before it moves or ends.
    let pinned = views.hold(|at, len| unsafe { cuda::Pinned::new(at.cast(), len * size_of::<f32>()) });
    if let Err(error) = &pinned {
        tracing::info!("batches are copied to the device by way of another memory: {error}");
    }
    pinned.is_ok()
}

/// What is sent is there: the stream that computes has nothing to wait for.
fn complete(device: Device) -> Result<(), WorkerError> {
    if let Device::Cuda(index) = device {
        let (stream, _) = cuda::Stream::current(index)?;
        stream.synchronise()?;
    }
    Ok(())
}

impl Drop for DeviceFeed {
    fn drop(&mut self) {
        self.used = None;
        // Unblocks a thread that waits to send.
        let (_, nothing) = channel();
        drop(std::mem::replace(&mut self.batches, nothing));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub mod tests {
    use mentee_data::{DataError, Encoding, OnError, Order, Source};

    use super::*;

    const IMAGES: u64 = 20;
    const SIDE: u32 = 16;
    const STEPS: u64 = 8;

    /// Images of 8 x 8 pixels, all different.
    struct Pixels {
        damaged: Option<u64>,
    }

    impl Source for Pixels {
        fn len(&self) -> u64 {
            IMAGES
        }

        fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
            buffer.clear();
            buffer.extend((0..8 * 8 * 3).map(|i| (i * (index + 3) * 7 % 251) as u8));
            if self.damaged == Some(index) {
                buffer.truncate(9);
            }
            Ok(Encoding::Raw { width: 8, height: 8 })
        }

        fn label(&self, _: u64) -> Option<u32> {
            None
        }

        fn key(&self, index: u64) -> String {
            format!("pixels:{index}")
        }

        fn classes(&self) -> &[String] {
            &[]
        }

        fn digest(&self) -> String {
            String::new()
        }

        fn stored(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    pub fn config(damaged: Option<u64>) -> LoaderConfig {
        let sets = [format!("views.size={SIDE}")];
        let views = Recipe::load("demo", &sets).expect("a recipe").views;
        LoaderConfig {
            source: Arc::new(Pixels { damaged }),
            order: Order::new(1, IMAGES, 6),
            views,
            seed: 1,
            rank_share: 2..6,
            first_step: 1,
            last_step: STEPS,
            threads: 2,
            on_error: OnError::Skip { budget: 3 },
            queue_steps: 2,
        }
    }

    /// Makes what a loader does, but for what it is told to spoil.
    struct AsLoader {
        loader: Loader,
        spoils: Option<u64>,
        fails: Option<u64>,
    }

    impl Maker for AsLoader {
        fn make(&mut self, directed: &Directed) -> Result<Tensor, WorkerError> {
            let mut batch = self.loader.next()?.expect("as many steps");
            assert_eq!((batch.step, &batch.ids), (directed.step, &directed.ids));
            if self.fails == Some(batch.step) {
                return Err(WorkerError::Failed("no memory".into()));
            }
            if self.spoils == Some(batch.step) {
                batch.views[77] += 1e-6;
            }
            views::tensor(&Arc::new(batch), SIDE, Kind::Double)
        }
    }

    /// All batches of a feed whose images have been decoded before it starts; how many of them the device made.
    fn all(
        config: &LoaderConfig,
        room: u64,
        hold: impl Fn(&Held) -> Result<AsLoader, WorkerError>,
    ) -> (Vec<(Batch, Tensor)>, usize) {
        let residence = Residence::decoded(config.clone(), room);
        let (send, batches) = sync_channel(STEPS as usize);
        let (_used, back) = channel();
        let loader = Loader::new(config.clone()).unwrap();
        let (kind, device) = (Kind::Double, Device::Cpu); // copies
        let copying = Copying { side: SIDE, kind, device, send: &send, back: &back };
        copying.all(loader, residence, hold).unwrap();
        drop(send);
        let all: Vec<_> = batches.iter().map(Result::unwrap).collect();
        let made = all.iter().filter(|(batch, _)| batch.views.is_empty()).count();
        (all, made)
    }

    fn as_loader(config: &LoaderConfig) -> Result<AsLoader, WorkerError> {
        Ok(AsLoader { loader: Loader::new(config.clone())?, spoils: None, fails: None })
    }

    fn is_as_the_loaders(config: LoaderConfig, found: Vec<(Batch, Tensor)>) {
        let mut loader = Loader::new(config).unwrap();
        for (batch, views) in found {
            let expected = Arc::new(loader.next().unwrap().unwrap());
            assert_eq!((batch.step, batch.epoch, &batch.ids), (expected.step, expected.epoch, &expected.ids));
            assert_eq!(views, views::tensor(&expected, SIDE, Kind::Double).unwrap());
        }
        assert!(loader.next().unwrap().is_none());
    }

    #[test]
    fn a_device_that_holds_the_images_makes_the_views_from_the_second_batch_on() {
        let config = config(None);
        let (found, made) = all(&config, 1 << 20, |_| as_loader(&config));
        assert_eq!(made, STEPS as usize - 2);
        is_as_the_loaders(config, found);
    }

    #[test]
    fn when_the_device_can_no_more_the_loader_goes_on() {
        let config = config(None);
        let fails = |_: &Held| Ok(AsLoader { fails: Some(4), ..as_loader(&config)? });
        let (found, made) = all(&config, 1 << 20, fails);
        assert_eq!(made, 2);
        is_as_the_loaders(config, found);
    }

    #[test]
    fn a_device_that_makes_anything_else_makes_nothing() {
        let config = config(None);
        let spoils = |_: &Held| Ok(AsLoader { spoils: Some(1), ..as_loader(&config)? });
        let (found, made) = all(&config, 1 << 20, spoils);
        assert_eq!((found.len(), made), (STEPS as usize - 1, 0));
        // Nor does one that cannot hold the images, or for which they are too many.
        let refuses = |_: &Held| Err(WorkerError::Failed("no memory".into()));
        let (found, made) = all(&config, 1 << 20, refuses);
        assert_eq!((found.len(), made), (STEPS as usize - 1, 0));
        let (found, made) = all(&config, 100, |_| panic!("they are not held"));
        assert_eq!((found.len(), made), (STEPS as usize - 1, 0));
    }

    #[test]
    fn with_a_damaged_image_the_loader_says_what_takes_its_place() {
        let config = config(Some(7));
        let (found, made) = all(&config, 1 << 20, |_| panic!("not all can be held"));
        assert_eq!((found.len(), made), (STEPS as usize - 1, 0));
        assert!(found.iter().any(|(batch, _)| batch.skipped.iter().any(|skipped| skipped.id == 7)));
    }
}
