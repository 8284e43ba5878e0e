//! Weighted k-nearest-neighbour classification (arXiv:1805.01978, section 3.4): each of the k most similar bank
//! images votes for its class with weight exp(cosine / T).

use mentee_collectives::Collectives;
use mentee_ssl::loss::l2_normalise;
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;
use crate::snapshot;

/// Queries compared with a stretch of the bank at a time; bounds the memory.
const CHUNK: i64 = 256;
/// Bank images looked at a time: what the bank needs beside itself does not grow with it.
const STRETCH: i64 = 1 << 16;
/// Queries whose neighbours ranks exchange at a time.
const EXCHANGE: i64 = 1024;

/// Features and labels of the same images.
#[derive(Debug)]
pub struct Labelled {
    /// [N, D], f32
    pub features: Tensor,
    /// [N], i64
    pub labels: Tensor,
}

impl Labelled {
    /// How many images.
    pub fn len(&self) -> i64 {
        self.labels.size()[0]
    }

    /// The largest label; -1 without images.
    pub fn max_label(&self) -> Result<i64, WorkerError> {
        Ok(if self.len() == 0 { -1 } else { self.labels.f_max()?.f_int64_value(&[])? })
    }
}

/// How neighbours vote, in every combination.
#[derive(Debug, Clone, Copy)]
pub struct Grid<'a> {
    /// Neighbours that vote; at most the bank.
    pub k: &'a [u64],
    /// T.
    pub temperature: &'a [f64],
    /// Classes there are.
    pub num_classes: i64,
}

/// The bank images most similar to each query, nearest first.
struct Nearest {
    /// [Q, k], f32
    cosines: Tensor,
    /// [Q, k], i64
    labels: Tensor,
}

impl Nearest {
    /// The nearest `k`, or all if there are fewer, of both.
    fn with(self, other: Self, k: i64) -> Result<Self, WorkerError> {
        let cosines = Tensor::f_cat(&[self.cosines, other.cosines], 1)?;
        let labels = Tensor::f_cat(&[self.labels, other.labels], 1)?;
        let (cosines, places) = cosines.f_topk(k.min(cosines.size()[1]), 1, true, true)?;
        Ok(Self { labels: labels.f_gather(1, &places, false)?, cosines })
    }

    fn rows(&self, begin: i64, n: i64) -> Result<Self, WorkerError> {
        Ok(Self { cosines: self.cosines.f_narrow(0, begin, n)?, labels: self.labels.f_narrow(0, begin, n)? })
    }

    /// 4 bytes of cosine and 8 of label for each neighbour.
    fn to_bytes(&self) -> Result<Vec<u8>, WorkerError> {
        Ok([snapshot::bytes(&self.cosines)?, snapshot::bytes(&self.labels)?].concat())
    }

    fn from_bytes(bytes: &[u8], n: i64, device: Device) -> Result<Self, WorkerError> {
        let k = bytes.len() as i64 / 12 / n;
        let (cosines, labels) = bytes.split_at((4 * n * k) as usize);
        Ok(Self {
            cosines: Tensor::f_from_data_size(cosines, &[n, k], Kind::Float)?.f_to_device(device)?,
            labels: Tensor::f_from_data_size(labels, &[n, k], Kind::Int64)?.f_to_device(device)?,
        })
    }
}

/// The `most` nearest images of `bank` to each of `queries` [Q, D].
fn nearest(bank: &Labelled, queries: &Tensor, most: i64, device: Device) -> Result<Nearest, WorkerError> {
    let q = queries.size()[0];
    let mut all = Nearest {
        cosines: Tensor::f_zeros([q, 0], (Kind::Float, device))?,
        labels: Tensor::f_zeros([q, 0], (Kind::Int64, device))?,
    };
    for begin in (0..bank.len()).step_by(STRETCH as usize) {
        let len = STRETCH.min(bank.len() - begin);
        let keys = bank.features.f_narrow(0, begin, len)?.f_to_device(device)?;
        let keys = l2_normalise(&keys)?.f_tr()?; // [D, B]
        let classes = bank.labels.f_narrow(0, begin, len)?.f_to_device(device)?;
        let (mut cosines, mut labels) = (Vec::new(), Vec::new());
        for begin in (0..q).step_by(CHUNK as usize) {
            let n = CHUNK.min(q - begin);
            let queries = l2_normalise(&queries.f_narrow(0, begin, n)?.f_to_device(device)?)?; // [n, D]
            let (cosine, places) = queries.f_matmul(&keys)?.f_topk(most.min(len), 1, true, true)?; // [n, k]
            labels.push(classes.f_index_select(0, &places.f_view([-1])?)?.f_view([n, -1])?);
            cosines.push(cosine);
        }
        let here = Nearest { cosines: Tensor::f_cat(&cosines, 0)?, labels: Tensor::f_cat(&labels, 0)? };
        all = if begin == 0 { here } else { all.with(here, most)? };
    }
    Ok(all)
}

