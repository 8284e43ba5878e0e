// The sums of winograd.cpp, tile by tile, for each kind of processor.
#pragma once
#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "shim.h"

namespace mentee::winograd::kernels {

// For what a kernel hands on: outside of it there are only the oldest processor's instructions.
#define MENTEE_INLINED __attribute__((always_inline))

constexpr int64_t kTaps = 16;
// Side of the squares that are transposed at a time.
constexpr int64_t kLane = 16;

namespace {

typedef float Lane __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
#if defined(__clang__)
#define MENTEE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Order __attribute__((vector_size(64)));
#define MENTEE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

MENTEE_INLINE Lane load_lane(const float* from) {
  Lane lane;
  std::memcpy(&lane, from, sizeof(Lane));
  return lane;
}
MENTEE_INLINE Lane load_lane(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(Halves));
  return reinterpret_cast<Lane>(__builtin_convertvector(halves, Words) << 16);
}
MENTEE_INLINE void store_lane(float* to, const Lane& lane) { std::memcpy(to, &lane, sizeof(Lane)); }

// How kernels take and give values.

// One by one; the compiler makes vectors of them, as wide as the processor has.
struct Plain {
  typedef float Value;
  static constexpr int64_t kWide = 1;
  template <typename T>
  static MENTEE_INLINE float get(const T* from) {
    return load(from);
  }
  template <typename T>
  static MENTEE_INLINE void put(T* to, float value) {
    store(to, value);
  }
};

#if defined(__x86_64__) && defined(__GNUC__)
#define MENTEE_AVX512_BF16
// By AVX512-BF16, which rounds sixteen values at once. (It takes and gives zero for what is smaller than any normal f32.)
struct Native {
  typedef Lane Value;
  static constexpr int64_t kWide = 16;
  template <typename T>
  static MENTEE_INLINE Lane get(const T* from) {
    return load_lane(from);
  }
  static MENTEE_INLINE void put(bf16* to, const Lane& lane) {
    Halves halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(lane));
    std::memcpy(to, &halves, sizeof(Halves));
  }
  static MENTEE_INLINE void put(float* to, const Lane& lane) { store_lane(to, lane); }
  // Two values in a word, the first of them lower.
  static MENTEE_INLINE Lane pair(const Lane& first, const Lane& second) {
    Halves low, high;
    asm("vcvtneps2bf16 %1, %0" : "=v"(low) : "v"(first));
    asm("vcvtneps2bf16 %1, %0" : "=v"(high) : "v"(second));
    return reinterpret_cast<Lane>(__builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16);
  }
};
#endif

// T is what a tensor holds, P what a product multiplies. All of these work on `channels` values side by side, and tap t of a
// result lies at out + t * step.

// B' d B of sixteen places
struct OfInput {
  static constexpr int64_t kPlaces = 16;

  template <typename W, typename T, typename V = typename W::Value>
  static MENTEE_INLINE void transform(const T* const* d, int64_t c, V* out) {
    V t[16];
    for (int j = 0; j < 4; ++j) {
      const V a = W::get(d[j] + c), b = W::get(d[4 + j] + c), e = W::get(d[8 + j] + c), f = W::get(d[12 + j] + c);
      t[j] = a - e, t[4 + j] = b + e, t[8 + j] = e - b, t[12 + j] = b - f;
    }
    for (int i = 0; i < 4; ++i) {
      const V a = t[4 * i], b = t[4 * i + 1], e = t[4 * i + 2], f = t[4 * i + 3];
      out[4 * i] = a - e, out[4 * i + 1] = b + e, out[4 * i + 2] = e - b, out[4 * i + 3] = b - f;
    }
  }
};

// G g G' of nine places
struct OfWeight {
  static constexpr int64_t kPlaces = 9;

  template <typename W, typename T, typename V = typename W::Value>
  static MENTEE_INLINE void transform(const T* const* g, int64_t c, V* out) {
    V t[12];
    for (int j = 0; j < 3; ++j) {
      const V a = W::get(g[j] + c), b = 0.5f * W::get(g[3 + j] + c), e = W::get(g[6 + j] + c), half = 0.5f * (a + e);
      t[j] = a, t[3 + j] = half + b, t[6 + j] = half - b, t[9 + j] = e;
    }
    for (int i = 0; i < 4; ++i) {
      const V a = t[3 * i], b = 0.5f * t[3 * i + 1], e = t[3 * i + 2], half = 0.5f * (a + e);
      out[4 * i] = a, out[4 * i + 1] = half + b, out[4 * i + 2] = half - b, out[4 * i + 3] = e;
    }
  }
};

