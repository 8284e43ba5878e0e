// CUDA kernels, compiled at run time by NVRTC for the device that is there (see launch.cpp). No header is included: bf16 is
// taken apart by hand.
//
// Batch normalisation. Activations are R rows of C channels (channels-last); group g is the rows [g*R/G, (g+1)*R/G).
// A block has TX x TY threads: TX across channels, `V` of them a thread (16 bytes), TY across rows; blockIdx.x is the tile of
// channels, blockIdx.y the stretch of rows, blockIdx.z the group. Sums are taken in a fixed order: in each thread over its rows,
// then over the threads of a block, then (combine) over the stretches. So they are the same in every run.
//
// Launch bounds are the blocks that device.cpp and device_norm.cpp launch: a kernel that takes too many registers for its block does not start.
//
// What passes between the kernels:
//   sums   [G][2][C] doubles and, behind them, [G] counts: the sums of x and x^2, or of dz and dz*(x-mean), of each group; over
//          all ranks once they are reduced
//   stats  [4][G][C] and [G] counts, in f32 (f64 for f64): scale, shift, mean and 1/sqrt(variance+eps), where
//          y = x*scale + shift
//   coefs  [3][G][C] in the same type: a, b and d of dx = dz*a + x*b + d
//   mask   a byte for the V values of a thread, a bit each: where ReLU let them through. Read instead of y, 16 times as large

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 { u16 bits; };

template <typename T> struct Compute { typedef T type; };
template <> struct Compute<bf16> { typedef float type; };

#ifdef EMULATED
// tests/kernels/emulate.cpp runs these kernels on the processor, and has what the compiler brings on a device.
#define BLOCK_MEMORY(name) double* name = block_memory
#else
// The memory that a launch gives every block.
#define BLOCK_MEMORY(name) extern __shared__ double name[]
__device__ inline u16 bf16_bits(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float value(float x) { return x; }
__device__ inline double value(double x) { return x; }
__device__ inline float value(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__device__ inline void put(float& to, float x) { to = x; }
__device__ inline void put(double& to, double x) { to = x; }
__device__ inline void put(bf16& to, float x) {
  to.bits = bf16_bits(x);
}

// V values that are loaded and stored at once.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };

template <typename T, int V>
__device__ inline Pack<T, V> load(const T* p) { return *reinterpret_cast<const Pack<T, V>*>(p); }
template <typename T, int V>
__device__ inline void store(T* p, const Pack<T, V>& pack) { *reinterpret_cast<Pack<T, V>*>(p) = pack; }

// The rows of this block's stretch, within its group.
struct Rows {
  i64 begin, end;
  __device__ Rows(i64 rows) {
    const i64 each = (rows + gridDim.y - 1) / gridDim.y;
    begin = each * blockIdx.y;
    end = min(begin + each, rows);
  }
};

// Adds the 2V values of the threads of a column, and writes them to this block's place in partial, [G][stretches][2][C].
template <typename A, int V>
__device__ inline void fold(const A* first, const A* second, i64 column, i64 C, double* partial) {
  BLOCK_MEMORY(shared);
  A* own = reinterpret_cast<A*>(shared);
  const int threads = blockDim.x * blockDim.y, id = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    own[k * threads + id] = first[k];
    own[(V + k) * threads + id] = second[k];
  }
  __syncthreads();
  double* to = partial + (blockIdx.z * static_cast<i64>(gridDim.y) + blockIdx.y) * 2 * C;
  // One thread a value: 2V*TX of them, strided over the block.
  for (int n = id; n < 2 * V * static_cast<int>(blockDim.x); n += threads) {
    const int k = n / blockDim.x, x = n % blockDim.x;
    double sum = 0;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += static_cast<double>(own[k * threads + y * blockDim.x + x]);
    const i64 c = (static_cast<i64>(blockIdx.x) * blockDim.x + x) * V + k % V;
    if (c < C) to[(k / V) * C + c] = sum;
  }
}

constexpr int kUnroll = 4;

template <typename T, int V>
__device__ inline void moments(const T* x, i64 rows, i64 C, double* partial) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  A sum[V] = {}, square[V] = {};
  if (column < C) {
    const Rows stretch(rows);
    const T* base = x + blockIdx.z * rows * C + column;
    i64 r = stretch.begin + threadIdx.y;
    for (; r + (kUnroll - 1) * blockDim.y < stretch.end; r += kUnroll * blockDim.y) {
      Pack<T, V> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pack[u] = load<T, V>(base + (r + u * blockDim.y) * C);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A v = value(pack[u].v[k]);
          sum[k] += v;
          square[k] += v * v;
        }
    }
    for (; r < stretch.end; r += blockDim.y) {
      const Pack<T, V> pack = load<T, V>(base + r * C);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A v = value(pack.v[k]);
        sum[k] += v;
        square[k] += v * v;
      }
    }
  }
  fold<A, V>(sum, square, column, C, partial);
}

