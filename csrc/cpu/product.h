// Products of packed operands: rows of words by panels, whose columns fill vector registers.
#pragma once

#include "simd.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int ROWS = 6;                 // ROWS x VECTORS sums nearly fill the vector registers
constexpr int PANEL = VECTORS * LANES;  // columns of a packed operand that lie together

// Operands of the products are 32-bit words: a float, or two bf16 where the processor multiplies and adds pairs.
template <class Scalar>
inline constexpr int PER_WORD = 1;

template <class Scalar>
inline f32x multiply_add(f32x a, f32x b, f32x sum) {
  return fma(a, b, sum);
}

// Words whose halves come from two rows, in the order of the columns.
template <class Scalar>
inline void interleave(const f32x (&row)[PER_WORD<Scalar>], f32x* to) {
  to[0] = row[0];
}

#if defined(__AVX512BF16__)
template <>
inline constexpr int PER_WORD<bf16> = 2;

template <>
inline f32x multiply_add<bf16>(f32x a, f32x b, f32x sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <>
inline void interleave<bf16>(const f32x (&row)[2], f32x* to) {
  const i32x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int half = 0; half < 2; half++) {
    const i32x index = (lane + 16 * half) * 0x10001 + (32 << 16);
    to[half] = (f32x)_mm512_permutex2var_epi16((__m512i)row[0], (__m512i)index, (__m512i)row[1]);
  }
}
#endif

template <class Scalar>
inline constexpr int64_t WORD_BYTES = PER_WORD<Scalar> * sizeof(Scalar);  // as it lies in memory

template <class Scalar>
inline f32x load_words(const Scalar* from) {
  if constexpr (PER_WORD<Scalar> == 1) return load(from);
  f32x x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// The first `words` words, zeros after them.
template <class Scalar>
inline f32x load_words(const Scalar* from, int64_t words) {
  if (words >= LANES) return load_words(from);
  Scalar buffer[LANES * PER_WORD<Scalar>] = {};
  __builtin_memcpy(buffer, from, words * PER_WORD<Scalar> * sizeof(Scalar));
  return load_words(buffer);
}

// Rows of an operand before it is packed.
template <class Scalar>
struct Rows {
  const Scalar* from;
  int64_t row, rows, words;

  bool has(int64_t i, int64_t word) const {
    return i < rows && word + LANES <= words;
  }

  // LANES words of row i; if CHECKED, with zeros for missing ones.
  template <bool CHECKED>
  f32x part(int64_t i, int64_t word) const {
    const Scalar* const source = from + i * row + word * PER_WORD<Scalar>;
    if (!CHECKED) return load_words(source);
    return i < rows ? load_words(source, words - word) : f32x{};
  }
};

template <bool CHECKED, class Scalar>
inline void pack_tile(const Rows<Scalar>& rows, int64_t row, int64_t word, int64_t width, float* to) {
  f32x tile[LANES];
  for (int i = 0; i < LANES; i++) tile[i] = rows.template part<CHECKED>(row + i, word);
  transpose(tile);
  const int64_t count = CHECKED ? min(LANES, rows.words - word) : LANES;
  for (int i = 0; i < count; i++) store(to + i * width, tile[i]);
}

// Rows as the columns of a right operand, [word][width], and zeros for those that there are not; width is a multiple of
// LANES.
template <class Scalar>
void pack_panel(const Rows<Scalar>& rows, int64_t width, float* to) {
  for (int64_t row = 0; row < width; row += LANES) {
    for (int64_t word = 0; word < rows.words; word += LANES) {
      if (rows.has(row + LANES - 1, word)) {
        pack_tile<false>(rows, row, word, width, to + word * width + row);
      } else {
        pack_tile<true>(rows, row, word, width, to + word * width + row);
      }
    }
  }
}

// Keys as the right operand of query * key^T: [panel of keys][word of D][PANEL].
template <class Scalar>
void pack_keys(const Rows<Scalar>& keys, float* to) {
  for (int64_t key = 0; key < keys.rows; key += PANEL) {
    const Rows<Scalar> panel = {keys.from + key * keys.row, keys.row, min(PANEL, keys.rows - key), keys.words};
    pack_panel(panel, PANEL, to + key * keys.words);
  }
}

template <bool CHECKED, class Scalar>
inline void pack_value_step(const Rows<Scalar>& values, int64_t step, int64_t word, float* to) {
  constexpr int P = PER_WORD<Scalar>;
  f32x row[P], columns[P];
  for (int i = 0; i < P; i++) row[i] = values.template part<CHECKED>(step * P + i, word);
  interleave<Scalar>(row, columns);
  for (int i = 0; i < P; i++) store(to + i * LANES, columns[i]);
}

// Values as the right operand of weight * value: [panel of D][word of keys][PANEL].
template <class Scalar>
void pack_values(const Rows<Scalar>& values, float* to) {
  const int64_t steps = round_up(values.rows, PANEL) / PER_WORD<Scalar>;
  for (int64_t word = 0; word < values.words; word += LANES) {
    const int64_t column = word * PER_WORD<Scalar>;
    float* const panel = to + column / PANEL * PANEL * steps + column % PANEL;
    const int64_t whole = values.has(0, word) ? values.rows / PER_WORD<Scalar> : 0;
    for (int64_t step = 0; step < whole; step++) pack_value_step<false>(values, step, word, panel + step * PANEL);
    for (int64_t step = whole; step < steps; step++) pack_value_step<true>(values, step, word, panel + step * PANEL);
  }
}

constexpr float ONES[ROWS] = {1, 1, 1, 1, 1, 1};  // scales that keep c

inline float load_word(const void* from, int64_t offset) {
  float word;
  __builtin_memcpy(&word, static_cast<const char*>(from) + offset, sizeof word);
  return word;
}

// c = scale * c + a * b, or a * b without scale; a [rows, steps], b [steps, V * LANES] in words, c [rows, V * LANES].
// Fetches something else as it goes: fetch(step).
template <class Scalar, class Fetch>
struct Product {
  const void* a;
  int64_t a_bytes;  // of a row
  const float* b;
  int64_t steps;
  float* c;
  int64_t c_row;
  const float* scale;
  Fetch* fetch;

  // The product is summed apart from c: a long sum in blocks has a much smaller rounding error. steps > 0 keeps the
  // sums in registers.
  template <int rows, int V = VECTORS>
  void run() const {
    const auto [a, a_bytes, b, steps, c, c_row, scale, fetch] = *this;  // copies: a store would make it load them again
    Fetch fetch_more = *fetch;
    f32x sum[rows][V];
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < V; v++) sum[r][v] = f32x{};
    }
    int64_t step = 0;
    do {
      fetch_more(step);
      f32x part[V];
      for (int v = 0; v < V; v++) part[v] = load(b + (step * V + v) * LANES);
      for (int r = 0; r < rows; r++) {
        const f32x word = broadcast(load_word(a, r * a_bytes + step * sizeof(float)));
        for (int v = 0; v < V; v++) sum[r][v] = multiply_add<Scalar>(word, part[v], sum[r][v]);
      }
    } while (++step < steps);
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < V; v++) {
        float* const to = c + r * c_row + v * LANES;
        store(to, scale ? fma(load(to), broadcast(scale[r]), sum[r][v]) : sum[r][v]);
      }
    }
    *fetch = fetch_more;
  }
};

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
