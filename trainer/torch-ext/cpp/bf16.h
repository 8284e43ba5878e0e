// Values as tensors hold them and as kernels compute with them: bf16 is widened to f32, and rounded to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "shim.h"

namespace mentee {

struct bf16 {
  uint16_t bits;
};

MENTEE_INLINE float load(const float* p) { return *p; }
MENTEE_INLINE double load(const double* p) { return *p; }
MENTEE_INLINE float load(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MENTEE_INLINE void store(float* p, float v) { *p = v; }
MENTEE_INLINE void store(double* p, double v) { *p = v; }
MENTEE_INLINE void store(bf16* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = v != v ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded);
}

}  // namespace mentee
