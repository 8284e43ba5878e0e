//! Encoded bytes to 8-bit RGB: JPEG by [`crate::jpeg`], PNG by png, WebP by image-webp, BMP by image, TIFF and PNM here.
//!
//! What is not RGB becomes RGB as PIL's `convert("RGB")` does it, which is what torchvision's loaders call:
//! grayscale is repeated over the channels, alpha is dropped (not blended), palettes are looked up, CMYK and YCCK are
//! converted. Of an animation and of several pages the first image counts.
//!
//! Samples of 16 bits keep their high byte, whatever the range that is used: the same rule for every image. PIL does so with
//! colours, and cuts 16-bit grey off at 255, which leaves white. [`crate::check::stats`] tells of data that 8 bits would spoil, and a
//! [`Reading`] says what range counts.
//!
//! A photograph that EXIF says is lying on its side is set upright, as viewers show it and as PIL's `exif_transpose` does (JPEG's
//! APP1, PNG's eXIf, WebP's EXIF, TIFF's own tag); PIL's `convert`, and with it torchvision's loaders, leave all but TIFF lying.
//!
//! A file that is cut short is an error, never a half-grey image; so is a PNG whose checksums disagree. Nothing is
//! allocated for an image of more than [`MAX_PIXELS`].

mod bmp;
mod format;
mod png;
mod pnm;
mod reading;
mod tiff;
mod turn;
mod webp;

use thiserror::Error;

pub use crate::image::{CropBox, PlanarImage, RgbImage};
use crate::jpeg::{self, JpegError};
use crate::source::Encoding;
pub(crate) use format::{FORMATS, Format, IMAGE_NAMES, is_image_name};
pub(crate) use png::encode as encode_png;
pub use reading::Reading;
use reading::Taker;
pub(crate) use reading::Values;
use turn::Turn;

/// The largest image that is decoded, pixels (300 MB as RGB): a bound against decompression bombs, and more than
/// any photograph used for training has.
pub const MAX_PIXELS: u64 = 100_000_000;

/// Why bytes are not an image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// No bytes at all.
    #[error("the file is empty")]
    Empty,
    /// Of no format that is read, by its first bytes.
    #[error("none of {FORMATS} (it starts with {0})")]
    UnknownFormat(String),
    /// The file ends before the image does.
    #[error("truncated {0}: the file ends before the image does")]
    Truncated(&'static str),
    /// Not decodable.
    #[error("damaged {format}: {reason}")]
    Damaged {
        /// As "PNG".
        format: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// As the format's standard allows, and not supported.
    #[error("{format} with {what} is not read: {instead}")]
    NotRead {
        /// As "TIFF".
        format: &'static str,
        /// What it has.
        what: String,
        /// What to do.
        instead: &'static str,
    },
    /// More than [`MAX_PIXELS`], or no pixels.
    #[error("{}", size(*width, *height))]
    Size {
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
    },
    /// Raw pixels whose number of bytes is not width x height x 3.
    #[error("{bytes} bytes of raw pixels for {width} x {height} RGB")]
    RawLength {
        /// Found.
        bytes: usize,
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
}

/// Decodes an image file.
///
/// # Errors
/// [`DecodeError`]: unknown format, truncated, damaged, or too large.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    let mut image = RgbImage::default();
    Decoder::default().decode(Encoding::File, bytes, &mut image)?;
    Ok(image)
}

/// Memory of one thread that decodes: used again from image to image.
#[derive(Debug, Default)]
pub struct Decoder {
    pub(crate) reading: Reading,
    jpeg: jpeg::Decoder,
    /// Images whose format has no parts.
    whole: RgbImage,
    /// A part that lies on its side.
    lying: PlanarImage,
}

/// An image whose size is known, and of which any part can be had.
#[derive(Debug)]
pub struct Opened<'a> {
    decoder: &'a mut Decoder,
    bytes: &'a [u8],
    /// `None`: the pixels are in [`Decoder::whole`].
    header: Option<jpeg::Header>,
    /// Columns, upright.
    pub width: u32,
    /// Rows, upright.
    pub height: u32,
}

impl Decoder {
    /// A decoder that takes deep and many-banded images as `reading` says.
    #[must_use]
    pub fn new(reading: Reading) -> Self {
        Self { reading, ..Self::default() }
    }

    /// Reads as much of an image as says its size.
    ///
    /// # Errors
    /// [`DecodeError`]: unknown format, truncated, damaged, or too large.
    pub fn open<'a>(&'a mut self, encoding: Encoding, bytes: &'a [u8]) -> Result<Opened<'a>, DecodeError> {
        let taker = Taker { reading: self.reading, values: None };
        self.open_as(encoding, bytes, taker)
    }