// V values of a row of [G][C], as the compute type of activations.
template <typename A, typename W, int V>
__device__ inline void row_of(const W* values, i64 C, i64 column, A* out) {
  const W* from = values + blockIdx.z * C + column;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = static_cast<A>(from[k]);
}

// y = act(x*scale + shift + residual), where the residual, if `kBoth`, is itself normalised, by the statistics `around`. `mask`
// is written if given.
template <typename T, typename W, int V, bool kBoth>
__device__ inline void apply(const T* x, const T* residual, T* y, u8* mask, i64 rows, i64 C, const W* stats, const W* around,
                             int relu) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= C) return;
  const i64 G = gridDim.z, g = blockIdx.z;
  constexpr int kRows = kBoth ? kUnroll / 2 : kUnroll;  // as many as registers are left for
  A scale[V], shift[V], around_scale[V];
  row_of<A, W, V>(stats, C, column, scale);
  row_of<A, W, V>(stats + G * C, C, column, shift);
  if (kBoth) {
    A around_shift[V];
    row_of<A, W, V>(around, C, column, around_scale);
    row_of<A, W, V>(around + G * C, C, column, around_shift);
#pragma unroll
    for (int k = 0; k < V; ++k) shift[k] += around_shift[k];
  }
  const Rows stretch(rows);
  const i64 base = g * rows * C + column;
  for (i64 r = stretch.begin + threadIdx.y; r < stretch.end; r += kRows * blockDim.y) {
    Pack<T, V> pack[kRows], add[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const i64 row = r + u * blockDim.y;
      if (row < stretch.end) {
        pack[u] = load<T, V>(x + base + row * C);
        if (residual) add[u] = load<T, V>(residual + base + row * C);
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const i64 row = r + u * blockDim.y;
      if (row < stretch.end) {
        u8 bits = 0;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          A v = value(pack[u].v[k]) * scale[k] + shift[k];
          if (residual) v += kBoth ? value(add[u].v[k]) * around_scale[k] : value(add[u].v[k]);
          if (relu) v = v < A(0) ? A(0) : v;  // keeps NaN
          put(pack[u].v[k], v);
          bits |= (v > A(0)) << k;
        }
        store<T, V>(y + base + row * C, pack[u]);
        if (mask) mask[(base + row * C) / V] = bits;
      }
    }
  }
}

// dx = dz*a + x*b + d of V channels.
template <typename A, typename W, int V>
struct InputGradient {
  A scale[V], shift[V], a[V], b[V], d[V];

  __device__ InputGradient(const W* stats, const W* coefs, i64 C, i64 column) {
    const i64 all = gridDim.z * C;
    row_of<A, W, V>(stats, C, column, scale);
    row_of<A, W, V>(stats + all, C, column, shift);
    row_of<A, W, V>(coefs, C, column, a);
    row_of<A, W, V>(coefs + all, C, column, b);
    row_of<A, W, V>(coefs + 2 * all, C, column, d);
  }
  // Where `relu`, only what it let through.
  __device__ A at(int k, A x, A dz, bool relu) const {
    if (relu) dz = x * scale[k] + shift[k] > A(0) ? dz : A(0);
    return dz * a[k] + x * b[k] + d[k];
  }
};

// What ReLU makes of a normalised value, as it is stored.
template <typename T>
__device__ inline typename Compute<T>::type relu_of(typename Compute<T>::type v) {
  T stored;
  put(stored, v < 0 ? 0 : v);  // keeps NaN
  return value(stored);
}

// A row as a place in images of `height` x `width`, within its group.
struct Place {
  u32 image;
  int row, column;
  __device__ Place(u32 r, u32 height, u32 width)
      : image(r / (height * width)), row(r / width % height), column(r % width) {}
};

