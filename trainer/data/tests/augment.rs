//! Augmentations against independent f64 transcriptions of their definitions.

mod common;

use common::{noise, views};
use mentee_config::recipe::{Definition, Interpolation};
use mentee_data::RgbImage;
use mentee_data::augment::{Augmenter, ColourOp, CropBox, Scratch, ViewDraw, ViewKey};

const SIZE: u32 = 40;

fn image(width: u32, height: u32) -> RgbImage {
    let mut data = noise((width * height * 3) as usize, 77);
    // Some gray, black, white and saturated pixels: the corners of HSV.
    let corners = [
        [0, 0, 0],
        [255, 255, 255],
        [90, 90, 90],
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 0],
        [9, 9, 8],
    ];
    for (i, corner) in corners.iter().enumerate() {
        data[3 * i..3 * i + 3].copy_from_slice(corner);
    }
    RgbImage { width, height, data }
}

/// Nothing but the whole image: at the view's size the resize copies.
fn plain(width: u32, height: u32) -> ViewDraw {
    ViewDraw {
        crop: CropBox { x: 0, y: 0, width, height },
        flip: false,
        jitter: Vec::new(),
        grayscale: false,
        blur: None,
        solarize: false,
    }
}

fn apply(definition: Definition, image: &RgbImage, draw: &ViewDraw) -> Vec<f32> {
    let augmenter = Augmenter::new(&views(definition, SIZE));
    let mut out = vec![f32::NAN; augmenter.view_len()];
    augmenter.apply(&mut Scratch::default(), image, draw, &mut out);
    out
}

type Pixels = Vec<[f64; 3]>;

fn reference(image: &RgbImage) -> Pixels {
    image.data.chunks_exact(3).map(|p| [p[0], p[1], p[2]].map(|x| f64::from(x) / 255.0)).collect()
}

#[track_caller]
fn assert_close(out: &[f32], expected: &Pixels, tolerance: f64, what: &str) {
    assert_eq!(out.len(), 3 * expected.len());
    for (i, (out, expected)) in out.chunks_exact(3).zip(expected).enumerate() {
        for c in 0..3 {
            let difference = (f64::from(out[c]) - expected[c]).abs();
            assert!(difference <= tolerance, "{what}, pixel {i} channel {c}: {} for {}", out[c], expected[c]);
        }
    }
}

fn clip(x: f64) -> f64 {
    x.clamp(0.0, 1.0)
}

fn mean(pixels: &Pixels, f: impl Fn(&[f64; 3]) -> f64) -> f64 {
    pixels.iter().map(f).sum::<f64>() / pixels.len() as f64
}

/// `rgb_to_hsv` of DeepMind's `augmentations.py`.
fn hsv([r, g, b]: [f64; 3]) -> [f64; 3] {
    let v = r.max(g).max(b);
    let range = v - r.min(g).min(b);
    let s = if v > 0.0 { range / v } else { 0.0 };
    if range == 0.0 {
        return [0.0, s, v];
    }
    let norm = 1.0 / (6.0 * range);
    let h = if r == v {
        norm * (g - b)
    } else if g == v {
        norm * (b - r) + 2.0 / 6.0
    } else {
        norm * (r - g) + 4.0 / 6.0
    };
    [if h < 0.0 { h + 1.0 } else { h }, s, v]
}

/// `hsv_to_rgb` of the same.
fn rgb([h, s, v]: [f64; 3]) -> [f64; 3] {
    let c = s * v;
    let m = v - c;
    let dh = h.rem_euclid(1.0) * 6.0;
    let x = c * (1.0 - (dh % 2.0 - 1.0).abs());
    let [r, g, b] = match dh as i32 {
        0 => [c, x, 0.0],
        1 => [x, c, 0.0],
        2 => [0.0, c, x],
        3 => [0.0, x, c],
        4 => [x, 0.0, c],
        _ => [c, 0.0, x],
    };
    [r + m, g + m, b + m]
}

