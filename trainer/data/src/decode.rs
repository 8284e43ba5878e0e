//! Encoded bytes to 8-bit RGB. JPEG (baseline and progressive) by zune-jpeg, PNG by png.
//!
//! What is not RGB becomes RGB as PIL's `convert("RGB")` does it, which is what torchvision's loaders call:
//! grayscale is repeated over the channels, alpha is dropped (not blended), 16-bit samples keep their high byte,
//! palettes are looked up, CMYK and YCCK are converted.
//!
//! A file that is cut short is an error, never a half-grey image; so is a PNG whose checksums disagree. Nothing is
//! allocated for an image of more than [`MAX_PIXELS`].

use std::io::Cursor;

use thiserror::Error;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The largest image that is decoded, pixels (300 MB as RGB): a bound against decompression bombs, and more than
/// any photograph used for training has.
pub const MAX_PIXELS: u64 = 100_000_000;

/// An 8-bit RGB image, rows from top to bottom, `[H, W, 3]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

/// Why bytes are not an image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// No bytes at all.
    #[error("the file is empty")]
    Empty,
    /// Neither JPEG nor PNG by its first bytes.
    #[error("neither JPEG nor PNG (it starts with {0})")]
    UnknownFormat(String),
    /// The file ends before the image does.
    #[error("truncated {0}: the file ends before the image does")]
    Truncated(&'static str),
    /// Not decodable.
    #[error("damaged {format}: {reason}")]
    Damaged {
        /// "JPEG" or "PNG".
        format: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// More than [`MAX_PIXELS`], or no pixels.
    #[error("{width} x {height} pixels: the limit is 1 to {MAX_PIXELS} pixels")]
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

/// Decodes a JPEG or PNG file.
///
/// # Errors
/// [`DecodeError`]: unknown format, truncated, damaged, or too large.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    let mut image = RgbImage::default();
    decode_into(bytes, &mut image)?;
    Ok(image)
}

/// As [`decode`], into an image whose buffer is reused.
///
/// # Errors
/// As [`decode`]; `image` then holds no particular pixels.
pub fn decode_into(bytes: &[u8], image: &mut RgbImage) -> Result<(), DecodeError> {
    match bytes {
        [] => Err(DecodeError::Empty),
        [0xFF, 0xD8, ..] => decode_jpeg(bytes, image),
        [0x89, b'P', b'N', b'G', ..] => decode_png(bytes, image),
        _ => {
            let start: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
            Err(DecodeError::UnknownFormat(start.join(" ")))
        }
    }
}

fn check_size(width: u64, height: u64) -> Result<usize, DecodeError> {
    match width.checked_mul(height) {
        Some(pixels @ 1..=MAX_PIXELS) => Ok(pixels as usize),
        _ => Err(DecodeError::Size { width, height }),
    }
}

/// Whether a JPEG's end marker follows its last scan. The decoder invents the last rows of a file that is cut a few
/// bytes short; this does not. (Within a scan 0xFF is always escaped, and an EXIF thumbnail's end marker stands
/// before the scan.) Looks from the end, so it costs nothing on a whole file.
fn has_end(jpeg: &[u8]) -> bool {
    jpeg.windows(2).rev().find(|pair| matches!(pair, [0xFF, 0xD9 | 0xDA])).is_some_and(|pair| pair[1] == 0xD9)
}

fn decode_jpeg(bytes: &[u8], image: &mut RgbImage) -> Result<(), DecodeError> {
    if !has_end(bytes) {
        return Err(DecodeError::Truncated("JPEG"));
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let fail = |error: DecodeErrors| match error {
        DecodeErrors::ExhaustedData | DecodeErrors::IoErrors(_) => DecodeError::Truncated("JPEG"),
        DecodeErrors::FormatStatic(reason) if reason.contains("Premature") => DecodeError::Truncated("JPEG"),
        other => DecodeError::Damaged { format: "JPEG", reason: one_line(&other.to_string()) },
    };
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(fail)?;
    let info = decoder.info().ok_or(DecodeError::Truncated("JPEG"))?;
    let pixels = check_size(u64::from(info.width), u64::from(info.height))?;
    image.width = u32::from(info.width);
    image.height = u32::from(info.height);
    image.data.resize(pixels * 3, 0);
    decoder.decode_into(&mut image.data).map_err(fail)
}

fn decode_png(bytes: &[u8], image: &mut RgbImage) -> Result<(), DecodeError> {
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
    Ok(())
}

/// Takes raw `[H, W, 3]` pixels.
pub(crate) fn raw_into(
    bytes: &[u8],
    width: u32,
    height: u32,
    image: &mut RgbImage,
) -> Result<(), DecodeError> {
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
