// Rotation of pairs (i, i + D / 2): of a sequence's new queries and keys, and of the memory's keys.
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

// `heads` rows of D numbers, side by side, all at the position that cos and sin belong to.
template <class Scalar>
static void rotate(Scalar* to, const Scalar* from, const float* cos, const float* sin, int64_t heads, int64_t D) {
  const int64_t half = D / 2, whole = half - half % LANES, rest = half - whole;
  for (int64_t head = 0; head < heads; ++head, to += D, from += D) {
    for (int64_t i = 0; i < whole; i += LANES) {
      const f32x first = load(from + i), second = load(from + half + i), c = load(cos + i), s = load(sin + i);
      store(to + i, first * c - second * s);
      store(to + half + i, second * c + first * s);
    }
    if (!rest) continue;
    const f32x first = load_first(from + whole, rest), second = load_first(from + half + whole, rest);
    const f32x c = load_first(cos + whole, rest), s = load_first(sin + whole, rest);
    store_first(to + whole, first * c - second * s, rest);
    store_first(to + half + whole, second * c + first * s, rest);
  }
}

template <class Scalar>
static void append(const RopeWrite& a, const Threads& threads) {
  parallel_runs(threads, a.B * a.T, [&](int64_t bt) {
    const int64_t b = bt / a.T, t = bt % a.T, row = a.start[b] + t, query_t = t - (a.T - a.Tq);
    const float *cos = a.cos + (a.offset + row) * (a.D / 2), *sin = a.sin + (a.offset + row) * (a.D / 2);
    rotate(static_cast<Scalar*>(a.cache_key) + b * a.cache_key_B + row * a.cache_key_S,
           static_cast<const Scalar*>(a.key) + b * a.key_B + t * a.key_T, cos, sin, a.G, a.D);
    __builtin_memcpy(static_cast<Scalar*>(a.cache_value) + b * a.cache_value_B + row * a.cache_value_S,
                     static_cast<const Scalar*>(a.value) + b * a.value_B + t * a.value_T, a.G * a.D * sizeof(Scalar));
    if (query_t < 0) return;
    rotate(static_cast<Scalar*>(a.out) + (b * a.Tq + query_t) * a.H * a.D,
           static_cast<const Scalar*>(a.query) + b * a.query_B + query_t * a.query_T, cos, sin, a.H, a.D);
  });
}

template <class Scalar>
static void refresh(const RotateMemory& a, const Threads& threads) {
  parallel_runs(threads, a.N, [&](int64_t n) {
    const int64_t position = (a.offset + a.rank[n]) * (a.D / 2);
    rotate(static_cast<Scalar*>(a.rotated) + n * a.rotated_N, static_cast<const Scalar*>(a.key) + n * a.key_N,
           a.cos + position, a.sin + position, a.G, a.D);
  });
}

void rope_write(const RopeWrite& a, const Threads& threads) {
  a.dtype == DType::float32 ? append<float>(a, threads) : append<bf16>(a, threads);
}

void rotate_memory(const RotateMemory& a, const Threads& threads) {
  a.dtype == DType::float32 ? refresh<float>(a, threads) : refresh<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
