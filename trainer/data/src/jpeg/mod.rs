//! JPEG, any part of an image: baseline, extended and progressive Huffman-coded files of 8 bits (ITU-T T.81).
//!
//! ```text
//!  markers ─► Header ─► bits without stuffing ─► Huffman ─► inverse DCT ─► upsampling ─► RGB planes
//!  (markers.rs)         (bits.rs)   (huffman.rs, scan.rs)    (idct.rs)      (colour.rs)
//! ```
//! Pixels are those of libjpeg-turbo with its default settings ("islow" transform, "fancy" upsampling), bit for bit,
//! which Pillow, torchvision and OpenCV deliver; the transform, the upsampling and the colours are integer arithmetic,
//! the same on every processor. Two things are done that a general decoder cannot:
//! - Only the blocks that a region needs are transformed, and nothing after its last row is read. A region's pixels are
//!   those of the whole image.
//! - What lies between restart markers and outside the region is not even read.
//!
//! Damaged files are refused, not patched up: an impossible code, a block that runs over, a scan that ends early.
//! Arithmetic coding, 12 bits and lossless files are refused by name, as libjpeg's decoder does with those it lacks.

mod bits;
mod colour;
mod huffman;
mod idct;
mod layout;
mod markers;
mod scan;

#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::image::{CropBox, PlanarImage};
use bits::Segments;
pub(crate) use colour::without_ink;
use markers::Tables;
pub(crate) use markers::{Header, exif_orientation, reaches_end};

/// Why a file cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum JpegError {
    /// The file ends before the image does.
    #[error("the file ends before the image does")]
    Truncated,
    /// Not as the standard says.
    #[error("{0}")]
    Damaged(&'static str),
    /// As the standard says, and not supported.
    #[error("{0} is not read")]
    Unsupported(&'static str),
}

impl JpegError {
    const BAD_CODE: Self = Self::Damaged("an impossible Huffman code");
}

/// A decoder: its memory and tables are used again from image to image.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    tables: Tables,
    segments: Segments,
    work: scan::Work,
}

impl Decoder {
    /// Reads everything before the first scan.
    ///
    /// # Errors
    /// [`JpegError`].
    pub(crate) fn header(&mut self, file: &[u8]) -> Result<Header, JpegError> {
        markers::read(file, &mut self.tables)
    }

    /// Decodes at least `region` of the image into `out`, which says what it holds. `header` is that of `file`, read by
    /// this decoder just before.
    ///
    /// # Errors
    /// [`JpegError`]; `out` then holds no particular pixels.
    ///
    /// # Panics
    /// If `region` is not within the image.
    pub(crate) fn decode(
        &mut self,
        file: &[u8],
        header: &Header,
        region: CropBox,
        out: &mut PlanarImage,
    ) -> Result<(), JpegError> {
        assert!(
            region.width > 0
                && region.height > 0
                && region.x.checked_add(region.width).is_some_and(|end| end <= header.width)
                && region.y.checked_add(region.height).is_some_and(|end| end <= header.height),
            "a region lies within its image"
        );
        scan::decode(file, header, &mut self.tables, &mut self.segments, &mut self.work, region, out)
    }
}
