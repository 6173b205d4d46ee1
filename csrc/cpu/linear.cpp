// y = x W^T for a few rows of x: bound by reading W, so each weight is read from memory once, in its own order.
#include "buffer.h"
#include "fetch.h"
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

static constexpr int ROWS = 4;     // x rows at a time: as many share a load of W,
static constexpr int COLUMNS = 4;  // and as many weight rows a load of x
static constexpr int BLOCK = 64;   // weight rows that a thread takes at a time
// Of one or two x rows, for which one weight row after the other is read:
static constexpr int SUMS = 4;         // that do not wait for each other
static constexpr int AHEAD = 2 << 10;  // bytes of W that are fetched ahead into the first cache level,
static constexpr int LATER = 6 << 10;  // and what lies so much further on into the second

static thread_local Buffer packed_x;

// The sum of products of as many numbers as fill a register. x comes packed, in the form that the multiplication takes.
template <class Scalar>
struct Dot {
  static constexpr int SIZE = LANES;
  using Packed = float;
  using Numbers = f32x;

  static Numbers load_weights(const Scalar* from) { return load(from); }
  static Numbers load_weights(const Scalar* from, int64_t count) { return load_first(from, count); }
  static Numbers load_packed(const float* from) { return load(from); }
  static void pack(float* to, const Scalar* from, int64_t count) {
    store(to, count < SIZE ? load_first(from, count) : load(from));
  }
  static f32x add(f32x sum, Numbers a, Numbers b) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
  static constexpr int SIZE = 2 * LANES;
  using Packed = bf16;
  using Numbers = __m512bh;

