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

// The even element of a pair lies in the high nibble.
PEFTFAST_HD uint32_t nibble(uint8_t byte, int64_t element) { return element % 2 == 0 ? byte >> 4 : byte & 15u; }

}  // namespace peftfast::nf4
