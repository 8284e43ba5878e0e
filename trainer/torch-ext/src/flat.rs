//! Flat buffers: parameters as views of one contiguous tensor, and updates of ranges of it in one pass over memory.
//!
//! All views of a buffer share one version counter: nothing that changes between a forward pass and its backward may
//! live in a parameter buffer (running statistics have their own).

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::hook::drop_boxed;
use crate::{TorchError, check, sys};

/// A flat buffer of `len` elements at `at`, which lies in memory that `owner` keeps: it is dropped when the last tensor over
/// that memory is.
///
/// # Panics
/// When `kind` is neither f32 nor f64.
///
/// # Safety
/// While `owner` lives there are `len` elements of type `kind` at `at`, aligned, which nobody else uses but by agreement
/// with those who use the tensor.
pub unsafe fn over_memory<T: Send + 'static>(
    at: *mut u8,
    len: i64,
    kind: Kind,
    owner: T,
) -> Result<Tensor, TorchError> {
    assert!(matches!(kind, Kind::Float | Kind::Double), "neither f32 nor f64");
    let is_double = (kind == Kind::Double).into();
    let (mut out, owner) = (std::ptr::null_mut(), Box::into_raw(Box::new(owner)).cast());
    // SAFETY: by this function's contract; the shim owns the box from here on, and `out` receives a tensor that we own.
    unsafe {
        check(sys::mentee_from_memory(at.cast(), len, is_double, owner, drop_boxed::<T>, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// The elements `offset..` of `flat` as a tensor of `shape`. Four-dimensional shapes [O, I, H, W] lie in memory as
/// [O, H, W, I] (channels-last).
pub fn leaf(flat: &Tensor, offset: i64, shape: &[i64], requires_grad: bool) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensors and the shape outlive the call; `out` receives a tensor that we own.
    unsafe {
        check(sys::mentee_leaf(
            flat.as_ptr(),
            offset,
            shape.as_ptr(),
            shape.len() as i64,
            requires_grad.into(),
            &mut out,
        ))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// to ← gradient, or to + gradient when it `adds`, of the same shape: bf16 is widened. Whether all of it is finite then; on devices
/// nobody looks.
pub fn gather(gradient: &Tensor, to: &mut Tensor, adds: bool) -> Result<bool, TorchError> {
    let mut finite = 1;
    // SAFETY: the tensors are distinct and outlive the call, which checks that they fit each other.
    unsafe { check(sys::mentee_gather(gradient.as_ptr(), to.as_mut_ptr(), adds.into(), &mut finite)) }?;
    Ok(finite != 0)
}

/// The tensor's pointer, or null.
fn or_null(tensor: Option<&mut Tensor>) -> *mut torch_sys::C_tensor {
    tensor.map_or(std::ptr::null_mut(), Tensor::as_mut_ptr)
}

/// v ← mu·v + (g + wd·p); p ← p − lr·v, over `range` of the flat buffers (`torch.optim.SGD` without Nesterov). Here and in what
/// follows, `rounded` takes what is updated in bf16, at the same places.
#[expect(clippy::too_many_arguments, reason = "the symbols of one equation")]
pub fn sgd(
    param: &mut Tensor,
    grad: &Tensor,
    momentum: &mut Tensor,
    rounded: Option<&mut Tensor>,
    range: Range<i64>,
    lr: f64,
    mu: f64,
    weight_decay: f64,
) -> Result<(), TorchError> {
    let len = range.end - range.start;
    // SAFETY: the tensors are distinct and outlive the call; the shim checks the range.
    unsafe {
        check(sys::mentee_sgd(
            param.as_mut_ptr(),
            grad.as_ptr(),
            momentum.as_mut_ptr(),
            or_null(rounded),
            range.start,
            len,
            lr,
            mu,
            weight_decay,
        ))
    }
}

/// LARS over `range`, which must be one tensor: u = g + wd·p, scaled by eta·|p|/|u| where both norms are positive;
/// v ← mu·v + u; p ← p − lr·v (arXiv:1708.03888, in the form of DeepMind's `byol/utils/optimizers.py`).
#[expect(clippy::too_many_arguments, reason = "the symbols of one equation")]
pub fn lars(
    param: &mut Tensor,
    grad: &Tensor,
    momentum: &mut Tensor,
    rounded: Option<&mut Tensor>,
    range: Range<i64>,
    lr: f64,
    mu: f64,
    weight_decay: f64,
    eta: f64,
) -> Result<(), TorchError> {
    let len = range.end - range.start;
    // SAFETY: the tensors are distinct and outlive the call; the shim checks the range.
    unsafe {
        check(sys::mentee_lars(
            param.as_mut_ptr(),
            grad.as_ptr(),
            momentum.as_mut_ptr(),
            or_null(rounded),
            range.start,
            len,
            lr,
            mu,
            weight_decay,
            eta,
        ))
    }
}

/// AdamW over `range` (arXiv:1711.05101, algorithm 2); `moments` are the first and second, `step` counts from 1.
#[expect(clippy::too_many_arguments, reason = "the symbols of one equation")]
pub fn adamw(
    param: &mut Tensor,
    grad: &Tensor,
    moments: (&mut Tensor, &mut Tensor),
    rounded: Option<&mut Tensor>,
    range: Range<i64>,
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    step: u64,
) -> Result<(), TorchError> {
    let len = range.end - range.start;
    // SAFETY: the tensors are distinct and outlive the call; the shim checks the range.
    unsafe {
        check(sys::mentee_adamw(
            param.as_mut_ptr(),
            grad.as_ptr(),
            moments.0.as_mut_ptr(),
            moments.1.as_mut_ptr(),
            or_null(rounded),
            range.start,
            len,
            lr,
            betas[0],
            betas[1],
            eps,
            weight_decay,
            step as i64,
        ))
    }
}

/// The parameters of a flat buffer on a device, so that one kernel updates all of them.
#[derive(Debug)]
pub struct UpdateTable {
    chunks: Tensor,
    adapts: bool,
}

/// One trained parameter of an [`UpdateTable`].
#[derive(Debug, Clone)]
pub struct UpdateRange {
    /// Its elements.
    pub range: Range<i64>,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Whether LARS scales its update.
    pub adapts: bool,
    /// Whether it has the predictor's rate.
    pub predictor: bool,
}

/// The rates of one update.
#[derive(Debug, Clone, Copy)]
pub struct UpdateRates {
    /// Learning rate.
    pub lr: f64,
    /// That of the predictor.
    pub predictor_lr: f64,
    /// Of parameters that decay.
    pub weight_decay: f64,
}

impl UpdateTable {
    /// Elements that one block of threads works on.
    const CHUNK: i64 = 8192;

    /// Of these parameters, for buffers on `device`.
    pub fn new(ranges: &[UpdateRange], device: tch::Device) -> Result<Self, TorchError> {
        let mut rows: Vec<i64> = Vec::new();
        for UpdateRange { range, decays, adapts, predictor } in ranges {
            let (first, len) = (rows.len() as i64 / 5, range.end - range.start);
            let count = (len + Self::CHUNK - 1) / Self::CHUNK;
            let flags = i64::from(*decays) | i64::from(*adapts) << 1 | i64::from(*predictor) << 2;
            for chunk in 0..count {
                let begin = range.start + chunk * Self::CHUNK;
                rows.extend([begin, Self::CHUNK.min(range.end - begin), first, count, flags]);
            }
        }
        let failed = |error: tch::TchError| TorchError(error.to_string());
        let chunks = Tensor::f_from_slice(&rows).and_then(|t| t.f_view([-1, 5])).map_err(failed)?;
        Ok(Self {
            chunks: chunks.f_to_device(device).map_err(failed)?,
            adapts: ranges.iter().any(|range| range.adapts),
        })
    }

    /// [`sgd`], or [`lars`] for parameters that adapt, over all of them.
    pub fn momentum(
        &self,
        param: &mut Tensor,
        grad: &Tensor,
        momentum: &mut Tensor,
        rates: UpdateRates,
        mu: f64,
        eta: f64,
    ) -> Result<(), TorchError> {
        let UpdateRates { lr, predictor_lr, weight_decay } = rates;
        // SAFETY: the tensors are distinct and outlive the call; the shim checks that they fit each other, and the table
        // was made for this layout.
        unsafe {
            check(sys::mentee_device_momentum(
                param.as_mut_ptr(),
                grad.as_ptr(),
                momentum.as_mut_ptr(),
                self.chunks.as_ptr(),
                self.adapts.into(),
                lr,
                predictor_lr,
                mu,
                weight_decay,
                eta,
            ))
        }
    }

    /// [`adamw`] over all of them.
    #[expect(clippy::too_many_arguments, reason = "the symbols of one equation")]
    pub fn adamw(
        &self,
        param: &mut Tensor,
        grad: &Tensor,
        moments: (&mut Tensor, &mut Tensor),
        rates: UpdateRates,
        betas: [f64; 2],
        eps: f64,
        step: u64,
    ) -> Result<(), TorchError> {
        let UpdateRates { lr, predictor_lr, weight_decay } = rates;
        // SAFETY: as in `momentum`.
        unsafe {
            check(sys::mentee_device_adamw(
                param.as_mut_ptr(),
                grad.as_ptr(),
                moments.0.as_mut_ptr(),
                moments.1.as_mut_ptr(),
                self.chunks.as_ptr(),
                lr,
                predictor_lr,
                betas[0],
                betas[1],
                eps,
                weight_decay,
                step as i64,
            ))
        }
    }
}

/// teacher ← tau·teacher + (1 − tau)·student over `len` elements at each buffer's own offset; `rounded` has the teacher's.
pub fn ema(
    teacher: &mut Tensor,
    student: &Tensor,
    rounded: Option<&mut Tensor>,
    teacher_begin: i64,
    student_begin: i64,
    len: i64,
    tau: f64,
) -> Result<(), TorchError> {
    // SAFETY: the tensors are distinct and outlive the call; the shim checks the ranges.
    unsafe {
        check(sys::mentee_ema(
            teacher.as_mut_ptr(),
            student.as_ptr(),
            or_null(rounded),
            teacher_begin,
            student_begin,
            len,
            tau,
        ))
    }
}

/// The Euclidean norm of a flat buffer, summed in double.
pub fn norm(flat: &Tensor) -> Result<f64, TorchError> {
    let mut norm = 0.0;
    // SAFETY: the tensor and the result outlive the call.
    unsafe { check(sys::mentee_norm(flat.as_ptr(), &mut norm)) }?;
    Ok(norm)
}

/// A range of a flat buffer.
#[derive(Debug)]
pub enum FlatSlice<'a> {
    /// Of an f32 buffer.
    F32(&'a mut [f32]),
    /// Of an f64 buffer.
    F64(&'a mut [f64]),
}

/// A flat buffer on the CPU of which several threads may use different ranges at a time.
#[derive(Debug)]
pub struct SharedFlat {
    data: *mut std::ffi::c_void,
    kind: Kind,
    len: usize,
    /// Keeps the memory.
    _owner: Tensor,
}

// SAFETY: the memory stays where it is while the tensor lives, and is reached through `range` only, whose callers see
// to it that no two threads use an element at a time.
unsafe impl Send for SharedFlat {}
// SAFETY: as above.
unsafe impl Sync for SharedFlat {}

impl SharedFlat {
    /// The memory of a contiguous f32 or f64 tensor.
    ///
    /// # Panics
    /// On any other tensor.
    pub fn new(flat: &Tensor) -> Self {
        assert!(flat.is_contiguous() && flat.device() == tch::Device::Cpu, "not a flat buffer on the CPU");
        assert!(matches!(flat.kind(), Kind::Float | Kind::Double), "neither f32 nor f64");
        Self { data: flat.data_ptr(), kind: flat.kind(), len: flat.numel(), _owner: flat.shallow_clone() }
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    pub unsafe fn range(&self, range: Range<usize>) -> FlatSlice<'_> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        let len = range.len();
        // SAFETY: in bounds by the check above; exclusive by this function's contract.
        unsafe {
            match self.kind {
                Kind::Double => {
                    let first = self.data.cast::<f64>().add(range.start);
                    FlatSlice::F64(std::slice::from_raw_parts_mut(first, len))
                }
                _ => {
                    let first = self.data.cast::<f32>().add(range.start);
                    FlatSlice::F32(std::slice::from_raw_parts_mut(first, len))
                }
            }
        }
    }
}
