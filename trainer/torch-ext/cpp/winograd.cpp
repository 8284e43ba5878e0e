// Convolution 3x3 of stride 1 by tiles of 2x2 outputs: Winograd's minimal filtering, arXiv:1509.09308, section 4.1, F(2x2, 3x3).
//
//   y = A' [ (G g G') . (B' d B) ] A        g: 3x3 weights, d: 4x4 inputs, y: 2x2 outputs, . : sum over channels, tap by tap
//
// The middle is 16 products of matrices [tiles, C] x [C, K], with 4 multiplications an output where the direct sum has 9; they
// are oneDNN's brgemm. B, G and A are sums of a few values (and halves), so that in f32 the result is about as near to the exact
// one as the direct sum's, whose sums are longer. A block of tiles goes through all of it before the next, within the caches.
//
// bf16 tensors are widened as they are read, and what is written is rounded. Where the processor multiplies bf16 at twice the rate
// of f32, the operands of the products are rounded to bf16 too, once more than in the direct sum; all sums stay f32.
//
// How tiles are grouped depends on the shape alone, and every sum is one thread's, in a fixed order: the result does not depend on
// the number of threads.

#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

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

constexpr int64_t kTaps = 16;
// Rows of a product at most.
constexpr int64_t kRows = 64;
// Channels come in multiples of this: the columns of the narrowest product.
constexpr int64_t kFewest = 32;
// Side of the squares that are transposed at a time.
constexpr int64_t kLane = 16;
// Values between two taps, or rows, whose distance would be a power of two else: those share few places of a first-level cache.
constexpr int64_t kApart = 16;
// Values of a tap that a thread's block of transformed inputs holds, about: all taps fit in a second-level cache of a megabyte.
constexpr int64_t kBlock = 16384;
// The same for the two operands of the weights' gradient, which all threads work on together: in a third-level cache.
constexpr int64_t kChunk = 32768;

// Values aligned as vectors want them, not initialised.
template <typename T>
struct Values {
  explicit Values(int64_t n) : memory(c10::GetCPUAllocator()->allocate(static_cast<size_t>(n) * sizeof(T))) {}
  T* get() const { return static_cast<T*>(memory.get()); }
  at::DataPtr memory;
};

// `n` of them for each thread. Taken at once: threads would each ask an arena of their own, again and again.
struct Scratch {
  explicit Scratch(int64_t n) : each((n + kApart - 1) / kApart * kApart + kApart), all(each * at::get_num_threads()) {}
  float* mine() const { return all.get() + each * at::get_thread_num(); }
  int64_t each;
  Values<float> all;
};

// [N, H, W, C] in memory, in tiles of 2x2.
struct Tiles {
  int64_t images, height, width, down, across, count;

  explicit Tiles(const Tensor& t)
      : images(t.size(0)),
        height(t.size(2)),
        width(t.size(3)),
        down((height + 1) / 2),
        across((width + 1) / 2),
        count(images * down * across) {}

  // Where the `side` x `side` places of a tile lie, from `before` above and left of its first; `outside` for those that the image
  // does not have.
  template <typename T>
  MENTEE_INLINE void places(int64_t tile, int64_t side, int64_t before, T* data, int64_t channels, T* outside, T** out) const {
    const int64_t image = tile / (down * across), top = 2 * (tile / across % down) - before, left = 2 * (tile % across) - before;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) {
        const int64_t row = top + i, column = left + j;
        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
        out[i * side + j] = inside ? data + ((image * height + row) * width + column) * channels : outside;
      }
  }
};

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

