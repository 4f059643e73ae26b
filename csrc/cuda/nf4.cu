#include "cuda/nf4.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "../nf4.h"
#include "cuda/units.h"

namespace peftfast::cuda {
namespace {

// A warp's tile is 1024 elements: 512 packed bytes, one 16-byte load a lane. They pass through shared memory, so that
// each of the warp's 16-byte stores is consecutive; without that it would touch half a sector. What is needed to decode
// lies in the lanes, the code in each half of the warp and the tile's maxima in all of it, and is fetched by shuffles:
// these take the lane from the low bits of a word as it is, where an address in shared memory must be cut out of it.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMinBlocks = 6;  // an SM: at most 40 registers
constexpr int kTile = 1024;
// Block sizes: a lane has one of the tile's maxima, and places in a block are 32-bit numbers.
constexpr int64_t kLeastBlock = kTile / 32, kLargestBlock = 1 << 20;
constexpr uint32_t kWarpMask = 0xffffffffu;

// Rows that lie apart, counted in units: of a row, and what 32 units further adds to the column within a row and, in
// bytes, to the address, which moves by `wrap` more where the row ends.
struct Rows {
    uint32_t units, step;
    int64_t advance, wrap;
};

template <bool kNested>
__device__ __forceinline__ float block_maximum(const Nf4Weight& weight, int64_t block) {
    if (!kNested) return __ldg(static_cast<const float*>(weight.absmax) + block);
    const uint8_t byte = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
    const int64_t group = static_cast<uint64_t>(block) / nf4::kNestedBlock;
    return nf4::unnest(__ldg(weight.nested_code + byte), __ldg(weight.nested_absmax + group),
                       __ldg(weight.nested_offset));
}

template <DType kType>
__device__ __forceinline__ void put(void* out, int64_t at, float value) {
    if (kType == DType::f32) {
        static_cast<float*>(out)[at] = value;
    } else {
        static_cast<uint16_t*>(out)[at] = kType == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

__device__ __forceinline__ float decoded(const Nf4Weight& weight, int64_t element, float maximum) {
    return nf4::scale_code(__ldg(weight.code + nf4::nibble(__ldg(weight.packed + element / 2), element)), maximum);
}

// Needs 16-byte alignment of out, of its rows where they lie apart, and of the slab's first byte, rows of whole units
// where they lie apart, a block size of 2^block_shift from kLeastBlock to kLargestBlock, and a slab of a tile at least.
// The last tile ends with the slab, but for less than 32 elements, and warps behind it do it again: what two warps
// write is the same, and nothing depends on a warp that could diverge.
template <DType kType, bool kNested, bool kApart>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    dequantize_tiles(Nf4Weight weight, Nf4Slab slab, int block_shift, Rows rows, void* out) {
    constexpr int kElements = kUnit<kType>, kStep = 32 * kElements;
    using Packed = std::conditional_t<kType == DType::f32, uint16_t, uint32_t>;  // of a unit
    __shared__ uint4 exchange[kWarps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t count = slab.end - slab.begin, last_tile = (count & ~int64_t{31}) - kTile;
    const int64_t own_tile = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kTile;
    const int64_t offset = own_tile < last_tile ? own_tile : last_tile, first = slab.begin + offset;
    exchange[warp][lane] = __ldg(reinterpret_cast<const uint4*>(weight.packed + first / 2) + lane);
    const float code = __ldg(weight.code + lane % 16);
    // Lane i has the maximum of the tile's i-th block; lanes past its last block have that one's.
    const uint32_t start = static_cast<uint32_t>(first) & ((1u << block_shift) - 1u);
    const uint32_t last = (start + kTile - 1) >> block_shift, own = lane < last ? lane : last;
    const float maximum_of_lane = block_maximum<kNested>(weight, (first >> block_shift) + own);
    char* target = static_cast<char*>(out);
    uint32_t column = 0;
    if (kApart) {
        const uint32_t unit = static_cast<uint32_t>(offset / kElements) + lane, row = unit / rows.units;
        column = unit - row * rows.units;
        target += (row * slab.stride + static_cast<int64_t>(column) * kElements) * element_size(kType);
    } else {
        target += (offset + lane * kElements) * element_size(kType);
    }
    __syncwarp();
    const Packed* packed = reinterpret_cast<const Packed*>(exchange[warp]) + lane;
#pragma unroll
    for (int j = 0; j < kTile / kStep; ++j) {
        const uint32_t word = packed[32 * j];
        const uint32_t block = (start + lane * kElements + j * kStep) >> block_shift;
        const float maximum = __shfl_sync(kWarpMask, maximum_of_lane, static_cast<int>(block));
        float values[kElements];
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            // Byte i / 2 of the little-endian word, its high nibble first.
            const uint32_t index = word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
            values[i] = nf4::scale_code(__shfl_sync(kWarpMask, code, static_cast<int>(index), 16), maximum);
        }
        *reinterpret_cast<uint4*>(target) = narrowed<kType>(values);
        if (kApart) {
            column += rows.step;
            target += rows.advance;
            if (column >= rows.units) column -= rows.units, target += rows.wrap;
        } else {
            target += 32 * sizeof(uint4);
        }
    }
    if (offset != last_tile) return;
#pragma unroll 1
    for (int64_t i = last_tile + kTile + lane; i < count; i += 32) {
        const int64_t element = slab.begin + i;
        int64_t at = i;
        if (kApart) at += static_cast<uint32_t>(i / kElements) / rows.units * (slab.stride - slab.width);
        put<kType>(out, at, decoded(weight, element, block_maximum<kNested>(weight, element >> block_shift)));
    }
}

// Any alignment, block size and width.
template <DType kType, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_elements(Nf4Weight weight, Nf4Slab slab, void* out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, element = slab.begin + i;
    if (element >= slab.end) return;
    const int64_t row = i / slab.width;
    put<kType>(out, row * slab.stride + (i - row * slab.width),
               decoded(weight, element, block_maximum<kNested>(weight, element / weight.block_size)));
}

template <DType kType, bool kNested>
void launch(const Nf4Weight& weight, const Nf4Slab& slab, void* out, cudaStream_t stream) {
    constexpr int64_t kElements = kUnit<kType>;
    const int64_t size = weight.block_size, count = slab.end - slab.begin, bytes = element_size(kType);
    const bool apart = slab.stride != slab.width;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(weight.packed + slab.begin / 2) |
                                reinterpret_cast<uintptr_t>(out) |
                                (apart ? static_cast<uintptr_t>(slab.stride * bytes) : 0);
    const bool whole_units = !apart || (slab.width % kElements == 0 && count / kElements <= 0xffffffffll);
    if (addresses % 16 == 0 && slab.begin % 32 == 0 && count >= kTile && whole_units && size >= kLeastBlock &&
        size <= kLargestBlock && (size & (size - 1)) == 0) {
        int shift = 0;
        while ((int64_t{1} << shift) < size) ++shift;
        const unsigned grid = static_cast<unsigned>((count + kWarps * kTile - 1) / (kWarps * kTile));
        if (apart) {
            const int64_t units = slab.width / kElements;
            const Rows rows = {static_cast<uint32_t>(units), static_cast<uint32_t>(32 % units),
                               (32 / units * slab.stride + 32 % units * kElements) * bytes,
                               (slab.stride - slab.width) * bytes};
            dequantize_tiles<kType, kNested, true><<<grid, kThreads, 0, stream>>>(weight, slab, shift, rows, out);
        } else {
            dequantize_tiles<kType, kNested, false><<<grid, kThreads, 0, stream>>>(weight, slab, shift, Rows(), out);
        }
    } else {
        const unsigned grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
        dequantize_elements<kType, kNested><<<grid, kThreads, 0, stream>>>(weight, slab, out);
    }
}

template <DType kType>
void launch(const Nf4Weight& weight, const Nf4Slab& slab, void* out, cudaStream_t stream) {
    if (weight.nested_absmax != nullptr) {
        launch<kType, true>(weight, slab, out, stream);
    } else {
        launch<kType, false>(weight, slab, out, stream);
    }
}

}  // namespace

const char* launch_nf4_dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, void* stream) {
    if (slab.begin >= slab.end) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DType::f32:
            launch<DType::f32>(weight, slab, out, cuda_stream);
            break;
        case DType::bf16:
            launch<DType::bf16>(weight, slab, out, cuda_stream);
            break;
        case DType::f16:
            launch<DType::f16>(weight, slab, out, cuda_stream);
            break;
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
