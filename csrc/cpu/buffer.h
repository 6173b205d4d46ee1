// Memory that a thread keeps from call to call: an allocation of this size would go back to the system each time, and
// cost a page fault for each 4 KiB when it is used again.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace memkernel {
namespace MEMKERNEL_ISA {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;

  ~Buffer() {
    std::free(data);
  }

  // Room for `count` numbers, aligned to a cache line; what was there may be lost.
  template <class Number>
  Number* reserve(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(Number)) + 63) / 64 * 64;
    if (bytes > size) {
      std::free(data);
      size = 0;
      data = std::aligned_alloc(64, bytes);
      if (!data) throw std::bad_alloc();
      size = bytes;
    }
    return static_cast<Number*>(data);
  }
};

}  // namespace
}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
