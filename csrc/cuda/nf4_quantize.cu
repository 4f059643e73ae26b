#include <cuda_runtime.h>

#include "../nf4.h"
#include "cuda/nf4.h"

namespace peftfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // that a thread encodes at a time: 32 bits of packed bytes

template <DType kType>
__device__ __forceinline__ float value_at(const void* data, int64_t i) {
    if (kType == DType::f32) return __ldg(static_cast<const float*>(data) + i);
    const uint16_t half = __ldg(static_cast<const uint16_t*>(data) + i);
    return kType == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

__device__ __forceinline__ void push(float (&values)[kElements], float last) {
#pragma unroll
    for (int i = 1; i < kElements; ++i) values[i - 1] = values[i];
    values[kElements - 1] = last;
}

// Elements first .. first + 8, zeros past the end. kWide: the address is a multiple of 16 bytes.
template <DType kType, bool kWide>
__device__ __forceinline__ void load_eight(const void* data, int64_t first, int64_t end, float (&values)[kElements]) {
    if (kWide && first + kElements <= end) {
        const char* address = static_cast<const char*>(data) + first * element_size(kType);
        if (kType == DType::f32) {
            const float4 low = __ldg(reinterpret_cast<const float4*>(address));
            const float4 high = __ldg(reinterpret_cast<const float4*>(address) + 1);
            values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
            values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
            return;
        }
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(address));
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const uint16_t half = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
            values[i] = kType == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
        }
        return;
    }
    // Rare, and so a loop, through which the values move: an index that is not a constant would put them into memory.
#pragma unroll 1
    for (int i = 0; i < kElements; ++i) {
        push(values, first + i < end ? value_at<kType>(data, first + i) : 0.0f);
    }
}

__device__ __forceinline__ uint32_t largest(uint32_t a, uint32_t b) { return a > b ? a : b; }

// nf4::bounds_below of the 15 bounds in four steps without a branch.
__device__ __forceinline__ int rank_of(const float* limits, float value) {
    int rank = 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) rank += limits[rank + step - 1] >= value ? 0 : step;
    return rank;
}

// `lanes` neighbouring threads, a power of two up to a warp, encode one block: 8 elements each at a time, which for
// blocks up to 256 elements is all of them. Longer blocks are read twice.
template <DType kType, bool kWide>
__global__ void __launch_bounds__(kThreads)
    quantize_blocks(const void* weight, int64_t count, int64_t block_size, int lanes, const float* bounds,
                    const uint8_t* order, uint8_t* packed, float* absmax) {
    __shared__ float limits[15];
    __shared__ uint8_t codes[16];
    if (threadIdx.x < 15) limits[threadIdx.x] = bounds[threadIdx.x];
    if (threadIdx.x < 16) codes[threadIdx.x] = order[threadIdx.x];
    __syncthreads();
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    const int64_t first = block * block_size;
    const int64_t full = first + block_size, end = full < count ? full : count;
    const int64_t begin = first + threadIdx.x % lanes * kElements, step = static_cast<int64_t>(lanes) * kElements;
    float values[kElements];
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; i += step) {
        load_eight<kType, kWide>(weight, i, end, values);
#pragma unroll
        for (int j = 0; j < kElements; ++j) bits = largest(bits, nf4::magnitude_bits(values[j]));
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        bits = largest(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    }
    const bool divided = full > count;
    const float maximum = bits_float(bits), clamped = nf4::clamped_maximum(maximum);
    const float scale = divided ? clamped : nf4::divide(1.0f, clamped);
    if (first < count && begin == first) absmax[block] = divided ? clamped : maximum;
    for (int64_t i = begin; i < end; i += step) {
        if (step < block_size) load_eight<kType, kWide>(weight, i, end, values);  // else they are still there
        if (divided) {
#pragma unroll 1
            for (int j = 0; j < kElements; ++j) push(values, nf4::scaled_value(values[0], scale, true));
        }
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float scaled = nf4::scaled_value(values[j], divided ? 1.0f : scale, false);
            const uint32_t index = codes[rank_of(limits, scaled)];
            word |= index << (8 * (j / 2) + (j % 2 == 0 ? 4 : 0));
        }
        if (i + kElements <= end) {
            *reinterpret_cast<uint32_t*>(packed + i / 2) = word;
        } else {  // an odd count is completed by a zero
            for (int j = 0; j < kElements && i + j < end; j += 2) packed[(i + j) / 2] = word >> (4 * j);
        }
    }
}

// A warp takes 256 values.
__global__ void __launch_bounds__(kThreads)
    nest_groups(const float* values, int64_t count, const float* bounds, bool snapped, uint8_t* index, float* absmax) {
    __shared__ float limits[255];
    if (threadIdx.x < 255) limits[threadIdx.x] = bounds[threadIdx.x];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    const int64_t first = group * nf4::kNestedBlock, full = first + nf4::kNestedBlock;
    uint32_t bits = 0;
    for (int64_t i = first + lane; i < full && i < count; i += 32) {
        const uint32_t own = nf4::magnitude_bits(__ldg(values + i));
        if (!(snapped && own > 0x7f800000u)) bits = largest(bits, own);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        bits = largest(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    }
    const bool divided = !snapped && full > count;
    const float maximum = bits_float(bits), clamped = nf4::clamped_maximum(maximum);
    const float scale = divided ? clamped : nf4::divide(1.0f, snapped ? maximum : clamped);
    if (lane == 0 && first < count) absmax[group] = divided ? clamped : maximum;
    for (int64_t i = first + lane; i < full && i < count; i += 32) {
        index[i] = nf4::nested_index(limits, nf4::scaled_value(__ldg(values + i), scale, divided), snapped);
    }
}

const char* launched() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <DType kType>
void launch(const void* weight, int64_t count, int64_t block_size, const float* bounds, const uint8_t* order,
            uint8_t* packed, float* absmax, cudaStream_t stream) {
    const int lanes = block_size >= 256 ? 32 : static_cast<int>(block_size / kElements);
    const int64_t blocks = (count + block_size - 1) / block_size, each = kThreads / lanes;
    const unsigned grid = static_cast<unsigned>((blocks + each - 1) / each);
    if (reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
        quantize_blocks<kType, true>
            <<<grid, kThreads, 0, stream>>>(weight, count, block_size, lanes, bounds, order, packed, absmax);
    } else {
        quantize_blocks<kType, false>
            <<<grid, kThreads, 0, stream>>>(weight, count, block_size, lanes, bounds, order, packed, absmax);
    }
}

}  // namespace

const char* launch_nf4_quantize(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                                const uint8_t* order, uint8_t* packed, float* absmax, void* stream) {
    if (count == 0) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DType::f32:
            launch<DType::f32>(weight, count, block_size, bounds, order, packed, absmax, cuda_stream);
            break;
        case DType::bf16:
            launch<DType::bf16>(weight, count, block_size, bounds, order, packed, absmax, cuda_stream);
            break;
        case DType::f16:
            launch<DType::f16>(weight, count, block_size, bounds, order, packed, absmax, cuda_stream);
            break;
    }
    return launched();
}

const char* launch_nf4_nest(const float* values, int64_t count, const float* bounds, bool snapped, uint8_t* index,
                            float* absmax, void* stream) {
    if (count == 0) return nullptr;
    const int64_t each = kThreads / 32 * nf4::kNestedBlock;
    const unsigned grid = static_cast<unsigned>((count + each - 1) / each);
    nest_groups<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, count, bounds, snapped, index,
                                                                          absmax);
    return launched();
}

}  // namespace peftfast::cuda
