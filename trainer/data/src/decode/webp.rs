//! WebP, by image-webp.

use std::io::Cursor;

use image_webp::{DecodingError, WebPDecoder};

use super::{DecodeError, MAX_PIXELS, check_size, one_line, orientation, spread};
use crate::image::RgbImage;

/// Decodes as stored, and returns EXIF's orientation.
pub(super) fn decode(bytes: &[u8], image: &mut RgbImage) -> Result<u8, DecodeError> {
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
    spread(image, pixels, channels);
    // A chunk without its flag in the extended header is none.
    let has_exif = bytes.get(12..16) == Some(b"VP8X") && bytes.get(20).is_some_and(|flags| flags & 8 != 0);
    Ok(match decoder.exif_metadata() {
        Ok(Some(chunk)) if has_exif => orientation(&chunk),
        _ => 1,
    })
}
