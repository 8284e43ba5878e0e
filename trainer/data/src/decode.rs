//! Encoded bytes to 8-bit RGB: JPEG by [`crate::jpeg`], PNG by png, WebP by image-webp.
//!
//! What is not RGB becomes RGB as PIL's `convert("RGB")` does it, which is what torchvision's loaders call:
//! grayscale is repeated over the channels, alpha is dropped (not blended), palettes are looked up, CMYK and YCCK are
//! converted. Of an animation the first image counts.
//!
//! Samples of 16 bits keep their high byte, whatever the range that is used: the same rule for every image. PIL does so with
//! colours, and cuts 16-bit grey off at 255, which leaves white. [`crate::check::stats`] tells of data that 8 bits would spoil.
//!
//! A photograph that EXIF says is lying on its side is set upright, as viewers show it and as PIL's `exif_transpose` does (JPEG's
//! APP1, PNG's eXIf, WebP's EXIF); PIL's `convert`, and with it torchvision's loaders, leave it lying.
//!
//! A file that is cut short is an error, never a half-grey image; so is a PNG whose checksums disagree. Nothing is
//! allocated for an image of more than [`MAX_PIXELS`].

use std::io::Cursor;

use thiserror::Error;

pub use crate::image::{CropBox, PlanarImage, RgbImage};
use crate::jpeg::{self, JpegError};
use crate::source::Encoding;

/// The largest image that is decoded, pixels (300 MB as RGB): a bound against decompression bombs, and more than
/// any photograph used for training has.
pub const MAX_PIXELS: u64 = 100_000_000;