// All taps of one tile.
template <typename Of, typename W, typename T, typename P>
MENTEE_INLINE void tile_of(const T* const* places, P* __restrict__ out, int64_t step, int64_t channels) {
  const T* own[Of::kPlaces];
  std::copy_n(places, Of::kPlaces, own);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; c += W::kWide) {
    typename W::Value taps[kTaps];
    Of::template transform<W>(own, c, taps);
    for (int t = 0; t < kTaps; ++t) W::put(out + t * step + c, taps[t]);
  }
}

// A' m A
template <typename W, typename T>
MENTEE_INLINE void output_tile_of(const float* __restrict__ m, int64_t step, T* const* places, int64_t channels) {
  typedef typename W::Value V;
  T *y0 = places[0], *y1 = places[1], *y2 = places[2], *y3 = places[3];
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; c += W::kWide) {
    V t[8];
    for (int j = 0; j < 4; ++j) {
      const V a = W::get(m + j * step + c), b = W::get(m + (4 + j) * step + c), e = W::get(m + (8 + j) * step + c),
              f = W::get(m + (12 + j) * step + c);
      t[j] = a + b + e, t[4 + j] = b - e - f;
    }
    W::put(y0 + c, t[0] + t[1] + t[2]), W::put(y1 + c, t[1] - t[2] - t[3]);
    W::put(y2 + c, t[4] + t[5] + t[6]), W::put(y3 + c, t[5] - t[6] - t[7]);
  }
}

// G' u G to nine places
template <typename W, typename T>
MENTEE_INLINE void weight_gradient_tile_of(const float* __restrict__ u, int64_t step, T* const* places, int64_t channels) {
  typedef typename W::Value V;
  T* g[9];
  std::copy_n(places, 9, g);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; c += W::kWide) {
    V t[12];
    for (int j = 0; j < 4; ++j) {
      const V a = W::get(u + j * step + c), b = W::get(u + (4 + j) * step + c), e = W::get(u + (8 + j) * step + c),
              f = W::get(u + (12 + j) * step + c);
      const V half = 0.5f * (b + e);
      t[j] = a + half, t[4 + j] = 0.5f * (b - e), t[8 + j] = half + f;
    }
    for (int i = 0; i < 3; ++i) {
      const V a = t[4 * i], b = t[4 * i + 1], e = t[4 * i + 2], f = t[4 * i + 3], half = 0.5f * (b + e);
      W::put(g[3 * i] + c, a + half), W::put(g[3 * i + 1] + c, 0.5f * (b - e)), W::put(g[3 * i + 2] + c, half + f);
    }
  }
}

