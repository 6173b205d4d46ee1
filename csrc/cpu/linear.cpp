// y = x W^T for a few rows of x: bound by reading W, so each weight is read from memory once, in its own order.
#include "buffer.h"
#include "fetch.h"
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

// Of more than two x rows, ROWS x COLUMNS sums nearly fill the vector registers:
static constexpr int ROWS = LANES == 16 ? 8 : 4;  // x rows at a time: as many share a load of W,
static constexpr int COLUMNS = 3;                 // and as many weight rows a load of x;
static constexpr int FEW_ROWS = 4;                // up to here
static constexpr int COLUMNS_OF_FEW = LANES == 16 ? 4 : 3;
static constexpr int CHUNK_BYTES = 16 << 10;  // of ROWS x rows, which stay in the first cache level
static constexpr int BLOCK = 48;              // weight rows that a thread takes at a time
// Of one or two, for which one weight row after the other is read:
static constexpr int SUMS = 4;         // that do not wait for each other
static constexpr int AHEAD = 2 << 10;  // bytes of W that are fetched ahead into the first cache level,
static constexpr int LATER = 6 << 10;  // and what lies so much further on into the second

static thread_local Buffer packed_x;
static thread_local Buffer sums_of_block;

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

// One product in flight. Packed x is [group, in / SIZE, rows of the group, SIZE], `in` padded with zeros: where rows lie
// a power of two apart, as those of W do, they would fight for the same few cache lines.
template <class Scalar>
struct LinearProduct {
  using D = Dot<Scalar>;
  using Packed = typename D::Packed;
  static constexpr int64_t CHUNK = CHUNK_BYTES / ROWS / sizeof(Packed);

  const Linear& a;
  int64_t padded = (a.in + D::SIZE - 1) / D::SIZE * D::SIZE;
  int64_t groups = (a.N + ROWS - 1) / ROWS;
  Packed* x = packed_x.reserve<Packed>(a.N * padded);

