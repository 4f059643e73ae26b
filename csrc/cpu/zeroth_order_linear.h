// A linear layer on a weight that is moved both ways and never written, on the CPU. Raw pointers, no torch.
#pragma once

#include "cpu/nf4.h"
#include "cpu/zeroth_order.h"

namespace peftfast::cpu {

// A weight and its two moves: round(W + eps z) and round(W - eps z), each rounded to dtype once. Of a 4-bit weight W is
// what the dequantiser gives in dtype; where z moves its scales, block b is decoded with maximum absmax[b] +- eps z[b].
struct ZoMove {
    const void* dense;  // contiguous, of dtype; null: `packed` is the weight
    Nf4Weight packed;
    DType dtype;
    const float* threshold;  // null: none; what has a larger magnitude stays
    float eps;
    int64_t seed;
    uint32_t tensor_id;
    bool rademacher;
    bool of_scales;  // the maxima of packed are not nested then
};

struct ZoLinear {
    ZoMove weight;  // [N, K]
    int64_t M, N, K;
    const void* x[2];     // [M, K], for the plus and the minus side; these and below contiguous, of the weight's dtype
    const void* bias[2];  // [N], or null
    void* y[2];           // [M, N]
};

// Both products. Each element of the weight is read and its z drawn once, into scratch of a few rows a thread; float32
// sums in an order that the threads do not change.
void zo_linear(const ZoLinear& problem, ParallelFor pool);

// `count` elements from `begin` on of both moved weights.
void zo_moved_pair(const ZoMove& weight, int64_t begin, int64_t count, void* plus, void* minus, ParallelFor pool);

}  // namespace peftfast::cpu
