//! Antialiased resize of a part of an image to a square view: Pillow's filters in 16-bit fixed point.
//!
//! Columns are filtered first, then rows, each result rounded to 8 bits, as Pillow-SIMD and fast_image_resize do (whose
//! results these are, bit for bit; Pillow has the passes the other way round). Integers throughout, so the result is
//! the same on every processor.
//!
//! ```text
//!  source rows ─► eight rows of the view, all columns ─► [column pair][8 rows] ─► eight columns at a time ─► [8 rows]
//!     (u8)              filtered down                       16 bits, transposed       filtered across           f32
//! ```
//! Transposed, a register holds the same two columns of eight rows, so that the filter across is a multiply and add of
//! whole registers too.

use mentee_config::recipe::Interpolation;

use crate::image::{CropBox, OVERREAD, PlanarImage};

/// Rows of the view made together.
pub(crate) const TILE: usize = 8;

/// Columns loaded together.
const CHUNK: usize = 16;

/// What is resized: an area of an image, in pixels and parts of pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Area {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

impl From<CropBox> for Area {
    fn from(crop: CropBox) -> Self {
        let CropBox { x, y, width, height } = crop;
        Self { x: f64::from(x), y: f64::from(y), width: f64::from(width), height: f64::from(height) }
    }
}

/// Work memory, reused from image to image.
#[derive(Debug, Default)]
pub(crate) struct Resizer {
    down: Filter,
    across: Filter,
    known: Known,
    raw: Vec<f64>,
    tile: Vec<[i32; TILE]>,
    /// Sixteen columns of neighbouring rows, interleaved: 16 bits each, `[row, half]`.
    neighbours: Vec<[[i32; 8]; 2]>,
}

/// The weights of one dimension: `view[i] = Σ_k weight[i][k] · source[start[i] + k]`, in pairs.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Filter {
    pub(crate) starts: Vec<u32>,
    /// Pairs of weights of every output; those that are not needed are zero.
    pub(crate) pairs: usize,
    /// `[outputs, pairs]`; the first of a pair in the low half.
    pub(crate) weights: Vec<i32>,
    /// Bits of the weights' fraction.
    pub(crate) precision: u32,
}

/// The longest side and the largest view whose weights are kept.
const KEPT: usize = 256;

/// Weights of whole sides, which their length alone decides: worked out once for small images, where that is most of the work.
#[derive(Debug, Default)]
struct Known {
    /// What they are for.
    of: Option<(Interpolation, usize)>,
    /// Down, across, across mirrored: by length; those not known have no pairs.
    filters: [Vec<Filter>; 3],
}

impl Known {
    /// Makes `filter` that of a side, which `set` works out.
    fn fill(
        &mut self,
        filter: &mut Filter,
        what: usize,
        length: u32,
        is_whole: bool,
        (how, size): (Interpolation, usize),
        set: impl FnOnce(&mut Filter),
    ) {
        if !is_whole || length as usize > KEPT || size > KEPT {
            return set(filter);
        }
        if self.of != Some((how, size)) {
            *self = Self { of: Some((how, size)), ..Self::default() };
        }
        let known = &mut self.filters[what];
        if known.is_empty() {
            known.resize_with(KEPT + 1, Filter::default);
        }
        let known = &mut known[length as usize];
        if known.pairs == 0 {
            set(known);
        }
        filter.copy_from(known);
    }
}

fn weight(how: Interpolation, x: f64) -> f64 {
    let x = x.abs();
    match how {
        Interpolation::Bilinear => {
            if x < 1.0 {
                1.0 - x
            } else {
                0.0
            }
        }
        // Keys' cubic with a = −0.5, Catmull-Rom.
        Interpolation::Bicubic => {
            let near = (1.5 * x - 2.5) * x * x + 1.0;
            let far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
            if x < 1.0 {
                near
            } else if x < 2.0 {
                far
            } else {
                0.0
            }
        }
    }
}

impl Filter {
    /// Becomes the same as another, in the memory that is there.
    fn copy_from(&mut self, other: &Self) {
        self.starts.clone_from(&other.starts);
        self.weights.clone_from(&other.weights);
        (self.pairs, self.precision) = (other.pairs, other.precision);
    }