// y = the largest relu(x*scale + shift) of each window of 3x3 places, two apart and padded by one; `largest` is the x it comes
// from and `which` of the nine, row by row, that is (the first of several). Sizes are those of x, `rows` the windows of a group.
template <typename T, typename W, int V>
__device__ inline void apply_pool(const T* x, T* y, T* largest, u8* which, i64 rows, i64 C, int height, int width,
                                  const W* stats) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= C) return;
  const i64 G = gridDim.z, g = blockIdx.z;
  A scale[V], shift[V];
  row_of<A, W, V>(stats, C, column, scale);
  row_of<A, W, V>(stats + G * C, C, column, shift);
  const int out_height = (height + 1) / 2, out_width = (width + 1) / 2;
  const i64 images = rows / (out_height * out_width);
  const Rows stretch(rows);
  for (i64 r = stretch.begin + threadIdx.y; r < stretch.end; r += blockDim.y) {
    const Place window(static_cast<u32>(r), out_height, out_width);
    const T* image = x + (g * images + window.image) * height * width * C + column;
    A best[V];
    Pack<T, V> out, from;
    Pack<u8, V> tap;
    bool first = true;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int row = 2 * window.row - 1 + i;
      if (row < 0 || row >= height) continue;
      Pack<T, V> pack[3];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int at = 2 * window.column - 1 + j;
        if (at >= 0 && at < width) pack[j] = load<T, V>(image + (static_cast<i64>(row) * width + at) * C);
      }
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int at = 2 * window.column - 1 + j;
        if (at < 0 || at >= width) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A v = relu_of<T>(value(pack[j].v[k]) * scale[k] + shift[k]);
          if (first || v > best[k] || v != v) {
            best[k] = v;
            from.v[k] = pack[j].v[k];
            tap.v[k] = static_cast<u8>(3 * i + j);
          }
        }
        first = false;
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) put(out.v[k], best[k]);
    const i64 to = (g * rows + r) * C + column;
    store<T, V>(y + to, out);
    if (largest) {
      store<T, V>(largest + to, from);
      store<u8, V>(which + to, tap);
    }
  }
}

// dx = dz*a + x*b + d, where dz is the dy of those windows whose largest value was this one, if ReLU let it through.
template <typename T, typename W, int V>
__device__ inline void grad_input_pool(const T* dy, const u8* which, const T* x, T* dx, i64 rows, i64 C, int height, int width,
                                       const W* stats, const W* coefs) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= C) return;
  const i64 g = blockIdx.z;
  const InputGradient<A, W, V> gradient(stats, coefs, C, column);
  const int out_height = (height + 1) / 2, out_width = (width + 1) / 2;
  const i64 images = rows / (height * width);
  const Rows stretch(rows);
  for (i64 r = stretch.begin + threadIdx.y; r < stretch.end; r += blockDim.y) {
    const Place at(static_cast<u32>(r), height, width);
    const i64 own = (g * rows + r) * C + column;
    const i64 windows = (g * images + at.image) * out_height * out_width * C + column;
    Pack<T, V> pack = load<T, V>(x + own);
    A dz[V] = {};
    for (int row = at.row / 2; row <= min((at.row + 1) / 2, out_height - 1); ++row) {
      for (int to = at.column / 2; to <= min((at.column + 1) / 2, out_width - 1); ++to) {
        const i64 window = windows + (static_cast<i64>(row) * out_width + to) * C;
        const Pack<T, V> grad = load<T, V>(dy + window);
        const Pack<u8, V> tap = load<u8, V>(which + window);
        const int mine = 3 * (at.row - 2 * row + 1) + at.column - 2 * to + 1;
#pragma unroll
        for (int k = 0; k < V; ++k) dz[k] += tap.v[k] == mine ? value(grad.v[k]) : A(0);
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) put(pack.v[k], gradient.at(k, value(pack.v[k]), dz[k], true));
    store<T, V>(dx + own, pack);
  }
}