    /// The values of a file, as far as it is a deep image that can be read with some range.
    pub(crate) fn values_of(&mut self, bytes: &[u8]) -> Result<Values, DecodeError> {
        let mut values = Values::of_one();
        let reading = Reading { range: Some([0.0, 1.0]), ..self.reading };
        self.open_as(Encoding::File, bytes, Taker { reading, values: Some(&mut values) })?;
        Ok(values)
    }

    fn open_as<'a>(
        &'a mut self,
        encoding: Encoding,
        bytes: &'a [u8],
        taker: Taker<'_>,
    ) -> Result<Opened<'a>, DecodeError> {
        let mut header = None;
        let format = match encoding {
            Encoding::Raw { width, height } => {
                raw_into(bytes, width, height, &mut self.whole)?;
                None
            }
            Encoding::File => Some(Format::of(bytes)?),
        };
        let orientation = match format {
            None => 1,
            Some(Format::Jpeg) => {
                if !has_end(bytes) {
                    return Err(DecodeError::Truncated("JPEG"));
                }
                let found = self.jpeg.header(bytes)?;
                check_size(u64::from(found.width), u64::from(found.height))?;
                header = Some(found);
                1
            }
            Some(Format::Png) => png::decode(bytes, taker, &mut self.whole)?,
            Some(Format::WebP) => webp::decode(bytes, &mut self.whole)?,
            Some(Format::Tiff) => tiff::decode(bytes, taker, &mut self.jpeg, &mut self.whole)?,
            Some(Format::Bmp) => bmp::decode(bytes, &mut self.whole)?,
            Some(Format::Ppm | Format::Pgm) => pnm::decode(bytes, taker, &mut self.whole)?,
        };
        self.set_upright(orientation);
        let (width, height) = match &header {
            Some(header) if header.orientation >= 5 => (header.height, header.width),
            Some(header) => (header.width, header.height),
            None => (self.whole.width, self.whole.height),
        };
        Ok(Opened { decoder: self, bytes, header, width, height })
    }

    /// Refuses a file that will not be read by what stands before its pixels, where that is little work: of a JPEG or PNG,
    /// one that is too large. (Other damage is for a run to find, which may pass over it.)
    ///
    /// # Errors
    /// [`DecodeError`].
    pub(crate) fn check_head(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let sides = match Format::of(bytes)? {
            Format::Tiff => return tiff::check_head(bytes, self.reading),
            Format::Ppm | Format::Pgm => return pnm::check_head(bytes),
            Format::Jpeg => self.jpeg.header(bytes).ok().map(|header| (header.width, header.height)),
            Format::Png => png::sides(bytes),
            Format::WebP | Format::Bmp => None,
        };
        sides.map_or(Ok(()), |(width, height)| check_size(width.into(), height.into()).map(|_| ()))
    }

    fn set_upright(&mut self, orientation: u8) {
        if orientation != 1 {
            let stored = std::mem::take(&mut self.whole);
            Turn { orientation, width: stored.width, height: stored.height }
                .upright_whole(&stored, &mut self.whole);
        }
    }

    /// Decodes a whole image into `image`, whose memory is used again.
    ///
    /// # Errors
    /// [`DecodeError`]; `image` then holds no particular pixels.
    pub fn decode(
        &mut self,
        encoding: Encoding,
        bytes: &[u8],
        image: &mut RgbImage,
    ) -> Result<(), DecodeError> {
        let opened = self.open(encoding, bytes)?;
        if opened.header.is_none() {
            // The caller's memory is the next image's.
            std::mem::swap(&mut self.whole, image);
            return Ok(());
        }
        let whole = CropBox::whole(opened.width, opened.height);
        let mut planes = PlanarImage::default();
        opened.part(whole, &mut planes)?;
        planes.to_rgb(image);
        Ok(())
    }
}

impl Opened<'_> {
    /// Decodes `part` into `out`: the same pixels as of the whole image. Damage elsewhere may go unnoticed.
    ///
    /// # Errors
    /// [`DecodeError`]; `out` then holds no particular pixels.
    ///
    /// # Panics
    /// If `part` is empty or not within the image.
    pub fn part(self, part: CropBox, out: &mut PlanarImage) -> Result<(), DecodeError> {
        let Decoder { jpeg, whole, lying, .. } = self.decoder;
        match &self.header {
            None => out.take(whole, part),
            Some(header) if header.orientation == 1 => jpeg.decode(self.bytes, header, part, out)?,
            Some(header) => {
                let turn =
                    Turn { orientation: header.orientation, width: header.width, height: header.height };
                jpeg.decode(self.bytes, header, turn.stored(part), lying)?;
                turn.upright(lying, part, out);
            }
        }
        Ok(())
    }
}

