//! How many directions features use: the singular values of a bank of them.

use mentee_ssl::loss::l2_normalise;
use tch::{Kind, Tensor};

use crate::error::WorkerError;

/// Values kept in a metrics line.
const MOST_VALUES: usize = 128;
/// Rows looked at, evenly spread: more change nothing that one could see.
const MOST_ROWS: i64 = 8192;

/// See [`of`].
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Singular values over the largest one, falling; at most 128.
    pub values: Vec<f32>,
    /// exp of the entropy of all singular values over their sum: D when all directions weigh the same, 1 when there is but one
    /// (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
    pub effective_rank: f64,
}

/// Singular values of features [N, D], L2-normalised row by row and then centred, as arXiv:2110.09348 looks for
/// dimensional collapse.
pub fn of(features: &Tensor) -> Result<Spectrum, WorkerError> {
    let n = features.size()[0];
    let stride = ((n + MOST_ROWS - 1) / MOST_ROWS).max(1);
    let x = l2_normalise(&features.f_slice(0, None, None, stride)?.f_to_kind(Kind::Double)?)?;
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
    use tch::Device;

    use super::*;

    #[test]
    fn it_is_the_singular_value_decompositions() {
        tch::manual_seed(3);
        let x = Tensor::randn([50, 6], (Kind::Float, Device::Cpu));
        let found = of(&x).unwrap();
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
        let found = of(&line).unwrap();
        assert!((found.effective_rank - 1.0).abs() < 1e-6, "{found:?}");
        assert_eq!(of(&Tensor::ones([4, 3], (Kind::Float, Device::Cpu))).unwrap().effective_rank, 0.0);
    }
}
