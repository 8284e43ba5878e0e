// Devices: updates of flat buffers by the kernels of kernels.cu, and libtorch's streams, events and graphs.

#include "device.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "launch.h"

namespace {

using namespace mentee::device;
using c10::Device;
using c10::Stream;
using c10::impl::VirtualGuardImpl;

void* range(const Tensor& flat, int64_t begin, int64_t len) {
  TORCH_CHECK(flat.dim() == 1 && flat.is_contiguous(), "a flat buffer is one contiguous dimension, not ", flat.sizes());
  TORCH_CHECK(begin >= 0 && len >= 0 && begin + len <= flat.numel(), "range ", begin, "+", len, " of a buffer of ",
              flat.numel());
  return static_cast<char*>(flat.unsafeGetTensorImpl()->mutable_data()) + begin * flat.element_size();
}

void check_flat(const Tensor& param, std::initializer_list<const Tensor*> others) {
  range(param, 0, param.numel());
  for (const Tensor* other : others) {
    TORCH_CHECK(other->sizes() == param.sizes() && other->scalar_type() == param.scalar_type() &&
                    other->device() == param.device() && other->is_contiguous(),
                "flat buffers of different sizes, types or devices");
  }
}

// at::cuda::CUDAGraph, whose header wants CUDA's own: the functions that libtorch's CUDA part exports, by their names, on memory
// of our own. Of exactly this libtorch, as everything here is.
struct GraphFunctions {
  typedef std::pair<unsigned long long, unsigned long long> Pool;
  void (*construct)(void*, bool) = nullptr;
  void (*destroy)(void*) = nullptr;
  void (*begin)(void*, Pool, int) = nullptr;
  void (*end)(void*) = nullptr;
  void (*replay)(void*) = nullptr;
  bool found = false;

  static const GraphFunctions& get() {
    static const GraphFunctions functions = [] {
      GraphFunctions f;
      auto find = [](auto& to, const char* name) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(RTLD_DEFAULT, name));
        return to != nullptr;
      };
      const bool all[] = {
          find(f.construct, "_ZN2at4cuda9CUDAGraphC1Eb"),
          find(f.destroy, "_ZN2at4cuda9CUDAGraphD1Ev"),
          find(f.begin, "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode"),
          find(f.end, "_ZN2at4cuda9CUDAGraph11capture_endEv"),
          find(f.replay, "_ZN2at4cuda9CUDAGraph6replayEv"),
      };
      f.found = std::all_of(std::begin(all), std::end(all), [](bool it) { return it; });
      return f;
    }();
    return functions;
  }
};

constexpr int kThreadLocal = 1;  // cudaStreamCaptureModeThreadLocal: other threads go on as they like

// Several times what a CUDAGraph takes.
struct alignas(64) Graph {
  int device;
  alignas(64) unsigned char memory[4096];
};

Stream stream_of(int device, int64_t id) { return Stream(Stream::UNSAFE, Device(at::kCUDA, device), id); }

}  // namespace

namespace mentee::device {

void ema(Tensor& teacher, const Tensor& student, int64_t teacher_begin, int64_t student_begin, int64_t len, double tau) {
  const c10::DeviceGuard guard(teacher.device());
  TORCH_CHECK(teacher.scalar_type() == student.scalar_type(), "flat buffers of different types");
  if (len == 0) return;
  launch(teacher, "flat", "ema_" + name_of(teacher), {std::min<int64_t>((len + 255) / 256, 4096), 1, 1}, {256, 1, 1}, 0,
         range(teacher, teacher_begin, len), range(student, student_begin, len), len, tau);
}

Tensor square_norm(const Tensor& flat) {
  const c10::DeviceGuard guard(flat.device());
  Tensor partial = at::empty({1024}, flat.options().dtype(at::kDouble));
  launch(flat, "flat", "squares_" + name_of(flat), {1024, 1, 1}, {256, 1, 1}, 0, range(flat, 0, flat.numel()),
         flat.numel(), partial.mutable_data_ptr());
  return partial.sum();
}

}  // namespace mentee::device

