//! Convolution and linear layer, in bf16 also where the processor has no bf16 arithmetic (`cpp/layers.cpp`).

use tch::Tensor;

use crate::{TorchError, check, sys};

/// `torch.nn.functional.conv2d` without bias: x [N, C, H, W], weight [C', C, k, k], the same stride and padding in both
/// directions. Differentiable.
///
/// # Errors
/// [`TorchError`] when shapes or types do not fit.
pub fn conv2d(x: &Tensor, weight: &Tensor, stride: i64, padding: i64) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both tensors outlive the call; `out` is set when it succeeds, and is ours.
    unsafe {
        check(sys::mentee_conv2d(x.as_ptr(), weight.as_ptr(), stride, padding, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// [`conv2d`] as a device computes it for fewer than eight channels: for tests.
#[doc(hidden)]
pub fn conv2d_padded(x: &Tensor, weight: &Tensor, stride: i64, padding: i64) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as in `conv2d`.
    unsafe {
        check(sys::mentee_conv2d_padded(x.as_ptr(), weight.as_ptr(), stride, padding, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// `torch.nn.functional.linear`: x [N, in], weight [out, in], bias [out]. Differentiable.
///
/// # Errors
/// [`TorchError`] when shapes or types do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TorchError> {
    let bias = bias.map_or(std::ptr::null(), |bias| bias.as_ptr());
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call; `out` is set when it succeeds, and is ours.
    unsafe {
        check(sys::mentee_linear(x.as_ptr(), weight.as_ptr(), bias, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}
