//! The inverse cosine transform, 8 x 8: the accurate integer method ("islow") of the Independent JPEG Group's library
//! (Loeffler, Ligtenberg, Moschytz, ICASSP 1989), bit for bit, two blocks at a time.
//!
//! [`pair_portable`] defines the result, overflow of damaged files included: coefficients are 16 bits, sums of two
//! coefficients wrap, the first pass's results saturate to 16 bits, pixels to 8. [`pair_avx2`] does the same with one
//! block in each half of a register.

/// Coefficients of a block in natural order, already multiplied by the quantisation table.
pub(super) type Block = [i16; 64];

/// Where a block's pixels go: offset of the first, distance of rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) at: usize,
    pub(super) stride: usize,
}

const F_0_298: i16 = 2446;
const F_0_390: i16 = 3196;
const F_0_541: i16 = 4433;
const F_0_765: i16 = 6270;
const F_0_899: i16 = 7373;
const F_1_175: i16 = 9633;
const F_1_501: i16 = 12299;
const F_1_847: i16 = 15137;
const F_1_961: i16 = 16069;
const F_2_053: i16 = 16819;
const F_2_562: i16 = 20995;
const F_3_072: i16 = 25172;

/// Bits of the constants' fractions, and those the first pass keeps.
const CONST_BITS: i32 = 13;
const PASS1_BITS: i32 = 2;
const SHIFT1: i32 = CONST_BITS - PASS1_BITS;
const SHIFT2: i32 = CONST_BITS + PASS1_BITS + 3;

/// Both blocks' pixels into `out`.
pub(super) fn pair_portable(blocks: &[Block; 2], out: &mut [u8], places: [Place; 2]) {
    for (block, place) in blocks.iter().zip(places) {
        let mut work = [0i16; 64];
        for x in 0..8 {
            let column = line(std::array::from_fn(|i| block[8 * i + x]), SHIFT1);
            for (y, value) in column.into_iter().enumerate() {
                work[8 * y + x] = value.clamp(i32::from(i16::MIN), i32::from(i16::MAX)) as i16;
            }
        }
        for y in 0..8 {
            let row = line(std::array::from_fn(|i| work[8 * y + i]), SHIFT2);
            let out = &mut out[place.at + y * place.stride..][..8];
            for (out, value) in out.iter_mut().zip(row) {
                *out = (value.clamp(-128, 127) + 128) as u8;
            }
        }
    }
}

/// One dimension, results rounded and shifted right by `shift`.
fn line(x: [i16; 8], shift: i32) -> [i32; 8] {
    let dot = |a: i16, b: i16, ca: i16, cb: i16| {
        (i32::from(a) * i32::from(ca)).wrapping_add(i32::from(b) * i32::from(cb))
    };
    let round = 1i32 << (shift - 1);
    let e0 = dot(x[0], x[4], 1 << CONST_BITS, 1 << CONST_BITS).wrapping_add(round);
    let e1 = dot(x[0], x[4], 1 << CONST_BITS, -(1 << CONST_BITS)).wrapping_add(round);
    let e2 = dot(x[2], x[6], F_0_541, F_0_541 - F_1_847);
    let e3 = dot(x[2], x[6], F_0_541 + F_0_765, F_0_541);
    let even = [e0.wrapping_add(e3), e1.wrapping_add(e2), e1.wrapping_sub(e2), e0.wrapping_sub(e3)];
    let (z3, z4) = (x[7].wrapping_add(x[3]), x[5].wrapping_add(x[1]));
    let a3 = dot(z3, z4, F_1_175 - F_1_961, F_1_175);
    let a4 = dot(z3, z4, F_1_175, F_1_175 - F_0_390);
    let odd = [
        dot(x[7], x[1], -F_0_899, F_1_501 - F_0_899).wrapping_add(a4),
        dot(x[5], x[3], -F_2_562, F_3_072 - F_2_562).wrapping_add(a3),
        dot(x[5], x[3], F_2_053 - F_2_562, -F_2_562).wrapping_add(a4),
        dot(x[7], x[1], F_0_298 - F_0_899, -F_0_899).wrapping_add(a3),
    ];
    std::array::from_fn(|i| {
        let sum = if i < 4 { even[i].wrapping_add(odd[i]) } else { even[7 - i].wrapping_sub(odd[7 - i]) };
        sum >> shift
    })
}

