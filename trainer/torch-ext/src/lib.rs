//! What tch does not offer of libtorch: parameters as views of flat buffers, bf16 layers
//! that are fast on processors without bf16, batch normalisation over several ranks
//! and fused with what follows it, and one-pass updates of flat buffers. The only crate with C++.
//!
//! Three levels: `cpp/` (C interface, nothing throws across), `sys` (declarations), and the safe functions here.

mod batch_norm;
pub mod cuda;
mod flat;
mod hook;
mod layers;
mod library;
mod profile;
mod sys;

pub use batch_norm::{
    BatchNormStatistics, DeviceReduce, Norm, Residual, Running, StatReduce, batch_norm_apply,
    batch_norm_train, device_batch_norm_apply, device_batch_norm_pool, device_batch_norm_train,
};
pub use flat::{
    FlatSlice, SharedFlat, UpdateRange, UpdateRates, UpdateTable, adamw, ema, gather, lars, leaf, norm,
    over_memory, sgd,
};
pub use hook::on_gradient;
pub use layers::{conv2d, conv2d_padded, linear};
pub use library::{file_of_libtorch, version_of_libtorch};
pub use profile::{Event as ProfiledEvent, profile};
pub use tch;

/// libtorch refused a call.
#[derive(Debug, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct TorchError(String);

impl TorchError {
    /// In the caller's words, on one line.
    #[must_use]
    pub fn new(what: String) -> Self {
        Self(what)
    }

    fn of(error: tch::TchError) -> Self {
        Self(error.to_string())
    }
}

fn check(code: std::ffi::c_int) -> Result<(), TorchError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string that lives until this thread's next failing call.
    let message = unsafe { std::ffi::CStr::from_ptr(sys::mentee_last_error()) };
    Err(TorchError(message.to_string_lossy().into_owned()))
}

/// Lets the allocator keep what a step frees, so that whole-batch buffers are not mapped and faulted in anew at every
/// step. Call once, before other threads start. A no-op where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_TRIM_THRESHOLD: std::ffi::c_int = -1;
        const M_TOP_PAD: std::ffi::c_int = -2;
        const M_MMAP_MAX: std::ffi::c_int = -4;
        // SAFETY: mallopt only changes allocator settings; it is called before other threads allocate.
        unsafe {
            sys::mallopt(M_MMAP_MAX, 0);
            sys::mallopt(M_TRIM_THRESHOLD, std::ffi::c_int::MAX);
            sys::mallopt(M_TOP_PAD, 64 << 20);
        }
    }
}

/// Lets tensors of 2 MiB and more lie in huge pages, where the system gives them to those who ask (`madvise`): kernels that go
/// through many places of a tensor side by side miss fewer addresses, and take the same time in every process. Call once, before
/// other threads start and before the first tensor; `THP_MEM_ALLOC_ENABLE` of the environment is respected.
pub fn use_huge_pages() {
    const VARIABLE: &str = "THP_MEM_ALLOC_ENABLE";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: no other thread runs yet that could read the environment.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}
