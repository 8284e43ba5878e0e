//! Loss functions on projections, computed in at least f32.

use tch::{Kind, Tensor};

use crate::SslError;

/// Guards the division by a norm, as DeepMind's `rsqrt(max(x², 1e-12))` does.
const NORM_FLOOR: f64 = 1e-12;

/// x / |x| row by row: [N, D].
pub fn l2_normalise(x: &Tensor) -> Result<Tensor, SslError> {
    let x = if x.kind() == Kind::Double { x.shallow_clone() } else { x.f_to_kind(Kind::Float)? };
    let square = x.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, x.kind())?;
    Ok(x.f_mul(&square.f_clamp_min(NORM_FLOOR)?.f_rsqrt()?)?)
}

/// cos(a, b) row by row: [N, D] and [N, D] to [N].
pub fn cosine(a: &Tensor, b: &Tensor) -> Result<Tensor, SslError> {
    let (a, b) = (l2_normalise(a)?, l2_normalise(b)?);
    Ok(a.f_mul(&b)?.f_sum_dim_intlist([1i64].as_slice(), false, a.kind())?)
}

/// Exchanges the halves of a batch of two views: row i of view 1 for row i of view 2.
pub fn swap_views(x: &Tensor) -> Result<Tensor, SslError> {
    let views = x.f_chunk(2, 0)?;
    Ok(Tensor::f_cat(&[&views[1], &views[0]], 0)?)
}
