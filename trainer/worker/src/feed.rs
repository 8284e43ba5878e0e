//! Batches as tensors where the training step wants them. On a device a thread of its own copies the next batches there, on a
//! stream of its own, while the step computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use mentee_config::Recipe;
use mentee_data::{Batch, Loader};
use mentee_torch_ext::cuda;
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
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
    /// Of `loader`'s batches on `device`, in the master type on the processor and as the network computes on a device.
    pub fn new(loader: Loader, recipe: &Recipe, device: Device) -> Result<Self, WorkerError> {
        let kinds = mentee_ssl::state::kinds(recipe.parallel.precision);
        let side = recipe.views.size;
        let Device::Cuda(index) = device else { return Ok(Self::Host { loader, side, kind: kinds.master }) };
        let (send, batches) = sync_channel(AHEAD - 1);
        let (used, back) = channel();
        let recipe = recipe.clone();
        let thread = std::thread::Builder::new()
            .name("feed".into())
            .spawn(move || {
                let result = device::enter(index, &recipe).and_then(|()| {
                    let stream = cuda::Stream::new(index)?;
                    stream.enter()?;
                    copy_all(loader, side, kinds.compute, device, &send, &back)
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

fn copy_all(
    mut loader: Loader,
    side: u32,
    kind: Kind,
    device: Device,
    send: &SyncSender<Result<(Batch, Tensor), WorkerError>>,
    back: &Receiver<Batch>,
) -> Result<(), WorkerError> {
    while let Some(batch) = loader.next()?.map(Arc::new) {
        let views = views::tensor(&batch, side, Kind::Float)?.f_to_device(device)?.f_to_kind(kind)?;
        if let Device::Cuda(index) = device {
            // What is sent is there: the stream that computes has nothing to wait for.
            let (stream, _) = cuda::Stream::current(index)?;
            stream.synchronise()?;
        }
        let Some(batch) = Arc::into_inner(batch) else {
            return Err(WorkerError::Failed("a batch on a device is still its host memory".into()));
        };
        if send.send(Ok((batch, views))).is_err() {
            break; // training has ended
        }
        back.try_iter().for_each(|batch| loader.recycle(batch));
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