/// As libtorch counts: beyond that there are no rows.
fn as_many(k: u64) -> i64 {
    i64::try_from(k).unwrap_or(i64::MAX)
}

/// How many queries are classified correctly: by the first k and every T, by the second k and every T, … `bank` is this
/// rank's part of the bank, `queries` are those of all ranks, of which each rank counts some.
pub fn correct(
    collectives: &dyn Collectives,
    bank: &Labelled,
    queries: &Labelled,
    grid: Grid,
    device: Device,
) -> Result<Vec<i64>, WorkerError> {
    let Grid { k, temperature, .. } = grid;
    let (world, rank) = (i64::from(collectives.world_size()), i64::from(collectives.rank()));
    let mut correct = vec![0; k.len() * temperature.len()];
    if queries.len() == 0 {
        return Ok(correct);
    }
    let most = as_many(k.iter().copied().max().unwrap_or(1));
    let own = nearest(bank, &queries.features, most, device)?;
    for (turn, begin) in (0..queries.len()).step_by(EXCHANGE as usize).enumerate() {
        let n = EXCHANGE.min(queries.len() - begin);
        let mut rows = own.rows(begin, n)?;
        if world > 1 {
            let of_ranks = collectives.all_gather(&rows.to_bytes()?)?;
            if turn as i64 % world != rank {
                continue;
            }
            let mut parts = of_ranks.iter().map(|bytes| Nearest::from_bytes(bytes, n, device));
            rows = parts.next().unwrap_or(Ok(rows))?;
            for part in parts {
                rows = rows.with(part?, most)?;
            }
        }
        let truth = queries.labels.f_narrow(0, begin, n)?;
        rows.vote(&truth, grid, &mut correct)?;
    }
    Ok(correct)
}

