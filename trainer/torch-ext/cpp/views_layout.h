#line 2 "views_layout.h"
// How the words that direct views, and the memory they are made in, are laid out: for the host, and in front of the kernel.
#ifndef MENTEE_VIEWS_LAYOUT_H
#define MENTEE_VIEWS_LAYOUT_H

// Words of a head: HEAD of trainer/data/src/directions.rs.
constexpr int kHead = 32;

// The mean of a plane is summed in blocks of so many values, in so many lanes each.
constexpr int kMeanBlock = 1024, kLanes = 16;

// Bytes that a view of side x side pixels takes while it is made of an image of up to `widest` columns:
//   planes  [3][side*side] f32, and as many again for the blur
//   lanes   [3][ceil(side*side/1024)][16] f32: sums for the means that contrast needs
//   line    [3][side][widest] bytes: the crop, resized down
#ifndef __CUDACC_RTC__  // the device is told
constexpr long long scratch_bytes(long long side, long long widest) {
  const long long area = side * side, sums = 3 * ((area + kMeanBlock - 1) / kMeanBlock) * kLanes;
  return ((6 * area + sums) * 4 + 3 * side * widest + 255) / 256 * 256;
}
#endif

#endif
