// Memory that is read soon, fetched by the line.
#pragma once

#include "simd.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int LINE = 64;  // bytes of a cache line

// Fetches what is read next into the second cache level.
MEMKERNEL_INLINE void fetch_far(const char* next, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(next + i, 0, 2);
}

// Fetches what is read next into the first cache level, and into the second what is read `later` bytes on: on some
// processors the first level's few misses under way would bound the rate of the memory.
MEMKERNEL_INLINE void fetch_near(const char* next, int64_t bytes, int64_t later) {
  for (int64_t i = 0; i < bytes; i += LINE) {
    __builtin_prefetch(next + i + later, 0, 2);
    __builtin_prefetch(next + i, 0, 3);
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
