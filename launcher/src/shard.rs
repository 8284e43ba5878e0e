//! `mentee shard`: any data set that can be read, as tar shards with an index.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use mentee_config::{counted, recipe::DataFormat, say};
use mentee_data::decode::Reading;
use mentee_data::shard::{ShardOptions, Store, Written, forget_part, write_part, write_shards_with};
use mentee_data::{DataError, Source, Split, more_held_out, open, open_split};

use crate::failure::Failure;
use crate::progress::Counter;
use crate::rundir::resolved;

/// `mentee shard`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee shard photos --out data/shards
  mentee shard photos --out data/shards --shorter-side 256 --quality 90
  mentee shard sentinel --out data/shards --bands 4,3,2 --range 0:3000

The same command carries on with what was stopped.")]
pub struct ShardArgs {
    /// An image folder, CIFAR binary files, IDX files or tar files
    pub source: PathBuf,
    /// A new folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Size of a shard, e.g. 64MiB
    #[arg(long, default_value = "256MiB", value_parser = bytes, value_name = "BYTES")]
    pub shard_bytes: u64,
    /// Threads that read and encode [default: one a processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub threads: Option<u32>,
    /// Store JPEG made anew, of this quality (1 to 100) [default with --shorter-side: 90]
    #[arg(long, value_name = "Q", value_parser = clap::value_parser!(u8).range(1..=100), conflicts_with = "raw")]
    pub quality: Option<u8>,
    /// Shrink larger images until their shorter side has so many pixels
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..))]
    pub shorter_side: Option<u32>,
    /// Store pixels without compression: nothing to decode; for images of a few pixels
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// What the source is, when it cannot be told by looking
    #[arg(long, value_parser = format(), default_value = "auto", value_name = "FORMAT")]
    pub format: DataFormat,
}

/// How deep and many-banded images are taken.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct ReadingArgs {
    /// The values that become black and white in images of more than 8 bits (16 or 32 bits, with a sign, floating-point) [default:
    /// the high byte of 16 bits]
    #[arg(long, value_name = "LOW:HIGH", value_parser = range, allow_hyphen_values = true)]
    pub range: Option<[f64; 2]>,
    /// The bands of TIFF files, from 1, that are red, green and blue [default: those that the file says]
    #[arg(long, value_name = "R,G,B", value_parser = bands)]
    pub bands: Option<[u16; 3]>,
}

impl ReadingArgs {
    /// The same, for a decoder.
    pub fn reading(self) -> Reading {
        Reading { range: self.range, bands: self.bands }
    }
}

impl ShardArgs {
    fn options(&self) -> ShardOptions {
        let shorter_side = self.shorter_side;
        let store = match (self.raw, self.quality) {
            (true, _) => Store::Raw { shorter_side },
            (false, None) if shorter_side.is_none() => Store::AsIs,
            (false, quality) => Store::Jpeg { shorter_side, quality: quality.unwrap_or(90) },
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        ShardOptions {
            shard_bytes: self.shard_bytes,
            threads: self.threads.map_or(threads, |threads| threads as usize),
            reading: self.reading.reading(),
            store,
        }
    }
}

/// `auto`, `tar`, `folder`, `cifar` or `idx`.
pub fn format() -> impl TypedValueParser<Value = DataFormat> {
    use serde::Deserialize;
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error, StringDeserializer};
    PossibleValuesParser::new(["auto", "tar", "folder", "cifar", "idx"]).try_map(|word| {
        let word: StringDeserializer<Error> = word.into_deserializer();
        DataFormat::deserialize(word)
    })
}

/// `0:4095`, `-1000:400`, `0:0.3`.
fn range(text: &str) -> Result<[f64; 2], String> {
    let numbers = text.split_once(':').and_then(|(low, high)| Some([low.parse().ok()?, high.parse().ok()?]));
    numbers
        .filter(|[low, high]: &[f64; 2]| low < high && (high - low).is_normal())
        .ok_or_else(|| "two numbers, the smaller one first, as in 0:4095".into())
}

/// `4,3,2`.
fn bands(text: &str) -> Result<[u16; 3], String> {
    let numbers: Option<Vec<u16>> =
        text.split(',').map(|band| band.parse().ok().filter(|&band| band > 0)).collect();
    numbers
        .and_then(|bands| bands.try_into().ok())
        .ok_or_else(|| "three numbers from 1, for red, green and blue, as in 4,3,2".into())
}

/// `268435456`, `256MiB`, `256MB`, `1GiB`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: write it like 268435456, 64MiB or 1GB");
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or_else(wrong)
}

/// `1.5 GiB`, for people.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{size:.1} {}", units[unit]) }
}

