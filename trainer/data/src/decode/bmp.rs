//! BMP, by image.

use std::io::{Cursor, ErrorKind};

use image::codecs::bmp::BmpDecoder;
use image::{ImageDecoder, ImageError};

use super::{DecodeError, check_size, one_line, spread};
use crate::image::RgbImage;

/// Decodes; what EXIF's orientation would say is 1.
pub(super) fn decode(bytes: &[u8], image: &mut RgbImage) -> Result<u8, DecodeError> {
    let fail = |error: ImageError| match error {
        ImageError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => DecodeError::Truncated("BMP"),
        other => DecodeError::Damaged { format: "BMP", reason: one_line(&other.to_string()) },
    };
    if let Some(length @ (16 | 64)) = bytes.get(14) {
        let what = format!("a header of {length} bytes (OS/2)");
        return Err(DecodeError::NotRead { format: "BMP", what, instead: "convert it" });
    }
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(fail)?;
    let (width, height) = decoder.dimensions();
    let pixels = check_size(u64::from(width), u64::from(height))?;
    let channels = usize::from(decoder.color_type().channel_count());
    (image.width, image.height) = (width, height);
    image.data.resize(pixels * channels, 0);
    decoder.read_image(&mut image.data).map_err(fail)?;
    spread(image, pixels, channels);
    Ok(1)
}
