// The CUDA side: kernels of kernels.cu through NVRTC and the driver, both opened at run time, on the stream that libtorch works
// on. Nothing of NVIDIA's is needed to build or to start the program.

#include "device.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::Stream;
using c10::impl::VirtualGuardImpl;

// cuda.h and nvrtc.h, as far as they are used here (CUDA 12 and 13 have them alike).
typedef int (*cuLaunchKernel_t)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                                void**);
typedef int (*cuModuleLoadData_t)(void**, const void*);
typedef int (*cuModuleGetFunction_t)(void**, void*, const char*);
typedef int (*cuDeviceGetAttribute_t)(int*, int, int);
typedef int (*cuGetErrorString_t)(int, const char**);
typedef int (*nvrtcCreateProgram_t)(void**, const char*, const char*, int, const char* const*, const char* const*);
typedef int (*nvrtcCompileProgram_t)(void*, int, const char* const*);
typedef int (*nvrtcGetSize_t)(void*, size_t*);
typedef int (*nvrtcGetText_t)(void*, char*);
typedef int (*nvrtcDestroyProgram_t)(void**);
typedef int (*aoti_stream_t)(int32_t, void**);

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_…

void* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found, "the library of ", name, " has no such function");
  return found;
}

struct Driver {
  cuLaunchKernel_t launch = nullptr;
  cuModuleLoadData_t load = nullptr;
  cuModuleGetFunction_t function = nullptr;
  cuDeviceGetAttribute_t attribute = nullptr;
  cuGetErrorString_t text = nullptr;
  aoti_stream_t stream = nullptr;

  void check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* said = nullptr;
    text(code, &said);
    TORCH_CHECK(false, "CUDA: ", what, ": ", said ? said : "unknown error", " (", code, ")");
  }
};

