// Convolution and linear layer. On the processor, convolutions that Winograd's tiles fit are computed by them.
//
// Where the processor has no bf16 arithmetic that libtorch's kernels use, its bf16 convolution, which all others need, falls back
// to a loop that is ten times slower than f32; here the operands are widened instead: bf16 values are f32 values, products are summed
// in f32 as bf16 units do, and only results are rounded to bf16.

#include <torch/csrc/autograd/custom_function.h>

#include "shim.h"
#include "winograd.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What oneDNN asks for (mkldnn_bf16_device_check): AVX-512 with these parts; with AVX512-BF16 or AMX it is fast, without it
// widens by itself.
bool has_bf16_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq");
  return has;
#else
  return true;
#endif
}

bool widens(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.device().is_cpu() && !has_bf16_kernels();
}

Tensor wide(const Tensor& t) { return t.to(at::kFloat); }

// By tiles.
struct TiledConv : torch::autograd::Function<TiledConv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    ctx->save_for_backward({x, weight});
    return mentee::winograd::convolve(x, weight);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const Tensor dy = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    return {ctx->needs_input_grad(0) ? mentee::winograd::input_gradient(dy, saved[1]) : Tensor(),
            ctx->needs_input_grad(1) ? mentee::winograd::weight_gradient(saved[0], dy) : Tensor()};
  }
};

// Keeps the bf16 operands for the backward pass, not their f32 copies.
struct WideConv : torch::autograd::Function<WideConv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    return at::conv2d(wide(x), wide(weight), {}, {stride, stride}, {padding, padding}).to(at::kBFloat16);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    int64_t stride = ctx->saved_data["stride"].toInt(), padding = ctx->saved_data["padding"].toInt();
    auto [gx, gw, gb] = at::convolution_backward(wide(grads[0]), wide(saved[0]), wide(saved[1]), c10::nullopt, {stride, stride},
                                                 {padding, padding}, {1, 1}, false, {0, 0}, 1,
                                                 {ctx->needs_input_grad(0), ctx->needs_input_grad(1), false});
    auto narrow = [](const Tensor& t) { return t.defined() ? t.to(at::kBFloat16) : t; };
    return {narrow(gx), narrow(gw), Tensor(), Tensor()};
  }
};

// The tensor cores of a device take channels by eights: images have three, and the convolution that sees them, and its weight's
// gradient above all, would be computed without. So zero channels are added, which change nothing but rounding.
constexpr int64_t kChannels = 8;

bool pads(const Tensor& x) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && x.dim() == 4 && x.size(1) < kChannels;
}

// The stem of a ResNet, 7x7 of stride 2: of the same sums as 4x4 of stride 1 over blocks of 2x2 places, whose 12 values are
// channels (a row and a column of zero weights make the 7 an 8). So fewer of the products are with added zeros.
bool takes_blocks(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  return weight.size(2) == 7 && weight.size(3) == 7 && stride == 2 && padding == 3 && x.size(1) == 3 && x.size(2) % 2 == 0 &&
         x.size(3) % 2 == 0 && !x.requires_grad();
}

Tensor conv_of_blocks(const Tensor& x, const Tensor& weight) {
  constexpr int64_t kBlock = 12, kPadded = 16;
  const int64_t n = x.size(0), h = x.size(2) / 2, w = x.size(3) / 2;
  Tensor blocks = at::zeros({n, h + 3, w + 3, kPadded}, x.options());
  auto inner = blocks.narrow(1, 2, h).narrow(2, 2, w).narrow(3, 0, kBlock).unflatten(3, {2, 2, 3});
  inner.copy_(x.permute({0, 2, 3, 1}).unflatten(2, {w, 2}).unflatten(1, {h, 2}).permute({0, 1, 3, 2, 4, 5}));
  const Tensor taps = at::constant_pad_nd(weight, {1, 0, 1, 0}).unflatten(3, {4, 2}).unflatten(2, {4, 2});
  Tensor kernel = taps.permute({0, 3, 5, 1, 2, 4}).flatten(1, 3);
  kernel = at::constant_pad_nd(kernel, {0, 0, 0, 0, 0, kPadded - kBlock}).contiguous(at::MemoryFormat::ChannelsLast);
  return at::conv2d(blocks.permute({0, 3, 1, 2}), kernel);
}

Tensor padded_conv(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  if (takes_blocks(x, weight, stride, padding)) return conv_of_blocks(x, weight);
  const int64_t more = kChannels - x.size(1);
  auto pad = [more](const Tensor& t) { return at::constant_pad_nd(t, {0, 0, 0, 0, 0, more}); };
  return at::conv2d(pad(x), pad(weight), {}, {stride, stride}, {padding, padding});
}

Tensor convolution(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  if (mentee::winograd::applies(x, weight, stride, padding)) return TiledConv::apply(x, weight);
  if (widens(x)) return WideConv::apply(x, weight, stride, padding);
  if (pads(x)) return padded_conv(x, weight, stride, padding);
  return at::conv2d(x, weight, {}, {stride, stride}, {padding, padding});
}

struct WideLinear : torch::autograd::Function<WideLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    auto y = at::linear(wide(x), wide(weight), bias ? std::optional<Tensor>(wide(*bias)) : std::nullopt);
    return y.to(at::kBFloat16);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto g = wide(grads[0]);
    Tensor gx, gw, gb;
    if (ctx->needs_input_grad(0)) gx = at::mm(g, wide(saved[1])).to(at::kBFloat16);
    if (ctx->needs_input_grad(1)) gw = at::mm(g.t(), wide(saved[0])).to(at::kBFloat16);
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) gb = g.sum(0).to(at::kBFloat16);
    return {gx, gw, gb};
  }
};

}  // namespace

extern "C" {

int mentee_conv2d(const Tensor* x, const Tensor* weight, int64_t stride, int64_t padding, Tensor** out) {
  return mentee::guarded([&] {
    *out = new Tensor(convolution(*x, *weight, stride, padding));
  });
}

int mentee_conv2d_padded(const Tensor* x, const Tensor* weight, int64_t stride, int64_t padding, Tensor** out) {
  return mentee::guarded([&] { *out = new Tensor(padded_conv(*x, *weight, stride, padding)); });
}

int mentee_linear(const Tensor* x, const Tensor* weight, const Tensor* bias, Tensor** out) {
  return mentee::guarded([&] {
    std::optional<Tensor> b = bias ? std::optional<Tensor>(*bias) : std::nullopt;
    Tensor y = widens(*x) ? WideLinear::apply(*x, *weight, b) : at::linear(*x, *weight, b);
    *out = new Tensor(std::move(y));
  });
}

}  // extern "C"
