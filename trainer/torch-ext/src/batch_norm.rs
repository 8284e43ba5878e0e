//! Batch normalisation fused with the residual add and ReLU behind it, its statistics per view and over all ranks.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tch::Tensor;

use crate::hook::drop_boxed;
use crate::{TorchError, check, sys};

/// Sums a buffer over all ranks in place; `false` when that failed (the pass then ends with an error). Called on
/// the thread that runs forward or backward, once a layer in each direction.
pub type StatReduce = Arc<dyn Fn(&mut [f64]) -> bool + Send + Sync>;

/// The parameters of one normalisation layer.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// [C] each, or none for a layer without scale and offset.
    pub affine: Option<(&'a Tensor, &'a Tensor)>,
    /// Added to the variance.
    pub eps: f64,
    /// Whether a ReLU follows.
    pub relu: bool,
}

/// Statistics of one training batch over all ranks.
#[derive(Debug, Clone)]
pub struct BatchNormStatistics {
    /// [G][C]: the mean of every channel in every view.
    pub mean: Vec<f64>,
    /// [G][C]: the biased variance.
    pub variance: Vec<f64>,
    /// [G]: how many values each mean is over.
    pub count: Vec<f64>,
}

unsafe extern "C" fn call_reduce(context: *mut c_void, values: *mut f64, n: i64) -> c_int {
    // SAFETY: `context` is the boxed StatReduce handed to the shim, alive until it is dropped; values holds n doubles.
    let (reduce, values) = unsafe {
        (
            &*context.cast::<StatReduce>(),
            std::slice::from_raw_parts_mut(values, usize::try_from(n).unwrap_or(0)),
        )
    };
    // A panic must not unwind into C++.
    match catch_unwind(AssertUnwindSafe(|| reduce(values))) {
        Ok(true) => 0,
        Ok(false) | Err(_) => 1,
    }
}

/// A copy of the closure for the shim, and what frees it: called once, when the last node that needs it is gone.
fn context_of<T: Clone>(reduce: Option<&T>) -> (*mut c_void, Option<sys::DropFn>) {
    match reduce {
        Some(reduce) => (Box::into_raw(Box::new(reduce.clone())).cast(), Some(drop_boxed::<T>)),
        None => (std::ptr::null_mut(), None),
    }
}

fn pointer(tensor: Option<&Tensor>) -> *const torch_sys::C_tensor {
    tensor.map_or(std::ptr::null(), |t| t.as_ptr())
}

/// act(norm(x) + residual) with the statistics of this batch: x is [N, C, H, W] (channels-last) or [N, C], `groups`
/// the number of views stacked along N, each with its own statistics. Differentiable in x, the affine parameters and
/// the residual. Gradients of the affine parameters are this rank's share; those of x account for all ranks.
pub fn batch_norm_train(
    x: &Tensor,
    norm: Norm,
    residual: Option<&Tensor>,
    groups: i64,
    reduce: Option<&StatReduce>,
) -> Result<(Tensor, BatchNormStatistics), TorchError> {
    let (groups_len, channels) = (groups as usize, x.size()[1] as usize);
    let mut statistics = BatchNormStatistics {
        mean: vec![0.0; groups_len * channels],
        variance: vec![0.0; groups_len * channels],
        count: vec![0.0; groups_len],
    };
    let call: Option<sys::ReduceFn> = reduce.map(|_| call_reduce as _);
    let (context, drop) = context_of(reduce);
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call; the statistics hold G*C, G*C and G doubles; the shim owns `context` from
    // here on and drops it once.
    unsafe {
        check(sys::mentee_batch_norm_train(
            x.as_ptr(),
            pointer(norm.affine.map(|a| a.0)),
            pointer(norm.affine.map(|a| a.1)),
            pointer(residual),
            groups,
            norm.eps,
            norm.relu.into(),
            call,
            context,
            drop,
            statistics.mean.as_mut_ptr(),
            statistics.variance.as_mut_ptr(),
            statistics.count.as_mut_ptr(),
            &mut out,
        ))?;
        Ok((Tensor::from_ptr(out), statistics))
    }
}

