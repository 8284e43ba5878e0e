// Updates of flat buffers in one pass over memory each. `begin` and `len` are elements; buffers are contiguous and
// of one type (f32 or f64). Sums are over fixed chunks, so they do not depend on the number of threads.

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "device.h"

namespace {

using at::Tensor;

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

// v <- mu v + (g + wd p);  p <- p - lr v   (torch.optim.SGD, no dampening, no Nesterov)
int mentee_sgd(Tensor* param, const Tensor* grad, Tensor* momentum, int64_t begin, int64_t len, double lr, double mu,
               double weight_decay) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*momentum, begin, len);
      const T* g = range<T>(*grad, begin, len);
      for_chunks(len, [&](int64_t i, int64_t n, int64_t) {
        sgd(p + i, g + i, m + i, n, static_cast<T>(lr), static_cast<T>(mu), static_cast<T>(weight_decay), T(1));
      });
    });
  });
}

// u = g + wd p;  u <- u * eta |p| / |u| where both norms are positive;  v <- mu v + u;  p <- p - lr v
// (DeepMind's byol/utils/optimizers.py; arXiv:1708.03888)
int mentee_lars(Tensor* param, const Tensor* grad, Tensor* momentum, int64_t begin, int64_t len, double lr, double mu,
                double weight_decay, double eta) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*momentum, begin, len);
      const T* g = range<T>(*grad, begin, len);
      const auto [p_norm, u_norm] = norms_of(p, g, len, weight_decay);
      const double trust = p_norm > 0 && u_norm > 0 ? eta * p_norm / u_norm : 1.0;
      for_chunks(len, [&](int64_t i, int64_t n, int64_t) {
        sgd(p + i, g + i, m + i, n, static_cast<T>(lr), static_cast<T>(mu), static_cast<T>(weight_decay),
            static_cast<T>(trust));
      });
    });
  });
}

// Decoupled weight decay (arXiv:1711.05101, algorithm 2); `step` counts from 1.
int mentee_adamw(Tensor* param, const Tensor* grad, Tensor* first, Tensor* second, int64_t begin, int64_t len,
                 double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  return mentee::guarded([&] {
    dispatch(*param, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T *p = range<T>(*param, begin, len), *m = range<T>(*first, begin, len), *v = range<T>(*second, begin, len);
      const T* g = range<T>(*grad, begin, len);
      const T c1 = static_cast<T>(1 - std::pow(beta1, step)), c2 = static_cast<T>(1 - std::pow(beta2, step));
      for_chunks(len, [&](int64_t i, int64_t n, int64_t) {
        adamw(p + i, g + i, m + i, v + i, n, static_cast<T>(lr), static_cast<T>(beta1), static_cast<T>(beta2),
              static_cast<T>(eps), static_cast<T>(weight_decay), c1, c2);
      });
    });
  });
}

// teacher <- tau teacher + (1 - tau) student
int mentee_ema(Tensor* teacher, const Tensor* student, int64_t teacher_begin, int64_t student_begin, int64_t len,
               double tau) {
  return mentee::guarded([&] {
    if (teacher->is_cuda()) return mentee::device::ema(*teacher, *student, teacher_begin, student_begin, len, tau);
    dispatch(*teacher, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      T* t = range<T>(*teacher, teacher_begin, len);
      const T* s = range<T>(*student, student_begin, len);
      for_chunks(len, [&](int64_t i, int64_t n, int64_t) { ema(t + i, s + i, n, static_cast<T>(tau)); });
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
