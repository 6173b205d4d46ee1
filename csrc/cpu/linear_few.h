// y = x W^T for a few rows of x: bound by reading W. A register holds neighbours of a row of W, as they lie in memory,
// so that a sum has parts in all lanes.
#pragma once

#include "buffer.h"
#include "fetch.h"
#include "kernels.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {
namespace {

// A tile multiplies up to DOT_ROWS rows of x by COLUMNS rows of W, so that sums nearly fill the registers. Where x has
// no more rows, reading W takes the time, and fewer rows of W side by side are read faster:
constexpr int DOT_ROWS = LANES == 16 ? 8 : 4;
constexpr int COLUMNS = 3;
constexpr int FEW_COLUMNS = 2;
constexpr int CHUNK_BYTES = 16 << 10;  // of DOT_ROWS rows of x, which stay in the first cache level
constexpr int BLOCK = 48;              // rows of W that a thread takes at a time, for many rows of x too
static_assert(BLOCK % COLUMNS == 0 && BLOCK % FEW_COLUMNS == 0);
// Of one row of x:
constexpr int SUMS = 4;         // that do not wait for each other
constexpr int AHEAD = 4 << 10;  // bytes of W that are fetched ahead

thread_local Buffer packed_x;
thread_local Buffer sums_of_block;

// The sum of products of as many numbers as fill a register. x comes packed, in the form that multiplication takes.
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

// Columns [begin, end) of W and x, for N rows of x and O rows of W: adds to the sums of earlier columns, and writes y
// after the last ones. Fetches as much of W as it reads, in the order of memory if W's rows lie side by side.
template <class Scalar, int O>
struct DotTile {
  using D = Dot<Scalar>;

  const Linear& a;
  int64_t n, o;                 // first rows of x and W
  const typename D::Packed* x;  // from row n on
  int64_t begin, end;
  const Scalar* weight;         // row o
  const Scalar* next;           // what it fetches
  float* sums_so_far;           // [N][O][LANES]

  template <int N>
  void run() const {
    // Copies: a store would make it load them again.
    const auto [a, n, o, x, begin, end, weight, next, sums_so_far] = *this;
    f32x sums[N * O];
#pragma GCC unroll 32  // or the sums are kept in memory
    for (int s = 0; s < N * O; ++s) sums[s] = begin ? load(sums_so_far + s * LANES) : f32x{};
    const auto step = [&sums, &a = a, x = x, weight = weight](int64_t i, auto load_weights) {
      typename D::Numbers weights[O];
#pragma GCC unroll 8
      for (int k = 0; k < O; ++k) weights[k] = load_weights(weight + k * a.weight_out + i);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const auto numbers = D::load_packed(x + i * N + j * D::SIZE);
#pragma GCC unroll 8
        for (int k = 0; k < O; ++k) sums[j * O + k] = D::add(sums[j * O + k], weights[k], numbers);
      }
    };
    const int64_t whole = end - end % D::SIZE;
    for (int64_t i = begin; i < whole; i += D::SIZE) {
      fetch_far(reinterpret_cast<const char*>(next + O * (i - begin)), O * D::SIZE * sizeof(Scalar));
      step(i, [](const Scalar* p) { return D::load_weights(p); });
    }
    if (whole < end) step(whole, [left = end - whole](const Scalar* p) { return D::load_weights(p, left); });
    if (end < a.in) {
#pragma GCC unroll 32
      for (int s = 0; s < N * O; ++s) store(sums_so_far + s * LANES, sums[s]);
      return;
    }
    Scalar y[round_up(N * O, LANES)];
    store_sums<N * O>(y, sums);
    for (int j = 0; j < N; ++j)
      __builtin_memcpy(static_cast<Scalar*>(a.y) + (n + j) * a.out + o, y + j * O, O * sizeof(Scalar));
  }
};

template <class Scalar>
const Scalar* weight_row(const Linear& a, int64_t o) {
  return static_cast<const Scalar*>(a.weight) + o * a.weight_out;
}

// One product in flight. Packed x is [group, in / SIZE, rows of the group, SIZE], `in` padded with zeros: where rows
// lie a power of two apart, as those of W do, they would fight for the same few cache lines.
template <class Scalar>
struct DotProduct {
  using D = Dot<Scalar>;
  using Packed = typename D::Packed;