extern "C" {

int mentee_device_use(int device, int autotune, int tf32) {
  return mentee::guarded([&] {
    VirtualGuardImpl(at::kCUDA).setDevice(Device(at::kCUDA, device));
    bind(device);
    at::globalContext().setBenchmarkCuDNN(autotune != 0);
    // Who does not look for the fastest algorithm has one that gives the same bits every time.
    at::globalContext().setDeterministicCuDNN(autotune == 0);
    at::globalContext().setAllowTF32CuDNN(tf32 != 0);
    at::globalContext().setAllowTF32CuBLAS(tf32 != 0);
  });
}

// One kernel over the whole buffer; `table` is [chunks, 5] of i64, see kernels.cu. `adapts`: some parameter does.
int mentee_device_momentum(Tensor* param, const Tensor* grad, Tensor* momentum, const Tensor* table, int adapts, double lr,
                           double predictor_lr, double mu, double weight_decay, double eta) {
  return mentee::guarded([&] {
    const c10::DeviceGuard guard(param->device());
    check_flat(*param, {grad, momentum});
    const int64_t chunks = table->size(0);
    const auto kind = name_of(*param);
    Tensor partial = at::empty({2 * chunks}, param->options().dtype(at::kDouble));
    if (adapts) {
      launch(*param, "flat", "chunk_norms_" + kind, {chunks, 1, 1}, {256, 1, 1}, 0, pointer(*param), pointer(*grad),
             pointer(*table), weight_decay, partial.mutable_data_ptr());
    }
    launch(*param, "flat", "momentum_" + kind, {chunks, 1, 1}, {256, 1, 1}, 0, range(*param, 0, param->numel()),
           pointer(*grad), range(*momentum, 0, momentum->numel()), pointer(*table), pointer(partial), lr, predictor_lr, mu,
           weight_decay, eta);
  });
}

int mentee_device_adamw(Tensor* param, const Tensor* grad, Tensor* first, Tensor* second, const Tensor* table, double lr,
                        double predictor_lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  return mentee::guarded([&] {
    const c10::DeviceGuard guard(param->device());
    check_flat(*param, {grad, first, second});
    launch(*param, "flat", "adamw_" + name_of(*param), {table->size(0), 1, 1}, {256, 1, 1}, 0,
           range(*param, 0, param->numel()), pointer(*grad), range(*first, 0, first->numel()),
           range(*second, 0, second->numel()), pointer(*table), lr, predictor_lr, beta1, beta2, eps, weight_decay,
           1 - std::pow(beta1, step), 1 - std::pow(beta2, step));
  });
}

// A stream of its own, from libtorch's pool.
int mentee_stream_new(int device, int64_t* id) {
  return mentee::guarded([&] { *id = VirtualGuardImpl(at::kCUDA).getNewStream(Device(at::kCUDA, device)).id(); });
}

// What this thread does from now on goes there; `previous` is where it went.
int mentee_stream_use(int device, int64_t id, int64_t* previous) {
  return mentee::guarded([&] {
    const VirtualGuardImpl guard(at::kCUDA);
    guard.setDevice(Device(at::kCUDA, device));
    *previous = guard.exchangeStream(stream_of(device, id)).id();
  });
}

int mentee_stream_synchronise(int device, int64_t id) {
  return mentee::guarded([&] { VirtualGuardImpl(at::kCUDA).synchronizeStream(stream_of(device, id)); });
}

// The stream this thread's work goes to: libtorch's name for it, and CUDA's.
int mentee_stream_current(int device, int64_t* id, void** handle) {
  return mentee::guarded([&] {
    *id = VirtualGuardImpl(at::kCUDA).getStream(Device(at::kCUDA, device)).id();
    *handle = current_stream(device);
  });
}

// An event behind everything that is on the stream by now; recording again moves it.
int mentee_event_record(void** event, int device, int64_t stream) {
  return mentee::guarded([&] {
    VirtualGuardImpl(at::kCUDA).record(event, stream_of(device, stream), static_cast<c10::DeviceIndex>(device),
                                       c10::EventFlag::BACKEND_DEFAULT);
  });
}

// What comes on the stream from now on waits for the event.
int mentee_event_block(void* event, int device, int64_t stream) {
  return mentee::guarded([&] { VirtualGuardImpl(at::kCUDA).block(event, stream_of(device, stream)); });
}

int mentee_event_query(void* event, int* complete) {
  return mentee::guarded([&] { *complete = VirtualGuardImpl(at::kCUDA).queryEvent(event); });
}

void mentee_event_drop(void* event, int device) {
  VirtualGuardImpl(at::kCUDA).destroyEvent(event, static_cast<c10::DeviceIndex>(device));
}

int mentee_device_synchronise(int device) {
  return mentee::guarded([&] { VirtualGuardImpl(at::kCUDA).synchronizeDevice(static_cast<c10::DeviceIndex>(device)); });
}

// Whether libtorch's CUDA part has graphs as they are used here.
int mentee_graph_found() { return GraphFunctions::get().found; }

// From here on the work of this thread's stream is recorded, not done, until mentee_graph_end; the stream is not the default
// one, and has done the same work before.
int mentee_graph_begin(int device, void** out) {
  return mentee::guarded([&] {
    const auto& functions = GraphFunctions::get();
    TORCH_CHECK(functions.found, "this libtorch has no graphs");
    VirtualGuardImpl(at::kCUDA).synchronizeDevice(static_cast<c10::DeviceIndex>(device));
    at::getDeviceAllocator(at::kCUDA)->emptyCache();
    auto graph = std::make_unique<Graph>();
    graph->device = device;
    functions.construct(graph->memory, false);
    try {
      functions.begin(graph->memory, {0, 0}, kThreadLocal);
    } catch (...) {
      functions.destroy(graph->memory);
      throw;
    }
    *out = graph.release();
  });
}

int mentee_graph_end(void* graph) {
  return mentee::guarded([&] { GraphFunctions::get().end(static_cast<Graph*>(graph)->memory); });
}

// On the stream of this thread.
int mentee_graph_launch(void* graph) {
  return mentee::guarded([&] { GraphFunctions::get().replay(static_cast<Graph*>(graph)->memory); });
}

void mentee_graph_drop(void* handle) {
  auto* graph = static_cast<Graph*>(handle);
  mentee::guarded([&] {
    VirtualGuardImpl(at::kCUDA).synchronizeDevice(static_cast<c10::DeviceIndex>(graph->device));
    GraphFunctions::get().destroy(graph->memory);
  });
  delete graph;
}

// The most memory that tensors have had since the start, bytes.
int mentee_device_peak(int device, int64_t* bytes) {
  return mentee::guarded([&] {
    const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *bytes = stats.allocated_bytes[0].peak;
  });
}
}
