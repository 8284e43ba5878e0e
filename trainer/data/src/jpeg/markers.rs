//! Marker segments: everything in a file but the entropy-coded bits.

use super::JpegError;
use super::huffman::{Class, Table};

/// Position in a block (row · 8 + column) of the k-th coefficient in zigzag order; padded, since a damaged run can point
/// up to 16 beyond the end.
pub(super) const ZIGZAG: [u8; 128] = {
    const ORDER: [u8; 64] = [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
        6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38,
        31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ];
    let mut padded = [63; 128];
    let mut k = 0;
    while k < 64 {
        padded[k] = ORDER[k];
        k += 1;
    }
    padded
};

/// One colour component of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Component {
    pub(super) id: u8,
    /// Blocks in an MCU, across and down: 1 to 4.
    pub(super) h: usize,
    pub(super) v: usize,
    /// Which quantisation table.
    pub(super) quantisation: usize,
    /// Samples across and down.
    pub(super) width: usize,
    pub(super) height: usize,
}

/// How components become RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Gray,
    Rgb,
    YCbCr,
    /// Inverted, as Adobe's programs write it and as every reader takes it.
    Cmyk,
    /// CMYK with the first three as YCbCr.
    Ycck,
}

/// What stands before the first scan.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    /// Columns.
    pub(crate) width: u32,
    /// Rows.
    pub(crate) height: u32,
    /// EXIF's orientation, 1 (upright) to 8.
    pub(crate) orientation: u8,
    pub(super) progressive: bool,
    pub(super) components: Vec<Component>,
    pub(super) colour: Colour,
    /// The largest sampling factors: an MCU has 8·hmax x 8·vmax pixels.
    pub(super) hmax: usize,
    pub(super) vmax: usize,
    /// Where the first start-of-scan marker's segment begins (its length bytes).
    pub(super) scan: usize,
}

impl Header {
    /// What three components are, where a container says it.
    pub(crate) fn set_colours(&mut self, are_ycc: bool) {
        self.colour = if are_ycc { Colour::YCbCr } else { Colour::Rgb };
    }

    pub(crate) fn channels(&self) -> usize {
        self.components.len()
    }

    pub(super) fn mcus_across(&self) -> usize {
        (self.width as usize).div_ceil(8 * self.hmax)
    }

    pub(super) fn mcus_down(&self) -> usize {
        (self.height as usize).div_ceil(8 * self.vmax)
    }
}

/// Tables in force. Huffman tables stay built from image to image: most files have the same ones.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// DC 0–3, AC 0–3; and whether this file has defined it.
    huffman: [Option<Box<Table>>; 8],
    defined: [bool; 8],
    /// In zigzag order.
    quantisation: [Option<[u16; 64]>; 4],
    /// MCUs between restart markers; 0: none.
    pub(super) restart_interval: usize,
}

impl Tables {
    fn reset(&mut self) {
        self.defined = [false; 8];
        self.quantisation = [None; 4];
        self.restart_interval = 0;
    }

    pub(super) fn huffman(&self, class: Class, index: usize) -> Result<&Table, JpegError> {
        let slot = slot(class, index);
        match &self.huffman[slot] {
            Some(table) if self.defined[slot] => Ok(table),
            _ => Err(JpegError::Damaged("a Huffman table is missing")),
        }
    }

    pub(super) fn quantisation(&self, index: usize) -> Result<&[u16; 64], JpegError> {
        self.quantisation[index & 3].as_ref().ok_or(JpegError::Damaged("a quantisation table is missing"))
    }

    fn define_huffman(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        while !segment.is_empty() {
            let (&[which], rest) = segment.split_first_chunk().ok_or(JpegError::Truncated)?;
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or(BAD_SEGMENT)?;
            let total = counts.iter().map(|&count| usize::from(count)).sum();
            if total > 256 {
                return Err(JpegError::Damaged("a Huffman table with too many codes"));
            }
            let (symbols, rest) = rest.split_at_checked(total).ok_or(BAD_SEGMENT)?;
            let class = match which >> 4 {
                0 => Class::Dc,
                1 => Class::Ac,
                _ => return Err(JpegError::Damaged("a Huffman table of unknown class")),
            };
            if which & 15 > 3 {
                return Err(JpegError::Damaged("a Huffman table number above 3"));
            }
            let slot = slot(class, usize::from(which));
            if !self.huffman[slot].as_ref().is_some_and(|table| table.is(class, counts, symbols)) {
                self.huffman[slot] = Some(Box::new(Table::build(class, counts, symbols)?));
            }
            self.defined[slot] = true;
            segment = rest;
        }
        Ok(())
    }

