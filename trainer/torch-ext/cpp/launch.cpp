// Kernels of kernels.cu and views.cu through NVRTC and the driver, both opened at run time: nothing of NVIDIA's is needed to build or to start
// the program.

#include "launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

namespace {

// cuda.h and nvrtc.h, as far as they are used here (CUDA 12 and 13 have them alike).
typedef int (*cuLaunchKernel_t)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                                void**);
typedef int (*cuModuleLoadData_t)(void**, const void*);
typedef int (*cuModuleGetFunction_t)(void**, void*, const char*);
typedef int (*cuDeviceGetAttribute_t)(int*, int, int);
typedef int (*cuGetErrorString_t)(int, const char**);
typedef int (*cuMemHostRegister_t)(void*, size_t, unsigned);
typedef int (*cuMemHostUnregister_t)(void*);
typedef int (*cuCtxGetCurrent_t)(void**);
typedef int (*cuCtxSetCurrent_t)(void*);
typedef int (*cuDevicePrimaryCtxRetain_t)(void**, int);
typedef int (*cuCtxPushCurrent_t)(void*);
typedef int (*cuCtxPopCurrent_t)(void**);
typedef int (*nvrtcCreateProgram_t)(void**, const char*, const char*, int, const char* const*, const char* const*);
typedef int (*nvrtcCompileProgram_t)(void*, int, const char* const*);
typedef int (*nvrtcGetSize_t)(void*, size_t*);
typedef int (*nvrtcGetText_t)(void*, char*);
typedef int (*nvrtcDestroyProgram_t)(void**);
typedef int (*nvrtcGetNumSupportedArchs_t)(int*);
typedef int (*nvrtcGetSupportedArchs_t)(int*);
typedef int (*aoti_stream_t)(int32_t, void**);

constexpr int kMajor = 75, kMinor = 76;                        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
constexpr int kPciBus = 33, kPciDevice = 34, kPciDomain = 50;  // CU_DEVICE_ATTRIBUTE_PCI_…_ID

void* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found, "the library of ", name, " has no such function");
  return found;
}

struct Driver {
  cuLaunchKernel_t launch = nullptr;
  cuModuleLoadData_t load = nullptr;
  cuModuleGetFunction_t function = nullptr;
  cuDeviceGetAttribute_t attribute = nullptr;
  cuGetErrorString_t text = nullptr;
  cuMemHostRegister_t pin = nullptr;
  cuMemHostUnregister_t unpin = nullptr;
  cuCtxGetCurrent_t context = nullptr;
  cuCtxSetCurrent_t set = nullptr;
  cuDevicePrimaryCtxRetain_t retain = nullptr;
  cuCtxPushCurrent_t push = nullptr;
  cuCtxPopCurrent_t pop = nullptr;
  aoti_stream_t stream = nullptr;

  void check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* said = nullptr;
    text(code, &said);
    TORCH_CHECK(false, "CUDA: ", what, ": ", said ? said : "unknown error", " (", code, ")");
  }
};

