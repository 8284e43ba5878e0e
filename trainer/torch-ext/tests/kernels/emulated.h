// What stands in for a device when kernels run on the processor: every block in turn, its threads as threads.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define EMULATED 1
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::unique_ptr<std::barrier<>> block_barrier;
alignas(64) static double block_memory[8192];
static double warp_lanes[1024];

static void __syncthreads() { block_barrier->arrive_and_wait(); }
// Whole blocks call it together here.
static double __shfl_down_sync(unsigned, double v, int offset) {
  const unsigned id = threadIdx.x;
  warp_lanes[id] = v;
  __syncthreads();
  const double out = id % 32 + offset < 32 ? warp_lanes[id + offset] : v;
  __syncthreads();
  return out;
}
static float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest even
}
using std::min;
using std::sqrt;
static float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

static void launch(Index grid, Index block, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  const unsigned threads = block.x * block.y;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        std::fill(std::begin(block_memory), std::end(block_memory), std::nan(""));
        std::vector<std::thread> running;
        for (unsigned id = 0; id < threads; ++id) {
          running.emplace_back([&, id] {
            blockIdx = {x, y, z};
            threadIdx = {id % block.x, id / block.x, 0};
            kernel();
            block_barrier->arrive_and_drop();  // a thread that has ended holds up nobody
          });
        }
        for (auto& thread : running) thread.join();
      }
}
