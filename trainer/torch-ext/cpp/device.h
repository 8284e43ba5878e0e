// What the CPU code hands over to when its tensors are on a CUDA device. See device.cpp.
#pragma once
#include "shim.h"

namespace mentee::device {

void ema(at::Tensor& teacher, const at::Tensor& student, int64_t teacher_begin, int64_t student_begin, int64_t len,
         double tau);
// [1] of f64, on the device.
at::Tensor square_norm(const at::Tensor& flat);

}  // namespace mentee::device
