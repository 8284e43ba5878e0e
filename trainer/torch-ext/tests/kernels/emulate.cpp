// The CUDA kernels on the processor (emulated.h): slow, and enough to hold them against plain
// loops in double where there is no device. tests/kernels.rs compiles and runs this; it says what differs and ends with 1.
//
// What this cannot show: races that only a device's timing brings out, registers, speed.

#include "emulated.h"

#define PART_flat
#define PART_bf16
#define PART_f32
#define PART_f64
#include "../../cpp/kernels.cu"

static int failures = 0;

template <typename T>
static double number(T v) { return static_cast<double>(value(v)); }

// Relative to the largest expected value.
template <typename T>
static void expect(const std::string& what, const std::vector<T>& found, const std::vector<double>& expected, double tolerance) {
  double scale = 1e-30, worst = 0;
  for (double v : expected) scale = std::max(scale, std::abs(v));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(number(found[i]) - expected[i]) / scale;
    worst = difference <= worst ? worst : difference;  // NaN stays
  }
  const bool ok = worst <= tolerance;
  std::printf("%-40s %.1e%s\n", what.c_str(), worst, ok ? "" : "  TOO MUCH");
  failures += !ok;
}

static std::mt19937 generator(7);
template <typename T>
static std::vector<T> draw(size_t n, double mean = 0) {
  std::normal_distribution<double> normal(mean, 1);
  std::vector<T> out(n);
  for (auto& v : out) put(v, static_cast<typename Compute<T>::type>(normal(generator)));
  return out;
}

constexpr double kEps = 1e-5, kMomentum = 0.1;

