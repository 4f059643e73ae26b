// The passes of a LoRA layer on the CPU; peftfast/reference/lora.py defines them. Raw pointers, no torch.
#pragma once

#include "cpu/parallel.h"
#include "narrow.h"

namespace peftfast::cpu {

// Strides are in elements. Any strides are correct; a column stride of 1 is fast.
struct Matrix {
    void* data;
    DType dtype;
    int64_t rows, columns, stride_row, stride_column;

    Matrix transposed() const { return {data, dtype, columns, rows, stride_column, stride_row}; }
};

// No dropout where threshold is negative; else an element is kept where its draw is below it, 0 .. 65536.
struct Dropout {
    uint64_t seed;
    int32_t threshold;

    bool active() const { return threshold >= 0; }
    // What a kept element is multiplied by: the inverse of the exact keep rate.
    double scale() const { return !active() ? 1.0 : threshold == 0 ? 0.0 : 65536.0 / threshold; }
};

// out [M, R] = scaling * dropout(x [M, K]) w [R, K]^T
void lora_shrink(const Matrix& x, const Matrix& w, const Dropout& dropout, double scaling, const Matrix& out,
                 ParallelFor pool);

// out [M, N] = base + dropout(scaling * (s [M, R] w [N, R]^T + bias [N])); out may be base. bias: a row, or no data.
void lora_expand(const Matrix& base, const Matrix& s, const Matrix& w, const Matrix& bias, const Dropout& dropout,
                 double scaling, const Matrix& out, ParallelFor pool);

// out [R, K] = scaling * ds [M, R]^T dropout(x [M, K])
void lora_weight_grad(const Matrix& ds, const Matrix& x, const Dropout& dropout, double scaling, const Matrix& out,
                      ParallelFor pool);

// ds [M, R] = scaling * dy [M, N] b [N, R] and db [N, R] = scaling * dy^T s [M, R], in one pass over dy.
void lora_dy_grads(const Matrix& dy, const Matrix& s, const Matrix& b, double scaling, const Matrix& ds,
                   const Matrix& db, ParallelFor pool);

}  // namespace peftfast::cpu
