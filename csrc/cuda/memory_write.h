// The random-drop write for CUDA. Raw pointers and a stream in, no PyTorch: bindings.cpp unpacks.
//
// Dimension key as in memkernel/reference.py.
#pragma once

#include <cstdint>

namespace memkernel {

struct DrawAndWrite {
  static constexpr int max_pools = 3;  // keys, values, hidden states

  struct Pool {  // strides in bytes: the element's type does not matter
    char* pool;        // [L, M, row_bytes], written
    const char* rows;  // [L, W, row_bytes]
    int64_t row_bytes, pool_L, pool_M, rows_L, rows_W;
  };

  Pool pools[max_pools];
  int count;
  int32_t* rank;         // [L, M], read and written; M contiguous
  const int64_t* state;  // [2]: seed, step
  int64_t rank_L, state_stride;
  int L, M, W;
  bool shared;  // one draw for all layers
};

}  // namespace memkernel

// Queues the write on a cudaStream_t of the current device. Returns a cudaError_t, or -1, nothing done, where the pool
// or the draw is too large for a block's shared memory (M 131,072 with 2% of it drawn is not).
extern "C" int memkernel_draw_and_write(const memkernel::DrawAndWrite* args, void* stream);