#define NORM_CASE(NAME, T, W, V, C, TOLERANCE)                                                                          \
  for (int with_residual = 0; with_residual < 3; ++with_residual)                                                      \
    for (int relu = 0; relu < 2; ++relu) {                                                                             \
      Norm<T, W> c(#NAME, C, V, with_residual, relu, TOLERANCE);                                                       \
      c.moments = [](auto... a) { moments_##NAME(a...); };                                                             \
      c.apply = [](auto... a) { apply_##NAME(a...); };                                                                 \
      c.apply_both = [](auto... a) { apply_both_##NAME(a...); };                                                       \
      c.grad_moments = [](auto... a) { grad_moments_##NAME(a...); };                                                   \
      c.grad_input = [](auto... a) { grad_input_##NAME(a...); };                                                       \
      c.run();                                                                                                         \
    }

template <typename W>
static auto combine_of() {
  if constexpr (sizeof(W) == 8) return [](auto... a) { combine_f64(a...); };
  else return [](auto... a) { combine_f32(a...); };
}
template <typename W>
static auto finish_of() {
  if constexpr (sizeof(W) == 8) return [](auto... a) { finish_f64(a...); };
  else return [](auto... a) { finish_f32(a...); };
}
template <typename W>
static auto combine_grad_of() {
  if constexpr (sizeof(W) == 8) return [](auto... a) { combine_grad_f64(a...); };
  else return [](auto... a) { combine_grad_f32(a...); };
}
template <typename W>
static auto finish_grad_of() {
  if constexpr (sizeof(W) == 8) return [](auto... a) { finish_grad_f64(a...); };
  else return [](auto... a) { finish_grad_f32(a...); };
}

// One normalisation, forward and backward, as device_norm.cpp launches it.
template <typename T, typename W>
struct Norm {
  std::string name;
  i64 C, V;
  int with_residual;  // 2: itself to be normalised
  bool relu;
  double tolerance;
  i64 G = 2, rows = 37;
  std::function<void(const T*, i64, i64, double*)> moments;
  std::function<void(const T*, const T*, T*, u8*, i64, i64, const W*, int)> apply;
  std::function<void(const T*, const T*, T*, u8*, i64, i64, const W*, const W*, int)> apply_both;
  std::function<void(const T*, const T*, const T*, const u8*, T*, i64, i64, const W*, int, double*)> grad_moments;
  std::function<void(const T*, const T*, T*, i64, i64, const W*, const W*, int)> grad_input;

  Norm(std::string name_, i64 C_, i64 V_, int residual, bool relu_, double tolerance_)
      : name(name_), C(C_), V(V_), with_residual(residual), relu(relu_), tolerance(tolerance_) {}

  void run() {
    const std::string label = name + std::vector<std::string>{"", " + residual", " + norm"}[with_residual] + (relu ? " relu " : " ");
    const size_t n = G * rows * C;
    const auto x = draw<T>(n, 0.5), dy = draw<T>(n), dy2 = draw<T>(n), residual = draw<T>(n);
    const bool masks = with_residual && relu, forks = masks;
    const auto weight = draw<W>(C, 1), bias = draw<W>(C), around = draw<W>(2 * G * C, 1);
    // What is added to the value at i, of channel c in group g.
    const auto added = [&](i64 i, i64 g, i64 c) {
      if (with_residual != 2) return with_residual ? number(residual[i]) : 0.0;
      return number(residual[i]) * around[g * C + c] + around[(G + g) * C + c];
    };

    // Plain loops.
    std::vector<double> y(n), dx(n), dresidual(n), dw(C), db(C), running(2 * C), sums(G * (2 * C + 1));
    for (i64 c = 0; c < C; ++c) running[C + c] = 1;
    std::vector<double> scale(G * C), shift(G * C);
    for (i64 c = 0; c < C; ++c) {
      for (i64 g = 0; g < G; ++g) {
        const auto at = [&](i64 r) { return (g * rows + r) * C + c; };
        double mean = 0, variance = 0;
        for (i64 r = 0; r < rows; ++r) mean += number(x[at(r)]) / rows;
        for (i64 r = 0; r < rows; ++r) variance += std::pow(number(x[at(r)]) - mean, 2) / rows;
        const double inverse = 1 / std::sqrt(variance + kEps), w = weight[c];
        running[c] += kMomentum * (mean - running[c]);
        running[C + c] += kMomentum * (variance * rows / (rows - 1) - running[C + c]);
        std::vector<double> dz(rows);
        double sum = 0, dot = 0;
        for (i64 r = 0; r < rows; ++r) {
          const double xhat = (number(x[at(r)]) - mean) * inverse;
          const double v = xhat * w + bias[c] + added(at(r), g, c);
          y[at(r)] = relu && v < 0 ? 0 : v;
          dz[r] = relu && !(v > 0) ? 0 : number(dy[at(r)]) + (forks ? number(dy2[at(r)]) : 0);
          dresidual[at(r)] = dz[r];
          sum += dz[r];
          dot += dz[r] * xhat;
        }
        db[c] += sum;
        dw[c] += dot;
        for (i64 r = 0; r < rows; ++r) {
          const double xhat = (number(x[at(r)]) - mean) * inverse;
          dx[at(r)] = w * inverse * (dz[r] - sum / rows - xhat * dot / rows);
        }
      }
    }

    // The kernels, over two stretches of rows and as many tiles of channels as there are.
    const i64 columns = (C + V - 1) / V;
    unsigned tx = 1;
    while (tx < 32 && tx < columns) tx *= 2;
    const Index block{tx, 256 / tx, 1};
    const Index grid{static_cast<unsigned>((columns + tx - 1) / tx), 2, static_cast<unsigned>(G)};
    const i64 stretches = grid.y;
    for (int alone = 1; alone >= (with_residual && relu ? 0 : 1); --alone) {
      const std::string of = label + (alone ? "" : "(summed over ranks) ");
      std::vector<double> partial(G * stretches * 2 * C, std::nan("")), k_sums(G * (2 * C + 1), std::nan(""));
      std::vector<W> stats(G * (4 * C + 1), static_cast<W>(std::nan(""))), coefs(G * (3 * C + 1));
      std::vector<double> k_running(2 * C);
      for (i64 c = 0; c < C; ++c) k_running[C + c] = 1;
      std::vector<T> k_y(n), k_dx(n), masked(n);
      std::vector<u8> mask(n / V, 0xaa);
      std::vector<W> k_dw(C), k_db(C);
      const Index tiles{static_cast<unsigned>((C + 31) / 32), 1, 1}, combine_block{32, 16, 1};
      const Index finish_tiles{static_cast<unsigned>((C + 127) / 128), 1, 1}, finish_block{128, 1, 1};
      launch(grid, block, [&] { moments(x.data(), rows, C, partial.data()); });
      launch(tiles, combine_block, [&] {
        combine_of<W>()(static_cast<const double*>(partial.data()), stretches, C, G, static_cast<double>(rows), k_sums.data(),
                        alone, weight.data(), bias.data(), kEps, stats.data(), k_running.data(), kMomentum);
      });
      if (!alone) {
        launch(finish_tiles, finish_block, [&] {
          finish_of<W>()(static_cast<const double*>(k_sums.data()), C, G, weight.data(), bias.data(), kEps, stats.data(),
                         k_running.data(), kMomentum);
        });
      }
      launch(grid, block, [&] {
        u8* bits = masks ? mask.data() : nullptr;
        if (with_residual == 2) apply_both(x.data(), residual.data(), k_y.data(), bits, rows, C, stats.data(), around.data(), relu);
        else apply(x.data(), with_residual ? residual.data() : nullptr, k_y.data(), bits, rows, C, stats.data(), relu);
      });
      launch(grid, block, [&] {
        grad_moments(dy.data(), forks ? dy2.data() : nullptr, x.data(), masks ? mask.data() : nullptr, masks ? masked.data() : nullptr, rows, C,
                     stats.data(), relu, partial.data());
      });
      launch(tiles, combine_block, [&] {
        combine_grad_of<W>()(static_cast<const double*>(partial.data()), stretches, C, G, static_cast<double>(rows),
                             k_sums.data(), alone, static_cast<const W*>(stats.data()), k_dw.data(), k_db.data(), coefs.data());
      });
      if (!alone) {
        launch(finish_tiles, finish_block, [&] {
          finish_grad_of<W>()(static_cast<const double*>(k_sums.data()), C, G, static_cast<const W*>(stats.data()),
                              coefs.data());
        });
      }
      launch(grid, block, [&] {
        grad_input(masks ? masked.data() : dy.data(), x.data(), k_dx.data(), rows, C, stats.data(), coefs.data(),
                   relu && !masks);
      });
      expect(of + "y", k_y, y, tolerance);
      expect(of + "dx", k_dx, dx, tolerance);
      if (masks) expect(of + "dresidual", masked, dresidual, tolerance);
      expect(of + "dweight", k_dw, dw, std::max(tolerance / 2, 1e-12));
      expect(of + "dbias", k_db, db, std::max(tolerance / 2, 1e-12));
      expect(of + "running", k_running, running, std::max(tolerance / 100, 1e-12));
    }
  }
};

// Norm, ReLU and pooling, forward and backward, by statistics and coefficients that are drawn.
template <typename T, typename W, typename Apply, typename GradInput>
static void pool(const std::string& name, i64 C, i64 V, double tolerance, Apply apply_pool, GradInput grad_input_pool) {
  const i64 G = 2, N = 2;
  for (const auto& [H, width] : {std::pair<i64, i64>{5, 4}, {4, 7}, {1, 2}}) {
    const i64 OH = (H + 1) / 2, OW = (width + 1) / 2, rows = N * H * width, windows = N * OH * OW;
    auto x = draw<T>(G * rows * C);
    for (size_t i = 0; i + 2 * C < x.size(); i += 7) x[i + C] = x[i + 2 * C] = x[i];  // equal values, side by side
    const auto dy = draw<T>(G * windows * C);
    const auto stats = draw<W>(4 * G * C + G, 0.3), coefs = draw<W>(3 * G * C, 1);
    const auto row = [&](const std::vector<W>& of, i64 n, i64 g, i64 c) { return of[(n * G + g) * C + c]; };
    std::vector<double> y(G * windows * C), from(y.size()), dz(x.size()), dx(x.size());
    std::vector<double> which(y.size());
    for (i64 g = 0; g < G; ++g)
      for (i64 c = 0; c < C; ++c) {
        typedef typename Compute<T>::type A;
        const A scale = row(stats, 0, g, c), shift = row(stats, 1, g, c);
        const auto place = [&](i64 image, i64 h, i64 w) { return (((g * N + image) * H + h) * width + w) * C + c; };
        for (i64 image = 0; image < N; ++image)
          for (i64 oh = 0; oh < OH; ++oh)
            for (i64 ow = 0; ow < OW; ++ow) {
              const i64 out = (((g * N + image) * OH + oh) * OW + ow) * C + c;
              double best = -1;
              i64 best_at = -1;
              for (int tap = 0; tap < 9; ++tap) {
                const i64 h = 2 * oh - 1 + tap / 3, w = 2 * ow - 1 + tap % 3;
                if (h < 0 || h >= H || w < 0 || w >= width) continue;
                T stored;
                put(stored, std::max(A(0), value(x[place(image, h, w)]) * scale + shift));
                if (number(stored) > best) {
                  best = number(stored);
                  best_at = place(image, h, w);
                  which[out] = tap;
                }
              }
              y[out] = best;
              from[out] = number(x[best_at]);
              if (best > 0) dz[best_at] += number(dy[out]);
            }
        for (i64 image = 0; image < N; ++image)
          for (i64 h = 0; h < H; ++h)
            for (i64 w = 0; w < width; ++w) {
              const i64 i = place(image, h, w);
              dx[i] = dz[i] * row(coefs, 0, g, c) + number(x[i]) * row(coefs, 1, g, c) + row(coefs, 2, g, c);
            }
      }
    const i64 columns = (C + V - 1) / V;
    unsigned tx = 1;
    while (tx < 32 && tx < columns) tx *= 2;
    const Index block{tx, 256 / tx, 1};
    const Index grid{static_cast<unsigned>((columns + tx - 1) / tx), 2, static_cast<unsigned>(G)};
    std::vector<T> k_y(y.size()), largest(y.size()), k_dx(x.size());
    std::vector<u8> taps(y.size(), 255);
    launch(grid, block, [&] {
      apply_pool(x.data(), k_y.data(), largest.data(), taps.data(), windows, C, static_cast<int>(H), static_cast<int>(width), stats.data());
    });
    launch(grid, block, [&] {
      grad_input_pool(dy.data(), static_cast<const u8*>(taps.data()), x.data(), k_dx.data(), rows, C, static_cast<int>(H),
                      static_cast<int>(width), stats.data(), coefs.data());
    });
    const std::string of = name + " pool of " + std::to_string(H) + "x" + std::to_string(width) + " ";
    expect(of + "y", k_y, y, 0);
    expect(of + "largest", largest, from, 0);
    expect(of + "which", std::vector<double>(taps.begin(), taps.end()), which, 0);
    expect(of + "dx", k_dx, dx, tolerance);
  }
}

#define POOL_CASE(NAME, T, W, V, C, TOLERANCE)                                            \
  pool<T, W>(#NAME, C, V, TOLERANCE, [](auto... a) { apply_pool_##NAME(a...); }, [](auto... a) { grad_input_pool_##NAME(a...); });

// Two parameters, one of them over several chunks, with a gap between; what lies in the gap must not change.
template <typename T>
static void updates(const std::string& name, double tolerance) {
  const size_t n = 700;
  const std::vector<std::pair<i64, i64>> places{{16, 600}, {640, 40}};
  const i64 flags[2] = {kDecay | kAdapt, kPredictor};
  std::vector<i64> table;
  for (int k = 0; k < 2; ++k) {
    const auto [begin, len] = places[k];
    const i64 first = table.size() / 5, count = (len + 255) / 256;
    for (i64 chunk = 0; chunk < count; ++chunk) {
      const i64 from = begin + chunk * 256;
      for (i64 v : {from, std::min<i64>(256, begin + len - from), first, count, flags[k]}) table.push_back(v);
    }
  }
  const Index grid{static_cast<unsigned>(table.size() / 5), 1, 1}, block{256, 1, 1};
  const auto p = draw<T>(n), g = draw<T>(n), m = draw<T>(n), v = draw<T>(n, 3);
  const double lr = 0.1, plr = 0.3, mu = 0.9, wd = 0.01, eta = 0.001, b1 = 0.8, b2 = 0.95, eps = 1e-8, c1 = 0.36, c2 = 0.1;

  std::vector<double> ep(p.begin(), p.end()), em(m.begin(), m.end()), ap = ep, am = em, av(v.begin(), v.end());
  for (auto& x : av) x = std::abs(x);
  std::vector<T> positive(v.size());
  for (size_t i = 0; i < n; ++i) positive[i] = std::abs(v[i]);
  for (int k = 0; k < 2; ++k) {
    const auto [begin, len] = places[k];
    const double decay = flags[k] & kDecay ? wd : 0, rate = flags[k] & kPredictor ? plr : lr;
    double pp = 0, uu = 0;
    for (i64 i = begin; i < begin + len; ++i) {
      pp += static_cast<double>(p[i]) * p[i];
      uu += std::pow(g[i] + decay * p[i], 2);
    }
    const double trust = flags[k] & kAdapt ? eta * std::sqrt(pp) / std::sqrt(uu) : 1;
    for (i64 i = begin; i < begin + len; ++i) {
      em[i] = mu * m[i] + trust * (g[i] + decay * p[i]);
      ep[i] = p[i] - rate * em[i];
      am[i] = b1 * m[i] + (1 - b1) * g[i];
      av[i] = b2 * av[i] + (1 - b2) * g[i] * g[i];
      ap[i] = p[i] * (1 - rate * decay) - rate * (am[i] / c1) / (std::sqrt(av[i] / c2) + eps);
    }
  }
  auto kp = p, km = m, ka = p, kam = m, kav = positive;
  std::vector<double> partial(2 * grid.x, std::nan(""));
  auto teacher = p;
  std::vector<double> squares(3, std::nan("")), te(n);
  for (size_t i = 0; i < n; ++i) te[i] = 0.75 * p[i] + 0.25 * g[i];
  double norm = 0;
  for (T x : p) norm += static_cast<double>(x) * x;
  if constexpr (sizeof(T) == 8) {
    launch(grid, block, [&] { chunk_norms_f64(p.data(), g.data(), table.data(), wd, partial.data()); });
    launch(grid, block, [&] { momentum_f64(kp.data(), g.data(), km.data(), table.data(), partial.data(), lr, plr, mu, wd, eta); });
    launch(grid, block, [&] {
      adamw_f64(ka.data(), g.data(), kam.data(), kav.data(), table.data(), lr, plr, b1, b2, eps, wd, c1, c2);
    });
    launch({3, 1, 1}, block, [&] { ema_f64(teacher.data(), g.data(), n, 0.75); });
    launch({3, 1, 1}, block, [&] { squares_f64(p.data(), n, squares.data()); });
  } else {
    launch(grid, block, [&] { chunk_norms_f32(p.data(), g.data(), table.data(), wd, partial.data()); });
    launch(grid, block, [&] { momentum_f32(kp.data(), g.data(), km.data(), table.data(), partial.data(), lr, plr, mu, wd, eta); });
    launch(grid, block, [&] {
      adamw_f32(ka.data(), g.data(), kam.data(), kav.data(), table.data(), lr, plr, b1, b2, eps, wd, c1, c2);
    });
    launch({3, 1, 1}, block, [&] { ema_f32(teacher.data(), g.data(), n, 0.75); });
    launch({3, 1, 1}, block, [&] { squares_f32(p.data(), n, squares.data()); });
  }
  expect(name + " LARS and SGD, parameters", kp, ep, tolerance);
  expect(name + " LARS and SGD, momentum", km, em, tolerance);
  expect(name + " AdamW, parameters", ka, ap, tolerance);
  expect(name + " AdamW, second moment", kav, av, tolerance);
  expect(name + " teacher", teacher, te, tolerance);
  expect(name + " square norm", std::vector<double>{squares[0] + squares[1] + squares[2]}, {norm}, 1e-12);
}

int main() {
  NORM_CASE(f64, double, double, 2, 6, 1e-12)
  NORM_CASE(f64_1, double, double, 1, 3, 1e-12)
  NORM_CASE(f32, float, float, 4, 72, 2e-6)
  NORM_CASE(bf16, bf16, float, 8, 24, 8e-3)
  NORM_CASE(bf16_1, bf16, float, 1, 5, 8e-3)
  POOL_CASE(f64, double, double, 2, 6, 1e-12)
  POOL_CASE(f32, float, float, 4, 72, 2e-6)
  POOL_CASE(bf16, bf16, float, 8, 24, 8e-3)
  POOL_CASE(bf16_1, bf16, float, 1, 5, 8e-3)
  updates<float>("f32", 1e-6);
  updates<double>("f64", 1e-14);
  std::printf("%d failures\n", failures);
  return failures > 0;
}
