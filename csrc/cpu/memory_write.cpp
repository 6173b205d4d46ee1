// New rows into the slots of dropped ones, and the ranks closed: two passes over a layer's M integers, W rows of data.
#include "buffer.h"
#include "parallel.h"

namespace memkernel::MEMKERNEL_ISA {

static thread_local Buffer scratch;

// Closes the ranks [M]; slot [W] gets where the dropped rows lie. after [M] is scratch. Where ranks are not distinct some
// slots are not found: those stay 0, a row that exists.
static void close_ranks(const MemoryWrite& a, const int32_t* dropped, int32_t* __restrict rank,
                        int32_t* __restrict after, int32_t* __restrict slot) {
  const int32_t first_new = static_cast<int32_t>(a.M - a.W);
  __builtin_memset(after, 0, a.M * sizeof *after);
  for (int64_t w = 0; w < a.W; ++w) after[dropped[w]] = static_cast<int32_t>(first_new + w) + 1;
  int32_t survivors = 0;
  for (int64_t r = 0; r < a.M; ++r) {  // branches would be mispredicted at each dropped rank
    const int32_t is_new = -(after[r] != 0);
    after[r] = ((after[r] - 1) & is_new) | (survivors & ~is_new);
    survivors += 1 + is_new;
  }
  __builtin_memset(slot, 0, a.W * sizeof *slot);
  for (int64_t s = 0; s < a.M; ++s) rank[s] = after[rank[s]];
  for (int64_t s = 0; s < a.M; ++s)
    if (rank[s] >= first_new) slot[rank[s] - first_new] = static_cast<int32_t>(s);
}

// Rows lie anywhere in a pool: the next one is fetched while this one is written.
static void write_rows(const MemoryWrite::Pool& p, int64_t l, int64_t W, const int32_t* slot) {
  constexpr int64_t line = 64, fetched = 16;
  for (int64_t w = 0; w < W; ++w) {
    if (w + 1 < W)
      for (int64_t i = 0; i < fetched && i * line < p.row_bytes; ++i)
        __builtin_prefetch(p.pool + l * p.pool_L + slot[w + 1] * p.pool_M + i * line, 1);
    __builtin_memcpy(p.pool + l * p.pool_L + slot[w] * p.pool_M, p.rows + l * p.rows_L + w * p.rows_W, p.row_bytes);
  }
}

void memory_write(const MemoryWrite& a, const Threads& threads) {
  parallel(threads, a.L, [&](int64_t l) {
    int32_t* const after = scratch.reserve<int32_t>(a.M + a.W);
    int32_t* const slot = after + a.M;
    close_ranks(a, a.dropped + l * a.W, a.rank + l * a.M, after, slot);
    for (int64_t i = 0; i < a.count; ++i) write_rows(a.pools[i], l, a.W, slot);
  });
}

}  // namespace memkernel::MEMKERNEL_ISA
