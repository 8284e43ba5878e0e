//! Weighted k-nearest-neighbour classification (arXiv:1805.01978, section 3.4): each of the k most similar bank
//! images votes for its class with weight exp(cosine / T).

use mentee_ssl::loss::l2_normalise;
use tch::{Kind, Tensor};

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

/// How neighbours vote.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Neighbours that vote; at most the bank.
    pub k: i64,
    /// T.
    pub temperature: f64,
    /// Classes there are.
    pub num_classes: i64,
}

/// How many queries are classified correctly.
pub fn correct(bank: &Labelled, queries: &Labelled, settings: Settings) -> Result<i64, WorkerError> {
    let Settings { k, temperature, num_classes } = settings;
    if queries.len() == 0 || bank.len() == 0 {
        return Ok(0);
    }
    let k = k.min(bank.len());
    let keys = l2_normalise(&bank.features)?.f_tr()?; // [D, B]
    let mut correct = 0;
    for begin in (0..queries.len()).step_by(CHUNK as usize) {
        let n = CHUNK.min(queries.len() - begin);
        let queries_n = l2_normalise(&queries.features.f_narrow(0, begin, n)?)?; // [n, D]
        let (cosines, neighbours) = queries_n.f_matmul(&keys)?.f_topk(k, 1, true, true)?; // [n, k]
        let labels = bank.labels.f_index_select(0, &neighbours.f_view([-1])?)?.f_view([n, k])?;
        let weights = (cosines / temperature).f_exp()?;
        let votes = Tensor::f_zeros([n, num_classes], (Kind::Float, weights.device()))?
            .f_scatter_add(1, &labels, &weights)?;
        let predicted = votes.f_argmax(1, false)?;
        let truth = queries.labels.f_narrow(0, begin, n)?;
        correct += predicted.f_eq_tensor(&truth)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
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
        let settings = Settings { k: 2, temperature: 0.1, num_classes: 2 };
        // The third lies nearer to class 0: its two nearest are (1, 0.1) and (0.1, 1), with cosines 0.807 and 0.743.
        assert_eq!(correct(&bank, &queries, settings).unwrap(), 2);
        // With every image voting, class 1's three outweigh class 0's two only at a high temperature.
        let all = Settings { k: 200, temperature: 100.0, num_classes: 2 };
        assert_eq!(correct(&bank, &queries, all).unwrap(), 2, "majority class 1 for everyone");
    }
}
