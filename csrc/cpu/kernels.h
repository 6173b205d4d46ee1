// The CPU kernels, one table per instruction set. Raw pointers and sizes in, no PyTorch: bindings.cpp checks and unpacks.
//
// Dimension key as in memkernel/reference.py. Strides count elements; dimensions without a stride are contiguous.
#pragma once

#include <cstdint>

namespace memkernel {

enum class DType { float32, bfloat16 };

// Runs task(context, i) for i in [0, tasks), on the threads of the caller's pool; returns when all are done.
using Parallel = void (*)(int64_t tasks, void (*task)(void* context, int64_t i), void* context);

struct Threads {
  int count;          // as torch.get_num_threads()
  Parallel parallel;  // tasks may run in any order and on any of the threads
};

struct RmsNorm {
  DType dtype;
  void* residual;  // [N, E]: += x, and what is normed; null: x is normed
  const void* x;   // [N, E]
  const void* weight;  // [E]
  void* out;           // [N, E], contiguous
  int64_t N, E;
  int64_t residual_N, x_N;
  float eps;
};

struct Swiglu {
  DType dtype;
  const void* gate_up;  // [N, 2 F]
  void* out;            // [N, F], contiguous
  int64_t N, F;
  int64_t gate_up_N;
};

struct RopeWrite {
  DType dtype;
  void *cache_key, *cache_value;  // [B, S, G, D]
  const void* query;              // [B, Tq, H, D]
  const void *key, *value;        // [B, T, G, D]
  const float *cos, *sin;         // [positions, D / 2], contiguous
  const int32_t* start;           // [B]
  void* out;                      // [B, Tq, H, D], contiguous
  int64_t B, T, Tq, H, G, D, offset;
  int64_t cache_key_B, cache_key_S, cache_value_B, cache_value_S;
  int64_t query_B, query_T, key_B, key_T, value_B, value_T;
};

struct RotateMemory {
  DType dtype;
  void* rotated;           // [N, G, D], N = L M
  const void* key;         // [N, G, D]
  const int32_t* rank;     // [N]
  const float *cos, *sin;  // [positions, D / 2], contiguous
  int64_t N, G, D, offset;
  int64_t rotated_N, key_N;
};

struct MemoryAttention {
  DType dtype;
  const void *query;                       // [B, T, H, D]
  const void *memory_key, *memory_value;   // [P, M, G, D]
  const void *key, *value;                 // [B, S, G, D]
  const int32_t* start;                    // [B]
  void* out;                               // [B, T, H, D], contiguous
  int64_t B, T, H, D, P, M, G, S;
  int64_t query_B, query_T;
  int64_t memory_key_P, memory_key_M, memory_value_P, memory_value_M;
  int64_t key_B, key_S, value_B, value_S;
};

struct DrawRanks {
  int64_t seed, step;
  int32_t* out;  // [L, count]
  int64_t L, rows, count;
  bool shared;
};

struct MemoryWrite {
  struct Pool {  // bytes: the element's type does not matter
    char* pool;        // [L, M, row_bytes]
    const char* rows;  // [L, W, row_bytes]
    int64_t row_bytes, pool_L, pool_M, rows_L, rows_W;
  };
  const Pool* pools;
  int64_t count;
  int32_t* rank;           // [L, M]
  const int32_t* dropped;  // [L, W]
  int64_t L, M, W;
};

struct Linear {
  DType dtype;
  const void* x;       // [N, in]
  const void* weight;  // [out, in]
  void* y;             // [N, out], contiguous
  int64_t N, in, out;  // in > 0
  int64_t x_N, weight_out;
};

struct Kernels {
  const char* isa;
  void (*rms_norm)(const RmsNorm&, const Threads&);
  void (*swiglu)(const Swiglu&, const Threads&);
  void (*rope_write)(const RopeWrite&, const Threads&);
  void (*rotate_memory)(const RotateMemory&, const Threads&);
  void (*memory_attention)(const MemoryAttention&, const Threads&);
  void (*draw_ranks)(const DrawRanks&, const Threads&);
  void (*memory_write)(const MemoryWrite&, const Threads&);
  void (*linear)(const Linear&, const Threads&);
  int64_t (*linear_rows)(DType, int64_t in);  // of many, up to which it beats PyTorch (bench_small_ops.py)
};

// isa.cpp: the tables that this processor can run, slowest first, and the one in use, at first the last.
int kernel_tables(const Kernels* const** tables);
const Kernels& kernels();
bool use_kernels(const char* isa);  // false if there is no such table
bool has_matrix_tiles();            // of bf16 (AMX), which PyTorch uses

}  // namespace memkernel
