//! Declarations of `cpp/shim.h`.

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

pub type ReduceFn = unsafe extern "C" fn(*mut c_void, *mut f64, i64) -> c_int;
pub type TakeFn = unsafe extern "C" fn(*mut c_void, *mut C_tensor) -> c_int;
pub type DeviceReduceFn = unsafe extern "C" fn(*mut c_void, *mut c_void, i64, *mut c_void) -> c_int;
pub type DropFn = unsafe extern "C" fn(*mut c_void);
pub type ProfiledFn = unsafe extern "C" fn(*mut c_void, *const c_char, u64, u64);

unsafe extern "C" {
    pub fn mentee_last_error() -> *const c_char;
    pub fn mentee_torch_config() -> *const c_char;
    pub fn mentee_profile_begin(on_device: c_int) -> c_int;
    pub fn mentee_profile_end(on_device: c_int, each: ProfiledFn, context: *mut c_void) -> c_int;
    pub fn mentee_from_memory(
        data: *mut c_void,
        len: i64,
        is_double: c_int,
        context: *mut c_void,
        drop: DropFn,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_leaf(
        flat: *const C_tensor,
        offset: i64,
        shape: *const i64,
        ndim: i64,
        requires_grad: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_on_gradient(leaf: *mut C_tensor, take: TakeFn, context: *mut c_void, drop: DropFn)
    -> c_int;
    pub fn mentee_conv2d(
        x: *const C_tensor,
        weight: *const C_tensor,
        stride: i64,
        padding: i64,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_conv2d_padded(
        x: *const C_tensor,
        weight: *const C_tensor,
        stride: i64,
        padding: i64,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_batch_norm_train(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        residual: *const C_tensor,
        groups: i64,
        eps: f64,
        relu: c_int,
        reduce: Option<ReduceFn>,
        context: *mut c_void,
        drop: Option<DropFn>,
        mean: *mut f64,
        variance: *mut f64,
        count: *mut f64,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_batch_norm_apply(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        residual: *const C_tensor,
        mean: *const f64,
        variance: *const f64,
        eps: f64,
        relu: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_gather(
        gradient: *const C_tensor,
        to: *mut C_tensor,
        adds: c_int,
        finite: *mut c_int,
    ) -> c_int;
    pub fn mentee_sgd(
        param: *mut C_tensor,
        grad: *const C_tensor,
        momentum: *mut C_tensor,
        rounded: *mut C_tensor,
        begin: i64,
        len: i64,
        lr: f64,
        mu: f64,
        weight_decay: f64,
    ) -> c_int;
    pub fn mentee_lars(
        param: *mut C_tensor,
        grad: *const C_tensor,
        momentum: *mut C_tensor,
        rounded: *mut C_tensor,
        begin: i64,
        len: i64,
        lr: f64,
        mu: f64,
        weight_decay: f64,
        eta: f64,
    ) -> c_int;
    pub fn mentee_adamw(
        param: *mut C_tensor,
        grad: *const C_tensor,
        first: *mut C_tensor,
        second: *mut C_tensor,
        rounded: *mut C_tensor,
        begin: i64,
        len: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: i64,
    ) -> c_int;
    pub fn mentee_ema(
        teacher: *mut C_tensor,
        student: *const C_tensor,
        rounded: *mut C_tensor,
        teacher_begin: i64,
        student_begin: i64,
        len: i64,
        tau: f64,
    ) -> c_int;
    pub fn mentee_norm(flat: *const C_tensor, norm: *mut f64) -> c_int;

    pub fn mentee_device_start(source: *const c_char, nvrtc: *const c_char) -> c_int;
    pub fn mentee_device_compile(part: *const c_char, architecture: *const c_char, bytes: *mut i64) -> c_int;
    pub fn mentee_device_use(device: c_int, autotune: c_int, tf32: c_int) -> c_int;
    pub fn mentee_device_capability(device: c_int, major: *mut c_int, minor: *mut c_int) -> c_int;
    pub fn mentee_device_slot(device: c_int, slot: *mut c_int) -> c_int;
    pub fn mentee_pin(memory: *mut c_void, bytes: i64, context: *mut *mut c_void) -> c_int;
    pub fn mentee_unpin(memory: *mut c_void, context: *mut c_void);
    pub fn mentee_device_views_room(
        device: c_int,
        pixels: i64,
        views: i64,
        side: i64,
        widest: i64,
        scratch: *mut i64,
    ) -> c_int;
    pub fn mentee_device_views(
        images: *const C_tensor,
        words: *const C_tensor,
        widest: i64,
        normalise: *const f32,
        scratch: *mut C_tensor,
        out: *mut C_tensor,
    ) -> c_int;
    pub fn mentee_device_batch_norm_train(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        residual: *const C_tensor,
        residual_weight: *const C_tensor,
        residual_bias: *const C_tensor,
        running: *const C_tensor,
        residual_running: *const C_tensor,
        groups: i64,
        eps: f64,
        momentum: f64,
        relu: c_int,
        reduce: Option<DeviceReduceFn>,
        context: *mut c_void,
        drop: Option<DropFn>,
        out: *mut *mut C_tensor,
        twin: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_device_batch_norm_pool(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        running: *const C_tensor,
        groups: i64,
        eps: f64,
        momentum: f64,
        reduce: Option<DeviceReduceFn>,
        context: *mut c_void,
        drop: Option<DropFn>,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_device_batch_norm_apply(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        residual: *const C_tensor,
        running: *const C_tensor,
        eps: f64,
        relu: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn mentee_device_momentum(
        param: *mut C_tensor,
        grad: *const C_tensor,
        momentum: *mut C_tensor,
        table: *const C_tensor,
        adapts: c_int,
        lr: f64,
        predictor_lr: f64,
        mu: f64,
        weight_decay: f64,
        eta: f64,
    ) -> c_int;
    pub fn mentee_device_adamw(
        param: *mut C_tensor,
        grad: *const C_tensor,
        first: *mut C_tensor,
        second: *mut C_tensor,
        table: *const C_tensor,
        lr: f64,
        predictor_lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: i64,
    ) -> c_int;
    pub fn mentee_stream_new(device: c_int, id: *mut i64) -> c_int;
    pub fn mentee_stream_use(device: c_int, id: i64, previous: *mut i64) -> c_int;
    pub fn mentee_stream_synchronise(device: c_int, id: i64) -> c_int;
    pub fn mentee_stream_current(device: c_int, id: *mut i64, handle: *mut *mut c_void) -> c_int;
    pub fn mentee_event_record(event: *mut *mut c_void, device: c_int, stream: i64) -> c_int;
    pub fn mentee_event_block(event: *mut c_void, device: c_int, stream: i64) -> c_int;
    pub fn mentee_event_query(event: *mut c_void, complete: *mut c_int) -> c_int;
    pub fn mentee_event_drop(event: *mut c_void, device: c_int);
    pub fn mentee_graph_found() -> c_int;
    pub fn mentee_graph_begin(device: c_int, graph: *mut *mut c_void) -> c_int;
    pub fn mentee_graph_end(graph: *mut c_void) -> c_int;
    pub fn mentee_graph_launch(graph: *mut c_void) -> c_int;
    pub fn mentee_graph_drop(graph: *mut c_void);
    pub fn mentee_device_synchronise(device: c_int) -> c_int;
    pub fn mentee_device_peak(device: c_int, bytes: *mut i64) -> c_int;

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    pub fn mallopt(parameter: c_int, value: c_int) -> c_int;
}
