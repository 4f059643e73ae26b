#include "cuda/sparse_delta.h"

#include <cuda_runtime.h>

#include "narrow.h"

namespace peftfast::cuda {
namespace {

constexpr int kThreads = 256;
// Lanes that share one active weight: 8 times 16 bytes are a cache line, and 64 rows of two bytes.
constexpr int kLanes = 8;

template <DType kType>
__device__ __forceinline__ void widened(const uint4& words, float* values) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (kType == DType::f32) {
            values[i] = __uint_as_float(word[i]);
        } else if (kType == DType::bf16) {
            values[2 * i] = __uint_as_float(word[i] << 16);
            values[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        } else {
            values[2 * i] = float_from_f16(static_cast<uint16_t>(word[i]));
            values[2 * i + 1] = float_from_f16(static_cast<uint16_t>(word[i] >> 16));
        }
    }
}

__device__ __forceinline__ void store_as(void* out, DType dtype, int64_t i, float value) {
    if (dtype == DType::f32) {
        static_cast<float*>(out)[i] = value;
    } else {
        static_cast<uint16_t*>(out)[i] = dtype == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

// 4 blocks an SM: at most 64 registers. Left alone, ptxas stops at 48 for sm_100 and spills a word.
constexpr int kMinBlocks = 4;

template <DType kType, class Index>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gather_dots(Gather gather) {
    constexpr int kElements = kType == DType::f32 ? 4 : 8;
    const int64_t s = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const int lane = threadIdx.x % kLanes;
    const bool live = s < gather.count;
    const int64_t index = live ? static_cast<int64_t>(__ldg(static_cast<const Index*>(gather.indices) + s)) : 0;
    const bool inside = live && index >= 0 && index < gather.n * gather.k;
    const int64_t row = inside ? index / gather.k : 0, column = inside ? index - row * gather.k : 0;
    const int64_t step = kLanes;
    const int64_t words = gather.padded / kElements;
    const uint4* a = static_cast<const uint4*>(gather.dyt) + row * words;
    const uint4* b = static_cast<const uint4*>(gather.xt) + column * words;
    // A sum for each place in a word: a sum in parts.
    float sums[kElements] = {};
    if (inside) {
#pragma unroll 4
        for (int64_t word = lane; word < words; word += step) {
            float left[kElements], right[kElements];
            widened<kType>(__ldg(a + word), left);
            widened<kType>(__ldg(b + word), right);
#pragma unroll
            for (int i = 0; i < kElements; ++i) sums[i] = __fmaf_rn(left[i], right[i], sums[i]);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += sums[i];
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (live && lane == 0) store_as(gather.out, gather.out_dtype, s, sum);
}

template <class Index>
void launch_gather(const Gather& gather, cudaStream_t stream) {
    const int64_t grid = (gather.count * kLanes + kThreads - 1) / kThreads;
    const unsigned blocks = static_cast<unsigned>(grid);
    switch (gather.dtype) {
        case DType::f32:
            gather_dots<DType::f32, Index><<<blocks, kThreads, 0, stream>>>(gather);
            break;
        case DType::bf16:
            gather_dots<DType::bf16, Index><<<blocks, kThreads, 0, stream>>>(gather);
            break;
        case DType::f16:
            gather_dots<DType::f16, Index><<<blocks, kThreads, 0, stream>>>(gather);
            break;
    }
}

const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_sparse_delta_dvalues(const Gather& gather, void* stream) {
    if (gather.count == 0) return nullptr;
    if (gather.wide_index) {
        launch_gather<int64_t>(gather, static_cast<cudaStream_t>(stream));
    } else {
        launch_gather<int32_t>(gather, static_cast<cudaStream_t>(stream));
    }
    return launch_error();
}

}  // namespace peftfast::cuda
