// Batch norm on a device, by the kernels of kernels.cu.

#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <limits>

#include "launch.h"

namespace {

using namespace mentee::device;

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
    void* stream = current_stream(values.device().index());
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
    // The kernels count places in 32 bits.
    TORCH_CHECK(shape.rows <= std::numeric_limits<uint32_t>::max(), "a view of ", shape.rows, " places is too large");
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
};

Optional optional(const Tensor* t) { return t ? Optional(*t) : std::nullopt; }

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

}  // namespace

extern "C" {

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
    *out = new Tensor(
        batch_norm_apply(*x, or_none(weight), or_none(bias), or_none(residual), *running, eps, relu != 0));
  });
}
}
