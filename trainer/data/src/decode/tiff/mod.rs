//! TIFF 6.0, with Technical Note 2's JPEG, and BigTIFF: the first image of a file.
//!
//! ```text
//!  tags ─► Layout ─► strips or tiles ─► unpacked bytes ─► samples ─► RGB
//!  (directory.rs, layout.rs)            (unpack.rs, jpeg)
//! ```
//! Grey, RGB, palettes and CMYK of 1, 2, 4, 8 or 16 bits a sample, pixel by pixel or plane by plane. Channels beyond those of the
//! colour (alpha, near infrared) are dropped, as the file says which come first. What becomes 8-bit RGB by no rule for all
//! images is refused by name, with what to do; a [`Reading`] makes such a rule, of numbers with a sign, fractions or 32 and 64 bits,
//! and of bands without colours.

mod directory;
mod layout;
mod unpack;

use std::borrow::Cow;

use super::{DecodeError, Reading, Taker, has_end};
use crate::image::{CropBox, PlanarImage, RgbImage};
use crate::jpeg;
use directory::Directory;
use layout::{Colour, Differences, Kind, Layout};
use unpack::{Packing, unpack};

fn truncated() -> DecodeError {
    DecodeError::Truncated("TIFF")
}

fn damaged(reason: &str) -> DecodeError {
    DecodeError::Damaged { format: "TIFF", reason: reason.to_owned() }
}

fn not_read(what: &str, instead: &'static str) -> DecodeError {
    DecodeError::NotRead { format: "TIFF", what: what.to_owned(), instead }
}

/// Whether samples are more than 8 bits without sign.
pub(super) fn is_deep(bytes: &[u8]) -> bool {
    Directory::first(bytes).is_ok_and(|tags| {
        tags.one(258, 1).is_ok_and(|bits| bits > 8)
            || tags.one(339, 1).is_ok_and(|kind| !matches!(kind, 1 | 4))
    })
}

/// Refuses what will not be read by its tags.
pub(super) fn check_head(bytes: &[u8], reading: Reading) -> Result<(), DecodeError> {
    Directory::first(bytes).and_then(|tags| Layout::of(&tags, reading)).map(|_| ())
}

/// Decodes as stored, and returns the orientation.
pub(super) fn decode(
    bytes: &[u8],
    mut taker: Taker<'_>,
    jpeg: &mut jpeg::Decoder,
    image: &mut RgbImage,
) -> Result<u8, DecodeError> {
    let tags = Directory::first(bytes)?;
    let layout = Layout::of(&tags, taker.reading)?;
    (image.width, image.height) = (layout.width as u32, layout.height as u32);
    image.data.clear();
    image.data.resize(layout.width * layout.height * 3, 0);
    let mut work = Work::default();
    for down in 0..layout.height.div_ceil(layout.chunk.1) {
        for across in 0..layout.across() {
            match layout.packing {
                Some(packing) => {
                    layout.chunk(bytes, packing, (across, down), &mut taker, &mut work, image)?
                }
                None => layout.jpeg_chunk(bytes, (across, down), jpeg, &mut work, image)?,
            }
        }
    }
    Ok(u8::try_from(tags.one(274, 1)?).ok().filter(|turn| (1..=8).contains(turn)).unwrap_or(1))
}

/// Memory that is used again from strip to strip.
#[derive(Debug, Default)]
struct Work {
    /// Samples of a row that count, of all planes, as 8 bits.
    line: Vec<u8>,
    /// Samples of a row as 8 bits.
    row: Vec<u8>,
    /// Bits of the samples of a row.
    deep: Vec<u64>,
    /// A row whose bytes were differences.
    bytes: Vec<u8>,
    /// A JPEG file made of tables and a strip.
    file: Vec<u8>,
    planes: PlanarImage,
}

