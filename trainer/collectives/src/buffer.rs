//! The memory a collective works on, and the element types it knows.

use std::fmt;

/// A slice that a collective reads and overwrites in place.
#[derive(Debug)]
#[non_exhaustive]
pub enum Buffer<'a> {
    /// Single precision: gradients, batch-norm statistics.
    F32(&'a mut [f32]),
    /// Double precision: the same, in exactness runs.
    F64(&'a mut [f64]),
    /// Counts and flags; sums wrap around.
    U64(&'a mut [u64]),
    /// Plain bytes, mostly for broadcasts; sums wrap around.
    U8(&'a mut [u8]),
}

/// Evaluates `$body` with `$slice` bound to the typed slice inside a [`Buffer`].
macro_rules! with_slice {
    ($buffer:expr, $slice:ident => $body:expr) => {
        match $buffer {
            $crate::Buffer::F32($slice) => $body,
            $crate::Buffer::F64($slice) => $body,
            $crate::Buffer::U64($slice) => $body,
            $crate::Buffer::U8($slice) => $body,
        }
    };
}
pub(crate) use with_slice;

impl Buffer<'_> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        with_slice!(self, slice => slice.len())
    }

    /// Whether there is no element at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn element_type(&self) -> ElementType {
        match self {
            Buffer::F32(_) => ElementType::F32,
            Buffer::F64(_) => ElementType::F64,
            Buffer::U64(_) => ElementType::U64,
            Buffer::U8(_) => ElementType::U8,
        }
    }

    /// The same memory, borrowed for a shorter time: for handing a buffer on and using it again afterwards.
    pub fn reborrow(&mut self) -> Buffer<'_> {
        match self {
            Buffer::F32(slice) => Buffer::F32(slice),
            Buffer::F64(slice) => Buffer::F64(slice),
            Buffer::U64(slice) => Buffer::U64(slice),
            Buffer::U8(slice) => Buffer::U8(slice),
        }
    }
}

/// The type of a buffer's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ElementType {
    /// 4-byte floats.
    F32,
    /// 8-byte floats.
    F64,
    /// 8-byte unsigned integers.
    U64,
    /// Bytes.
    U8,
}

impl ElementType {
    /// The types by their code on the wire.
    pub(crate) const ALL: [ElementType; 4] =
        [ElementType::F32, ElementType::F64, ElementType::U64, ElementType::U8];
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ElementType::F32 => "f32",
            ElementType::F64 => "f64",
            ElementType::U64 => "u64",
            ElementType::U8 => "u8",
        })
    }
}

/// One number that can be summed over ranks.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    fn plus(self, other: Self) -> Self;
}

macro_rules! element {
    ($type:ty, $variant:ident, $a:ident, $b:ident => $sum:expr) => {
        impl Element for $type {
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                let ($a, $b) = (self, other);
                $sum
            }
        }

        impl<'a> From<&'a mut [$type]> for Buffer<'a> {
            fn from(slice: &'a mut [$type]) -> Self {
                Buffer::$variant(slice)
            }
        }

        impl<'a> From<&'a mut Vec<$type>> for Buffer<'a> {
            fn from(vector: &'a mut Vec<$type>) -> Self {
                Buffer::$variant(vector)
            }
        }
    };
}

element!(f32, F32, a, b => a + b);
element!(f64, F64, a, b => a + b);
element!(u64, U64, a, b => a.wrapping_add(b));
element!(u8, U8, a, b => a.wrapping_add(b));

/// `out[i] = ((parts[0][i] + parts[1][i]) + parts[2][i]) + …`: the one definition of a sum over ranks.
///
/// All parts are as long as `out`; there is at least one.
pub(crate) fn sum_in_rank_order<'a, T: Element>(out: &mut [T], mut parts: impl Iterator<Item = &'a [T]>) {
    let Some(first) = parts.next() else { return };
    match parts.next() {
        None => out.copy_from_slice(first),
        Some(second) => {
            for ((sum, a), b) in out.iter_mut().zip(first).zip(second) {
                *sum = a.plus(*b);
            }
        }
    }
    for part in parts {
        for (sum, x) in out.iter_mut().zip(part) {
            *sum = sum.plus(*x);
        }
    }
}

/// The same sum with one part in `own`, which becomes the sum: `before` and `after` hold the parts of the
/// lower and the higher ranks, one after the other. Uses `before` as scratch.
#[cfg(any(feature = "mpi", test))]
pub(crate) fn sum_around<T: Element>(own: &mut [T], before: &mut [T], after: &[T]) {
    let len = own.len();
    let add = |sum: &mut [T], part: &[T]| sum.iter_mut().zip(part).for_each(|(sum, x)| *sum = sum.plus(*x));
    if !before.is_empty() {
        let (sum, parts) = before.split_at_mut(len);
        parts.chunks_exact(len).for_each(|part| add(sum, part));
        own.iter_mut().zip(sum).for_each(|(own, sum)| *own = sum.plus(*own));
    }
    if !after.is_empty() {
        after.chunks_exact(len).for_each(|part| add(own, part));
    }
}

/// Where block `index` of `len` elements split over `blocks` begins; block `index` ends where the next
/// begins.
pub(crate) fn block_start(len: usize, blocks: usize, index: usize) -> usize {
    // Widened: the product may not fit for a buffer near the address-space limit.
    ((len as u128 * index as u128) / blocks as u128) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_run_in_rank_order() {
        // In f32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows.
        let parts: [&[f32]; 3] = [&[1e8], &[1.0], &[-1e8]];
        let mut out = [9.0f32];
        sum_in_rank_order(&mut out, parts.into_iter());
        assert_eq!(out, [0.0]);
        let parts: [&[f32]; 3] = [&[1e8], &[-1e8], &[1.0]];
        sum_in_rank_order(&mut out, parts.into_iter());
        assert_eq!(out, [1.0]);
    }

    #[test]
    fn sums_around_ones_own_part_are_the_same() {
        let parts: Vec<[f32; 2]> = vec![[1e8, 1.0], [1.0, 1e8], [-1e8, 3.0], [0.5, -1e8], [7.0, 0.1]];
        let mut expected = [0f32; 2];
        sum_in_rank_order(&mut expected, parts.iter().map(|part| part.as_slice()));
        for rank in 0..parts.len() {
            let mut own = parts[rank];
            sum_around(&mut own, &mut parts[..rank].concat(), &parts[rank + 1..].concat());
            assert_eq!(own.map(f32::to_bits), expected.map(f32::to_bits), "rank {rank}");
        }
        sum_around::<f32>(&mut [], &mut [], &[]);
    }

    #[test]
    fn blocks_cover_everything_once() {
        for len in [0usize, 1, 2, 3, 7, 1000, usize::MAX] {
            for blocks in [1usize, 2, 3, 4, 64] {
                assert_eq!(block_start(len, blocks, 0), 0);
                assert_eq!(block_start(len, blocks, blocks), len);
                for index in 0..blocks {
                    assert!(block_start(len, blocks, index) <= block_start(len, blocks, index + 1));
                }
            }
        }
    }

    #[test]
    fn integer_sums_wrap() {
        let mut out = [0u8];
        sum_in_rank_order(&mut out, [[250u8].as_slice(), [10u8].as_slice()].into_iter());
        assert_eq!(out, [4]);
    }
}
