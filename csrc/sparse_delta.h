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

}  // namespace peftfast::sparse
