// Weights moved along seeded directions on the CPU. Raw pointers, no torch.
#pragma once

#include "cpu/parallel.h"
#include "narrow.h"

namespace peftfast::cpu {

// Elements of the logical tensor whose z is drawn at a time: a multiple of the 128 signs of a counter and of the 32
// normals of a vector step. Five arrays of it are 10 KiB.
constexpr int64_t kZoBlock = 512;

// One tensor: out = decay * source + sum of coefficients[k] * z(seeds[k]); minus, where there is one, with the sum
// subtracted. Without a source the first term is left out altogether. All contiguous, of one dtype; source may be out.
struct ZoTensor {
    const void* source;
    void* out;
    void* minus;
    int64_t count;
    int64_t offset;          // of the first element in its logical tensor
    const float* threshold;  // null: none; elements whose magnitude is above it stay
    DType dtype;
    uint32_t tensor_id;
};

struct ZoTerms {
    const int64_t* seeds;
    const float* coefficients;
    int64_t count;
    const float* decay;            // null: 1
    const int64_t* rounding_seed;  // null: to nearest
    bool rademacher;
};

void zo_apply(const ZoTensor* tensors, int64_t count, const ZoTerms& terms, ParallelFor pool);

// What normal_pair makes of every word in [begin, end), as radius and as angle at once: how many results are not
// finite, the largest magnitude, and the bits of all of them added up, which any difference between two
// implementations would change.
struct NormalSurvey {
    int64_t not_finite;
    uint32_t largest;  // as bits
    uint64_t sum_of_bits;
};

NormalSurvey survey_normals(uint64_t begin, uint64_t end, ParallelFor pool);

}  // namespace peftfast::cpu
