// y = x W^T; each weight is read from memory once.
#include "linear_few.h"
#include "parallel.h"
#include "product.h"

namespace memkernel::MEMKERNEL_ISA {

constexpr int64_t FEW = 24;     // rows of x up to which sums with parts in all lanes are faster
static_assert(BLOCK % ROWS == 0 && BLOCK % LANES == 0);

// Rows of W that are read next: a line of each in turn, as the products go through those before.
struct FetchRows {
  const char* next;
  int64_t rows, row_bytes, step_bytes;

  void operator()(int64_t step) const {
    const int64_t byte = step * step_bytes;
    if (byte % LINE) return;
    for (int64_t r = 0; r < rows; ++r) fetch_far(next + r * row_bytes + byte, LINE);
  }
};

// body(v) with v = vectors as a constant, 1 to VECTORS.
template <int V = 1, class Body>
static void with_vectors(int64_t vectors, const Body& body) {
  if constexpr (V < VECTORS) {
    if (vectors > V) return with_vectors<V + 1>(vectors, body);
  }
  body(std::integral_constant<int, V>());
}

// Many rows of x: words of W as they lie in memory, by panels of x, so that no sum goes over lanes. Packed x is
// [panel][word][LANES * vectors of the panel].
template <class Scalar>
struct PanelProduct {
  static constexpr int P = PER_WORD<Scalar>;
  // Words of a row that are multiplied at a time: as many of x stay in the second cache level. In float32 fewer, for a
  // smaller rounding error than that of one long sum.
  static constexpr int64_t CHUNK = P == 1 ? 128 : 512;
  static constexpr bool HAS_WORDS = P * sizeof(Scalar) == sizeof(float);  // in memory, not just when loaded

  const Linear& a;
  int64_t words = a.in / P;
  int64_t width = round_up(a.N, LANES);
  float* x = packed_x.reserve<float>(width * words);

  PanelProduct(const Linear& arguments, const Threads& threads) : a(arguments) {
    parallel(threads, ceil_div(words, CHUNK), [this](int64_t i) {
      const int64_t begin = i * CHUNK;
      for (int64_t n = 0; n < a.N; n += PANEL) {
        const Rows<Scalar> rows = {static_cast<const Scalar*>(a.x) + n * a.x_N + begin * P, a.x_N, min(PANEL, a.N - n),
                                   min(CHUNK, words - begin)};
        pack_panel(rows, panel_width(n), panel(n, begin));
      }
    });
  }

  int64_t panel_width(int64_t n) const { return min(PANEL, width - n); }

  float* panel(int64_t n, int64_t word) const { return x + n * words + word * panel_width(n); }

  const Scalar* weight(int64_t o) const { return static_cast<const Scalar*>(a.weight) + o * a.weight_out; }

  // Rows [o, end) of W; fetches those from `next` on.
  void multiply(int64_t o, int64_t end, int64_t next) const {
    float* const sums = sums_of_block.reserve<float>(BLOCK * width);
    for (int64_t begin = 0; begin < words; begin += CHUNK) {
      const Scalar* const after = begin + CHUNK < words ? weight(o) + (begin + CHUNK) * P : weight(next);
      for (int64_t row = o, rows; row < end; row += rows) {
        rows = row + ROWS <= end ? ROWS : 1;
        const FetchRows fetch = {reinterpret_cast<const char*>(after + (row - o) * a.weight_out), rows,
                                 a.weight_out * int64_t(sizeof(Scalar)), P * sizeof(Scalar)};
        multiply_tile(row, rows, begin, fetch, sums + (row - o) * width);
      }
    }
    for (int64_t row = 0; row < end - o; row += LANES) {
      for (int64_t n = 0; n < a.N; n += LANES) write(sums + row * width + n, o + row, min(LANES, end - o - row), n);
    }
  }

  void multiply_tile(int64_t row, int64_t rows, int64_t begin, FetchRows fetch, float* sums) const {
    for (int64_t n = 0; n < a.N; n += PANEL) {
      with_vectors(panel_width(n) / LANES, [&](auto vectors) {
        const Product<Scalar, vectors, FetchRows> product = {weight(row) + begin * P,
                                                             fetch.row_bytes,
                                                             panel(n, begin),
                                                             min(CHUNK, words - begin),
                                                             sums + n,
                                                             width,
                                                             begin ? ONES : nullptr,
                                                             &fetch};
        rows == ROWS ? product.template run<ROWS>() : product.template run<1>();
      });
      fetch.rows = 0;
    }
  }

  // The sums of `count` rows of W, from row o on, with LANES rows of x, from row n on.
  void write(const float* sums, int64_t o, int64_t count, int64_t n) const {
    f32x tile[LANES];
    for (int i = 0; i < LANES; ++i) tile[i] = load(sums + i * width);
    transpose(tile);
    for (int64_t j = 0; j < min(LANES, a.N - n); ++j) {
      Scalar* const to = static_cast<Scalar*>(a.y) + (n + j) * a.out + o;
      count < LANES ? store_first(to, tile[j], count) : store(to, tile[j]);
    }
  }
};

template <class Product>
static void multiply(const Linear& a, const Threads& threads) {
  const Product product(a, threads);
  // Threads read long runs of memory, then take blocks as they come: one may be slower than the others.
  const int64_t run = a.out * 3 / 4 / threads.count / BLOCK * BLOCK;
  int64_t taken = run * threads.count;
  parallel(threads, threads.count, [&](int64_t thread) {
    for (int64_t o = run * thread, end = o + run; o < end; o += BLOCK)
      product.multiply(o, o + BLOCK, o + BLOCK < end ? o + BLOCK : __atomic_load_n(&taken, __ATOMIC_RELAXED));
    for (int64_t o; (o = __atomic_fetch_add(&taken, BLOCK, __ATOMIC_RELAXED)) < a.out;)
      // Fetched: what this thread takes next, if all are equally fast.
      product.multiply(o, min(o + BLOCK, a.out), o + BLOCK * threads.count);
  });
}

template <class Scalar>
static void multiply_rows(const Linear& a, const Threads& threads) {
  if constexpr (PanelProduct<Scalar>::HAS_WORDS) {
    if (a.N > FEW && a.in % PanelProduct<Scalar>::P == 0) return multiply<PanelProduct<Scalar>>(a, threads);
  }
  multiply<DotProduct<Scalar>>(a, threads);
}

int64_t linear_rows(DType dtype) {
  const bool has_panels = dtype == DType::float32 ? LANES > 4 : PanelProduct<bf16>::HAS_WORDS;
  return has_panels ? 256 : 32;
}

void linear(const Linear& a, const Threads& threads) {
  a.dtype == DType::float32 ? multiply_rows<float>(a, threads) : multiply_rows<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