  static Numbers load_weights(const bf16* from) { return (Numbers)_mm512_loadu_si512(from); }
  static Numbers load_weights(const bf16* from, int64_t count) {
    return (Numbers)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
  }
  static Numbers load_packed(const bf16* from) { return load_weights(from); }
  static void pack(bf16* to, const bf16* from, int64_t count) {
    const auto numbers = count < SIZE ? load_weights(from, count) : load_weights(from);
    __builtin_memcpy(to, &numbers, sizeof numbers);
  }
  static f32x add(f32x sum, Numbers a, Numbers b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// One product in flight. Packed x is [N / ROWS, in / SIZE, ROWS, SIZE], the last group of rows narrower, `in` padded with
// zeros: where rows lie a power of two apart, as those of W do, they would fight for the same few cache lines.
template <class Scalar>
struct LinearProduct {
  using D = Dot<Scalar>;
  using Packed = typename D::Packed;

  const Linear& a;
  int64_t padded = (a.in + D::SIZE - 1) / D::SIZE * D::SIZE;
  Packed* x = packed_x.reserve<Packed>(a.N * padded);

  explicit LinearProduct(const Linear& arguments) : a(arguments) {
    for (int64_t n = 0; n < a.N; ++n) {
      const int64_t group = n - n % ROWS, width = a.N - group < ROWS ? a.N - group : ROWS;
      const Scalar* from = static_cast<const Scalar*>(a.x) + n * a.x_N;
      for (int64_t i = 0; i < a.in; i += D::SIZE)
        D::pack(x + group * padded + i * width + n % ROWS * D::SIZE, from + i, a.in - i);
    }
  }

  // y[n, o] for N rows from n and O weight rows from o.
  template <int N, int O>
  void tile(int64_t n, int64_t o) const {
    const Packed* from = x + n * padded;
    const Scalar* w = static_cast<const Scalar*>(a.weight) + o * a.weight_out;
    f32x sums[N][O] = {};
    const auto step = [&](int64_t i, auto load_weights) {
      typename D::Numbers weights[O];
      for (int k = 0; k < O; ++k) weights[k] = load_weights(w + k * a.weight_out + i);
      for (int j = 0; j < N; ++j) {
        const auto numbers = D::load_packed(from + i * N + j * D::SIZE);
        for (int k = 0; k < O; ++k) sums[j][k] = D::add(sums[j][k], weights[k], numbers);
      }
    };
    // Each of the tiles that share these weight rows fetches some of the next ones, so that memory is never idle: the
    // processor's own prefetcher stops at the end of each page.
    const int64_t tiles = (a.N + ROWS - 1) / ROWS, index = n / ROWS;
    const Scalar* const next = w + (O + O * index / tiles) * a.weight_out;
    const int64_t fetched = O * (index + 1) / tiles - O * index / tiles;
    const int64_t whole = a.in - a.in % D::SIZE;
    for (int64_t i = 0; i < whole; i += D::SIZE) {
      for (int64_t k = 0; k < fetched; ++k) fetch_far(reinterpret_cast<const char*>(next + k * a.weight_out + i), LINE);
      step(i, [](const Scalar* p) { return D::load_weights(p); });
    }
    if (whole < a.in) step(whole, [&](const Scalar* p) { return D::load_weights(p, a.in - whole); });
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < O; ++k)
        store_first(static_cast<Scalar*>(a.y) + (n + j) * a.out + o + k, broadcast(sum_lanes(sums[j][k])), 1);
  }

  // All N rows of x against one weight row after the other: W is read as it lies, which gains more than loads of x that
  // weight rows share.
  template <int N>
  void rows(int64_t o, int64_t end) const {
    for (; o < end; ++o) {
      const Scalar* w = static_cast<const Scalar*>(a.weight) + o * a.weight_out;
      f32x sums[SUMS][N] = {};
      const auto add = [&](int64_t i, typename D::Numbers weights, f32x (&sum)[N]) {
        for (int j = 0; j < N; ++j) sum[j] = D::add(sum[j], weights, D::load_packed(x + i * N + j * D::SIZE));
      };
      int64_t i = 0;
      for (; i + SUMS * D::SIZE <= a.in; i += SUMS * D::SIZE) {
        fetch_near(reinterpret_cast<const char*>(w + i) + AHEAD, SUMS * D::SIZE * sizeof(Scalar), LATER);
        for (int s = 0; s < SUMS; ++s) add(i + s * D::SIZE, D::load_weights(w + i + s * D::SIZE), sums[s]);
      }
      for (; i + D::SIZE <= a.in; i += D::SIZE) add(i, D::load_weights(w + i), sums[0]);
      if (i < a.in) add(i, D::load_weights(w + i, a.in - i), sums[0]);
      for (int j = 0; j < N; ++j) {
        for (int s = 1; s < SUMS; ++s) sums[0][j] = sums[0][j] + sums[s][j];
        store_first(static_cast<Scalar*>(a.y) + j * a.out + o, broadcast(sum_lanes(sums[0][j])), 1);
      }
    }
  }

  // All rows of x against O weight rows, which stay cached from the first tile on.
  template <int O>
  void column(int64_t o) const {
    int64_t n = 0;
    for (; n + ROWS <= a.N; n += ROWS) tile<ROWS, O>(n, o);
    switch (a.N - n) {
      case 3: return tile<3, O>(n, o);
      case 2: return tile<2, O>(n, o);
      case 1: return tile<1, O>(n, o);
    }
  }

  void columns(int64_t o, int64_t end) const {
    for (; o + COLUMNS <= end; o += COLUMNS) column<COLUMNS>(o);
    for (; o < end; ++o) column<1>(o);
  }
};

template <class Scalar>
static void multiply(const Linear& a, const Threads& threads) {
  const LinearProduct<Scalar> product(a);
  int64_t next = 0;  // threads take blocks as they come: one may be slower than the others
  parallel(threads, threads.count, [&](int64_t) {
    for (int64_t o; (o = __atomic_fetch_add(&next, BLOCK, __ATOMIC_RELAXED)) < a.out;) {
      const int64_t end = o + BLOCK < a.out ? o + BLOCK : a.out;
      if (a.N == 1)
        product.template rows<1>(o, end);
      else if (a.N == 2)
        product.template rows<2>(o, end);
      else
        product.columns(o, end);
    }
  });
}

void linear(const Linear& a, const Threads& threads) {
  a.dtype == DType::float32 ? multiply<float>(a, threads) : multiply<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
