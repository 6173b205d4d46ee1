// The random-drop write of all layers in one launch: draw, rank closing and scatter, without a block waiting for another.
//
// A block owns SLOTS slots of one layer and draws the layer's ranks for itself, which is cheaper than a second launch. It
// marks them in a bit mask in shared memory and counts the marks before each word; a slot's new rank is its old one less
// the marks below it, and the few slots whose rank is marked take new rows, a warp a row. A rank is read and written by the
// block that owns its slot alone.
//
// Bytes at the 8B shape: 33.6 MB of rows read and as many written, about 16 us at 4.3 TB/s; ranks 3.3 MB. That
// shape makes 640 blocks, which run at once: 4.8 for each of 132 processors.
#include "memory_write.h"

namespace memkernel {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, SLOTS = 640, FEISTEL_ROUNDS = 12;
constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

__device__ uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// The reference's Feistel permutation. Two rounds a step: after both, each half is back in its place.
struct Permutation {
  uint32_t key;
  int high_bits, low_bits;

  __device__ Permutation(int64_t seed, int64_t step, int layer, int rows) : key(mix(layer + 0x9E3779B9u)) {
    key = mix(key ^ static_cast<uint32_t>(seed));
    key = mix(key ^ static_cast<uint32_t>(seed >> 32));
    key = mix(key ^ static_cast<uint32_t>(step));
    key = mix(key ^ static_cast<uint32_t>(step >> 32));
    const int bits = max(2, 32 - __clz(rows - 1));
    high_bits = bits / 2, low_bits = bits - high_bits;
  }

  __device__ uint32_t operator()(uint32_t x) const {
    const uint32_t high_mask = (1u << high_bits) - 1, low_mask = (1u << low_bits) - 1;
    uint32_t high = x >> low_bits, low = x & low_mask;
#pragma unroll
    for (int i = 1; i <= FEISTEL_ROUNDS; i += 2) {
      high = (high ^ mix(low ^ mix(key + 0x9E3779B9u * i))) & high_mask;
      low = (low ^ mix(high ^ mix(key + 0x9E3779B9u * (i + 1)))) & low_mask;
    }
    return high << low_bits | low;
  }
};

// below[i] = bits set in marks[0..i-1]. `sums` holds a number for each warp.
__device__ void count_below(const uint32_t* marks, uint32_t* below, int words, uint32_t* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = (words + THREADS - 1) / THREADS, begin = threadIdx.x * each, end = min(begin + each, words);
  uint32_t own = 0;
  for (int i = begin; i < end; ++i) own += __popc(marks[i]);
  uint32_t through = own;  // of this thread and those before it in the warp
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(ALL_LANES, through, distance);
    if (lane >= distance) through += before;
  }
  if (lane == 31) sums[warp] = through;
  __syncthreads();
  uint32_t count = through - own;
  for (int i = 0; i < warp; ++i) count += sums[i];
  for (int i = begin; i < end; ++i) {
    below[i] = count;
    count += __popc(marks[i]);
  }
}

// The place of `rank` among dropped[0..W-1], where it is; for a whole warp.
__device__ int find(const uint32_t* dropped, int W, uint32_t rank) {
  for (int first = 0;; first += 32) {
    const int w = first + static_cast<int>(threadIdx.x % 32);
    const uint32_t found = __ballot_sync(ALL_LANES, w < W && dropped[w] == rank);
    if (found) return first + __ffs(found) - 1;
  }
}

template <class Word>
__device__ void copy_row(char* __restrict__ to, const char* __restrict__ from, int64_t bytes) {
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < bytes / static_cast<int64_t>(sizeof(Word)); i += 32)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

int64_t shared_bytes(const DrawAndWrite& a) {
  return sizeof(uint32_t) * (2 * ((int64_t{a.M} + 31) / 32) + a.W + SLOTS + WARPS + 1);
}