/// `mentee shard SOURCE --out DIR [--shard-bytes N]`. A set that is divided into training and held-out parts stays so:
/// `DIR/train`, `DIR/test`; what is held out besides keeps its name. The same command carries on after a stop: a part that it
/// had finished is left as it is.
///
/// # Errors
/// [`Failure`] with exit code 3 when the source cannot be read or `DIR` holds something, 2 when `DIR` lies in the source.
pub fn command(args: &ShardArgs) -> Result<(), Failure> {
    refuse_within(&args.source, &args.out)?;
    let named = |error: DataError| error.with_key("SOURCE");
    let held_out = open_split(&args.source, args.format, Split::Eval).map_err(named)?;
    let train = open_split(&args.source, args.format, Split::Train)
        .map_err(named)?
        .ok_or_else(|| named(DataError::Missing { key: String::new(), path: args.source.clone() }))?;
    let Some(held_out) = held_out else {
        return write(&*train, &args.out, &args.options(), false);
    };
    let mut parts = vec![(train, args.out.join("train")), (held_out, args.out.join("test"))];
    for folder in more_held_out(&args.source) {
        let name = folder.file_name().map(|name| args.out.join(name)).unwrap_or_default();
        parts.push((open(&folder, args.format).map_err(named)?, name));
    }
    for (source, out) in &parts {
        write(&**source, out, &args.options(), true)?;
    }
    parts.iter().for_each(|(_, out)| forget_part(out));
    Ok(())
}

/// Refuses to write among the images that are read: they would be another set, or one with two copies of some.
fn refuse_within(source: &Path, out: &Path) -> Result<(), Failure> {
    let (Ok(source), Ok(whole)) = (resolved(source), resolved(out)) else { return Ok(()) };
    if source.is_dir() && whole.starts_with(&source) {
        return Err(Failure::usage(format!(
            "--out {}: is SOURCE or lies in it: choose a folder beside it",
            out.display()
        )));
    }
    Ok(())
}

/// Writes a set, or one part of a divided one, and says so.
fn write(source: &dyn Source, out: &Path, options: &ShardOptions, is_part: bool) -> Result<(), Failure> {
    let mut counter = Counter::new("images");
    let started = std::time::Instant::now();
    let mut taken_over = None;
    let mut progress = |done, total| {
        taken_over.get_or_insert(done);
        counter.at(done, total);
    };
    let written = if is_part {
        write_part(source, out, options, &mut progress)
    } else {
        write_shards_with(source, out, options, &mut progress).map(Some)
    };
    counter.finish();
    let Some(Written { samples, shards, bytes, digest }) = written? else {
        say!("{}: complete from before, left as it is", out.display());
        return Ok(());
    };
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let taken_over = taken_over.unwrap_or(0);
    say!(
        "{}: {} of {} in {}, {}, digest {}{}",
        out.display(),
        counted(samples, "image"),
        counted(source.classes().len() as u64, "class"),
        counted(shards, "shard"),
        human_bytes(bytes),
        &digest[..digest.len().min(16)],
        options.changed_with(source).map_or(String::new(), |changed| format!("; changed: {changed}"))
    );
    if let Some(line) = source.passed_over() {
        say!("  {line}");
    }
    if taken_over > 0 {
        say!("  {taken_over} of them were there from before");
    }
    let share = (samples - taken_over) as f64 / samples.max(1) as f64;
    say!(
        "  {:.0} images/s, {:.0} MB/s",
        (samples - taken_over) as f64 / seconds,
        bytes as f64 * share / seconds / 1e6
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let table =
            [("1", 1), ("64MiB", 64 << 20), ("256mib", 256 << 20), ("1GB", 1_000_000_000), ("2 KiB", 2048)];
        for (text, size) in table {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        for text in ["", "0", "MiB", "-1", "1.5GiB", "1 parsec", "99999999999GiB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!(human_bytes(1023), "1023 bytes");
        assert_eq!(human_bytes(256 << 20), "256.0 MiB");
    }

    #[test]
    fn ranges_and_bands() {
        assert_eq!(range("0:4095"), Ok([0.0, 4095.0]));
        assert_eq!(range("-1000:4e2"), Ok([-1000.0, 400.0]));
        for text in ["", "5", "5:5", "9:1", "0:inf", "nan:1", "0:1:2", "a:b", "0:1e-310"] {
            assert!(range(text).is_err(), "{text}");
        }
        assert_eq!(bands("4,3,2"), Ok([4, 3, 2]));
        for text in ["", "4,3", "4,3,2,1", "0,1,2", "-1,2,3", "r,g,b"] {
            assert!(bands(text).is_err(), "{text}");
        }
    }

    #[test]
    fn formats() {
        let parsed =
            |word: &str| format().parse_ref(&clap::Command::new("x"), None, std::ffi::OsStr::new(word)).ok();
        assert_eq!(parsed("idx"), Some(DataFormat::Idx));
        assert_eq!(parsed("zip"), None);
        for word in format().possible_values().expect("for help and completions") {
            assert!(parsed(word.get_name()).is_some(), "{word:?}");
        }
    }
}
