// Updates of flat buffers in one pass over memory each. `begin` and `len` are elements; buffers are contiguous and
// of one type (f32 or f64). Sums are over fixed chunks, so they do not depend on the number of threads. What is computed in bf16
// is rounded chunk by chunk, while it is in the cache.

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "bf16.h"
#include "device.h"

namespace {

using at::Tensor;
using mentee::bf16;

constexpr int64_t kChunk = 16384;

template <typename T>
MENTEE_INLINE void sgd_body(T* __restrict__ p, const T* __restrict__ g, T* __restrict__ m, int64_t n, T lr, T mu, T wd,
                            T trust) {
  for (int64_t i = 0; i < n; ++i) {
    const T update = trust * (g[i] + wd * p[i]);
    m[i] = mu * m[i] + update;
    p[i] -= lr * m[i];
  }
}

template <typename T>
MENTEE_INLINE void adamw_body(T* __restrict__ p, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v,
                              int64_t n, T lr, T beta1, T beta2, T eps, T wd, T correction1, T correction2) {
  for (int64_t i = 0; i < n; ++i) {
    m[i] = beta1 * m[i] + (1 - beta1) * g[i];
    v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
    const T step = (m[i] / correction1) / (std::sqrt(v[i] / correction2) + eps);
    p[i] = p[i] * (1 - lr * wd) - lr * step;
  }
}

template <typename T>
MENTEE_INLINE void ema_body(T* __restrict__ teacher, const T* __restrict__ student, int64_t n, T tau) {
  for (int64_t i = 0; i < n; ++i) teacher[i] = tau * teacher[i] + (1 - tau) * student[i];
}

// squares[0] += |p|^2, squares[1] += |g + wd p|^2
template <typename T>
MENTEE_INLINE void norms_body(const T* __restrict__ p, const T* __restrict__ g, int64_t n, T wd, double* squares) {
  constexpr int64_t kLanes = 16;
  double a[kLanes] = {}, b[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const double pv = p[i + k];
      const double u = static_cast<double>(g[i + k] + wd * p[i + k]);
      a[k] += pv * pv;
      b[k] += u * u;
    }
  }
  for (; i < n; ++i) {
    const double pv = p[i];
    const double u = static_cast<double>(g[i] + wd * p[i]);
    a[0] += pv * pv;
    b[0] += u * u;
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    squares[0] += a[k];
    squares[1] += b[k];
  }
}

// to <- g, or to + g; whether all of it is finite then.
template <typename T, typename G>
MENTEE_INLINE bool gather_body(T* __restrict__ to, const G* __restrict__ g, int64_t n, bool adds) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) {
    const T x = mentee::load(g + i), held = adds ? to[i] + x : x;
    bad |= held - held != 0;
    to[i] = held;
  }
  return !bad;
}

MENTEE_MULTIVERSION void round_to(bf16* __restrict__ to, const float* __restrict__ from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mentee::store(to + i, from[i]);
}
void round_to(bf16*, const double*, int64_t) {}  // f64 is computed in as it is

#define MENTEE_GATHER(T, G)                                                                                            \
  MENTEE_MULTIVERSION bool set(T* to, const G* g, int64_t n) { return gather_body(to, g, n, false); }                  \
  MENTEE_MULTIVERSION bool add(T* to, const G* g, int64_t n) { return gather_body(to, g, n, true); }

MENTEE_GATHER(float, bf16)
MENTEE_GATHER(float, float)
MENTEE_GATHER(double, double)

#define MENTEE_KERNELS(T)                                                                                              \
  MENTEE_MULTIVERSION void sgd(T* p, const T* g, T* m, int64_t n, T lr, T mu, T wd, T trust) {                         \
    sgd_body<T>(p, g, m, n, lr, mu, wd, trust);                                                                        \
  }                                                                                                                    \
  MENTEE_MULTIVERSION void adamw(T* p, const T* g, T* m, T* v, int64_t n, T lr, T beta1, T beta2, T eps, T wd, T c1,   \
                                 T c2) {                                                                               \
    adamw_body<T>(p, g, m, v, n, lr, beta1, beta2, eps, wd, c1, c2);                                                   \
  }                                                                                                                    \
  MENTEE_MULTIVERSION void ema(T* t, const T* s, int64_t n, T tau) { ema_body<T>(t, s, n, tau); }                      \
  MENTEE_MULTIVERSION void norms(const T* p, const T* g, int64_t n, T wd, double* squares) {                           \
    norms_body<T>(p, g, n, wd, squares);                                                                               \
  }