fn gray(weights: [f64; 3], p: &[f64; 3]) -> f64 {
    weights[0] * p[0] + weights[1] * p[1] + weights[2] * p[2]
}

const TENSOR: [f64; 3] = [0.2989, 0.5870, 0.1140];
const PIL: [f64; 3] = [0.299, 0.587, 0.114];

fn reference_op(definition: Definition, op: ColourOp, pixels: &Pixels) -> Pixels {
    let each = |f: &dyn Fn([f64; 3]) -> [f64; 3]| pixels.iter().map(|p| f(*p).map(clip)).collect();
    match (definition, op) {
        (Definition::Byol, ColourOp::Brightness(delta)) => each(&|p| p.map(|x| x + f64::from(delta))),
        (Definition::Byol, ColourOp::Contrast(factor)) => {
            let means: [f64; 3] = std::array::from_fn(|c| mean(pixels, |p| p[c]));
            each(&|p| std::array::from_fn(|c| f64::from(factor) * (p[c] - means[c]) + means[c]))
        }
        (Definition::Byol, ColourOp::Saturation(factor)) => each(&|p| {
            let [h, s, v] = hsv(p);
            rgb([h, clip(s * f64::from(factor)), v])
        }),
        (Definition::Torchvision, ColourOp::Brightness(factor)) => {
            each(&|p| p.map(|x| x * f64::from(factor)))
        }
        (Definition::Torchvision, ColourOp::Contrast(factor)) => {
            let f = f64::from(factor);
            let middle = mean(pixels, |p| gray(PIL, p));
            each(&|p| p.map(|x| f * x + (1.0 - f) * middle))
        }
        (Definition::Torchvision, ColourOp::Saturation(factor)) => {
            let f = f64::from(factor);
            each(&|p| p.map(|x| f * x + (1.0 - f) * gray(PIL, &p)))
        }
        (_, ColourOp::Hue(turns)) => each(&|p| {
            let [h, s, v] = hsv(p);
            rgb([h + f64::from(turns), s, v])
        }),
    }
}

const BOTH: [Definition; 2] = [Definition::Byol, Definition::Torchvision];

#[test]
fn colour_operations() {
    let image = image(SIZE, SIZE);
    let start = reference(&image);
    for definition in BOTH {
        for strength in [-0.4f32, -0.13, 0.0, 0.07, 0.4] {
            let ops = [
                ColourOp::Brightness(if definition == Definition::Byol { strength } else { 1.0 + strength }),
                ColourOp::Contrast(1.0 + strength),
                ColourOp::Saturation(1.0 + strength),
                ColourOp::Hue(strength),
                ColourOp::Hue(strength / 0.8),
            ];
            for op in ops {
                let draw = ViewDraw { jitter: vec![op], ..plain(SIZE, SIZE) };
                let out = apply(definition, &image, &draw);
                assert_close(
                    &out,
                    &reference_op(definition, op, &start),
                    2e-6,
                    &format!("{definition:?} {op:?}"),
                );
            }
        }
    }
}

#[test]
fn a_whole_jitter_in_its_drawn_order() {
    let image = image(SIZE, SIZE);
    for definition in BOTH {
        let first = if definition == Definition::Byol { 0.3 } else { 1.3 };
        let ops = [
            ColourOp::Hue(-0.08),
            ColourOp::Contrast(0.7),
            ColourOp::Brightness(first),
            ColourOp::Saturation(1.19),
        ];
        let mut expected = reference(&image);
        for op in ops {
            expected = reference_op(definition, op, &expected);
        }
        let draw = ViewDraw { jitter: ops.to_vec(), ..plain(SIZE, SIZE) };
        // A hue near a tie of channels turns rounding of 1e-7 into 1e-6 of colour.
        assert_close(&apply(definition, &image, &draw), &expected, 2e-5, "jitter");
        let mut reversed = ops.to_vec();
        reversed.reverse();
        let other = apply(definition, &image, &ViewDraw { jitter: reversed, ..plain(SIZE, SIZE) });
        assert_ne!(apply(definition, &image, &draw), other, "the order matters");
    }
}