/// act(norm(x) + residual) with given statistics ([C] each), without a graph.
pub fn batch_norm_apply(
    x: &Tensor,
    norm: Norm,
    residual: Option<&Tensor>,
    mean: &[f64],
    variance: &[f64],
) -> Result<Tensor, TorchError> {
    let channels = x.size()[1] as usize;
    assert!(mean.len() == channels && variance.len() == channels, "statistics of another layer");
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call; mean and variance hold C doubles.
    unsafe {
        check(sys::mentee_batch_norm_apply(
            x.as_ptr(),
            pointer(norm.affine.map(|a| a.0)),
            pointer(norm.affine.map(|a| a.1)),
            pointer(residual),
            mean.as_ptr(),
            variance.as_ptr(),
            norm.eps,
            norm.relu.into(),
            &mut out,
        ))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Sums `n` doubles at a device address over all ranks, in place, in the order of a `cudaStream_t`; `false` when it could not be
/// put there.
pub type DeviceReduce = Arc<dyn Fn(*mut c_void, usize, *mut c_void) -> bool + Send + Sync>;

unsafe extern "C" fn call_device_reduce(
    context: *mut c_void,
    values: *mut c_void,
    n: i64,
    stream: *mut c_void,
) -> c_int {
    // SAFETY: `context` is the boxed DeviceReduce handed to the shim, alive until it is dropped.
    let reduce = unsafe { &*context.cast::<DeviceReduce>() };
    let n = usize::try_from(n).unwrap_or(0);
    // A panic must not unwind into C++.
    match catch_unwind(AssertUnwindSafe(|| reduce(values, n, stream))) {
        Ok(true) => 0,
        Ok(false) | Err(_) => 1,
    }
}

/// The running statistics of one layer on a device.
#[derive(Clone, Copy)]
pub struct Running<'a> {
    /// [2][C] doubles: means and unbiased variances.
    pub values: &'a Tensor,
    /// How far they move towards a batch's, view by view.
    pub momentum: f64,
}

/// What is added to a normalised activation.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    /// Of the activation's shape and type.
    pub x: &'a Tensor,
    /// Its own scale, offset and running statistics, if it is to be normalised before.
    pub norm: Option<(Norm<'a>, Running<'a>)>,
}

/// [`batch_norm_train`] on a device: the statistics stay there. Behind a residual block (a residual and a ReLU) the output
/// comes twice in the same memory: gradients of the two ways it goes need not be added before. Epsilon and momentum of a
/// residual's own norm are the same.
pub fn device_batch_norm_train(
    x: &Tensor,
    norm: Norm,
    residual: Option<Residual>,
    running: Running,
    groups: i64,
    reduce: Option<&DeviceReduce>,
) -> Result<(Tensor, Option<Tensor>), TorchError> {
    let call: Option<sys::DeviceReduceFn> = reduce.map(|_| call_device_reduce as _);
    let (context, drop) = context_of(reduce);
    let (mut out, mut twin) = (std::ptr::null_mut(), std::ptr::null_mut());
    let goes_two_ways = residual.is_some() && norm.relu;
    let around = residual.and_then(|residual| residual.norm);
    let around_affine = around.and_then(|(norm, _)| norm.affine);
    // SAFETY: all tensors outlive the call; the shim checks `running` and owns `context` from here on.
    unsafe {
        check(sys::mentee_device_batch_norm_train(
            x.as_ptr(),
            pointer(norm.affine.map(|a| a.0)),
            pointer(norm.affine.map(|a| a.1)),
            pointer(residual.map(|residual| residual.x)),
            pointer(around_affine.map(|a| a.0)),
            pointer(around_affine.map(|a| a.1)),
            running.values.as_ptr(),
            pointer(around.map(|(_, running)| running.values)),
            groups,
            norm.eps,
            running.momentum,
            norm.relu.into(),
            call,
            context,
            drop,
            &mut out,
            if goes_two_ways { &mut twin } else { std::ptr::null_mut() },
        ))?;
        Ok((Tensor::from_ptr(out), goes_two_ways.then(|| Tensor::from_ptr(twin))))
    }
}

/// max_pool(relu(norm(x))) on a device with the statistics of this batch: windows of 3x3, two apart, padded by one.
pub fn device_batch_norm_pool(
    x: &Tensor,
    norm: Norm,
    running: Running,
    groups: i64,
    reduce: Option<&DeviceReduce>,
) -> Result<Tensor, TorchError> {
    let call: Option<sys::DeviceReduceFn> = reduce.map(|_| call_device_reduce as _);
    let (context, drop) = context_of(reduce);
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call; the shim checks `running` and owns `context` from here on.
    unsafe {
        check(sys::mentee_device_batch_norm_pool(
            x.as_ptr(),
            pointer(norm.affine.map(|a| a.0)),
            pointer(norm.affine.map(|a| a.1)),
            running.values.as_ptr(),
            groups,
            norm.eps,
            running.momentum,
            call,
            context,
            drop,
            &mut out,
        ))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// [`batch_norm_apply`] on a device, with running statistics as [`device_batch_norm_train`] keeps them.
pub fn device_batch_norm_apply(
    x: &Tensor,
    norm: Norm,
    residual: Option<&Tensor>,
    running: &Tensor,
) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call.
    unsafe {
        check(sys::mentee_device_batch_norm_apply(
            x.as_ptr(),
            pointer(norm.affine.map(|a| a.0)),
            pointer(norm.affine.map(|a| a.1)),
            pointer(residual),
            running.as_ptr(),
            norm.eps,
            norm.relu.into(),
            &mut out,
        ))?;
        Ok(Tensor::from_ptr(out))
    }
}
