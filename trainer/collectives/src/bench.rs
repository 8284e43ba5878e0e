//! How fast the all-reduce is: for `mentee bench allreduce`, and beside `ci/bench_allreduce.c`, which measures the
//! same in the same way with MPI's own.

use std::{fmt, time::Instant};

use crate::{CollectiveError, Collectives};

/// Message sizes in bytes: 4 KiB to 256 MiB in steps of four, and 400 MiB.
pub const SIZES: [u64; 10] =
    [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 400 << 20];
/// A size is measured at least and at most this often, whatever the time asked for.
const FEWEST: usize = 3;
const MOST: usize = 1000;

/// What was measured for one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// The length of the message: of one rank's buffer.
    pub bytes: u64,
    /// How many ranks took part.
    pub ranks: u32,
    /// How often it was measured.
    pub repetitions: usize,
    /// The median over the repetitions of the slowest rank's time.
    pub seconds: f64,
}

impl Row {
    /// Bytes of the message over its time. (What crosses the network is more: 2(N−1)/N times that, by rank.)
    pub fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// One line of JSON: `bytes`, `ranks`, `n`, `seconds`, `algbw_gb_s` (10^9 bytes of the message a second).
    pub fn to_json(&self) -> String {
        format!(
            r#"{{"bytes": {}, "ranks": {}, "n": {}, "seconds": {:.9}, "algbw_gb_s": {:.6}}}"#,
            self.bytes,
            self.ranks,
            self.repetitions,
            self.seconds,
            self.bytes_per_s() / 1e9
        )
    }
}

/// A table's line; [`HEADER`] stands above.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, rate) = (self.seconds * 1e6, self.bytes_per_s() / 1e6);
        write!(
            f,
            "{:>9} {:>6} {:>7} {:>12.1} {:>10.1}",
            size(self.bytes),
            self.ranks,
            self.repetitions,
            seconds,
            rate
        )
    }
}

/// The line above the table made of [`Row`]s.
pub const HEADER: &str = "  message  ranks   times    median µs       MB/s";

/// A number of bytes as people write it: "4 KiB", "400 MiB".
pub fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

/// Measures the all-reduce of f32 for each of `sizes` in bytes (rounded down to whole elements), spending about
/// `seconds` on each. Every rank calls it and receives the same rows.
///
/// The memory is the group's own where it gives any out, as that of gradients is. Each size is tried first; then as many repetitions as fit the time, 3 to 1000, each of which begins with a
/// barrier and takes as long as its slowest rank.
///
/// # Errors
/// When the group fails.
pub fn all_reduce(group: &dyn Collectives, sizes: &[u64], seconds: f64) -> Result<Vec<Row>, CollectiveError> {
    sizes.iter().map(|&bytes| measure(group, bytes, seconds)).collect()
}

fn measure(group: &dyn Collectives, bytes: u64, seconds: f64) -> Result<Row, CollectiveError> {
    // Zeros stay zeros: sums of sums would overflow, and infinities must not decide a speed.
    let len = bytes as usize / size_of::<f32>();
    let Some(memory) = group.memory(bytes as usize)? else {
        let mut values = vec![0f32; len];
        return measure_by(group, bytes, seconds, || group.all_reduce_sum((&mut values).into()));
    };
    // SAFETY: aligned, that long, and used by nobody else but in the sums.
    let values = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().cast::<f32>(), len) };
    values.fill(0.0); // so that its pages are there
    measure_by(group, bytes, seconds, || group.all_reduce_sum((&mut *values).into()))
}

/// As [`all_reduce`] measures one size, with another way to sum `bytes` over the ranks of `group`: `sum` returns when the sum
/// is there.
///
/// # Errors
/// When the group or `sum` fails.
pub fn measure_by<E: From<CollectiveError>>(
    group: &dyn Collectives,
    bytes: u64,
    seconds: f64,
    mut sum: impl FnMut() -> Result<(), E>,
) -> Result<Row, E> {
    let mut once = || -> Result<f64, E> {
        group.barrier()?;
        let began = Instant::now();
        sum()?;
        Ok(began.elapsed().as_secs_f64())
    };
    once()?;
    let trial = slowest(group, &[once()?, once()?])?.into_iter().fold(0.0, f64::max);
    let repetitions = ((seconds / trial) as usize).clamp(FEWEST, MOST);
    let own = (0..repetitions).map(|_| once()).collect::<Result<Vec<_>, E>>()?;
    let mut times = slowest(group, &own)?;
    times.sort_by(f64::total_cmp);
    let median = (times[repetitions / 2] + times[(repetitions - 1) / 2]) / 2.0;
    Ok(Row { bytes, ranks: group.world_size(), repetitions, seconds: median })
}

/// The longest time of any rank, for each repetition.
fn slowest(group: &dyn Collectives, own: &[f64]) -> Result<Vec<f64>, CollectiveError> {
    let bytes: Vec<u8> = own.iter().flat_map(|time| time.to_le_bytes()).collect();
    let mut times = vec![0f64; own.len()];
    for of_rank in group.all_gather(&bytes)? {
        for (longest, time) in times.iter_mut().zip(of_rank.as_chunks::<8>().0) {
            *longest = longest.max(f64::from_le_bytes(*time));
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::threads;

    #[test]
    fn ranks_agree_on_what_was_measured() {
        let rows = threads::run(3, Duration::from_secs(60), |rank| {
            all_reduce(&rank, &[4096, 65_536], 0.001).unwrap()
        });
        assert!(rows.iter().all(|of_rank| *of_rank == rows[0]));
        assert_eq!(
            rows[0].iter().map(|row| (row.bytes, row.ranks)).collect::<Vec<_>>(),
            [(4096, 3), (65_536, 3)]
        );
        assert!(rows[0].iter().all(|row| row.seconds > 0.0 && (FEWEST..=MOST).contains(&row.repetitions)));
    }

    #[test]
    fn a_row_as_text() {
        let row = Row { bytes: 4 << 20, ranks: 2, repetitions: 7, seconds: 0.004 };
        assert_eq!(
            row.to_json(),
            r#"{"bytes": 4194304, "ranks": 2, "n": 7, "seconds": 0.004000000, "algbw_gb_s": 1.048576}"#
        );
        assert_eq!(row.to_string(), "    4 MiB      2       7       4000.0     1048.6");
        assert_eq!(row.to_string().len(), HEADER.replace('µ', "u").len());
        assert_eq!(["4 KiB", "1000 B"], [size(4096), size(1000)]);
    }
}