/// All 64 pixels of a block of which only the first coefficient is not zero.
#[inline(always)]
pub(super) fn flat(dc: i16, out: &mut [u8], place: Place) {
    let first = (((i32::from(dc) << CONST_BITS) + (1 << (SHIFT1 - 1))) >> SHIFT1)
        .clamp(i32::from(i16::MIN), i32::from(i16::MAX));
    let pixel = (((first << CONST_BITS) + (1 << (SHIFT2 - 1))) >> SHIFT2).clamp(-128, 127) + 128;
    for y in 0..8 {
        out[place.at + y * place.stride..][..8].copy_from_slice(&[pixel as u8; 8]);
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::pair_avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// As [`pair_portable`].
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn pair_avx2(blocks: &[Block; 2], out: &mut [u8], places: [Place; 2]) {
        let rows: [__m256i; 8] = std::array::from_fn(|i| {
            let (a, b) = (&blocks[0][8 * i..8 * i + 8], &blocks[1][8 * i..8 * i + 8]);
            // SAFETY: each slice is 16 bytes long; unaligned loads.
            unsafe {
                let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
                _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b)
            }
        });
        let columns = transpose(pass::<SHIFT1>(rows));
        let o = pass::<SHIFT2>(columns);
        // o[x] holds column x. To bytes, and transposed back: bytes of columns are interleaved until they are rows.
        let centre = _mm256_set1_epi8(-128);
        let q: [__m256i; 4] =
            std::array::from_fn(|i| _mm256_xor_si256(_mm256_packs_epi16(o[i], o[i + 4]), centre));
        let (s0, s1) = (_mm256_unpacklo_epi8(q[0], q[1]), _mm256_unpackhi_epi8(q[0], q[1]));
        let (s2, s3) = (_mm256_unpacklo_epi8(q[2], q[3]), _mm256_unpackhi_epi8(q[2], q[3]));
        let (u0, u1) = (_mm256_unpacklo_epi16(s0, s2), _mm256_unpackhi_epi16(s0, s2));
        let (u2, u3) = (_mm256_unpacklo_epi16(s1, s3), _mm256_unpackhi_epi16(s1, s3));
        let pairs = [
            _mm256_unpacklo_epi32(u0, u2),
            _mm256_unpackhi_epi32(u0, u2),
            _mm256_unpacklo_epi32(u1, u3),
            _mm256_unpackhi_epi32(u1, u3),
        ];
        for (half, place) in places.into_iter().enumerate() {
            // One check for the whole block.
            let out = &mut out[place.at..][..7 * place.stride + 8];
            for (i, pair) in pairs.iter().enumerate() {
                let two = if half == 0 {
                    _mm256_castsi256_si128(*pair)
                } else {
                    _mm256_extracti128_si256::<1>(*pair)
                };
                let first = _mm_cvtsi128_si64(two).to_le_bytes();
                let second = _mm_extract_epi64::<1>(two).to_le_bytes();
                out[2 * i * place.stride..][..8].copy_from_slice(&first);
                out[(2 * i + 1) * place.stride..][..8].copy_from_slice(&second);
            }
        }
    }

    /// One dimension of every column.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn pass<const SHIFT: i32>(x: [__m256i; 8]) -> [__m256i; 8] {
        let pair = |a: __m256i, b: __m256i| [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)];
        let dot = |pair: [__m256i; 2], ca: i16, cb: i16| {
            let c = _mm256_set1_epi32(i32::from(ca) & 0xFFFF | i32::from(cb) << 16);
            [_mm256_madd_epi16(pair[0], c), _mm256_madd_epi16(pair[1], c)]
        };
        let add =
            |a: [__m256i; 2], b: [__m256i; 2]| [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])];
        let sub =
            |a: [__m256i; 2], b: [__m256i; 2]| [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])];
        let down = |a: [__m256i; 2]| {
            _mm256_packs_epi32(_mm256_srai_epi32::<SHIFT>(a[0]), _mm256_srai_epi32::<SHIFT>(a[1]))
        };
        let round = [_mm256_set1_epi32(1 << (SHIFT - 1)); 2];
        let p04 = pair(x[0], x[4]);
        let e0 = add(dot(p04, 1 << CONST_BITS, 1 << CONST_BITS), round);
        let e1 = add(dot(p04, 1 << CONST_BITS, -(1 << CONST_BITS)), round);
        let p26 = pair(x[2], x[6]);
        let e2 = dot(p26, F_0_541, F_0_541 - F_1_847);
        let e3 = dot(p26, F_0_541 + F_0_765, F_0_541);
        let even = [add(e0, e3), add(e1, e2), sub(e1, e2), sub(e0, e3)];
        let z = pair(_mm256_add_epi16(x[7], x[3]), _mm256_add_epi16(x[5], x[1]));
        let a3 = dot(z, F_1_175 - F_1_961, F_1_175);
        let a4 = dot(z, F_1_175, F_1_175 - F_0_390);
        let (p71, p53) = (pair(x[7], x[1]), pair(x[5], x[3]));
        let odd = [
            add(dot(p71, -F_0_899, F_1_501 - F_0_899), a4),
            add(dot(p53, -F_2_562, F_3_072 - F_2_562), a3),
            add(dot(p53, F_2_053 - F_2_562, -F_2_562), a4),
            add(dot(p71, F_0_298 - F_0_899, -F_0_899), a3),
        ];
        [
            down(add(even[0], odd[0])),
            down(add(even[1], odd[1])),
            down(add(even[2], odd[2])),
            down(add(even[3], odd[3])),
            down(sub(even[3], odd[3])),
            down(sub(even[2], odd[2])),
            down(sub(even[1], odd[1])),
            down(sub(even[0], odd[0])),
        ]
    }

    /// 8 x 8 of 16 bits in each half.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose(x: [__m256i; 8]) -> [__m256i; 8] {
        let a: [__m256i; 8] = std::array::from_fn(|i| {
            let (p, q) = (x[i / 2], x[i / 2 + 4]);
            if i % 2 == 0 { _mm256_unpacklo_epi16(p, q) } else { _mm256_unpackhi_epi16(p, q) }
        });
        let b: [__m256i; 8] = std::array::from_fn(|i| {
            let (p, q) = (a[i / 2], a[i / 2 + 4]);
            if i % 2 == 0 { _mm256_unpacklo_epi16(p, q) } else { _mm256_unpackhi_epi16(p, q) }
        });
        std::array::from_fn(|i| {
            let (p, q) = (b[i / 2], b[i / 2 + 4]);
            if i % 2 == 0 { _mm256_unpacklo_epi16(p, q) } else { _mm256_unpackhi_epi16(p, q) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn blocks(seed: u64, amplitude: i32) -> [Block; 2] {
        let stream = Stream::new(seed, 0, 0, 0);
        std::array::from_fn(|b| {
            std::array::from_fn(|i| {
                let bits = stream.bits((64 * b + i) as u32);
                // Sparse, as coefficients are; sometimes of the largest size there is.
                if bits & 3 == 0 { ((bits >> 32) as i32 % amplitude) as i16 } else { 0 }
            })
        })
    }

    /// The definition of the transform in f64 (T.81, A.3.3).
    fn exact(block: &Block, x: usize, y: usize) -> f64 {
        let c = |k: usize| if k == 0 { std::f64::consts::FRAC_1_SQRT_2 } else { 1.0 };
        let cos = |k: usize, at: usize| (std::f64::consts::PI * (2 * at + 1) as f64 * k as f64 / 16.0).cos();
        let mut sum = 0.0;
        for v in 0..8 {
            for u in 0..8 {
                sum += c(u) * c(v) * f64::from(block[8 * v + u]) * cos(u, x) * cos(v, y);
            }
        }
        (sum / 4.0 + 128.0).clamp(0.0, 255.0)
    }

    #[test]
    fn is_the_transform() {
        for seed in 0..50 {
            let blocks = blocks(seed, 300);
            let mut out = [0; 128];
            pair_portable(&blocks, &mut out, [Place { at: 0, stride: 16 }, Place { at: 8, stride: 16 }]);
            for (b, block) in blocks.iter().enumerate() {
                for (y, x) in (0..8).flat_map(|y| (0..8).map(move |x| (y, x))) {
                    let expected = exact(block, x, y);
                    let found = f64::from(out[16 * y + 8 * b + x]);
                    assert!((found - expected).abs() < 1.0, "{seed} {b} {x} {y}: {found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn wide_registers_change_nothing() {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            for seed in 0..2000 {
                let blocks = blocks(seed, [50, 1000, 32768][seed as usize % 3]);
                let places = [Place { at: 3, stride: 20 }, Place { at: 11, stride: 20 }];
                let (mut portable, mut wide) = ([0; 180], [0; 180]);
                pair_portable(&blocks, &mut portable, places);
                // SAFETY: the processor has AVX2.
                unsafe { pair_avx2(&blocks, &mut wide, places) };
                assert_eq!(portable, wide, "{seed}");
            }
        }
    }

    #[test]
    fn a_flat_block_is_what_the_transform_gives() {
        for dc in i16::MIN..=i16::MAX {
            let mut blocks = [[0; 64]; 2];
            blocks[0][0] = dc;
            let (mut whole, mut short) = ([0; 128], [0; 128]);
            pair_portable(&blocks, &mut whole, [Place { at: 0, stride: 8 }, Place { at: 64, stride: 8 }]);
            flat(dc, &mut short, Place { at: 0, stride: 8 });
            assert_eq!(whole[..64], short[..64], "{dc}");
        }
    }
}