#[test]
fn grayscale_flip_and_solarize() {
    let image = image(SIZE, SIZE);
    let start = reference(&image);
    for (definition, weights) in [(Definition::Byol, TENSOR), (Definition::Torchvision, PIL)] {
        let expected = start.iter().map(|p| [gray(weights, p); 3]).collect();
        let out = apply(definition, &image, &ViewDraw { grayscale: true, ..plain(SIZE, SIZE) });
        assert_close(&out, &expected, 1e-6, "grayscale");
        let expected = start.iter().map(|p| p.map(|x| if x < 0.5 { x } else { 1.0 - x })).collect();
        let out = apply(definition, &image, &ViewDraw { solarize: true, ..plain(SIZE, SIZE) });
        assert_close(&out, &expected, 1e-6, "solarize");
        let mirrored =
            start.chunks_exact(SIZE as usize).flat_map(|row| row.iter().rev().copied()).collect::<Pixels>();
        let out = apply(definition, &image, &ViewDraw { flip: true, ..plain(SIZE, SIZE) });
        assert_close(&out, &mirrored, 1e-6, "flip");
    }
}

/// The definition itself: every output is the weighted sum over a square, outside per the border rule.
fn blurred(pixels: &Pixels, size: i64, sigma: f64, radius: i64, repeat: bool) -> Pixels {
    let weight = |k: i64| (-((k * k) as f64) / (2.0 * sigma * sigma)).exp();
    let sum: f64 = (-radius..=radius).map(weight).sum();
    let mut out = Vec::new();
    for y in 0..size {
        for x in 0..size {
            let mut total = [0.0; 3];
            for dy in -radius..=radius {
                for dx in -radius..=radius {
                    let (sy, sx) = (y + dy, x + dx);
                    let inside = (0..size).contains(&sy) && (0..size).contains(&sx);
                    if !inside && !repeat {
                        continue;
                    }
                    let p = pixels[(sy.clamp(0, size - 1) * size + sx.clamp(0, size - 1)) as usize];
                    for c in 0..3 {
                        total[c] += p[c] * weight(dy) * weight(dx) / (sum * sum);
                    }
                }
            }
            out.push(total);
        }
    }
    out
}

#[test]
fn blur() {
    let image = image(SIZE, SIZE);
    let start = reference(&image);
    for sigma in [0.1, 0.31, 0.9, 2.0] {
        let draw = ViewDraw { blur: Some(sigma), ..plain(SIZE, SIZE) };
        // At 40 pixels DeepMind's kernel has radius int(40 / 10 / 2) = 2 and sees zeros beyond the border.
        let expected = blurred(&start, i64::from(SIZE), sigma, 2, false);
        assert_close(&apply(Definition::Byol, &image, &draw), &expected, 1e-6, "byol");
        let expected = blurred(&start, i64::from(SIZE), sigma, (4.0 * sigma).ceil() as i64, true);
        assert_close(&apply(Definition::Torchvision, &image, &draw), &expected, 1e-6, "torchvision");
    }
}

#[test]
fn the_blur_of_a_224_pixel_view_has_23_taps() {
    let size = 224usize;
    let mut data = vec![0u8; size * size * 3];
    data[(112 * size + 112) * 3..][..3].fill(255);
    let image = RgbImage { width: 224, height: 224, data };
    let augmenter = Augmenter::new(&views(Definition::Byol, 224));
    let mut out = vec![0.0; augmenter.view_len()];
    let draw = ViewDraw { blur: Some(2.0), ..plain(224, 224) };
    augmenter.apply(&mut Scratch::default(), &image, &draw, &mut out);
    let column: Vec<f32> = (0..size).map(|y| out[(y * size + 112) * 3]).collect();
    let lit: Vec<usize> = (0..size).filter(|&y| column[y] > 0.0).collect();
    assert_eq!((lit[0], lit[lit.len() - 1]), (112 - 11, 112 + 11));
    let total: f32 = out.iter().step_by(3).sum();
    assert!((total - 1.0).abs() < 1e-5, "{total}");
}

