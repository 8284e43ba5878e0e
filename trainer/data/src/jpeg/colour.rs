//! Samples to RGB, a row at a time: upsampling of coarser components, then the colour space. libjpeg's arithmetic
//! (jdsample.c, jdcolor.c), in integers.

use std::ops::Range;

use super::layout::Layout;
use super::markers::{Colour, Component, Header};

/// Rows between two steps.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// Column sums of the vertical filter, one to each side more than there are samples.
    sums: Vec<u16>,
}

/// Makes the RGB rows `range` (of the image) in the full planes of `data`.
pub(super) fn rows(header: &Header, layout: &Layout, range: Range<usize>, work: &mut Rows, data: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(header: &Header, layout: &Layout, range: Range<usize>, work: &mut Rows, data: &mut [u8]) {
            rows_on::<true>(header, layout, range, work, data);
        }
        if crate::cpu::has_avx2() {
            // SAFETY: the processor has AVX2.
            return unsafe { wide(header, layout, range, work, data) };
        }
    }
    rows_on::<false>(header, layout, range, work, data);
}

#[inline(always)]
fn rows_on<const WIDE: bool>(
    header: &Header,
    layout: &Layout,
    range: Range<usize>,
    work: &mut Rows,
    data: &mut [u8],
) {
    let stride = layout.stride;
    let full = stride * layout.rows;
    let planes = header.components.len();
    for y in range {
        let at = (y - layout.down.0 * 8 * header.vmax) * stride;
        let (pixels, coarse) = data.split_at_mut(full * planes.max(3));
        for (c, component) in header.components.iter().enumerate() {
            if component.h < header.hmax || component.v < header.vmax {
                let from = &coarse[layout.planes[c].at - full * planes.max(3)..];
                upsample(
                    header,
                    component,
                    layout,
                    (from, layout.planes[c].stride),
                    y,
                    work,
                    &mut pixels[c * full + at..][..stride],
                );
            }
        }
        let (r, rest) = pixels.split_at_mut(full);
        let (g, rest) = rest.split_at_mut(full);
        let (b, k) = rest.split_at_mut(full);
        let row = at..at + stride;
        let (r, g, b) = (&mut r[row.clone()], &mut g[row.clone()], &mut b[row.clone()]);
        match header.colour {
            Colour::Gray => {
                g.copy_from_slice(r);
                b.copy_from_slice(r);
            }
            Colour::Rgb => {}
            Colour::YCbCr => ycc::<WIDE>(r, g, b),
            Colour::Cmyk => cmyk(r, g, b, &k[row]),
            Colour::Ycck => {
                ycc::<WIDE>(r, g, b);
                [&mut *r, &mut *g, &mut *b].into_iter().flatten().for_each(|x| *x = 255 - *x);
                cmyk(r, g, b, &k[row]);
            }
        }
    }
}

/// One row of a coarser component at full resolution.
#[inline(always)]
fn upsample(
    header: &Header,
    component: &Component,
    layout: &Layout,
    (plane, stride): (&[u8], usize),
    y: usize,
    work: &mut Rows,
    out: &mut [u8],
) {
    let (across, down) = (header.hmax / component.h, header.vmax / component.v);
    // Of the plane's first sample, in the component.
    let (left, top) = (layout.across.0 * component.h * 8, layout.down.0 * component.v * 8);
    // Samples that are really there.
    let count = stride.min(component.width - left);
    let last = component.height - 1;
    let line = |row: usize| &plane[(row.min(last) - top) * stride..][..count];
    let near = line(y / down);
    // Above for the upper pixel row of a sample, below for the lower; at the border the row itself.
    let far = || {
        let row = y / 2;
        line(if y % 2 == 1 { row + 1 } else { row.saturating_sub(1).max(top) })
    };
    let fancy = component.width > 2;
    match (across, down) {
        (2, 1) if fancy => {
            work.sums.resize(count + 2, 0);
            let sums = &mut work.sums[..count + 2];
            for (sum, &x) in sums[1..].iter_mut().zip(near) {
                *sum = u16::from(x);
            }
            (sums[0], sums[count + 1]) = (sums[1], sums[count]);
            horizontal::<1, 2, 2>(sums, out);
        }
        (2, 2) if fancy => {
            work.sums.resize(count + 2, 0);
            let sums = &mut work.sums[..count + 2];
            for ((sum, &near), &far) in sums[1..].iter_mut().zip(near).zip(far()) {
                *sum = 3 * u16::from(near) + u16::from(far);
            }
            (sums[0], sums[count + 1]) = (sums[1], sums[count]);
            horizontal::<8, 7, 4>(sums, out);
        }
        (1, 2) => {
            let bias = if y.is_multiple_of(2) { 1 } else { 2 };
            for ((out, &near), &far) in out.iter_mut().zip(near).zip(far()) {
                *out = ((3 * u16::from(near) + u16::from(far) + bias) >> 2) as u8;
            }
        }
        _ => {
            for (out, &x) in out.chunks_exact_mut(across).zip(near) {
                out.fill(x);
            }
        }
    }
}

