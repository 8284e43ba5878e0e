//! A procedural image set for demonstrations: small pictures of one shape each, many times over.
//!
//! The class is the shape (bar, cross, ring, …), and nothing else of a picture tells it: shapes lie on a lattice of
//! random size, turn and phase, each shape turned, scaled and moved by itself, lighter or darker than the ground, in random
//! colours on a ground of random colour, gradient and noise, and every picture is equally bright. So neighbours in
//! pixel space are no more of one class than strangers, and a method has to learn what a shape is.
//!
//! A picture is a pure function of (seed, split, index), computed with +, −, ×, ÷ and square roots only: the same
//! bytes on every machine.

use std::path::Path;

use crate::decode::{RgbImage, encode_png};
use crate::error::DataError;
use crate::rng::{Sequence, Stream, purpose};
use crate::shard::{ShardWriter, Written};
use crate::source::Split;

/// The shapes, in the order of their labels.
pub const CLASSES: [&str; 8] = ["bar", "bars", "chevron", "cross", "disc", "dots", "ring", "triangle"];

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
    /// Smallest and largest cell of the lattice, as a fraction of the side; at least 0.25.
    pub cell: [f64; 2],
    /// How far a shape strays from the middle of its cell, as a fraction of the cell.
    pub jitter: f64,
    /// Smallest and largest size of a shape relative to its cell.
    pub scale: [f64; 2],
    /// Range of the difference in brightness between shapes and ground.
    pub contrast: [f64; 2],
    /// How far each channel of the shapes' colour strays from their brightness, in [0, 1].
    pub tint: f64,
    /// The same of the ground's colour.
    pub ground_tint: f64,
    /// How far the ground's corners stray from its colour, in [0, 1].
    pub gradient: f64,
    /// Amplitude of the smooth noise in the ground, in [0, 1].
    pub blotches: f64,
    /// Amplitude of the noise of single pixels, in [0, 1].
    pub grain: f64,
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
            cell: [0.25, 0.35],
            jitter: 0.05,
            scale: [0.9, 1.05],
            contrast: [0.3, 0.4],
            tint: 0.1,
            ground_tint: 0.05,
            gradient: 0.1,
            blotches: 0.05,
            grain: 0.03,
            shard_bytes: 4 << 20,
        }
    }
}

/// Samples along each side of a pixel.
const OVERSAMPLING: usize = 3;

/// Cells along each side of the smooth noise.
const BLOTCHES: usize = 5;

/// A picture shows fewer cells than this along any direction: its diagonal is 1.42 sides, a cell a quarter at least.
const CELLS: usize = 8;

/// Brightness of the ground before the picture's is set to it.
const MIDDLE: f64 = 0.5;

type Colour = [f64; 3];

/// A shape in its cell.
#[derive(Clone, Copy)]
struct Motif {
    offset: [f64; 2],
    scale: f64,
    /// Cosine and sine of its turn.
    turn: [f64; 2],
    light: bool,
}

/// Shapes on a turned and shifted lattice.
struct Lattice {
    cell: f64,
    turn: [f64; 2],
    phase: [f64; 2],
    motifs: [[Motif; CELLS]; CELLS],
    /// Of dark shapes and of light ones.
    colours: [Colour; 2],
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
    let ground = tint(&mut random, MIDDLE, config.ground_tint);
    let corners: [Colour; 4] = std::array::from_fn(|_| {
        std::array::from_fn(|c| ground[c] + random.between(-config.gradient, config.gradient))
    });
    let blotches: [[Colour; BLOTCHES + 1]; BLOTCHES + 1] = std::array::from_fn(|_| {
        std::array::from_fn(|_| std::array::from_fn(|_| random.between(-config.blotches, config.blotches)))
    });
    let lattice = random_lattice(config, &mut random);