// B' d B
template <typename W, typename T, typename V = typename W::Value>
MENTEE_INLINE void transform_input(const T* const* d, int64_t c, V* out) {
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

// G g G' of nine places
template <typename W, typename T, typename V = typename W::Value>
MENTEE_INLINE void transform_weight(const T* const* g, int64_t c, V* out) {
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

template <typename W, typename T, typename P>
MENTEE_INLINE void input_tile_of(const T* const* places, P* __restrict__ out, int64_t step, int64_t channels) {
  const T* d[16];
  std::copy_n(places, 16, d);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; c += W::kWide) {
    typename W::Value taps[16];
    transform_input<W>(d, c, taps);
    for (int t = 0; t < kTaps; ++t) W::put(out + t * step + c, taps[t]);
  }
}

template <typename W, typename T, typename P>
MENTEE_INLINE void weight_tile_of(const T* const* places, P* __restrict__ out, int64_t step, int64_t channels) {
  const T* g[9];
  std::copy_n(places, 9, g);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; c += W::kWide) {
    typename W::Value taps[16];
    transform_weight<W>(g, c, taps);
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
    input_tile_of<Plain>(places, out, step, channels);                                                                          \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void output_tile(const float* m, int64_t step, T* const* places, int64_t channels) {                      \
    output_tile_of<Plain>(m, step, places, channels);                                                                           \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void weight_tile(const T* const* places, float* out, int64_t step, int64_t channels) {                    \
    weight_tile_of<Plain>(places, out, step, channels);                                                                         \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void weight_gradient_tile(const float* u, int64_t step, T* const* places, int64_t channels) {             \
    weight_gradient_tile_of<Plain>(u, step, places, channels);                                                                  \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void transpose(const T* in, int64_t in_step, float* out, int64_t step) {                                  \
    Lane a[kLane];                                                                                                              \
    for (int64_t i = 0; i < kLane; ++i) a[i] = load_lane(in + in_step * i);                                                     \
    transpose_square(a, [&](int64_t i, const Lane& lane) { store_lane(out + i * step, lane); });                                \
  }                                                                                                                             \
  MENTEE_MULTIVERSION void transposed_gradients(const T* const (*places)[4], int64_t channel, float* out, int64_t step,         \
                                                int64_t tap_step) {                                                             \
    gradient_rows(places, channel, [&](int row, const Lane* left, const Lane* right) {                                          \
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) {                                                                     \
        float* to = out + (4 * row + j) * tap_step;                                                                             \
        Lane a[kLane];                                                                                                          \
        for (int64_t n = 0; n < kLane; ++n) along(j, left[n], right[n], a[n]);                                                  \
        transpose_square(a, [&](int64_t i, const Lane& lane) { store_lane(to + i * step, lane); });                             \
      }                                                                                                                         \
    });                                                                                                                         \
  }
MENTEE_KERNELS(float)
MENTEE_KERNELS(bf16)

template <typename T>
struct Kernels<T, float> {
  static constexpr int64_t kRows = 1;

  static void input_tile(const T* const* places, float* out, int64_t step, int64_t channels) {
    ::input_tile(places, out, step, channels);
  }
  static void output_tile(const float* m, int64_t step, T* const* places, int64_t channels) {
    ::output_tile(m, step, places, channels);
  }
  static void input_rows(const T* const (*places)[16], float* out, int64_t step, int64_t channels) {
    ::input_tile(places[0], out, step, channels);
  }
  static void weight_rows(const T* const (*places)[9], float* out, int64_t step, int64_t channels) {
    ::weight_tile(places[0], out, step, channels);
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
      ::weight_tile(places, out + c * rows, step, rows);
    }
  }
  static void weight_gradient_tile(const float* u, int64_t step, T* const* places, int64_t channels) {
    ::weight_gradient_tile(u, step, places, channels);
  }
  static void transposed_gradients(const T* const (*places)[4], int64_t channel, float* out, int64_t step, int64_t tap_step) {
    ::transposed_gradients(places, channel, out, step, tap_step);
  }
};

#ifdef MENTEE_AVX512_BF16
#define MENTEE_NATIVE __attribute__((target("arch=x86-64-v4"))) static

template <>
struct Kernels<bf16, bf16> {
  static constexpr int64_t kRows = 2;

  MENTEE_NATIVE void input_tile(const bf16* const* places, bf16* out, int64_t step, int64_t channels) {
    input_tile_of<Native>(places, out, step, channels);
  }
  MENTEE_NATIVE void output_tile(const float* m, int64_t step, bf16* const* places, int64_t channels) {
    output_tile_of<Native>(m, step, places, channels);
  }
  MENTEE_NATIVE void input_rows(const bf16* const (*places)[16], bf16* out, int64_t step, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLane) {
      Lane first[16], second[16];
      transform_input<Native>(places[0], c, first);
      transform_input<Native>(places[1], c, second);
      for (int t = 0; t < kTaps; ++t) put_pair(out + t * step + 2 * c, first[t], second[t]);
    }
  }
  MENTEE_NATIVE void weight_rows(const bf16* const (*places)[9], bf16* out, int64_t step, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kLane) {
      Lane first[16], second[16];
      transform_weight<Native>(places[0], c, first);
      transform_weight<Native>(places[1], c, second);
      for (int t = 0; t < kTaps; ++t) put_pair(out + t * step + 2 * c, first[t], second[t]);
    }
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
          weight_tile_of<Native>(places, taps[0][n], kLane * kChannels, kChannels);
        }
        for (int64_t t = 0; t < kTaps; ++t) {
          Lane a[kLane];
          std::memcpy(a, taps[t], sizeof(a));
          bf16* to = out + t * step + c * rows + 2 * r;
          transpose_square(a, [&](int64_t i, const Lane& lane) { std::memcpy(to + 2 * i * rows, &lane, sizeof(Lane)); });
        }
      }
  }
  MENTEE_NATIVE void weight_gradient_tile(const float* u, int64_t step, bf16* const* places, int64_t channels) {
    weight_gradient_tile_of<Native>(u, step, places, channels);
  }
  // Two tiles are one word; squares hold two taps.
  MENTEE_NATIVE void transposed_gradients(const bf16* const (*places)[4], int64_t channel, bf16* out, int64_t step, int64_t tap_step) {
    constexpr int64_t kHalf = kLane / 2;
    gradient_rows(places, channel, [&](int row, const Lane* left, const Lane* right) {
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
        transpose_square(a, [&](int64_t i, const Lane& lane) {
          std::memcpy(to + i * step, &lane, sizeof(Lane) / 2);
          std::memcpy(to + tap_step + i * step, reinterpret_cast<const char*>(&lane) + sizeof(Lane) / 2, sizeof(Lane) / 2);
        });
      }
    });
  }

 private:
  static MENTEE_INLINE void put_pair(bf16* to, const Lane& first, const Lane& second) {
    const Lane words = Native::pair(first, second);
    std::memcpy(to, &words, sizeof(Lane));
  }
};
#endif