MENTEE_KERNELS(float)
MENTEE_KERNELS(double)

template <typename F>
void dispatch(const Tensor& t, F&& body) {
  TORCH_CHECK(t.device().is_cpu(), "flat updates run on the CPU; got a tensor on ", t.device());
  switch (t.scalar_type()) {
    case at::kFloat: return body(static_cast<float*>(nullptr));
    case at::kDouble: return body(static_cast<double*>(nullptr));
    default: TORCH_CHECK(false, "flat updates take f32 or f64, not ", t.scalar_type());
  }
}

// A range of a flat buffer, checked.
template <typename T>
T* range(const Tensor& flat, int64_t begin, int64_t len) {
  TORCH_CHECK(flat.dim() == 1 && flat.is_contiguous(), "a flat buffer is one contiguous dimension, not ", flat.sizes());
  TORCH_CHECK(flat.scalar_type() == c10::CppTypeToScalarType<T>::value, "flat buffers of different types");
  TORCH_CHECK(begin >= 0 && len >= 0 && begin + len <= flat.numel(), "range ", begin, "+", len, " of a buffer of ",
              flat.numel());
  return static_cast<T*>(flat.unsafeGetTensorImpl()->mutable_data()) + begin;
}

// Whether the values of two tensors of one shape lie in memory in the same order, without gaps.
bool lie_alike(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense();
}

// The same range of what is rounded, where there is any.
bf16* rounded_range(const Tensor* rounded, int64_t begin, int64_t len) {
  if (!rounded) return nullptr;
  TORCH_CHECK(rounded->scalar_type() == at::kBFloat16 && rounded->is_contiguous() && begin >= 0 && begin + len <= rounded->numel(),
              "what is rounded is a flat buffer of bf16, not ", rounded->sizes(), " of ", rounded->scalar_type());
  return reinterpret_cast<bf16*>(rounded->data_ptr<at::BFloat16>()) + begin;
}

// body(first, count, chunk) over fixed chunks of n elements.
template <typename F>
void for_chunks(int64_t n, F&& body) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  at::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk * kChunk, std::min(kChunk, n - chunk * kChunk), chunk);
    }
  });
}

// The same, and what `p` then holds in bf16.
template <typename T, typename F>
void update_chunks(const T* p, bf16* rounded, int64_t n, F&& body) {
  for_chunks(n, [&](int64_t i, int64_t count, int64_t) {
    body(i, count);
    if (rounded) round_to(rounded + i, p + i, count);
  });
}

template <typename T>
std::pair<double, double> norms_of(const T* p, const T* g, int64_t n, double wd) {
  std::vector<double> squares(2 * ((n + kChunk - 1) / kChunk), 0.0);
  for_chunks(n, [&](int64_t i, int64_t count, int64_t chunk) {
    norms(p + i, g + i, count, static_cast<T>(wd), squares.data() + 2 * chunk);
  });
  double a = 0, b = 0;
  for (size_t k = 0; k < squares.size(); k += 2) {
    a += squares[k];
    b += squares[k + 1];
  }
  return {std::sqrt(a), std::sqrt(b)};
}

}  // namespace