    fn mirror(&mut self) {
        self.starts.reverse();
        // Reversed as a whole, then each output's own weights back.
        self.weights.reverse();
        self.weights.chunks_exact_mut(self.pairs).for_each(<[i32]>::reverse);
    }

    /// Weights for `outputs` pixels over `from .. from + length` of `size` source pixels. `even`: starts at even pixels.
    fn set(
        &mut self,
        how: Interpolation,
        size: u32,
        (from, length): (f64, f64),
        outputs: usize,
        even: bool,
        raw: &mut Vec<f64>,
    ) {
        let scale = length / outputs as f64;
        // Wider when shrinking: that is the antialiasing.
        let stretch = scale.max(1.0);
        let radius = stretch * if how == Interpolation::Bicubic { 2.0 } else { 1.0 };
        let narrow = 1.0 / stretch;
        // floor(a + w) … ceil(a − w) is at most 2w + 2 wide.
        let window = (2.0 * radius) as usize + 3;
        raw.clear();
        raw.resize(window * outputs, 0.0);
        self.starts.clear();
        let mut largest = 0.0f64;
        let mut widest = 1;
        for (i, raw) in raw.chunks_exact_mut(window).enumerate() {
            let centre = from + (i as f64 + 0.5) * scale;
            let first = (centre - radius).max(0.0) as u32;
            let end = (centre + radius).min(f64::from(size));
            let last = end as u32 + u32::from(f64::from(end as u32) < end);
            let count = (last.saturating_sub(first) as usize).min(window);
            let middle = centre - 0.5;
            for (k, raw) in raw[..count].iter_mut().enumerate() {
                *raw = weight(how, (f64::from(first + k as u32) - middle) * narrow);
            }
            let sum: f64 = raw[..count].iter().sum();
            if sum != 0.0 {
                raw[..count].iter_mut().for_each(|weight| *weight /= sum);
            }
            largest = raw[..count].iter().fold(largest, |a, &b| if b > a { b } else { a });
            widest = widest.max(count + usize::from(even && first % 2 == 1));
            self.starts.push(first);
        }
        // As many bits as let the largest weight stay below 2^15.
        self.precision =
            (1..22).find(|&bits| largest * f64::from(1 << (bits + 1)) + 0.5 >= 32768.0).unwrap_or(21);
        let one = f64::from(1 << self.precision);
        self.pairs = widest.div_ceil(2);
        self.weights.clear();
        self.weights.resize(self.pairs * outputs, 0);
        let lines = raw.chunks_exact(window).zip(self.weights.chunks_exact_mut(self.pairs));
        for ((raw, pairs), start) in lines.zip(&mut self.starts) {
            let odd = usize::from(even && *start % 2 == 1);
            *start -= odd as u32;
            let fixed = |k: usize| match raw.get(k) {
                Some(&weight) => ((weight * one + if weight < 0.0 { -0.5 } else { 0.5 }) as i32) & 0xFFFF,
                None => 0,
            };
            for (p, pair) in pairs.iter_mut().enumerate() {
                let first = if odd == 1 && p == 0 { 0 } else { fixed(2 * p - odd) };
                *pair = first | fixed(2 * p + 1 - odd) << 16;
            }
        }
    }
}

impl Resizer {
    /// Begins to resize `area` of `part` (pixels from its corner) to `size` x `size`, mirrored if asked. `part` is within
    /// `image.part`; pixels outside it play no part.
    pub(crate) fn begin(
        &mut self,
        image: &PlanarImage,
        part: CropBox,
        area: Area,
        how: Interpolation,
        mirror: bool,
        size: usize,
    ) {
        assert!(image.part.contains(part), "the part to be resized is there");
        self.weigh(part, area, how, mirror, size);
        let columns = (part.width as usize).next_multiple_of(CHUNK);
        self.tile.resize(columns / 2 + self.across.pairs, [0; TILE]);
    }