/// Why bytes are not an image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// No bytes at all.
    #[error("the file is empty")]
    Empty,
    /// Neither JPEG, PNG nor WebP by its first bytes.
    #[error("neither JPEG, PNG nor WebP (it starts with {0})")]
    UnknownFormat(String),
    /// The file ends before the image does.
    #[error("truncated {0}: the file ends before the image does")]
    Truncated(&'static str),
    /// Not decodable.
    #[error("damaged {format}: {reason}")]
    Damaged {
        /// "JPEG", "PNG" or "WebP".
        format: &'static str,
        /// The decoder's words.
        reason: String,
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

/// Decodes a JPEG, PNG or WebP file.
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
    /// Reads as much of an image as says its size.
    ///
    /// # Errors
    /// [`DecodeError`]: unknown format, truncated, damaged, or too large.
    pub fn open<'a>(&'a mut self, encoding: Encoding, bytes: &'a [u8]) -> Result<Opened<'a>, DecodeError> {
        let mut header = None;
        match (encoding, bytes) {
            (Encoding::Raw { width, height }, _) => raw_into(bytes, width, height, &mut self.whole)?,
            (Encoding::File, []) => return Err(DecodeError::Empty),
            (Encoding::File, [0xFF, 0xD8, ..]) => {
                if !has_end(bytes) {
                    return Err(DecodeError::Truncated("JPEG"));
                }
                let found = self.jpeg.header(bytes)?;
                check_size(u64::from(found.width), u64::from(found.height))?;
                header = Some(found);
            }
            (Encoding::File, [0x89, b'P', b'N', b'G', ..]) => {
                let orientation = decode_png(bytes, &mut self.whole)?;
                self.set_upright(orientation);
            }
            (Encoding::File, [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..]) => {
                let orientation = decode_webp(bytes, &mut self.whole)?;
                self.set_upright(orientation);
            }
            (Encoding::File, [b'P', b'6', b'#' | b' ' | b'\t'..=b'\r', ..]) => {
                let (width, height, pixels) = ppm(bytes)?;
                raw_into(pixels, width, height, &mut self.whole)?;
            }
            _ => {
                let start: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
                return Err(DecodeError::UnknownFormat(start.join(" ")));
            }
        }
        let (width, height) = match &header {
            Some(header) if header.orientation >= 5 => (header.height, header.width),
            Some(header) => (header.width, header.height),
            None => (self.whole.width, self.whole.height),
        };
        Ok(Opened { decoder: self, bytes, header, width, height })
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
        let Decoder { jpeg, whole, lying } = self.decoder;
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

/// EXIF's orientations (Exif 2.32, 4.6.4): how a stored image of `width` x `height` is to be turned.
#[derive(Debug, Clone, Copy)]
struct Turn {
    orientation: u8,
    width: u32,
    height: u32,
}

impl Turn {
    /// Where the pixel (x, y) of the upright image is stored.
    fn from(self, x: u32, y: u32) -> (u32, u32) {
        let (right, bottom) = (self.width - 1, self.height - 1);
        match self.orientation {
            2 => (right - x, y),
            3 => (right - x, bottom - y),
            4 => (x, bottom - y),
            5 => (y, x),
            6 => (y, bottom - x),
            7 => (right - y, bottom - x),
            8 => (right - y, x),
            _ => (x, y),
        }
    }

    /// The stored pixels of a part of the upright image.
    fn stored(self, part: CropBox) -> CropBox {
        let (a, b) = self.from(part.x, part.y);
        let (c, d) = self.from(part.x + part.width - 1, part.y + part.height - 1);
        CropBox { x: a.min(c), y: b.min(d), width: a.abs_diff(c) + 1, height: b.abs_diff(d) + 1 }
    }

    /// Turns a whole image.
    fn upright_whole(self, stored: &RgbImage, out: &mut RgbImage) {
        let sides = (stored.width, stored.height);
        (out.width, out.height) = if self.orientation >= 5 { (sides.1, sides.0) } else { sides };
        out.data.clear();
        for y in 0..out.height {
            for x in 0..out.width {
                let (sx, sy) = self.from(x, y);
                let at = (sy as usize * stored.width as usize + sx as usize) * 3;
                out.data.extend_from_slice(&stored.data[at..at + 3]);
            }
        }
    }

    /// Turns the stored pixels of `part`.
    fn upright(self, stored: &PlanarImage, part: CropBox, out: &mut PlanarImage) {
        let (width, height) = (part.width as usize, part.height as usize);
        out.reset(part);
        for channel in 0..3 {
            let from = stored.from(channel, stored.part);
            let to = &mut out.data[channel * width * height..][..width * height];
            for (y, row) in (part.y..).zip(to.chunks_exact_mut(width)) {
                for (x, pixel) in (part.x..).zip(row) {
                    let (sx, sy) = self.from(x, y);
                    *pixel =
                        from[(sy - stored.part.y) as usize * stored.stride + (sx - stored.part.x) as usize];
                }
            }
        }
    }
}

impl From<JpegError> for DecodeError {
    fn from(error: JpegError) -> Self {
        match error {
            JpegError::Truncated => Self::Truncated("JPEG"),
            other => Self::Damaged { format: "JPEG", reason: other.to_string() },
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

/// Whether these bytes are a PNG of 16 bits a sample (PNG, 11.2.2: the depth stands behind width and height).
pub(crate) fn is_deep(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x89PNG") && bytes.get(24) == Some(&16)
}

/// Decodes as stored, and returns EXIF's orientation.
fn decode_png(bytes: &[u8], image: &mut RgbImage) -> Result<u8, DecodeError> {
    let fail = |error: png::DecodingError| match error {
        png::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            DecodeError::Truncated("PNG")
        }
        other => DecodeError::Damaged { format: "PNG", reason: one_line(&other.to_string()) },
    };
    let mut decoder =
        png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 8 * MAX_PIXELS as usize });
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let header = decoder.read_header_info().map_err(fail)?;
    let (width, height) = (header.width, header.height);
    let pixels = check_size(u64::from(width), u64::from(height))?;
    let mut reader = decoder.read_info().map_err(fail)?;
    let channels = reader.output_color_type().0.samples();
    image.width = width;
    image.height = height;
    image.data.resize(pixels * channels.max(3), 0);
    reader.next_frame(&mut image.data[..pixels * channels]).map_err(fail)?;
    reader.finish().map_err(fail)?;
    match channels {
        // Backwards, so that a pixel is read before it is written over.
        1 => (0..pixels).rev().for_each(|i| {
            let gray = image.data[i];
            image.data[3 * i..3 * i + 3].fill(gray);
        }),
        2 => (0..pixels).rev().for_each(|i| {
            let gray = image.data[2 * i];
            image.data[3 * i..3 * i + 3].fill(gray);
        }),
        4 => (0..pixels).for_each(|i| image.data.copy_within(4 * i..4 * i + 3, 3 * i)),
        _ => {}
    }
    image.data.truncate(pixels * 3);
    // It may stand behind the pixels.
    Ok(reader.info().exif_metadata.as_deref().map_or(1, orientation))
}

/// EXIF's orientation in a chunk, which some programs begin as JPEG's segment does; 1 when it says nothing that is understood.
fn orientation(mut chunk: &[u8]) -> u8 {
    while let Some(rest) = chunk.strip_prefix(b"Exif\0\0") {
        chunk = rest;
    }
    jpeg::exif_orientation(chunk).unwrap_or(1)
}

/// Decodes as stored, and returns EXIF's orientation.
fn decode_webp(bytes: &[u8], image: &mut RgbImage) -> Result<u8, DecodeError> {
    use image_webp::{DecodingError, WebPDecoder};
    let fail = |error: DecodingError| match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            DecodeError::Truncated("WebP")
        }
        other => DecodeError::Damaged { format: "WebP", reason: one_line(&other.to_string()) },
    };
    // The size that the container states comes first; a file that is shorter was cut.
    let stated = bytes.get(4..8).and_then(|size| size.try_into().ok()).map_or(0, u32::from_le_bytes);
    if (bytes.len() as u64) < u64::from(stated) + 8 {
        return Err(DecodeError::Truncated("WebP"));
    }
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(fail)?;
    decoder.set_memory_limit(8 * MAX_PIXELS as usize);
    let (width, height) = decoder.dimensions();
    let pixels = check_size(u64::from(width), u64::from(height))?;
    let channels = if decoder.has_alpha() { 4 } else { 3 };
    (image.width, image.height) = (width, height);
    image.data.resize(pixels * channels, 0);
    decoder.read_image(&mut image.data).map_err(fail)?;
    if channels == 4 {
        (0..pixels).for_each(|i| image.data.copy_within(4 * i..4 * i + 3, 3 * i));
    }
    image.data.truncate(pixels * 3);
    // A chunk without its flag in the extended header is none.
    let has_exif = bytes.get(12..16) == Some(b"VP8X") && bytes.get(20).is_some_and(|flags| flags & 8 != 0);
    Ok(match decoder.exif_metadata() {
        Ok(Some(chunk)) if has_exif => orientation(&chunk),
        _ => 1,
    })
}

/// Width, height and pixels of a binary PPM file of 8 bits. One whitespace character ends the header; before it, what begins with
/// `#` is a comment up to the end of its line, also in the middle of a number (netpbm's ppm(5)).
fn ppm(bytes: &[u8]) -> Result<(u32, u32, &[u8]), DecodeError> {
    let bad = |reason: &str| DecodeError::Damaged { format: "PPM", reason: reason.to_owned() };
    let mut at = 2;
    let mut next = || -> Option<u8> {
        if bytes.get(at) == Some(&b'#') {
            at += bytes[at..].iter().position(|byte| b"\r\n".contains(byte))?;
        }
        at += 1;
        bytes.get(at - 1).copied()
    };
    let mut numbers = [0u32; 3];
    for number in &mut numbers {
        let mut digits = 0;
        loop {
            match next().ok_or(DecodeError::Truncated("PPM"))? {
                space if space.is_ascii_whitespace() && digits == 0 => {}
                space if space.is_ascii_whitespace() => break,
                digit if digit.is_ascii_digit() && digits < 9 => {
                    *number = *number * 10 + u32::from(digit - b'0');
                    digits += 1;
                }
                _ => return Err(bad("no header of width, height and 255")),
            }
        }
    }
    let [width, height, most] = numbers;
    if most != 255 {
        return Err(bad(&format!("values up to {most}: only those up to 255 are read")));
    }
    let pixels = &bytes[at..];
    let expected = check_size(u64::from(width), u64::from(height))? * 3;
    if pixels.len() < expected {
        return Err(DecodeError::Truncated("PPM"));
    }
    Ok((width, height, &pixels[..expected]))
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

/// PNG bytes of an RGB image, lossless.
pub(crate) fn encode_png(width: u32, height: u32, rgb: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(rgb.len() + 128);
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
    writer.write_image_data(rgb).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn one_line(text: &str) -> String {
    text.trim_matches('"').split_whitespace().collect::<Vec<_>>().join(" ")
}
