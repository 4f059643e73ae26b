// Element functions of the sparse delta's optimiser step; peftfast/reference/sparse_delta.py is the definition.
#pragma once

#include "narrow.h"
#include "philox.h"

#if !defined(__CUDA_ARCH__)
#include <math.h>
#endif

namespace peftfast::sparse {

constexpr uint32_t kStreamRounding = 2;

// The order of reference.adam_hyper.
struct AdamHyper {
    float lr, beta1, rest1, beta2, rest2, eps, keep;
};

struct AdamState {
    float value, exp_avg, exp_avg_sq;
};

// Every operation rounded once: built with -ffp-contract=off and -fmad=false.
PEFTFAST_HD AdamState adam(AdamState state, float grad, float correction1, float correction2, const AdamHyper& hyper) {
    const float first = state.exp_avg * hyper.beta1 + grad * hyper.rest1;
    const float second = state.exp_avg_sq * hyper.beta2 + (grad * hyper.rest2) * grad;
#if defined(__CUDA_ARCH__)
    const float root = __fsqrt_rn(second);
    const float step = __fdiv_rn((hyper.lr * correction1) * first, root * correction2 + hyper.eps);
#else
    const float root = sqrtf(second);
    const float step = (hyper.lr * correction1) * first / (root * correction2 + hyper.eps);
#endif
    return AdamState{state.value * hyper.keep - step, first, second};
}

// The 16 random bits of weight element `element`: draw element % 8 of counter element / 8.
PEFTFAST_HD uint32_t rounding_draw(uint64_t seed, int64_t element, uint32_t tensor_id) {
    const philox::Words words = philox::words_at(seed, static_cast<uint64_t>(element >> 3), tensor_id, kStreamRounding);
    const int draw = static_cast<int>(element & 7);
    // Selected by comparisons: an index into the words would put them into local memory on a GPU.
    const uint32_t low = draw < 2 ? words.word[0] : words.word[1], high = draw < 6 ? words.word[2] : words.word[3];
    const uint32_t word = draw < 4 ? low : high;
    return draw % 2 == 0 ? word & 0xffffu : word >> 16;
}

PEFTFAST_HD uint16_t stochastic_bf16(float value, uint32_t draw) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bf16_from_float(value);
    return static_cast<uint16_t>((bits + draw) >> 16);
}

// States in bytes: this many share a maximum.
constexpr int64_t kStateBlock = 256;

// The byte of a state that is `part` of its block's maximum: that of the nearest of reference.state_codes, of two
// equally near the lower byte. Codes are powers of 2^(1/6) or 2^(1/8), so that within an octave the middles between
// neighbours have the same fractions: those below a part are counted, where a search of the table would be eight
// dependent reads.
template <bool kSigned>
PEFTFAST_HD uint32_t state_byte(float part) {
    const uint32_t bits = float_bits(part), size = bits & 0x7fffffffu, negative = bits >> 31;
    // Of a negative part the lower byte is the larger magnitude: a middle counts where it is reached.
    const uint32_t key = kSigned ? size + negative : size, fraction = key & 0x7fffffu;
    int32_t steps = static_cast<int32_t>(key >> 23) * (kSigned ? 6 : 8) - (kSigned ? 635 : 761);
    if (kSigned) {
        steps += (fraction > 0x07d66bu) + (fraction > 0x1878f7u) + (fraction > 0x2b2506u) + (fraction > 0x401a74u) +
                 (fraction > 0x57a0f2u) + (fraction > 0x7208f8u);
    } else {
        steps += (fraction > 0x05cae1u) + (fraction > 0x11e6d9u) + (fraction > 0x1f1b64u) + (fraction > 0x2d81e5u) +
                 (fraction > 0x3d360eu) + (fraction > 0x4e5614u) + (fraction > 0x6102e2u) + (fraction > 0x756064u);
    }
    // Half of the least power: from there down, 0.
    const uint32_t least = kSigned ? 105u << 23 : (94u << 23) + 0x1837f0u;
    steps = steps < 1 ? 1 : steps;
    steps = key <= least ? 0 : steps;
    int32_t byte = kSigned ? (negative ? 127 - steps : 127 + steps) : (negative ? 0 : steps);
    byte = size > 0x7f800000u ? 255 : byte;
    return static_cast<uint32_t>(byte);
}

}  // namespace peftfast::sparse
