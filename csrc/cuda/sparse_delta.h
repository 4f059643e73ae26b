// The gradient of a sparse delta on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include "narrow.h"

namespace peftfast::cuda {

constexpr int64_t kRowMultiple = 64;  // rows of a transposed operand are padded to this

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

}  // namespace peftfast::cuda