// put(column, a[..][column]) of a square: squares of 1, 2, 4 and 8 change places.
template <typename F>
MENTEE_INLINE void transpose_square(Lane* a, F&& put) {
  Lane b[kLane];
  for (int i = 0; i < 16; i += 2) {
    b[i] = MENTEE_SHUFFLE(a[i], a[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    b[i + 1] = MENTEE_SHUFFLE(a[i], a[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int n = 0; n < 8; ++n) {
    const int i = n / 2 * 4 + n % 2;
    a[i] = MENTEE_SHUFFLE(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    a[i + 2] = MENTEE_SHUFFLE(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int n = 0; n < 8; ++n) {
    const int i = n / 4 * 8 + n % 4;
    b[i] = MENTEE_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    b[i + 4] = MENTEE_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 8; ++i) {
    a[i] = MENTEE_SHUFFLE(b[i], b[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    a[i + 8] = MENTEE_SHUFFLE(b[i], b[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int64_t i = 0; i < kLane; ++i) put(i, a[i]);
}

// Row `row` of A on two values.
MENTEE_INLINE void along(int row, const Lane& first, const Lane& second, Lane& out) {
  out = row == 0 ? first : row == 1 ? first + second : row == 2 ? first - second : -second;
}

// A dy A' of kLane tiles and as many channels: for row i of the taps, of_row(i, left, right), in which A has been applied to the
// rows of dy.
template <typename T, typename F>
MENTEE_INLINE void gradient_rows(const T* const (*places)[4], int64_t channel, F&& of_row) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Lane left[kLane], right[kLane];
    for (int64_t n = 0; n < kLane; ++n) {
      along(i, load_lane(places[n][0] + channel), load_lane(places[n][2] + channel), left[n]);
      along(i, load_lane(places[n][1] + channel), load_lane(places[n][3] + channel), right[n]);
    }
    of_row(i, left, right);
  }
}

// kRows tiles are rows of a product's second operand that lie together, value by value.
template <typename T, typename P>
struct Kernels;

#define MENTEE_KERNELS(T)                                                                                                       \
  MENTEE_MULTIVERSION void input_tile(const T* const* places, float* out, int64_t step, int64_t channels) {                     \
    tile_of<OfInput, Plain>(places, out, step, channels);                                                                       \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void output_tile(const float* m, int64_t step, T* const* places, int64_t channels) {                      \
    output_tile_of<Plain>(m, step, places, channels);                                                                           \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void weight_tile(const T* const* places, float* out, int64_t step, int64_t channels) {                    \
    tile_of<OfWeight, Plain>(places, out, step, channels);                                                                      \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void weight_gradient_tile(const float* u, int64_t step, T* const* places, int64_t channels) {             \
    weight_gradient_tile_of<Plain>(u, step, places, channels);                                                                  \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void transpose(const T* in, int64_t in_step, float* out, int64_t step) {                                  \
    Lane a[kLane];                                                                                                              \
    for (int64_t i = 0; i < kLane; ++i) a[i] = load_lane(in + in_step * i);                                                     \
    transpose_square(a, [&](int64_t i, const Lane& lane) MENTEE_INLINED { store_lane(out + i * step, lane); });                 \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void transposed_gradients(const T* const (*places)[4], int64_t channel, float* out, int64_t step,         \
                                                int64_t tap_step) {                                                             \
    gradient_rows(places, channel, [&](int row, const Lane* left, const Lane* right) MENTEE_INLINED {                           \
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) {                                                                     \
        float* to = out + (4 * row + j) * tap_step;                                                                             \
        Lane a[kLane];                                                                                                          \
        for (int64_t n = 0; n < kLane; ++n) along(j, left[n], right[n], a[n]);                                                  \
        transpose_square(a, [&](int64_t i, const Lane& lane) MENTEE_INLINED { store_lane(to + i * step, lane); });              \
      }                                                                                                                         \
    });                                                                                                                         \
  }
MENTEE_KERNELS(float)
MENTEE_KERNELS(bf16)

template <typename T>
struct Kernels<T, float> {
  static constexpr int64_t kRows = 1;

  static void input_tile(const T* const* places, float* out, int64_t step, int64_t channels) {
    kernels::input_tile(places, out, step, channels);
  }
  static void output_tile(const float* m, int64_t step, T* const* places, int64_t channels) {
    kernels::output_tile(m, step, places, channels);
  }
  static void input_rows(const T* const (*places)[16], float* out, int64_t step, int64_t channels) {
    kernels::input_tile(places[0], out, step, channels);
  }
  static void weight_rows(const T* const (*places)[9], float* out, int64_t step, int64_t channels) {
    kernels::weight_tile(places[0], out, step, channels);
  }
  // [rows, 3, 3, step / 9] to kTaps matrices [channels, rows]: places are turned first, as there are fewer of them than taps.
  static void turned_weights(const T* weight, int64_t weight_step, int64_t rows, int64_t channels, float* out, int64_t step,
                             float* scratch) {
    const int64_t size = rows * channels;
    for (int64_t r = 0; r < rows; r += kLane)
      for (int64_t i = 0; i < 9; ++i)
        for (int64_t c = 0; c < channels; c += kLane)
          transpose(weight + r * weight_step + i * weight_step / 9 + c, weight_step, scratch + i * size + c * rows + r, rows);
    for (int64_t c = 0; c < channels; ++c) {
      const float* places[9];
      for (int64_t i = 0; i < 9; ++i) places[i] = scratch + i * size + c * rows;
      kernels::weight_tile(places, out + c * rows, step, rows);
    }
  }
  static void weight_gradient_tile(const float* u, int64_t step, T* const* places, int64_t channels) {
    kernels::weight_gradient_tile(u, step, places, channels);
  }
  static void transposed_gradients(const T* const (*places)[4], int64_t channel, float* out, int64_t step, int64_t tap_step) {
    kernels::transposed_gradients(places, channel, out, step, tap_step);
  }
};

#ifdef MENTEE_AVX512_BF16
#define MENTEE_NATIVE __attribute__((target("arch=x86-64-v4"))) static

template <>
struct Kernels<bf16, bf16> {
  static constexpr int64_t kRows = 2;

  MENTEE_NATIVE void input_tile(const bf16* const* places, bf16* out, int64_t step, int64_t channels) {
    tile_of<OfInput, Native>(places, out, step, channels);
  }
  MENTEE_NATIVE void output_tile(const float* m, int64_t step, bf16* const* places, int64_t channels) {
    output_tile_of<Native>(m, step, places, channels);
  }
  MENTEE_NATIVE void input_rows(const bf16* const (*places)[16], bf16* out, int64_t step, int64_t channels) {
    two_tiles_of<OfInput>(places, out, step, channels);
  }
  MENTEE_NATIVE void weight_rows(const bf16* const (*places)[9], bf16* out, int64_t step, int64_t channels) {
    two_tiles_of<OfWeight>(places, out, step, channels);
  }
  // As above. Two channels are one word, which is turned whole.
  MENTEE_NATIVE void turned_weights(const bf16* weight, int64_t weight_step, int64_t rows, int64_t channels, bf16* out, int64_t step,
                                    float*) {
    constexpr int64_t kChannels = 2 * kLane;
    alignas(64) bf16 taps[kTaps][kLane][kChannels];
    for (int64_t c = 0; c < channels; c += kChannels)
      for (int64_t r = 0; r < rows; r += kLane) {
        for (int64_t n = 0; n < kLane; ++n) {
          const bf16* places[9];
          for (int64_t i = 0; i < 9; ++i) places[i] = weight + (r + n) * weight_step + i * weight_step / 9 + c;
          tile_of<OfWeight, Native>(places, taps[0][n], kLane * kChannels, kChannels);
        }
        for (int64_t t = 0; t < kTaps; ++t) {
          Lane a[kLane];
          std::memcpy(a, taps[t], sizeof(a));
          bf16* to = out + t * step + c * rows + 2 * r;
          transpose_square(a, [&](int64_t i, const Lane& lane) MENTEE_INLINED { std::memcpy(to + 2 * i * rows, &lane, sizeof(Lane)); });
        }
      }
  }
  MENTEE_NATIVE void weight_gradient_tile(const float* u, int64_t step, bf16* const* places, int64_t channels) {
    weight_gradient_tile_of<Native>(u, step, places, channels);
  }
  // Two tiles are one word; squares hold two taps.
  MENTEE_NATIVE void transposed_gradients(const bf16* const (*places)[4], int64_t channel, bf16* out, int64_t step, int64_t tap_step) {
    constexpr int64_t kHalf = kLane / 2;
    gradient_rows(places, channel, [&](int row, const Lane* left, const Lane* right) MENTEE_INLINED {
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        Lane a[kLane];
        for (int64_t n = 0; n < kLane; ++n) {
          const int64_t tile = n % kHalf * 2;
          Lane first, second;
          along(n < kHalf ? j : j + 1, left[tile], right[tile], first);
          along(n < kHalf ? j : j + 1, left[tile + 1], right[tile + 1], second);
          a[n] = Native::pair(first, second);
        }
        bf16* to = out + (4 * row + j) * tap_step;
        transpose_square(a, [&](int64_t i, const Lane& lane) MENTEE_INLINED {
          std::memcpy(to + i * step, &lane, sizeof(Lane) / 2);
          std::memcpy(to + tap_step + i * step, reinterpret_cast<const char*>(&lane) + sizeof(Lane) / 2, sizeof(Lane) / 2);
        });
      }
    });
  }

 private:
  template <typename Of>
  static MENTEE_INLINE void two_tiles_of(const bf16* const (*places)[Of::kPlaces], bf16* out, int64_t step, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLane) {
      Lane first[kTaps], second[kTaps];
      Of::template transform<Native>(places[0], c, first);
      Of::template transform<Native>(places[1], c, second);
      for (int t = 0; t < kTaps; ++t) {
        const Lane words = Native::pair(first[t], second[t]);
        std::memcpy(out + t * step + 2 * c, &words, sizeof(Lane));
      }
    }
  }
};
#endif

}  // namespace
}  // namespace mentee::winograd::kernels
