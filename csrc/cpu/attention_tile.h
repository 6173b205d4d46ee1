// The parts of attention that touch every number: packed operands, their products, and the softmax of a row.
#pragma once

#include "fetch.h"
#include "simd.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int ROWS = 6;                   // ROWS x VECTORS sums nearly fill the vector registers
constexpr int PANEL = VECTORS * LANES;    // columns of a packed operand that lie together
constexpr float NEVER = -3.40282347e38f;  // a maximum below any score, but finite: NEVER - NEVER is 0

// Operands of the products are 32-bit words: a float, or two bf16 where the processor multiplies and adds pairs.
template <class Scalar>
constexpr int PER_WORD = 1;

template <class Scalar>
inline f32x multiply_add(f32x a, f32x b, f32x sum) {
  return fma(a, b, sum);
}

// Words whose halves come from two rows, in the order of the columns.
template <class Scalar>
inline void interleave(const f32x (&row)[PER_WORD<Scalar>], f32x* to) {
  to[0] = row[0];
}

// Numbers in their order, rounded, as words.
template <class Scalar>
inline f32x pack_words(const f32x (&numbers)[PER_WORD<Scalar>]) {
  return numbers[0];
}

// 2^x, to an error well below the rounding of a word.
template <class Scalar>
inline f32x exp2_for_words(f32x x) {
  return exp2(x);
}

template <class Scalar>
inline f32x one_words() {
  return broadcast(1);
}

#if defined(__AVX512BF16__)
template <>
constexpr int PER_WORD<bf16> = 2;

// To a relative 1e-4: minimax on [0, 1), with 1 as the first coefficient.
template <>
inline f32x exp2_for_words<bf16>(f32x x) {
  const f32x f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 for infinities
  f32x y = fma(broadcast(0.0770670474f), f, broadcast(0.227644995f));
  y = fma(y, f, broadcast(0.695116758f));
  return _mm512_scalef_ps(fma(y, f, broadcast(1)), x);  // which rounds x down
}

template <>
inline f32x pack_words<bf16>(const f32x (&numbers)[2]) {
  return (f32x)_mm512_cvtne2ps_pbh(numbers[1], numbers[0]);
}

template <>
inline f32x one_words<bf16>() {
  return (f32x)(u32x{} + 0x3f803f80u);
}

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

// The rows of a block that belong to one key/value head.
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
inline void pack_key_tile(const Rows<Scalar>& keys, int64_t key, int64_t word, float* to) {
  f32x tile[LANES];
  for (int i = 0; i < LANES; i++) tile[i] = keys.template part<CHECKED>(key + i, word);
  transpose(tile);
  const int64_t count = CHECKED ? min(LANES, keys.words - word) : LANES;
  for (int i = 0; i < count; i++) store(to + i * PANEL, tile[i]);
}

// Keys as the right operand of query * key^T: [panel of keys][word of D][PANEL].
template <class Scalar>
void pack_keys(const Rows<Scalar>& keys, float* to) {
  for (int64_t key = 0; key < round_up(keys.rows, PANEL); key += LANES) {
    float* const panel = to + key / PANEL * PANEL * keys.words + key % PANEL;
    for (int64_t word = 0; word < keys.words; word += LANES) {
      if (keys.has(key + LANES - 1, word)) {
        pack_key_tile<false>(keys, key, word, panel + word * PANEL);
      } else {
        pack_key_tile<true>(keys, key, word, panel + word * PANEL);
      }
    }
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

// Rows to be packed next. The products fetch them line by line as they go, so that memory is never idle.
struct Prefetch {
  const char* row;
  int64_t row_bytes, row_lines;
  int64_t lines;  // left, of all rows
  int64_t line = 0;

  void fetch(int count) {
    if (lines <= 0) return;
    lines -= count;
    for (int i = 0; i < count; i++) {
      fetch_far(row + line * LINE, LINE);
      line++;
      row += line == row_lines ? row_bytes : 0;
      line = line == row_lines ? 0 : line;
    }
  }
};

// c = scale * c + a * b, or a * b without scale; a [rows, steps], b [steps, PANEL] in words, c [rows, PANEL].
template <class Scalar>
struct Product {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t steps;
  float* c;
  int64_t c_row;
  const float* scale;
  Prefetch* next;

  // The product is summed apart from c: a long sum in blocks has a much smaller rounding error. steps > 0 keeps the sums
  // in registers.
  template <int rows>
  void run() const {
    constexpr int lines_of_step = max(1, PANEL * PER_WORD<Scalar> * sizeof(Scalar) / LINE);
    const auto [a, a_row, b, steps, c, c_row, scale, next] = *this;  // copies: a store would make it load them again
    Prefetch prefetch = *next;
    f32x sum[rows][VECTORS];
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < VECTORS; v++) sum[r][v] = f32x{};
    }
    int64_t step = 0;
    do {
      prefetch.fetch(lines_of_step);
      f32x part[VECTORS];
      for (int v = 0; v < VECTORS; v++) part[v] = load(b + step * PANEL + v * LANES);
      for (int r = 0; r < rows; r++) {
        const f32x word = broadcast(a[r * a_row + step]);
        for (int v = 0; v < VECTORS; v++) sum[r][v] = multiply_add<Scalar>(word, part[v], sum[r][v]);
      }
    } while (++step < steps);
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < VECTORS; v++) {
        float* const to = c + r * c_row + v * LANES;
        store(to, scale ? fma(load(to), broadcast(scale[r]), sum[r][v]) : sum[r][v]);
      }
    }
    *next = prefetch;
  }
};

// The running softmax of a query row: the largest score so far, and the sum of weights relative to it.
struct Softmax {
  float max, sum;
};

// Scores -> weights 2^((score - max) * scale), and their sum as rounded. Returns the factor that brings earlier results
// to the new maximum. `keys` is a multiple of PANEL. The maximum is subtracted before it is scaled, and so exactly: the
// rounding error of a huge score's product with the scale would be an exponent beyond float32.
template <class Scalar>
float soften(const float* score, int64_t keys, float scale, Softmax& row, float* weight) {
  f32x largest = load(score);
  for (int64_t i = LANES; i < keys; i += LANES) largest = max(largest, load(score + i));
  const float before = row.max;
  const float block_max = max_lane(largest);
  if (!(block_max <= before)) row.max = block_max;
  constexpr int P = PER_WORD<Scalar>;
  f32x sum = {};
  for (int64_t i = 0; i < keys; i += P * LANES) {
    f32x x[P];
    for (int k = 0; k < P; k++) {
      x[k] = exp2_for_words<Scalar>((load(score + i + k * LANES) - row.max) * scale);
    }
    const f32x words = pack_words<Scalar>(x);
    store(weight + i / P, words);
    sum = multiply_add<Scalar>(words, one_words<Scalar>(), sum);
  }
  const float rescale = row.max == before ? 1 : exp2(broadcast((before - row.max) * scale))[0];
  row.sum = row.sum * rescale + sum_lanes(sum);
  return rescale;
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
