// y = x W^T for a few rows of x: bound by reading W, so each weight is read from memory once, in its own order.
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

static constexpr int OUTS = 4;    // weight rows at a time: as many share a load of x
static constexpr int ROWS = 4;    // x rows at a time: as many share a load of W
static constexpr int BLOCK = 16;  // weight rows a thread takes at a time
static constexpr int AHEAD = 1024;  // bytes of W prefetched: the processor's own prefetcher stops at each page

// Multiply-and-add of as many numbers as fill a register.
template <class Scalar>
struct Chunk {
  static constexpr int SIZE = LANES;
  f32x numbers;

  static Chunk of(const Scalar* from) { return {load(from)}; }
  static Chunk first_of(const Scalar* from, int64_t count) { return {load_first(from, count)}; }
  static f32x dot(f32x sum, Chunk a, Chunk b) { return fma(a.numbers, b.numbers, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Chunk<bf16> {
  static constexpr int SIZE = 2 * LANES;
  __m512bh numbers;

  static Chunk of(const bf16* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }
  static Chunk first_of(const bf16* from, int64_t count) {
    return {(__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, from)};
  }
  static f32x dot(f32x sum, Chunk a, Chunk b) { return _mm512_dpbf16_ps(sum, a.numbers, b.numbers); }
};
#endif

// y[n, o] for N rows from x and O weight rows from w.
template <int N, int O, class Scalar>
static void tile(const Linear& a, const Scalar* x, const Scalar* w, Scalar* y) {
  using Numbers = Chunk<Scalar>;
  f32x sums[N][O] = {};
  const int64_t whole = a.in - a.in % Numbers::SIZE, rest = a.in - whole;
  for (int64_t i = 0; i < whole; i += Numbers::SIZE) {
    Numbers weights[O];
    for (int o = 0; o < O; ++o) {
      weights[o] = Numbers::of(w + o * a.weight_out + i);
      __builtin_prefetch(reinterpret_cast<const char*>(w + o * a.weight_out + i) + AHEAD);
    }
    for (int n = 0; n < N; ++n) {
      const Numbers numbers = Numbers::of(x + n * a.x_N + i);
      for (int o = 0; o < O; ++o) sums[n][o] = Numbers::dot(sums[n][o], weights[o], numbers);
    }
  }
  if (rest)
    for (int n = 0; n < N; ++n)
      for (int o = 0; o < O; ++o)
        sums[n][o] = Numbers::dot(sums[n][o], Numbers::first_of(w + o * a.weight_out + whole, rest),
                                  Numbers::first_of(x + n * a.x_N + whole, rest));
  for (int n = 0; n < N; ++n)
    for (int o = 0; o < O; ++o) {
      const f32x sum = broadcast(sum_lanes(sums[n][o]));
      store_first(y + n * a.out + o, sum, 1);
    }
}

// All rows of x against O weight rows, which stay in the first-level cache from the first `tile` on.
template <int O, class Scalar>
static void column(const Linear& a, int64_t o) {
  const Scalar* x = static_cast<const Scalar*>(a.x);
  const Scalar* w = static_cast<const Scalar*>(a.weight) + o * a.weight_out;
  Scalar* y = static_cast<Scalar*>(a.y) + o;
  int64_t n = 0;
  for (; n + ROWS <= a.N; n += ROWS) tile<ROWS, O>(a, x + n * a.x_N, w, y + n * a.out);
  switch (a.N - n) {
    case 3: return tile<3, O>(a, x + n * a.x_N, w, y + n * a.out);
    case 2: return tile<2, O>(a, x + n * a.x_N, w, y + n * a.out);
    case 1: return tile<1, O>(a, x + n * a.x_N, w, y + n * a.out);
  }
}

template <class Scalar>
static void product(const Linear& a, const Threads& threads) {
  const int64_t blocks = (a.out + BLOCK - 1) / BLOCK;
  int64_t next = 0;
  parallel(threads, threads.count, [&](int64_t) {
    for (int64_t block; (block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < blocks;) {
      const int64_t end = a.out < (block + 1) * BLOCK ? a.out : (block + 1) * BLOCK;
      int64_t o = block * BLOCK;
      for (; o + OUTS <= end; o += OUTS) column<OUTS, Scalar>(a, o);
      for (; o < end; ++o) column<1, Scalar>(a, o);
    }
  });
}

void linear(const Linear& a, const Threads& threads) {
  a.dtype == DType::float32 ? product<float>(a, threads) : product<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