const Driver& driver() {
  static const Driver found = [] {
    Driver d;
    void* cuda = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(cuda, "no NVIDIA driver (libcuda.so.1 cannot be loaded)");
    d.launch = reinterpret_cast<cuLaunchKernel_t>(symbol(cuda, "cuLaunchKernel"));
    d.load = reinterpret_cast<cuModuleLoadData_t>(symbol(cuda, "cuModuleLoadData"));
    d.function = reinterpret_cast<cuModuleGetFunction_t>(symbol(cuda, "cuModuleGetFunction"));
    d.attribute = reinterpret_cast<cuDeviceGetAttribute_t>(symbol(cuda, "cuDeviceGetAttribute"));
    d.text = reinterpret_cast<cuGetErrorString_t>(symbol(cuda, "cuGetErrorString"));
    // Exported by libtorch's CUDA part, which is loaded by then.
    d.stream = reinterpret_cast<aoti_stream_t>(symbol(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    return d;
  }();
  return found;
}

const char* kernel_source = nullptr;
std::string nvrtc_file;

// Compiles a part of kernels.cu to machine code for one architecture, such as "sm_90".
std::vector<char> compile(const std::string& part, const std::string& architecture) {
  TORCH_CHECK(kernel_source, "the kernels' source was not given");
  void* nvrtc = dlopen(nvrtc_file.c_str(), RTLD_NOW);
  TORCH_CHECK(nvrtc, "NVRTC cannot be opened: ", dlerror(), "; install torch with its CUDA libraries");
  auto create = reinterpret_cast<nvrtcCreateProgram_t>(symbol(nvrtc, "nvrtcCreateProgram"));
  auto run = reinterpret_cast<nvrtcCompileProgram_t>(symbol(nvrtc, "nvrtcCompileProgram"));
  auto log_size = reinterpret_cast<nvrtcGetSize_t>(symbol(nvrtc, "nvrtcGetProgramLogSize"));
  auto log_text = reinterpret_cast<nvrtcGetText_t>(symbol(nvrtc, "nvrtcGetProgramLog"));
  auto code_size = reinterpret_cast<nvrtcGetSize_t>(symbol(nvrtc, "nvrtcGetCUBINSize"));
  auto code_text = reinterpret_cast<nvrtcGetText_t>(symbol(nvrtc, "nvrtcGetCUBIN"));
  auto destroy = reinterpret_cast<nvrtcDestroyProgram_t>(symbol(nvrtc, "nvrtcDestroyProgram"));

  void* program = nullptr;
  TORCH_CHECK(create(&program, kernel_source, "kernels.cu", 0, nullptr, nullptr) == 0, "NVRTC takes no program");
  const std::string arch = "--gpu-architecture=" + architecture, define = "-DPART_" + part;
  const char* options[] = {arch.c_str(), define.c_str(), "--std=c++17"};
  const int code = run(program, 3, options);
  if (code != 0) {
    size_t size = 0;
    log_size(program, &size);
    std::string log(size, ' ');
    log_text(program, log.data());
    destroy(&program);
    // On one line, as messages are.
    for (auto& c : log) {
      if (c == '\n') c = ' ';
    }
    TORCH_CHECK(false, "NVRTC (", code, "), part ", part, " for ", architecture, ": ", log);
  }
  size_t size = 0;
  code_size(program, &size);
  std::vector<char> binary(size);
  code_text(program, binary.data());
  destroy(&program);
  return binary;
}

int attribute(int device, int which) {
  int value = 0;
  driver().check(driver().attribute(&value, which, device), "device attribute");
  return value;
}

// A kernel by its name, on the device that is current; parts are compiled once a process and device.
void* kernel(int device, const std::string& part, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, void*> modules, functions;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& function = functions[{device, name}];
  if (function) return function;
  auto& module = modules[{device, part}];
  if (!module) {
    const auto architecture =
        "sm_" + std::to_string(attribute(device, kMajor)) + std::to_string(attribute(device, kMinor));
    const auto binary = compile(part, architecture);
    driver().check(driver().load(&module, binary.data()), "loading the kernels of part " + part);
  }
  driver().check(driver().function(&function, module, name.c_str()), "kernel " + name);
  return function;
}

struct Dim {
  int64_t x = 1, y = 1, z = 1;
};

template <typename... Args>
void launch(const Tensor& on, const std::string& part, const std::string& name, Dim grid, Dim block, int64_t shared,
            Args... args) {
  const int device = on.device().index();
  void* stream = nullptr;
  TORCH_CHECK(driver().stream(device, &stream) == 0, "libtorch has no current stream");
  void* pointers[] = {static_cast<void*>(&args)...};
  driver().check(driver().launch(kernel(device, part, name), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                                 stream, pointers, nullptr),
                 "launch of " + name);
}

std::string name_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return "f32";
    case at::kDouble: return "f64";
    case at::kBFloat16: return "bf16";
    default: TORCH_CHECK(false, "the device's kernels take f32, f64 or bf16, not ", t.scalar_type());
  }
}

const void* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

void* written(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr() : nullptr;
}

Tensor dense(const Tensor& x) {
  return x.dim() == 4 ? x.contiguous(at::MemoryFormat::ChannelsLast) : x.contiguous();
}

// The Rust closure that sums over ranks, on the current stream; freed with the last graph node that holds it.
struct Reduce : torch::CustomClassHolder {
  mentee_device_reduce_fn call;
  void* context;
  mentee_drop_fn drop;

  Reduce(mentee_device_reduce_fn call_, void* context_, mentee_drop_fn drop_)
      : call(call_), context(context_), drop(drop_) {}
  ~Reduce() override {
    if (drop) drop(context);
  }
  void operator()(Tensor& values) const {
    if (!call) return;
    void* stream = nullptr;
    TORCH_CHECK(driver().stream(values.device().index(), &stream) == 0, "libtorch has no current stream");
    TORCH_CHECK(call(context, values.mutable_data_ptr(), values.numel(), stream) == 0,
                "the all-reduce of batch-norm statistics failed");
  }
};

// How R rows of C channels in G groups are spread over threads and blocks.
struct Shape {
  int64_t rows, channels, groups, vector, tx, ty, tiles;
  std::string part, suffix;
  int multiprocessors;