impl Layout<'_> {
    /// Unpacks the strip or tile at `at` into `image`.
    fn chunk(
        &self,
        file: &[u8],
        packing: Packing,
        at: (usize, usize),
        taker: &mut Taker<'_>,
        work: &mut Work,
        image: &mut RgbImage,
    ) -> Result<(), DecodeError> {
        let (columns, rows) = self.within(at);
        let together = if self.planar { 1 } else { self.samples };
        let row_bytes = (self.chunk.0 * together * self.bits).div_ceil(8);
        let stored_rows = if self.tiled { self.chunk.1 } else { rows };
        let channels = self.picked.len();
        let stored: &[usize] = if self.planar { &self.picked } else { &[0] };
        let planes: Vec<Cow<'_, [u8]>> = stored
            .iter()
            .map(|plane| {
                let index = plane * self.per_plane() + at.1 * self.across() + at.0;
                if self.is_left_out(index) {
                    return Ok(Cow::Owned(vec![0; row_bytes * stored_rows]));
                }
                unpack(packing, self.packed(file, index)?, row_bytes * stored_rows)
            })
            .collect::<Result<_, _>>()?;
        let plain = self.colour == Colour::Rgb
            && (self.bits, self.kind, self.differences) == (8, Kind::Unsigned, Differences::None)
            && together == 3
            && self.picked == [0, 1, 2];
        for y in 0..rows {
            let row = y * row_bytes..(y + 1) * row_bytes;
            let to = 3 * ((at.1 * self.chunk.1 + y) * self.width + at.0 * self.chunk.0);
            let to = &mut image.data[to..to + 3 * columns];
            if plain {
                to.copy_from_slice(&planes[0][row][..3 * columns]);
                continue;
            }
            work.line.resize(columns * channels, 0);
            for (plane, bytes) in planes.iter().enumerate() {
                let mut bytes = &bytes[row.clone()];
                if self.differences != Differences::Bytes {
                    // What lies beyond the image is not needed.
                    bytes = &bytes[..(columns * together * self.bits).div_ceil(8)];
                }
                self.samples_of(bytes, plane, together, taker, work);
            }
            self.to_rgb(&work.line, to);
        }
        Ok(())
    }

    /// Brings the samples of a stored row that count, `together` a pixel, as 8 bits into the line: deep ones shrunk, those of fewer
    /// bits spread over the range unless they count colours.
    fn samples_of(
        &self,
        bytes: &[u8],
        plane: usize,
        together: usize,
        taker: &mut Taker<'_>,
        work: &mut Work,
    ) {
        let Work { line, row, deep, bytes: undone, .. } = work;
        // Where they come from in a pixel that is stored, and where they go in one that counts.
        let (from, first): (&[usize], usize) = if self.planar { (&[0], plane) } else { (&self.picked, 0) };
        let pixels = line.chunks_exact_mut(self.picked.len());
        if self.bits > 8 || self.kind != Kind::Unsigned {
            self.bits_of(bytes, together, undone, deep);
            for (to, stored) in pixels.zip(deep.chunks_exact(together)) {
                to[first..].iter_mut().zip(from).for_each(|(to, &at)| *to = self.shrunk(stored[at], taker));
            }
            return;
        }
        row.clear();
        if self.bits == 8 {
            row.extend_from_slice(bytes);
            if self.differences == Differences::Whole {
                for i in together..row.len() {
                    row[i] = row[i].wrapping_add(row[i - together]);
                }
            }
        } else {
            let most = (1u8 << self.bits) - 1;
            let factor = if matches!(self.colour, Colour::Palette(_)) { 1 } else { 255 / most };
            row.extend(bytes.iter().flat_map(|&byte| {
                (1..=8 / self.bits).map(move |k| (byte >> (8 - k * self.bits) & most) * factor)
            }));
        }
        for (to, stored) in pixels.zip(row.chunks_exact(together)) {
            to[first..].iter_mut().zip(from).for_each(|(to, &at)| *to = stored[at]);
        }
    }

    /// Bits of the samples of a stored row.
    fn bits_of(&self, bytes: &[u8], together: usize, undone: &mut Vec<u8>, deep: &mut Vec<u64>) {
        let each = self.bits / 8;
        deep.clear();
        if self.differences == Differences::Bytes {
            undone.clear();
            undone.extend_from_slice(bytes);
            for i in together..undone.len() {
                undone[i] = undone[i].wrapping_add(undone[i - together]);
            }
            // Whatever the file's order: the byte that counts most comes first.
            let count = bytes.len() / each;
            deep.extend(
                (0..count)
                    .map(|i| (0..each).fold(0, |bits, byte| bits << 8 | u64::from(undone[byte * count + i]))),
            );
            return;
        }
        let add = |bits: u64, &byte: &u8| bits << 8 | u64::from(byte);
        if self.big_endian {
            deep.extend(bytes.chunks_exact(each).map(|bytes| bytes.iter().fold(0, add)));
        } else {
            deep.extend(bytes.chunks_exact(each).map(|bytes| bytes.iter().rev().fold(0, add)));
        }
        if self.differences == Differences::Whole {
            let mask = u64::MAX >> (64 - self.bits);
            for i in together..deep.len() {
                deep[i] = deep[i].wrapping_add(deep[i - together]) & mask;
            }
        }
    }

    /// A sample of other than 8 bits without sign.
    fn shrunk(&self, bits: u64, taker: &mut Taker<'_>) -> u8 {
        let Some(range) = taker.reading.range else { return (bits >> 8) as u8 }; // of 16 bits without sign
        let value = match (self.kind, self.bits) {
            (Kind::Unsigned, _) => bits as f64,
            (Kind::Signed, width) => ((bits << (64 - width)) as i64 >> (64 - width)) as f64,
            (Kind::Float, 32) => f64::from(f32::from_bits(bits as u32)),
            (Kind::Float, _) => f64::from_bits(bits),
        };
        taker.of(value, range)
    }

    /// Samples that count to RGB.
    fn to_rgb(&self, line: &[u8], to: &mut [u8]) {
        match &self.colour {
            Colour::Gray => to.chunks_exact_mut(3).zip(line).for_each(|(rgb, &gray)| rgb.fill(gray)),
            Colour::Palette(colours) => {
                to.chunks_exact_mut(3)
                    .zip(line)
                    .for_each(|(rgb, &index)| rgb.copy_from_slice(&colours[usize::from(index)]));
            }
            Colour::Rgb | Colour::YCbCr => to.copy_from_slice(line),
            Colour::RgbTimesAlpha => {
                for (rgb, four) in to.chunks_exact_mut(3).zip(line.chunks_exact(4)) {
                    let alpha = u32::from(four[3]);
                    let whole =
                        |value: u8| (255 * u32::from(value)).checked_div(alpha).unwrap_or(0).min(255) as u8;
                    rgb.iter_mut().zip(four).for_each(|(to, &value)| *to = whole(value));
                }
            }
            Colour::Cmyk => {
                for (rgb, inks) in to.chunks_exact_mut(3).zip(line.chunks_exact(4)) {
                    for (value, &ink) in rgb.iter_mut().zip(inks) {
                        *value = jpeg::without_ink(ink, 255 - inks[3]);
                    }
                }
            }
        }
        if self.inverted {
            to.iter_mut().for_each(|value| *value = 255 - *value);
        }
    }

    /// Decodes the strip or tile at `at`, a JPEG file but for its tables, into `image`.
    fn jpeg_chunk(
        &self,
        file: &[u8],
        at: (usize, usize),
        jpeg: &mut jpeg::Decoder,
        work: &mut Work,
        image: &mut RgbImage,
    ) -> Result<(), DecodeError> {
        let packed = self.packed(file, at.1 * self.across() + at.0)?;
        let [0xFF, 0xD8, scan @ ..] = packed else { return Err(damaged("a JPEG strip without its start")) };
        if !has_end(packed) {
            return Err(truncated());
        }
        let end = self.tables.windows(2).rposition(|pair| pair == [0xFF, 0xD9]);
        let tables = &self.tables[..end.unwrap_or(self.tables.len())];
        work.file.clear();
        work.file.extend_from_slice(if tables.is_empty() { &[0xFF, 0xD8] } else { tables });
        work.file.extend_from_slice(scan);
        let in_tiff = |error| match DecodeError::from(error) {
            DecodeError::Truncated(_) => truncated(),
            DecodeError::NotRead { what, instead, .. } => not_read(&format!("JPEG with {what}"), instead),
            other => damaged(&other.to_string()),
        };
        let mut header = jpeg.header(&work.file).map_err(in_tiff)?;
        let (columns, rows) = self.within(at);
        let (width, height) = (header.width as usize, header.height as usize);
        if header.channels() != self.samples
            || !(columns..=self.chunk.0).contains(&width)
            || !(rows..=self.chunk.1).contains(&height)
        {
            return Err(damaged("a JPEG strip of another size or number of channels than the image"));
        }
        // What the colours are is said by TIFF, whatever segments of JFIF or Adobe say.
        if self.samples == 3 {
            header.set_colours(self.colour == Colour::YCbCr);
        }
        let part = CropBox::whole(columns as u32, rows as u32);
        jpeg.decode(&work.file, &header, part, &mut work.planes).map_err(in_tiff)?;
        for y in 0..rows {
            let row = CropBox { x: 0, y: y as u32, width: columns as u32, height: 1 };
            let planes: [&[u8]; 3] = std::array::from_fn(|channel| work.planes.from(channel, row));
            let to = 3 * ((at.1 * self.chunk.1 + y) * self.width + at.0 * self.chunk.0);
            for (x, rgb) in image.data[to..to + 3 * columns].chunks_exact_mut(3).enumerate() {
                rgb.copy_from_slice(&planes.map(|plane| plane[x]));
            }
        }
        Ok(())
    }
}