// Sums of dz and dz*(x - mean), where dz is dy (or dy + dy2, where the output went two ways) where the activation let it
// through. Given `mask` (a residual was added), that says where; else it follows from x. dz is written to `masked` if given.
template <typename T, typename W, int V>
__device__ inline void grad_moments(const T* dy, const T* dy2, const T* x, const u8* mask, T* masked, i64 rows, i64 C,
                                    const W* stats, int relu, double* partial) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V, all = gridDim.z * C;
  A sum[V] = {}, dot[V] = {};
  if (column < C) {
    A scale[V], shift[V], mean[V];
    row_of<A, W, V>(stats, C, column, scale);
    row_of<A, W, V>(stats + all, C, column, shift);
    row_of<A, W, V>(stats + 2 * all, C, column, mean);
    const Rows stretch(rows);
    const i64 base = blockIdx.z * rows * C + column;
    for (i64 r = stretch.begin + threadIdx.y; r < stretch.end; r += 2 * blockDim.y) {
      Pack<T, V> dyp[2], xp[2], also[2];
      u8 bits[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const i64 row = r + u * blockDim.y;
        if (row < stretch.end) {
          dyp[u] = load<T, V>(dy + base + row * C);
          xp[u] = load<T, V>(x + base + row * C);
          if (mask) bits[u] = mask[(base + row * C) / V];
          if (dy2) also[u] = load<T, V>(dy2 + base + row * C);
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const i64 row = r + u * blockDim.y;
        if (row < stretch.end) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            A dz = value(dyp[u].v[k]);
            if (dy2) {
              put(dyp[u].v[k], dz + value(also[u].v[k]));
              dz = value(dyp[u].v[k]);  // as the second pass will read it
            }
            const A xv = value(xp[u].v[k]);
            if (relu) {
              const bool through = mask ? bits[u] >> k & 1 : xv * scale[k] + shift[k] > A(0);
              dz = through ? dz : A(0);
            }
            sum[k] += dz;
            dot[k] += dz * (xv - mean[k]);
            if (masked) put(dyp[u].v[k], dz);
          }
          if (masked) store<T, V>(masked + base + row * C, dyp[u]);
        }
      }
    }
  }
  fold<A, V>(sum, dot, column, C, partial);
}

// dx = dz*a + x*b + d; `relu` masks dy by x again.
template <typename T, typename W, int V>
__device__ inline void grad_input(const T* dy, const T* x, T* dx, i64 rows, i64 C, const W* stats, const W* coefs,
                                  int relu) {
  typedef typename Compute<T>::type A;
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= C) return;
  const i64 g = blockIdx.z;
  const InputGradient<A, W, V> gradient(stats, coefs, C, column);
  const Rows stretch(rows);
  const i64 base = g * rows * C + column;
  for (i64 r = stretch.begin + threadIdx.y; r < stretch.end; r += 2 * blockDim.y) {
    Pack<T, V> dyp[2], xp[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const i64 row = r + u * blockDim.y;
      if (row < stretch.end) {
        dyp[u] = load<T, V>(dy + base + row * C);
        xp[u] = load<T, V>(x + base + row * C);
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const i64 row = r + u * blockDim.y;
      if (row < stretch.end) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          put(xp[u].v[k], gradient.at(k, value(xp[u].v[k]), value(dyp[u].v[k]), relu));
        }
        store<T, V>(dx + base + row * C, xp[u]);
      }
    }
  }
}

// The statistics of a channel from its sums, over all ranks; running statistics move group by group. `rows` is the count of
// each group, or 0: then it stands behind the sums.
template <typename W>
__device__ inline void finish(const double* sums, double rows, i64 C, i64 G, i64 c, const W* weight, const W* bias, double eps, W* stats,
                              double* running, double momentum) {
  const i64 all = G * C;
  for (i64 g = 0; g < G; ++g) {
    const double n = rows > 0 ? rows : sums[2 * all + g], mean = sums[g * 2 * C + c] / n;
    double variance = sums[g * 2 * C + C + c] / n - mean * mean;
    variance = variance < 0 ? 0 : variance;
    const double inverse = 1 / sqrt(variance + eps);
    const double scale = weight ? static_cast<double>(weight[c]) * inverse : inverse;
    stats[g * C + c] = static_cast<W>(scale);
    stats[all + g * C + c] = static_cast<W>((bias ? static_cast<double>(bias[c]) : 0.0) - mean * scale);
    stats[2 * all + g * C + c] = static_cast<W>(mean);
    stats[3 * all + g * C + c] = static_cast<W>(inverse);
    if (c == 0) stats[4 * all + g] = static_cast<W>(n);
    if (running) {
      running[c] += momentum * (mean - running[c]);
      running[C + c] += momentum * (variance * n / (n - 1) - running[C + c]);
    }
  }
}