  Shape(const Tensor& x, int64_t groups_) : groups(groups_) {
    TORCH_CHECK(x.dim() == 2 || x.dim() == 4, "batch norm takes [N, C] or [N, C, H, W], not ", x.sizes());
    TORCH_CHECK(groups > 0 && x.size(0) % groups == 0, "a batch of ", x.size(0), " does not divide into ", groups,
                " views");
    channels = x.size(1);
    rows = x.numel() / channels / groups;
    part = suffix = name_of(x);
    vector = 16 / x.element_size();
    if (channels % vector != 0) {
      vector = 1;
      suffix += "_1";
    }
    const int64_t columns = (channels + vector - 1) / vector;
    tx = 1;
    while (tx < 32 && tx < columns) tx *= 2;
    ty = 256 / tx;
    tiles = (columns + tx - 1) / tx;
    multiprocessors = attribute(x.device().index(), kMultiprocessors);
  }

  // Stretches of rows such that about so many blocks a multiprocessor run, and every thread has a few rows.
  int64_t stretches(int64_t blocks) const {
    const int64_t wanted = std::max<int64_t>(1, blocks * multiprocessors / (tiles * groups));
    return std::min(wanted, std::max<int64_t>(1, (rows + 4 * ty - 1) / (4 * ty)));
  }
  Dim grid(int64_t blocks) const { return {tiles, stretches(blocks), groups}; }
  Dim block() const { return {tx, ty, 1}; }
};

constexpr int64_t kSumBlocks = 4, kMapBlocks = 16;

// The partial sums of a batch, [G][stretches][2][C].
Tensor partial_of(const Tensor& x, const Shape& shape) {
  return at::empty({shape.groups * shape.stretches(kSumBlocks) * 2 * shape.channels}, x.options().dtype(at::kDouble));
}

// [G][2][C] and [G] counts.
Tensor sums_of(const Tensor& x, const Shape& shape) {
  return at::empty({shape.groups * (2 * shape.channels + 1)}, x.options().dtype(at::kDouble));
}

// [n][G][C] and [G] counts, of the type of statistics.
Tensor stats_of(const Tensor& x, const Shape& shape, int64_t n) {
  const auto kind = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({shape.groups * (n * shape.channels + 1)}, x.options().dtype(kind));
}

int64_t fold_bytes(const Tensor& x, const Shape& shape) {
  return 2 * shape.vector * 256 * (x.scalar_type() == at::kDouble ? 8 : 4);
}

Dim channel_tiles(const Shape& shape, int64_t each) { return {(shape.channels + each - 1) / each, 1, 1}; }

// A residual, and the statistics that normalise it if it is to be.
struct Around {
  Tensor values, stats;
};

void normalise(const Tensor& x, const Around& around, Tensor& y, const Tensor& mask, const Shape& shape, const Tensor& stats,
               bool relu) {
  const auto run = [&](const std::string& kernel, auto... around_stats) {
    launch(x, shape.part, kernel + shape.suffix, shape.grid(kMapBlocks), shape.block(), 0, pointer(x), pointer(around.values),
           y.mutable_data_ptr(), written(mask), shape.rows, shape.channels, pointer(stats), around_stats...,
           static_cast<int>(relu));
  };
  if (around.stats.defined()) {
    run("apply_both_", pointer(around.stats));
  } else {
    run("apply_");
  }
}

void finish(const Tensor& sums, const Shape& shape, const Tensor& weight, const Tensor& bias, double eps, Tensor& stats,
            void* running, double momentum) {
  launch(sums, "flat", "finish_" + name_of(stats), channel_tiles(shape, 128), {128, 1, 1}, 0, pointer(sums),
         shape.channels, shape.groups, pointer(weight), pointer(bias), eps, stats.mutable_data_ptr(), running, momentum);
}

void check_affine(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto kind = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& t : {weight, bias}) {
    TORCH_CHECK(!t.defined() || (t.scalar_type() == kind && t.is_contiguous() && t.numel() == x.size(1)),
                "scale and offset of a batch norm are contiguous, of its channels and of type ", kind);
  }
}