/// Pillow's `ImagingResample` in f64, without its 8-bit steps: the filter widens when shrinking.
fn resampled(image: &RgbImage, crop: CropBox, size: usize, how: Interpolation) -> Pixels {
    let filter = |x: f64| {
        let x = x.abs();
        match how {
            Interpolation::Bilinear => (1.0 - x).max(0.0),
            Interpolation::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Interpolation::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Interpolation::Bicubic => 0.0,
        }
    };
    let support = if how == Interpolation::Bicubic { 2.0 } else { 1.0 };
    let weights = |length: u32| -> Vec<Vec<(usize, f64)>> {
        let scale = f64::from(length) / size as f64;
        let stretch = scale.max(1.0);
        (0..size)
            .map(|i| {
                let centre = (i as f64 + 0.5) * scale;
                let from = ((centre - support * stretch + 0.5) as i64).max(0);
                let to = ((centre + support * stretch + 0.5) as i64).min(i64::from(length));
                let raw: Vec<(usize, f64)> =
                    (from..to).map(|j| (j as usize, filter((j as f64 - centre + 0.5) / stretch))).collect();
                let sum: f64 = raw.iter().map(|w| w.1).sum();
                raw.into_iter().map(|(j, w)| (j, w / sum)).collect()
            })
            .collect()
    };
    let (columns, rows) = (weights(crop.width), weights(crop.height));
    let mut out = Vec::new();
    for row in &rows {
        for column in &columns {
            out.push(std::array::from_fn(|c| {
                let mut total = 0.0;
                for &(x, wx) in column {
                    // Clipped between the passes, of which the vertical is first (Pillow does the horizontal first:
                    // that matters only where a pass overshoots).
                    let line: f64 = row
                        .iter()
                        .map(|&(y, wy)| {
                            let at = (crop.y as usize + y) * image.width as usize + crop.x as usize + x;
                            wy * f64::from(image.data[3 * at + c])
                        })
                        .sum();
                    total += wx * line.clamp(0.0, 255.0);
                }
                total.clamp(0.0, 255.0) / 255.0
            }));
        }
    }
    out
}

#[test]
fn resize_is_pillows() {
    let image = image(90, 61);
    let crops = [
        CropBox { x: 0, y: 0, width: 90, height: 61 },
        CropBox { x: 13, y: 7, width: 20, height: 33 },
        CropBox { x: 50, y: 1, width: 40, height: 59 },
        CropBox { x: 89, y: 60, width: 1, height: 1 },
    ];
    for how in [Interpolation::Bicubic, Interpolation::Bilinear] {
        let mut settings = views(Definition::Byol, SIZE);
        settings.resize = how;
        let augmenter = Augmenter::new(&settings);
        for crop in crops {
            let mut out = vec![0.0; augmenter.view_len()];
            augmenter.apply(&mut Scratch::default(), &image, &ViewDraw { crop, ..plain(90, 61) }, &mut out);
            // Two roundings to 8 bits, the first of them weighed with up to 1.3 in total.
            assert_close(
                &out,
                &resampled(&image, crop, SIZE as usize, how),
                1.3 / 255.0,
                &format!("{how:?} {crop:?}"),
            );
        }
    }
}

#[test]
fn what_is_outside_a_crop_plays_no_part() {
    let mut image = image(60, 50);
    let crop = CropBox { x: 11, y: 9, width: 17, height: 31 };
    let draw = ViewDraw { crop, ..plain(60, 50) };
    let before = apply(Definition::Byol, &image, &draw);
    for y in 0..50 {
        for x in 0..60 {
            if !((11..28).contains(&x) && (9..40).contains(&y)) {
                image.data[(y * 60 + x) * 3..][..3].fill(255);
            }
        }
    }
    assert_eq!(before, apply(Definition::Byol, &image, &draw));
}

