// AdamW on the values of sparse deltas on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include "narrow.h"

namespace peftfast::cuda {

constexpr int64_t kAdamBlock = 1024;  // active weights of one thread block
constexpr int64_t kAdamColumns = 13;  // of a layer's row in the table

// Layers of one weight dtype, index width and age width. table: int64 [layers, 13], the addresses of values, grads,
// exp_avg, exp_avg_sq, age, weight, indices and base (the first five 16-byte aligned), active weights, weights, tensor
// id, the addresses of exp_avg's and exp_avg_sq's maxima. layer, first: of each thread block. A layer without a weight
// has 0 in its place.
struct Adam {
    const int64_t* table;
    const int32_t* layer;
    const int64_t* first;
    int64_t blocks;
    const float* codes;  // [2, 256]: both states are bytes; null: they are float32
    const float* hyper;
    const float* corrections;
    int64_t ages;
    const int64_t* seed;  // null: round to nearest
    DType dtype;
    bool wide_index, wide_age;
};

const char* launch_sparse_adamw(const Adam& adam, void* stream);

}  // namespace peftfast::cuda