// dx = w*inverse*(dz - mean(dz) - xhat*mean(dz*xhat)), regrouped as dz*a + x*b + d.
template <typename W>
__device__ inline void finish_grad(const double* grads, i64 C, i64 G, i64 c, const W* stats, W* coefs) {
  const i64 all = G * C;
  for (i64 g = 0; g < G; ++g) {
    const i64 at = g * C + c;
    const double scale = stats[at], mean = stats[2 * all + at], inverse = stats[3 * all + at], n = stats[4 * all + g];
    const double mean_dz = grads[g * 2 * C + c] / n;
    const double mean_dot = grads[g * 2 * C + C + c] * inverse * inverse / n;
    coefs[at] = static_cast<W>(scale);
    coefs[all + at] = static_cast<W>(-scale * mean_dot);
    coefs[2 * all + at] = static_cast<W>(-scale * mean_dz + scale * mean_dot * mean);
  }
}

// Adds the stretches, partial [G][stretches][2][C], to sums. Blocks of 32 x 16: a channel each x, stretches over y; the
// threads of y = 0 hold the sums afterwards, and go on with them.
__device__ inline bool combine(const double* partial, i64 stretches, i64 C, i64 G, double rows, double* sums, i64* channel) {
  constexpr int kDepth = 16;
  __shared__ double shared[2][kDepth][33];
  const i64 c = blockIdx.x * 32 + threadIdx.x;
  for (i64 g = 0; g < G; ++g) {
    double first = 0, second = 0;
    if (c < C) {
      const double* from = partial + g * stretches * 2 * C + c;
      for (i64 s = threadIdx.y; s < stretches; s += kDepth) {
        first += from[s * 2 * C];
        second += from[s * 2 * C + C];
      }
    }
    __syncthreads();
    shared[0][threadIdx.y][threadIdx.x] = first;
    shared[1][threadIdx.y][threadIdx.x] = second;
    __syncthreads();
    if (threadIdx.y < 2) {
      double sum = 0;
      for (int y = 0; y < kDepth; ++y) sum += shared[threadIdx.y][y][threadIdx.x];
      if (c < C) sums[g * 2 * C + threadIdx.y * C + c] = sum;
    }
    if (c == 0 && threadIdx.y == 0) sums[G * 2 * C + g] = rows;
  }
  __syncthreads();  // what the others of this block have written is seen
  *channel = c;
  return threadIdx.y == 0 && c < C;
}

#ifdef PART_flat
#define STATISTICS_KERNELS(NAME, W)                                                                                    \
  extern "C" __global__ void __launch_bounds__(512) combine_##NAME(const double* partial, i64 stretches, i64 C, i64 G, double rows, \
                                            double* sums, int alone, const W* weight, const W* bias, double eps,       \
                                            W* stats, double* running, double momentum) {                              \
    i64 c;                                                                                                             \
    if (combine(partial, stretches, C, G, rows, sums, &c) && alone)                                                    \
      finish<W>(sums, rows, C, G, c, weight, bias, eps, stats, running, momentum);                                     \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128) finish_##NAME(const double* sums, i64 C, i64 G, const W* weight, const W* bias, \
                                           double eps, W* stats, double* running, double momentum) {                   \
    const i64 c = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;                                             \
    if (c < C) finish<W>(sums, 0, C, G, c, weight, bias, eps, stats, running, momentum);                               \
  }                                                                                                                    \
  /* Also the gradients of scale and offset: this rank's share. */                                                     \
  extern "C" __global__ void __launch_bounds__(512) combine_grad_##NAME(const double* partial, i64 stretches, i64 C, i64 G, double rows, \
                                                 double* grads, int alone, const W* stats, W* dweight, W* dbias,       \
                                                 W* coefs) {                                                           \
    i64 c;                                                                                                             \
    if (!combine(partial, stretches, C, G, rows, grads, &c)) return;                                                   \
    if (dweight) {                                                                                                     \
      double dw = 0, db = 0;                                                                                           \
      for (i64 g = 0; g < G; ++g) {                                                                                    \
        db += grads[g * 2 * C + c];                                                                                    \
        dw += grads[g * 2 * C + C + c] * static_cast<double>(stats[3 * G * C + g * C + c]);                            \
      }                                                                                                                \
      dweight[c] = static_cast<W>(dw);                                                                                 \
      dbias[c] = static_cast<W>(db);                                                                                   \
    }                                                                                                                  \
    if (alone) finish_grad<W>(grads, C, G, c, stats, coefs);                                                           \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128) finish_grad_##NAME(const double* grads, i64 C, i64 G, const W* stats, W* coefs) { \
    const i64 c = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;                                             \
    if (c < C) finish_grad<W>(grads, C, G, c, stats, coefs);                                                           \
  }