fn key(sample: u64, view: u8) -> ViewKey {
    ViewKey { seed: 4, epoch: 2, sample, view }
}

#[test]
fn crops_follow_their_distributions() {
    let n = 4000u64;
    for definition in BOTH {
        let augmenter = Augmenter::new(&views(definition, SIZE));
        let (width, height) = (500u32, 375u32);
        let mut areas = Vec::new();
        let (mut clipped, mut flips, mut jittered, mut grays, mut blurred, mut solarized) =
            (0, 0, 0, 0, [0; 2], [0; 2]);
        for sample in 0..n {
            for view in 0..2u8 {
                let draw = augmenter.draw(width, height, key(sample, view));
                let c = draw.crop;
                assert!(c.width >= 1 && c.height >= 1 && c.x + c.width <= width && c.y + c.height <= height);
                let ratio = f64::from(c.width) / f64::from(c.height);
                if definition == Definition::Torchvision {
                    assert!((0.74..1.345).contains(&ratio), "{c:?}");
                }
                clipped += u64::from(c.width == width || c.height == height);
                areas.push(f64::from(c.width) * f64::from(c.height) / f64::from(width * height));
                flips += u64::from(draw.flip);
                jittered += u64::from(!draw.jitter.is_empty());
                assert!(draw.jitter.is_empty() || draw.jitter.len() == 4);
                grays += u64::from(draw.grayscale);
                blurred[usize::from(view)] += u64::from(draw.blur.is_some());
                solarized[usize::from(view)] += u64::from(draw.solarize);
            }
        }
        let near = |count: u64, of: u64, p: f64| {
            let sigma = (p * (1.0 - p) / of as f64).sqrt();
            assert!((count as f64 / of as f64 - p).abs() <= 4.0 * sigma, "{count} of {of} for {p}");
        };
        near(flips, 2 * n, 0.5);
        near(jittered, 2 * n, 0.8);
        near(grays, 2 * n, 0.2);
        near(blurred[0], n, 1.0);
        near(blurred[1], n, 0.1);
        near(solarized[0], n, 0.0);
        near(solarized[1], n, 0.2);
        let mean = areas.iter().sum::<f64>() / areas.len() as f64;
        // Both by simulation of the definitions (400,000 draws in Python): mean area, share that touches two sides.
        let (expected, touching) = match definition {
            Definition::Byol => (0.518, 0.262),
            Definition::Torchvision => (0.433, 0.006),
        };
        assert!((mean - expected).abs() < 0.01, "{mean} for {expected}");
        let share = clipped as f64 / (2 * n) as f64;
        assert!((share - touching).abs() < 0.02, "{share} for {touching}");
        assert!(areas.iter().all(|a| (0.07..=1.0).contains(a)));
    }
}

#[test]
fn jitter_is_drawn_as_defined() {
    for definition in BOTH {
        let augmenter = Augmenter::new(&views(definition, SIZE));
        let mut orders = std::collections::BTreeMap::new();
        for sample in 0..5000 {
            let draw = augmenter.draw(32, 32, key(sample, 0));
            let order: String = draw
                .jitter
                .iter()
                .map(|op| match *op {
                    ColourOp::Brightness(x) => {
                        let centre = if definition == Definition::Byol { 0.0 } else { 1.0 };
                        assert!((x - centre).abs() <= 0.4);
                        'b'
                    }
                    ColourOp::Contrast(x) => {
                        assert!((x - 1.0).abs() <= 0.4);
                        'c'
                    }
                    ColourOp::Saturation(x) => {
                        assert!((x - 1.0).abs() <= 0.2001);
                        's'
                    }
                    ColourOp::Hue(x) => {
                        assert!(x.abs() <= 0.1);
                        'h'
                    }
                })
                .collect();
            *orders.entry(order).or_insert(0u32) += 1;
        }
        orders.remove("");
        assert_eq!(orders.len(), 24, "every order occurs");
        assert!(orders.values().all(|&count| (110..230).contains(&count)), "{orders:?}");
    }
}

