// Memory that is read soon, fetched by the line.
#pragma once

#include "simd.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int LINE = 64;  // bytes of a cache line

// Into the second cache level. The first keeps few misses under way, too few for the memory's latency.
MEMKERNEL_INLINE void fetch_far(const char* next, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(next + i, 0, 2);
}

// Into the first cache level, for what the second holds already.
MEMKERNEL_INLINE void fetch_near(const char* next, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(next + i, 0, 3);
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
