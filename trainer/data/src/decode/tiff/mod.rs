//! TIFF 6.0, with Technical Note 2's JPEG, and BigTIFF: the first image of a file.
//!
//! ```text
//!  tags ─► Layout ─► strips or tiles ─► unpacked bytes ─► samples ─► RGB
//!  (directory.rs)                       (unpack.rs, jpeg)
//! ```
//! Grey, RGB, palettes and CMYK of 1, 2, 4, 8 or 16 bits a sample, pixel by pixel or plane by plane. Channels beyond those of the
//! colour (alpha, near infrared) are dropped, as the file says which come first. What becomes 8-bit RGB by no rule for all
//! images is refused by name, with what to do; a [`Reading`] makes such a rule, of numbers with a sign, fractions or 32 and 64 bits,
//! and of bands without colours.

mod directory;
mod unpack;

use std::borrow::Cow;

use super::{DecodeError, MAX_PIXELS, Reading, Taker, check_size, has_end};
use crate::image::{CropBox, PlanarImage, RgbImage};
use crate::jpeg;
use directory::Directory;
use mentee_config::counted;
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

/// What a pixel's first samples say (tag 262).
#[derive(Debug, Clone, PartialEq, Eq)]
enum Colour {
    Gray {
        white_is_zero: bool,
    },
    Rgb,
    /// RGB, each multiplied by the alpha behind it.
    RgbTimesAlpha,
    /// Red, green, blue of each index.
    Palette(Vec<[u8; 3]>),
    Cmyk,
    /// Within JPEG, whose decoder makes it RGB.
    YCbCr,
}

impl Colour {
    /// Samples of a pixel that count.
    fn channels(&self) -> usize {
        match self {
            Self::Gray { .. } | Self::Palette(_) => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk | Self::RgbTimesAlpha => 4,
        }
    }
}

/// What a sample's bits are (tag 339).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unsigned,
    Signed,
    Float,
}

/// How samples are written as differences to the pixel on the left (tag 317).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Differences {
    None,
    /// Of whole numbers.
    Whole,
    /// Of bytes, all first bytes of a row before all second ones: floating-point numbers (Technical Note 3).
    Bytes,
}

/// Where the samples of an image stand.
#[derive(Debug)]
struct Layout<'a> {
    width: usize,
    height: usize,
    colour: Colour,
    /// Which samples of a pixel count, in the order of the colour's.
    picked: Vec<usize>,
    /// Samples of a pixel, those that do not count among them.
    samples: usize,
    /// Of a sample: 1, 2, 4, 8, 16, 32 or 64.
    bits: usize,
    kind: Kind,
    big_endian: bool,
    /// Each sample has strips or tiles of its own.
    planar: bool,
    differences: Differences,
    /// `None`: JPEG.
    packing: Option<Packing>,
    /// JPEG tables that hold for all strips or tiles.
    tables: &'a [u8],
    /// Columns and rows of a strip or tile.
    chunk: (usize, usize),
    /// The last strip ends with the image; tiles are whole.
    tiled: bool,
    offsets: Vec<u64>,
    /// Bytes, packed; unknown where it is empty.
    lengths: Vec<u64>,
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

