// Batch normalisation of channels-last activations, fused with the residual add and ReLU that follow it, with
// statistics per group of rows (the two views of a batch) and, through a callback, over all ranks.
//
//   xhat = (x - mean_g) / sqrt(var_g + eps),   y = act(weight * xhat + bias + residual)
//
// x is [N, C, H, W] lying in memory as [N, H, W, C], or [N, C]: either way R rows of C channels, and group g is the
// rows [g*R/G, (g+1)*R/G). Statistics are summed in double over chunks whose size depends on the shape alone, so
// the result does not depend on the number of threads.

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bf16.h"
#include "shim.h"

namespace {

using at::Tensor;
using mentee::bf16;
using mentee::load;
using mentee::store;

template <typename T>
struct Compute {
  using type = T;
};
template <>
struct Compute<bf16> {
  using type = float;
};

// The kernels see `n` elements whose channel pattern repeats every `width` elements: several rows taken as one, so that
// few channels still fill the vector registers. Per-channel arguments are repeated to that width.

// Wide rows summed in the compute type before they are added to the double sums.
constexpr int64_t kBlockRows = 32;

// sums[0..width] += sum x, sums[width..2 width] += sum x^2.
template <typename T>
MENTEE_INLINE void moments_body(const T* x, int64_t n, int64_t width, typename Compute<T>::type* scratch,
                                double* sums) {
  using A = typename Compute<T>::type;
  A* __restrict__ sum = scratch;
  A* __restrict__ square = scratch + width;
  for (int64_t begin = 0; begin < n; begin += kBlockRows * width) {
    const int64_t end = std::min(begin + kBlockRows * width, n);
    for (int64_t c = 0; c < width; ++c) sum[c] = square[c] = 0;
    for (int64_t r = begin; r < end; r += width) {
      const T* __restrict__ row = x + r;
      const int64_t count = std::min(width, end - r);
#pragma GCC ivdep
      for (int64_t c = 0; c < count; ++c) {
        const A v = load(row + c);
        sum[c] += v;
        square[c] += v * v;
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += sum[c];
      sums[width + c] += square[c];
    }
  }
}

// y = act(x * scale + shift + residual)
template <typename T, bool kRelu, bool kResidual>
MENTEE_INLINE void apply_body(const T* x, const T* residual, T* y, int64_t n, int64_t width,
                              const typename Compute<T>::type* __restrict__ scale,
                              const typename Compute<T>::type* __restrict__ shift) {
  using A = typename Compute<T>::type;
  for (int64_t r = 0; r < n; r += width) {
    const T* __restrict__ xr = x + r;
    const T* __restrict__ rr = residual + (kResidual ? r : 0);
    T* __restrict__ yr = y + r;
    const int64_t count = std::min(width, n - r);
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) {
      A v = load(xr + c) * scale[c] + shift[c];
      if (kResidual) v += load(rr + c);
      if (kRelu) v = v < A(0) ? A(0) : v;  // keeps NaN
      store(yr + c, v);
    }
  }
}

// sums[0..width] += sum dz, sums[width..2 width] += sum dz * (x - mean), where dz = dy masked by y > 0.
template <typename T, bool kRelu>
MENTEE_INLINE void grad_moments_body(const T* dy, const T* x, const T* y, int64_t n, int64_t width,
                                     const typename Compute<T>::type* __restrict__ mean,
                                     typename Compute<T>::type* scratch, double* sums) {
  using A = typename Compute<T>::type;
  A* __restrict__ sum = scratch;
  A* __restrict__ dot = scratch + width;
  for (int64_t begin = 0; begin < n; begin += kBlockRows * width) {
    const int64_t end = std::min(begin + kBlockRows * width, n);
    for (int64_t c = 0; c < width; ++c) sum[c] = dot[c] = 0;
    for (int64_t r = begin; r < end; r += width) {
      const T* __restrict__ dyr = dy + r;
      const T* __restrict__ xr = x + r;
      const T* __restrict__ yr = y + (kRelu ? r : 0);
      const int64_t count = std::min(width, end - r);
#pragma GCC ivdep
      for (int64_t c = 0; c < count; ++c) {
        A dz = load(dyr + c);
        if (kRelu) dz = load(yr + c) > A(0) ? dz : A(0);
        sum[c] += dz;
        dot[c] += dz * (load(xr + c) - mean[c]);
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += sum[c];
      sums[width + c] += dot[c];
    }
  }
}

// dx = dz * a + x * b + d, and dz itself when the residual needs it.
template <typename T, bool kRelu, bool kResidual>
MENTEE_INLINE void grad_input_body(const T* dy, const T* x, const T* y, T* dx, T* dresidual, int64_t n, int64_t width,
                                   const typename Compute<T>::type* __restrict__ a,
                                   const typename Compute<T>::type* __restrict__ b,
                                   const typename Compute<T>::type* __restrict__ d) {
  using A = typename Compute<T>::type;
  for (int64_t r = 0; r < n; r += width) {
    const T* __restrict__ dyr = dy + r;
    const T* __restrict__ xr = x + r;
    const T* __restrict__ yr = y + (kRelu ? r : 0);
    T* __restrict__ dxr = dx + r;
    T* __restrict__ drr = dresidual + (kResidual ? r : 0);
    const int64_t count = std::min(width, n - r);
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) {
      A dz = load(dyr + c);
      if (kRelu) dz = load(yr + c) > A(0) ? dz : A(0);
      store(dxr + c, dz * a[c] + load(xr + c) * b[c] + d[c]);
      if (kResidual) store(drr + c, dz);
    }
  }
}

#define MENTEE_KERNELS(T)                                                                                              \
  MENTEE_MULTIVERSION void moments(const T* x, int64_t n, int64_t width, Compute<T>::type* scratch,              \
                                   double* sums) {                                                                     \
    moments_body<T>(x, n, width, scratch, sums);                                                                 \
  }                                                                                                                    \
  MENTEE_MULTIVERSION void apply(const T* x, const T* residual, T* y, int64_t n, int64_t width,                  \
                                 const Compute<T>::type* scale, const Compute<T>::type* shift, bool relu) {            \
    if (relu && residual) return apply_body<T, true, true>(x, residual, y, n, width, scale, shift);              \
    if (relu) return apply_body<T, true, false>(x, residual, y, n, width, scale, shift);                         \
    if (residual) return apply_body<T, false, true>(x, residual, y, n, width, scale, shift);                     \
    apply_body<T, false, false>(x, residual, y, n, width, scale, shift);                                         \
  }                                                                                                                    \
  MENTEE_MULTIVERSION void grad_moments(const T* dy, const T* x, const T* y, int64_t n, int64_t width,           \
                                        const Compute<T>::type* mean, Compute<T>::type* scratch, double* sums) {       \
    if (y) return grad_moments_body<T, true>(dy, x, y, n, width, mean, scratch, sums);                           \
    grad_moments_body<T, false>(dy, x, y, n, width, mean, scratch, sums);                                        \
  }                                                                                                                    \
  MENTEE_MULTIVERSION void grad_input(const T* dy, const T* x, const T* y, T* dx, T* dresidual, int64_t n,             \
                                      int64_t width, const Compute<T>::type* a, const Compute<T>::type* b,          \
                                      const Compute<T>::type* d) {                                                     \
    if (y && dresidual) return grad_input_body<T, true, true>(dy, x, y, dx, dresidual, n, width, a, b, d);       \
    if (y) return grad_input_body<T, true, false>(dy, x, y, dx, dresidual, n, width, a, b, d);                   \
    if (dresidual) return grad_input_body<T, false, true>(dy, x, y, dx, dresidual, n, width, a, b, d);           \
    grad_input_body<T, false, false>(dy, x, y, dx, dresidual, n, width, a, b, d);                                \
  }

MENTEE_KERNELS(float)
MENTEE_KERNELS(double)
MENTEE_KERNELS(bf16)

// Elements that the kernels take as one row, about: a few kilobytes of arguments stay in the first-level cache.
constexpr int64_t kWidth = 512;

// How R rows of C channels in G groups are cut into pieces of work.
struct Shape {
  int64_t rows, channels, groups, chunk, chunks, width;