    /// The weights alone: first down, then across.
    pub(crate) fn weigh(
        &mut self,
        part: CropBox,
        area: Area,
        how: Interpolation,
        mirror: bool,
        size: usize,
    ) -> [&Filter; 2] {
        let Self { down, across, known, raw, .. } = self;
        let (is_whole, view) = (area == Area::from(CropBox::whole(part.width, part.height)), (how, size));
        known.fill(down, 0, part.height, is_whole, view, |down| {
            down.set(how, part.height, (area.y, area.height), size, false, raw);
        });
        known.fill(across, 1 + usize::from(mirror), part.width, is_whole, view, |across| {
            across.set(how, part.width, (area.x, area.width), size, true, raw);
            if mirror {
                across.mirror();
            }
        });
        [down, across]
    }

    /// Makes rows `top ..` (`rows`, at most [`TILE`]) of all channels: floats in [0, 1] (multiples of 1/255), to their
    /// places in `planes`, `[3, size, size]`. `image`, `part` and `size` are those of [`Self::begin`].
    pub(crate) fn rows(
        &mut self,
        image: &PlanarImage,
        part: CropBox,
        top: usize,
        rows: usize,
        size: usize,
        planes: &mut [f32],
    ) {
        for (channel, plane) in planes.chunks_exact_mut(size * size).enumerate() {
            let out = &mut plane[top * size..(top + rows) * size];
            let from = Plane { pixels: image.from(channel, part), stride: image.stride, part };
            #[cfg(target_arch = "x86_64")]
            if crate::cpu::has_avx2() {
                // SAFETY: the processor has AVX2.
                unsafe { x86::tile(self, from, top, out, size) };
                continue;
            }
            tile_portable(self, from, top, out, size);
        }
    }
}

/// One channel of what is resized.
#[derive(Clone, Copy)]
struct Plane<'a> {
    /// From the part's first pixel on.
    pixels: &'a [u8],
    stride: usize,
    part: CropBox,
}

const SCALE: f32 = 1.0 / 255.0;

/// Σ of pairs, rounded to 8 bits.
fn filtered(pairs: &[i32], precision: u32, source: impl Fn(usize) -> i32) -> i32 {
    let mut sum = 1i32 << (precision - 1);
    for (p, &pair) in pairs.iter().enumerate() {
        sum = sum.wrapping_add(i32::from(pair as i16) * source(2 * p));
        sum = sum.wrapping_add(i32::from((pair >> 16) as i16) * source(2 * p + 1));
    }
    (sum >> precision).clamp(0, 255)
}

