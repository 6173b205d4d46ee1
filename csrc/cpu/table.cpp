// This instruction set's table. All of csrc/cpu/*.cpp is compiled once per instruction set, with its flags, into the
// namespace MEMKERNEL_ISA: no function with linkage may be shared with code that is compiled for another one, since the
// linker would keep either, and an older processor might be handed the newer code.
#include "kernels.h"

#define MEMKERNEL_STRING_(name) #name
#define MEMKERNEL_STRING(name) MEMKERNEL_STRING_(name)

namespace memkernel::MEMKERNEL_ISA {

void rms_norm(const RmsNorm&, const Threads&);
void swiglu(const Swiglu&, const Threads&);
void rope_write(const RopeWrite&, const Threads&);
void rotate_memory(const RotateMemory&, const Threads&);
void memory_attention(const MemoryAttention&, const Threads&);
void draw_ranks(const DrawRanks&, const Threads&);
void memory_write(const MemoryWrite&, const Threads&);
void linear(const Linear&, const Threads&);
int64_t linear_rows(DType, int64_t);

extern const Kernels table = {
    MEMKERNEL_STRING(MEMKERNEL_ISA),
    rms_norm,
    swiglu,
    rope_write,
    rotate_memory,
    memory_attention,
    draw_ranks,
    memory_write,
    linear,
    linear_rows,
};

}  // namespace memkernel::MEMKERNEL_ISA