  Shape(const Tensor& x, int64_t groups_) : groups(groups_) {
    TORCH_CHECK(x.dim() == 2 || x.dim() == 4, "batch norm takes [N, C] or [N, C, H, W], not ", x.sizes());
    channels = x.size(1);
    rows = x.numel() / channels;
    TORCH_CHECK(groups > 0 && x.size(0) % groups == 0, "a batch of ", x.size(0), " does not divide into ", groups,
                " views");
    rows_per_group = rows / groups;
    width = channels * std::max<int64_t>(1, kWidth / channels);
    chunk = std::max<int64_t>(kBlockRows, (rows_per_group + 63) / 64);
    chunks = (rows_per_group + chunk - 1) / chunk;
  }

  int64_t rows_per_group;

  // Calls body(group, first row, number of rows, piece) for every piece, on libtorch's threads.
  template <typename F>
  void for_each(F&& body) const {
    at::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t group = piece / chunks;
        const int64_t first = (piece % chunks) * chunk;
        const int64_t count = std::min(chunk, rows_per_group - first);
        body(group, group * rows_per_group + first, count, piece);
      }
    });
  }

  // [G][C] values repeated to [G][width] of the compute type.
  template <typename A>
  std::vector<A> widen(const std::vector<double>& values) const {
    std::vector<A> out(groups * width);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < width; ++c) out[g * width + c] = static_cast<A>(values[g * channels + c % channels]);
    }
    return out;
  }

  // Adds 2 width sums of a piece to its 2C sums.
  void fold(const std::vector<double>& wide, double* sums) const {
    for (int64_t row = 0; row < width; row += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sums[c] += wide[row + c];
        sums[channels + c] += wide[width + row + c];
      }
    }
  }

  // Sums the pieces' 2C doubles into 2C doubles a group, in a fixed order.
  std::vector<double> combine(const std::vector<double>& pieces) const {
    std::vector<double> sums(groups * 2 * channels, 0.0);
    for (int64_t piece = 0; piece < groups * chunks; ++piece) {
      double* to = sums.data() + (piece / chunks) * 2 * channels;
      const double* from = pieces.data() + piece * 2 * channels;
      for (int64_t c = 0; c < 2 * channels; ++c) to[c] += from[c];
    }
    return sums;
  }
};