// Columns of a product, and of a block of transformed weights: many are faster.
int64_t columns_of(int64_t channels) { return channels % 64 == 0 ? 64 : 32; }

// A tensor's memory.
template <typename T>
T* values(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// c [m, n] (+)= a [m, k] b [k, n]
MENTEE_INLINE void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_step, const float* b, int64_t b_step, float* c,
                           int64_t c_step, bool adds) {
  at::native::cpublas::brgemm(m, n, k, a_step, b_step, c_step, adds, a, b, c, /*is_vnni=*/false);
}
MENTEE_INLINE void product(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_step, const bf16* b, int64_t b_step, float* c,
                           int64_t c_step, bool adds) {
  at::native::cpublas::brgemm(m, n, k, a_step, b_step, c_step, adds, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

// Transformed weights for products with inputs of `from` channels: [16][to / columns][from][columns], P's order. Memory is
// [K, 3, 3, C]; forward goes from C to K.
template <typename T, typename P>
Values<P> forward_weights(const T* weight, int64_t out_channels, int64_t in_channels) {
  Values<P> transformed(kTaps * out_channels * in_channels);
  const int64_t columns = columns_of(out_channels), rows = columns_of(in_channels), each = in_channels / rows;
  const Scratch scratch(9 * rows * columns);
  at::parallel_for(0, out_channels / columns * each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t k = n / each * columns, c = n % each * rows;
      Kernels<T, P>::turned_weights(weight + k * 9 * in_channels + c, 9 * in_channels, columns, rows,
                                    transformed.get() + k * in_channels + c * columns, out_channels * in_channels, scratch.mine());
    }
  });
  return transformed;
}

// The same from K to C, with the nine places turned by half a turn: a gradient goes back the way its value came.
template <typename T, typename P>
Values<P> backward_weights(const T* weight, int64_t out_channels, int64_t in_channels) {
  constexpr int64_t kTogether = Kernels<T, P>::kRows;
  Values<P> transformed(kTaps * out_channels * in_channels);
  const int64_t columns = columns_of(in_channels), blocks = in_channels / columns;
  at::parallel_for(0, blocks * out_channels / kTogether, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kTogether; n < end * kTogether; n += kTogether) {
      const int64_t block = n / out_channels, k = n % out_channels;
      const T* places[kTogether][9];
      for (int64_t r = 0; r < kTogether; ++r)
        for (int64_t i = 0; i < 9; ++i) places[r][i] = weight + ((k + r) * 9 + 8 - i) * in_channels + block * columns;
      Kernels<T, P>::weight_rows(places, transformed.get() + n * columns, out_channels * in_channels, columns);
    }
  });
  return transformed;
}

