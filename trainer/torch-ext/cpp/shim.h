// The C interface between mentee's Rust and libtorch: what tch does not offer.
// Every function returns 0, or 1 after storing a message for mentee_last_error (per thread). Nothing throws across.
#pragma once
#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

extern "C" {

// All-reduces n doubles in place (sum over ranks). Not 0: failed; the caller then throws.
typedef int (*mentee_reduce_fn)(void* context, double* values, int64_t n);
typedef void (*mentee_drop_fn)(void* context);

const char* mentee_last_error();

// How the libtorch that is loaded was built, in its own words; lives as long as the process.
const char* mentee_torch_config();

// See profile.cpp; times in nanoseconds.
typedef void (*mentee_profiled_fn)(void* context, const char* name, uint64_t start, uint64_t duration);
int mentee_profile_begin(int on_device);
int mentee_profile_end(int on_device, mentee_profiled_fn each, void* context);

// A tensor of f32 (or f64) of one dimension over memory of somebody else's; `drop` is called when the last tensor over it is gone.
int mentee_from_memory(void* data, int64_t len, int is_double, void* context, mentee_drop_fn drop, at::Tensor** out);
// A view of `flat` at `offset` with `shape`; 4-d shapes lie in memory as channels-last (O, H, W, I).
int mentee_leaf(const at::Tensor* flat, int64_t offset, const int64_t* shape, int64_t ndim, int requires_grad,
                at::Tensor** out);

// Calls `take` with the gradient of `leaf` whenever a backward pass has added its last contribution to it, on the thread that
// runs that pass; the leaf keeps none. Not 0: failed; the pass then throws. One hook a leaf: a second replaces the first.
typedef int (*mentee_take_fn)(void* context, at::Tensor* gradient);
int mentee_on_gradient(at::Tensor* leaf, mentee_take_fn take, void* context, mentee_drop_fn drop);

// See layers.cpp.
int mentee_conv2d(const at::Tensor* x, const at::Tensor* weight, int64_t stride, int64_t padding, at::Tensor** out);
// As a device computes it for few channels.
int mentee_conv2d_padded(const at::Tensor* x, const at::Tensor* weight, int64_t stride, int64_t padding, at::Tensor** out);
int mentee_linear(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias, at::Tensor** out);

// See batch_norm.cpp. The callback's context is dropped with the last node that needs it.
int mentee_batch_norm_train(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                            const at::Tensor* residual, int64_t groups, double eps, int relu, mentee_reduce_fn reduce,
                            void* context, mentee_drop_fn drop, double* mean, double* variance, double* count,
                            at::Tensor** out);
int mentee_batch_norm_apply(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                            const at::Tensor* residual, const double* mean, const double* variance, double eps, int relu,
                            at::Tensor** out);

// See update.cpp. `rounded` may be null: in bf16, with the same places as what is updated.
int mentee_gather(const at::Tensor* gradient, at::Tensor* to, int adds, int* finite);
int mentee_sgd(at::Tensor* param, const at::Tensor* grad, at::Tensor* momentum, at::Tensor* rounded, int64_t begin, int64_t len,
               double lr, double mu, double weight_decay);
int mentee_lars(at::Tensor* param, const at::Tensor* grad, at::Tensor* momentum, at::Tensor* rounded, int64_t begin, int64_t len,
                double lr, double mu, double weight_decay, double eta);
int mentee_adamw(at::Tensor* param, const at::Tensor* grad, at::Tensor* first, at::Tensor* second, at::Tensor* rounded,
                 int64_t begin, int64_t len, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step);
int mentee_ema(at::Tensor* teacher, const at::Tensor* student, at::Tensor* rounded, int64_t teacher_begin, int64_t student_begin,
               int64_t len, double tau);
int mentee_norm(const at::Tensor* flat, double* norm);

// See device_norm.cpp. All-reduces n doubles on the device in place, in the order of `stream` (a cudaStream_t).
typedef int (*mentee_device_reduce_fn)(void* context, void* values, int64_t n, void* stream);
// See launch.cpp. `source` is kernels.cu and views.cu and must live as long as the process; `nvrtc` the file to open.
int mentee_device_start(const char* source, const char* nvrtc);
// Size of the machine code of one part for an architecture; needs no device.
int mentee_device_compile(const char* part, const char* architecture, int64_t* bytes);
// See device.cpp.
int mentee_device_use(int device, int autotune, int tf32);
int mentee_device_batch_norm_train(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                                   const at::Tensor* residual, const at::Tensor* residual_weight,
                                   const at::Tensor* residual_bias, const at::Tensor* running,
                                   const at::Tensor* residual_running, int64_t groups, double eps, double momentum, int relu,
                                   mentee_device_reduce_fn reduce, void* context, mentee_drop_fn drop, at::Tensor** out,
                                   at::Tensor** twin);
int mentee_device_batch_norm_pool(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                                  const at::Tensor* running, int64_t groups, double eps, double momentum,
                                  mentee_device_reduce_fn reduce, void* context, mentee_drop_fn drop, at::Tensor** out);
int mentee_device_batch_norm_apply(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                                   const at::Tensor* residual, const at::Tensor* running, double eps, int relu,
                                   at::Tensor** out);
int mentee_device_momentum(at::Tensor* param, const at::Tensor* grad, at::Tensor* momentum, const at::Tensor* table,
                           int adapts, double lr, double predictor_lr, double mu, double weight_decay, double eta);
int mentee_device_adamw(at::Tensor* param, const at::Tensor* grad, at::Tensor* first, at::Tensor* second,
                        const at::Tensor* table, double lr, double predictor_lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step);
// Lets devices copy from host memory directly, until mentee_unpin with the same context; a device is this thread's. See launch.cpp.
int mentee_pin(void* memory, int64_t bytes, void** context);
void mentee_unpin(void* memory, void* context);
// See device_views.cpp. `normalise`: mean and 1/std; `scratch`: as many bytes as ..._room says; `out`: [views, side, side, 3].
int mentee_device_views_room(int device, int64_t pixels, int64_t views, int64_t side, int64_t widest, int64_t* scratch);
int mentee_device_views(const at::Tensor* images, const at::Tensor* words, int64_t widest, const float* normalise,
                        at::Tensor* scratch, at::Tensor* out);
int mentee_stream_new(int device, int64_t* id);
int mentee_stream_use(int device, int64_t id, int64_t* previous);
int mentee_stream_synchronise(int device, int64_t id);
int mentee_stream_current(int device, int64_t* id, void** handle);
int mentee_event_record(void** event, int device, int64_t stream);
int mentee_event_block(void* event, int device, int64_t stream);
int mentee_event_query(void* event, int* complete);
void mentee_event_drop(void* event, int device);
int mentee_graph_found();
int mentee_graph_begin(int device, void** graph);
int mentee_graph_end(void* graph);
int mentee_graph_launch(void* graph);
void mentee_graph_drop(void* graph);
int mentee_device_synchronise(int device);
int mentee_device_peak(int device, int64_t* bytes);
}

namespace mentee {
void set_last_error(const char* message);

template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    set_last_error(error.what());
  } catch (...) {
    set_last_error("an unknown C++ exception");
  }
  return 1;
}
}  // namespace mentee

// Compiles a function once for each x86-64 level and picks one at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MENTEE_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MENTEE_MULTIVERSION
#endif
#define MENTEE_INLINE inline __attribute__((always_inline))
