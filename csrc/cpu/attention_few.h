// Attention of a few query rows to keys and values as they lie in memory: packing pays only where more rows share it.
#pragma once

#include "attention_tile.h"
#include "fetch.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

// A register holds QUAD words of each of QUADS query rows, or their scores with QUAD keys, or the words of as many
// weights: [row][QUAD]. More rows take as many more registers, which lie side by side.
constexpr int QUAD = 4;
constexpr int QUADS = LANES / QUAD;

constexpr int FEW_ROWS = LANES == 16 ? 12 : ROWS;  // of more, packing pays, or sums would leave the registers

// What the products fetch meanwhile: as many bytes of each as they read.
struct Ahead {
  const char* far;  // in the order of memory
  int64_t near;     // bytes from what is read to what is read next, in the same order
};

// QUAD words, for each of the rows of a register.
template <class Scalar>
MEMKERNEL_INLINE f32x load_quads(const Scalar* from) {
  if constexpr (PER_WORD<Scalar> == 1) return load_four(from);
  return load_four(reinterpret_cast<const float*>(from));
}

// The quads of LANES words, `stride` numbers apart.
MEMKERNEL_INLINE void store_quads(float* to, int64_t stride, f32x words) {
  float number[LANES];
  store(number, words);
  for (int64_t i = 0; i < QUADS; i++) __builtin_memcpy(to + i * stride, number + i * QUAD, QUAD * sizeof(float));
}

// Within each quad: the sums of places 0 and 2 and of 1 and 3 of a, then of b.
template <int... I>
MEMKERNEL_INLINE f32x add_pairs(f32x a, f32x b, std::integer_sequence<int, I...>) {
  return shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES)...>(a, b) +
         shuffle<((I & ~3) + (I & 1) + (I & 2) / 2 * LANES + 2)...>(a, b);
}

// Within each quad: the sums of places 0 and 1 and of 2 and 3 of a, then of b.
template <int... I>
MEMKERNEL_INLINE f32x add_neighbours(f32x a, f32x b, std::integer_sequence<int, I...>) {
  return shuffle<((I & ~3) + (I & 1) * 2 + (I & 2) / 2 * LANES)...>(a, b) +
         shuffle<((I & ~3) + (I & 1) * 2 + (I & 2) / 2 * LANES + 1)...>(a, b);
}

// The sum of the quads, in all of them.
template <int S, int... I>
MEMKERNEL_INLINE f32x add_quads(f32x x, std::integer_sequence<int, I...> lanes) {
  if constexpr (S < LANES) return add_quads<2 * S>(x + shuffle<(I ^ S)...>(x, x), lanes);
  return x;
}

// Each quad's largest, in all of its places.
template <int... I>
MEMKERNEL_INLINE f32x max_of_quads(f32x x, std::integer_sequence<int, I...>) {
  x = max(x, shuffle<(I ^ 2)...>(x, x));
  return max(x, shuffle<(I ^ 1)...>(x, x));
}

// The weights of QUAD keys, for bf16 words those of two times QUAD keys, as words.
template <class Scalar>
MEMKERNEL_INLINE f32x pack_quads(const f32x (&weights)[PER_WORD<Scalar>]) {
  const f32x words = pack_words<Scalar>(weights);
#if defined(__AVX512BF16__)
  if constexpr (PER_WORD<Scalar> == 2) {
    return shuffle<0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15>(words, words);
  }
#endif
  return words;
}

// score = query * key^T; the keys are a tile, or the last ones.
template <class Scalar>
struct FewScores {
  const float* query;  // [word / QUAD][V][LANES]; of one row only: [word]
  Rows<Scalar> keys;
  float* score;  // [key / QUAD][V][LANES]
  Ahead ahead;

  // Of one row for N = 0, whose sums' parts fill a register, or of the rows of V = N registers.
  template <int N>
  void run() const {
    constexpr int V = N ? N : 1;
    constexpr int STEP = N ? QUAD : LANES;                 // words
    constexpr int KEYS = V > LANES / 8 ? QUAD : 2 * QUAD;  // at a time: the more, the less do products wait
    const auto [query, keys, score, ahead] = *this;        // copies: a store would make it load them again
    for (int64_t i = 0; i < keys.rows; i += KEYS) {
      const Scalar* key[KEYS];
      for (int k = 0; k < KEYS; k++) key[k] = keys.from + min(i + k, keys.rows - 1) * keys.row;
      f32x sum[KEYS][V] = {};
      for (int64_t word = 0; word < keys.words; word += STEP) {
        fetch_far(ahead.far + (i * keys.words + KEYS * word) * WORD_BYTES<Scalar>, KEYS * STEP * WORD_BYTES<Scalar>);
        if (word * WORD_BYTES<Scalar> % LINE == 0) {
          for (int k = 0; k < KEYS; k++) {
            fetch_near(reinterpret_cast<const char*>(key[k] + word * PER_WORD<Scalar>) + ahead.near, LINE);
          }
        }
        const float* const rows = query + word / STEP * V * LANES;
#pragma GCC unroll 8  // or the sums are kept in memory
        for (int k = 0; k < KEYS; k++) {
          const Scalar* const from = key[k] + word * PER_WORD<Scalar>;
          const f32x words = N ? load_quads(from) : load_words(from);
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) sum[k][v] = multiply_add<Scalar>(load(rows + v * LANES), words, sum[k][v]);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < KEYS; k += QUAD) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          const f32x a = add_pairs(sum[k][v], sum[k + 1][v], Lanes());
          const f32x b = add_pairs(sum[k + 2][v], sum[k + 3][v], Lanes());
          const f32x scores = add_neighbours(a, b, Lanes());
          store(score + ((i + k) / QUAD * V + v) * LANES, N ? scores : add_quads<QUAD>(scores, Lanes()));
        }
      }
    }
  }
};

