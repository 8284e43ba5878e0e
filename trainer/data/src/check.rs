//! What a data set holds, and what is wrong with it: `mentee data stats` and `mentee data verify`.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mentee_config::recipe::{DataFormat, Interpolation};
use serde::Serialize;

use crate::decode::{CropBox, PlanarImage, Reading, RgbImage, Values, encode_png};
use crate::error::DataError;
use crate::open::{self, Part};
use crate::reader::Reader;
use crate::resize::{Area, Resizer, TILE};
use crate::source::{Source, Split};
use crate::tar::TarShards;

/// What [`stats`] found in one part of a data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// The folder, or the split of a set that is divided by file names.
    pub part: String,
    /// Images.
    pub samples: u64,
    /// Files they are in.
    pub files: u64,
    /// Bytes of the images as stored.
    pub bytes: u64,
    /// Name and number of images of each class; empty when unlabelled.
    pub classes: Vec<(String, u64)>,
    /// Images without a label.
    pub unlabelled: u64,
    /// Smallest, median and largest width, pixels, of the images looked at.
    pub width: [u32; 3],
    /// The same of the height.
    pub height: [u32; 3],
    /// Mean of each channel (R, G, B) over the pixels looked at, in [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of each channel over those pixels.
    pub std: [f64; 3],
    /// How many images were decoded for the sizes and colours: evenly spaced ones.
    pub decoded: u64,
    /// Identifies the data set.
    pub digest: String,
    /// What is worth a look, a line each: files that are passed over, the values of deep images.
    pub notes: Vec<String>,
}

/// What [`verify`] found in all parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Images that were decoded, or tried to be.
    pub samples: u64,
    /// Files they are in.
    pub files: u64,
    /// Bytes of the images as stored.
    pub bytes: u64,
    /// Everything that is wrong: shards and containers first, then samples in order.
    pub problems: Vec<String>,
    /// Of these, how many are the system's refusals: nothing is known of the data.
    pub refused: usize,
    /// What is no problem but worth a look, a line each: files that are passed over.
    pub notes: Vec<String>,
}

/// Images decoded by [`stats`], at most.
const STATS_SAMPLE: u64 = 2048;

impl Part {
    /// Its folder, and which of the files in it.
    fn name(&self) -> String {
        let path = self.path.display();
        match self.split {
            None => path.to_string(),
            Some(Split::Train) => format!("{path} (train)"),
            Some(Split::Eval) => format!("{path} (test)"),
        }
    }

    fn open(&self) -> Result<Arc<dyn Source>, DataError> {
        open::open_as(&self.path, self.format, self.split)
    }
}

/// Counts what is at `path`, each part by itself. Decodes up to 2,048 images a part for sizes and colours.
///
/// # Errors
/// [`DataError`]: nothing there, or an image among those decoded is damaged.
pub fn stats(
    path: &Path,
    format: DataFormat,
    reading: Reading,
    threads: usize,
) -> Result<Vec<Stats>, DataError> {
    let parts = open::parts(path, format)?;
    parts.iter().map(|part| part_stats(part.name(), &*part.open()?, reading, threads)).collect()
}

