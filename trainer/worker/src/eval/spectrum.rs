//! How many directions features use: the singular values of a bank of them.

use mentee_collectives::Collectives;
use mentee_ssl::loss::l2_normalise;
use tch::{Kind, Tensor};

use crate::error::WorkerError;
use crate::snapshot;

/// Values kept in a metrics line.
const MOST_VALUES: usize = 128;
/// Rows looked at, evenly spread: more change nothing that one could see.
const MOST_ROWS: i64 = 8192;

/// See [`of_rows`].
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Singular values over the largest one, falling; at most 128.
    pub values: Vec<f32>,
    /// exp of the entropy of all singular values over their sum: D when all directions weigh the same, 1 when there is but one
    /// (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
    pub effective_rank: f64,
}

/// Of the features of all ranks, [n, D] of each, laid end to end; on rank 0.
pub fn of_ranks(collectives: &dyn Collectives, own: &Tensor) -> Result<Option<Spectrum>, WorkerError> {
    let lens = collectives.all_gather(&own.size()[0].to_le_bytes())?;
    let lens: Vec<i64> =
        lens.iter().map(|len| len.as_slice().try_into().map_or(0, i64::from_le_bytes)).collect();
    let stride = stride(lens.iter().sum());
    let before: i64 = lens[..collectives.rank() as usize].iter().sum();
    // The first row of this rank's at a multiple of the stride, counted over all.
    let first = ((stride - before % stride) % stride).min(own.size()[0]);
    let rows = own.f_slice(0, first, None, stride)?;
    let parts = collectives.all_gather(&snapshot::bytes(&rows)?)?.concat();
    if collectives.rank() != 0 {
        return Ok(None);
    }
    let n = lens.iter().sum::<i64>();
    let rows = (n + stride - 1) / stride;
    let dim = parts.len() as i64 / 4 / rows.max(1);
    Ok(Some(of_rows(&Tensor::f_from_data_size(&parts, &[rows, dim], Kind::Float)?)?))
}

/// One of so many rows of `n` is looked at.
fn stride(n: i64) -> i64 {
    ((n + MOST_ROWS - 1) / MOST_ROWS).max(1)
}

/// Singular values of features [N, D], L2-normalised row by row and then centred, as arXiv:2110.09348 looks for
/// dimensional collapse.
fn of_rows(features: &Tensor) -> Result<Spectrum, WorkerError> {
    let x = l2_normalise(&features.f_to_kind(Kind::Double)?)?;
    let x = &x - x.f_mean_dim(Some([0i64].as_slice()), true, Kind::Double)?;
    let squares = x.f_tr()?.f_matmul(&x)?.f_linalg_eigvalsh("L")?; // rising
    let squares = Vec::<f64>::try_from(squares)?;
    let values: Vec<f64> = squares.iter().rev().map(|square| square.max(0.0).sqrt()).collect();
    let (largest, sum) = (values.first().copied().unwrap_or(0.0), values.iter().sum::<f64>());
    if largest <= 0.0 || !sum.is_finite() {
        return Ok(Spectrum { values: vec![0.0; values.len().min(MOST_VALUES)], effective_rank: 0.0 });
    }
    let entropy: f64 = values.iter().map(|v| v / sum).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    let values = values.iter().take(MOST_VALUES).map(|value| (value / largest) as f32).collect();
    Ok(Spectrum { values, effective_rank: entropy.exp() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mentee_collectives::{Single, threads};
    use tch::Device;

    use super::*;

    #[test]
    fn rows_are_the_same_on_any_number_of_ranks() {
        tch::manual_seed(4);
        for n in [2, 100, MOST_ROWS + 1, 3 * MOST_ROWS - 5] {
            let x = Tensor::randn([n, 3], (Kind::Float, Device::Cpu));
            let alone = of_ranks(&Single::new(), &x).unwrap();
            assert_eq!(alone, Some(of_rows(&x.slice(0, None, None, stride(n))).unwrap()));
            let (cuts, x) = ([0, 0, n / 3, n / 3 + 1, n], Vec::<f32>::try_from(x.view([-1])).unwrap());
            let all = threads::run(4, Duration::from_secs(60), |rank| {
                let (begin, end) = (cuts[rank.rank() as usize], cuts[rank.rank() as usize + 1]);
                let own = Tensor::from_slice(&x[3 * begin as usize..3 * end as usize]).view([end - begin, 3]);
                of_ranks(&rank, &own).unwrap()
            });
            assert_eq!(all, [alone, None, None, None], "{n} rows");
        }
    }

    #[test]
    fn it_is_the_singular_value_decompositions() {
        tch::manual_seed(3);
        let x = Tensor::randn([50, 6], (Kind::Float, Device::Cpu));
        let found = of_rows(&x).unwrap();
        let x = l2_normalise(&x.to_kind(Kind::Double)).unwrap();
        let x = &x - x.mean_dim(Some([0i64].as_slice()), true, Kind::Double);
        let (_, s, _) = x.svd(true, true);
        let s = Vec::<f64>::try_from(s).unwrap();
        assert_eq!(found.values.len(), 6);
        for (found, expected) in found.values.iter().zip(&s) {
            assert!((f64::from(*found) - expected / s[0]).abs() < 1e-6);
        }
        assert!(found.effective_rank > 5.0 && found.effective_rank <= 6.0);
    }

    #[test]
    fn one_direction_has_rank_1_and_a_constant_none() {
        let signs = Tensor::from_slice(&[1.0f32, -1.0, 1.0, 1.0]).view([4, 1]);
        let line = &signs * Tensor::from_slice(&[3.0f32, 4.0, 0.0]).view([1, 3]);
        let found = of_rows(&line).unwrap();
        assert!((found.effective_rank - 1.0).abs() < 1e-6, "{found:?}");
        assert_eq!(of_rows(&Tensor::ones([4, 3], (Kind::Float, Device::Cpu))).unwrap().effective_rank, 0.0);
    }
}