void check_residual(const Tensor& x, const Tensor& residual) {
  TORCH_CHECK(!residual.defined() || (residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type()),
              "the residual is ", residual.sizes(), " of ", residual.scalar_type(), ", the activation ", x.sizes(), " of ",
              x.scalar_type());
}

using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How a layer trains: [C] each of scale and offset, or none; [2][C] doubles of running statistics, which a batch moves.
struct Layer {
  Tensor weight, bias, running;
  double eps, momentum;

  Layer(const Optional& weight_, const Optional& bias_, const Tensor& running_, double eps_, double momentum_)
      : weight(weight_.value_or(Tensor())), bias(bias_.value_or(Tensor())), running(running_), eps(eps_), momentum(momentum_) {}
};

// The statistics of a batch, over all ranks.
Tensor statistics(const Tensor& x, const Shape& shape, const Layer& layer, const Reduce& reduce) {
  check_affine(x, layer.weight, layer.bias);
  TORCH_CHECK(layer.running.scalar_type() == at::kDouble && layer.running.is_contiguous() &&
                  layer.running.numel() == 2 * x.size(1) && layer.running.device() == x.device(),
              "running statistics are [2][C] doubles on the device of the activation");
  TORCH_CHECK(shape.rows > 1 || reduce.call, "batch norm needs more than one value per channel and view, got ", shape.rows,
              "; raise schedule.global_batch");
  Tensor partial = partial_of(x, shape), sums = sums_of(x, shape), stats = stats_of(x, shape, 4);
  void* running = layer.running.mutable_data_ptr();
  launch(x, shape.part, "moments_" + shape.suffix, shape.grid(kSumBlocks), shape.block(), fold_bytes(x, shape), pointer(x),
         shape.rows, shape.channels, partial.mutable_data_ptr());
  const bool alone = !reduce.call;
  launch(x, "flat", "combine_" + name_of(stats), channel_tiles(shape, 32), {32, 16, 1}, 0, pointer(partial),
         shape.stretches(kSumBlocks), shape.channels, shape.groups, static_cast<double>(shape.rows), sums.mutable_data_ptr(),
         static_cast<int>(alone), pointer(layer.weight), pointer(layer.bias), layer.eps, stats.mutable_data_ptr(), running,
         layer.momentum);
  if (!alone) {
    reduce(sums);
    finish(sums, shape, layer.weight, layer.bias, layer.eps, stats, running, layer.momentum);
  }
  return stats;
}

// What the sums over a gradient give: the coefficients of dx, and this rank's gradients of scale and offset.
struct Gradients {
  Tensor coefs, weight, bias;
};

// Of dy (+ dy2) at x, where `mask`, or else x itself if `relu`, lets it through; what is let through is left in `masked`.
Gradients gradients(const Tensor& dy, const Tensor& dy2, const Tensor& x, const Tensor& mask, const Tensor& masked,
                    const Shape& shape, const Tensor& stats, const Tensor& weight, bool relu, const Reduce& reduce) {
  Tensor partial = partial_of(x, shape), sums = sums_of(x, shape);
  Gradients out{stats_of(x, shape, 3), weight.defined() ? at::empty_like(weight) : Tensor(),
                weight.defined() ? at::empty_like(weight) : Tensor()};
  launch(x, shape.part, "grad_moments_" + shape.suffix, shape.grid(kSumBlocks), shape.block(), fold_bytes(x, shape), pointer(dy),
         pointer(dy2), pointer(x), pointer(mask), written(masked), shape.rows, shape.channels, pointer(stats),
         static_cast<int>(relu), partial.mutable_data_ptr());
  const bool alone = !reduce.call;
  launch(x, "flat", "combine_grad_" + name_of(stats), channel_tiles(shape, 32), {32, 16, 1}, 0, pointer(partial),
         shape.stretches(kSumBlocks), shape.channels, shape.groups, static_cast<double>(shape.rows), sums.mutable_data_ptr(),
         static_cast<int>(alone), pointer(stats), written(out.weight), written(out.bias), out.coefs.mutable_data_ptr());
  if (!alone) {
    reduce(sums);
    launch(x, "flat", "finish_grad_" + name_of(stats), channel_tiles(shape, 128), {128, 1, 1}, 0, pointer(sums),
           shape.channels, shape.groups, pointer(stats), out.coefs.mutable_data_ptr());
  }
  return out;
}

