// 4-bit weights on the CPU: decoding, encoding, and products with a few rows. Raw pointers, no torch.
#pragma once

#include "cpu/parallel.h"
#include "narrow.h"

namespace peftfast::cpu {

// Block maxima: `absmax` alone, or bytes with their nested scale when `bytes` is set.
struct BlockMaxima {
    const float* absmax;
    const uint8_t* bytes;
    const float* nested_absmax;  // one for 256 bytes
    const float* nested_code;    // 256 entries
    float nested_offset;
};

struct Nf4Weight {
    const uint8_t* packed;  // two elements to a byte, the even one in the high nibble
    BlockMaxima maxima;
    const float* code;  // 16 entries
    int64_t block_size;
    int64_t count;
};

// Elements begin .. end of the flattened weight, and where they go: `width` to a row of the result, whose rows lie
// `stride` elements apart. `begin` is the start of a row.
struct Nf4Slab {
    int64_t begin, end;
    int64_t width, stride;
};

// out = code[nibble i] * maximum of i's block, rounded once to dtype, for the elements of the slab.
void nf4_dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, ParallelFor pool);

// Packed bytes [ceil(count / 2)] and maxima [ceil(count / block_size)] of a contiguous weight. `bounds`: the 15 middles
// between neighbouring codes; `order`: the code's index of each rank. block_size is even.
void nf4_quantize(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                  const uint8_t* order, uint8_t* packed, float* absmax, ParallelFor pool);

// Indices into a sorted code of 256 with these 255 bounds, and maxima of blocks of 256.
void nf4_nest(const float* values, int64_t count, const float* bounds, bool snapped, uint8_t* index, float* absmax,
              ParallelFor pool);

// A tensor of a floating dtype, its elements or rows `stride` apart; data may be null where it is optional.
struct FloatMatrix {
    const void* data;
    DType dtype;
    int64_t row_stride, column_stride;
};

struct Nf4Linear {
    int64_t M, N, K, R;
    FloatMatrix x;          // [M, K]
    Nf4Weight weight;       // [N, K]
    FloatMatrix bias;       // [N], optional
    FloatMatrix lora_a;     // [R, K]
    FloatMatrix lora_b;     // [N, R]
    FloatMatrix lora_bias;  // [N], optional
    float scaling;
    DType compute;  // what x and S are rounded to
    void* s;        // [M, R] of the compute dtype, contiguous
    void* y;        // [M, N] of y_dtype, contiguous
    DType y_dtype;
};

// Whether nf4_linear multiplies in bfloat16 by the instruction made for it, where K and the block size are multiples
// of 64.
bool nf4_linear_has_dot();

// y = x Wᵀ + bias + scaling (S Bᵀ + lora_bias), S = x Aᵀ; float32 sums in an order that the threads do not change.
void nf4_linear(const Nf4Linear& problem, ParallelFor pool);

}  // namespace peftfast::cpu
