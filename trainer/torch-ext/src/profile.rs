//! What ran and for how long, by libtorch's own profiler.

use std::ffi::{CStr, c_char, c_void};

use crate::{TorchError, check, sys};

/// Something that ran. Operators hold those they call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The kernel's or operator's name.
    pub name: String,
    /// When it began, nanoseconds; of one clock within a profile.
    pub start_ns: u64,
    /// How long it took, nanoseconds.
    pub duration_ns: u64,
}

/// Does `work`, and lists what ran meanwhile: on devices (kernels and copies), or this thread's operators. `work` waits for
/// the device before it returns. One profile at a time in a process.
///
/// # Errors
/// That of `work`; when the profiler does not start.
pub fn profile<T, E: From<TorchError>>(
    on_device: bool,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<(T, Vec<Event>), E> {
    // SAFETY: no pointers.
    unsafe { check(sys::mentee_profile_begin(on_device.into())) }?;
    let done = work();
    let mut events: Vec<Event> = Vec::new();
    // SAFETY: `keep` is called within this call only, with the events that live here.
    let ended = unsafe { check(sys::mentee_profile_end(on_device.into(), keep, (&raw mut events).cast())) };
    let done = done?;
    ended?;
    Ok((done, events))
}

unsafe extern "C" fn keep(events: *mut c_void, name: *const c_char, start_ns: u64, duration_ns: u64) {
    // SAFETY: `profile` passes its events, and the shim a NUL-terminated name that lives for this call.
    let (events, name) = unsafe { (&mut *events.cast::<Vec<Event>>(), CStr::from_ptr(name)) };
    events.push(Event { name: name.to_string_lossy().into_owned(), start_ns, duration_ns });
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn operators_are_listed_with_their_times() {
        let (sum, events) = profile(false, || -> Result<_, TorchError> {
            let x = Tensor::ones([200, 200], (Kind::Float, Device::Cpu));
            Ok(x.matmul(&x).sum(Kind::Float).double_value(&[]))
        })
        .unwrap();
        assert_eq!(sum, 200.0 * 200.0 * 200.0);
        let product = events.iter().find(|event| event.name == "aten::mm").expect("a matrix product ran");
        assert!(product.duration_ns > 0 && product.start_ns > 0, "{product:?}");
    }

    #[test]
    fn an_error_within_comes_out_and_the_next_profile_starts() {
        let failed = profile(false, || Err::<(), _>(TorchError("no".into())));
        assert_eq!(failed.unwrap_err().to_string(), "libtorch: no");
        assert!(profile(false, || Ok::<_, TorchError>(())).is_ok());
    }
}
