//! A whole data set as pixels, for a device that holds it.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::decode::RgbImage;
use crate::error::DataError;
use crate::reader::Reader;
use crate::source::Source;

/// Images that are decoded to learn how large a set is.
const LOOKED_AT: u64 = 32;

/// Images that a thread claims at once.
const CLAIM: u64 = 256;

/// Where an image is among the pixels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Its first byte.
    pub first: u64,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// All images of a set, but for the pixels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Images {
    /// By sample.
    pub sizes: Vec<Size>,
    /// The most columns that one has.
    pub widest: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Held {
    /// Where which image is.
    pub images: Images,
    /// 8-bit RGB, `[H, W, 3]` each, one behind the other.
    pub pixels: Vec<u8>,
}

/// Why a set is not held.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    /// More than there is room for.
    #[error("its images have {} MiB of pixels or more", bytes >> 20)]
    TooLarge {
        /// As far as some tell.
        bytes: u64,
    },
    /// A damaged image, or one that cannot be read: what becomes of it is the loader's to say, which looks only at the part that
    /// it needs.
    #[error("{}", .0.brief())]
    Unreadable(#[from] DataError),
    /// The host has no room for them.
    #[error("no memory for {} MiB of pixels", bytes >> 20)]
    NoMemory {
        /// All of them, as far as some tell.
        bytes: u64,
    },
    /// Asked to.
    #[error("stopped")]
    Stopped,
}

impl Held {
    /// Decodes all of `source` with `threads` threads if that makes at most `limit` bytes; looks at a few images first. Ends early
    /// when `stop` is set.
    ///
    /// # Errors
    /// See [`NotHeld`].
    pub fn load(source: &dyn Source, limit: u64, threads: usize, stop: &AtomicBool) -> Result<Self, NotHeld> {
        let count = source.len();
        let estimate = estimate(source, limit, stop)?;
        let next = AtomicU64::new(0);
        let images = Images { sizes: vec![Size::default(); count as usize], widest: 0 };
        let mut pixels = Vec::new();
        pixels.try_reserve(estimate as usize).map_err(|_| NotHeld::NoMemory { bytes: estimate })?;
        let all = Mutex::new(Ok(Held { images, pixels }));
        let work = || {
            let (mut reader, mut image) = (Reader::default(), RgbImage::default());
            while !stop.load(Ordering::Relaxed) {
                let first = next.fetch_add(CLAIM, Ordering::Relaxed);
                if first >= count {
                    return;
                }
                let (mut sizes, mut pixels, mut failed) = (Vec::new(), Vec::new(), None);
                for id in first..(first + CLAIM).min(count) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = reader.whole(source, id, &mut image) {
                        failed = Some(NotHeld::Unreadable(error));
                        break;
                    }
                    sizes.push(Size { first: pixels.len() as u64, width: image.width, height: image.height });
                    pixels.extend_from_slice(&image.data);
                    if pixels.len() as u64 > limit {
                        break; // told below
                    }
                }
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                let Ok(held) = &mut *all else { return };
                let bytes = held.pixels.len() as u64 + pixels.len() as u64;
                if bytes > limit {
                    failed.get_or_insert(NotHeld::TooLarge { bytes: bytes.max(estimate) });
                }
                if let Some(failed) = failed {
                    *all = Err(failed);
                    return;
                }
                held.take(first as usize, &sizes, &pixels);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Where there are no more threads, fewer do it.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        if stop.load(Ordering::Relaxed) {
            return Err(NotHeld::Stopped);
        }
        all.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&mut self, first: usize, sizes: &[Size], pixels: &[u8]) {
        let behind = self.pixels.len() as u64;
        for (to, size) in self.images.sizes[first..].iter_mut().zip(sizes) {
            *to = Size { first: behind + size.first, ..*size };
            self.images.widest = self.images.widest.max(size.width);
        }
        self.pixels.extend_from_slice(pixels);
    }
}

/// Bytes of all pixels, at most `limit`, as far as some images tell that lie evenly among them.
fn estimate(source: &dyn Source, limit: u64, stop: &AtomicBool) -> Result<u64, NotHeld> {
    let (mut reader, mut image) = (Reader::default(), RgbImage::default());
    let (count, looked_at) = (source.len(), LOOKED_AT.min(source.len()));
    let mut bytes = 0;
    for n in 0..looked_at {
        if stop.load(Ordering::Relaxed) {
            return Err(NotHeld::Stopped);
        }
        reader.whole(
            source,
            (u128::from(n) * u128::from(count) / u128::from(looked_at)) as u64,
            &mut image,
        )?;
        bytes += image.data.len() as u64;
        if bytes > limit {
            return Err(NotHeld::TooLarge { bytes });
        }
    }
    let all = (u128::from(bytes) * u128::from(count) / u128::from(looked_at.max(1))) as u64;
    if all > limit { Err(NotHeld::TooLarge { bytes: all }) } else { Ok(all) }
}
