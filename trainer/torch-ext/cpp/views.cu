#line 2 "views.cu"
// Views of images that the device holds, made as trainer/data/src/directions.rs directs: crop, resize, flip, jitter, gray, blur,
// solarize, normalise. The additions and multiplications are those of the processor's path (resize.rs, colour.rs, blur.rs,
// augment.rs of trainer/data) in the same order, and none are fused (this part is compiled with --fmad=false): the same bits.
//
// A block makes one view after the other, all of its threads together, each block in memory of its own: views_layout.h, which stands
// in front of this text.

#ifdef PART_views

typedef int i32;

// Places of a head's words, as directions.rs has them.
constexpr int kPixels = 0, kStride = 2, kWidth = 3, kHeight = 4, kDown = 5, kAcross = 9, kOps = 13, kKinds = 14,
              kStrengths = 18, kGray = 22, kRadius = 23, kTaps = 24, kRepeats = 25, kSolarize = 26;
enum Op { kAdd, kTimes, kContrastOfChannels, kContrastOfGray, kSaturationHsv, kSaturationGray, kHue };

struct Normalise { float mean[3], inverse_std[3]; };

__device__ inline float lesser(float a, float b) { return a < b ? a : b; }
__device__ inline float greater(float a, float b) { return a > b ? a : b; }
__device__ inline float clip(float x) { return greater(lesser(x, 1.0f), 0.0f); }

