// y = x W^T; each weight is read from memory once.
#include "buffer.h"
#include "fetch.h"
#include "kernels.h"
#include "linear_few.h"
#include "parallel.h"
#include "product.h"

namespace memkernel::MEMKERNEL_ISA {

constexpr int64_t FEW = 24;  // rows of x up to which sums with parts in all lanes are faster
static_assert(BLOCK % ROWS == 0 && BLOCK % LANES == 0);

// Rows of W that are read next: a line of each in turn, as the products go through those before.
struct FetchRows {
  const char* next;
  int64_t rows, row_bytes;

  void operator()(int64_t step) const {
    const int64_t byte = step * int64_t(sizeof(float));
    if (byte % LINE) return;
    for (int64_t r = 0; r < rows; ++r) fetch_far(next + r * row_bytes + byte, LINE);
  }
};

// Some rows of W, ROWS or one, by V vectors of a panel of x.
template <class Scalar>
struct PanelTile {
  int64_t rows;
  Product<Scalar, FetchRows> product;

  template <int V>
  void run() const {
    rows == ROWS ? product.template run<ROWS, V>() : product.template run<1, V>();
  }
};

// Many rows of x: words of W as they lie in memory, by panels of x, so that no sum goes over lanes. Packed x is
// [panel][word][LANES * vectors of the panel].
template <class Scalar>
struct PanelProduct {
  static constexpr int P = PER_WORD<Scalar>;
  // Words of a row that are multiplied at a time, at most: as many of x stay in the second cache level. In float32
  // fewer, for a smaller rounding error than that of one long sum.
  static constexpr int64_t CHUNK = P == 1 ? 128 : 512;

  const Linear& a;
  int64_t words = a.in / P;
  int64_t chunks = ceil_div(words, CHUNK);
  int64_t chunk = round_up(ceil_div(words, chunks), LANES);
  int64_t panels = ceil_div(a.N, PANEL);
  int64_t width = round_up(a.N, LANES);
  int64_t row_bytes = a.weight_out * sizeof(Scalar);
  float* x = packed_x.reserve<float>(width * words);

  // Whether a row of W lies in memory as words.
  static bool takes(int64_t in) { return WORD_BYTES<Scalar> == sizeof(float) && in % P == 0; }

  PanelProduct(const Linear& arguments, const Threads& threads) : a(arguments) {
    parallel(threads, panels * chunks, [this](int64_t i) {
      const int64_t n = i % panels * PANEL, begin = i / panels * chunk;
      const Scalar* const from = static_cast<const Scalar*>(a.x) + n * a.x_N + begin * P;
      pack_panel<Scalar>({from, a.x_N, min(PANEL, a.N - n), words_from(begin)}, panel_width(n), panel(n, begin));
    });
  }

  int64_t words_from(int64_t begin) const { return min(chunk, words - begin); }

  int64_t panel_width(int64_t n) const { return min(PANEL, width - n); }

  float* panel(int64_t n, int64_t word) const { return x + n * words + word * panel_width(n); }

  // Rows [o, end) of W; fetches those from `next` on.
  void multiply(int64_t o, int64_t end, int64_t next) const {
    float* const sums = sums_of_block.reserve<float>(BLOCK * width);
    for (int64_t begin = 0; begin < words; begin += chunk) {
      const int64_t following = begin + chunk;
      const Scalar* const after =
          following < words ? weight_row<Scalar>(a, o) + following * P : weight_row<Scalar>(a, next);
      for (int64_t row = o, rows; row < end; row += rows) {
        rows = row + ROWS <= end ? ROWS : 1;
        FetchRows fetch = {reinterpret_cast<const char*>(after + (row - o) * a.weight_out), rows, row_bytes};
        for (int64_t n = 0; n < a.N; n += PANEL) {
          const PanelTile<Scalar> tile = {rows,
                                          {weight_row<Scalar>(a, row) + begin * P,
                                           row_bytes,
                                           panel(n, begin),
                                           words_from(begin),
                                           sums + (row - o) * width + n,
                                           width,
                                           begin ? ONES : nullptr,
                                           &fetch}};
          run_with<1, VECTORS>(panel_width(n) / LANES, tile);
          fetch.rows = 0;  // the first panel's products fetch all
        }
      }
    }
    for (int64_t row = 0; row < end - o; row += LANES) {
      for (int64_t n = 0; n < a.N; n += LANES) write(sums + row * width + n, o + row, min(LANES, end - o - row), n);
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

template <class Kernel>
static void multiply(const Linear& a, const Threads& threads) {
  const Kernel kernel(a, threads);
  // Threads read long runs of memory, then take blocks as they come: one may be slower than the others.
  const int64_t run = a.out * 3 / 4 / threads.count / BLOCK * BLOCK;
  int64_t taken = run * threads.count;
  parallel(threads, threads.count, [&](int64_t thread) {
    for (int64_t o = run * thread, end = o + run; o < end; o += BLOCK)
      kernel.multiply(o, o + BLOCK, o + BLOCK < end ? o + BLOCK : __atomic_load_n(&taken, __ATOMIC_RELAXED));
    for (int64_t o; (o = __atomic_fetch_add(&taken, BLOCK, __ATOMIC_RELAXED)) < a.out;)
      // Fetched: what this thread takes next, if all are equally fast.
      kernel.multiply(o, min(o + BLOCK, a.out), o + BLOCK * threads.count);
  });
}

template <class Scalar>
static void multiply_rows(const Linear& a, const Threads& threads) {
  if constexpr (WORD_BYTES<Scalar> == sizeof(float)) {
    if (a.N > FEW && PanelProduct<Scalar>::takes(a.in)) return multiply<PanelProduct<Scalar>>(a, threads);
  }
  multiply<DotProduct<Scalar>>(a, threads);
}

// By panels: none where vectors are short or W has no words for them.
int64_t linear_rows(DType dtype, int64_t in) {
  const bool takes = dtype == DType::float32 ? PanelProduct<float>::takes(in) : PanelProduct<bf16>::takes(in);
  return takes && LANES > 4 ? 256 : 0;
}

void linear(const Linear& a, const Threads& threads) {
  a.dtype == DType::float32 ? multiply_rows<float>(a, threads) : multiply_rows<bf16>(a, threads);
}

}  // namespace memkernel::MEMKERNEL_ISA
