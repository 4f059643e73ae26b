// The S pass of a LoRA layer on CUDA (reference/lora.py: lora_shrink). Raw pointers and a stream; no torch, no CUDA
// header.
#pragma once

#include <stdint.h>

#include "narrow.h"

namespace peftfast::cuda {

struct Shrink {
    const void* x;                  // [M, K], columns adjacent, rows stride_x elements apart
    const void* w;                  // [R, K], as x with stride_w
    DType x_dtype, w_dtype, dtype;  // dtype: of out, in which the factors of each product are rounded
    int64_t rows, columns, ranks, stride_x, stride_w;
    const int64_t* seed;  // one element on the device, or null: no dropout
    uint32_t threshold;   // in [0, 65536]
    float scale;          // scaling times the inverse of the exact keep rate
    int64_t splits;       // of the sum over K, at least 1
    float* partials;      // [splits, M, R]; unused with one split
    void* out;            // [M, R], contiguous
};

// Returns nullptr, or the text of the launch's error. `stream` is a cudaStream_t.
const char* launch_lora_shrink(const Shrink& shrink, void* stream);

}  // namespace peftfast::cuda
