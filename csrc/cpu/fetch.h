// Memory that is read soon, fetched by the line.
#pragma once

#include <cstdint>

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int LINE = 64;  // bytes of a cache line

// Bytes of what is read next into the second cache level; or, if near, into the first, and into the second what is read
// `later` bytes on: on some processors the first level's few misses under way would bound the rate of the memory.
inline __attribute__((always_inline)) void fetch(const char* next, int64_t bytes, bool near, int64_t later) {
  for (int64_t i = 0; i < bytes; i += LINE) {
    __builtin_prefetch(next + i + (near ? later : 0), 0, 2);
    if (near) __builtin_prefetch(next + i, 0, 3);
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
