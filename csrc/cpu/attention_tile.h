// Attention by products of packed operands: the softmax, and what is fetched meanwhile.
#pragma once

#include "fetch.h"
#include "product.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

constexpr float NEVER = -3.40282347e38f;  // a maximum below any score, but finite: NEVER - NEVER is 0

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
#endif

// Rows to be packed next. The products fetch them line by line as they go, so that memory is never idle.
struct Prefetch {
  const char* row;
  int64_t row_bytes, row_lines;
  int64_t lines;  // left, of all rows
  int lines_of_step;
  int64_t line = 0;

  void operator()(int64_t) {
    if (lines <= 0) return;
    lines -= lines_of_step;
    for (int i = 0; i < lines_of_step; i++) {
      fetch_far(row + line * LINE, LINE);
      line++;
      row += line == row_lines ? row_bytes : 0;
      line = line == row_lines ? 0 : line;
    }
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
  if (!(block_max <= before)) row.max = block_max;  // a branch, no selection: the processor guesses it and goes on
  const float now = row.max;
  constexpr int P = PER_WORD<Scalar>;
  f32x sum = {};
  for (int64_t i = 0; i < keys; i += P * LANES) {
    f32x x[P];
    for (int k = 0; k < P; k++) {
      x[k] = exp2_for_words<Scalar>((load(score + i + k * LANES) - now) * scale);
    }
    const f32x words = pack_words<Scalar>(x);
    store(weight + i / P, words);
    sum = multiply_add<Scalar>(words, one_words<Scalar>(), sum);
  }
  const float rescale = now == before ? 1 : exp2(broadcast((before - now) * scale))[0];
  row.sum = row.sum * rescale + sum_lanes(sum);
  return rescale;
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
