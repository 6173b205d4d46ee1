// silu(gate) * up, rounded once.
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

static f32x gated(f32x gate, f32x up) { return gate / (1.f + exp(-gate)) * up; }

template <class Scalar>
static void all_rows(const Swiglu& a, const Threads& threads) {
  const int64_t whole = a.F - a.F % LANES, rest = a.F - whole;
  parallel_runs(threads, a.N, [&](int64_t n) {
    const Scalar* gate = static_cast<const Scalar*>(a.gate_up) + n * a.gate_up_N;
    const Scalar* up = gate + a.F;
    Scalar* out = static_cast<Scalar*>(a.out) + n * a.F;
    for (int64_t f = 0; f < whole; f += LANES) store(out + f, gated(load(gate + f), load(up + f)));
    if (rest) store_first(out + whole, gated(load_first(gate + whole, rest), load_first(up + whole, rest)), rest);
  });
}

void swiglu(const Swiglu& a, const Threads& threads) {
  a.dtype == DType::float32 ? all_rows<float>(a, threads) : all_rows<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
