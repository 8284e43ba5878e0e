//! Reading samples and decoding them, in memory that is used again.

use crate::decode::{
    CropBox, DecodeError, Decoder, PlanarImage, Reading, RgbImage, Values, encode_png, is_changed, is_deep,
};
use crate::error::DataError;
use crate::source::{Encoding, Source};

/// Memory of one thread that reads samples: used again from sample to sample.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    decoder: Decoder,
}

impl Reader {
    /// A reader that takes deep and many-banded images as `reading` says.
    pub(crate) fn new(reading: Reading) -> Self {
        Self { decoder: Decoder::new(reading), bytes: Vec::new() }
    }

    /// Reads sample `index` and decodes the part of it that `choose` asks for, given width and height, into `planes`.
    ///
    /// # Errors
    /// [`DataError::BadSample`] for a damaged one, [`DataError::Io`] for an unreadable file; both name the sample.
    pub fn part(
        &mut self,
        source: &dyn Source,
        index: u64,
        choose: impl FnOnce(u32, u32) -> CropBox,
        planes: &mut PlanarImage,
    ) -> Result<(), DataError> {
        self.with(source, index, |decoder, encoding, bytes| {
            let opened = decoder.open(encoding, bytes)?;
            let part = choose(opened.width, opened.height);
            opened.part(part, planes)
        })
    }

    /// Reads and decodes sample `index` into `image`.
    ///
    /// # Errors
    /// As [`Self::part`].
    pub fn whole(&mut self, source: &dyn Source, index: u64, image: &mut RgbImage) -> Result<(), DataError> {
        self.with(source, index, |decoder, encoding, bytes| decoder.decode(encoding, bytes, image))
    }

    /// The values of the sample that was read last, if it is a file of more than 8 bits a channel.
    pub(crate) fn deep_values(&mut self) -> Option<Values> {
        if !is_deep(&self.bytes) {
            return None;
        }
        let (decoder, bytes) = (&mut self.decoder, &self.bytes);
        let values = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| decoder.values_of(bytes)));
        if values.is_err() {
            self.decoder = Decoder::new(self.decoder.reading); // whatever state it was left in
        }
        values.ok()?.ok()
    }

    /// Reads sample `index` and leaves it encoded.
    pub(crate) fn bytes(&mut self, source: &dyn Source, index: u64) -> Result<(), DataError> {
        source.read_into(index, &mut self.bytes).map(|_| ())
    }

    /// Sample `index` as a file: as it is, unless it holds pixels alone or is to be taken as a [`Reading`] says; as PNG then.
    pub(crate) fn file(&mut self, source: &dyn Source, index: u64) -> Result<Vec<u8>, DataError> {
        let encoding = source.read_into(index, &mut self.bytes)?;
        let bad = |reason: String| DataError::BadSample { sample: source.key(index), reason };
        if encoding == Encoding::File {
            self.decoder.check_head(&self.bytes).map_err(|error| bad(error.to_string()))?;
        }
        if encoding == Encoding::File && !is_changed(&self.bytes, self.decoder.reading) {
            return Ok(std::mem::take(&mut self.bytes));
        }
        let mut image = RgbImage::default();
        self.whole(source, index, &mut image)?;
        encode_png(image.width, image.height, &image.data).map_err(bad)
    }

    fn with(
        &mut self,
        source: &dyn Source,
        index: u64,
        decode: impl FnOnce(&mut Decoder, Encoding, &[u8]) -> Result<(), DecodeError>,
    ) -> Result<(), DataError> {
        let encoding = source.read_into(index, &mut self.bytes)?;
        let (decoder, bytes) = (&mut self.decoder, &self.bytes);
        // A decoder that panics on hostile bytes must not take the run's threads down without a name.
        let decoded =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| decode(decoder, encoding, bytes)));
        let reason = match decoded {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => {
                // Whatever state it was left in.
                self.decoder = Decoder::new(self.decoder.reading);
                DecodeError::Damaged { format: "image", reason: "the decoder panicked".to_owned() }
            }
        };
        Err(DataError::BadSample { sample: source.key(index), reason: reason.to_string() })
    }
}
