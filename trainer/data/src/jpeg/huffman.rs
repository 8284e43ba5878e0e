//! Huffman tables (ITU-T T.81, annex C, F.2.2.3) as a lookup of the next ten bits.

use super::JpegError;
use super::bits::BitReader;

/// Codes up to this length are found in one look.
const LOOKUP_BITS: u32 = 10;

/// Symbols by the next ten bits; those with longer codes are zero.
pub(super) type Lookup = [Symbol; 1 << LOOKUP_BITS];

/// [`Symbol::advance`] of an end-of-block symbol is this and one more: it moves the position in the block past its end,
/// and leaves its low seven bits as if one coefficient had been read.
pub(super) const END_OF_BLOCK: u32 = 128;

/// What a table is for: the two kinds of symbol are built differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// A symbol is the number of bits of a difference.
    Dc,
    /// A symbol is a run of zeros (high nibble) and a number of bits (low nibble).
    Ac,
}

/// A decoded symbol, packed: bits 0–7 code and value bits together, 8–15 coefficients it stands for (a run of zeros and
/// the one behind it), 16–23 63 less the value bits, 24–31 code bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Symbol(u32);

impl Symbol {
    fn new(class: Class, symbol: u8, code_bits: u32) -> Self {
        let (mut run, size) = match class {
            Class::Dc => (0, u32::from(symbol)),
            Class::Ac => (u32::from(symbol >> 4), u32::from(symbol & 15)),
        };
        if class == Class::Ac && size == 0 && run != 15 {
            run |= END_OF_BLOCK;
        }
        Self((code_bits + size) | (run + 1) << 8 | (63 - size) << 16 | code_bits << 24)
    }

    /// Bits of the code and of the value behind it, at most 31; 0 stands for "not in the lookup".
    #[inline(always)]
    pub(super) fn total_bits(self) -> u32 {
        self.0 & 0xFF
    }

    /// Bits of the value.
    #[inline(always)]
    pub(super) fn size(self) -> u32 {
        63 - (self.0 >> 16 & 63)
    }

    /// Zeros before the value and the value; of an end of block, [`END_OF_BLOCK`] more.
    #[inline(always)]
    pub(super) fn advance(self) -> u32 {
        self.0 >> 8 & 0xFF
    }

    /// Zeros before the value, or with [`END_OF_BLOCK`] set.
    pub(super) fn run(self) -> u32 {
        self.advance() - 1
    }

    /// Bits of the code alone.
    #[inline(always)]
    pub(super) fn code_bits(self) -> u32 {
        self.0 >> 24
    }

    /// The value that follows the code at the top of `window` (F.2.2.1, EXTEND): size bits, negative when the first
    /// is 0. Without a branch, and 0 when there are no bits.
    #[inline(always)]
    pub(super) fn value(self, window: u64) -> i32 {
        let top = window << self.code_bits();
        // All ones for a negative value.
        let mask = (top >> 63).wrapping_sub(1);
        let magnitude = ((top ^ mask) >> 1) >> (self.0 >> 16 & 63);
        (magnitude ^ mask).wrapping_sub(mask) as i32
    }
}

/// One table.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) lookup: Box<Lookup>,
    /// For codes of more than [`LOOKUP_BITS`]: (16-bit code, left-aligned) one past the last code of a length, its
    /// length, and what to add to a code's index.
    long: Vec<Long>,
    symbols: Vec<Symbol>,
    /// The segment it was built from: 16 counts, then the symbols.
    source: Vec<u8>,
    class: Class,
}

#[derive(Debug, Clone, Copy)]
struct Long {
    bits: u32,
    /// First code and one past the last, left-aligned in 16 bits.
    first: u32,
    end: u32,
    /// Index of the first code's symbol.
    symbol: u32,
}

impl Table {
    /// Builds a table from `counts` (of codes of length 1 to 16) and their symbols.
    ///
    /// # Errors
    /// More codes than their lengths allow, or a symbol that cannot be.
    pub(super) fn build(class: Class, counts: &[u8; 16], symbols: &[u8]) -> Result<Self, JpegError> {
        let mut table = Self {
            lookup: Box::new([Symbol(0); 1 << LOOKUP_BITS]),
            long: Vec::new(),
            symbols: Vec::new(),
            source: counts.iter().chain(symbols).copied().collect(),
            class,
        };
        if class == Class::Dc && symbols.iter().any(|&symbol| symbol > 15) {
            return Err(JpegError::Damaged("a Huffman table with an impossible symbol"));
        }
        let mut code = 0u32; // left-aligned in 16 bits
        let mut index = 0usize;
        for (bits, &count) in (1u32..).zip(counts) {
            let step = 1u32 << (16 - bits);
            let first = code;
            for _ in 0..count {
                if code + step > 1 << 16 {
                    return Err(JpegError::Damaged("a Huffman table with too many codes"));
                }
                let symbol = Symbol::new(class, symbols[index], bits);
                table.symbols.push(symbol);
                if bits <= LOOKUP_BITS {
                    let at = (code >> (16 - LOOKUP_BITS)) as usize;
                    table.lookup[at..at + (1 << (LOOKUP_BITS - bits))].fill(symbol);
                }
                code += step;
                index += 1;
            }
            if bits > LOOKUP_BITS && count > 0 {
                let symbol = (index - usize::from(count)) as u32;
                table.long.push(Long { bits, first, end: code, symbol });
            }
        }
        Ok(table)
    }

    /// Whether it was built from the same bytes.
    pub(super) fn is(&self, class: Class, counts: &[u8; 16], symbols: &[u8]) -> bool {
        self.class == class
            && self.source.len() == 16 + symbols.len()
            && self.source[..16] == *counts
            && self.source[16..] == *symbols
    }

    /// The symbol at the top of `window`, which needs 16 valid bits. `None`: no such code.
    #[inline(always)]
    pub(super) fn symbol(&self, window: u64) -> Option<Symbol> {
        self.symbol_by(&self.lookup, window)
    }

    /// The same by a copy of the lookup.
    #[inline(always)]
    pub(super) fn symbol_by(&self, lookup: &Lookup, window: u64) -> Option<Symbol> {
        let symbol = lookup[(window >> (64 - LOOKUP_BITS)) as usize];
        if symbol.total_bits() != 0 { Some(symbol) } else { self.long_symbol(window) }
    }

    #[cold]
    #[inline(never)]
    fn long_symbol(&self, window: u64) -> Option<Symbol> {
        let code = (window >> 48) as u32;
        let long = self.long.iter().find(|long| code < long.end)?;
        if code < long.first {
            return None;
        }
        self.symbols.get((long.symbol + ((code - long.first) >> (16 - long.bits))) as usize).copied()
    }

    /// Reads one DC difference.
    #[inline(always)]
    pub(super) fn difference(&self, reader: &mut BitReader<'_>) -> Result<i32, JpegError> {
        reader.refill();
        let symbol = self.symbol(reader.peek()).ok_or(JpegError::BAD_CODE)?;
        let value = symbol.value(reader.peek());
        reader.take(symbol.total_bits());
        Ok(value)
    }
}