STATISTICS_KERNELS(f32, float)
STATISTICS_KERNELS(f64, double)
#endif

#define NORM_KERNELS(NAME, T, W, V)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256) moments_##NAME(const T* x, i64 rows, i64 C, double* partial) {             \
    moments<T, V>(x, rows, C, partial);                                                                                        \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 3)                                                                         \
      apply_##NAME(const T* x, const T* residual, T* y, u8* mask, i64 rows, i64 C, const W* stats, int relu) {                 \
    apply<T, W, V, false>(x, residual, y, mask, rows, C, stats, nullptr, relu);                                                \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                            \
      apply_both_##NAME(const T* x, const T* residual, T* y, u8* mask, i64 rows, i64 C, const W* stats, const W* around,       \
                        int relu) {                                                                                            \
    apply<T, W, V, true>(x, residual, y, mask, rows, C, stats, around, relu);                                                  \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                            \
      apply_pool_##NAME(const T* x, T* y, T* largest, u8* which, i64 rows, i64 C, int height, int width, const W* stats) {     \
    apply_pool<T, W, V>(x, y, largest, which, rows, C, height, width, stats);                                                  \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                            \
      grad_moments_##NAME(const T* dy, const T* dy2, const T* x, const u8* mask, T* masked, i64 rows, i64 C, const W* stats,   \
                          int relu, double* partial) {                                                                         \
    grad_moments<T, W, V>(dy, dy2, x, mask, masked, rows, C, stats, relu, partial);                                            \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 3)                                                                         \
      grad_input_##NAME(const T* dy, const T* x, T* dx, i64 rows, i64 C, const W* stats, const W* coefs, int relu) {           \
    grad_input<T, W, V>(dy, x, dx, rows, C, stats, coefs, relu);                                                               \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                            \
      grad_input_pool_##NAME(const T* dy, const u8* which, const T* x, T* dx, i64 rows, i64 C, int height, int width,          \
                             const W* stats, const W* coefs) {                                                                 \
    grad_input_pool<T, W, V>(dy, which, x, dx, rows, C, height, width, stats, coefs);                                          \
  }

// Compiled in parts, each when it is first needed: a run has activations of one type.
#ifdef PART_bf16
NORM_KERNELS(bf16, bf16, float, 8)
NORM_KERNELS(bf16_1, bf16, float, 1)
#endif
#ifdef PART_f32
NORM_KERNELS(f32, float, float, 4)
NORM_KERNELS(f32_1, float, float, 1)
#endif
#ifdef PART_f64
NORM_KERNELS(f64, double, double, 2)
NORM_KERNELS(f64_1, double, double, 1)
#endif

// Updates of flat buffers: one block a chunk of one parameter. `table` holds, per chunk, [begin, len, first chunk of its
// parameter, chunks of its parameter, flags].

constexpr i64 kDecay = 1, kAdapt = 2, kPredictor = 4;

// The sum over the block of 256 threads, in every thread, in a fixed order.
__device__ inline double block_sum(double v) {
  __shared__ double shared[8];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < 8; ++w) sum += shared[w];
  return sum;
}

// partial[chunk] = [|p|^2, |g + wd p|^2]
template <typename T>
__device__ inline void chunk_norms(const T* p, const T* g, const i64* table, T wd, double* partial) {
  const i64* own = table + 5 * blockIdx.x;
  const i64 begin = own[0], len = own[1];
  const T decay = own[4] & kDecay ? wd : T(0);
  double a = 0, b = 0;
  for (i64 i = begin + threadIdx.x; i < begin + len; i += blockDim.x) {
    const T pv = p[i], u = g[i] + decay * pv;
    a += static_cast<double>(pv) * pv;
    b += static_cast<double>(u) * u;
  }
  a = block_sum(a);
  b = block_sum(b);
  if (threadIdx.x == 0) {
    partial[2 * blockIdx.x] = a;
    partial[2 * blockIdx.x + 1] = b;
  }
}

