//! What becomes of a gradient when it is complete, while the backward pass goes on.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::{TorchError, check, sys};

/// Called with a gradient when it is complete; `false` ends the backward pass with an error.
pub type Take = Box<dyn Fn(&Tensor) -> bool + Send + Sync>;

unsafe extern "C" fn call_take(context: *mut c_void, gradient: *mut C_tensor) -> c_int {
    // SAFETY: `context` is the boxed closure handed to the shim, alive until it is dropped.
    let take = unsafe { &*context.cast::<Take>() };
    // SAFETY: the shim's own, alive during the call.
    let gradient = ManuallyDrop::new(unsafe { Tensor::from_ptr(gradient) });
    // A panic must not unwind into C++.
    match catch_unwind(AssertUnwindSafe(|| take(&gradient))) {
        Ok(true) => 0,
        Ok(false) | Err(_) => 1,
    }
}

/// Frees what was handed to the shim as `Box<T>`.
///
/// # Safety
/// `context` is from `Box::into_raw` of a `Box<T>`; called once.
pub(crate) unsafe extern "C" fn drop_boxed<T>(context: *mut c_void) {
    // SAFETY: by this function's contract.
    drop(unsafe { Box::from_raw(context.cast::<T>()) });
}

/// Calls `take` in every backward pass that reaches `leaf`, once, with its gradient after the last contribution; the leaf keeps
/// none. It runs on the thread that called backward, or a device's own; leaves follow each other about in the reverse order of
/// their use. A second call replaces the first.
pub fn on_gradient(leaf: &mut Tensor, take: Take) -> Result<(), TorchError> {
    let context = Box::into_raw(Box::new(take)).cast();
    // SAFETY: the leaf outlives the call; the shim owns `context` from here on and drops it once.
    unsafe { check(sys::mentee_on_gradient(leaf.as_mut_ptr(), call_take, context, drop_boxed::<Take>)) }
}
