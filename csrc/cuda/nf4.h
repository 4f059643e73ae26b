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

constexpr int64_t kLinearElements = int64_t{1} << 37;  // of the weight at most

constexpr int kLinearRows = 64;          // of x at most
constexpr int kLinearColumns = 128;      // which divide K: of the weight, what a warp multiplies at a time
constexpr int kLinearTileRows = 16;      // of A, to a warp, and of the weight for as few rows of x
constexpr int kLinearWideTileRows = 32;  // of the weight for more: what is read of x is used twice
constexpr int kLinearGroupRows = 32;     // of x at a time, at most
constexpr int kLinearWarps = 16;         // to a block of threads, which fills a multiprocessor
constexpr int kLinearWideWarps = 12;     // for more than kLinearTileRows rows of x, which need more registers

// How a product's warps share it: in units, one row tile's after the other's, A's before the weight's; a unit is so
// many columns of A, or kLinearColumns of the weight. More than kLinearGroupRows rows of x are multiplied in groups,
// which have units of their own: a tile's for one group follow those for the other, and find the weight in the cache.
// Each warp has `each` units that follow one another, the first `more` of them one more. The products of a tile and a
// group are sums of parts, one of each warp that has units of them.
struct Nf4LinearShares {
    uint32_t groups;                // of x's rows
    uint32_t tile_rows;             // of the weight
    uint32_t adapter_columns;       // of a unit
    uint32_t adapter_steps, steps;  // units of a row tile and a group, of A and of the weight
    uint32_t adapter_units, units;  // of A, and all
    uint32_t warps, each, more;     // at most a warp a unit
    int64_t adapter_parts, parts;   // of a row tile, at most
    int64_t adapter_scratch,
        scratch;  // float32: the parts [adapter_parts, M, R] of S, and [parts, M, N] behind them, in all

    Nf4LinearShares(int64_t M, int64_t N, int64_t K, int64_t R, int64_t wanted) {
        groups = static_cast<uint32_t>((M + kLinearGroupRows - 1) / kLinearGroupRows);
        tile_rows = M <= kLinearTileRows ? kLinearTileRows : kLinearWideTileRows;
        adapter_columns = M <= kLinearTileRows ? 64 : 128;
        adapter_steps = static_cast<uint32_t>(K / adapter_columns);
        steps = static_cast<uint32_t>(K / kLinearColumns);
        adapter_units = groups * static_cast<uint32_t>((R + kLinearTileRows - 1) / kLinearTileRows * adapter_steps);
        units = adapter_units + groups * static_cast<uint32_t>((N + tile_rows - 1) / tile_rows * steps);
        warps = wanted < units ? static_cast<uint32_t>(wanted) : units;
        each = warps > 0 ? units / warps : 1, more = warps > 0 ? units % warps : 0;
        adapter_parts = parts_of(adapter_steps), parts = parts_of(steps);
        adapter_scratch = adapter_parts * M * R, scratch = adapter_scratch + parts * M * N;
    }

  private:
    int64_t parts_of(uint32_t of_tile) const { return of_tile == 0 ? 0 : (of_tile - 1 + each - 1) / each + 1; }
};

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
    int64_t warps;   // that are to share the product: as many as run at once
    float* partial;  // as many as Nf4LinearShares says, scratch
    void* s;         // [M, R] of the compute dtype
    void* y;         // [M, N]
    DType y_dtype;
};

// y = x Wᵀ + bias + scaling (S Bᵀ + lora_bias), S = x Aᵀ, everything contiguous, in two launches: the warps'
// products, then their sums in a fixed order with what is added to them. The
// second begins beside the first where the device knows of that. No atomics and no host synchronisation.
const char* launch_nf4_linear(const Nf4Linear& problem, void* stream);

}  // namespace peftfast::cuda
