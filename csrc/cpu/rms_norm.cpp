// x / sqrt(mean(x^2) + eps) * weight, the residual's addition fused: one read of each row from memory.
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

// x rounded to Scalar, as the reference does between two steps.
template <class Scalar>
static f32x rounded(f32x x) {
  Scalar buffer[LANES];
  store(buffer, x);
  return load(buffer);
}

template <class Scalar>
static f32x add(Scalar* residual, const Scalar* x, int64_t count) {
  const f32x sum = rounded<Scalar>(load_first(residual, count) + load_first(x, count));
  store_first(residual, sum, count);
  return sum;
}

template <class Scalar>
static void norm_row(Scalar* residual, const Scalar* x, const Scalar* weight, Scalar* out, int64_t E, float eps) {
  const Scalar* row = residual ? residual : x;
  const int64_t whole = E - E % LANES;
  f32x squares[4] = {};
  for (int64_t e = 0; e < whole; e += LANES) {
    f32x value = load(row + e);
    if (residual) {
      value = rounded<Scalar>(value + load(x + e));
      store(residual + e, value);
    }
    squares[e / LANES % 4] += value * value;
  }
  if (whole < E) {
    const f32x value = residual ? add(residual + whole, x + whole, E - whole) : load_first(row + whole, E - whole);
    squares[0] += value * value;
  }
  const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const f32x scale = broadcast(1.f / __builtin_sqrtf(sum / E + eps));
  for (int64_t e = 0; e < whole; e += LANES)
    store(out + e, rounded<Scalar>(load(row + e) * scale) * load(weight + e));
  if (whole < E)
    store_first(out + whole, rounded<Scalar>(load_first(row + whole, E - whole) * scale) *
                                 load_first(weight + whole, E - whole), E - whole);
}

template <class Scalar>
static void norm(const RmsNorm& a, const Threads& threads) {
  parallel_runs(threads, a.N, [&](int64_t n) {
    Scalar* residual = a.residual ? static_cast<Scalar*>(a.residual) + n * a.residual_N : nullptr;
    norm_row(residual, static_cast<const Scalar*>(a.x) + n * a.x_N, static_cast<const Scalar*>(a.weight),
             static_cast<Scalar*>(a.out) + n * a.E, a.E, a.eps);
  });
}

void rms_norm(const RmsNorm& a, const Threads& threads) {
  a.dtype == DType::float32 ? norm<float>(a, threads) : norm<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
