// What a task of attention reads, and where it keeps what it has computed.
#pragma once

#include "attention_tile.h"

namespace memkernel {
namespace MEMKERNEL_ISA {

// Keys and values that query rows [first, last) of a pool see, no others: row x those before seen(x).
template <class Scalar>
struct Segment {
  const Scalar *key, *value;
  int64_t key_row, value_row;
  int64_t first, last;
  int64_t keys;
  int64_t seen_by_0, rows_of_token;

  int64_t seen(int64_t x) const {
    return min(keys, seen_by_0 + x / rows_of_token);
  }

  // As many of the `count` keys from `key` on.
  int64_t seen(int64_t x, int64_t key, int64_t count) const {
    return first <= x && x < last ? max(0, min(count, seen(x) - key)) : 0;
  }
};

struct Task {
  int64_t pool;
  int64_t head, heads;  // first key/value head and their number
  int64_t first, rows;  // query rows of each head
};

struct Scratch {
  float *query, *key, *value;  // packed
  float* score;                // of ROWS query rows of a head to a block of keys; of a few: of the rows of all heads
  float* weight;               // likewise; of a few: of the rows of one head to a tile
  float* rescale;              // of earlier sums: a factor for each of ROWS query rows
  float* few_softmax;          // of a few rows: FewSoftmax's numbers, of each head
  float* added;                // of a few rows: a block's share of their sums
  float* result;               // of all heads and rows so far: softmax, then sum
  Softmax* softmax;
  float* sum;  // of weight * value
};

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