#[test]
fn torchvision_falls_back_to_a_centre_crop() {
    let augmenter = Augmenter::new(&views(Definition::Torchvision, SIZE));
    // 400 x 10: the widest crop allowed is 13 x 10; all tries of a large area fail in nearly every draw.
    let fallback = CropBox { x: (400 - 13) / 2, y: 0, width: 13, height: 10 };
    let count = (0..200).filter(|&sample| augmenter.draw(400, 10, key(sample, 0)).crop == fallback).count();
    assert!(count > 150, "{count}");
    let tall = CropBox { x: 0, y: (400 - 13) / 2, width: 10, height: 13 };
    assert!((0..200).any(|sample| augmenter.draw(10, 400, key(sample, 0)).crop == tall));
    // DeepMind's is cut instead.
    let byol = Augmenter::new(&views(Definition::Byol, SIZE));
    let heights: Vec<u32> = (0..200).map(|sample| byol.draw(400, 10, key(sample, 0)).crop.height).collect();
    assert!(heights.iter().all(|&h| h == 10));
    for sample in 0..100 {
        let crop = byol.draw(1, 1, key(sample, 0)).crop;
        assert_eq!(crop, CropBox { x: 0, y: 0, width: 1, height: 1 });
    }
}

#[test]
fn switched_off_steps_draw_nothing_and_leave_the_rest_alone() {
    let full = views(Definition::Byol, SIZE);
    let mut less = full.clone();
    (less.jitter, less.hue, less.grayscale, less.blur, less.solarize) = (1.0, 0.0, 0.0, [0.0; 2], [0.0; 2]);
    let (full, less) = (Augmenter::new(&full), Augmenter::new(&less));
    for sample in 0..300 {
        let (a, b) = (full.draw(32, 32, key(sample, 1)), less.draw(32, 32, key(sample, 1)));
        assert_eq!((a.crop, a.flip), (b.crop, b.flip));
        assert!(!b.grayscale && b.blur.is_none() && !b.solarize && b.jitter.len() == 3);
        if !a.jitter.is_empty() {
            let kept: Vec<ColourOp> =
                a.jitter.iter().copied().filter(|op| !matches!(op, ColourOp::Hue(_))).collect();
            assert_eq!(kept, b.jitter);
        }
    }
}

#[test]
fn views_are_normalised_last() {
    let image = image(SIZE, SIZE);
    let mut settings = views(Definition::Byol, SIZE);
    let plain_view = apply(Definition::Byol, &image, &plain(SIZE, SIZE));
    (settings.mean, settings.std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let augmenter = Augmenter::new(&settings);
    let mut out = vec![0.0; augmenter.view_len()];
    augmenter.apply(&mut Scratch::default(), &image, &plain(SIZE, SIZE), &mut out);
    for (i, (x, y)) in plain_view.iter().zip(&out).enumerate() {
        let expected = (f64::from(*x) - settings.mean[i % 3]) / settings.std[i % 3];
        assert!((f64::from(*y) - expected).abs() < 1e-6);
    }
}

#[test]
fn both_definitions_differ_only_where_they_should() {
    let image = image(64, 48);
    let (mut scratch, mut a, mut b) = (Scratch::default(), vec![0.0; 4800], vec![0.0; 4800]);
    for definition in BOTH {
        let augmenter = Augmenter::new(&views(definition, SIZE));
        augmenter.view(&mut scratch, &image, key(5, 0), &mut a);
        augmenter.view(&mut scratch, &image, key(5, 1), &mut b);
        assert_ne!(a, b, "two views of one image differ");
        assert!(a.iter().chain(&b).all(|x| (0.0..=1.0).contains(x)));
        // Used scratch leaves no trace.
        augmenter.view(&mut Scratch::default(), &image, key(5, 1), &mut a);
        assert_eq!(a, b);
    }
}