impl<'a> Layout<'a> {
    fn of(tags: &Directory<'a>, reading: Reading) -> Result<Self, DecodeError> {
        let (width, height) = (tags.required(256, "width")?, tags.required(257, "height")?);
        check_size(width, height)?;
        let (width, height) = (width as usize, height as usize);
        let samples = tags.one(277, 1)?.max(1) as usize;
        let (bits, kind) = depth(tags, reading)?;
        if tags.one(266, 1)? == 2 {
            return Err(not_read("bits from the right (FillOrder 2)", "write it anew"));
        }
        let packing = match tags.one(259, 1)? {
            1 => Some(Packing::None),
            5 => Some(Packing::Lzw),
            7 => None,
            8 | 32_946 => Some(Packing::Deflate),
            32_773 => Some(Packing::PackBits),
            other => return Err(not_read(&compression(other), "write it with LZW or Deflate")),
        };
        let colour = match tags.required(262, "colour space")? {
            kind @ (0 | 1) => Colour::Gray { white_is_zero: kind == 0 },
            2 => Colour::Rgb,
            3 => palette(tags, bits)?,
            5 => Colour::Cmyk,
            6 if packing.is_none() => Colour::YCbCr,
            other => {
                let name = match other {
                    4 => "a transparency mask for an image",
                    6 => "YCbCr colours outside JPEG",
                    8..=10 => "colours of CIE L*a*b*",
                    32_803 => "the raw pixels of a camera",
                    _ => return Err(not_read(&format!("colour space {other}"), "write it as RGB")),
                };
                return Err(not_read(name, "write it as RGB"));
            }
        };
        let (colour, picked) = picked(colour, samples, tags, reading)?;
        let planar = match tags.one(284, 1)? {
            1 => false,
            2 => samples > 1,
            other => return Err(damaged(&format!("planes of kind {other} (tag 284)"))),
        };
        let in_jpeg = match colour {
            Colour::Gray { white_is_zero: false } => samples == 1,
            Colour::Rgb | Colour::YCbCr => samples == 3 && !planar && reading.bands.is_none(),
            Colour::Gray { .. } | Colour::Palette(_) | Colour::Cmyk | Colour::RgbTimesAlpha => false,
        };
        if packing.is_none() && !(in_jpeg && (bits, kind) == (8, Kind::Unsigned)) {
            return Err(not_read(
                "JPEG of other than grey or three colours of 8 bits together",
                "write it anew",
            ));
        }
        let differences = match tags.one(317, 1)? {
            // The tag is left behind by programs that pack anew, and means nothing then.
            _ if !matches!(packing, Some(Packing::Lzw | Packing::Deflate)) => Differences::None,
            1 => Differences::None,
            2 if bits >= 8 => Differences::Whole,
            3 if kind == Kind::Float => Differences::Bytes,
            other => {
                let what = format!("differences (kind {other}) of {bits} bits");
                return Err(not_read(&what, "write it without a predictor"));
            }
        };
        let tiled = tags.bytes(324)?.is_some();
        let chunk = if tiled {
            (tags.required(322, "tile width")?, tags.required(323, "tile height")?)
        } else {
            (width as u64, tags.one(278, height as u64)?.min(height as u64))
        };
        let (offsets, lengths, name) = if tiled { (324, 325, "tile") } else { (273, 279, "strip") };
        let (chunk, wanted) = fitting(chunk, (width, height), samples, bits).ok_or_else(|| {
            damaged(&format!("{name}s of {} x {} pixels, {samples} channels", chunk.0, chunk.1))
        })?;
        // Those of every sample's plane, one plane after the other.
        let wanted = if planar { wanted * samples } else { wanted };
        let layout = Self {
            width,
            height,
            colour,
            picked,
            samples,
            bits,
            kind,
            big_endian: tags.big_endian,
            planar,
            differences,
            packing,
            tables: tags.bytes(347)?.unwrap_or_default(),
            chunk,
            tiled,
            offsets: tags
                .all(offsets)?
                .ok_or_else(|| damaged(&format!("no {name} offsets (tag {offsets})")))?,
            lengths: tags.all(lengths)?.unwrap_or_default(),
        };
        if layout.offsets.len() < wanted || !layout.lengths.is_empty() && layout.lengths.len() < wanted {
            return Err(damaged(&format!("the image has {wanted} {name}s, of which not all are listed")));
        }
        Ok(layout)
    }

    /// Strips or tiles beside one another.
    fn across(&self) -> usize {
        self.width.div_ceil(self.chunk.0)
    }

    fn per_plane(&self) -> usize {
        self.across() * self.height.div_ceil(self.chunk.1)
    }

    /// Columns and rows of the image that the strip or tile at `(across, down)` holds.
    fn within(&self, (across, down): (usize, usize)) -> (usize, usize) {
        let (columns, rows) = self.chunk;
        (columns.min(self.width - across * columns), rows.min(self.height - down * rows))
    }