Tensor grad_input(const Tensor& dz, const Tensor& x, const Shape& shape, const Tensor& stats, const Tensor& coefs, bool relu) {
  Tensor dx = at::empty_like(x);
  launch(x, shape.part, "grad_input_" + shape.suffix, shape.grid(kMapBlocks), shape.block(), 0, pointer(dz), pointer(x),
         dx.mutable_data_ptr(), shape.rows, shape.channels, pointer(stats), pointer(coefs), static_cast<int>(relu));
  return dx;
}

const Reduce& reduce_of(const c10::intrusive_ptr<torch::CustomClassHolder>& capsule) {
  return *static_cast<const Reduce*>(capsule.get());
}

// act(norm(x) + residual), where the residual, given its running statistics, is normalised too: the two ways through a block
// that changes shape. With `fork` the output comes twice, the same memory: for the two ways it goes behind a residual block.
// Their gradients then arrive apart, and the first pass over them adds them. `trains`: there will be a backward pass.
struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x_in, const Optional& weight, const Optional& bias,
                               const Optional& around_in, const Optional& around_weight, const Optional& around_bias,
                               const Tensor& running, const Optional& around_running, int64_t groups, double eps,
                               double momentum, bool relu, bool fork, bool trains, c10::intrusive_ptr<Reduce> reduce) {
    const c10::DeviceGuard guard(x_in.device());
    const Tensor x = dense(x_in);
    Around around;
    if (around_in) around.values = dense(*around_in);
    check_residual(x, around.values);
    const Shape shape(x, groups);
    const Tensor stats = statistics(x, shape, {weight, bias, running, eps, momentum}, *reduce);
    if (around_running) {
      const Layer layer(around_weight, around_bias, *around_running, eps, momentum);
      around.stats = statistics(around.values, shape, layer, *reduce);
    }
    const bool masks = relu && around.values.defined();
    const Tensor mask = masks && trains ? at::empty({x.numel() / shape.vector}, x.options().dtype(at::kByte)) : Tensor();
    Tensor y = at::empty_like(x);
    normalise(x, around, y, mask, shape, stats, relu);

    const bool both = around_running.has_value();
    ctx->save_for_backward({x, mask, weight.value_or(Tensor()), stats, both ? around.values : Tensor(),
                            around_weight.value_or(Tensor()), around.stats});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["relu"] = relu;
    ctx->saved_data["residual"] = around_in.has_value();
    ctx->saved_data["reduce"] = c10::IValue::make_capsule(std::move(reduce));
    ctx->set_materialize_grads(false);
    if (!fork) return {y};
    // Not a view to autograd: an output of its own.
    return {y, Tensor(y.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true))};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = dense(saved[0]), mask = saved[1], weight = saved[2], stats = saved[3];
    const c10::DeviceGuard guard(x.device());
    // An output that nothing was made of has no gradient.
    if (!grads[0].defined()) std::swap(grads[0], grads.at(1));
    const Tensor dy = dense(grads[0]).to(x.scalar_type());
    const Tensor dy2 = grads.size() > 1 && grads[1].defined() ? dense(grads[1]).to(x.scalar_type()) : Tensor();
    const bool relu = ctx->saved_data["relu"].toBool(), has_residual = ctx->saved_data["residual"].toBool();
    const auto capsule = ctx->saved_data["reduce"].toCapsule();
    const Reduce& reduce = reduce_of(capsule);
    const Shape shape(x, ctx->saved_data["groups"].toInt());

    // With a residual its gradient is dz itself: the first pass writes it, the second reads it.
    const Tensor masked = mask.defined() ? at::empty_like(x) : Tensor();
    const auto own = gradients(dy, dy2, x, mask, masked, shape, stats, weight, relu, reduce);
    const Tensor& dz = masked.defined() ? masked : dy;
    const Tensor dx = grad_input(dz, x, shape, stats, own.coefs, relu && !masked.defined());
    Tensor daround = has_residual ? dz : Tensor();
    Gradients other;
    if (saved[6].defined()) {
      const Tensor around = dense(saved[4]), around_stats = saved[6];
      other = gradients(dz, Tensor(), around, Tensor(), Tensor(), shape, around_stats, saved[5], false, reduce);
      daround = grad_input(dz, around, shape, around_stats, other.coefs, false);
    }
    const Tensor none;
    return {dx, own.weight, own.bias, daround, other.weight, other.bias, none, none, none, none, none, none, none, none, none};
  }
};