/// Two pixels a sample: three parts of it and one of its neighbour. `sums` has a neighbour at each end.
#[inline(always)]
fn horizontal<const LEFT: u16, const RIGHT: u16, const SHIFT: u32>(sums: &[u16], out: &mut [u8]) {
    let count = sums.len() - 2;
    let (before, here, after) = (&sums[..count], &sums[1..count + 1], &sums[2..]);
    for (((out, &here), &before), &after) in out.chunks_exact_mut(2).zip(here).zip(before).zip(after) {
        out[0] = ((3 * here + before + LEFT) >> SHIFT) as u8;
        out[1] = ((3 * here + after + RIGHT) >> SHIFT) as u8;
    }
}

/// YCbCr (JFIF) to RGB in place, in 16-bit fixed point.
#[inline(always)]
fn ycc<const WIDE: bool>(r: &mut [u8], g: &mut [u8], b: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if WIDE {
        // SAFETY: `WIDE` is set only where AVX2 was found.
        let done = unsafe { x86::ycc(r, g, b) };
        return ycc_portable(&mut r[done..], &mut g[done..], &mut b[done..]);
    }
    ycc_portable(r, g, b);
}

fn ycc_portable(r: &mut [u8], g: &mut [u8], b: &mut [u8]) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let (y, cb, cr) = (i32::from(*r), i32::from(*g) - 128, i32::from(*b) - 128);
        let clamp = |x: i32| x.clamp(0, 255) as u8;
        *r = clamp(y + ((91_881 * cr + 32_768) >> 16));
        *g = clamp(y + ((-22_554 * cb - 46_802 * cr + 32_768) >> 16));
        *b = clamp(y + ((116_130 * cb + 32_768) >> 16));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// As [`super::ycc_portable`], for as many pixels as fill registers; returns how many.
    ///
    /// The same sums in 16 bits: 1.402 is 1 + 0.402 and 1.772 is 2 − 0.228, whose products rounded to 15 bits are those
    /// of the definition for each of the 256 values; green's two products are added in 32 bits.
    #[target_feature(enable = "avx2")]
    pub(super) fn ycc(r: &mut [u8], g: &mut [u8], b: &mut [u8]) -> usize {
        let len = r.len().min(g.len()).min(b.len());
        let centre = _mm256_set1_epi16(128);
        let (to_r, to_b) = (_mm256_set1_epi16(13_173), _mm256_set1_epi16(-7_471));
        // −0.344 · cb and 0.286 · cr; −0.714 is 0.286 − 1.
        let to_g = _mm256_set1_epi32((-22_554i32 & 0xFFFF) | (18_734 << 16));
        let half = _mm256_set1_epi32(32_768);
        let mut at = 0;
        while at + 16 <= len {
            // SAFETY: 16 bytes from `at` are within each slice.
            let load = |from: &[u8]| unsafe {
                _mm256_cvtepu8_epi16(_mm_loadu_si128(from[at..at + 16].as_ptr().cast()))
            };
            let y = load(r);
            let cb = _mm256_sub_epi16(load(g), centre);
            let cr = _mm256_sub_epi16(load(b), centre);
            let red = _mm256_add_epi16(y, _mm256_add_epi16(cr, _mm256_mulhrs_epi16(cr, to_r)));
            let blue = _mm256_add_epi16(
                y,
                _mm256_add_epi16(_mm256_add_epi16(cb, cb), _mm256_mulhrs_epi16(cb, to_b)),
            );
            let low = _mm256_madd_epi16(_mm256_unpacklo_epi16(cb, cr), to_g);
            let high = _mm256_madd_epi16(_mm256_unpackhi_epi16(cb, cr), to_g);
            let sum = _mm256_packs_epi32(
                _mm256_srai_epi32::<16>(_mm256_add_epi32(low, half)),
                _mm256_srai_epi32::<16>(_mm256_add_epi32(high, half)),
            );
            let green = _mm256_add_epi16(y, _mm256_sub_epi16(sum, cr));
            for (to, value) in [(&mut *r, red), (&mut *g, green), (&mut *b, blue)] {
                let bytes = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi16(value, value));
                // SAFETY: as above.
                unsafe {
                    _mm_storeu_si128(to[at..at + 16].as_mut_ptr().cast(), _mm256_castsi256_si128(bytes));
                }
            }
            at += 16;
        }
        at
    }
}

/// Inverted CMYK to RGB in place.
fn cmyk(r: &mut [u8], g: &mut [u8], b: &mut [u8], k: &[u8]) {
    for (channel, &k) in [r, g, b].into_iter().flat_map(|plane| plane.iter_mut().zip(k)) {
        *channel = without_ink(255 - *channel, k);
    }
}

/// What is left of `white` (255 without black) behind `ink`, as Pillow has it: the product by MULDIV255, rounded.
pub(crate) fn without_ink(ink: u8, white: u8) -> u8 {
    let product = u32::from(ink) * u32::from(white) + 128;
    white.saturating_sub(((product + (product >> 8)) >> 8) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_registers_change_no_colour() {
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::has_avx2() {
            for y in [0u8, 1, 77, 128, 254, 255] {
                let mut wide: [Vec<u8>; 3] = [
                    vec![y; 1 << 16],
                    (0..1 << 16).map(|i| (i >> 8) as u8).collect(),
                    (0..1 << 16).map(|i| i as u8).collect(),
                ];
                let mut portable = wide.clone();
                let [r, g, b] = &mut wide;
                // SAFETY: the processor has AVX2.
                assert_eq!(unsafe { x86::ycc(r, g, b) }, 1 << 16);
                let [r, g, b] = &mut portable;
                ycc_portable(r, g, b);
                assert_eq!(wide, portable);
            }
        }
    }
}
