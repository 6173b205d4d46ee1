// One write by the CUDA kernel on host threads, for ThreadSanitizer: as many rows as make three blocks a layer.
#include "cuda_on_threads.h"
// after it, for it stands in for CUDA
#include "../csrc/cuda/memory_write.cu"

int main() {
  constexpr int L = 2, M = 1300, W = 70, row_bytes = 32;
  std::vector<int32_t> rank(L * M);
  for (int i = 0; i < L * M; ++i) rank[i] = i * 7 % M;  // 7 has no factor in common with M
  alignas(16) static char pool[L * M * row_bytes], rows[L * W * row_bytes];
  const int64_t state[] = {5, 9};
  memkernel::DrawAndWrite args{};
  args.pools[0] = {pool, rows, row_bytes, M * row_bytes, row_bytes, W * row_bytes, row_bytes};
  args.count = 1, args.rank = rank.data(), args.state = state, args.rank_L = M, args.state_stride = 1;
  args.L = L, args.M = M, args.W = W;
  return memkernel_draw_and_write(&args, nullptr);
}
