// One vector type per instruction set, chosen by the compiler's flags: f32x, with + - * / and comparisons built in.
//
// The kernels are compiled once per instruction set, each time with another MEMKERNEL_ISA as namespace, so that the
// linker cannot give code for a newer processor to an older one. For the same reason no function here is from std.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MEMKERNEL_INLINE inline __attribute__((always_inline))  // so that loops over constants unroll

namespace memkernel {
namespace MEMKERNEL_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float f32x __attribute__((vector_size(4 * LANES)));
typedef int32_t i32x __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32x __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16x __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

using Lanes = std::make_integer_sequence<int, LANES>;

// work.run<n>(), LEAST <= n <= MOST.
template <int LEAST, int MOST, class Work>
void run_with(int64_t n, const Work& work) {
  if constexpr (LEAST < MOST) {
    if (n > LEAST) return run_with<LEAST + 1, MOST>(n, work);
  }
  work.template run<LEAST>();
}

template <int... I>
inline f32x broadcast(float x, std::integer_sequence<int, I...>) {
  return f32x{(void(I), x)...};
}

inline f32x broadcast(float x) {
  return broadcast(x, Lanes());
}

inline f32x fma(f32x a, f32x b, f32x c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The second operand where either is NaN: one instruction on x86.
inline f32x max(f32x a, f32x b) {
  return a > b ? a : b;
}

inline f32x min(f32x a, f32x b) {
  return a < b ? a : b;
}

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

inline f32x load(const float* from) {
  f32x x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline f32x load(const bf16* from) {
  u16x half;
  __builtin_memcpy(&half, from, sizeof half);
  return (f32x)(__builtin_convertvector(half, u32x) << 16);
}

// Four numbers, as often as they fill a vector.
inline f32x load_four(const float* from) {
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#elif defined(__AVX2__)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
#else
  return load(from);
#endif
}

inline f32x load_four(const bf16* from) {
#if defined(__AVX2__)
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128 four = _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(four);
#else
  return _mm256_set_m128(four, four);
#endif
#else
  return load(from);
#endif
}

inline void store(float* to, f32x x) {
  __builtin_memcpy(to, &x, sizeof x);
}

// Rounds to nearest even and keeps NaN. With AVX512_BF16, numbers below 2^-126 become 0.
inline void store(bf16* to, f32x x) {
#if defined(__AVX512BF16__)
  const auto half = _mm512_cvtneps_pbh(x);
#else
  const u32x bits = (u32x)x;
  const u32x rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u16x half = __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), u16x);
#endif
  __builtin_memcpy(to, &half, sizeof half);
}

// The first `count` < LANES numbers; zeros in the other lanes.
template <class Scalar>
inline f32x load_first(const Scalar* from, int64_t count) {
  Scalar buffer[LANES] = {};
  __builtin_memcpy(buffer, from, count * sizeof(Scalar));
  return load(buffer);
}

template <class Scalar>
inline void store_first(Scalar* to, f32x x, int64_t count) {
  Scalar buffer[LANES];
  store(buffer, x);
  __builtin_memcpy(to, buffer, count * sizeof(Scalar));
}

// Lane i is number INDEX[i] of the 2 * LANES numbers of a and b.
template <int... INDEX>
inline f32x shuffle(f32x a, f32x b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, INDEX...);
#else
  return __builtin_shuffle(a, b, i32x{INDEX...});
#endif
}

// The operation over all lanes, in a fixed order: a tree of halves.
template <int HALF, class Operation, int... I>
inline float reduce(f32x x, Operation operation, std::integer_sequence<int, I...> lanes) {
  x = operation(x, shuffle<(I ^ HALF)...>(x, x));
  if constexpr (HALF > 1) return reduce<HALF / 2>(x, operation, lanes);
  return x[0];
}

inline float max_lane(f32x x) {
  return reduce<LANES / 2>(x, [](f32x a, f32x b) { return max(a, b); }, Lanes());
}

inline float sum_lanes(f32x x) {
  return reduce<LANES / 2>(x, [](f32x a, f32x b) { return a + b; }, Lanes());
}

// Lane i: the sum of the lanes of x[i], in the order of sum_lanes.
template <int HALF, int N, int... I>
MEMKERNEL_INLINE f32x sum_each(f32x (&x)[N], std::integer_sequence<int, I...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < N && i < HALF; i++) {
    const f32x a = x[i];
    if (i + HALF < N) {
      const f32x b = x[i + HALF];
      x[i] = shuffle<(I & HALF ? LANES + I : I)...>(a, b) + shuffle<(I & HALF ? LANES + I - HALF : I + HALF)...>(a, b);
    } else {
      x[i] = a + shuffle<(I ^ HALF)...>(a, a);
    }
  }
  if constexpr (HALF > 1) return sum_each<HALF / 2>(x, lanes);
  return x[0];
}

