// 16 bytes of elements, which one access moves, and their float32 values.
#pragma once

#include "cuda/intrinsics.h"

namespace peftfast::cuda {

template <DType kType>
constexpr int kUnit = kType == DType::f32 ? 4 : 8;  // elements

// Rounded to nearest even, two at a time.
template <DType kType>
__device__ __forceinline__ uint4 narrowed(const float (&values)[kUnit<kType>]) {
    if constexpr (kType == DType::f32) {
        return make_uint4(float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3]));
    } else {
        return make_uint4(pack_pair<kType>(values[0], values[1]), pack_pair<kType>(values[2], values[3]),
                          pack_pair<kType>(values[4], values[5]), pack_pair<kType>(values[6], values[7]));
    }
}

template <DType kType>
__device__ __forceinline__ void widen(const uint4& unit, float (&values)[kUnit<kType>]) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < kUnit<kType>; ++i) {
        if constexpr (kType == DType::f32) {
            values[i] = bits_float(words[i]);
        } else {
            const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
            values[i] = kType == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
        }
    }
}

}  // namespace peftfast::cuda