Tensor dense(const Tensor& x) {
  return x.dim() == 4 ? x.contiguous(at::MemoryFormat::ChannelsLast) : x.contiguous();
}

template <typename F>
void dispatch(const Tensor& x, F&& body) {
  TORCH_CHECK(x.device().is_cpu(), "mentee's fused batch norm runs on the CPU; got a tensor on ", x.device());
  switch (x.scalar_type()) {
    case at::kFloat: return body(static_cast<float*>(nullptr));
    case at::kDouble: return body(static_cast<double*>(nullptr));
    case at::kBFloat16: return body(static_cast<bf16*>(nullptr));
    default: TORCH_CHECK(false, "batch norm takes f32, f64 or bf16, not ", x.scalar_type());
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* data_mut(Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// The Rust closure that sums over ranks; freed with the last graph node that holds it.
struct Reduce : torch::CustomClassHolder {
  mentee_reduce_fn call;
  void* context;
  mentee_drop_fn drop;

  Reduce(mentee_reduce_fn call_, void* context_, mentee_drop_fn drop_) : call(call_), context(context_), drop(drop_) {}
  ~Reduce() override {
    if (drop) drop(context);
  }
  void operator()(std::vector<double>& values) const {
    if (call && call(context, values.data(), static_cast<int64_t>(values.size())) != 0) {
      TORCH_CHECK(false, "the all-reduce of batch-norm statistics failed");
    }
  }
};

std::vector<double> to_doubles(const Tensor& t, int64_t n, double otherwise) {
  if (!t.defined()) return std::vector<double>(n, otherwise);
  const auto d = t.detach().to(at::kDouble).contiguous();
  return std::vector<double>(d.const_data_ptr<double>(), d.const_data_ptr<double>() + n);
}

// y for given statistics ([G][C] each).
Tensor normalise(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual, const Shape& shape,
                 const double* mean, const double* variance, double eps, bool relu) {
  const int64_t C = shape.channels;
  const auto w = to_doubles(weight, C, 1.0);
  const auto b = to_doubles(bias, C, 0.0);
  std::vector<double> scale(shape.groups * C), shift(shape.groups * C);
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = g * C + c;
      scale[i] = w[c] / std::sqrt(variance[i] + eps);
      shift[i] = b[c] - mean[i] * scale[i];
    }
  }
  Tensor y = at::empty_like(x);
  dispatch(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = typename Compute<T>::type;
    const int64_t W = shape.width;
    const auto scale_a = shape.widen<A>(scale), shift_a = shape.widen<A>(shift);
    const T* xp = data<T>(x);
    const T* rp = data<T>(residual);
    T* yp = data_mut<T>(y);
    shape.for_each([&](int64_t g, int64_t row, int64_t rows, int64_t) {
      apply(xp + row * C, rp ? rp + row * C : nullptr, yp + row * C, rows * C, W, scale_a.data() + g * W,
            shift_a.data() + g * W, relu);
    });
  });
  return y;
}

