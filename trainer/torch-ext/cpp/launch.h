// Launches of our kernels, on the stream that libtorch works on. See launch.cpp.
#pragma once
#include <string>

#include "shim.h"

namespace mentee::device {

using at::Tensor;

constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
int attribute(int device, int which);

// The stream of this thread on a device: a cudaStream_t.
void* current_stream(int device);

// Makes a device's context this thread's. libtorch binds none to a new thread whose device is number 0, as every thread's is at
// first, and the driver's own calls want one.
void bind(int device);

struct Dim {
  int64_t x = 1, y = 1, z = 1;
};

// Of a part of the kernels; `arguments` point to the kernel's, `shared` bytes are given to every block.
void launch_with(const Tensor& on, const std::string& part, const std::string& name, Dim grid, Dim block, int64_t shared,
                 void** arguments);

template <typename... Args>
void launch(const Tensor& on, const std::string& part, const std::string& name, Dim grid, Dim block, int64_t shared,
            Args... args) {
  void* pointers[] = {static_cast<void*>(&args)...};
  launch_with(on, part, name, grid, block, shared, pointers);
}

// As the kernels' names have it: f32, f64 or bf16.
std::string name_of(const Tensor& t);

// What a kernel reads, or writes; null for none.
inline const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* written(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

}  // namespace mentee::device