impl From<JpegError> for DecodeError {
    fn from(error: JpegError) -> Self {
        match error {
            JpegError::Truncated => Self::Truncated("JPEG"),
            JpegError::Unsupported(what) => {
                Self::NotRead { format: "JPEG", what: what.to_owned(), instead: "convert it" }
            }
            JpegError::Damaged(reason) => Self::Damaged { format: "JPEG", reason: reason.to_owned() },
        }
    }
}

fn size(width: u64, height: u64) -> String {
    if width == 0 || height == 0 {
        return format!("{width} x {height} pixels: an image without any");
    }
    let limit = MAX_PIXELS / 1_000_000;
    format!("{width} x {height} pixels, more than {limit} megapixels: cut it into tiles, or shrink it")
}

fn check_size(width: u64, height: u64) -> Result<usize, DecodeError> {
    match width.checked_mul(height) {
        Some(pixels @ 1..=MAX_PIXELS) => Ok(pixels as usize),
        _ => Err(DecodeError::Size { width, height }),
    }
}

/// Whether a JPEG's end marker follows its last scan. The decoder invents the last rows of a file that is cut a few
/// bytes short; this does not. (Within a scan 0xFF is always escaped, and an EXIF thumbnail's end marker stands
/// before the scan.) Looks from the end, so it costs nothing on a whole file. Behind the end there may be anything, as the film
/// of a moving photograph: what looks like a scan there is told from one by going through the file as it is made.
fn has_end(jpeg: &[u8]) -> bool {
    jpeg.windows(2).rev().find(|pair| matches!(pair, [0xFF, 0xD9 | 0xDA])).is_some_and(|pair| pair[1] == 0xD9)
        || jpeg::reaches_end(jpeg)
}

/// Whether a file has more than 8 bits a sample.
pub(crate) fn is_deep(bytes: &[u8]) -> bool {
    match Format::of(bytes) {
        Ok(Format::Png) => png::is_deep(bytes),
        Ok(Format::Tiff) => tiff::is_deep(bytes),
        Ok(Format::Ppm | Format::Pgm) => pnm::is_deep(bytes),
        Ok(Format::Jpeg | Format::WebP | Format::Bmp) | Err(_) => false,
    }
}

/// Whether `reading` makes other pixels of a file.
pub(crate) fn is_changed(bytes: &[u8], reading: Reading) -> bool {
    reading.range.is_some() && is_deep(bytes)
        || reading.bands.is_some() && Format::of(bytes) == Ok(Format::Tiff)
}

/// EXIF's orientation in a chunk, which some programs begin as JPEG's segment does; 1 when it says nothing that is understood.
fn orientation(mut chunk: &[u8]) -> u8 {
    while let Some(rest) = chunk.strip_prefix(b"Exif\0\0") {
        chunk = rest;
    }
    jpeg::exif_orientation(chunk).unwrap_or(1)
}

/// Makes `pixels` pixels of `channels` (1, 2, 3 or 4) RGB, in place: grey repeated, alpha dropped.
fn spread(image: &mut RgbImage, pixels: usize, channels: usize) {
    image.data.resize(pixels * channels.max(3), 0);
    match channels {
        // Backwards, so that a pixel is read before it is written over.
        1 | 2 => (0..pixels).rev().for_each(|i| {
            let gray = image.data[channels * i];
            image.data[3 * i..3 * i + 3].fill(gray);
        }),
        4 => (0..pixels).for_each(|i| image.data.copy_within(4 * i..4 * i + 3, 3 * i)),
        _ => {}
    }
    image.data.truncate(pixels * 3);
}

/// Takes raw `[H, W, 3]` pixels.
fn raw_into(bytes: &[u8], width: u32, height: u32, image: &mut RgbImage) -> Result<(), DecodeError> {
    let pixels = check_size(u64::from(width), u64::from(height))?;
    if bytes.len() != pixels * 3 {
        return Err(DecodeError::RawLength { bytes: bytes.len(), width, height });
    }
    image.width = width;
    image.height = height;
    image.data.clear();
    image.data.extend_from_slice(bytes);
    Ok(())
}

fn one_line(text: &str) -> String {
    text.trim_matches('"').split_whitespace().collect::<Vec<_>>().join(" ")
}