    fn define_quantisation(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        while let Some((&which, rest)) = segment.split_first() {
            let wide = match which >> 4 {
                0 => false,
                1 => true,
                _ => return Err(JpegError::Damaged("a quantisation table of unknown precision")),
            };
            if which & 15 > 3 {
                return Err(JpegError::Damaged("a quantisation table number above 3"));
            }
            let (values, rest) = rest.split_at_checked(if wide { 128 } else { 64 }).ok_or(BAD_SEGMENT)?;
            let mut table = [0; 64];
            for (k, value) in table.iter_mut().enumerate() {
                *value = if wide {
                    u16::from_be_bytes([values[2 * k], values[2 * k + 1]])
                } else {
                    u16::from(values[k])
                };
            }
            self.quantisation[usize::from(which & 3)] = Some(table);
            segment = rest;
        }
        Ok(())
    }

    /// Takes a segment that may stand before any scan. `false`: it is of another kind.
    fn take(&mut self, marker: u8, segment: &[u8]) -> Result<bool, JpegError> {
        match marker {
            0xC4 => self.define_huffman(segment)?,
            0xDB => self.define_quantisation(segment)?,
            0xDD => {
                let &[high, low] = segment else { return Err(BAD_SEGMENT) };
                self.restart_interval = usize::from(u16::from_be_bytes([high, low]));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn slot(class: Class, index: usize) -> usize {
    (index & 3) + if class == Class::Ac { 4 } else { 0 }
}

const BAD_SEGMENT: JpegError = JpegError::Damaged("a marker segment of the wrong length");

/// The next marker at or after `at` and where its segment's length stands. Bytes between segments are passed over, as
/// libjpeg does.
fn next_marker(file: &[u8], mut at: usize) -> Result<(u8, usize), JpegError> {
    loop {
        at += memchr::memchr(0xFF, file.get(at..).unwrap_or_default()).ok_or(JpegError::Truncated)?;
        match file.get(at + 1) {
            None => return Err(JpegError::Truncated),
            Some(0) => at += 2,
            Some(0xFF) => at += 1,
            Some(&marker) => return Ok((marker, at + 2)),
        }
    }
}

/// The body of the segment whose length stands at `at`, and where it ends.
pub(super) fn segment(file: &[u8], at: usize) -> Result<(&[u8], usize), JpegError> {
    let length = file.get(at..at + 2).ok_or(JpegError::Truncated)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length < 2 {
        return Err(BAD_SEGMENT);
    }
    let body = file.get(at + 2..at + length).ok_or(JpegError::Truncated)?;
    Ok((body, at + length))
}

/// Markers without a segment: TEM, RST0–7, SOI.
fn stands_alone(marker: u8) -> bool {
    matches!(marker, 0x01 | 0xD0..=0xD8)
}

/// Reads all up to the first scan.
pub(super) fn read(file: &[u8], tables: &mut Tables) -> Result<Header, JpegError> {
    tables.reset();
    if !file.starts_with(&[0xFF, 0xD8]) {
        return Err(JpegError::Damaged("no start-of-image marker"));
    }
    let mut at = 2;
    let mut frame: Option<Header> = None;
    let (mut jfif, mut adobe, mut orientation) = (false, None, 1);
    loop {
        let (marker, start) = next_marker(file, at)?;
        if stands_alone(marker) {
            at = start;
            continue;
        }
        if marker == 0xD9 {
            return Err(JpegError::Damaged("the image ends before its first scan"));
        }
        let (body, end) = segment(file, start)?;
        match marker {
            0xC0..=0xC2 => {
                if frame.is_some() {
                    return Err(JpegError::Damaged("two frames in one image"));
                }
                frame = Some(read_frame(body, marker == 0xC2)?);
            }
            0xC3 | 0xCB => return Err(JpegError::Unsupported("lossless JPEG")),
            0xC9 | 0xCA | 0xCC => return Err(JpegError::Unsupported("arithmetic coding")),
            0xC5..=0xC7 | 0xCD..=0xCF => return Err(JpegError::Unsupported("hierarchical JPEG")),
            0xDA => {
                let Some(mut header) = frame else {
                    return Err(JpegError::Damaged("a scan before the frame header"));
                };
                header.orientation = orientation;
                header.colour = colour(&header.components, jfif, adobe)?;
                header.scan = start;
                return Ok(header);
            }
            0xE0 if body.starts_with(b"JFIF\0") => jfif = true,
            0xE1 if body.starts_with(b"Exif\0\0") => {
                orientation = exif_orientation(&body[6..]).unwrap_or(orientation);
            }
            0xEE if body.starts_with(b"Adobe") && body.len() >= 12 => adobe = Some(body[11]),
            _ => {
                tables.take(marker, body)?;
            }
        }
        at = end;
    }
}

/// After a scan whose entropy-coded bytes end at `at`: the next scan's segment, or `None` at the end of the image.
pub(super) fn next_scan(file: &[u8], mut at: usize, tables: &mut Tables) -> Result<Option<usize>, JpegError> {
    loop {
        let (marker, start) = next_marker(file, at)?;
        if stands_alone(marker) {
            at = start;
            continue;
        }
        match marker {
            0xD9 => return Ok(None),
            0xDA => return Ok(Some(start)),
            0xC0..=0xC3 | 0xC5..=0xCF => return Err(JpegError::Damaged("two frames in one image")),
            _ => {
                let (body, end) = segment(file, start)?;
                tables.take(marker, body)?;
                at = end;
            }
        }
    }
}

/// Whether an end marker follows a scan where markers are to be looked for: not within a segment, nor behind the first end.
pub(crate) fn reaches_end(file: &[u8]) -> bool {
    let (mut at, mut scanned) = (2, false);
    while let Ok((marker, start)) = next_marker(file, at) {
        if marker == 0xD9 {
            return scanned;
        }
        scanned |= marker == 0xDA;
        at = match segment(file, start) {
            _ if stands_alone(marker) => start,
            Ok((_, end)) => end,
            Err(_) => return false,
        };
    }
    false
}

fn read_frame(body: &[u8], progressive: bool) -> Result<Header, JpegError> {
    let (&[precision, h1, h0, w1, w0, count], rest) = body.split_first_chunk().ok_or(BAD_SEGMENT)?;
    if precision != 8 {
        return Err(JpegError::Unsupported("more than 8 bits a sample"));
    }
    let (width, height) = (u16::from_be_bytes([w1, w0]), u16::from_be_bytes([h1, h0]));
    if rest.len() != 3 * usize::from(count) {
        return Err(BAD_SEGMENT);
    }
    if !matches!(count, 1 | 3 | 4) {
        return Err(JpegError::Unsupported("a number of components that is not 1, 3 or 4"));
    }
    let mut components: Vec<Component> = rest
        .chunks_exact(3)
        .map(|c| Component {
            id: c[0],
            h: usize::from(c[1] >> 4),
            v: usize::from(c[1] & 15),
            quantisation: usize::from(c[2]),
            ..Component::default()
        })
        .collect();
    if components.iter().any(|c| !(1..=4).contains(&c.h) || !(1..=4).contains(&c.v) || c.quantisation > 3) {
        return Err(JpegError::Damaged("an impossible component in the frame header"));
    }
    if let [only] = &mut components[..] {
        // A component alone is never interleaved: its factors mean nothing.
        (only.h, only.v) = (1, 1);
    }
    let hmax = components.iter().map(|c| c.h).max().unwrap_or(1);
    let vmax = components.iter().map(|c| c.v).max().unwrap_or(1);
    if components.iter().any(|c| hmax % c.h != 0 || vmax % c.v != 0) {
        return Err(JpegError::Unsupported("fractional sampling factors"));
    }
    for c in &mut components {
        c.width = (usize::from(width) * c.h).div_ceil(hmax);
        c.height = (usize::from(height) * c.v).div_ceil(vmax);
    }
    Ok(Header {
        width: u32::from(width),
        height: u32::from(height),
        orientation: 1,
        progressive,
        components,
        colour: Colour::Gray,
        hmax,
        vmax,
        scan: 0,
    })
}

/// libjpeg's guess (`default_decompress_parms` of jdapimin.c).
fn colour(components: &[Component], jfif: bool, adobe: Option<u8>) -> Result<Colour, JpegError> {
    Ok(match components {
        [_] => Colour::Gray,
        [a, b, c] => match (jfif, adobe, [a.id, b.id, c.id]) {
            (true, _, _) => Colour::YCbCr,
            (false, Some(0), _) | (false, None, [b'R', b'G', b'B']) => Colour::Rgb,
            _ => Colour::YCbCr,
        },
        _ => match adobe {
            Some(2) => Colour::Ycck,
            _ => Colour::Cmyk,
        },
    })
}

/// Orientation in a TIFF structure (Exif 2.32, 4.6.4): tag 0x0112 of the first directory.
pub(crate) fn exif_orientation(tiff: &[u8]) -> Option<u8> {
    let big = match tiff.get(..4)? {
        [b'M', b'M', 0, 42] => true,
        [b'I', b'I', 42, 0] => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = tiff.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let offset = tiff.get(4..8)?.try_into().ok()?;
    let directory = if big { u32::from_be_bytes(offset) } else { u32::from_le_bytes(offset) } as usize;
    let entries = usize::from(u16_at(directory)?);
    for entry in 0..entries {
        let at = directory.checked_add(2)?.checked_add(12 * entry)?;
        if u16_at(at)? == 0x0112 {
            let short = u16_at(at + 2)? == 3;
            return u16_at(at + 8).filter(|value| short && (1..=8).contains(value)).map(|value| value as u8);
        }
    }
    None
}
