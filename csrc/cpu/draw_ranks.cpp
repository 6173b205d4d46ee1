// The Feistel permutation of the reference, word for word: unsigned 32-bit arithmetic wraps where that masks.
#include "parallel.h"
#include "simd.h"

namespace memkernel::MEMKERNEL_ISA {

static constexpr int FEISTEL_ROUNDS = 12;

template <class Words>
static Words mix(Words x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

struct Permutation {
  uint32_t round_keys[FEISTEL_ROUNDS];
  int high_bits, low_bits;

  Permutation(int64_t seed, int64_t step, int64_t layer, int64_t rows) {
    uint32_t key = mix(static_cast<uint32_t>(layer) + 0x9E3779B9u);
    const int64_t words[] = {seed, seed >> 32, step, step >> 32};
    for (const int64_t word : words) key = mix(key ^ static_cast<uint32_t>(word));
    for (int i = 0; i < FEISTEL_ROUNDS; ++i) round_keys[i] = mix(key + 0x9E3779B9u * (i + 1));
    int bits = 2;
    while (int64_t{1} << bits < rows) ++bits;
    high_bits = bits / 2, low_bits = bits - high_bits;
  }

  u32x operator()(u32x x) const {
    u32x high = x >> low_bits, low = x & ((1u << low_bits) - 1);
    int high_size = high_bits, low_size = low_bits;
    for (const uint32_t round_key : round_keys) {
      const u32x mixed = (high ^ mix(low ^ round_key)) & ((1u << high_size) - 1);
      high = low, low = mixed;
      const int size = high_size;
      high_size = low_size, low_size = size;
    }
    return high << low_size | low;
  }
};

void draw_ranks(const DrawRanks& a, const Threads& threads) {
  if (a.count == 0) return;
  parallel(threads, a.L, [&](int64_t l) {
    const Permutation permute(a.seed, a.step, a.shared ? 0 : l, a.rows);
    int32_t* const out = a.out + l * a.count;
    for (int64_t w = 0; w < a.count; w += LANES) {
      u32x rank;
      for (int i = 0; i < LANES; ++i) rank[i] = static_cast<uint32_t>(w + i);
      rank = permute(rank);
      const int64_t count = min(LANES, a.count - w);
      for (bool outside = true; outside;) {  // lanes beyond the last draw are permuted along, and not looked at
        outside = false;
        for (int i = 0; i < count; ++i) outside |= rank[i] >= a.rows;
        if (outside) rank = rank >= static_cast<uint32_t>(a.rows) ? permute(rank) : rank;
      }
      for (int i = 0; i < count; ++i) out[w + i] = static_cast<int32_t>(rank[i]);
    }
  });
}

}  // namespace memkernel::MEMKERNEL_ISA
