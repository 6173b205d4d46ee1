// Just enough of CUDA to run a kernel on host threads, a block at a time: a thread for each of the block's, barriers that
// are barriers, warps that exchange through memory. Tests the logic, and with ThreadSanitizer races within a block.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)

using std::max;
using std::min;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1;
};

struct Warp {
  std::barrier<> lanes{32};
  uint32_t values[32];
};

struct Block {
  explicit Block(int threads) : all(threads) {
    for (int i = 0; i < threads; i += 32) warps.push_back(std::make_unique<Warp>());
  }

  std::barrier<> all;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block;
inline thread_local dim3 threadIdx, blockIdx;

inline Warp& warp_here() { return *block->warps[threadIdx.x / 32]; }
inline void __syncthreads() { block->all.arrive_and_wait(); }
inline void __syncwarp() { warp_here().lanes.arrive_and_wait(); }

// What read(values of all lanes) gives once every lane has handed in its value.
template <class Read>
auto exchange(uint32_t value, Read read) {
  Warp& warp = warp_here();
  warp.values[threadIdx.x % 32] = value;
  __syncwarp();
  const auto result = read(warp.values);
  __syncwarp();
  return result;
}

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, int distance) {
  const int lane = threadIdx.x % 32;
  return exchange(value, [=](const uint32_t* values) { return values[lane < distance ? lane : lane - distance]; });
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  return exchange(vote, [](const uint32_t* votes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= votes[i] << i;
    return all;
  });
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t atomicOr(uint32_t* to, uint32_t bits) { return __atomic_fetch_or(to, bits, __ATOMIC_RELAXED); }
inline uint32_t atomicAdd(uint32_t* to, uint32_t more) { return __atomic_fetch_add(to, more, __ATOMIC_RELAXED); }

namespace memkernel {
namespace {
uint32_t block_memory[12 << 10];  // the kernel's dynamic shared memory
}
}  // namespace memkernel

template <class Args>
int cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 threads, void** parameters, size_t, cudaStream_t) {
  for (dim3 at{0, 0}; at.y < grid.y; ++at.y)
    for (at.x = 0; at.x < grid.x; ++at.x) {
      std::memset(memkernel::block_memory, 0xA5, sizeof memkernel::block_memory);  // it begins with anything
      Block here(static_cast<int>(threads.x));
      block = &here;
      std::vector<std::thread> running;
      for (unsigned i = 0; i < threads.x; ++i)
        running.emplace_back([=] {
          threadIdx = {i, 0}, blockIdx = at;
          kernel(*static_cast<const Args*>(parameters[0]));
        });
      for (std::thread& thread : running) thread.join();
    }
  return cudaSuccess;
}