// u = g + wd p, times eta |p| / |u| where the parameter adapts; m = mu m + u; p -= lr m.
template <typename T>
__device__ inline void momentum_step(T* p, const T* g, T* m, const i64* table, const double* partial, double lr,
                                     double predictor_lr, T mu, T wd, double eta) {
  const i64* own = table + 5 * blockIdx.x;
  const i64 begin = own[0], len = own[1], flags = own[4];
  const T decay = flags & kDecay ? wd : T(0);
  const T rate = static_cast<T>(flags & kPredictor ? predictor_lr : lr);
  T trust = 1;
  if (flags & kAdapt) {
    double a = 0, b = 0;
    for (i64 k = threadIdx.x; k < own[3]; k += blockDim.x) {
      a += partial[2 * (own[2] + k)];
      b += partial[2 * (own[2] + k) + 1];
    }
    a = sqrt(block_sum(a));
    b = sqrt(block_sum(b));
    trust = a > 0 && b > 0 ? static_cast<T>(eta * a / b) : T(1);
  }
  for (i64 i = begin + threadIdx.x; i < begin + len; i += blockDim.x) {
    const T pv = p[i];
    const T mv = mu * m[i] + trust * (g[i] + decay * pv);
    m[i] = mv;
    p[i] = pv - rate * mv;
  }
}

template <typename T>
__device__ inline void adamw_step(T* p, const T* g, T* m, T* v, const i64* table, double lr, double predictor_lr,
                                  T beta1, T beta2, T eps, T wd, T c1, T c2) {
  const i64* own = table + 5 * blockIdx.x;
  const i64 begin = own[0], len = own[1], flags = own[4];
  const T decay = flags & kDecay ? wd : T(0);
  const T rate = static_cast<T>(flags & kPredictor ? predictor_lr : lr);
  for (i64 i = begin + threadIdx.x; i < begin + len; i += blockDim.x) {
    const T gv = g[i], mv = beta1 * m[i] + (1 - beta1) * gv, vv = beta2 * v[i] + (1 - beta2) * gv * gv;
    m[i] = mv;
    v[i] = vv;
    const T step = (mv / c1) / (sqrt(vv / c2) + eps);
    p[i] = p[i] * (1 - rate * decay) - rate * step;
  }
}

#define UPDATE_KERNELS(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) chunk_norms_##NAME(const T* p, const T* g, const i64* table, double wd, \
                                                double* partial) {                                                     \
    chunk_norms<T>(p, g, table, static_cast<T>(wd), partial);                                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) momentum_##NAME(T* p, const T* g, T* m, const i64* table, const double* partial, \
                                             double lr, double predictor_lr, double mu, double wd, double eta) {       \
    momentum_step<T>(p, g, m, table, partial, lr, predictor_lr, static_cast<T>(mu), static_cast<T>(wd), eta);          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) adamw_##NAME(T* p, const T* g, T* m, T* v, const i64* table, double lr, \
                                          double predictor_lr, double beta1, double beta2, double eps, double wd,      \
                                          double c1, double c2) {                                                      \
    adamw_step<T>(p, g, m, v, table, lr, predictor_lr, static_cast<T>(beta1), static_cast<T>(beta2),                   \
                  static_cast<T>(eps), static_cast<T>(wd), static_cast<T>(c1), static_cast<T>(c2));                    \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) ema_##NAME(T* teacher, const T* student, i64 n, double tau) {      \
    const T t = static_cast<T>(tau);                                                                                   \
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)          \
      teacher[i] = t * teacher[i] + (1 - t) * student[i];                                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) squares_##NAME(const T* p, i64 n, double* partial) {               \
    double a = 0;                                                                                                      \
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)          \
      a += static_cast<double>(p[i]) * p[i];                                                                           \
    a = block_sum(a);                                                                                                  \
    if (threadIdx.x == 0) partial[blockIdx.x] = a;                                                                     \
  }

#ifdef PART_flat
UPDATE_KERNELS(f32, float)
UPDATE_KERNELS(f64, double)
#endif
