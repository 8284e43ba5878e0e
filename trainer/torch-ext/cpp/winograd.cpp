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
#include "winograd_kernels.h"

namespace {

using at::Tensor;
using mentee::bf16;
using mentee::winograd::kernels::Kernels;
using mentee::winograd::kernels::kLane;
using mentee::winograd::kernels::kTaps;

// Rows of a product at most.
constexpr int64_t kRows = 64;
// Channels come in multiples of this: the columns of the narrowest product.
constexpr int64_t kFewest = 32;
// Values between two taps, or rows, whose distance would be a power of two else: those share few places of a first-level cache.
constexpr int64_t kApart = 16;
// Values of a tap that a thread's block of transformed inputs holds, about: all taps fit in a second-level cache of a megabyte.
constexpr int64_t kBlock = 16384;
// The same for the two operands of the weights' gradient, which all threads work on together: in a third-level cache.
constexpr int64_t kChunk = 32768;
// Values of a tap, of either operand, that are held at once at most: 8 MiB of bf16 for all taps.
constexpr int64_t kAtOnce = 262144;

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

// The sum over tiles is one more product for each tap: [K, tiles] x [tiles, C]. It is taken chunk by chunk of tiles. Where all of
// them fit in a cache once transformed, a block of rows is summed to its end before the next; else a chunk for all rows.
template <typename T, typename P>
void sum_weight_gradient(const Tensor& x, const Tensor& dy, Tensor& dweight) {
  constexpr int64_t kTogether = Kernels<T, P>::kRows;
  const Tiles tiles(x);
  const int64_t in_channels = x.size(1), out_channels = dy.size(1), widest = std::max(in_channels, out_channels);
  const int64_t all = (tiles.count + kLane - 1) / kLane * kLane;  // of the last group, tiles that there are not are zeros
  const int64_t chunk = std::min(std::max<int64_t>(kChunk / widest / kLane, 8) * kLane, all);
  const bool at_once = all * widest <= kAtOnce;
  const int64_t held = at_once ? all : chunk;
  const int64_t input_step = held * in_channels + kApart, row_step = held + kApart, grad_step = out_channels * row_step + kApart;
  Values<P> inputs(kTaps * input_step);  // [16][tile][C], P's order
  Values<P> grads(kTaps * grad_step);    // [16][K][tile]
  const T *in = values<T>(x), *grad = values<T>(dy);
  const std::vector<T> zeros(widest);
  const auto transform = [&](int64_t first, int64_t count) {
    at::parallel_for(0, count / kLane, 1, [&](int64_t begin, int64_t end) {
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
  };
  const int64_t rows = columns_of(out_channels), columns = columns_of(in_channels), blocks = out_channels / rows;
  // The block of rows `k` of tap `tap`, over `count` of the tiles that are held, to sums [rows, C].
  const auto sum = [&](int64_t tap, int64_t k, int64_t first, int64_t count, float* sums, bool adds) {
    for (int64_t c = 0; c < in_channels; c += columns)
      product(rows, columns, count, grads.get() + tap * grad_step + k * row_step + first, row_step,
              inputs.get() + tap * input_step + first * in_channels + c * kTogether, in_channels, sums + c, in_channels, adds);
  };
  T* out = values<T>(dweight);
  const auto finish = [&](int64_t k, const float* sums, int64_t sum_step) {
    T* places[9];
    for (int64_t i = 0; i < 9; ++i) places[i] = out + (k * 9 + i) * in_channels;
    Kernels<T, P>::weight_gradient_tile(sums, sum_step, places, in_channels);
  };
  if (at_once) {
    transform(0, all);
    const int64_t sum_step = rows * in_channels + kApart;
    const Scratch scratch(kTaps * sum_step);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      float* sums = scratch.mine();
      for (int64_t k = begin * rows; k < end * rows; k += rows) {
        for (int64_t tap = 0; tap < kTaps; ++tap)
          for (int64_t first = 0; first < all; first += chunk)
            sum(tap, k, first, std::min(chunk, all - first), sums + tap * sum_step, first > 0);
        for (int64_t r = 0; r < rows; ++r) finish(k + r, sums + r * in_channels, sum_step);
      }
    });
    return;
  }
  const int64_t sum_step = out_channels * in_channels + kApart;
  Values<float> sums(kTaps * sum_step);  // [16][K][C]
  for (int64_t first = 0; first < all; first += chunk) {
    const int64_t count = std::min(chunk, all - first);
    transform(first, count);
    at::parallel_for(0, kTaps * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t tap = n / blocks, k = n % blocks * rows;
        sum(tap, k, 0, count, sums.get() + tap * sum_step + k * in_channels, first > 0);
      }
    });
  }
  at::parallel_for(0, out_channels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) finish(k, sums.get() + k * in_channels, sum_step);
  });
}

// Whether bf16 is the faster type to multiply in, and oneDNN as it is set up does it.
bool multiplies_bf16() {
#ifdef MENTEE_AVX512_BF16
  static const bool does = [] {
    for (const bool has : {__builtin_cpu_supports("avx512bf16"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512vl")})
      if (!has) return false;
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