// x [N, H, W, from] -> y [N, H, W, to].
template <typename T, typename P>
void convolve_tiles(const Tensor& x, const Values<P>& weights, Tensor& y) {
  const Tiles tiles(x);
  const int64_t from = x.size(1), to = y.size(1), columns = columns_of(to), blocks = to / columns;
  const int64_t block = std::clamp<int64_t>(kBlock / from, kLane, kRows);
  const int64_t input_step = block * from + kApart, product_step = block * columns + kApart;
  const Scratch scratch(kTaps * (input_step + product_step) + from + columns);  // enough for P and T, neither wider than f32
  const T* in = values<T>(x);
  T* out = values<T>(y);
  at::parallel_for(0, (tiles.count + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    float *products = scratch.mine(), *inputs_at = products + kTaps * product_step;
    P* inputs = reinterpret_cast<P*>(inputs_at);
    T *zeros = reinterpret_cast<T*>(inputs_at + kTaps * input_step), *nowhere = zeros + from;
    std::fill_n(zeros, from, T{});
    for (int64_t first = begin * block; first < std::min(end * block, tiles.count); first += block) {
      const int64_t count = std::min(block, tiles.count - first);
      for (int64_t n = 0; n < count; ++n) {
        const T* places[16];
        tiles.places<const T>(first + n, 4, 1, in, from, zeros, places);
        Kernels<T, P>::input_tile(places, inputs + n * from, input_step, from);
      }
      for (int64_t k = 0; k < blocks; ++k) {
        for (int64_t t = 0; t < kTaps; ++t)
          product(count, columns, from, inputs + t * input_step, from, weights.get() + (t * blocks + k) * from * columns, columns,
                  products + t * product_step, columns, false);
        for (int64_t n = 0; n < count; ++n) {
          T* places[4];
          // `nowhere` takes what lies outside an image of odd sides.
          tiles.places<T>(first + n, 2, 0, out + k * columns, to, nowhere, places);
          Kernels<T, P>::output_tile(products + n * columns, product_step, places, columns);
        }
      }
    }
  });
}

// The sum over tiles is one more product for each tap: [K, tiles] x [tiles, C].
template <typename T, typename P>
void sum_weight_gradient(const Tensor& x, const Tensor& dy, Tensor& dweight) {
  constexpr int64_t kTogether = Kernels<T, P>::kRows;
  const Tiles tiles(x);
  const int64_t in_channels = x.size(1), out_channels = dy.size(1);
  const int64_t most = std::max<int64_t>(kChunk / std::max(in_channels, out_channels) / kLane, 8) * kLane;
  const int64_t chunk = std::min(most, (tiles.count + kLane - 1) / kLane * kLane);
  const T *in = values<T>(x), *grad = values<T>(dy);
  const int64_t input_step = chunk * in_channels + kApart, row_step = chunk + kApart;
  const int64_t grad_step = out_channels * row_step + kApart, sum_step = out_channels * in_channels + kApart;
  Values<P> inputs(kTaps * input_step);   // [16][tile][C], P's order
  Values<P> grads(kTaps * grad_step);     // [16][K][tile]
  Values<float> sums(kTaps * sum_step);   // [16][K][C]
  const int64_t widest = std::max(in_channels, out_channels);
  const std::vector<T> zeros(widest);
  for (int64_t first = 0; first < tiles.count; first += chunk) {
    // Of the last group, tiles that there are not are zeros.
    const int64_t groups = (std::min(chunk, tiles.count - first) + kLane - 1) / kLane;
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kLane; n < end * kLane; n += kLane) {
        const T* of_grads[kLane][4];
        const T* of_inputs[kTogether][16];
        for (int64_t r = 0; r < kLane; ++r) {
          const T** of_input = of_inputs[r % kTogether];
          std::fill_n(of_input, 16, zeros.data());
          std::fill_n(of_grads[r], 4, zeros.data());
          if (const int64_t tile = first + n + r; tile < tiles.count) {
            tiles.places<const T>(tile, 4, 1, in, in_channels, zeros.data(), of_input);
            tiles.places<const T>(tile, 2, 0, grad, out_channels, zeros.data(), of_grads[r]);
          }
          if ((r + 1) % kTogether == 0)
            Kernels<T, P>::input_rows(of_inputs, inputs.get() + (n + r + 1 - kTogether) * in_channels, input_step, in_channels);
        }
        for (int64_t k = 0; k < out_channels; k += kLane)
          Kernels<T, P>::transposed_gradients(of_grads, k, grads.get() + k * row_step + n, row_step, grad_step);
      }
    });
    const int64_t rows = columns_of(out_channels), columns = columns_of(in_channels), blocks = out_channels / rows;
    at::parallel_for(0, kTaps * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t tap = n / blocks, k = n % blocks * rows;
        for (int64_t c = 0; c < in_channels; c += columns)
          product(rows, columns, groups * kLane, grads.get() + tap * grad_step + k * row_step, row_step,
                  inputs.get() + tap * input_step + c * kTogether, in_channels,
                  sums.get() + tap * sum_step + k * in_channels + c, in_channels, first > 0);
      }
    });
  }
  T* out = values<T>(dweight);
  at::parallel_for(0, out_channels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* places[9];
      for (int64_t i = 0; i < 9; ++i) places[i] = out + (k * 9 + i) * in_channels;
      Kernels<T, P>::weight_gradient_tile(sums.get() + k * in_channels, sum_step, places, in_channels);
    }
  });
}

