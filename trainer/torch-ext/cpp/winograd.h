// Convolutions 3x3 of stride 1 on the processor in f32 and bf16, by tiles: see winograd.cpp. None of these is seen by autograd.
#pragma once
#include <ATen/ATen.h>

namespace mentee::winograd {

// Whether they do this convolution: x [N, C, H, W] and weight [K, C, 3, 3], both channels-last, stride 1, padding 1,
// in f32, or in bf16 on x86-64 without AMX.
bool applies(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t padding);

// y [N, K, H, W].
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight);
// dx [N, C, H, W] from dy [N, K, H, W].
at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight);
// dweight [K, C, 3, 3] from x and dy.
at::Tensor weight_gradient(const at::Tensor& x, const at::Tensor& dy);

}  // namespace mentee::winograd
