// libtorch's own profiler (Kineto): what ran, when and for how long.

#include <torch/csrc/autograd/profiler_kineto.h>

#include "shim.h"

namespace profiler = torch::autograd::profiler;

extern "C" {

// Watches this thread's operators, or what runs on devices, until mentee_profile_end; one at a time.
int mentee_profile_begin(int on_device) {
  return mentee::guarded([&] {
    const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
    const std::set<profiler::ActivityType> wanted{on_device ? profiler::ActivityType::CUDA : profiler::ActivityType::CPU};
    profiler::prepareProfiler(config, wanted);
    profiler::enableProfiler(config, wanted);
  });
}

int mentee_profile_end(int on_device, mentee_profiled_fn each, void* context) {
  return mentee::guarded([&] {
    const auto result = profiler::disableProfiler();
    for (const auto& event : result->events()) {
      if ((event.deviceType() != at::kCPU) != (on_device != 0)) continue;
      const auto name = event.name();
      each(context, name.c_str(), event.startNs(), event.durationNs());
    }
  });
}
}