impl Nearest {
    /// Adds the queries whose class is the `truth` to `correct`, by setting.
    fn vote(&self, truth: &Tensor, grid: Grid, correct: &mut [i64]) -> Result<(), WorkerError> {
        // On the processor, where votes are added in order.
        let (cosines, labels) =
            (self.cosines.f_to_device(Device::Cpu)?, self.labels.f_to_device(Device::Cpu)?);
        let (n, found) = cosines.size2()?;
        if found == 0 {
            return Ok(());
        }
        // In units of the nearest one's vote: at a small T, exp(1 / T) is more than f32 holds.
        let below_nearest = cosines.f_sub(&cosines.f_narrow(1, 0, 1)?)?;
        let mut counts = correct.iter_mut();
        for k in grid.k.iter().map(|&k| found.min(as_many(k))) {
            for temperature in grid.temperature {
                let weights = (below_nearest.f_narrow(1, 0, k)? / *temperature).f_exp()?;
                let votes = Tensor::f_zeros([n, grid.num_classes], (Kind::Float, Device::Cpu))?
                    .f_scatter_add(1, &labels.f_narrow(1, 0, k)?, &weights)?;
                let right = votes.f_argmax(1, false)?.f_eq_tensor(truth)?;
                if let Some(count) = counts.next() {
                    *count += right.f_sum(Kind::Int64)?.f_int64_value(&[])?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mentee_collectives::{Single, threads};

    use super::*;

    /// Directions of `n` images of `classes` classes in turn.
    fn random(seed: i64, n: i64, classes: i64) -> Labelled {
        tch::manual_seed(seed);
        let labels = Tensor::arange(n, (Kind::Int64, Device::Cpu)).fmod(classes);
        let features = Tensor::randn([n, 8], (Kind::Float, Device::Cpu));
        Labelled { features: features + labels.unsqueeze(1) * 0.3, labels }
    }

    #[test]
    fn parts_of_the_bank_on_ranks_are_the_bank() {
        let (bank, queries) = (random(1, 700, 5), random(2, 1500, 5));
        let (k, temperature) = ([1, 20, 600], [0.07, 1.0]);
        let grid = Grid { k: &k, temperature: &temperature, num_classes: 5 };
        let alone = correct(&Single::new(), &bank, &queries, grid, Device::Cpu).unwrap();
        let all = [700, u64::MAX].map(|k| {
            let grid = Grid { k: &[k], temperature: &temperature, num_classes: 5 };
            correct(&Single::new(), &bank, &queries, grid, Device::Cpu).unwrap()
        });
        assert_eq!(all[0], all[1], "no more than there are");
        assert!(alone[0] > 400 && alone[3] > alone[0], "{alone:?}");
        // A tensor is for one thread.
        let numbers = |of: &Labelled| {
            let features = Vec::<f32>::try_from(of.features.view([-1])).unwrap();
            (features, Vec::<i64>::try_from(&of.labels).unwrap())
        };
        let (bank, queries) = (numbers(&bank), numbers(&queries));
        let part = |(features, labels): &(Vec<f32>, Vec<i64>), begin: usize, end: usize| Labelled {
            features: Tensor::from_slice(&features[8 * begin..8 * end]).view([(end - begin) as i64, 8]),
            labels: Tensor::from_slice(&labels[begin..end]),
        };
        for cuts in [vec![0, 350, 700], vec![0, 0, 10, 699, 700]] {
            let counts = threads::run(cuts.len() as u32 - 1, Duration::from_secs(60), |rank| {
                let n = rank.rank() as usize;
                let (own, queries) = (part(&bank, cuts[n], cuts[n + 1]), part(&queries, 0, 1500));
                correct(&rank, &own, &queries, grid, Device::Cpu).unwrap()
            });
            let sum = |n: usize| counts.iter().map(|counts| counts[n]).sum::<i64>();
            assert_eq!((0..alone.len()).map(sum).collect::<Vec<_>>(), alone, "{cuts:?}");
        }
    }

    #[test]
    fn a_small_temperature_lets_the_nearest_decide() {
        let (bank, queries) = (random(1, 300, 4), random(2, 200, 4));
        let count = |k, temperature| {
            let grid = Grid { k: &[k], temperature: &[temperature], num_classes: 4 };
            correct(&Single::new(), &bank, &queries, grid, Device::Cpu).unwrap()
        };
        for temperature in [0.01, 1e-3, 1e-6] {
            let (one, many) = (count(1, temperature)[0], count(50, temperature)[0]);
            assert!((one - many).abs() <= 12, "T = {temperature}: {one} by the nearest, {many} by 50");
        }
        assert_eq!(count(1, 1e-6), count(50, 1e-6));
    }

    #[test]
    fn agrees_with_counting_by_hand() {
        // Bank: two images of class 0 near (1, 0), three of class 1 near (0, 1).
        let features = [1.0f32, 0.1, 1.0, -0.1, 0.1, 1.0, -0.1, 1.0, 0.0, 1.0];
        let bank = Labelled {
            features: Tensor::from_slice(&features).view([5, 2]),
            labels: Tensor::from_slice(&[0i64, 0, 1, 1, 1]),
        };
        let queries = Labelled {
            features: Tensor::from_slice(&[3.0f32, 0.0, 0.0, 0.5, 1.0, 0.9]).view([3, 2]),
            labels: Tensor::from_slice(&[0i64, 1, 1]),
        };
        let count = |k: &[u64], temperature: &[f64]| {
            let grid = Grid { k, temperature, num_classes: 2 };
            correct(&Single::new(), &bank, &queries, grid, Device::Cpu).unwrap()
        };
        // The third lies nearer to class 0: its two nearest are (1, 0.1) and (0.1, 1), with cosines 0.807 and 0.743.
        assert_eq!(count(&[2], &[0.1]), [2]);
        // With every image voting, class 1's three outweigh class 0's two only at a high temperature.
        assert_eq!(count(&[200], &[100.0]), [2], "majority class 1 for everyone");
        // A grid is its settings one by one.
        let single = |k, t| count(&[k], &[t])[0];
        assert_eq!(
            count(&[1, 200], &[0.1, 100.0]),
            [single(1, 0.1), single(1, 100.0), single(200, 0.1), single(200, 100.0)]
        );
    }
}