const Driver& driver() {
  static const Driver found = [] {
    Driver d;
    void* cuda = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(cuda, "no NVIDIA driver (libcuda.so.1 cannot be loaded)");
    d.launch = reinterpret_cast<cuLaunchKernel_t>(symbol(cuda, "cuLaunchKernel"));
    d.load = reinterpret_cast<cuModuleLoadData_t>(symbol(cuda, "cuModuleLoadData"));
    d.function = reinterpret_cast<cuModuleGetFunction_t>(symbol(cuda, "cuModuleGetFunction"));
    d.attribute = reinterpret_cast<cuDeviceGetAttribute_t>(symbol(cuda, "cuDeviceGetAttribute"));
    d.text = reinterpret_cast<cuGetErrorString_t>(symbol(cuda, "cuGetErrorString"));
    // As cuda.h names the versions that its types are of.
    d.pin = reinterpret_cast<cuMemHostRegister_t>(symbol(cuda, "cuMemHostRegister_v2"));
    d.unpin = reinterpret_cast<cuMemHostUnregister_t>(symbol(cuda, "cuMemHostUnregister"));
    d.context = reinterpret_cast<cuCtxGetCurrent_t>(symbol(cuda, "cuCtxGetCurrent"));
    d.set = reinterpret_cast<cuCtxSetCurrent_t>(symbol(cuda, "cuCtxSetCurrent"));
    d.retain = reinterpret_cast<cuDevicePrimaryCtxRetain_t>(symbol(cuda, "cuDevicePrimaryCtxRetain"));
    d.push = reinterpret_cast<cuCtxPushCurrent_t>(symbol(cuda, "cuCtxPushCurrent_v2"));
    d.pop = reinterpret_cast<cuCtxPopCurrent_t>(symbol(cuda, "cuCtxPopCurrent_v2"));
    // Exported by libtorch's CUDA part, which is loaded by then.
    d.stream = reinterpret_cast<aoti_stream_t>(symbol(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    return d;
  }();
  return found;
}

const char* kernel_source = nullptr;
std::string nvrtc_file;

// The newest architecture before `wanted` ("sm_130") that this NVRTC knows, where it does not know that itself; else 0. Its code in PTX
// is understood by every later device, whose driver makes machine code of it.
int known_before(void* nvrtc, const std::string& wanted) {
  auto count = reinterpret_cast<nvrtcGetNumSupportedArchs_t>(symbol(nvrtc, "nvrtcGetNumSupportedArchs"));
  auto list = reinterpret_cast<nvrtcGetSupportedArchs_t>(symbol(nvrtc, "nvrtcGetSupportedArchs"));
  int n = 0;
  if (count(&n) != 0 || n <= 0) return 0;
  std::vector<int> known(n);
  if (list(known.data()) != 0) return 0;
  const int number = std::atoi(wanted.c_str() + wanted.find('_') + 1);
  int before = 0;
  for (const int one : known) {
    if (one == number) return 0;
    if (one < number) before = std::max(before, one);
  }
  return before;
}

// The first line of a compiler's account that tells of an error.
std::string first_error(const std::string& log) {
  std::istringstream lines(log);
  std::string line;
  while (std::getline(lines, line)) {
    if (line.find("error") != std::string::npos) return line;
  }
  return log.substr(0, log.find('\n'));
}

// Compiles a part of the kernels for one architecture, such as "sm_90": to machine code, or to PTX for one that is newer than NVRTC.
std::vector<char> compile(const std::string& part, const std::string& architecture) {
  TORCH_CHECK(kernel_source, "the kernels' source was not given");
  void* nvrtc = dlopen(nvrtc_file.c_str(), RTLD_NOW);
  TORCH_CHECK(nvrtc, "NVRTC cannot be opened: ", dlerror(), "; install torch with its CUDA libraries");
  auto create = reinterpret_cast<nvrtcCreateProgram_t>(symbol(nvrtc, "nvrtcCreateProgram"));
  auto run = reinterpret_cast<nvrtcCompileProgram_t>(symbol(nvrtc, "nvrtcCompileProgram"));
  auto log_size = reinterpret_cast<nvrtcGetSize_t>(symbol(nvrtc, "nvrtcGetProgramLogSize"));
  auto log_text = reinterpret_cast<nvrtcGetText_t>(symbol(nvrtc, "nvrtcGetProgramLog"));
  const int before = known_before(nvrtc, architecture);
  auto code_size = reinterpret_cast<nvrtcGetSize_t>(symbol(nvrtc, before ? "nvrtcGetPTXSize" : "nvrtcGetCUBINSize"));
  auto code_text = reinterpret_cast<nvrtcGetText_t>(symbol(nvrtc, before ? "nvrtcGetPTX" : "nvrtcGetCUBIN"));
  auto destroy = reinterpret_cast<nvrtcDestroyProgram_t>(symbol(nvrtc, "nvrtcDestroyProgram"));

  void* program = nullptr;
  TORCH_CHECK(create(&program, kernel_source, "kernels.cu", 0, nullptr, nullptr) == 0, "NVRTC takes no program");
  const std::string arch =
      "--gpu-architecture=" + (before ? "compute_" + std::to_string(before) : architecture);
  const std::string define = "-DPART_" + part;
  // What views are made by is the processor's, to the last bit.
  const char* fused = part == "views" ? "--fmad=false" : "--fmad=true";
  const char* options[] = {arch.c_str(), define.c_str(), "--std=c++17", "-w", fused};
  const int code = run(program, 5, options);
  if (code != 0) {
    size_t size = 0;
    log_size(program, &size);
    std::string log(size, ' ');
    log_text(program, log.data());
    destroy(&program);
    TORCH_CHECK(false, "NVRTC (", code, "), part ", part, " for ", architecture, ": ", first_error(log));
  }
  size_t size = 0;
  code_size(program, &size);
  std::vector<char> binary(size);
  code_text(program, binary.data());
  destroy(&program);
  return binary;
}

}  // namespace

namespace mentee::device {

int attribute(int device, int which) {
  int value = 0;
  driver().check(driver().attribute(&value, which, device), "device attribute");
  return value;
}

void bind(int device) {
  void* context = nullptr;
  driver().check(driver().retain(&context, device), "the device's context");  // kept as long as the process
  driver().check(driver().set(context), "this thread's device");
}

void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_CHECK(driver().stream(device, &stream) == 0, "libtorch has no current stream");
  return stream;
}

// A kernel by its name, on the device that is current; parts are compiled once a process and device, without holding up who
// launches what is there.
static void* kernel(int device, const std::string& part, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, void*> modules, functions;
  std::unique_lock<std::mutex> lock(mutex);
  auto& function = functions[{device, name}];
  if (function) return function;
  auto& module = modules[{device, part}];
  if (!module) {
    lock.unlock();
    const auto architecture =
        "sm_" + std::to_string(attribute(device, kMajor)) + std::to_string(attribute(device, kMinor));
    const auto binary = compile(part, architecture);
    lock.lock();
    if (!module) driver().check(driver().load(&module, binary.data()), "loading the kernels of part " + part);
  }
  if (!function) driver().check(driver().function(&function, module, name.c_str()), "kernel " + name);
  return function;
}

void launch_with(const Tensor& on, const std::string& part, const std::string& name, Dim grid, Dim block, int64_t shared,
                 void** arguments) {
  const int device = on.device().index();
  void* stream = current_stream(device);
  driver().check(driver().launch(kernel(device, part, name), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                                 stream, arguments, nullptr),
                 "launch of " + name);
}

std::string name_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return "f32";
    case at::kDouble: return "f64";
    case at::kBFloat16: return "bf16";
    default: TORCH_CHECK(false, "the device's kernels take f32, f64 or bf16, not ", t.scalar_type());
  }
}

}  // namespace mentee::device

