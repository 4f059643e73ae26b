// Philox4x32-10 (Salmon et al., SC 2011) as peftfast/reference/philox.py defines its use: key = the 64-bit seed,
// counter = (q low, q high, tensor id, stream).
#pragma once

#include "host_device.h"

namespace peftfast::philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr uint32_t kStreamDropout = 1;
constexpr int64_t kDrawsPerCounter = 8;  // 16-bit draws in the four words of one counter

struct Words {
    uint32_t word[4];
};

PEFTFAST_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

PEFTFAST_HD Words words_at(uint64_t seed, uint64_t q, uint32_t tensor_id, uint32_t stream) {
    uint32_t c0 = static_cast<uint32_t>(q), c1 = static_cast<uint32_t>(q >> 32), c2 = tensor_id, c3 = stream;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t high0 = multiply_high(c0, kMultiplier0), low0 = c0 * kMultiplier0;
        const uint32_t high1 = multiply_high(c2, kMultiplier1), low1 = c2 * kMultiplier1;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    return Words{{c0, c1, c2, c3}};
}

// Bit i is set where the i-th 16-bit draw, the low half of a word before its high half, is below the threshold (0 ..
// 65536).
PEFTFAST_HD uint32_t keep_bits(const Words& words, uint32_t threshold) {
    uint32_t bits = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < 4; ++i) {
        bits |= static_cast<uint32_t>((words.word[i] & 0xffffu) < threshold) << (2 * i);
        bits |= static_cast<uint32_t>((words.word[i] >> 16) < threshold) << (2 * i + 1);
    }
    return bits;
}

}  // namespace peftfast::philox
