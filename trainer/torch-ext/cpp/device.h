// What the CPU code hands over to when its tensors are on a CUDA device. See device.cpp.
#pragma once
#include "shim.h"

namespace mentee::device {

at::Tensor batch_norm_train(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                            const at::Tensor& running, int64_t groups, double eps, double momentum, bool relu,
                            mentee_device_reduce_fn reduce, void* context, mentee_drop_fn drop);
at::Tensor batch_norm_apply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const at::Tensor& residual, const at::Tensor& running, double eps, bool relu);

void ema(at::Tensor& teacher, const at::Tensor& student, int64_t teacher_begin, int64_t student_begin, int64_t len,
         double tau);
// [1] of f64, on the device.
at::Tensor square_norm(const at::Tensor& flat);

}  // namespace mentee::device