// The sums of N registers, as numbers; writes up to the next multiple of LANES.
template <int N, class Scalar>
MEMKERNEL_INLINE void store_sums(Scalar* to, const f32x* x) {
  constexpr int COUNT = N < LANES ? N : LANES;
  f32x part[COUNT];
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) part[i] = x[i];
  store(to, sum_each<LANES / 2>(part, Lanes()));
  if constexpr (N > LANES) store_sums<N - LANES>(to + LANES, x + LANES);
}

// row[i][j] <-> row[j][i]: first within the 4 x 4 blocks, then blocks of 4, 8, ... change places with their mirrors.
template <int S, int... I>
inline void transpose_blocks(f32x (&row)[LANES], std::integer_sequence<int, I...> lanes) {
  for (int i = 0; i < LANES; i++) {
    if (i & S) continue;
    const f32x a = row[i];
    const f32x b = row[i + S];
    row[i] = shuffle<(I & S ? LANES + I - S : I)...>(a, b);
    row[i + S] = shuffle<(I & S ? LANES + I : I + S)...>(a, b);
  }
  if constexpr (2 * S < LANES) transpose_blocks<2 * S>(row, lanes);
}

template <int... I>
inline void transpose(f32x (&row)[LANES], std::integer_sequence<int, I...> lanes) {
  for (int i = 0; i < LANES; i += 4) {
    const f32x low_01 = shuffle<((I & ~3) + (I & 3) / 2 + (I & 1) * LANES)...>(row[i], row[i + 1]);
    const f32x low_23 = shuffle<((I & ~3) + (I & 3) / 2 + (I & 1) * LANES)...>(row[i + 2], row[i + 3]);
    const f32x high_01 = shuffle<((I & ~3) + (I & 3) / 2 + (I & 1) * LANES + 2)...>(row[i], row[i + 1]);
    const f32x high_23 = shuffle<((I & ~3) + (I & 3) / 2 + (I & 1) * LANES + 2)...>(row[i + 2], row[i + 3]);
    row[i] = shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES)...>(low_01, low_23);
    row[i + 1] = shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES + 2)...>(low_01, low_23);
    row[i + 2] = shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES)...>(high_01, high_23);
    row[i + 3] = shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES + 2)...>(high_01, high_23);
  }
  if constexpr (LANES > 4) transpose_blocks<4>(row, lanes);
}

inline void transpose(f32x (&row)[LANES]) {
  transpose(row, Lanes());
}

// 2^f for |f| <= 1/2: minimax in relative error, with 1 as the first coefficient.
inline f32x exp2_of_fraction(f32x f) {
  f32x y = fma(broadcast(1.5353362e-4f), f, broadcast(1.33988744e-3f));
  y = fma(y, f, broadcast(9.61843736e-3f));
  y = fma(y, f, broadcast(5.55033247e-2f));
  y = fma(y, f, broadcast(2.40226479e-1f));
  y = fma(y, f, broadcast(6.93147203e-1f));
  return fma(y, f, broadcast(1));
}

// Added to a small number, leaves it rounded in the low bits, as a float's biased exponent.
constexpr float TO_EXPONENT = 12582912.f + 127.f;

// 2^(f + n) for |f| <= 1/2 and integers n from -127 (gives 0) to 128 (infinity), given as n + TO_EXPONENT.
inline f32x power_of_2(f32x f, f32x exponent) {
  return exp2_of_fraction(f) * (f32x)((u32x)exponent << 23);
}

// 2^x to 1.2 ulp; NaN for NaN. Below 2^-126 it may be 0 already, above 2^127.5 infinity.
inline f32x exp2(f32x x) {
#if defined(__AVX512DQ__)
  const f32x f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for infinities
  return _mm512_scalef_ps(exp2_of_fraction(f), x - f);
#else
  x = min(broadcast(128), max(broadcast(-127), x));
  const f32x exponent = x + TO_EXPONENT;
  return power_of_2(x - (exponent - TO_EXPONENT), exponent);
#endif
}

// e^x to 2 ulp; NaN for NaN, 0 for x < -87.7 and infinity for x > 88.4.
inline f32x exp(f32x x) {
  x = min(broadcast(89), max(broadcast(-88), x));
  const f32x exponent = fma(x, broadcast(1.44269504f), broadcast(TO_EXPONENT));
  const f32x n = exponent - TO_EXPONENT;
  // x - n ln 2, with ln 2 in two parts: n times the first is exact.
  const f32x rest = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  return power_of_2(rest * 1.44269504f, exponent);
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