// Sum of pairs of weights, rounded to 8 bits; source(k) is the k-th value.
template <typename F>
__device__ inline i32 filtered(const i32* weights, i32 pairs, i32 precision, F source) {
  u32 sum = 1u << (precision - 1);
  for (i32 p = 0; p < pairs; ++p) {
    const i32 pair = weights[p];
    sum += static_cast<u32>(static_cast<short>(pair & 0xffff) * source(2 * p));
    sum += static_cast<u32>((pair >> 16) * source(2 * p + 1));
  }
  const i32 value = static_cast<i32>(sum) >> precision;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

struct Pixel { float c[3]; };

__device__ inline float hue_channel(float n, float h, float v, float range) {
  float k = n + h;
  k = k >= 6.0f ? k - 6.0f : k;
  return v - range * clip(lesser(k, 4.0f - k));
}

// `means` are those of the channels, which contrast alone looks at.
__device__ inline Pixel jitter(Pixel x, int op, float strength, const float* means) {
  const float v = greater(greater(x.c[0], x.c[1]), x.c[2]);
  const float range = v - lesser(lesser(x.c[0], x.c[1]), x.c[2]);
  Pixel y;
  switch (op) {
    case kAdd:
      for (int c = 0; c < 3; ++c) y.c[c] = clip(x.c[c] + strength);
      return y;
    case kTimes:
      for (int c = 0; c < 3; ++c) y.c[c] = clip(x.c[c] * strength);
      return y;
    case kContrastOfChannels:
      for (int c = 0; c < 3; ++c) y.c[c] = clip(strength * (x.c[c] - means[c]) + means[c]);
      return y;
    case kContrastOfGray: {
      const float mean = 0.299f * means[0] + 0.587f * means[1] + 0.114f * means[2];
      for (int c = 0; c < 3; ++c) y.c[c] = clip(strength * x.c[c] + (1.0f - strength) * mean);
      return y;
    }
    case kSaturationHsv: {
      const float ratio = range > 0.0f ? lesser(strength, v / range) : 0.0f;
      for (int c = 0; c < 3; ++c) y.c[c] = greater(v - (v - x.c[c]) * ratio, 0.0f);
      return y;
    }
    case kSaturationGray: {
      const float gray = (1.0f - strength) * (0.299f * x.c[0] + 0.587f * x.c[1] + 0.114f * x.c[2]);
      for (int c = 0; c < 3; ++c) y.c[c] = clip(strength * x.c[c] + gray);
      return y;
    }
    default: {
      const float inverse = range > 0.0f ? 1.0f / range : 0.0f;
      const float on_r = (x.c[1] - x.c[2]) * inverse;
      const float on_g = (x.c[2] - x.c[0]) * inverse + 2.0f;
      const float on_b = (x.c[0] - x.c[1]) * inverse + 4.0f;
      float h = x.c[0] == v ? on_r : x.c[1] == v ? on_g : on_b;
      h = h + 6.0f * strength;
      h = h < 0.0f ? h + 6.0f : h;
      h = h >= 6.0f ? h - 6.0f : h;
      y.c[0] = hue_channel(5.0f, h, v, range);
      y.c[1] = hue_channel(3.0f, h, v, range);
      y.c[2] = hue_channel(1.0f, h, v, range);
      return y;
    }
  }
}

__device__ inline Pixel gray_of(Pixel x, i32 how) {
  if (how == 0) return x;
  const float r = how == 1 ? 0.2989f : 0.299f, g = how == 1 ? 0.5870f : 0.587f, b = how == 1 ? 0.1140f : 0.114f;
  const float gray = clip(r * x.c[0] + g * x.c[1] + b * x.c[2]);
  return Pixel{{gray, gray, gray}};
}

// Operations from `begin` to `end` of a head.
__device__ inline Pixel jitters(Pixel x, const i32* head, int begin, int end, const float* means) {
  for (int n = begin; n < end; ++n) x = jitter(x, head[kKinds + n], __int_as_float(head[kStrengths + n]), means);
  return x;
}

template <typename T>
__device__ inline void write(Pixel x, bool solarize, const Normalise& normalise, T* out) {
  for (int c = 0; c < 3; ++c) {
    float v = x.c[c];
    if (solarize && v >= 0.5f) v = 1.0f - v;
    put(out[c], (clip(v) - normalise.mean[c]) * normalise.inverse_std[c]);
  }
}

// taps[0] at(0) + sum of taps[k] (at(-k) + at(k)), from the middle outwards.
template <typename F>
__device__ inline float blurred(const i32* taps, i32 radius, F at) {
  float sum = at(0) * __int_as_float(taps[0]);
  for (i32 k = 1; k <= radius; ++k) sum += __int_as_float(taps[k]) * (at(-k) + at(k));
  return sum;
}

template <typename T>
__device__ inline void make_view(const u8* images, const i32* words, i64 view, i32 S, i32 widest, const Normalise& normalise,
                                 u8* scratch, T* out) {
  const int id = threadIdx.x, threads = blockDim.x;
  const i32 area = S * S, blocks = (area + kMeanBlock - 1) / kMeanBlock;
  float* planes = reinterpret_cast<float*>(scratch);
  float* second = planes + 3 * area;
  float* lanes = second + 3 * area;
  u8* line = reinterpret_cast<u8*>(lanes + 3 * blocks * kLanes);
  __shared__ float means[3];

  const i32* head = words + view * kHead;
  const i64 first = static_cast<u32>(head[kPixels]) | static_cast<i64>(head[kPixels + 1]) << 32;
  const u8* pixels = images + first;
  const i32 stride = head[kStride], width = head[kWidth], height = head[kHeight];

  {
    const i32 *starts = words + head[kDown], *weights = words + head[kDown + 1];
    const i32 pairs = head[kDown + 2], precision = head[kDown + 3];
    for (i32 i = id; i < S * width; i += threads) {
      const i32 y = i / width, x = i % width, start = starts[y];
      for (int c = 0; c < 3; ++c) {
        const i32 value = filtered(weights + y * pairs, pairs, precision, [&](i32 k) -> i32 {
          return pixels[static_cast<i64>(min(start + k, height - 1)) * stride + 3 * x + c];
        });
        line[(c * S + y) * widest + x] = static_cast<u8>(value);
      }
    }
  }
  __syncthreads();

  const i32 *starts = words + head[kAcross], *weights = words + head[kAcross + 1];
  const i32 pairs = head[kAcross + 2], precision = head[kAcross + 3];
  const int ops = head[kOps];
  int before = ops;
  for (int n = 0; n < ops; ++n)
    if (head[kKinds + n] == kContrastOfChannels || head[kKinds + n] == kContrastOfGray) before = n;
  const bool contrast = before < ops;
  const i32 gray = head[kGray], radius = head[kRadius];
  const bool solarize = head[kSolarize] != 0;
  for (i32 i = id; i < area; i += threads) {
    const i32 y = i / S, x = i % S, start = starts[x];
    Pixel p;
    for (int c = 0; c < 3; ++c) {
      const u8* row = line + (c * S + y) * widest;
      const i32 value = filtered(weights + x * pairs, pairs, precision, [&](i32 k) -> i32 { return row[min(start + k, width - 1)]; });
      p.c[c] = static_cast<float>(value) * (1.0f / 255.0f);
    }
    p = jitters(p, head, 0, before, means);
    if (!contrast) p = gray_of(p, gray);
    if (!contrast && radius == 0) {
      write(p, solarize, normalise, out + 3 * i);
    } else {
      for (int c = 0; c < 3; ++c) planes[c * area + i] = p.c[c];
    }
  }
  if (contrast) {
    __syncthreads();
    for (i32 n = id; n < 3 * blocks * kLanes; n += threads) {
      const i32 lane = n % kLanes, block = n / kLanes % blocks, c = n / kLanes / blocks;
      const i32 end = min((block + 1) * kMeanBlock, area);
      float sum = 0;
      for (i32 i = block * kMeanBlock + lane; i - lane + kLanes <= end; i += kLanes) sum += planes[c * area + i];
      lanes[n] = sum;
    }
    __syncthreads();
    for (int c = id; c < 3; c += threads) {
      double total = 0;
      for (i32 block = 0; block < blocks; ++block) {
        const i32 begin = block * kMeanBlock, end = min(begin + kMeanBlock, area);
        double rest = 0, sum = 0;
        for (i32 i = begin + (end - begin) / kLanes * kLanes; i < end; ++i) rest += planes[c * area + i];
        for (i32 lane = 0; lane < kLanes; ++lane) sum += lanes[(c * blocks + block) * kLanes + lane];
        total += rest + sum;
      }
      means[c] = static_cast<float>(total / area);
    }
    __syncthreads();
    for (i32 i = id; i < area; i += threads) {
      Pixel p = {{planes[i], planes[area + i], planes[2 * area + i]}};
      p = gray_of(jitters(p, head, before, ops, means), gray);
      if (radius == 0) {
        write(p, solarize, normalise, out + 3 * i);
      } else {
        for (int c = 0; c < 3; ++c) planes[c * area + i] = p.c[c];
      }
    }
  }
  if (radius == 0) return;
  __syncthreads();

  const i32* taps = words + head[kTaps];
  const bool repeats = head[kRepeats] != 0;
  const int channels = gray ? 1 : 3;
  for (i32 i = id; i < channels * area; i += threads) {
    const i32 x = i % S;
    const float* row = planes + (i - x);
    second[i] = blurred(taps, radius, [&](i32 k) {
      const i32 at = x + k;
      return at >= 0 && at < S ? row[at] : repeats ? row[at < 0 ? 0 : S - 1] : 0.0f;
    });
  }
  __syncthreads();
  for (i32 i = id; i < area; i += threads) {
    const i32 y = i / S, x = i % S;
    Pixel p;
    for (int c = 0; c < channels; ++c) {
      const float* column = second + c * area + x;
      p.c[c] = blurred(taps, radius, [&](i32 k) {
        const i32 at = y + k;
        return at >= 0 && at < S ? column[at * S] : repeats ? column[(at < 0 ? 0 : S - 1) * S] : 0.0f;
      });
    }
    if (channels == 1) p.c[1] = p.c[2] = p.c[0];
    write(p, solarize, normalise, out + 3 * i);
  }
}

// out: [views][S][S][3]
#define VIEW_KERNEL(NAME, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) views_##NAME(const u8* images, const i32* words, i64 views, i32 S, i32 widest, \
                                                                 Normalise normalise, u8* scratch, i64 each, T* out) { \
    for (i64 view = blockIdx.x; view < views; view += gridDim.x) {                                                     \
      make_view<T>(images, words, view, S, widest, normalise, scratch + each * blockIdx.x,                             \
                   out + view * 3 * static_cast<i64>(S) * S);                                                          \
      __syncthreads(); /* the scratch is the next view's */                                                            \
    }                                                                                                                  \
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // there is no bf16 before
VIEW_KERNEL(bf16, bf16)
#endif
VIEW_KERNEL(f32, float)
VIEW_KERNEL(f64, double)
#endif
