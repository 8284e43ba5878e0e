//! Images that a device holds, of which it makes views itself: a set that fits is decoded once, beside training, and what the
//! processor does for a step from then on is to draw. Until then the loader makes the views, and the first batch that a device
//! makes has to be the loader's, to the last bit. That costs the device little, and nothing where the loader keeps up anyway: by
//! itself it begins when training waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mentee_config::Recipe;
use mentee_config::recipe::{self, Views};
use mentee_data::directions::{Directed, Director};
use mentee_data::held::{Held, NotHeld};
use mentee_data::{Batch, Loader, LoaderConfig};
use mentee_torch_ext::cuda;
use tch::{Kind, Tensor};

use crate::error::WorkerError;

/// Batches of which the time is taken together.
const WINDOW: u32 = 20;

/// The part of the time that training may wait for the loader.
const MAY_WAIT: f64 = 0.03;

/// Whether the images are on their way to the device.
pub enum Residence {
    /// They stay where they are.
    Never,
    /// Until the loader is waited for.
    NotYet { config: LoaderConfig, limit: u64, batches: u32, since: Instant, waited: Duration },
    /// They are being decoded.
    Decoding(Decoding),
}

impl Residence {
    /// Of the images of `config.source`, as the recipe has it.
    pub fn of(recipe: &Recipe, config: LoaderConfig) -> Self {
        let limit = recipe.data.resident_mib.saturating_mul(1 << 20);
        match recipe.data.resident {
            recipe::Resident::Never => Self::Never,
            recipe::Resident::Always => Self::begin(config, limit, true),
            recipe::Resident::Auto => {
                Self::NotYet { config, limit, batches: 0, since: Instant::now(), waited: Duration::ZERO }
            }
        }
    }

    fn begin(config: LoaderConfig, limit: u64, asked_for: bool) -> Self {
        match Decoding::start(config, limit, asked_for) {
            Ok(decoding) => Self::Decoding(decoding),
            Err(error) => {
                NotResident::Refused(error).tell(asked_for);
                Self::Never
            }
        }
    }

    /// After a batch for which the loader was waited for so long: the images, once they are decoded.
    pub fn after(&mut self, wait: Duration) -> Option<Decoding> {
        match std::mem::replace(self, Self::Never) {
            Self::Never => {}
            Self::NotYet { config, limit, batches, since, waited } => {
                let (batches, waited) = (batches + 1, waited + wait);
                let may_wait = MAY_WAIT * since.elapsed().as_secs_f64();
                *self = if batches % WINDOW > 0 {
                    Self::NotYet { config, limit, batches, since, waited }
                } else if batches > WINDOW && waited.as_secs_f64() > may_wait {
                    Self::begin(config, limit, false) // the first ones are waited for in any case
                } else {
                    Self::NotYet { config, limit, batches, since: Instant::now(), waited: Duration::ZERO }
                };
            }
            Self::Decoding(decoding) if decoding.is_over() => return Some(decoding),
            Self::Decoding(decoding) => *self = Self::Decoding(decoding),
        }
        None
    }

    /// With images that have been decoded.
    #[cfg(test)]
    pub fn decoded(config: LoaderConfig, limit: u64) -> Self {
        let decoding = Decoding::start(config, limit, true).expect("a thread");
        while !decoding.is_over() {
            std::thread::yield_now();
        }
        Self::Decoding(decoding)
    }
}

/// Decodes a set on threads of its own.
pub struct Decoding {
    /// What a loader of the same views has.
    config: LoaderConfig,
    /// The recipe wants it in any case.
    pub asked_for: bool,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Held, NotHeld>>>,
}

impl Decoding {
    /// Of `config.source`, if its pixels are at most `limit` bytes.
    fn start(config: LoaderConfig, limit: u64, asked_for: bool) -> Result<Self, WorkerError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (source, threads, stopped) = (config.source.clone(), config.threads.div_ceil(2), stop.clone());
        let thread = std::thread::Builder::new()
            .name("resident".into())
            .spawn(move || Held::load(&*source, limit, threads, &stopped))
            .map_err(|error| WorkerError::Failed(format!("failed to start a thread: {error}")))?;
        Ok(Self { config, asked_for, stop, thread: Some(thread) })
    }

    /// Whether it has ended, with images or without.
    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// What makes views from now on, unless there is a reason against it, or what it makes is not `batch` of the loader, whose
    /// `views` these are. Blocks until the decoding is over. `hold` brings the images to where views are made.
    pub fn take_over<M: Maker>(
        mut self,
        hold: impl FnOnce(&Held) -> Result<M, WorkerError>,
        batch: &Batch,
        views: &Tensor,
    ) -> Result<Resident<M>, NotResident> {
        let thread = self.thread.take().ok_or(NotResident::NotHeld(NotHeld::Stopped))?;
        let held =
            thread.join().map_err(|_| WorkerError::Failed("the thread that decodes panicked".into()))??;
        let mib = held.pixels.len() >> 20;
        let maker = hold(&held)?;
        let director = Director::new(self.config.clone(), held.images);
        let mut resident = Resident { director, maker, next_step: batch.step };
        let (directed, made) = resident.next()?.ok_or(NotResident::Differs)?;
        if directed.ids != batch.ids || !made.f_equal(views).map_err(WorkerError::from)? {
            return Err(NotResident::Differs);
        }
        tracing::info!(
            step = batch.step,
            images = self.config.source.len(),
            mib,
            "the device holds all images, and makes the views from here on"
        );
        Ok(resident)
    }
}