fn part_stats(
    part: String,
    source: &dyn Source,
    reading: Reading,
    threads: usize,
) -> Result<Stats, DataError> {
    let samples = source.len();
    let mut counts: Vec<(String, u64)> = source.classes().iter().map(|name| (name.clone(), 0)).collect();
    let mut unlabelled = 0;
    for index in 0..samples {
        match source.label(index).and_then(|label| counts.get_mut(label as usize)) {
            Some((_, count)) => *count += 1,
            None => unlabelled += 1,
        }
    }
    let decoded = samples.min(STATS_SAMPLE);
    let found = Mutex::new(Vec::with_capacity(decoded as usize));
    let deep = Mutex::new(Values::default());
    each_image(source, decoded, |i| i * samples / decoded, (reading, threads), &|i, reader, image| {
        let one = image.map(|image| (image.width, image.height, moments(image)));
        if let Some(values) = reader.deep_values() {
            deep.lock().unwrap_or_else(PoisonError::into_inner).add(values);
        }
        found.lock().unwrap_or_else(PoisonError::into_inner).push((i, one));
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut deep = deep.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Sums of floats depend on their order, and the first of several errors is told.
    found.sort_by_key(|(i, _)| *i);
    let found: Vec<_> = found.into_iter().map(|(_, one)| one).collect::<Result<_, _>>().map_err(|error| {
        match (error, deep.told()) {
            (DataError::BadSample { sample, reason }, Some(told)) => {
                DataError::BadSample { sample, reason: format!("{reason}; {told}") }
            }
            (error, _) => error,
        }
    })?;
    let spread = |mut sides: Vec<u32>| {
        sides.sort_unstable();
        [sides[0], sides[sides.len() / 2], sides[sides.len() - 1]]
    };
    let pixels: f64 = found.iter().map(|one| f64::from(one.0) * f64::from(one.1)).sum();
    let channel = |c: usize, power: usize| found.iter().map(|one| one.2[c][power]).sum::<f64>() / pixels;
    let mean: [f64; 3] = std::array::from_fn(|c| channel(c, 0));
    let notes = source.passed_over().into_iter().chain(depth(deep, reading)).collect();
    let (bytes, files) = source.stored();
    Ok(Stats {
        part,
        samples,
        files,
        bytes,
        classes: counts,
        unlabelled,
        width: spread(found.iter().map(|one| one.0).collect()),
        height: spread(found.iter().map(|one| one.1).collect()),
        mean,
        std: std::array::from_fn(|c| (channel(c, 1) - mean[c] * mean[c]).max(0.0).sqrt()),
        decoded,
        digest: source.digest(),
        notes,
    })
}

/// A line on what the values of deep images are, and what becomes of them.
fn depth(mut values: Values, reading: Reading) -> Option<String> {
    let told = values.told()?;
    let what = match reading.range {
        Some([low, high]) => format!("{low} to {high} are taken as 0 to 255 (--range)"),
        None => {
            "their high byte is kept, unless `mentee shard` is told otherwise (--range LOW:HIGH)".to_owned()
        }
    };
    let images = values.images;
    Some(format!("images of more than 8 bits ({images} of those decoded): {told}; {what}"))
}

/// Images across and down a contact sheet, and the side of each, pixels.
const SHEET: u32 = 8;
const THUMB: u32 = 96;

/// A contact sheet as a PNG file: up to 64 images, evenly spaced over all parts, the centre square of each.
///
/// # Errors
/// [`DataError`]: nothing there, or an image among them is damaged.
pub fn contact_sheet(path: &Path, format: DataFormat, reading: Reading) -> Result<Vec<u8>, DataError> {
    let sources = open::parts(path, format)?.iter().map(Part::open).collect::<Result<Vec<_>, _>>()?;
    let total: u64 = sources.iter().map(|source| source.len()).sum();
    let count = total.min(u64::from(SHEET * SHEET));
    let columns = (count.isqrt() + u64::from(count.isqrt().pow(2) < count)).max(1) as u32;
    let (width, height) = (columns * THUMB, (count as u32).div_ceil(columns) * THUMB);
    let mut sheet = vec![255u8; (width * height * 3) as usize];
    let (mut reader, mut planes, mut resizer) =
        (Reader::new(reading), PlanarImage::default(), Resizer::default());
    let side = THUMB as usize;
    let mut thumb = vec![0.0; 3 * side * side];
    for i in 0..count {
        let mut index = i * total / count;
        let mut sources = sources.iter();
        let source = loop {
            match sources.next() {
                Some(source) if index < source.len() => break source,
                Some(source) => index -= source.len(),
                None => unreachable!("an index below the sum of the lengths"),
            }
        };
        let square = |width: u32, height: u32| {
            let side = width.min(height);
            CropBox { x: (width - side) / 2, y: (height - side) / 2, width: side, height: side }
        };
        reader.part(&**source, index, square, &mut planes)?;
        let part = planes.part;
        let area = Area::from(CropBox::whole(part.width, part.height));
        resizer.begin(&planes, part, area, Interpolation::Bicubic, false, side);
        for top in (0..side).step_by(TILE) {
            resizer.rows(&planes, part, top, TILE.min(side - top), side, &mut thumb);
        }
        let (left, top) = (i as usize % columns as usize * side, i as usize / columns as usize * side);
        for y in 0..side {
            let row = &mut sheet[((top + y) * width as usize + left) * 3..][..3 * side];
            for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
                for (c, value) in pixel.iter_mut().enumerate() {
                    *value = (thumb[(c * side + y) * side + x] * 255.0).round() as u8;
                }
            }
        }
    }
    encode_png(width, height, &sheet).map_err(|reason| DataError::bad_file(path, reason))
}

/// Sums of each channel's values and of their squares, values in [0, 1].
fn moments(image: &RgbImage) -> [[f64; 2]; 3] {
    let mut sums = [[0u64; 2]; 3];
    for pixel in image.data.chunks_exact(3) {
        for (sum, &value) in sums.iter_mut().zip(pixel) {
            sum[0] += u64::from(value);
            sum[1] += u64::from(value) * u64::from(value);
        }
    }
    sums.map(|[sum, squares]| [sum as f64 / 255.0, squares as f64 / (255.0 * 255.0)])
}

/// Checks everything at `path`, all parts: every shard against the digests in its index, every image by decoding it.
/// Goes on after a problem and reports them all. `progress` hears (done, total) images of the part at hand.
///
/// # Errors
/// [`DataError`] only when there is nothing to check: no such path, or no image in it.
pub fn verify(
    path: &Path,
    format: DataFormat,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Report, DataError> {
    let mut report = Report::default();
    for part in open::parts(path, format)? {
        let mut note = |error: DataError| {
            report.refused += usize::from(error.is_passing());
            report.problems.push(error.to_string());
            Ok(())
        };
        let source: Arc<dyn Source> = if part.format == DataFormat::Tar {
            let shards = match TarShards::open_reporting(&part.path, &mut note) {
                Ok(shards) => shards,
                // Every shard is unreadable: that is a finding, not a reason to stop.
                Err(DataError::NoImages { .. }) if !report.problems.is_empty() => continue,
                Err(error) => return Err(error),
            };
            shards.verify_shards(&mut note)?;
            Arc::new(shards)
        } else {
            part.open()?
        };
        let bad = Mutex::new(Vec::new());
        let done = AtomicU64::new(0);
        let total = source.len();
        each_image(&*source, total, |i| i, (Reading::default(), threads), &|i, _, image| {
            if let Err(error) = image {
                bad.lock().unwrap_or_else(PoisonError::into_inner).push((i, error));
            }
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
        });
        let mut bad = bad.into_inner().unwrap_or_else(PoisonError::into_inner);
        bad.sort_by_key(|(i, _)| *i);
        report.refused += bad.iter().filter(|(_, error)| error.is_passing()).count();
        report.problems.extend(bad.into_iter().map(|(_, error)| error.brief()));
        report.notes.extend(source.passed_over());
        let (bytes, files) = source.stored();
        report.samples += total;
        report.files += files;
        report.bytes += bytes;
    }
    Ok(report)
}

/// Hears of an image: its number, who read it, and its pixels.
type Visit<'a> = dyn Fn(u64, &mut Reader, Result<&RgbImage, DataError>) + Sync + 'a;

/// Decodes the images `index(0)` … `index(count − 1)` on `threads` threads and hands each, or its error, to `visit`.
fn each_image(
    source: &dyn Source,
    count: u64,
    index: impl Fn(u64) -> u64 + Sync,
    (reading, threads): (Reading, usize),
    visit: &Visit<'_>,
) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let (mut reader, mut image) = (Reader::new(reading), RgbImage::default());
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        return;
                    }
                    let read = reader.whole(source, index(i), &mut image);
                    visit(i, &mut reader, read.map(|()| &image));
                }
            });
        }
    });
}
