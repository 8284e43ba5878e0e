//! Where samples come from: random access to encoded or raw images, whatever the format on disk.
//!
//! | format | what it looks like | file |
//! |---|---|---|
//! | tar shards | `*.tar` with WebDataset names, `index.json` when written by `mentee shard` | `tar.rs` |
//! | image folder | `class/…/image.jpg` | `folder.rs` |
//! | CIFAR binary | `data_batch_*.bin`, `test_batch.bin`; `train.bin`, `test.bin` | `cifar.rs` |
//! | IDX | `train-images-idx3-ubyte[.gz]`, … | `idx.rs` |

use mentee_config::recipe::DataOrder;

use crate::error::DataError;
use crate::order::Order;

/// How the bytes of a sample stand for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// An image file of a format that is read.
    File,
    /// `[height, width, 3]` pixels.
    Raw {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
}

/// Labels are below this: evaluation has a place for every class.
pub(crate) const MAX_CLASSES: u32 = 1 << 20;

/// One sample as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// What the bytes are.
    pub encoding: Encoding,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Samples by index, from any thread.
pub trait Source: Send + Sync {
    /// Number of samples.
    fn len(&self) -> u64;

    /// No samples. (Opening refuses such a set.)
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads sample `index` (below [`Self::len`]) into `buffer`, replacing what it held.
    ///
    /// # Errors
    /// [`DataError`] naming the file when it cannot be read.
    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError>;

    /// Reads sample `index`.
    ///
    /// # Errors
    /// As [`Self::read_into`].
    fn read(&self, index: u64) -> Result<Sample, DataError> {
        let mut bytes = Vec::new();
        let encoding = self.read_into(index, &mut bytes)?;
        Ok(Sample { encoding, bytes })
    }

    /// The class of sample `index`, an index into [`Self::classes`] where those are named.
    fn label(&self, index: u64) -> Option<u32>;

    /// Where sample `index` is, for messages: `shard.tar:key`, or a file's path.
    fn key(&self, index: u64) -> String;

    /// Names of the classes; empty when unlabelled.
    fn classes(&self) -> &[String];

    /// Whether every label has a name that the set itself gives it, and that means the same class in another set. The
    /// numbers of IDX, CIFAR and plain tar files are labels and no names.
    fn names_classes(&self) -> bool {
        false
    }

    /// Identifies the data set (hex): a digest of names, sizes and labels, not of the images themselves.
    fn digest(&self) -> String;

    /// Bytes of the images as stored, and the number of files they are in.
    fn stored(&self) -> (u64, u64);

    /// What was done to the images before they came here, for the index of shards; none where nothing was.
    fn changed(&self) -> Option<String> {
        None
    }

    /// A line that says which files lie among the images and are not read; none when there are no such.
    fn passed_over(&self) -> Option<String> {
        None
    }

    /// Numbers of samples that are stored together, in the order of their indices: what is best read in one go. Sets
    /// without shards are cut into runs of a thousand.
    fn shards(&self) -> Vec<u64> {
        let (whole, rest) = (self.len() / 1000, self.len() % 1000);
        std::iter::repeat_n(1000, whole as usize).chain((rest > 0).then_some(rest)).collect()
    }
}

/// The order in which a run with these settings visits the samples of `source`.
#[must_use]
pub fn order(source: &dyn Source, order: DataOrder, seed: u64, global_batch: u64) -> Order {
    match order {
        DataOrder::Global => Order::new(seed, source.len(), global_batch),
        DataOrder::Windowed => Order::windowed(seed, &source.shards(), global_batch),
    }
}

/// Which part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Eval,
}
