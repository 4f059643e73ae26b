// Weights moved along seeded directions on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include <stdint.h>

#include "../narrow.h"

namespace peftfast::cuda {

// One tensor, contiguous: out = decay * source + sum of coefficients[k] * z(seeds[k]); minus, where there is one, with
// the sum subtracted. Without a source the first term is left out. source may be out.
struct ZoTensor {
    const void* source;
    void* out;
    void* minus;
    int64_t count;
    int64_t offset;  // of the first element in its logical tensor
    uint32_t tensor_id;
};

// All on the device.
struct ZoTerms {
    const int64_t* seeds;
    const float* coefficients;
    int64_t count;
    const float* decay;            // null: 1
    const float* thresholds;       // one for each tensor; null: none
    const int64_t* rounding_seed;  // null: to nearest
    bool rademacher;
};

// Tensors of one dtype, in one launch for every kZoTensors of them. `stream` is a cudaStream_t. Returns nullptr, or the
// text of the launch's error.
constexpr int64_t kZoTensors = 500;
const char* launch_zo_apply(const ZoTensor* tensors, int64_t count, const ZoTerms& terms, DType dtype, void* stream);

}  // namespace peftfast::cuda
