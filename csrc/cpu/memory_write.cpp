// New rows into the slots of dropped ones, and the ranks closed: two passes over a layer's M integers, W rows of data.
#include "parallel.h"

namespace memkernel::MEMKERNEL_ISA {

static void write_layer(const MemoryWrite& a, int64_t l) {
  const int64_t first_new = a.M - a.W;
  int32_t* rank = a.rank + l * a.M;
  int32_t* after = a.rank_after + l * a.M;  // by rank; zeros, which no new row has unless all rows are new
  const int32_t* dropped = a.dropped + l * a.W;
  for (int64_t w = 0; w < a.W; ++w) after[dropped[w]] = static_cast<int32_t>(first_new + w) + 1;
  int32_t survivors = 0;
  for (int64_t r = 0; r < a.M; ++r) after[r] = after[r] ? after[r] - 1 : survivors++;
  for (int64_t slot = 0; slot < a.M; ++slot) {
    rank[slot] = after[rank[slot]];
    const int64_t w = rank[slot] - first_new;
    if (w < 0) continue;
    for (int64_t i = 0; i < a.count; ++i) {
      const MemoryWrite::Pool& p = a.pools[i];
      __builtin_memcpy(p.pool + l * p.pool_L + slot * p.pool_M, p.rows + l * p.rows_L + w * p.rows_W, p.row_bytes);
    }
  }
}

void memory_write(const MemoryWrite& a, const Threads& threads) {
  parallel(threads, a.L, [&](int64_t l) { write_layer(a, l); });
}

}  // namespace memkernel::MEMKERNEL_ISA
