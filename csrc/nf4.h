// Element functions of 4-bit storage; peftfast/reference/nf4.py is the definition.
#pragma once

#include "narrow.h"

namespace peftfast::nf4 {

constexpr int64_t kNestedBlock = 256;  // block maxima that share one nested maximum

// Product and sum rounded separately, as bitsandbytes does: a fused multiply-add would change the last bit.
PEFTFAST_HD float unnest(float code, float nested_absmax, float offset) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmul_rn(code, nested_absmax), offset);
#else
    const float product = code * nested_absmax;  // compiled with -ffp-contract=off
    return product + offset;
#endif
}

PEFTFAST_HD float scale_code(float code, float absmax) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(code, absmax);
#else
    return code * absmax;
#endif
}

constexpr float kSmallestMaximum = 1e-38f;  // an all-zero block divides by this

// Divisions are rounded to nearest everywhere: the bytes of a quantised weight depend on the last bit.
PEFTFAST_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// Of finite values and NaN the larger magnitude, a NaN above all: the bits of magnitudes are ordered as they are.
PEFTFAST_HD uint32_t magnitude_bits(float value) { return float_bits(value) & 0x7fffffffu; }

// What a block's values are scaled by. A short last block is divided by its maximum, which is clamped in what is stored
// too; whole blocks are multiplied by the reciprocal. The two round differently, and the bytes are the contract.
PEFTFAST_HD float clamped_maximum(float absmax) { return absmax < kSmallestMaximum ? kSmallestMaximum : absmax; }
PEFTFAST_HD float scaled_value(float value, float scale, bool divided) {
#if defined(__CUDA_ARCH__)
    const float scaled = divided ? __fdiv_rn(value, scale) : __fmul_rn(value, scale);
#else
    const float scaled = divided ? value / scale : value * scale;
#endif
    return scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
}

// How many of `count` ascending bounds lie below the value: one halfway between two codes takes the lower, a NaN the
// last.
PEFTFAST_HD int32_t bounds_below(const float* bounds, int32_t count, float value) {
    int32_t low = 0, high = count;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (bounds[middle] >= value) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// bitsandbytes' kernel for CPU tensors moves a value in [-1, 1] to a grid of 65,536 first.
PEFTFAST_HD float snapped_value(float scaled) {
#if defined(__CUDA_ARCH__)
    const float place = __fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(scaled, 1.0f), 0.5f), 65535.0f), 0.5f);
    return __fadd_rn(-1.0f, __fdiv_rn(__fmul_rn(2.0f, static_cast<float>(static_cast<int32_t>(place))), 65535.0f));
#else
    const float sum = scaled + 1.0f;
    const float product = sum * 0.5f * 65535.0f;
    const float index = static_cast<float>(static_cast<int32_t>(product + 0.5f));
    const float step = 2.0f * index / 65535.0f;
    return -1.0f + step;
#endif
}

// Index of a value in a sorted code of 256, by its 255 bounds. A snapped NaN takes the first entry.
PEFTFAST_HD uint8_t nested_index(const float* bounds, float scaled, bool snapped) {
    if (snapped) {
        if (!(scaled == scaled)) return 0;
        scaled = snapped_value(scaled);
    }
    return static_cast<uint8_t>(bounds_below(bounds, 255, scaled));
}

// The even element of a pair lies in the high nibble.
PEFTFAST_HD uint32_t nibble(uint8_t byte, int64_t element) { return element % 2 == 0 ? byte >> 4 : byte & 15u; }

}  // namespace peftfast::nf4