impl Drop for Decoding {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it found is wanted no more.
            let _ = thread.join();
        }
    }
}

/// Why the loader goes on making the views.
#[derive(Debug, thiserror::Error)]
pub enum NotResident {
    /// There are no images to be held.
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    /// The device cannot hold them, or make views of them.
    #[error(transparent)]
    Refused(#[from] WorkerError),
    /// It makes other views.
    #[error(
        "the device makes other views than the processor, which is a defect of this program on this device: please report it"
    )]
    Differs,
}

impl NotResident {
    /// Says so: loudly where it was `asked_for`, or somebody should look into it.
    pub fn tell(&self, asked_for: bool) {
        match self {
            Self::NotHeld(reason) if !asked_for => tracing::info!("the loader makes the views: {reason}"),
            Self::NotHeld(_) | Self::Refused(_) | Self::Differs => {
                tracing::warn!(
                    "the loader makes the views: {self}; data.resident=never does without the device's"
                );
            }
        }
    }
}

/// Makes the views of a step.
pub trait Maker {
    /// As [V·N, 3, H, W], channels-last in memory.
    fn make(&mut self, directed: &Directed) -> Result<Tensor, WorkerError>;
}

/// A device that has the images.
pub struct OnDevice {
    images: cuda::Images,
    /// Mean and 1/std.
    normalise: [[f32; 3]; 2],
    kind: Kind,
}

impl OnDevice {
    /// Brings the images to `device`, which makes steps of `count` images of them.
    pub fn hold(
        held: &Held,
        views: &Views,
        count: u64,
        kind: Kind,
        device: usize,
    ) -> Result<Self, WorkerError> {
        let count = mentee_ssl::state::VIEWS * count as i64;
        let images = cuda::Images::hold(&held.pixels, held.images.widest, (count, views.size), device)?;
        Ok(Self { images, normalise: mentee_data::augment::normalisation(views), kind })
    }
}

impl Maker for OnDevice {
    fn make(&mut self, directed: &Directed) -> Result<Tensor, WorkerError> {
        // SAFETY: the words are a director's of these very images.
        Ok(unsafe { self.images.views(&directed.words, self.normalise, self.kind) }?)
    }
}

/// Makes batches in step order.
pub struct Resident<M> {
    director: Director,
    maker: M,
    next_step: u64,
}

impl<M: Maker> Resident<M> {
    /// The next step and its views; none after the last. After an error the same step is the next.
    pub fn next(&mut self) -> Result<Option<(Directed, Tensor)>, WorkerError> {
        let Some(directed) = self.director.step(self.next_step) else { return Ok(None) };
        let views = self.maker.make(&directed)?;
        self.next_step += 1;
        Ok(Some((directed, views)))
    }

    /// A loader of what is left; the device's memory is given back.
    pub fn into_loader(self) -> Result<Loader, WorkerError> {
        Ok(Loader::new(LoaderConfig { first_step: self.next_step, ..self.director.into_config() })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether decoding begins when each batch is waited for so long, of which one a millisecond or so is taken.
    fn begins(wait: impl Fn(u32) -> Duration) -> bool {
        let recipe = Recipe::load("demo", &["data.resident=auto".to_owned()]).expect("a recipe");
        let mut residence = Residence::of(&recipe, crate::feed::tests::config(None));
        for batch in 0..3 * WINDOW {
            std::thread::sleep(Duration::from_millis(1));
            assert!(residence.after(wait(batch)).is_none());
            if matches!(residence, Residence::Decoding(_)) {
                return true;
            }
        }
        false
    }

    #[test]
    fn the_device_gets_the_images_when_the_loader_is_waited_for() {
        assert!(begins(|_| Duration::from_secs(1)));
        assert!(!begins(|_| Duration::ZERO));
        assert!(
            !begins(|batch| Duration::from_millis(if batch < 5 { 50 } else { 0 })),
            "a loader that starts"
        );
    }
}