// The largest relu(norm(x)) of each window of 3x3, two apart: the stem of a ResNet. What lies between is never written.
struct BatchNormPool : torch::autograd::Function<BatchNormPool> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_in, const Optional& weight, const Optional& bias,
                        const Tensor& running, int64_t groups, double eps, double momentum, bool trains,
                        c10::intrusive_ptr<Reduce> reduce) {
    TORCH_CHECK(x_in.dim() == 4, "pooling takes [N, C, H, W], not ", x_in.sizes());
    const c10::DeviceGuard guard(x_in.device());
    const Tensor x = dense(x_in);
    const Shape shape(x, groups);
    const Tensor stats = statistics(x, shape, {weight, bias, running, eps, momentum}, *reduce);
    const int64_t height = x.size(2), width = x.size(3);
    Tensor y = at::empty({x.size(0), x.size(1), (height + 1) / 2, (width + 1) / 2}, x.options(), at::MemoryFormat::ChannelsLast);
    const Tensor largest = trains ? at::empty_like(y) : Tensor();
    const Tensor which = trains ? at::empty_like(y, y.options().dtype(at::kByte)) : Tensor();
    const Shape windows(y, groups);
    check_places(shape);
    launch(x, shape.part, "apply_pool_" + shape.suffix, windows.grid(kMapBlocks), windows.block(), 0, pointer(x),
           y.mutable_data_ptr(), written(largest), written(which), windows.rows, windows.channels, static_cast<int>(height),
           static_cast<int>(width), pointer(stats));
    ctx->save_for_backward({x, largest, which, weight.value_or(Tensor()), stats});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["reduce"] = c10::IValue::make_capsule(std::move(reduce));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = dense(saved[0]), largest = saved[1], which = saved[2], weight = saved[3], stats = saved[4];
    const c10::DeviceGuard guard(x.device());
    const Tensor dy = dense(grads[0]).to(x.scalar_type());
    const auto capsule = ctx->saved_data["reduce"].toCapsule();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const Shape shape(x, groups), windows(largest, groups);
    // Only the largest of a window has a gradient: the sums are over windows.
    const auto own = gradients(dy, Tensor(), largest, Tensor(), Tensor(), windows, stats, weight, true, reduce_of(capsule));
    Tensor dx = at::empty_like(x);
    launch(x, shape.part, "grad_input_pool_" + shape.suffix, shape.grid(kMapBlocks), shape.block(), 0, pointer(dy),
           pointer(which), pointer(x), dx.mutable_data_ptr(), shape.rows, shape.channels, static_cast<int>(x.size(2)),
           static_cast<int>(x.size(3)), pointer(stats), pointer(own.coefs));
    const Tensor none;
    return {dx, own.weight, own.bias, none, none, none, none, none, none};
  }

  // The kernels count places in 32 bits.
  static void check_places(const Shape& shape) {
    TORCH_CHECK(shape.rows <= std::numeric_limits<uint32_t>::max(), "a view of ", shape.rows, " places is too large");
  }
};

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

Optional optional(const Tensor* t) { return t ? Optional(*t) : std::nullopt; }

Stream stream_of(int device, int64_t id) { return Stream(Stream::UNSAFE, Device(at::kCUDA, device), id); }

}  // namespace