// Statistics of the whole batch (all ranks) as the forward left them.
struct Statistics {
  std::vector<double> mean, variance, count;  // [G][C], [G][C], [G]
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x_in, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual_in, int64_t groups,
                        double eps, bool relu, c10::intrusive_ptr<Reduce> reduce, Statistics* statistics) {
    const Tensor x = dense(x_in);
    const Tensor residual = residual_in ? dense(*residual_in) : Tensor();
    if (residual.defined()) {
      TORCH_CHECK(residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type(), "the residual is ",
                  residual.sizes(), " of ", residual.scalar_type(), ", the activation ", x.sizes(), " of ",
                  x.scalar_type());
    }
    const Shape shape(x, groups);
    const int64_t C = shape.channels;

    std::vector<double> pieces(groups * shape.chunks * 2 * C, 0.0);
    dispatch(x, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      const T* xp = data<T>(x);
      shape.for_each([&](int64_t, int64_t row, int64_t rows, int64_t piece) {
        std::vector<typename Compute<T>::type> scratch(2 * shape.width);
        std::vector<double> wide(2 * shape.width, 0.0);
        moments(xp + row * C, rows * C, shape.width, scratch.data(), wide.data());
        shape.fold(wide, pieces.data() + piece * 2 * C);
      });
    });
    auto sums = shape.combine(pieces);
    for (int64_t g = 0; g < groups; ++g) sums.push_back(static_cast<double>(shape.rows_per_group));
    (*reduce)(sums);

    statistics->mean.resize(groups * C);
    statistics->variance.resize(groups * C);
    statistics->count.assign(sums.end() - groups, sums.end());
    for (int64_t g = 0; g < groups; ++g) {
      const double n = statistics->count[g];
      TORCH_CHECK(n > 1, "batch norm needs more than one value per channel and view, got ", n,
                  "; raise schedule.global_batch");
      for (int64_t c = 0; c < C; ++c) {
        const double mean = sums[g * 2 * C + c] / n;
        statistics->mean[g * C + c] = mean;
        statistics->variance[g * C + c] = std::max(0.0, sums[g * 2 * C + C + c] / n - mean * mean);
      }
    }
    const Tensor w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
    const Tensor y = normalise(x, w, b, residual, shape, statistics->mean.data(), statistics->variance.data(), eps, relu);

    ctx->save_for_backward({x, relu ? y : Tensor(), w});
    ctx->saved_data["mean"] = statistics->mean;
    ctx->saved_data["variance"] = statistics->variance;
    ctx->saved_data["count"] = statistics->count;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["affine"] = weight.has_value();
    ctx->saved_data["residual"] = residual_in.has_value();
    ctx->saved_data["reduce"] = c10::IValue::make_capsule(std::move(reduce));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = dense(saved[0]), y = saved[1], weight = saved[2];
    const Tensor dy = dense(grads[0]).to(x.scalar_type());
    const auto mean = ctx->saved_data["mean"].toDoubleVector();
    const auto variance = ctx->saved_data["variance"].toDoubleVector();
    const auto count = ctx->saved_data["count"].toDoubleVector();
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool affine = ctx->saved_data["affine"].toBool();
    const bool has_residual = ctx->saved_data["residual"].toBool();
    const auto capsule = ctx->saved_data["reduce"].toCapsule();
    const auto& reduce = *static_cast<const Reduce*>(capsule.get());

    const Shape shape(x, static_cast<int64_t>(count.size()));
    const int64_t C = shape.channels, G = shape.groups;
    std::vector<double> inverse(G * C);
    for (int64_t i = 0; i < G * C; ++i) inverse[i] = 1.0 / std::sqrt(variance[i] + eps);

    std::vector<double> pieces(G * shape.chunks * 2 * C, 0.0);
    dispatch(x, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      using A = typename Compute<T>::type;
      const auto mean_a = shape.widen<A>(mean);
      const int64_t W = shape.width;
      const T *dyp = data<T>(dy), *xp = data<T>(x), *yp = data<T>(y);
      shape.for_each([&](int64_t g, int64_t row, int64_t rows, int64_t piece) {
        std::vector<A> scratch(2 * W);
        std::vector<double> wide(2 * W, 0.0);
        grad_moments(dyp + row * C, xp + row * C, yp ? yp + row * C : nullptr, rows * C, W, mean_a.data() + g * W,
                     scratch.data(), wide.data());
        shape.fold(wide, pieces.data() + piece * 2 * C);
      });
    });
    auto sums = shape.combine(pieces);
    Tensor dweight, dbias;
    if (affine) {
      // This rank's share; the reducer sums weight gradients over ranks like any other.
      dweight = at::zeros({C}, at::kDouble);
      dbias = at::zeros({C}, at::kDouble);
      double *dw = dweight.data_ptr<double>(), *db = dbias.data_ptr<double>();
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t c = 0; c < C; ++c) {
          db[c] += sums[g * 2 * C + c];
          dw[c] += sums[g * 2 * C + C + c] * inverse[g * C + c];
        }
      }
      dweight = dweight.to(weight.scalar_type());
      dbias = dbias.to(weight.scalar_type());
    }
    reduce(sums);

    // dx = w*inv * (dz - mean(dz) - xhat * mean(dz*xhat)), regrouped as dz*a + x*b + d.
    const auto w = to_doubles(weight, C, 1.0);
    std::vector<double> a(G * C), b(G * C), d(G * C);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t i = g * C + c;
        const double mean_dz = sums[g * 2 * C + c] / count[g];
        const double mean_dot = sums[g * 2 * C + C + c] * inverse[i] * inverse[i] / count[g];
        a[i] = w[c] * inverse[i];
        b[i] = -a[i] * mean_dot;
        d[i] = -a[i] * mean_dz - b[i] * mean[i];
      }
    }
    Tensor dx = at::empty_like(x);
    Tensor dresidual = has_residual ? at::empty_like(x) : Tensor();
    dispatch(x, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      using A = typename Compute<T>::type;
      const auto aa = shape.widen<A>(a), ba = shape.widen<A>(b), da = shape.widen<A>(d);
      const int64_t W = shape.width;
      const T *dyp = data<T>(dy), *xp = data<T>(x), *yp = data<T>(y);
      T *dxp = data_mut<T>(dx), *drp = data_mut<T>(dresidual);
      shape.for_each([&](int64_t g, int64_t row, int64_t rows, int64_t) {
        grad_input(dyp + row * C, xp + row * C, yp ? yp + row * C : nullptr, dxp + row * C,
                   drp ? drp + row * C : nullptr, rows * C, W, aa.data() + g * W, ba.data() + g * W,
                   da.data() + g * W);
      });
    });
    return {dx, dweight, dbias, dresidual, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::optional<Tensor> optional(const Tensor* t) { return t ? std::optional<Tensor>(*t) : std::nullopt; }

}  // namespace