  explicit LinearProduct(const Linear& arguments) : a(arguments) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t n = first_row(group), N = first_row(group + 1) - n;
      for (int64_t j = 0; j < N; ++j) {
        const Scalar* from = static_cast<const Scalar*>(a.x) + (n + j) * a.x_N;
        for (int64_t i = 0; i < a.in; i += D::SIZE) D::pack(x + n * padded + i * N + j * D::SIZE, from + i, a.in - i);
      }
    }
  }

  int64_t first_row(int64_t group) const { return a.N * group / groups; }

  const Scalar* weight(int64_t o) const { return static_cast<const Scalar*>(a.weight) + o * a.weight_out; }

  // Columns [begin, end) of W and x for N rows of x from n and O weight rows from o: adds to the sums of earlier
  // columns, and writes y after the last ones. Fetches the same columns of the weight rows from `next` on: the
  // processor's own prefetcher stops at the end of each page.
  template <int N, int O>
  void tile(int64_t n, int64_t o, int64_t begin, int64_t end, float* sums_so_far, const Scalar* next) const {
    const Packed* from = x + n * padded;
    const Scalar* w = weight(o);
    const int64_t stride = a.weight_out;  // a copy: a store would make it load it again
    f32x sums[N * O];
#pragma GCC unroll 32  // or the sums are kept in memory
    for (int s = 0; s < N * O; ++s) sums[s] = begin ? load(sums_so_far + s * LANES) : f32x{};
    const auto step = [&](int64_t i, auto load_weights) {
      typename D::Numbers weights[O];
#pragma GCC unroll 8
      for (int k = 0; k < O; ++k) weights[k] = load_weights(w + k * stride + i);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const auto numbers = D::load_packed(from + i * N + j * D::SIZE);
#pragma GCC unroll 8
        for (int k = 0; k < O; ++k) sums[j * O + k] = D::add(sums[j * O + k], weights[k], numbers);
      }
    };
    const int64_t whole = end - end % D::SIZE;
    for (int64_t i = begin; i < whole; i += D::SIZE) {
      for (int k = 0; k < O; ++k) fetch_far(reinterpret_cast<const char*>(next + k * stride + i), LINE);
      step(i, [](const Scalar* p) { return D::load_weights(p); });
    }
    if (whole < end) step(whole, [&](const Scalar* p) { return D::load_weights(p, end - whole); });
    if (end < a.in) {
#pragma GCC unroll 32
      for (int s = 0; s < N * O; ++s) store(sums_so_far + s * LANES, sums[s]);
      return;
    }
    Scalar y[(N * O + LANES - 1) / LANES * LANES];
    store_sums<N * O>(y, sums);
    for (int j = 0; j < N; ++j)
      __builtin_memcpy(static_cast<Scalar*>(a.y) + (n + j) * a.out + o, y + j * O, O * sizeof(Scalar));
  }

  // All N rows of x against one weight row after the other: W is read as it lies, which gains more than loads of x that
  // weight rows share.
  template <int N>
  void rows(int64_t o, int64_t end) const {
    for (; o < end; ++o) {
      const Scalar* w = weight(o);
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

  // All rows of x against O weight rows, which stay cached from the first group on. Each group fetches the next weight
  // rows, though one would do: memory is then asked more evenly.
  template <int O>
  void tiles(int64_t o, int64_t begin, int64_t end, float* sums, const Scalar* next) const {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t n = first_row(group);
      tile_of<O == COLUMNS_OF_FEW ? FEW_ROWS : ROWS, O>(first_row(group + 1) - n, n, o, begin, end,
                                                        sums + n * O * LANES, next);
    }
  }

  template <int N, int O, class... Arguments>
  void tile_of(int64_t rows, Arguments... arguments) const {
    if constexpr (N > 1)
      if (rows < N) return tile_of<N - 1, O>(rows, arguments...);
    tile<N, O>(arguments...);
  }

  // Weight rows [o, end), before those from `following` on, O at a time: by chunks of columns, so that a chunk of x
  // stays in the first cache level.
  template <int O>
  void block(int64_t o, int64_t end, int64_t following) const {
    float* const sums = sums_of_block.reserve<float>(BLOCK * a.N * LANES);
    int64_t begin = 0, chunk_end;
    do {
      chunk_end = begin + CHUNK < a.in ? begin + CHUNK : a.in;
      const Scalar* const next_chunk = chunk_end < a.in ? weight(o) + chunk_end - begin : weight(following) - begin;
      int64_t row = o;
      for (; row + O <= end; row += O)
        tiles<O>(row, begin, chunk_end, sums + (row - o) * a.N * LANES, row + O < end ? weight(row + O) : next_chunk);
      for (; row < end; ++row)
        tiles<1>(row, begin, chunk_end, sums + (row - o) * a.N * LANES, row + 1 < end ? weight(row + 1) : next_chunk);
      begin = chunk_end;
    } while (begin < a.in);
  }
};

template <class Scalar>
static void multiply(const Linear& a, const Threads& threads) {
  const LinearProduct<Scalar> product(a);
  int64_t taken = 0;  // threads take blocks as they come: one may be slower than the others
  parallel(threads, threads.count, [&](int64_t) {
    const auto take = [&] { return __atomic_fetch_add(&taken, BLOCK, __ATOMIC_RELAXED); };
    for (int64_t o = take(), following; o < a.out; o = following) {
      following = take();
      const int64_t end = o + BLOCK < a.out ? o + BLOCK : a.out;
      if (a.N == 1)
        product.template rows<1>(o, end);
      else if (a.N == 2)
        product.template rows<2>(o, end);
      else if (a.N <= FEW_ROWS)
        product.template block<COLUMNS_OF_FEW>(o, end, following);
      else
        product.template block<COLUMNS>(o, end, following);
    }
  });
}

void linear(const Linear& a, const Threads& threads) {
  a.dtype == DType::float32 ? multiply<float>(a, threads) : multiply<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