// The running softmax of a few rows, a quad each in V registers.
template <class Scalar>
struct FewSoftmax {
  static constexpr int64_t PARTS = 4;  // of V * LANES numbers

  int64_t V;
  float scale;     // of scores, to exponents in base 2
  float* max;      // [V][LANES], the largest score so far, in all of a quad
  float* total;    // [V][LANES], of the weights of earlier blocks relative to it, in parts
  float* added;    // [V][LANES], of the weights of this block, apart: a long sum has a larger error
  float* rescale;  // [V][LANES], the factor that brings earlier sums to the last maximum

  FewSoftmax(int64_t V, float scale, float* parts)
      : V(V),
        scale(scale),
        max(parts),
        total(parts + V * LANES),
        added(parts + 2 * V * LANES),
        rescale(parts + 3 * V * LANES) {}

  void start() const {
    for (int64_t v = 0; v < V; v++) {
      store(max + v * LANES, broadcast(NEVER));
      store(total + v * LANES, f32x{});
      store(added + v * LANES, f32x{});
    }
  }

  // Before a block's weights are made. score [key / QUAD][V][LANES].
  void raise_max(const float* score, int64_t keys) const {
    for (int64_t v = 0; v < V; v++) {
      const f32x before = load(max + v * LANES);
      f32x largest = before;
      for (int64_t k = 0; k < keys / QUAD; k++) {  // NaN, if it comes first, is not the larger
        largest = MEMKERNEL_ISA::max(load(score + (k * V + v) * LANES), largest);
      }
      largest = max_of_quads(largest, Lanes());
      const f32x factor = exp2((before - largest) * scale);
      store(max + v * LANES, largest);
      store(rescale + v * LANES, factor);
      store(total + v * LANES, (load(total + v * LANES) + load(added + v * LANES)) * factor);
      store(added + v * LANES, f32x{});
    }
  }

  // Scores -> weights [word / QUAD][V][LANES], and their total as rounded; see soften() of attention_tile.h.
  void soften(const float* score, int64_t keys, float* weight) const {
    constexpr int P = PER_WORD<Scalar>;
    for (int64_t v = 0; v < V; v++) {
      const f32x largest = load(max + v * LANES);
      f32x sum = load(added + v * LANES);
      for (int64_t k = 0; k < keys / QUAD; k += P) {
        f32x x[P];
        for (int p = 0; p < P; p++) {
          x[p] = exp2_for_words<Scalar>((load(score + ((k + p) * V + v) * LANES) - largest) * scale);
        }
        const f32x words = pack_quads<Scalar>(x);
        store(weight + (k / P * V + v) * LANES, words);
        sum = multiply_add<Scalar>(words, one_words<Scalar>(), sum);
      }
      store(added + v * LANES, sum);
    }
  }

  Softmax of_row(int64_t x) const {
    float sum = 0;
    for (int64_t i = x * QUAD; i < (x + 1) * QUAD; i++) sum += total[i] + added[i];
    return {max[x * QUAD], sum};
  }
};

// sum += weight * value, for some of the rows. The numbers of a value are a multiple of PANEL.
template <class Scalar>
struct FewSums {
  const float* weight;  // [word / QUAD][V][LANES]
  int64_t V, first;     // the first row
  Rows<Scalar> values;
  float* sum;  // of the first row
  int64_t sum_row;
  Ahead ahead;

  // A word of weights and a panel of the values that belong to it: of `count` <= P keys.
  template <int R>
  static MEMKERNEL_INLINE void multiply(const float* weight, const Scalar* from, int64_t row, int64_t count,
                                        f32x (&added)[R][VECTORS]) {
    constexpr int P = PER_WORD<Scalar>;
    f32x part[VECTORS];
    for (int v = 0; v < VECTORS; v += P) {
      f32x rows[P];
      for (int i = 0; i < P; i++) rows[i] = i < count ? load_words(from + i * row + v * LANES) : f32x{};
      interleave<Scalar>(rows, part + v);
    }
    for (int r = 0; r < R; r++) {
      const f32x word = broadcast(weight[r * QUAD]);
      for (int v = 0; v < VECTORS; v++) added[r][v] = multiply_add<Scalar>(word, part[v], added[r][v]);
    }
  }

  template <int R>
  void run() const {
    constexpr int P = PER_WORD<Scalar>;
    const auto [weight, V, first, values, sum, sum_row, ahead] = *this;  // as in FewScores
    int64_t fetched = 0;
    for (int64_t column = 0; column < values.words * P; column += PANEL) {
      const float* word = weight + first * QUAD;
      const Scalar* from = values.from + column;
      f32x added[R][VECTORS] = {};
      for (int64_t i = 0; i < values.rows; i += P) {
        fetch_far(ahead.far + fetched, PANEL * WORD_BYTES<Scalar>);
        for (int k = 0; k < P; k++) {
          fetch_near(reinterpret_cast<const char*>(from + k * values.row) + ahead.near, PANEL * sizeof(Scalar));
        }
        if (i + P <= values.rows) {
          multiply(word, from, values.row, P, added);
        } else {
          multiply(word, from, values.row, values.rows - i, added);
        }
        fetched += PANEL * WORD_BYTES<Scalar>;
        from += P * values.row;
        word += (i / P + 1) % QUAD ? 1 : V * LANES - (QUAD - 1);
      }
      for (int r = 0; r < R; r++) {
        for (int v = 0; v < VECTORS; v++) {
          float* const to = sum + r * sum_row + column + v * LANES;
          store(to, load(to) + added[r][v]);
        }
      }
    }
  }
};

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
