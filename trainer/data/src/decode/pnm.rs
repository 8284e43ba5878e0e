//! Binary PPM and PGM (netpbm's ppm(5), pgm(5)): colours and grey without compression.

use super::{DecodeError, Taker, check_size, spread};
use crate::image::RgbImage;

/// What stands before the pixels.
struct Header<'a> {
    format: &'static str,
    channels: usize,
    width: u32,
    height: u32,
    /// The value of white.
    most: u32,
    pixels: &'a [u8],
}

impl Header<'_> {
    /// Refuses what will not be read.
    fn check(&self) -> Result<(), DecodeError> {
        match self.most {
            1..=65_535 => Ok(()),
            most => {
                let reason = format!("values up to {most}");
                Err(DecodeError::Damaged { format: self.format, reason })
            }
        }
    }
}

/// One whitespace character ends the header; before it, what begins with `#` is a comment up to the end of its line, also in the
/// middle of a number.
fn header(bytes: &[u8]) -> Result<Header<'_>, DecodeError> {
    let (format, channels) = if bytes.get(1) == Some(&b'5') { ("PGM", 1) } else { ("PPM", 3) };
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
            match next().ok_or(DecodeError::Truncated(format))? {
                space if space.is_ascii_whitespace() && digits == 0 => {}
                space if space.is_ascii_whitespace() => break,
                digit if digit.is_ascii_digit() && digits < 9 => {
                    *number = *number * 10 + u32::from(digit - b'0');
                    digits += 1;
                }
                _ => {
                    let reason = "no header of width, height and largest value".to_owned();
                    return Err(DecodeError::Damaged { format, reason });
                }
            }
        }
    }
    let [width, height, most] = numbers;
    Ok(Header { format, channels, width, height, most, pixels: &bytes[at..] })
}

/// Whether values take two bytes.
pub(super) fn is_deep(bytes: &[u8]) -> bool {
    header(bytes).is_ok_and(|header| header.most > 255)
}

/// Refuses what will not be read by its header.
pub(super) fn check_head(bytes: &[u8]) -> Result<(), DecodeError> {
    header(bytes)?.check()
}

/// Decodes; what EXIF's orientation would say is 1.
pub(super) fn decode(bytes: &[u8], mut taker: Taker<'_>, image: &mut RgbImage) -> Result<u8, DecodeError> {
    let header = header(bytes)?;
    header.check()?;
    let Header { format, channels, width, height, most, pixels } = header;
    let deep = most > 255;
    let count = check_size(u64::from(width), u64::from(height))?;
    let values = count * channels;
    let pixels = pixels.get(..values << u32::from(deep)).ok_or(DecodeError::Truncated(format))?;
    (image.width, image.height) = (width, height);
    image.data.clear();
    // White is what the file says; of 65535 the high byte is kept, as everywhere.
    let of_white = |value: u32| (f64::from(value) / f64::from(most) * 255.0).round_ties_even() as u8;
    let pairs = pixels.chunks_exact(2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    match most {
        255 => image.data.extend_from_slice(pixels),
        ..255 => image.data.extend(pixels.iter().map(|&value| of_white(value.into()))),
        65_535 => image.data.extend(pairs.map(|value| taker.of_16(value))),
        _ if taker.reading.range.is_some() => image.data.extend(pairs.map(|value| taker.of_16(value))),
        _ => image.data.extend(pairs.map(|value| of_white(value.into()))),
    }
    spread(image, count, channels);
    Ok(1)
}
