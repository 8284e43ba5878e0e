//! A procedural image set for demonstrations: small pictures of one pattern each.
//!
//! The class is the pattern that fills a large patch (stripes, checker, rings, …). Everything that raw pixels show
//! first varies freely within a class: the colours of pattern and ground, where the patch lies and how large it is,
//! the pattern's period, turn and phase, the gradient and the noise behind it. So neighbours in pixel space share
//! their colours rather than their pattern, and a method has to learn what a pattern is.
//!
//! A picture is a pure function of (seed, split, index), computed with +, −, ×, ÷ and square roots only: the same
//! bytes on every machine.

use std::path::Path;

use crate::decode::{RgbImage, encode_png};
use crate::error::DataError;
use crate::rng::{Sequence, Stream, purpose};
use crate::shard::{ShardWriter, Written};
use crate::source::Split;

/// The patterns, in the order of their labels.
pub const CLASSES: [&str; 8] = ["checker", "crosses", "dots", "grid", "rings", "spokes", "stripes", "zigzag"];

/// How much of the plane each pattern covers with its second colour.
const COVER: [f64; 8] = [0.5, 0.37, 0.31, 0.48, 0.5, 0.5, 0.5, 0.5];

/// What the set looks like. The default is the demo's.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticConfig {
    /// Keys every picture.
    pub seed: u64,
    /// Pictures to train on.
    pub train: u64,
    /// Pictures to test on.
    pub test: u64,
    /// Side, pixels.
    pub size: u32,
    /// Smallest and largest radius of the patch, as a fraction of the side.
    pub radius: [f64; 2],
    /// Smallest and largest period of the pattern, as a fraction of the side.
    pub period: [f64; 2],
    /// Range of a picture's brightness, which the ground has and the pattern's two colours lie around.
    pub brightness: [f64; 2],
    /// Range of the difference in brightness between the pattern's two colours.
    pub contrast: [f64; 2],
    /// How far each channel of the pattern's colours strays from their brightness, in [0, 1].
    pub tint: f64,
    /// The same of the ground's colour.
    pub ground_tint: f64,
    /// How far the ground's corners stray from its colour, in [0, 1].
    pub gradient: f64,
    /// Amplitude of the smooth noise in the ground, in [0, 1].
    pub blotches: f64,
    /// Amplitude of the noise of single pixels, in [0, 1].
    pub grain: f64,
    /// Thin strokes of random colour that belong to no class: at most so many.
    pub strokes: u64,
    /// Bytes of a shard.
    pub shard_bytes: u64,
}

impl Default for SyntheticConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            train: 4000,
            test: 1000,
            size: 32,
            radius: [0.45, 0.75],
            period: [0.18, 0.32],
            brightness: [0.47, 0.53],
            contrast: [0.45, 0.55],
            tint: 0.25,
            ground_tint: 0.25,
            gradient: 0.1,
            blotches: 0.05,
            grain: 0.03,
            strokes: 1,
            shard_bytes: 4 << 20,
        }
    }
}

/// Samples along each side of a pixel.
const OVERSAMPLING: usize = 3;

/// Cells along each side of the smooth noise.
const BLOTCHES: usize = 5;

type Colour = [f64; 3];

/// A disc filled with a pattern in two colours.
struct Patch {
    centre: [f64; 2],
    radius: f64,
    /// Where the pattern's own coordinates start.
    origin: [f64; 2],
    period: f64,
    /// Cosine and sine of the pattern's turn.
    turn: [f64; 2],
    colours: [Colour; 2],
}

struct Stroke {
    from: [f64; 2],
    to: [f64; 2],
    half_width: f64,
    colour: Colour,
}

