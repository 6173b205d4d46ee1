// Memory that is read soon, fetched by the line.
#pragma once

#include <cstdint>

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int LINE = 64;  // bytes of a cache line

// BYTES of what is read next into the first cache level, and of what is read `later` bytes on into the second: on some
// processors the first level's few misses under way would bound the rate at which memory delivers.
template <int64_t BYTES>
inline __attribute__((always_inline)) void fetch(const char* next, int64_t later) {
  for (int64_t i = 0; i < BYTES; i += LINE) {
    __builtin_prefetch(next + i + later, 0, 2);
    __builtin_prefetch(next + i, 0, 3);
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
