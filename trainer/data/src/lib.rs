//! Samples in, augmented batches out: everything between a path and `[V, N, H, W, C]` floats. Never sees torch.
//!
//! ```text
//!  open(path) ─► Source ─┐                                 Order: which sample stands where (a pure function)
//!  tar · folder · cifar  │                                   │
//!  · idx                 ▼                                   ▼
//!              decode ─► Augmenter (Philox: seed, epoch, sample, view) ─► Loader ─► Batch
//! ```
//!
//! Where a device holds the images ([`held`]), it makes the views itself, as [`directions`] tell it, to the last bit what the loader makes.
//!
//! Three promises hold everywhere below:
//! - **Order** is computed, not stored: [`order::Order`] is a keyed permutation in constant memory.
//! - **Randomness** is keyed by `(seed, epoch, sample, view)` ([`rng`]), never by thread, rank or time of arrival:
//!   a batch has the same bytes for any number of decode threads, any world size and any resume point.
//! - **Damage is named**: a sample that cannot be used is a [`DataError`] with its shard or file, its key and the
//!   reason.
//!
//! Shapes: V views (2), N samples of this rank's share, H = W = `views.size`, C = 3 (RGB).

pub mod augment;
pub mod bench;
pub mod check;
pub mod decode;
pub mod digest;
pub mod directions;
pub mod error;
pub mod eval;
pub mod held;
pub mod loader;
pub mod order;
pub mod rng;
pub mod shard;
pub mod source;
pub mod synthetic;

mod blur;
mod cifar;
mod classes;
mod colour;
mod cpu;
mod damaged;
mod folder;
mod idx;
mod image;
mod index;
mod jpeg;
mod kept_open;
mod listing;
mod math;
mod memory;
mod open;
mod partial;
mod passed_over;
mod pool;
mod reader;
mod resize;
mod splits;
mod tar;

pub use classes::with_classes_of;
pub use damaged::{Damaged, OnError};
pub use decode::{CropBox, PlanarImage, RgbImage, decode};
pub use error::DataError;
pub use loader::{Batch, Loader, LoaderConfig, Skipped};
pub use memory::Memory;
pub use open::{open, open_held_out, open_split, open_training};
pub use order::Order;
pub use source::{Encoding, Sample, Source, Split, order};
pub use splits::more_held_out;
