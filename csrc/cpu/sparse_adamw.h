// AdamW on the values of sparse deltas, on the CPU. Raw pointers, no torch. Indices that lie outside the weight write
// nothing.
#pragma once

#include "../sparse_delta.h"
#include "cpu/sparse_delta.h"

namespace peftfast::cpu {

// exp_avg and exp_avg_sq: float32, or bytes where `codes` is given, with a float32 maximum for each sparse::kStateBlock
// of them.
struct AdamBuffers {
    float* values;
    const float* grads;
    void *exp_avg, *exp_avg_sq;
    float *exp_avg_max, *exp_avg_sq_max;
    const float* codes;  // [2, 256]: what a byte of exp_avg and of exp_avg_sq stands for
    void* age;           // int16 or int32
    bool wide_age;
    int64_t count;
    const float* corrections;  // [2, ages]
    int64_t ages;
};

// What the step writes besides its states: null where the delta lies in no weight.
struct AdamWeight {
    void* data;
    DType dtype;
    int64_t count;
    Indices indices;
    const void* base;
    bool stochastic;
    uint64_t seed;
    uint32_t tensor_id;
};

void sparse_adamw(const AdamBuffers& buffers, const sparse::AdamHyper& hyper, const AdamWeight& weight,
                  ParallelFor pool);

}  // namespace peftfast::cpu
