//! PNG, by the crate of that name.

use std::io::Cursor;

use super::{DecodeError, MAX_PIXELS, Taker, check_size, one_line, orientation, spread};
use crate::image::RgbImage;

/// Whether these bytes are a PNG of 16 bits a sample (PNG, 11.2.2: the depth stands behind width and height).
pub(super) fn is_deep(bytes: &[u8]) -> bool {
    bytes.get(24) == Some(&16)
}

/// Width and height of what is a PNG (PNG, 11.2.2), where it is long enough to say them.
pub(super) fn sides(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    side(16).zip(side(20))
}

/// Decodes as stored, and returns EXIF's orientation.
pub(super) fn decode(bytes: &[u8], mut taker: Taker<'_>, image: &mut RgbImage) -> Result<u8, DecodeError> {
    let fail = |error: png::DecodingError| match error {
        png::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            DecodeError::Truncated("PNG")
        }
        other => DecodeError::Damaged { format: "PNG", reason: one_line(&other.to_string()) },
    };
    let mut decoder =
        png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 8 * MAX_PIXELS as usize });
    decoder.set_transformations(png::Transformations::EXPAND);
    let header = decoder.read_header_info().map_err(fail)?;
    let (width, height) = (header.width, header.height);
    let pixels = check_size(u64::from(width), u64::from(height))?;
    let mut reader = decoder.read_info().map_err(fail)?;
    let (colour, depth) = reader.output_color_type();
    let channels = colour.samples();
    let bytes = if depth == png::BitDepth::Sixteen { 2 } else { 1 };
    image.width = width;
    image.height = height;
    image.data.resize(pixels * bytes * channels, 0);
    reader.next_frame(&mut image.data).map_err(fail)?;
    reader.finish().map_err(fail)?;
    if bytes == 2 {
        // The last of two or four is alpha, which counts for nothing.
        let colours = channels - usize::from(channels % 2 == 0);
        for i in (0..pixels * channels).filter(|i| i % channels < colours) {
            image.data[i] = taker.of_16(u16::from_be_bytes([image.data[2 * i], image.data[2 * i + 1]]));
        }
    }
    spread(image, pixels, channels);
    // It may stand behind the pixels.
    Ok(reader.info().exif_metadata.as_deref().map_or(1, orientation))
}

/// PNG bytes of an RGB image, lossless.
pub(crate) fn encode(width: u32, height: u32, rgb: &[u8]) -> Result<Vec<u8>, String> {
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
