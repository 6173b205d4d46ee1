// Which of the kernel tables this processor can run, and which one is in use.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace memkernel {

namespace portable {
extern const Kernels table;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Tables {
  const Kernels* list[4];
  int count = 0;

  Tables() {
    list[count++] = &portable::table;
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
    list[count++] = &avx2::table;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return;
    list[count++] = &avx512::table;
    if (__builtin_cpu_supports("avx512bf16")) list[count++] = &avx512_bf16::table;
#endif
  }
};

const Tables& tables() {
  static const Tables all;
  return all;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

int kernel_tables(const Kernels* const** list) {
  *list = tables().list;
  return tables().count;
}

const Kernels& kernels() {
  const Kernels* chosen = in_use.load(std::memory_order_relaxed);
  return chosen ? *chosen : *tables().list[tables().count - 1];
}

bool use_kernels(const char* isa) {
  for (int i = 0; i < tables().count; ++i)
    if (!std::strcmp(tables().list[i]->isa, isa)) {
      in_use = tables().list[i];
      return true;
    }
  return false;
}

bool has_matrix_tiles() {
#if defined(__x86_64__) && __GNUC__ >= 11  // older compilers do not know the name
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace memkernel
