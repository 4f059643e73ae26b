// float32 to and from bfloat16 and float16 as bit patterns: round to nearest, ties to even.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <string.h>
#endif

namespace peftfast {

enum class DType : int32_t { f32, bf16, f16 };

PEFTFAST_HD constexpr int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

PEFTFAST_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

PEFTFAST_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// On a CPU by integers, because AVX512-BF16 flushes denormals. A NaN stays one (quieted): adding the rounding term to
// its payload could carry it into infinity. A GPU's conversion keeps denormals and gives the same bits but for a NaN,
// which becomes 0x7fff; by integers it would be six instructions.
PEFTFAST_HD uint16_t bf16_from_float(float value) {
#if defined(__CUDA_ARCH__)
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
    return static_cast<uint16_t>(pair);
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

PEFTFAST_HD float float_from_bf16(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

PEFTFAST_HD uint16_t f16_from_float(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u)
        return static_cast<uint16_t>(sign | 0x7c00u);                     // rounds past 65504, the largest finite value
    if (magnitude < 0x38800000u) {                                        // below 2^-14: a denormal result
        if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // below 2^-25: half of the smallest one
        const uint32_t shift = 126u - (magnitude >> 23);                  // 14 .. 24
        const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        const uint32_t kept = mantissa >> shift;
        const uint32_t rest = mantissa & ((1u << shift) - 1u);
        const uint32_t tie = 1u << (shift - 1u);
        return static_cast<uint16_t>(sign | (kept + (rest > tie || (rest == tie && (kept & 1u)))));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

PEFTFAST_HD float float_from_f16(uint16_t half) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(half));
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
    const float denormal = static_cast<float>(magnitude) * 0x1p-24f;  // exact: at most ten significant bits
    return bits_float(sign | float_bits(denormal));
#endif
}

// Stochastic rounding as peftfast/reference/zeroth_order.py defines it: `draw`, in 65536ths, carries the bits that go.
// Written without branches, for the loops that are vectorised.
PEFTFAST_HD uint16_t bf16_from_float_by(float value, uint32_t draw) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + draw) >> 16;
    return (bits & 0x7fffffffu) >= 0x7f7f0000u ? bf16_from_float(value) : static_cast<uint16_t>(rounded);
}

PEFTFAST_HD uint16_t f16_from_float_by(float value, uint32_t draw) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + (draw >> 3) - 0x38000000u) >> 13;
    const bool is_small = magnitude < 0x38800000u;  // below 2^-14
    const uint32_t small = (static_cast<uint32_t>(bits_float(is_small ? magnitude : 0u) * 0x1p40f) + draw) >> 16;
    const uint32_t rounded = (is_small ? small : normal) | ((bits >> 16) & 0x8000u);
    return magnitude >= 0x477fe000u ? f16_from_float(value) : static_cast<uint16_t>(rounded);
}

}  // namespace peftfast
