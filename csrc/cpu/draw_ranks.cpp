// The Feistel permutation of the reference, word for word: unsigned 32-bit arithmetic wraps where that masks.
#include "parallel.h"

namespace memkernel::MEMKERNEL_ISA {

static constexpr int FEISTEL_ROUNDS = 12;

static uint32_t mix(uint32_t x) {
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

  uint32_t operator()(uint32_t x) const {
    uint32_t high = x >> low_bits, low = x & ((1u << low_bits) - 1);
    int high_size = high_bits, low_size = low_bits;
    for (const uint32_t round_key : round_keys) {
      const uint32_t mixed = (high ^ mix(low ^ round_key)) & ((1u << high_size) - 1);
      high = low, low = mixed;
      const int size = high_size;
      high_size = low_size, low_size = size;
    }
    return high << low_size | low;
  }
};

void draw_ranks(const DrawRanks& a, const Threads& threads) {
  parallel(threads, a.L, [&](int64_t l) {
    const Permutation permute(a.seed, a.step, a.shared ? 0 : l, a.rows);
    for (int64_t w = 0; w < a.count; ++w) {
      uint32_t rank = permute(static_cast<uint32_t>(w));
      while (rank >= a.rows) rank = permute(rank);
      a.out[l * a.count + w] = static_cast<int32_t>(rank);
    }
  });
}

}  // namespace memkernel::MEMKERNEL_ISA
