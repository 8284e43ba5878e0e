//! Bits of an entropy-coded segment, most significant first (ITU-T T.81, F.2.2.5).
//!
//! A scan is first copied without its stuffed zero bytes ([`Segments::unstuff`]), so that reading is a load and two
//! shifts whatever the data are. Restart markers cut the copy into segments.

use super::JpegError;

/// Zero bytes behind the copy: more than one block can read (64 symbols of at most 31 bits).
const PADDING: usize = 512;

/// The entropy-coded bytes of one scan, without stuffing and markers.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// All segments, one after the other, and [`PADDING`] zeros.
    bytes: Vec<u8>,
    /// End of each segment in `bytes`.
    ends: Vec<usize>,
}

impl Segments {
    /// Takes the scan that starts at `from`; returns where the marker that ends it stands (or the length of the file).
    ///
    /// # Errors
    /// Restart markers out of their cycle.
    pub(super) fn unstuff(&mut self, file: &[u8], from: usize) -> Result<usize, JpegError> {
        self.bytes.clear();
        self.ends.clear();
        self.bytes.reserve(file.len() - from + PADDING);
        let mut at = from;
        let stop = loop {
            let Some(ff) = memchr::memchr(0xFF, &file[at..]).map(|found| at + found) else {
                self.bytes.extend_from_slice(&file[at..]);
                break file.len();
            };
            self.bytes.extend_from_slice(&file[at..ff]);
            match file.get(ff + 1) {
                Some(0) => {
                    self.bytes.push(0xFF);
                    at = ff + 2;
                }
                // Fill bytes before a marker.
                Some(0xFF) => at = ff + 1,
                Some(&marker @ 0xD0..=0xD7) => {
                    if usize::from(marker - 0xD0) != self.ends.len() % 8 {
                        return Err(JpegError::Damaged("restart markers out of order"));
                    }
                    self.ends.push(self.bytes.len());
                    at = ff + 2;
                }
                Some(_) => break ff,
                None => break file.len(),
            }
        };
        self.ends.push(self.bytes.len());
        self.bytes.resize(self.bytes.len() + PADDING, 0);
        Ok(stop)
    }

    /// How many segments there are: restart markers plus one.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// A reader at the start of segment `index`; `None` when the file has fewer.
    pub(super) fn reader(&self, index: usize) -> Option<BitReader<'_>> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(BitReader { bytes: &self.bytes, next: start, end, window: 0, valid: 0 })
    }
}

/// Reads one segment. Beyond its end it reads whatever follows and then zeros; [`BitReader::overrun`] tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    next: usize,
    end: usize,
    /// The next bits, at the top. Bits below the valid ones are those of `bytes` too, or zero.
    window: u64,
    /// Valid bits in `window`.
    valid: u32,
}

impl BitReader<'_> {
    /// Brings the window to at least 56 valid bits.
    #[inline(always)]
    pub(super) fn refill(&mut self) {
        let chunk = match self.bytes.get(self.next..self.next + 8) {
            Some(bytes) => u64::from_be_bytes(bytes.try_into().unwrap_or_default()),
            None => 0,
        };
        self.window |= chunk >> self.valid;
        self.next += ((63 - self.valid) >> 3) as usize;
        self.valid |= 56;
    }

    /// The next 64 bits, of which at least 56 − (what was taken since the last refill) are valid.
    #[inline(always)]
    pub(super) fn peek(&self) -> u64 {
        self.window
    }

    /// Drops `count` bits: at most those that are valid, below 64.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) {
        self.window <<= count;
        self.valid = self.valid.wrapping_sub(count);
    }

    /// Whether the window holds a symbol and its value, however long: 31 bits.
    #[inline(always)]
    pub(super) fn has_symbol(&self) -> bool {
        self.valid >= 31
    }

    /// The next `count` (at most 16) bits as a number.
    #[inline(always)]
    pub(super) fn bits(&mut self, count: u32) -> u32 {
        self.refill();
        let value = ((self.window >> 1) >> (63 - count)) as u32;
        self.take(count);
        value
    }

    /// Whether more was taken than the segment holds.
    #[inline(always)]
    pub(super) fn overrun(&self) -> bool {
        self.next > self.end && (self.next - self.end) as u64 * 8 > u64::from(self.valid)
    }
}
