//! Weighted k-nearest-neighbour classification (arXiv:1805.01978, section 3.4): each of the k most similar bank
//! images votes for its class with weight exp(cosine / T).

use mentee_ssl::loss::l2_normalise;
use tch::{Device, Kind, Tensor};

use crate::error::WorkerError;

/// Queries compared with the whole bank at a time; bounds the memory.
const CHUNK: i64 = 256;

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

/// How many queries are classified correctly: by the first k and every T, by the second k and every T, …
pub fn correct(
    bank: &Labelled,
    queries: &Labelled,
    grid: Grid,
    device: Device,
) -> Result<Vec<i64>, WorkerError> {
    let Grid { k, temperature, num_classes } = grid;
    let mut correct = vec![0; k.len() * temperature.len()];
    if queries.len() == 0 || bank.len() == 0 {
        return Ok(correct);
    }
    let at_most_bank = |k: u64| bank.len().min(k.cast_signed());
    let most = k.iter().copied().map(at_most_bank).max().unwrap_or(1);
    let keys = l2_normalise(&bank.features.f_to_device(device)?)?.f_tr()?; // [D, B]
    let classes = bank.labels.f_to_device(device)?;
    for begin in (0..queries.len()).step_by(CHUNK as usize) {
        let n = CHUNK.min(queries.len() - begin);
        let queries_n = queries.features.f_narrow(0, begin, n)?.f_to_device(device)?;
        let queries_n = l2_normalise(&queries_n)?; // [n, D]
        let (cosines, neighbours) = queries_n.f_matmul(&keys)?.f_topk(most, 1, true, true)?; // [n, k], nearest first
        let labels = classes.f_index_select(0, &neighbours.f_view([-1])?)?.f_view([n, most])?;
        let truth = queries.labels.f_narrow(0, begin, n)?.f_to_device(device)?;
        let mut counts = correct.iter_mut();
        for k in k.iter().copied().map(at_most_bank) {
            for temperature in temperature {
                let weights = (cosines.f_narrow(1, 0, k)? / *temperature).f_exp()?;
                let votes = Tensor::f_zeros([n, num_classes], (Kind::Float, weights.device()))?
                    .f_scatter_add(1, &labels.f_narrow(1, 0, k)?, &weights)?;
                let right = votes.f_argmax(1, false)?.f_eq_tensor(&truth)?;
                if let Some(count) = counts.next() {
                    *count += right.f_sum(Kind::Int64)?.f_int64_value(&[])?;
                }
            }
        }
    }
    Ok(correct)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            correct(&bank, &queries, Grid { k, temperature, num_classes: 2 }, Device::Cpu).unwrap()
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
