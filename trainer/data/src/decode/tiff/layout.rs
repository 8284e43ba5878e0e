//! What the tags of a TIFF say of its pixels.

use mentee_config::counted;

use super::directory::Directory;
use super::unpack::Packing;
use super::{damaged, not_read, truncated};
use crate::decode::{DecodeError, MAX_PIXELS, Reading, check_size};

/// What a pixel's first samples say (tag 262).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Colour {
    Gray,
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
            Self::Gray | Self::Palette(_) => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk | Self::RgbTimesAlpha => 4,
        }
    }
}

/// What a sample's bits are (tag 339).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Unsigned,
    Signed,
    Float,
}

/// How samples are written as differences to the pixel on the left (tag 317).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Differences {
    None,
    /// Of whole numbers.
    Whole,
    /// Of bytes, all first bytes of a row before all second ones: floating-point numbers (Technical Note 3).
    Bytes,
}

/// Where the samples of an image stand.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) colour: Colour,
    /// White is 0 (grey).
    pub(super) inverted: bool,
    /// Which samples of a pixel count, in the order of the colour's.
    pub(super) picked: Vec<usize>,
    /// Samples of a pixel, those that do not count among them.
    pub(super) samples: usize,
    /// Of a sample: 1, 2, 4, 8, 16, 32 or 64.
    pub(super) bits: usize,
    pub(super) kind: Kind,
    pub(super) big_endian: bool,
    /// Each sample has strips or tiles of its own.
    pub(super) planar: bool,
    pub(super) differences: Differences,
    /// `None`: JPEG.
    pub(super) packing: Option<Packing>,
    /// JPEG tables that hold for all strips or tiles.
    pub(super) tables: &'a [u8],
    /// Columns and rows of a strip or tile.
    pub(super) chunk: (usize, usize),
    /// The last strip ends with the image; tiles are whole.
    pub(super) tiled: bool,
    pub(super) offsets: Vec<u64>,
    /// Bytes, packed; unknown where it is empty.
    pub(super) lengths: Vec<u64>,
}

impl<'a> Layout<'a> {
    /// Refuses what cannot be read.
    pub(super) fn of(tags: &Directory<'a>, reading: Reading) -> Result<Self, DecodeError> {
        let (width, height) = (tags.required(256, "width")?, tags.required(257, "height")?);
        check_size(width, height)?;
        let (width, height) = (width as usize, height as usize);
        let samples = tags.one(277, 1)?.max(1);
        if samples > u64::from(u16::MAX) {
            return Err(damaged("more than 65535 samples a pixel (tag 277)"));
        }
        let samples = samples as usize;
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
        let space = tags.required(262, "colour space")?;
        let colour = match space {
            0 | 1 => Colour::Gray,
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
            Colour::Gray => samples == 1 && space == 1,
            Colour::Rgb | Colour::YCbCr => samples == 3 && !planar,
            Colour::Palette(_) | Colour::Cmyk | Colour::RgbTimesAlpha => false,
        };
        if packing.is_none() && reading.bands.is_some() {
            return Err(not_read("JPEG, of which bands were to be taken,", "write it with LZW (--bands)"));
        }
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
        if chunk.0 == 0 || chunk.1 == 0 {
            return Err(damaged(&format!("{name}s of {} x {} pixels", chunk.0, chunk.1)));
        }
        let unpacked = if planar { picked.len() } else { samples };
        let (chunk, wanted) = fitting(chunk, (width, height), unpacked, bits).ok_or_else(|| {
            let samples = counted(unpacked as u64, "sample");
            let what = format!("{name}s of {} x {} pixels, {samples} each,", chunk.0, chunk.1);
            not_read(&what, "cut it into smaller images")
        })?;
        // Those of every sample's plane, one plane after the other.
        let wanted = if planar { wanted * samples } else { wanted };
        let layout = Self {
            width,
            height,
            colour,
            inverted: space == 0,
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
    pub(super) fn across(&self) -> usize {
        self.width.div_ceil(self.chunk.0)
    }

    pub(super) fn per_plane(&self) -> usize {
        self.across() * self.height.div_ceil(self.chunk.1)
    }

    /// Columns and rows of the image that the strip or tile at `(across, down)` holds.
    pub(super) fn within(&self, (across, down): (usize, usize)) -> (usize, usize) {
        let (columns, rows) = self.chunk;
        (columns.min(self.width - across * columns), rows.min(self.height - down * rows))
    }

    /// The bytes of strip or tile number `index`, packed. What is not packed needs no length, and some programs say a wrong one.
    pub(super) fn packed<'f>(&self, file: &'f [u8], index: usize) -> Result<&'f [u8], DecodeError> {
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
    pub(super) fn is_left_out(&self, index: usize) -> bool {
        self.offsets[index] == 0 && self.lengths.get(index) == Some(&0)
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
        (3, _) => return Err(not_read(&what, "write 32 bits")),
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
    // Palettes and inks have colours of their own.
    let bands = reading.bands.filter(|_| !matches!(colour, Colour::Palette(_) | Colour::Cmyk));
    if let Some(bands) = bands {
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
    if colour == Colour::Gray && samples > if matches!(alpha, 1 | 2) { 2 } else { 1 } {
        let what = format!("{samples} bands and no colours");
        return Err(not_read(&what, "tell `mentee shard` which are red, green and blue (--bands R,G,B)"));
    }
    let colour = if colour == Colour::Rgb && samples == 4 && alpha == 1 && reading.range.is_none() {
        Colour::RgbTimesAlpha
    } else {
        colour
    };
    let picked = (0..colour.channels()).collect();
    Ok((colour, picked))
}

/// Samples in a row of a strip or tile, at most: a hundred times what the widest scenes have.
const ROW: u64 = 1 << 24;

/// Columns and rows of a strip or tile, and how many of them an image takes; none if one, or all together, are more than a decoder
/// should have to unpack.
fn fitting(
    (columns, rows): (u64, u64),
    (width, height): (usize, usize),
    samples: usize,
    bits: usize,
) -> Option<((usize, usize), usize)> {
    let count = (width as u64).div_ceil(columns) * (height as u64).div_ceil(rows);
    let row = columns.checked_mul(samples as u64).filter(|&row| row <= ROW)?;
    let bytes = row.checked_mul(bits as u64)?.div_ceil(8).checked_mul(rows)?;
    let fits = bytes <= 8 * MAX_PIXELS && bytes.checked_mul(count)? <= 64 * MAX_PIXELS;
    fits.then_some(((columns as usize, rows as usize), count as usize))
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
