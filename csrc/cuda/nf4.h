// 4-bit weights on CUDA: decoding, encoding, and products with a few rows. Raw pointers and a stream; no torch, no CUDA
// header. Each launch function returns nullptr, or the text of the launch's error; `stream` is a cudaStream_t.
#pragma once

#include "narrow.h"

namespace peftfast::cuda {

struct Nf4Weight {
    const uint8_t* packed;       // two elements to a byte, the even one in the high nibble
    const void* absmax;          // float32, or bytes where nested_absmax is set
    const float* code;           // 16 entries
    const float* nested_absmax;  // one for 256 bytes, or null
    const float* nested_code;    // 256 entries
    const float* nested_offset;  // one
    int64_t block_size;
    int64_t count;
};

// Elements begin .. end of the flattened weight, and where they go: `width` to a row of the result, whose rows lie
// `stride` elements apart. `begin` is the start of a row.
struct Nf4Slab {
    int64_t begin, end;
    int64_t width, stride;
};

// out = code[nibble i] * maximum of i's block, rounded once to dtype, for the elements of the slab, in one launch.
const char* launch_nf4_dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, void* stream);

// Packed bytes [ceil(count / 2)] and maxima [ceil(count / block_size)] of a contiguous weight, in one launch. `bounds`:
// the 15 middles between neighbouring codes; `order`: the code's index of each rank. block_size: a power of two
// from 32.
const char* launch_nf4_quantize(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                                const uint8_t* order, uint8_t* packed, float* absmax, void* stream);

// Indices into a sorted code of 256 with these 255 bounds, and maxima of blocks of 256, in one launch.
const char* launch_nf4_nest(const float* values, int64_t count, const float* bounds, bool snapped, uint8_t* index,
                            float* absmax, void* stream);

constexpr int kLinearRows = 64;      // of x at most
constexpr int kLinearColumns = 128;  // which divide K: what a warp multiplies at a time
constexpr int kLinearTileRows = 64;  // of the weight or of A, to a block of threads

struct Nf4Linear {
    int64_t M, N, K, R;
    const void* x;     // [M, K]
    DType x_dtype;     // the compute dtype or float32; so is a_dtype
    Nf4Weight weight;  // [N, K]; 16-byte aligned, the block size a power of two from 32
    const void* bias;  // [N], or null
    DType bias_dtype;
    const void* lora_a;  // [R, K]
    DType a_dtype;
    const void* lora_b;  // [N, R]
    DType b_dtype;
    const void* lora_bias;  // [N], or null
    DType lora_bias_dtype;
    float scaling;
    DType compute;   // bfloat16 or float16: what weight, x and A are multiplied in, and S is rounded to
    int64_t splits;  // parts of K
    float* partial;  // [splits, M, N + R], scratch
    void* s;         // [M, R] of the compute dtype
    void* y;         // [M, N]
    DType y_dtype;
};

// y = x Wᵀ + bias + scaling (S Bᵀ + lora_bias), S = x Aᵀ, everything contiguous, in two launches: products of K's
// parts, then their sums in a fixed order with what is added to them. No atomics and no host synchronisation.
const char* launch_nf4_linear(const Nf4Linear& problem, void* stream);

}  // namespace peftfast::cuda