template <class Word>
__global__ void __launch_bounds__(THREADS) draw_and_write_kernel(const DrawAndWrite a) {
  extern __shared__ uint32_t block_memory[];
  const int words = (a.M + 31) / 32, tid = threadIdx.x;
  uint32_t* const marks = block_memory;     // [words]: bit r % 32 of word r / 32 tells that rank r is dropped
  uint32_t* const below = marks + words;    // [words]: dropped ranks before the word's first
  uint32_t* const dropped = below + words;  // [W]
  uint32_t* const hits = dropped + a.W;     // [SLOTS]: slots of this block whose ranks are dropped, in any order
  uint32_t* const sums = hits + SLOTS;      // [WARPS]
  uint32_t* const hit_count = sums + WARPS;

  for (int i = tid; i < words; i += THREADS) marks[i] = 0;
  if (tid == 0) *hit_count = 0;
  __syncthreads();

  const int layer = blockIdx.y;
  const Permutation permute(a.state[0], a.state[a.state_stride], a.shared ? 0 : layer, a.M);
  for (int w = tid; w < a.W; w += THREADS) {
    uint32_t r = permute(w);
    while (r >= static_cast<uint32_t>(a.M)) r = permute(r);
    dropped[w] = r;
    atomicOr(&marks[r / 32], 1u << r % 32);
  }
  __syncthreads();
  count_below(marks, below, words, sums);
  __syncthreads();

  int32_t* const rank = a.rank + layer * a.rank_L;
  const int first = blockIdx.x * SLOTS, last = min(first + SLOTS, a.M);
  for (int slot = first + tid; slot < last; slot += THREADS) {
    const uint32_t r = rank[slot], word = marks[r / 32], bit = 1u << r % 32;
    if (word & bit)
      hits[atomicAdd(hit_count, 1u)] = slot;
    else
      rank[slot] = r - below[r / 32] - __popc(word & (bit - 1));
  }
  __syncthreads();

  for (uint32_t i = tid / 32; i < *hit_count; i += WARPS) {
    const int64_t slot = hits[i];
    const int w = find(dropped, a.W, rank[slot]);
    __syncwarp();  // all lanes have read the rank
    if (tid % 32 == 0) rank[slot] = a.M - a.W + w;
    for (int p = 0; p < a.count; ++p) {
      const DrawAndWrite::Pool& pool = a.pools[p];
      copy_row<Word>(pool.pool + layer * pool.pool_L + slot * pool.pool_M,
                     pool.rows + layer * pool.rows_L + w * pool.rows_W, pool.row_bytes);
    }
  }
}

bool has_16_byte_rows(const DrawAndWrite& a) {
  uint64_t addresses = 0;
  for (int i = 0; i < a.count; ++i) {
    const DrawAndWrite::Pool& p = a.pools[i];
    addresses |= reinterpret_cast<uintptr_t>(p.pool) | reinterpret_cast<uintptr_t>(p.rows);
    addresses |= p.row_bytes | p.pool_L | p.pool_M | p.rows_L | p.rows_W;
  }
  return addresses % 16 == 0;
}

}  // namespace
}  // namespace memkernel

extern "C" int memkernel_draw_and_write(const memkernel::DrawAndWrite* args, void* stream) {
  using namespace memkernel;
  constexpr int64_t limit = 48 << 10;  // what a block may have without asking
  if (shared_bytes(*args) > limit) return -1;
  if (args->L == 0 || args->W == 0) return cudaSuccess;
  const auto kernel = has_16_byte_rows(*args) ? draw_and_write_kernel<uint4> : draw_and_write_kernel<uint8_t>;
  const dim3 grid((args->M + SLOTS - 1) / SLOTS, args->L);
  void* parameters[] = {const_cast<DrawAndWrite*>(args)};
  return cudaLaunchKernel(kernel, grid, dim3(THREADS), parameters, shared_bytes(*args),
                          static_cast<cudaStream_t>(stream));
}