  const Linear& a;
  int64_t padded = round_up(a.in, D::SIZE);
  int64_t groups = ceil_div(a.N, DOT_ROWS);
  int64_t chunks = ceil_div(a.in * DOT_ROWS * sizeof(Packed), CHUNK_BYTES);
  int64_t chunk = round_up(ceil_div(a.in, chunks), D::SIZE);  // columns
  Packed* x = packed_x.reserve<Packed>(a.N * padded);

  DotProduct(const Linear& arguments, const Threads&) : a(arguments) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t n = first_row(group), width = first_row(group + 1) - n;
      for (int64_t j = 0; j < width; ++j) {
        const Scalar* from = static_cast<const Scalar*>(a.x) + (n + j) * a.x_N;
        Packed* const to = x + n * padded + j * D::SIZE;
        for (int64_t i = 0; i < a.in; i += D::SIZE) D::pack(to + i * width, from + i, a.in - i);
      }
    }
  }

  int64_t first_row(int64_t group) const { return a.N * group / groups; }

  // Rows [o, end) of W; fetches those from `next` on.
  void multiply(int64_t o, int64_t end, int64_t next) const {
    if (a.N == 1)
      one_row(o, end);
    else if (a.N <= DOT_ROWS)
      block<2, DOT_ROWS, FEW_COLUMNS>(o, end, weight_row<Scalar>(a, next));
    else
      block<DOT_ROWS / 2, DOT_ROWS, COLUMNS>(o, end, weight_row<Scalar>(a, next));
  }

  // The only row of x by rows [o, end) of W, one after the other.
  void one_row(int64_t o, int64_t end) const {
    for (; o < end; ++o) {
      const Scalar* w = weight_row<Scalar>(a, o);
      f32x sums[SUMS] = {};
      int64_t i = 0;
      for (; i + SUMS * D::SIZE <= a.in; i += SUMS * D::SIZE) {
        fetch_far(reinterpret_cast<const char*>(w + i) + AHEAD, SUMS * D::SIZE * sizeof(Scalar));
        for (int s = 0; s < SUMS; ++s) {
          const int64_t at = i + s * D::SIZE;
          sums[s] = D::add(sums[s], D::load_weights(w + at), D::load_packed(x + at));
        }
      }
      for (; i + D::SIZE <= a.in; i += D::SIZE)
        sums[0] = D::add(sums[0], D::load_weights(w + i), D::load_packed(x + i));
      if (i < a.in) sums[0] = D::add(sums[0], D::load_weights(w + i, a.in - i), D::load_packed(x + i));
      for (int s = 1; s < SUMS; ++s) sums[0] = sums[0] + sums[s];
      store_first(static_cast<Scalar*>(a.y) + o, broadcast(sum_lanes(sums[0])), 1);
    }
  }

  // Rows [o, end) of W, O at a time, by chunks of columns and groups of x, LEAST to MOST rows: so a group's chunk stays
  // in the first cache level. Each group fetches the rows from `next` on, though one would do: memory is then asked
  // more evenly.
  template <int LEAST, int MOST, int O>
  void block(int64_t o, int64_t end, const Scalar* next) const {
    float* const sums = sums_of_block.reserve<float>(BLOCK * a.N * LANES);
    for (int64_t begin = 0; begin < a.in; begin += chunk) {
      const int64_t columns = min(chunk, a.in - begin);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t n = first_row(group), width = first_row(group + 1) - n;
        const auto multiply = [&](int64_t row, auto at_a_time) {
          const DotTile<Scalar, at_a_time> tile = {a,
                                                   n,
                                                   row,
                                                   x + n * padded,
                                                   begin,
                                                   begin + columns,
                                                   weight_row<Scalar>(a, row),
                                                   next + (row - o) * columns,
                                                   sums + (n * BLOCK + (row - o) * width) * LANES};
          run_with<LEAST, MOST>(width, tile);
        };
        int64_t row = o;
        for (; row + O <= end; row += O) multiply(row, std::integral_constant<int, O>());
        for (; row < end; ++row) multiply(row, std::integral_constant<int, 1>());
      }
      next += (end - o) * columns;
    }
  }
};

}  // namespace
}  // namespace memkernel::MEMKERNEL_ISA