extern "C" {

int mentee_device_start(const char* source, const char* nvrtc) {
  return mentee::guarded([&] {
    kernel_source = source;
    nvrtc_file = nvrtc;
  });
}

int mentee_device_capability(int device, int* major, int* minor) {
  return mentee::guarded([&] {
    *major = mentee::device::attribute(device, kMajor);
    *minor = mentee::device::attribute(device, kMinor);
  });
}

// PCI domain, bus and device.
int mentee_device_slot(int device, int* slot) {
  return mentee::guarded([&] {
    slot[0] = mentee::device::attribute(device, kPciDomain);
    slot[1] = mentee::device::attribute(device, kPciBus);
    slot[2] = mentee::device::attribute(device, kPciDevice);
  });
}

int mentee_pin(void* memory, int64_t bytes, void** context) {
  return mentee::guarded([&] {
    const Driver& d = driver();
    d.check(d.context(context), "this thread's device");
    TORCH_CHECK(*context, "CUDA: this thread has no device");
    constexpr unsigned kPortable = 1;
    d.check(d.pin(memory, static_cast<size_t>(bytes), kPortable), "pinning a batch's memory");
  });
}

// From any thread. Nothing can be done about a failure: at the end of the process the driver may be gone.
void mentee_unpin(void* memory, void* context) {
  mentee::guarded([&] {
    const Driver& d = driver();
    if (d.push(context) != 0) return;
    d.unpin(memory);
    void* popped = nullptr;
    d.pop(&popped);
  });
}

int mentee_device_compile(const char* part, const char* architecture, int64_t* bytes) {
  return mentee::guarded([&] { *bytes = static_cast<int64_t>(compile(part, architecture).size()); });
}
}
