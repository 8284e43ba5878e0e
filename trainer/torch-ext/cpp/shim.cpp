#include "shim.h"

#include <ATen/Version.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <string>

namespace {
thread_local std::string last_error;

struct TakingHook : torch::autograd::PostAccumulateGradHook {
  mentee_take_fn take;
  void* context;
  mentee_drop_fn drop;

  TakingHook(mentee_take_fn take_, void* context_, mentee_drop_fn drop_) : take(take_), context(context_), drop(drop_) {}
  ~TakingHook() override { drop(context); }
  void operator()(const torch::autograd::Variable& leaf) override {
    at::NoGradGuard no_grad;
    at::Tensor gradient;
    std::swap(gradient, leaf.mutable_grad());
    TORCH_CHECK(take(context, &gradient) == 0, "what follows a gradient failed");
  }
};
}  // namespace

void mentee::set_last_error(const char* message) {
  // The first line says it; what follows is libtorch's own stack.
  last_error = message;
  const auto newline = last_error.find('\n');
  if (newline != std::string::npos) last_error.resize(newline);
}

extern "C" {

const char* mentee_last_error() { return last_error.c_str(); }

const char* mentee_torch_config() {
  static const std::string config = at::show_config();
  return config.c_str();
}

int mentee_from_memory(void* data, int64_t len, int is_double, void* context, mentee_drop_fn drop, at::Tensor** out) {
  return mentee::guarded([&] {
    const auto options = at::TensorOptions().dtype(is_double ? at::kDouble : at::kFloat);
    *out = new at::Tensor(at::from_blob(data, {len}, [context, drop](void*) { drop(context); }, options));
  });
}

int mentee_leaf(const at::Tensor* flat, int64_t offset, const int64_t* shape, int64_t ndim, int requires_grad,
                at::Tensor** out) {
  return mentee::guarded([&] {
    at::NoGradGuard no_grad;
    const at::IntArrayRef dims(shape, ndim);
    int64_t len = 1;
    for (const auto dim : dims) len *= dim;
    auto view = flat->narrow(0, offset, len);
    if (ndim == 4) {
      view = view.view({shape[0], shape[2], shape[3], shape[1]}).permute({0, 3, 1, 2});
    } else {
      view = view.view(dims);
    }
    if (requires_grad) view.set_requires_grad(true);
    *out = new at::Tensor(view);
  });
}

int mentee_on_gradient(at::Tensor* leaf, mentee_take_fn take, void* context, mentee_drop_fn drop) {
  return mentee::guarded([&] {
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::make_unique<TakingHook>(take, context, drop));
  });
}
}
