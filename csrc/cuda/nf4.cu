#include "cuda/nf4.h"

#include <cuda_runtime.h>

#include "../nf4.h"

namespace peftfast::cuda {
namespace {

// A warp's tile is 1024 elements: 512 packed bytes, one 16-byte load a lane. The words pass through shared memory, so
// that lane i then holds words i, 32 + i, ... and the warp's 16-byte stores are consecutive; without that each would
// touch half a sector.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// 6 blocks an SM: at most 40 registers. Left alone, ptxas stops at 32 and one variant spills two words.
constexpr int kMinBlocks = 6;
constexpr int64_t kTile = 1024;
constexpr int kWordElements = 8;

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};
template <class T>
__device__ __forceinline__ T narrowed(float value);
template <>
__device__ __forceinline__ float narrowed<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ Bf16 narrowed<Bf16>(float value) {
    return Bf16{bf16_from_float(value)};
}
template <>
__device__ __forceinline__ F16 narrowed<F16>(float value) {
    return F16{f16_from_float(value)};
}

template <bool kNested>
__device__ __forceinline__ float block_maximum(const Nf4Weight& weight, int64_t block) {
    if (!kNested) return __ldg(static_cast<const float*>(weight.absmax) + block);
    const uint8_t byte = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
    return nf4::unnest(__ldg(weight.nested_code + byte), __ldg(weight.nested_absmax + block / nf4::kNestedBlock),
                       __ldg(weight.nested_offset));
}

// Where element i of the slab goes; rows are counted in units of kWordElements where these divide them.
template <bool kApart>
__device__ __forceinline__ int64_t place(const Nf4Slab& slab, int64_t i) {
    const int64_t offset = i - slab.begin;
    if (!kApart) return offset;
    const uint32_t word = static_cast<uint32_t>(offset / kWordElements);
    const uint32_t words = static_cast<uint32_t>(slab.width / kWordElements);
    const uint32_t row = word / words;
    return row * slab.stride + static_cast<int64_t>(word - row * words) * kWordElements;
}

template <class T, bool kNested>
__device__ __forceinline__ void dequantize_element(const Nf4Weight& weight, const Nf4Slab& slab, const float* code,
                                                   T* out, int64_t i) {
    const float maximum = block_maximum<kNested>(weight, i / weight.block_size);
    const int64_t offset = i - slab.begin, row = offset / slab.width;
    out[row * slab.stride + (offset - row * slab.width)] =
        narrowed<T>(nf4::scale_code(code[nf4::nibble(weight.packed[i / 2], i)], maximum));
}

__device__ __forceinline__ void load_code(float* code, const float* source) {
    if (threadIdx.x < 16) code[threadIdx.x] = source[threadIdx.x];
    __syncthreads();
}

// Needs 16-byte alignment of out, of its rows where they lie apart, and of the slab's first byte, and a block size of
// 2^block_shift >= 8, so that a word has one maximum.
template <class T, bool kNested, bool kApart>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    dequantize_tiles(Nf4Weight weight, Nf4Slab slab, int block_shift, T* out) {
    __shared__ float code[16];
    __shared__ uint4 exchange[kWarps][32];
    load_code(code, weight.code);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = slab.begin + (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kTile;
    if (first + kTile > slab.end) {
        for (int64_t i = first + lane; i < slab.end; i += 32) {
            dequantize_element<T, kNested>(weight, slab, code, out, i);
        }
        return;
    }
    exchange[warp][lane] = __ldg(reinterpret_cast<const uint4*>(weight.packed + first / 2) + lane);
    __syncwarp();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(exchange[warp]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64_t element = first + (j * 32 + lane) * kWordElements;
        const uint32_t word = words[j * 32 + lane];
        const float maximum = block_maximum<kNested>(weight, element >> block_shift);
        alignas(16) T values[kWordElements];
#pragma unroll
        for (int i = 0; i < kWordElements; ++i) {
            // Byte i / 2 of the little-endian word, its high nibble first.
            const uint32_t index = (word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15u;
            values[i] = narrowed<T>(nf4::scale_code(code[index], maximum));
        }
        uint4* target = reinterpret_cast<uint4*>(out + place<kApart>(slab, element));
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof values / sizeof(uint4)); ++i) {
            target[i] = reinterpret_cast<const uint4*>(values)[i];
        }
    }
}

// Any alignment, block size and width.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_elements(Nf4Weight weight, Nf4Slab slab, T* out) {
    __shared__ float code[16];
    load_code(code, weight.code);
    const int64_t i = slab.begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < slab.end) dequantize_element<T, kNested>(weight, slab, code, out, i);
}

template <class T, bool kNested>
void launch(const Nf4Weight& weight, const Nf4Slab& slab, T* out, cudaStream_t stream) {
    const int64_t size = weight.block_size, count = slab.end - slab.begin;
    const bool apart = slab.stride != slab.width;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(weight.packed + slab.begin / 2) |
                                reinterpret_cast<uintptr_t>(out) |
                                (apart ? static_cast<uintptr_t>(slab.stride) * sizeof(T) : 0);
    const bool whole_words = !apart || (slab.width % kWordElements == 0 && count / kWordElements <= 0xffffffffll);
    if (addresses % 16 == 0 && slab.begin % 32 == 0 && whole_words && size >= kWordElements &&
        (size & (size - 1)) == 0) {
        int shift = 3;
        while ((int64_t{1} << shift) < size) ++shift;
        const unsigned grid = static_cast<unsigned>((count + kWarps * kTile - 1) / (kWarps * kTile));
        if (apart) {
            dequantize_tiles<T, kNested, true><<<grid, kThreads, 0, stream>>>(weight, slab, shift, out);
        } else {
            dequantize_tiles<T, kNested, false><<<grid, kThreads, 0, stream>>>(weight, slab, shift, out);
        }
    } else {
        const unsigned grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
        dequantize_elements<T, kNested><<<grid, kThreads, 0, stream>>>(weight, slab, out);
    }
}

template <class T>
void launch(const Nf4Weight& weight, const Nf4Slab& slab, void* out, cudaStream_t stream) {
    if (weight.nested_absmax != nullptr) {
        launch<T, true>(weight, slab, static_cast<T*>(out), stream);
    } else {
        launch<T, false>(weight, slab, static_cast<T*>(out), stream);
    }
}

}  // namespace

const char* launch_nf4_dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, void* stream) {
    if (slab.begin >= slab.end) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DType::f32:
            launch<float>(weight, slab, out, cuda_stream);
            break;
        case DType::bf16:
            launch<Bf16>(weight, slab, out, cuda_stream);
            break;
        case DType::f16:
            launch<F16>(weight, slab, out, cuda_stream);
            break;
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