extern "C" {

int mentee_batch_norm_train(const Tensor* x, const Tensor* weight, const Tensor* bias, const Tensor* residual,
                            int64_t groups, double eps, int relu, mentee_reduce_fn reduce, void* context,
                            mentee_drop_fn drop, double* mean, double* variance, double* count, Tensor** out) {
  return mentee::guarded([&] {
    auto holder = c10::make_intrusive<Reduce>(reduce, context, drop);
    Statistics statistics;
    const Tensor y = BatchNorm::apply(*x, optional(weight), optional(bias), optional(residual), groups, eps, relu != 0,
                                      std::move(holder), &statistics);
    std::copy(statistics.mean.begin(), statistics.mean.end(), mean);
    std::copy(statistics.variance.begin(), statistics.variance.end(), variance);
    std::copy(statistics.count.begin(), statistics.count.end(), count);
    *out = new Tensor(y);
  });
}

int mentee_batch_norm_apply(const Tensor* x, const Tensor* weight, const Tensor* bias, const Tensor* residual,
                            const double* mean, const double* variance, double eps, int relu, Tensor** out) {
  return mentee::guarded([&] {
    at::NoGradGuard no_grad;
    const Tensor xd = dense(*x);
    const Shape shape(xd, 1);
    const Tensor y = normalise(xd, weight ? *weight : Tensor(), bias ? *bias : Tensor(),
                               residual ? dense(*residual) : Tensor(), shape, mean, variance, eps, relu != 0);
    *out = new Tensor(y);
  });
}
}
