// The gradient of a sparse delta and its optimiser's step on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include "narrow.h"

namespace peftfast::cuda {

constexpr int64_t kRowMultiple = 64;  // rows of a transposed operand are padded to this
constexpr int64_t kAdamBlock = 1024;  // active weights of one thread block
constexpr int64_t kAdamColumns = 11;  // of a layer's row in the table

// dyt [n, padded] and xt [k, padded]: the operands transposed, zeros behind their rows, 16-byte aligned.
struct Gather {
    const void *dyt, *xt;
    DType dtype;
    int64_t n, k, padded;
    const void* indices;
    bool wide_index;
    int64_t count;
    void* out;
    DType out_dtype;
};

// out[s] = the dot of row index / k of dyt and row index % k of xt, in float32, in one launch. Returns nullptr, or the
// text of the launch's error.
const char* launch_sparse_delta_dvalues(const Gather& gather, void* stream);

// Layers of one weight dtype, index width and age width. table: int64 [layers, 11], the addresses of values, grads,
// exp_avg, exp_avg_sq, age, weight, indices and base (the first five 16-byte aligned), active weights, weights, tensor
// id. layer, first: of each thread block. A layer without a weight has 0 in its place.
struct Adam {
    const int64_t* table;
    const int32_t* layer;
    const int64_t* first;
    int64_t blocks;
    const float* hyper;
    const float* corrections;
    int64_t ages;
    const int64_t* seed;  // null: round to nearest
    DType dtype;
    bool wide_index, wide_age;
};

const char* launch_sparse_adamw(const Adam& adam, void* stream);

}  // namespace peftfast::cuda
