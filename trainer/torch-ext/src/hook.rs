//! What happens when a gradient is complete, while the backward pass goes on.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use crate::{TorchError, check, sys};

/// Called when a gradient is complete; `false` ends the backward pass with an error.
pub type Ready = Box<dyn Fn() -> bool + Send + Sync>;

unsafe extern "C" fn call_ready(context: *mut c_void) -> c_int {
    // SAFETY: `context` is the boxed closure handed to the shim, alive until it is dropped.
    let ready = unsafe { &*context.cast::<Ready>() };
    // A panic must not unwind into C++.
    match catch_unwind(AssertUnwindSafe(ready)) {
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

/// Calls `ready` in every backward pass that reaches `leaf`, once, after the last contribution to its gradient was
/// added. It runs on the thread that called backward; leaves follow each other about in the reverse order of their
/// use. A second call replaces the first.
pub fn on_gradient(leaf: &mut Tensor, ready: Ready) -> Result<(), TorchError> {
    let context = Box::into_raw(Box::new(ready)).cast();
    // SAFETY: the leaf outlives the call; the shim owns `context` from here on and drops it once.
    unsafe { check(sys::mentee_on_gradient(leaf.as_mut_ptr(), call_ready, context, drop_boxed::<Ready>)) }
}
