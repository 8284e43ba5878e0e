// See views.cu.

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "launch.h"

namespace {

// Blocks at work at once, and the memory that they may take together.
constexpr int64_t kBlocks = 1024, kScratch = 256 << 20;
constexpr int64_t kHead = 32, kMeanBlock = 1024, kLanes = 16;

struct Normalise {
  float mean[3], inverse_std[3];
};

}  // namespace

extern "C" {

int mentee_device_views(const at::Tensor* images, const at::Tensor* words, int64_t views, int64_t side, int64_t widest,
                        const float* normalise, at::Tensor* out) {
  using mentee::device::pointer;
  return mentee::guarded([&] {
    const c10::DeviceGuard guard(out->device());
    TORCH_CHECK(images->scalar_type() == at::kByte && words->scalar_type() == at::kInt, "bytes and words are wanted");
    TORCH_CHECK(images->device() == out->device() && words->device() == out->device(), "all on one device");
    TORCH_CHECK(images->is_contiguous() && words->is_contiguous() && out->is_contiguous(), "without gaps");
    TORCH_CHECK(words->numel() >= views * kHead && out->numel() == views * side * side * 3, "shapes of views");
    if (views == 0) return;
    const int64_t area = side * side, sums = 3 * ((area + kMeanBlock - 1) / kMeanBlock) * kLanes;
    const int64_t each = ((6 * area + sums) * 4 + 3 * side * widest + 255) / 256 * 256;
    const int64_t blocks = std::min({views, kBlocks, std::max<int64_t>(kScratch / each, 1)});
    at::Tensor scratch = at::empty({blocks * each}, images->options());
    Normalise n;
    std::copy_n(normalise, 3, n.mean);
    std::copy_n(normalise + 3, 3, n.inverse_std);
    mentee::device::launch(*out, "views", "views_" + mentee::device::name_of(*out), {blocks, 1, 1}, {256, 1, 1}, 0,
                           pointer(*images), pointer(*words), views, static_cast<int32_t>(side), static_cast<int32_t>(widest),
                           n, scratch.mutable_data_ptr(), each, out->mutable_data_ptr());
  });
}
}
