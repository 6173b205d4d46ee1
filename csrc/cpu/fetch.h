// Memory that is read soon, fetched ahead by the line.
#pragma once

#include "kernels.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int LINE = 64;  // bytes of a cache line

// The lines of BYTES, in their order.
template <int64_t BYTES>
inline __attribute__((always_inline)) void fetch(const char* from) {
  if (fetches_into_first_level) {
    for (int64_t i = 0; i < BYTES; i += LINE) __builtin_prefetch(from + i, 0, 3);
  } else {
    for (int64_t i = 0; i < BYTES; i += LINE) __builtin_prefetch(from + i, 0, 2);
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