    /// The bytes of strip or tile number `index`, packed. What is not packed needs no length, and some programs say a wrong one.
    fn packed<'f>(&self, file: &'f [u8], index: usize) -> Result<&'f [u8], DecodeError> {
        let start = usize::try_from(self.offsets[index]).map_err(|_| truncated())?;
        let rest = file.get(start..).ok_or_else(truncated)?;
        match self.lengths.get(index) {
            Some(&length) if length > 0 && self.packing != Some(Packing::None) => {
                usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(truncated)
            }
            _ => Ok(rest),
        }
    }

    /// Whether strip or tile number `index` is left out, as GDAL does with those that hold nothing but 0.
    fn is_left_out(&self, index: usize) -> bool {
        self.offsets[index] == 0 && self.lengths.get(index) == Some(&0)
    }

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
                self.samples_of(bytes, together, taker, work);
                let pixels = work.line.chunks_exact_mut(channels).zip(work.row.chunks_exact(together));
                if self.planar {
                    pixels.for_each(|(to, from)| to[plane] = from[0]);
                } else {
                    pixels.for_each(|(to, from)| {
                        to.iter_mut().zip(&self.picked).for_each(|(to, &sample)| *to = from[sample]);
                    });
                }
            }
            self.to_rgb(&work.line, to);
        }
        Ok(())
    }

    /// Samples of a stored row, `together` a pixel, as 8 bits: deep ones shrunk, those of fewer bits spread over the range unless
    /// they count colours.
    fn samples_of(&self, bytes: &[u8], together: usize, taker: &mut Taker<'_>, work: &mut Work) {
        let Work { row, deep, bytes: undone, .. } = work;
        row.clear();
        match (self.bits, self.kind) {
            (8, Kind::Unsigned) => {
                row.extend_from_slice(bytes);
                if self.differences == Differences::Whole {
                    for i in together..row.len() {
                        row[i] = row[i].wrapping_add(row[i - together]);
                    }
                }
            }
            (1 | 2 | 4, _) => {
                let most = (1u8 << self.bits) - 1;
                let factor = if matches!(self.colour, Colour::Palette(_)) { 1 } else { 255 / most };
                row.extend(bytes.iter().flat_map(|&byte| {
                    (1..=8 / self.bits).map(move |k| (byte >> (8 - k * self.bits) & most) * factor)
                }));
            }
            _ => {
                self.bits_of(bytes, together, undone, deep);
                row.extend(deep.iter().map(|&bits| self.shrunk(bits, taker)));
            }
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
            Colour::Gray { white_is_zero } => {
                let flip = if *white_is_zero { 255 } else { 0 };
                to.chunks_exact_mut(3).zip(line).for_each(|(rgb, &gray)| rgb.fill(gray ^ flip));
            }
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

/// Bits of a sample, and what they are.
fn depth(tags: &Directory<'_>, reading: Reading) -> Result<(usize, Kind), DecodeError> {
    const RANGE: &str = "tell `mentee shard` the values that count (--range LOW:HIGH)";
    let kinds = tags.all(339)?.unwrap_or(vec![1]);
    let bits = tags.all(258)?.unwrap_or(vec![1]);
    if [&kinds, &bits].into_iter().any(|all| all.iter().any(|other| *other != all[0])) {
        return Err(not_read("channels of unlike kinds or depths", "write all of them with 8 bits"));
    }
    let (kind, bits) = (kinds[0], bits[0]);
    let name = match kind {
        1 | 4 => "whole",
        2 => "signed",
        3 => "floating-point",
        _ => return Err(not_read("complex numbers", "write what counts of them")),
    };
    let what = format!("{name} numbers of {bits} bits");
    let kind = match (kind, bits) {
        (1 | 4, 1 | 2 | 4 | 8 | 16) => return Ok((bits as usize, Kind::Unsigned)),
        (1 | 4, 32 | 64) => Kind::Unsigned,
        (2, 8 | 16 | 32 | 64) => Kind::Signed,
        (3, 32 | 64) => Kind::Float,
        _ => return Err(not_read(&what, "write 8, 16 or 32 bits")),
    };
    if reading.range.is_none() {
        return Err(not_read(&what, RANGE));
    }
    Ok((bits as usize, kind))
}

/// The colours of the samples that count, and which those are.
fn picked(
    colour: Colour,
    samples: usize,
    tags: &Directory<'_>,
    reading: Reading,
) -> Result<(Colour, Vec<usize>), DecodeError> {
    // 1: colours are multiplied by it; 2: they are not.
    let alpha = tags.one(338, 0)?;
    if let Some(bands) = reading.bands {
        if bands.iter().any(|&band| usize::from(band) > samples) {
            let [r, g, b] = bands;
            let what =
                format!("{}, of which {r}, {g} and {b} were to be taken,", counted(samples as u64, "band"));
            return Err(not_read(&what, "choose among those (--bands)"));
        }
        return Ok((Colour::Rgb, bands.map(|band| usize::from(band) - 1).to_vec()));
    }
    if samples < colour.channels() {
        return Err(damaged(&format!("{}, fewer than its colours have", counted(samples as u64, "sample"))));
    }
    if matches!(colour, Colour::Gray { .. }) && samples > if matches!(alpha, 1 | 2) { 2 } else { 1 } {
        let what = format!("{samples} bands and no colours");
        return Err(not_read(&what, "tell `mentee shard` which are red, green and blue (--bands R,G,B)"));
    }
    let colour =
        if colour == Colour::Rgb && samples == 4 && alpha == 1 { Colour::RgbTimesAlpha } else { colour };
    let picked = (0..colour.channels()).collect();
    Ok((colour, picked))
}

/// Samples in a row of a strip or tile, at most: a hundred times what the widest scenes have.
const ROW: u64 = 1 << 24;

/// Columns and rows of a strip or tile, and how many of them an image takes; none if they hold no pixels, or all together more
/// bytes than a decoder should have to unpack.
fn fitting(
    (columns, rows): (u64, u64),
    (width, height): (usize, usize),
    samples: usize,
    bits: usize,
) -> Option<((usize, usize), usize)> {
    if columns == 0 || rows == 0 {
        return None;
    }
    let count = (width as u64).div_ceil(columns) * (height as u64).div_ceil(rows);
    let row =
        columns.checked_mul(samples as u64).filter(|&row| row <= ROW)?.checked_mul(bits as u64)?.div_ceil(8);
    let bytes = row.checked_mul(rows)?.checked_mul(count)?;
    (bytes <= 8 * MAX_PIXELS).then_some(((columns as usize, rows as usize), count as usize))
}

/// The colours of all indices of `bits` bits (tag 320): 16 bits a colour, all reds first. Some programs write 8 bits.
fn palette(tags: &Directory<'_>, bits: usize) -> Result<Colour, DecodeError> {
    if bits > 8 {
        return Err(damaged(&format!("a palette for indices of {bits} bits")));
    }
    let map = tags.all(320)?.ok_or_else(|| damaged("a palette image without palette (tag 320)"))?;
    let count = map.len() / 3;
    let shift = if map.iter().all(|&value| value < 256) { 0 } else { 8 };
    let colour = |index: usize| std::array::from_fn(|channel| (map[channel * count + index] >> shift) as u8);
    let mut colours: Vec<[u8; 3]> = (0..count).map(colour).collect();
    // Those that are missing are black.
    colours.resize(1 << bits, [0; 3]);
    Ok(Colour::Palette(colours))
}

fn compression(number: u64) -> String {
    let name = match number {
        2..=4 => "fax compression",
        6 => "JPEG of before 1995",
        33_003 | 33_005 | 34_712 => "JPEG 2000",
        34_887 => "LERC",
        34_925 => "LZMA",
        50_000 => "Zstandard",
        50_001 => "WebP",
        50_002 | 52_546 => "JPEG XL",
        _ => return format!("compression {number}"),
    };
    name.to_owned()
}