extern "C" {

// to <- gradient, or to + gradient; both of one shape. `finite`: whether all of it is then; 1 on devices, where nobody looks.
int mentee_gather(const Tensor* gradient, Tensor* to, int adds, int* finite) {
  return mentee::guarded([&] {
    *finite = 1;
    TORCH_CHECK(gradient->sizes() == to->sizes(), "a gradient of ", gradient->sizes(), " for ", to->sizes());
    if (to->is_cuda()) {
      adds ? to->add_(*gradient) : to->copy_(*gradient);
      return;
    }
    const Tensor from = lie_alike(*gradient, *to) ? *gradient : at::empty_like(*to, gradient->scalar_type()).copy_(*gradient);
    const int64_t n = from.numel();
    std::atomic<bool> all{true};
    const auto take = [&](auto* out, const auto* g) {
      for_chunks(n, [&](int64_t i, int64_t count, int64_t) {
        if (!(adds ? add(out + i, g + i, count) : set(out + i, g + i, count))) all = false;
      });
    };
    if (to->scalar_type() == at::kDouble) {
      take(to->data_ptr<double>(), from.const_data_ptr<double>());
    } else if (from.scalar_type() == at::kBFloat16) {
      take(to->data_ptr<float>(), reinterpret_cast<const bf16*>(from.const_data_ptr<at::BFloat16>()));
    } else {
      take(to->data_ptr<float>(), from.const_data_ptr<float>());
    }
    *finite = all;
  });
}

// v <- mu v + (g + wd p);  p <- p - lr v   (torch.optim.SGD, no dampening, no Nesterov)
int mentee_sgd(Tensor* param, const Tensor* grad, Tensor* momentum, Tensor* rounded, int64_t begin, int64_t len, double lr,
               double mu, double weight_decay) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*momentum, begin, len);
      const T* g = range<T>(*grad, begin, len);
      update_chunks(p, rounded_range(rounded, begin, len), len, [&](int64_t i, int64_t n) {
        sgd(p + i, g + i, m + i, n, static_cast<T>(lr), static_cast<T>(mu), static_cast<T>(weight_decay), T(1));
      });
    });
  });
}

// u = g + wd p;  u <- u * eta |p| / |u| where both norms are positive;  v <- mu v + u;  p <- p - lr v
// (DeepMind's byol/utils/optimizers.py; arXiv:1708.03888)
int mentee_lars(Tensor* param, const Tensor* grad, Tensor* momentum, Tensor* rounded, int64_t begin, int64_t len, double lr,
                double mu, double weight_decay, double eta) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*momentum, begin, len);
      const T* g = range<T>(*grad, begin, len);
      const auto [p_norm, u_norm] = norms_of(p, g, len, weight_decay);
      const double trust = p_norm > 0 && u_norm > 0 ? eta * p_norm / u_norm : 1.0;
      update_chunks(p, rounded_range(rounded, begin, len), len, [&](int64_t i, int64_t n) {
        sgd(p + i, g + i, m + i, n, static_cast<T>(lr), static_cast<T>(mu), static_cast<T>(weight_decay),
            static_cast<T>(trust));
      });
    });
  });
}

// Decoupled weight decay (arXiv:1711.05101, algorithm 2); `step` counts from 1.
int mentee_adamw(Tensor* param, const Tensor* grad, Tensor* first, Tensor* second, Tensor* rounded, int64_t begin, int64_t len,
                 double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*first, begin, len), *v = range<T>(*second, begin, len);
      const T* g = range<T>(*grad, begin, len);
      const T c1 = static_cast<T>(1 - std::pow(beta1, step)), c2 = static_cast<T>(1 - std::pow(beta2, step));
      update_chunks(p, rounded_range(rounded, begin, len), len, [&](int64_t i, int64_t n) {
        adamw(p + i, g + i, m + i, v + i, n, static_cast<T>(lr), static_cast<T>(beta1), static_cast<T>(beta2),
              static_cast<T>(eps), static_cast<T>(weight_decay), c1, c2);
      });
    });
  });
}

// teacher <- tau teacher + (1 - tau) student
int mentee_ema(Tensor* teacher, const Tensor* student, Tensor* rounded, int64_t teacher_begin, int64_t student_begin, int64_t len,
               double tau) {
  return mentee::guarded([&] {
    if (teacher->is_cuda()) {
      mentee::device::ema(*teacher, *student, teacher_begin, student_begin, len, tau);
      if (rounded) rounded->narrow(0, teacher_begin, len).copy_(teacher->narrow(0, teacher_begin, len));
      return;
    }
    dispatch(*teacher, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T* t = range<T>(*teacher, teacher_begin, len);
      const T* s = range<T>(*student, student_begin, len);
      update_chunks(t, rounded_range(rounded, teacher_begin, len), len,
                    [&](int64_t i, int64_t n) { ema(t + i, s + i, n, static_cast<T>(tau)); });
    });
  });
}

int mentee_norm(const Tensor* flat, double* norm) {
  return mentee::guarded([&] {
    if (flat->is_cuda()) {
      *norm = std::sqrt(mentee::device::square_norm(*flat).item<double>());
      return;
    }
    dispatch(*flat, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      const T* p = range<T>(*flat, 0, flat->numel());
      *norm = norms_of(p, p, flat->numel(), 0.0).first;
    });
  });
}
}