/// Draws picture `index` of a split: its pixels and its label.
#[must_use]
pub fn draw(config: &SyntheticConfig, split: Split, index: u64) -> (RgbImage, u32) {
    let epoch = match split {
        Split::Train => 0,
        Split::Eval => 1,
    };
    let mut random = Sequence::new(Stream::new(config.seed, epoch, index, purpose::SYNTHETIC));
    // Classes take turns, so that they are equally frequent; the order of samples is shuffled by whoever reads.
    let class = (index % CLASSES.len() as u64) as usize;
    let brightness = random.between(config.brightness[0], config.brightness[1]);
    let ground = tint(&mut random, brightness, config.ground_tint);
    let corners: [Colour; 4] = std::array::from_fn(|_| {
        std::array::from_fn(|c| ground[c] + random.between(-config.gradient, config.gradient))
    });
    let blotches: [[Colour; BLOTCHES + 1]; BLOTCHES + 1] = std::array::from_fn(|_| {
        std::array::from_fn(|_| std::array::from_fn(|_| random.between(-config.blotches, config.blotches)))
    });
    let strokes: Vec<Stroke> = (0..random.below(config.strokes + 1))
        .map(|_| Stroke {
            from: [random.between(-0.2, 1.2), random.between(-0.2, 1.2)],
            to: [random.between(-0.2, 1.2), random.between(-0.2, 1.2)],
            half_width: random.between(0.008, 0.02),
            colour: std::array::from_fn(|_| random.between(0.0, 1.0)),
        })
        .collect();
    let patch = random_patch(config, &mut random, class, brightness);

    let size = config.size as usize;
    let mut data = Vec::with_capacity(size * size * 3);
    let step = 1.0 / (size * OVERSAMPLING) as f64;
    for row in 0..size {
        for column in 0..size {
            let mut sum = [0.0; 3];
            for sub in 0..OVERSAMPLING * OVERSAMPLING {
                let x = ((column * OVERSAMPLING + sub % OVERSAMPLING) as f64 + 0.5) * step;
                let y = ((row * OVERSAMPLING + sub / OVERSAMPLING) as f64 + 0.5) * step;
                let colour = patch_at(class, &patch, x, y)
                    .or_else(|| strokes.iter().find(|s| on_stroke(s, x, y)).map(|s| s.colour))
                    .unwrap_or_else(|| ground_at(&corners, &blotches, x, y));
                for c in 0..3 {
                    sum[c] += colour[c];
                }
            }
            for channel in sum {
                let grain = random.between(-config.grain, config.grain);
                let value = channel / (OVERSAMPLING * OVERSAMPLING) as f64 + grain;
                data.push((value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
            }
        }
    }
    (RgbImage { width: config.size, height: config.size, data }, class as u32)
}

/// A random colour of a given brightness.
fn tint(random: &mut Sequence, brightness: f64, reach: f64) -> Colour {
    let offset: Colour = std::array::from_fn(|_| random.between(-reach, reach));
    std::array::from_fn(|c| brightness + offset[c] - luma(offset))
}

fn luma(colour: Colour) -> f64 {
    0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
}

fn random_patch(config: &SyntheticConfig, random: &mut Sequence, class: usize, brightness: f64) -> Patch {
    let turn = loop {
        let (x, y) = (random.between(-1.0, 1.0), random.between(-1.0, 1.0));
        let length = (x * x + y * y).sqrt();
        if length > 0.1 && length <= 1.0 {
            break [x / length, y / length];
        }
    };
    // Light on dark or dark on light; a patch is as bright as its ground, however much the pattern covers.
    let contrast = random.between(config.contrast[0], config.contrast[1]);
    let contrast = if random.chance(0.5) { contrast } else { -contrast };
    let colours = [-COVER[class], 1.0 - COVER[class]]
        .map(|side| tint(random, brightness + side * contrast, config.tint));
    let centre = std::array::from_fn(|_| random.between(0.35, 0.65));
    let radius = random.between(config.radius[0], config.radius[1]);
    // Rings and spokes have a middle, which lies in the picture; the others have only a phase.
    let origin = std::array::from_fn(|_| random.between(0.25, 0.75));
    Patch {
        centre,
        radius,
        origin,
        period: random.between(config.period[0], config.period[1]),
        turn,
        colours,
    }
}

/// The patch's colour at a point, if the patch is there; coordinates are fractions of the side.
fn patch_at(class: usize, patch: &Patch, x: f64, y: f64) -> Option<Colour> {
    let (dx, dy) = (x - patch.centre[0], y - patch.centre[1]);
    if dx * dx + dy * dy >= patch.radius * patch.radius {
        return None;
    }
    let (dx, dy) = ((x - patch.origin[0]) / patch.period, (y - patch.origin[1]) / patch.period);
    let [cos, sin] = patch.turn;
    Some(patch.colours[usize::from(pattern(class, cos * dx + sin * dy, cos * dy - sin * dx))])
}

/// Whether the pattern is in its second colour at (u, v), in periods.
fn pattern(class: usize, u: f64, v: f64) -> bool {
    let fraction = |t: f64| t - t.floor();
    let (a, b) = (fraction(u) - 0.5, fraction(v) - 0.5);
    match CLASSES[class] {
        "checker" => (a < 0.0) == (b < 0.0),
        "crosses" => (a.abs() < 0.14 && b.abs() < 0.4) || (b.abs() < 0.14 && a.abs() < 0.4),
        "dots" => a * a + b * b < 0.1,
        "grid" => a.abs() > 0.36 || b.abs() > 0.36,
        "rings" => fraction((u * u + v * v).sqrt()) < 0.5,
        "spokes" => {
            // Twelve sectors, without an arc tangent: the signs of four lines through the middle and two axes.
            let lines = [u, v, u - 0.577 * v, u + 0.577 * v, v - 0.577 * u, v + 0.577 * u];
            lines.iter().filter(|&&side| side < 0.0).count() % 2 == 0
        }
        "stripes" => a < 0.0,
        _ => fraction(u + 0.9 * b.abs()) < 0.5,
    }
}

fn on_stroke(stroke: &Stroke, x: f64, y: f64) -> bool {
    let (ax, ay) = (x - stroke.from[0], y - stroke.from[1]);
    let (bx, by) = (stroke.to[0] - stroke.from[0], stroke.to[1] - stroke.from[1]);
    let length2 = bx * bx + by * by;
    let along = if length2 > 0.0 { ((ax * bx + ay * by) / length2).clamp(0.0, 1.0) } else { 0.0 };
    let (dx, dy) = (ax - along * bx, ay - along * by);
    dx * dx + dy * dy < stroke.half_width * stroke.half_width
}

/// The gradient between the corners, plus smooth noise.
fn ground_at(
    corners: &[Colour; 4],
    blotches: &[[Colour; BLOTCHES + 1]; BLOTCHES + 1],
    x: f64,
    y: f64,
) -> Colour {
    let (cell_x, cell_y) = (x * BLOTCHES as f64, y * BLOTCHES as f64);
    let (i, j) = ((cell_x as usize).min(BLOTCHES - 1), (cell_y as usize).min(BLOTCHES - 1));
    let (fx, fy) = (smooth(cell_x - i as f64), smooth(cell_y - j as f64));
    std::array::from_fn(|c| {
        let mix = |a: f64, b: f64, t: f64| a + (b - a) * t;
        let gradient = mix(mix(corners[0][c], corners[1][c], x), mix(corners[2][c], corners[3][c], x), y);
        let above = mix(blotches[j][i][c], blotches[j][i + 1][c], fx);
        let below = mix(blotches[j + 1][i][c], blotches[j + 1][i + 1][c], fx);
        gradient + mix(above, below, fy)
    })
}

fn smooth(t: f64) -> f64 {
    t * t * (3.0 - 2.0 * t)
}

/// Writes the set as tar shards of PNG files into `out/train` and `out/test`, both of which must be new or empty.
/// `progress` hears (done, total) pictures. Returns what was written of each.
///
/// # Errors
/// [`DataError`] when the folders hold something or the disk refuses.
pub fn write_synthetic(
    out: &Path,
    config: &SyntheticConfig,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<[Written; 2], DataError> {
    let classes = CLASSES.map(str::to_owned);
    let total = config.train + config.test;
    let mut part = |name: &str, split: Split, count: u64, before: u64| {
        let mut writer = ShardWriter::create(&out.join(name), config.shard_bytes, &classes)?;
        for index in 0..count {
            let (image, label) = draw(config, split, index);
            let png = encode_png(image.width, image.height, &image.data)
                .map_err(|reason| DataError::BadSample { sample: format!("{name} {index}"), reason })?;
            writer.add(&png, Some(label))?;
            if (index + 1) % 100 == 0 || index + 1 == count {
                progress(before + index + 1, total);
            }
        }
        writer.finish()
    };
    Ok([part("train", Split::Train, config.train, 0)?, part("test", Split::Eval, config.test, config.train)?])
}
