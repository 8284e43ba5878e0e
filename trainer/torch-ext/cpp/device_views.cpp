// See views.cu.

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>

#include "launch.h"
#include "views_layout.h"

namespace {

// Blocks at work at once, each on a view: more would only take memory, fewer leave most of a device idle.
constexpr int64_t kMost = 1024, kFewest = 32;
// Memory that they may take together.
constexpr int64_t kScratch = 256 << 20;

struct Normalise {
  float mean[3], inverse_std[3];
};

struct Room {
  int64_t blocks, each;  // bytes
};

Room room(int64_t views, int64_t side, int64_t widest) {
  TORCH_CHECK(3 * side * std::max(side, widest) <= std::numeric_limits<int32_t>::max(), "images of ", widest,
              " columns are too wide for a device to make views of ", side, " pixels");
  const int64_t each = scratch_bytes(side, widest);
  const int64_t blocks = std::min({views, kMost, kScratch / each});
  TORCH_CHECK(blocks >= std::min(views, kFewest), "views of ", side, " pixels, of images of up to ", widest,
              " columns, are too large for a device to make many at a time");
  return {blocks, each};
}

}  // namespace

extern "C" {

// What views take beside the pixels, bytes; an error where there is no room for both.
int mentee_device_views_room(int device, int64_t pixels, int64_t views, int64_t side, int64_t widest, int64_t* scratch) {
  return mentee::guarded([&] {
    const Room own = room(views, side, widest);
    *scratch = own.blocks * own.each;
    const auto [free, total] = at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    const auto wanted = static_cast<size_t>(pixels + *scratch);
    TORCH_CHECK(free >= wanted + total / 10, "the device has ", free >> 20, " MiB of ", total >> 20, " left, ", wanted >> 20,
                " are wanted, and a tenth of all stays free");
  });
}

int mentee_device_views(const at::Tensor* images, const at::Tensor* words, int64_t widest, const float* normalise,
                        at::Tensor* scratch, at::Tensor* out) {
  using mentee::device::pointer;
  return mentee::guarded([&] {
    const c10::DeviceGuard guard(out->device());
    TORCH_CHECK(images->scalar_type() == at::kByte && words->scalar_type() == at::kInt, "bytes and words are wanted");
    for (const at::Tensor* t : {images, words, static_cast<const at::Tensor*>(scratch)})
      TORCH_CHECK(t->device() == out->device() && t->is_contiguous(), "all on one device, without gaps");
    TORCH_CHECK(out->dim() == 4 && out->size(1) == out->size(2) && out->size(3) == 3 && out->is_contiguous(), "shape of views");
    const int64_t views = out->size(0), side = out->size(1);
    TORCH_CHECK(words->numel() >= views * kHead && words->numel() <= std::numeric_limits<int32_t>::max(), "number of words");
    if (views == 0) return;
    const auto [blocks, each] = room(views, side, widest);
    TORCH_CHECK(scratch->numel() >= blocks * each, "scratch memory");
    Normalise n;
    std::copy_n(normalise, 3, n.mean);
    std::copy_n(normalise + 3, 3, n.inverse_std);
    mentee::device::launch(*out, "views", "views_" + mentee::device::name_of(*out), {blocks, 1, 1}, {256, 1, 1}, 0,
                           pointer(*images), pointer(*words), views, static_cast<int32_t>(side), static_cast<int32_t>(widest),
                           n, scratch->mutable_data_ptr(), static_cast<int64_t>(each), out->mutable_data_ptr());
  });
}
}