/// The definition of [`Resizer::rows`], for one channel.
fn tile_portable(work: &mut Resizer, from: Plane<'_>, top: usize, out: &mut [f32], size: usize) {
    let Resizer { down, across, .. } = work;
    let (width, height) = (from.part.width as usize, from.part.height as usize);
    let mut line = vec![0i32; width + 2 * across.pairs];
    for (y, out) in (top..).zip(out.chunks_exact_mut(size)) {
        let start = down.starts[y] as usize;
        let pairs = &down.weights[y * down.pairs..][..down.pairs];
        for (x, line) in line[..width].iter_mut().enumerate() {
            *line = filtered(pairs, down.precision, |k| {
                i32::from(from.pixels[(start + k).min(height - 1) * from.stride + x])
            });
        }
        for (x, out) in out.iter_mut().enumerate() {
            let start = across.starts[x] as usize;
            let pairs = &across.weights[x * across.pairs..][..across.pairs];
            *out = filtered(pairs, across.precision, |k| line[start + k]) as f32 * SCALE;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::*;

    /// Calls a function that is compiled for each usual number of pairs, so that its loops over them have no counter.
    macro_rules! with_pairs {
        ($pairs:expr, $function:ident($($argument:expr),*)) => {
            match $pairs {
                2 => $function::<2>($($argument),*),
                3 => $function::<3>($($argument),*),
                4 => $function::<4>($($argument),*),
                5 => $function::<5>($($argument),*),
                6 => $function::<6>($($argument),*),
                _ => $function::<0>($($argument),*),
            }
        };
    }

    /// As [`tile_portable`].
    #[target_feature(enable = "avx2")]
    pub(super) fn tile(work: &mut Resizer, from: Plane<'_>, top: usize, out: &mut [f32], size: usize) {
        let Resizer { down, across, tile, neighbours, .. } = work;
        let rows = top..top + out.len() / size;
        with_pairs!(down.pairs, begin(down, from, rows, neighbours, tile));
        with_pairs!(across.pairs, finish(across, tile, out, size));
    }

    /// Filters `rows` of the view down, into `tile`. `PAIRS`: pairs of weights of each row; 0: as the filter says.
    #[target_feature(enable = "avx2")]
    fn begin<const PAIRS: usize>(
        down: &Filter,
        from: Plane<'_>,
        rows: Range<usize>,
        neighbours: &mut Vec<[[i32; 8]; 2]>,
        tile: &mut [[i32; TILE]],
    ) {
        let pairs = if PAIRS == 0 { down.pairs } else { PAIRS };
        let (width, height) = (from.part.width as usize, from.part.height as usize);
        let (stride, from) = (from.stride, from.pixels);
        // Every load below starts in a row of the part, at most CHUNK columns after its last multiple of CHUNK.
        assert!(from.len() >= (height - 1) * stride + width + OVERREAD);
        // The source rows of these rows of the view, each with the one below it.
        let starts = &down.starts[rows.clone()];
        let weights = &down.weights[rows.start * pairs..rows.end * pairs];
        let first = starts[0] as usize;
        let count = starts[starts.len() - 1] as usize - first + 2 * pairs - 1;
        neighbours.resize(count.max(neighbours.len()), [[0; 8]; 2]);
        let neighbours = &mut neighbours[..count];
        for (column, tile) in (0..width).step_by(CHUNK).zip(tile.chunks_exact_mut(CHUNK / 2)) {
            // Sixteen columns of a row in 16 bits.
            let load = |row: usize| {
                // SAFETY: a row of the part, with OVERREAD bytes behind the last, as checked above.
                _mm256_cvtepu8_epi16(unsafe {
                    _mm_loadu_si128(from.as_ptr().add(row * stride + column).cast())
                })
            };
            let mut above = load(first.min(height - 1));
            for (row, pair) in (first + 1..).zip(&mut *neighbours) {
                // Rows beyond the last have weights of zero: the last will do for them.
                let below = if row < height { load(row) } else { above };
                // SAFETY: 32 bytes each.
                unsafe {
                    _mm256_storeu_si256(pair[0].as_mut_ptr().cast(), _mm256_unpacklo_epi16(above, below));
                    _mm256_storeu_si256(pair[1].as_mut_ptr().cast(), _mm256_unpackhi_epi16(above, below));
                }
                above = below;
            }
            let mut lines = [_mm_setzero_si128(); TILE];
            for ((&start, weights), line) in starts.iter().zip(weights.chunks_exact(pairs)).zip(&mut lines) {
                let rows = &neighbours[start as usize - first..][..2 * pairs - 1];
                *line = filter_down(rows, &weights[..pairs], down.precision);
            }
            // Pairs of columns are transposed like numbers of 16 bits.
            for (pair, tile) in transpose(lines).into_iter().zip(tile) {
                // SAFETY: a tile's element is 32 bytes.
                unsafe { _mm256_storeu_si256(tile.as_mut_ptr().cast(), _mm256_cvtepu8_epi16(pair)) };
            }
        }
    }

    /// Filters a tile across. `PAIRS`: pairs of weights of each column; 0: as the filter says.
    #[target_feature(enable = "avx2")]
    fn finish<const PAIRS: usize>(across: &Filter, tile: &[[i32; TILE]], out: &mut [f32], size: usize) {
        let rows = out.len() / size;
        let count = if PAIRS == 0 { across.pairs } else { PAIRS };
        let outputs = across.starts.chunks(8).zip(across.weights.chunks(8 * count));
        for (left, (starts, weights)) in (0..size).step_by(8).zip(outputs) {
            let columns = starts.len();
            let mut sums = [_mm256_setzero_si256(); 8];
            for ((&start, weights), sum) in starts.iter().zip(weights.chunks_exact(count)).zip(&mut sums) {
                *sum =
                    filter_across(&tile[start as usize / 2..][..count], &weights[..count], across.precision);
            }
            let square = transpose_bytes(sums);
            for (y, row) in square.into_iter().enumerate().take(rows) {
                let floats =
                    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(row)), _mm256_set1_ps(SCALE));
                let out = &mut out[y * size + left..][..columns];
                if let Ok(out) = <&mut [f32; 8]>::try_from(&mut *out) {
                    // SAFETY: eight floats.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), floats) };
                } else {
                    let mut eight = [0.0; 8];
                    // SAFETY: eight floats.
                    unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), floats) };
                    out.copy_from_slice(&eight[..columns]);
                }
            }
        }
    }

    /// Sixteen columns of one row of the view, 8 bits each.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn filter_down(neighbours: &[[[i32; 8]; 2]], weights: &[i32], precision: u32) -> __m128i {
        let round = _mm256_set1_epi32(1 << (precision - 1));
        let (mut low, mut high) = (round, round);
        // By index: with lengths that are known the loop is none.
        for (pair, &weights) in weights.iter().enumerate() {
            let (rows, weights) = (&neighbours[2 * pair], _mm256_set1_epi32(weights));
            // SAFETY: 32 bytes each.
            let (first, second) = unsafe {
                (_mm256_loadu_si256(rows[0].as_ptr().cast()), _mm256_loadu_si256(rows[1].as_ptr().cast()))
            };
            low = _mm256_add_epi32(low, _mm256_madd_epi16(first, weights));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(second, weights));
        }
        let shift = _mm_cvtsi32_si128(precision as i32);
        // [0–3 | 8–11] and [4–7 | 12–15] in 32 bits, in order in 16, then in 8.
        let words = _mm256_packs_epi32(_mm256_sra_epi32(low, shift), _mm256_sra_epi32(high, shift));
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
    }

    /// One column of eight rows of the view, 32 bits each.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn filter_across(tile: &[[i32; TILE]], weights: &[i32], precision: u32) -> __m256i {
        let mut sum = _mm256_set1_epi32(1 << (precision - 1));
        for (pair, &weights) in weights.iter().enumerate() {
            // SAFETY: a tile's element is 32 bytes.
            let columns = unsafe { _mm256_loadu_si256(tile[pair].as_ptr().cast()) };
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(columns, _mm256_set1_epi32(weights)));
        }
        _mm256_sra_epi32(sum, _mm_cvtsi32_si128(precision as i32))
    }

    /// 8 x 8 of 16 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose(x: [__m128i; 8]) -> [__m128i; 8] {
        let [x0, x1, x2, x3, x4, x5, x6, x7] = x;
        let step = |a, b| (_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
        let ((a0, a1), (a2, a3)) = (step(x0, x4), step(x1, x5));
        let ((a4, a5), (a6, a7)) = (step(x2, x6), step(x3, x7));
        let ((b0, b1), (b2, b3)) = (step(a0, a4), step(a1, a5));
        let ((b4, b5), (b6, b7)) = (step(a2, a6), step(a3, a7));
        let ((c0, c1), (c2, c3)) = (step(b0, b4), step(b1, b5));
        let ((c4, c5), (c6, c7)) = (step(b2, b6), step(b3, b7));
        [c0, c1, c2, c3, c4, c5, c6, c7]
    }

    /// Eight columns of eight rows in 32 bits, to eight rows of eight columns in 8 bits (the low half of each).
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose_bytes(x: [__m256i; 8]) -> [__m128i; 8] {
        // In each half: columns 0–3, then 4–7, of four rows each.
        let a = _mm256_packus_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
        let b = _mm256_packus_epi16(_mm256_packs_epi32(x[4], x[5]), _mm256_packs_epi32(x[6], x[7]));
        let order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        let (a, b) = (_mm256_shuffle_epi8(a, order), _mm256_shuffle_epi8(b, order));
        // Rows 0, 1 | 4, 5 and 2, 3 | 6, 7.
        let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (r01, r45) = (_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
        let (r23, r67) = (_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
        let second = |pair| _mm_unpackhi_epi64(pair, pair);
        [r01, second(r01), r23, second(r23), r45, second(r45), r67, second(r67)]
    }
}

#[cfg(test)]
mod tests {
    use fast_image_resize::images::{TypedImage, TypedImageRef};
    use fast_image_resize::pixels::U8x3;
    use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions};

    use super::*;

    /// Weights that are kept are those that would be worked out, whatever was asked for before.
    #[test]
    fn kept_weights_are_the_same() {
        let mut kept = Resizer::default();
        for round in 0..2 {
            for (how, size) in
                [(Interpolation::Bicubic, 32), (Interpolation::Bilinear, 32), (Interpolation::Bicubic, 300)]
            {
                for (width, height, mirror) in
                    [(32, 7, false), (32, 7, true), (256, 257, true), (1, 40, false), (7, 32, true)]
                {
                    let part = CropBox::whole(width, height);
                    let parts = [
                        Area::from(part),
                        Area { x: 0.5, width: f64::from(width) - 0.5, ..Area::from(part) },
                    ];
                    for area in parts {
                        let found = kept.weigh(part, area, how, mirror, size);
                        let mut fresh = Resizer::default();
                        assert_eq!(
                            found,
                            fresh.weigh(part, area, how, mirror, size),
                            "{round} {how:?} {size} {area:?} {mirror}"
                        );
                    }
                }
            }
        }
    }
    use crate::image::RgbImage;
    use crate::rng::Stream;

    /// By another implementation; the portable one; the one with wide registers: the same bits.
    #[test]
    fn three_implementations_agree() {
        let (width, height) = (150u32, 97u32);
        let data: Vec<u8> =
            (0..width * height * 3).map(|i| Stream::new(1, 0, 0, 0).bits(i / 2) as u8).collect();
        let image = RgbImage { width, height, data };
        let mut planes = PlanarImage::default();
        planes.take(&image, CropBox::whole(width, height));
        let mut work = Resizer::default();
        for case in 0..60 {
            let draw = Stream::new(2, 0, case, 0);
            let (w, h) = (1 + draw.below(0, 150), 1 + draw.below(1, 97));
            let (x, y) = (draw.below(2, 151 - w), draw.below(3, 98 - h));
            let crop = CropBox { x: x as u32, y: y as u32, width: w as u32, height: h as u32 };
            let size = 1 + draw.below(4, 70) as usize;
            let how = if case % 2 == 0 { Interpolation::Bicubic } else { Interpolation::Bilinear };
            let filter = if case % 2 == 0 { FilterType::CatmullRom } else { FilterType::Bilinear };
            let mirror = case % 3 == 0;

            let part: Vec<u8> = (y..y + h)
                .flat_map(|y| image.data[((y * 150 + x) * 3) as usize..][..3 * w as usize].to_vec())
                .collect();
            let mut expected = vec![0; size * size * 3];
            fast_image_resize::Resizer::new()
                .resize_typed(
                    &TypedImageRef::<U8x3>::from_buffer(w as u32, h as u32, &part).unwrap(),
                    &mut TypedImage::<U8x3>::from_buffer(size as u32, size as u32, &mut expected).unwrap(),
                    &ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)),
                )
                .unwrap();

            let mut wide = vec![0.0; 3 * size * size];
            let area = Area::from(CropBox::whole(w as u32, h as u32));
            work.begin(&planes, crop, area, how, mirror, size);
            for top in (0..size).step_by(TILE) {
                work.rows(&planes, crop, top, TILE.min(size - top), size, &mut wide);
            }
            let mut portable = vec![0.0; 3 * size * size];
            for (channel, out) in portable.chunks_exact_mut(size * size).enumerate() {
                let from = Plane { pixels: planes.from(channel, crop), stride: planes.stride, part: crop };
                tile_portable(&mut work, from, 0, out, size);
            }
            assert_eq!(wide, portable, "{case}");
            for (i, pixel) in expected.chunks_exact(3).enumerate() {
                let i = if mirror { i / size * size + size - 1 - i % size } else { i };
                for (c, &value) in pixel.iter().enumerate() {
                    let found = wide[c * size * size + i];
                    assert_eq!(found, f32::from(value) * SCALE, "{case} {crop:?} {size} {how:?} {i} {c}");
                }
            }
        }
    }
}