// Whether bf16 is the faster type to multiply in, and oneDNN as it is set up does it.
bool multiplies_bf16() {
#ifdef MENTEE_AVX512_BF16
  static const bool does = [] {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
    const std::vector<bf16> ones(2 * kLane, bf16{0x3f80});
    std::vector<float> sums(kLane);
    try {
      product(1, kLane, 2, ones.data(), 2, ones.data(), kLane, sums.data(), kLane, false);
    } catch (const c10::Error&) {
      return false;
    }
    return std::all_of(sums.begin(), sums.end(), [](float sum) { return sum == 2; });
  }();
  return does;
#else
  return false;
#endif
}

// Whether tiles are the faster way in bf16: AMX multiplies it so fast that the direct sum is. Other architectures: not measured.
bool tiles_bf16() {
#if defined(__x86_64__)
  static const bool does = !at::native::cpublas::could_pack(at::kBFloat16);
  return does;
#else
  return false;
#endif
}

template <typename P>
using Pointee = std::remove_pointer_t<P>;

// `body` gets two null pointers: of the type that `t` holds, and of the one to multiply in.
template <typename F>
void with_types(const Tensor& t, F&& body) {
  float* const f32 = nullptr;
  bf16* const half = nullptr;
  if (t.scalar_type() != at::kBFloat16) return body(f32, f32);
#ifdef MENTEE_AVX512_BF16
  if (multiplies_bf16()) return body(half, half);
#endif
  body(half, f32);
}

Tensor like(const Tensor& t, at::IntArrayRef shape) {
  return at::empty(shape, t.options().requires_grad(false), at::MemoryFormat::ChannelsLast);
}

// x from C to K channels, or back from K to C.
Tensor through_tiles(const Tensor& x, const Tensor& weight, bool back) {
  Tensor y = like(x, {x.size(0), weight.size(back ? 1 : 0), x.size(2), x.size(3)});
  with_types(x, [&](auto* t, auto* p) {
    using T = Pointee<decltype(t)>;
    using P = Pointee<decltype(p)>;
    const auto transformed = back ? backward_weights<T, P> : forward_weights<T, P>;
    convolve_tiles<T, P>(x, transformed(values<T>(weight), weight.size(0), weight.size(1)), y);
  });
  return y;
}

}  // namespace

namespace mentee::winograd {

bool applies(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  const at::ScalarType type = x.scalar_type();
  const auto fits = [type](const Tensor& t) {
    return t.dim() == 4 && t.device().is_cpu() && t.scalar_type() == type && t.is_contiguous(at::MemoryFormat::ChannelsLast);
  };
  return stride == 1 && padding == 1 && (type == at::kFloat || (type == at::kBFloat16 && tiles_bf16())) && fits(x) &&
         fits(weight) && weight.size(2) == 3 && weight.size(3) == 3 && weight.size(1) == x.size(1) && weight.size(0) % kFewest == 0 &&
         weight.size(1) % kFewest == 0 && x.numel() > 0;
}

Tensor convolve(const Tensor& x, const Tensor& weight) { return through_tiles(x, weight, /*back=*/false); }

Tensor input_gradient(const Tensor& dy, const Tensor& weight) { return through_tiles(dy, weight, /*back=*/true); }

Tensor weight_gradient(const Tensor& x, const Tensor& dy) {
  Tensor dweight = like(x, {dy.size(1), x.size(1), 3, 3});
  with_types(x, [&](auto* t, auto* p) { sum_weight_gradient<Pointee<decltype(t)>, Pointee<decltype(p)>>(x, dy, dweight); });
  return dweight;
}

}  // namespace mentee::winograd
