// Philox4x32-10 (Salmon et al., SC 2011) as peftfast/reference/philox.py defines its use: key = the 64-bit seed,
// counter = (q low, q high, tensor id, stream).
#pragma once

#include "narrow.h"

#if !defined(__CUDACC__)
#include <math.h>
#endif

namespace peftfast::philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr uint32_t kStreamGaussian = 0;
constexpr uint32_t kStreamDropout = 1;
constexpr uint32_t kStreamRounding = 2;
constexpr uint32_t kStreamRademacher = 3;
constexpr int64_t kDrawsPerCounter = 8;  // 16-bit draws in the four words of one counter

constexpr int64_t kNormalsPerCounter = 4;
constexpr int64_t kSignsPerCounter = 128;

// The polynomials of reference/philox.py, where their ranges and errors stand; no arrays, which device code cannot see.
constexpr float kLog0 = -0x1.fffffep+0f;
constexpr float kLog1 = 0x1.000074p+0f;
constexpr float kLog2 = -0x1.555b4cp-1f;
constexpr float kLog3 = 0x1.ff6ae4p-2f;
constexpr float kLog4 = -0x1.973aa8p-2f;
constexpr float kLog5 = 0x1.6082b0p-2f;
constexpr float kLog6 = -0x1.4e9af2p-2f;
constexpr float kLog7 = 0x1.a91cbcp-3f;
constexpr float kSin0 = 0x1.921fb6p-1f;
constexpr float kSin1 = -0x1.4abbbap-4f;
constexpr float kSin2 = 0x1.465ec6p-9f;
constexpr float kSin3 = -0x1.2d9bb8p-15f;
constexpr float kCos0 = -0x1.3bd3a2p-2f;
constexpr float kCos1 = 0x1.03b162p-6f;
constexpr float kCos2 = -0x1.4ea9e8p-12f;
constexpr float kTwoLn2 = 0x1.62e430p+0f;
constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;

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

struct Pair {
    float first, second;
};

// The correctly rounded root of a squared radius, which is 0 or from 2^-23 to 46 (all 2^32 words were tried): the
// instructions of __fsqrt_rn for numbers in the middle of float32's range, without its test for the others and the call
// that this guards, whose barriers keep a pair of normals from overlapping the next. The summand moves 0 alone: its
// root is 0 times a finite number.
PEFTFAST_HD float root(float square) {
#if defined(__CUDA_ARCH__)
    float reciprocal;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(__fadd_rn(square, 1e-30f)));
    const float near = __fmul_rn(square, reciprocal), half = __fmul_rn(reciprocal, 0.5f);
    return __fmaf_rn(__fmaf_rn(-near, near, square), half, near);
#else
    return sqrtf(square);
#endif
}

// Box-Muller; products and sums are compiled without contraction (-fmad=false, -ffp-contract=off).
PEFTFAST_HD Pair normal_pair(uint32_t radius_word, uint32_t angle_word) {
    const float t = static_cast<float>(radius_word) + 0.5f;
    const uint32_t from_root = float_bits(t) - kSqrtHalfBits;
    const int32_t exponent = static_cast<int32_t>(from_root) >> 23;
    const float f = bits_float((from_root & 0x7fffffu) + kSqrtHalfBits) - 1.0f;
    float log = ((kLog7 * f + kLog6) * f + kLog5) * f + kLog4;
    log = (((log * f + kLog3) * f + kLog2) * f + kLog1) * f + kLog0;
    const float squared_radius = f * log + static_cast<float>(32 - exponent) * kTwoLn2;
    const float radius = root(squared_radius);
    const uint32_t turned = angle_word + (1u << 29);
    const float y = static_cast<float>(static_cast<int32_t>(angle_word << 2)) * 0x1p-31f;
    const float square = y * y;
    const float sine = y * (((kSin3 * square + kSin2) * square + kSin1) * square + kSin0);
    const float cosine = square * ((kCos2 * square + kCos1) * square + kCos0) + 1.0f;
    const bool odd = (turned & (1u << 30)) != 0;
    const uint32_t cosine_sign = (turned + (1u << 30)) & (1u << 31), sine_sign = turned & (1u << 31);
    const float first = bits_float(float_bits(odd ? sine : cosine) ^ cosine_sign);
    const float second = bits_float(float_bits(odd ? cosine : sine) ^ sine_sign);
    return Pair{radius * first, radius * second};
}

// Bit i of a word of stream 3 as a sign: -1 where it is set.
PEFTFAST_HD float sign_of(uint32_t word, int bit) { return bits_float(0x3f800000u | (((word >> bit) & 1u) << 31)); }

}  // namespace peftfast::philox
