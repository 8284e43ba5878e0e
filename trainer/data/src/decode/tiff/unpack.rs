//! What a strip or a tile holds, unpacked.

use std::borrow::Cow;
use std::io::{ErrorKind, Read};

use flate2::read::ZlibDecoder;
use weezl::{BitOrder, LzwStatus};

use super::{damaged, not_read, truncated};
use crate::decode::DecodeError;

/// How the bytes of strips and tiles are packed (TIFF's tag 259), JPEG aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Lzw,
    Deflate,
    PackBits,
}

/// Exactly `length` bytes of what `packed` holds; what it holds beyond is padding.
pub(super) fn unpack(packing: Packing, packed: &[u8], length: usize) -> Result<Cow<'_, [u8]>, DecodeError> {
    if packing == Packing::None {
        return packed.get(..length).map(Cow::Borrowed).ok_or_else(truncated);
    }
    let mut out = vec![0; length];
    match packing {
        Packing::None => {}
        Packing::Lzw => lzw(packed, &mut out)?,
        Packing::Deflate => {
            ZlibDecoder::new(packed).read_exact(&mut out).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => truncated(),
                _ => damaged(&error.to_string()),
            })?;
        }
        Packing::PackBits => pack_bits(packed, &mut out)?,
    }
    Ok(Cow::Owned(out))
}

fn lzw(mut packed: &[u8], mut out: &mut [u8]) -> Result<(), DecodeError> {
    if matches!(packed, [0, second, ..] if second & 1 == 1) {
        // The first code is 256, of 9 bits: from the left it begins with a byte of 128.
        return Err(not_read("LZW of before 1988 (bits from the right)", "write it anew"));
    }
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    while !out.is_empty() {
        let step = decoder.decode_bytes(packed, out);
        packed = &packed[step.consumed_in..];
        out = &mut out[step.consumed_out..];
        match step.status {
            Ok(LzwStatus::Ok) => {}
            Ok(LzwStatus::Done | LzwStatus::NoProgress) => break,
            Err(_) => return Err(damaged("an impossible LZW code")),
        }
    }
    if out.is_empty() { Ok(()) } else { Err(truncated()) }
}

/// TIFF 6.0, section 9: a count below 128 is that of bytes less one, others are 257 less repetitions; 128 means nothing.
fn pack_bits(mut packed: &[u8], mut out: &mut [u8]) -> Result<(), DecodeError> {
    while !out.is_empty() {
        let (&count, rest) = packed.split_first().ok_or_else(truncated)?;
        let length = match count {
            128 => 0,
            ..128 => usize::from(count) + 1,
            _ => 257 - usize::from(count),
        };
        let (to, left) = out.split_at_mut(length.min(out.len()));
        let taken = match count {
            128 => 0,
            ..128 => {
                to.copy_from_slice(rest.get(..to.len()).ok_or_else(truncated)?);
                length.min(rest.len())
            }
            _ => {
                to.fill(*rest.first().ok_or_else(truncated)?);
                1
            }
        };
        packed = &rest[taken..];
        out = left;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of TIFF 6.0, section 9.
    #[test]
    fn pack_bits_of_the_standard() {
        let packed =
            [0xFE, 0xAA, 0x02, 0x80, 0x00, 0x2A, 0xFD, 0xAA, 0x03, 0x80, 0x00, 0x2A, 0x22, 0xF7, 0xAA];
        let mut expected =
            vec![0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0xAA, 0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0x22];
        expected.extend([0xAA; 10]);
        assert_eq!(*unpack(Packing::PackBits, &packed, 24).unwrap(), expected);
        assert_eq!(unpack(Packing::PackBits, &packed, 25), Err(truncated()));
        // 128 means nothing; a run may go beyond what is wanted.
        assert_eq!(*unpack(Packing::PackBits, &[128, 0xFE, 7], 2).unwrap(), [7, 7]);
        assert_eq!(unpack(Packing::PackBits, &[2, 1, 2], 3), Err(truncated()));
        assert_eq!(unpack(Packing::PackBits, &[0xFE], 3), Err(truncated()));
    }
}
