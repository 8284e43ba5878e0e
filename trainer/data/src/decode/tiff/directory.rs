//! The first directory of a TIFF or BigTIFF file: its tags and their numbers.

use super::{damaged, truncated};
use crate::decode::DecodeError;

/// Where values of a type stand that are whole numbers: bytes each.
fn width_of(kind: u16) -> Option<usize> {
    match kind {
        1 | 7 => Some(1),      // BYTE, UNDEFINED
        3 | 8 => Some(2),      // SHORT, SSHORT
        4 | 9 | 13 => Some(4), // LONG, SLONG, IFD
        16 | 18 => Some(8),    // LONG8, IFD8
        _ => None,
    }
}

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory<'a> {
    file: &'a [u8],
    /// The first byte of a number counts most.
    pub(super) big_endian: bool,
    /// BigTIFF: 8 bytes where TIFF has 4.
    wide: bool,
    /// Where the first entry stands.
    entries: usize,
    count: usize,
}

impl<'a> Directory<'a> {
    pub(super) fn first(file: &'a [u8]) -> Result<Self, DecodeError> {
        let big_endian = file.first() == Some(&b'M');
        let mut directory = Self { file, big_endian, wide: false, entries: 0, count: 0 };
        directory.wide = directory.number(2, 2)? == 43;
        let at = if directory.wide {
            if (directory.number(4, 2)?, directory.number(6, 2)?) != (8, 0) {
                return Err(damaged("a BigTIFF whose offsets are not of 8 bytes"));
            }
            directory.number(8, 8)?
        } else {
            directory.number(4, 4)?
        };
        let at = usize::try_from(at).map_err(|_| truncated())?;
        let length = if directory.wide { 8 } else { 2 };
        let count = directory.number(at, length)?;
        directory.entries = at + length;
        // What cannot be there is not looked through.
        let room = (file.len() - directory.entries) / directory.entry_len();
        directory.count = usize::try_from(count).ok().filter(|&count| count <= room).ok_or_else(truncated)?;
        Ok(directory)
    }

    fn entry_len(&self) -> usize {
        if self.wide { 20 } else { 12 }
    }

    /// The number of `length` bytes at `at`.
    fn number(&self, at: usize, length: usize) -> Result<u64, DecodeError> {
        let bytes = at.checked_add(length).and_then(|end| self.file.get(at..end)).ok_or_else(truncated)?;
        Ok(self.fold(bytes))
    }

    fn fold(&self, bytes: &[u8]) -> u64 {
        let add = |sum: u64, &byte: &u8| sum << 8 | u64::from(byte);
        if self.big_endian { bytes.iter().fold(0, add) } else { bytes.iter().rev().fold(0, add) }
    }

    /// The bytes of a tag's values, and how many each takes.
    fn find(&self, tag: u16) -> Result<Option<(&'a [u8], usize)>, DecodeError> {
        let pointer = if self.wide { 8 } else { 4 };
        for entry in 0..self.count {
            let at = self.entries + entry * self.entry_len();
            if self.number(at, 2)? != u64::from(tag) {
                continue;
            }
            let kind = self.number(at + 2, 2)? as u16;
            let each = width_of(kind).ok_or_else(|| damaged(&format!("tag {tag} is of type {kind}")))?;
            let bytes = usize::try_from(self.number(at + 4, pointer)?)
                .ok()
                .and_then(|count| count.checked_mul(each))
                .ok_or_else(truncated)?;
            let value = at + 4 + pointer;
            let start = if bytes <= pointer {
                value
            } else {
                usize::try_from(self.number(value, pointer)?).map_err(|_| truncated())?
            };
            let end = start.checked_add(bytes).ok_or_else(truncated)?;
            return Ok(Some((self.file.get(start..end).ok_or_else(truncated)?, each)));
        }
        Ok(None)
    }

    /// A tag's bytes.
    pub(super) fn bytes(&self, tag: u16) -> Result<Option<&'a [u8]>, DecodeError> {
        Ok(self.find(tag)?.map(|(bytes, _)| bytes))
    }

    /// A tag's numbers, if it is there; there is at least one then.
    pub(super) fn all(&self, tag: u16) -> Result<Option<Vec<u64>>, DecodeError> {
        let Some((bytes, each)) = self.find(tag)? else { return Ok(None) };
        if bytes.is_empty() {
            return Err(damaged(&format!("tag {tag} is empty")));
        }
        Ok(Some(bytes.chunks_exact(each).map(|bytes| self.fold(bytes)).collect()))
    }

    /// A tag's first number, or what holds where it is missing.
    pub(super) fn one(&self, tag: u16, missing: u64) -> Result<u64, DecodeError> {
        Ok(self.all(tag)?.map_or(missing, |numbers| numbers[0]))
    }

    /// A tag's first number.
    pub(super) fn required(&self, tag: u16, name: &str) -> Result<u64, DecodeError> {
        self.all(tag)?.map(|numbers| numbers[0]).ok_or_else(|| damaged(&format!("no {name} (tag {tag})")))
    }
}