namespace mentee::device {

Tensor batch_norm_apply(const Tensor& x_in, const Tensor& weight, const Tensor& bias, const Tensor& residual_in,
                        const Tensor& running, double eps, bool relu) {
  at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = dense(x_in);
  const Around around{residual_in.defined() ? dense(residual_in) : Tensor(), Tensor()};
  check_affine(x, weight, bias);
  check_residual(x, around.values);
  const Shape shape(x, 1);
  // As if one value with these moments had been seen.
  const auto halves = running.chunk(2, 0);
  const Tensor sums =
      at::cat({halves[0], halves[1] + halves[0].square(), at::ones({1}, x.options().dtype(at::kDouble))}, 0);
  Tensor stats = stats_of(x, shape, 4), y = at::empty_like(x);
  finish(sums, shape, weight, bias, eps, stats, nullptr, 0.0);
  normalise(x, around, y, Tensor(), shape, stats, relu);
  return y;
}

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

int mentee_device_start(const char* source, const char* nvrtc) {
  return mentee::guarded([&] {
    kernel_source = source;
    nvrtc_file = nvrtc;
  });
}

int mentee_device_compile(const char* part, const char* architecture, int64_t* bytes) {
  return mentee::guarded([&] { *bytes = static_cast<int64_t>(compile(part, architecture).size()); });
}

int mentee_device_use(int device, int autotune, int tf32) {
  return mentee::guarded([&] {
    VirtualGuardImpl(at::kCUDA).setDevice(Device(at::kCUDA, device));
    at::globalContext().setBenchmarkCuDNN(autotune != 0);
    at::globalContext().setAllowTF32CuDNN(tf32 != 0);
    at::globalContext().setAllowTF32CuBLAS(tf32 != 0);
  });
}

int mentee_device_batch_norm_train(const Tensor* x, const Tensor* weight, const Tensor* bias, const Tensor* residual,
                                   const Tensor* residual_weight, const Tensor* residual_bias, const Tensor* running,
                                   const Tensor* residual_running, int64_t groups, double eps, double momentum, int relu,
                                   mentee_device_reduce_fn reduce, void* context, mentee_drop_fn drop, Tensor** out,
                                   Tensor** twin) {
  return mentee::guarded([&] {
    auto holder = c10::make_intrusive<Reduce>(reduce, context, drop);
    TORCH_CHECK(!twin || (relu && residual), "only the output of a residual block is wanted twice");
    TORCH_CHECK(!residual_running || (relu && residual), "only a residual before a ReLU is normalised too");
    auto all = BatchNorm::apply(*x, optional(weight), optional(bias), optional(residual), optional(residual_weight),
                                optional(residual_bias), *running, optional(residual_running), groups, eps, momentum, relu != 0,
                                twin != nullptr, at::GradMode::is_enabled(), std::move(holder));
    *out = new Tensor(std::move(all[0]));
    if (twin) *twin = new Tensor(std::move(all[1]));
  });
}

int mentee_device_batch_norm_pool(const Tensor* x, const Tensor* weight, const Tensor* bias, const Tensor* running,
                                  int64_t groups, double eps, double momentum, mentee_device_reduce_fn reduce, void* context,
                                  mentee_drop_fn drop, Tensor** out) {
  return mentee::guarded([&] {
    auto holder = c10::make_intrusive<Reduce>(reduce, context, drop);
    *out = new Tensor(BatchNormPool::apply(*x, optional(weight), optional(bias), *running, groups, eps, momentum,
                                           at::GradMode::is_enabled(), std::move(holder)));
  });
}

int mentee_device_batch_norm_apply(const Tensor* x, const Tensor* weight, const Tensor* bias, const Tensor* residual,
                                   const Tensor* running, double eps, int relu, Tensor** out) {
  return mentee::guarded([&] {
    auto or_none = [](const Tensor* t) { return t ? *t : Tensor(); };
    *out = new Tensor(mentee::device::batch_norm_apply(*x, or_none(weight), or_none(bias), or_none(residual), *running,
                                                       eps, relu != 0));
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
    TORCH_CHECK(driver().stream(device, handle) == 0, "libtorch has no current stream");
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
