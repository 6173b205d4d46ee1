// Products of a few query rows with keys and values as they lie in memory: packing pays only where more rows share it.
#pragma once

#include "attention_tile.h"

#define MEMKERNEL_INLINE inline __attribute__((always_inline))

namespace memkernel {
namespace MEMKERNEL_ISA {

template <class Scalar>
constexpr int64_t WORD_BYTES = PER_WORD<Scalar> * sizeof(Scalar);  // as it lies in memory

// Fetches lines of what is read next, in their order, as many as are read meanwhile: memory is asked at an even rate.
template <int64_t BYTES>
MEMKERNEL_INLINE void fetch(const char* next) {
  for (int64_t i = 0; i < BYTES; i += LINE) __builtin_prefetch(next + i, 0, 3);
}

// A step of a transposing sum: of lanes S apart, those without bit S get the sum of a's, those with it of b's.
template <int S, int... I>
MEMKERNEL_INLINE f32x add_halves(f32x a, f32x b, std::integer_sequence<int, I...>) {
  return shuffle<(I & S ? LANES + I : I)...>(a, b) + shuffle<(I & S ? LANES + (I ^ S) : I ^ S)...>(a, b);
}

// score = query * key^T. The words of a row are a multiple of LANES.
template <class Scalar>
struct FewScores {
  const float* query;  // packed rows
  int64_t query_row;
  Rows<Scalar> keys;
  float* score;
  int64_t score_row;
  const char* next;

  // LANES partial sums of each of R scores of keys i and i + 1; missing keys are the last one.
  template <int R>
  MEMKERNEL_INLINE void multiply(int64_t i, f32x (&a)[R], f32x (&b)[R]) const {
    const Scalar* const key_a = keys.from + min(i, keys.rows - 1) * keys.row;
    const Scalar* const key_b = keys.from + min(i + 1, keys.rows - 1) * keys.row;
    for (int r = 0; r < R; r++) a[r] = b[r] = f32x{};
    for (int64_t word = 0; word < keys.words; word += LANES) {
      fetch<2 * LANES * WORD_BYTES<Scalar>>(next + (i * keys.words + 2 * word) * WORD_BYTES<Scalar>);
      const f32x words_a = load_words(key_a + word * PER_WORD<Scalar>);
      const f32x words_b = load_words(key_b + word * PER_WORD<Scalar>);
      for (int r = 0; r < R; r++) {
        const f32x words = load(query + r * query_row + word);
        a[r] = multiply_add<Scalar>(words, words_a, a[r]);
        b[r] = multiply_add<Scalar>(words, words_b, b[r]);
      }
    }
  }

  // Of keys i to i + 2 S - 1: lane l has a part of the score of key i + l % (2 S), all of it if 2 S = LANES.
  template <int S, int R>
  MEMKERNEL_INLINE void add(int64_t i, f32x (&sum)[R]) const {
    f32x a[R], b[R];
    if constexpr (S == 1) {
      multiply(i, a, b);
    } else {
      add<S / 2>(i, a);
      add<S / 2>(i + S, b);
    }
    for (int r = 0; r < R; r++) sum[r] = add_halves<S>(a[r], b[r], Lanes());
  }

  template <int R>
  void run() const {
    for (int64_t i = 0; i < keys.rows; i += LANES) {
      f32x sum[R];
      add<LANES / 2>(i, sum);
      for (int r = 0; r < R; r++) store(score + r * score_row + i, sum[r]);
    }
  }
};

// sum += weight * value, or = if that is all so far. The numbers of a row are a multiple of PANEL.
template <class Scalar>
struct FewSums {
  const float* weight;  // packed rows
  int64_t weight_row;
  Rows<Scalar> values;
  float* sum;
  int64_t sum_row;
  bool all;
  const char* next;

  // A panel of the values of one word of keys; if CHECKED, with zeros for a missing one.
  template <bool CHECKED>
  MEMKERNEL_INLINE void load_step(int64_t step, int64_t column, f32x (&part)[VECTORS]) const {
    constexpr int P = PER_WORD<Scalar>;
    for (int v = 0; v < VECTORS; v += P) {
      f32x row[P];
      for (int i = 0; i < P; i++) {
        const Scalar* const from = values.from + (step * P + i) * values.row + column + v * LANES;
        row[i] = CHECKED && step * P + i >= values.rows ? f32x{} : load_words(from);
      }
      interleave<Scalar>(row, part + v);
    }
  }

  template <bool CHECKED, int R>
  MEMKERNEL_INLINE void multiply(int64_t step, int64_t column, const char* ahead, f32x (&added)[R][VECTORS]) const {
    fetch<PANEL * WORD_BYTES<Scalar>>(ahead + step * PANEL * WORD_BYTES<Scalar>);
    f32x part[VECTORS];
    load_step<CHECKED>(step, column, part);
    for (int r = 0; r < R; r++) {
      const f32x word = broadcast(weight[r * weight_row + step]);
      for (int v = 0; v < VECTORS; v++) added[r][v] = multiply_add<Scalar>(word, part[v], added[r][v]);
    }
  }

  template <int R>
  void run() const {
    const int64_t whole = values.rows / PER_WORD<Scalar>;
    for (int64_t column = 0; column < values.words * PER_WORD<Scalar>; column += PANEL) {
      const char* const ahead = next + column * whole * WORD_BYTES<Scalar>;
      f32x added[R][VECTORS] = {};
      for (int64_t step = 0; step < whole; step++) multiply<false>(step, column, ahead, added);
      if (whole * PER_WORD<Scalar> < values.rows) multiply<true>(whole, column, ahead, added);
      for (int r = 0; r < R; r++) {
        for (int v = 0; v < VECTORS; v++) {
          float* const to = sum + r * sum_row + column + v * LANES;
          store(to, all ? added[r][v] : load(to) + added[r][v]);
        }
      }
    }
  }
};

template <class Products>
void run_rows(int64_t rows, const Products& products) {
  static_assert(ROWS == 6);
  switch (rows) {
    case 1: return products.template run<1>();
    case 2: return products.template run<2>();
    case 3: return products.template run<3>();
    case 4: return products.template run<4>();
    case 5: return products.template run<5>();
    default: return products.template run<ROWS>();
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