    let size = config.size as usize;
    let step = 1.0 / (size * OVERSAMPLING) as f64;
    let samples = (OVERSAMPLING * OVERSAMPLING) as f64;
    let mut pixels: Vec<Colour> = Vec::with_capacity(size * size);
    for row in 0..size {
        for column in 0..size {
            let mut sum = [0.0; 3];
            for sub in 0..OVERSAMPLING * OVERSAMPLING {
                let x = ((column * OVERSAMPLING + sub % OVERSAMPLING) as f64 + 0.5) * step;
                let y = ((row * OVERSAMPLING + sub / OVERSAMPLING) as f64 + 0.5) * step;
                let colour =
                    shape_at(class, &lattice, x, y).unwrap_or_else(|| ground_at(&corners, &blotches, x, y));
                for c in 0..3 {
                    sum[c] += colour[c];
                }
            }
            pixels.push(sum.map(|channel| channel / samples));
        }
    }
    // However much of the picture its shapes cover, it is as bright as any other.
    let excess = pixels.iter().map(|pixel| luma(*pixel)).sum::<f64>() / pixels.len() as f64 - MIDDLE;
    let data = pixels
        .into_iter()
        .flatten()
        .map(|channel| {
            let value = channel - excess + random.between(-config.grain, config.grain);
            (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8
        })
        .collect();
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

/// Cosine and sine of a random angle.
fn random_turn(random: &mut Sequence) -> [f64; 2] {
    loop {
        let (x, y) = (random.between(-1.0, 1.0), random.between(-1.0, 1.0));
        let length = (x * x + y * y).sqrt();
        if length > 0.1 && length <= 1.0 {
            return [x / length, y / length];
        }
    }
}

fn random_lattice(config: &SyntheticConfig, random: &mut Sequence) -> Lattice {
    let contrast = random.between(config.contrast[0], config.contrast[1]);
    Lattice {
        cell: random.between(config.cell[0], config.cell[1]),
        turn: random_turn(random),
        phase: std::array::from_fn(|_| random.between(0.0, 1.0)),
        motifs: std::array::from_fn(|_| {
            std::array::from_fn(|_| Motif {
                offset: std::array::from_fn(|_| random.between(-config.jitter, config.jitter)),
                scale: random.between(config.scale[0], config.scale[1]),
                turn: random_turn(random),
                light: random.chance(0.5),
            })
        }),
        colours: [-contrast, contrast].map(|contrast| tint(random, MIDDLE + contrast, config.tint)),
    }
}

fn rotate([cos, sin]: [f64; 2], x: f64, y: f64) -> (f64, f64) {
    (cos * x + sin * y, cos * y - sin * x)
}

/// The colour of the shape at (x, y), fractions of the side, if there is one.
fn shape_at(class: usize, lattice: &Lattice, x: f64, y: f64) -> Option<Colour> {
    let (u, v) = rotate(lattice.turn, (x - 0.5) / lattice.cell, (y - 0.5) / lattice.cell);
    let (u, v) = (u + lattice.phase[0], v + lattice.phase[1]);
    let index = |t: f64| (t.floor() as i64).rem_euclid(CELLS as i64) as usize;
    let motif = &lattice.motifs[index(u)][index(v)];
    let (a, b) = (u - u.floor() - 0.5 - motif.offset[0], v - v.floor() - 0.5 - motif.offset[1]);
    let (a, b) = rotate(motif.turn, a / motif.scale, b / motif.scale);
    covers(class, a, b).then(|| lattice.colours[usize::from(motif.light)])
}

/// Whether a shape covers (a, b), measured from its middle in cells.
fn covers(class: usize, a: f64, b: f64) -> bool {
    let within = |x: f64, y: f64, radius: f64| x * x + y * y < radius * radius;
    match CLASSES[class] {
        "bar" => a.abs() < 0.14 && b.abs() < 0.46,
        "bars" => (a.abs() - 0.22).abs() < 0.085 && b.abs() < 0.4,
        "chevron" => (b - a.abs() + 0.2).abs() < 0.13 && a.abs() < 0.42,
        "cross" => (a.abs() < 0.1 && b.abs() < 0.42) || (b.abs() < 0.1 && a.abs() < 0.42),
        "disc" => within(a, b, 0.3),
        "dots" => within(a.abs() - 0.24, b, 0.19),
        "ring" => within(a, b, 0.42) && !within(a, b, 0.27),
        _ => b < 0.32 && b > 1.73 * a.abs() - 0.42,
    }
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
