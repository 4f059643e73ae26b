#include "cuda/sparse_delta.h"

#include <cuda_runtime.h>

#include "../sparse_delta.h"

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

template <class T>
__device__ __forceinline__ T* address(const int64_t* row, int column) {
    return reinterpret_cast<T*>(row[column]);
}

template <DType kType>
__device__ __forceinline__ float base_at(const void* base, int64_t s) {
    if (kType == DType::f32) return static_cast<const float*>(base)[s];
    const uint16_t bits = static_cast<const uint16_t*>(base)[s];
    return kType == DType::bf16 ? float_from_bf16(bits) : float_from_f16(bits);
}

struct Step {
    const int64_t* row;
    sparse::AdamHyper hyper;
    const float* corrections;
    int64_t ages;
    const int64_t* seed;
};

template <class Age>
__device__ __forceinline__ Age older(Age age) {
    constexpr Age kOldest = sizeof(Age) == 2 ? static_cast<Age>(0x7fff) : static_cast<Age>(0x7fffffff);
    return age == kOldest ? kOldest : static_cast<Age>(age + 1);
}

template <class Age>
__device__ __forceinline__ sparse::AdamState advance(const Step& step, sparse::AdamState state, float grad, Age age) {
    const int64_t at = age < 0 ? 0 : age < step.ages ? age : step.ages - 1;
    return sparse::adam(state, grad, __ldg(step.corrections + at), __ldg(step.corrections + step.ages + at),
                        step.hyper);
}

template <DType kType, class Index>
__device__ __forceinline__ void put(const Step& step, int64_t s, float value) {
    void* weight = address<void>(step.row, 5);
    if (weight == nullptr) return;
    const int64_t index = static_cast<int64_t>(address<const Index>(step.row, 6)[s]);
    if (index < 0 || index >= step.row[9]) return;
    const float sum = base_at<kType>(address<const void>(step.row, 7), s) + value;
    if (kType == DType::bf16 && step.seed != nullptr) {
        const uint32_t draw =
            sparse::rounding_draw(static_cast<uint64_t>(*step.seed), index, static_cast<uint32_t>(step.row[10]));
        static_cast<uint16_t*>(weight)[index] = sparse::stochastic_bf16(sum, draw);
    } else {
        store_as(weight, kType, index, sum);
    }
}

template <class Age>
struct alignas(4 * sizeof(Age)) AgeGroup {
    Age age[4];
};

// Four neighbours a thread: 16 bytes of each float32 array.
template <DType kType, class Index, class Age>
__global__ void __launch_bounds__(kThreads) adamw(Adam adam) {
    const int64_t* row = adam.table + static_cast<int64_t>(adam.layer[blockIdx.x]) * kAdamColumns;
    const float* h = adam.hyper;
    const Step step = {row, {h[0], h[1], h[2], h[3], h[4], h[5], h[6]}, adam.corrections, adam.ages, adam.seed};
    const int64_t count = row[8], s = adam.first[blockIdx.x] + static_cast<int64_t>(threadIdx.x) * 4;
    float *values = address<float>(row, 0), *exp_avg = address<float>(row, 2), *exp_avg_sq = address<float>(row, 3);
    const float* grads = address<const float>(row, 1);
    Age* ages = address<Age>(row, 4);
    if (s + 4 <= count) {
        const float4 value = *reinterpret_cast<const float4*>(values + s);
        const float4 grad = __ldg(reinterpret_cast<const float4*>(grads + s));
        const float4 first = *reinterpret_cast<const float4*>(exp_avg + s);
        const float4 second = *reinterpret_cast<const float4*>(exp_avg_sq + s);
        AgeGroup<Age> group = *reinterpret_cast<const AgeGroup<Age>*>(ages + s);
#pragma unroll
        for (int i = 0; i < 4; ++i) group.age[i] = older(group.age[i]);
        const sparse::AdamState a = advance(step, {value.x, first.x, second.x}, grad.x, group.age[0]);
        const sparse::AdamState b = advance(step, {value.y, first.y, second.y}, grad.y, group.age[1]);
        const sparse::AdamState c = advance(step, {value.z, first.z, second.z}, grad.z, group.age[2]);
        const sparse::AdamState d = advance(step, {value.w, first.w, second.w}, grad.w, group.age[3]);
        *reinterpret_cast<float4*>(values + s) = {a.value, b.value, c.value, d.value};
        *reinterpret_cast<float4*>(exp_avg + s) = {a.exp_avg, b.exp_avg, c.exp_avg, d.exp_avg};
        *reinterpret_cast<float4*>(exp_avg_sq + s) = {a.exp_avg_sq, b.exp_avg_sq, c.exp_avg_sq, d.exp_avg_sq};
        *reinterpret_cast<AgeGroup<Age>*>(ages + s) = group;
        put<kType, Index>(step, s, a.value);
        put<kType, Index>(step, s + 1, b.value);
        put<kType, Index>(step, s + 2, c.value);
        put<kType, Index>(step, s + 3, d.value);
        return;
    }
    for (int64_t i = s; i < count && i < s + 4; ++i) {
        const Age age = older(ages[i]);
        const sparse::AdamState state = advance(step, {values[i], exp_avg[i], exp_avg_sq[i]}, grads[i], age);
        values[i] = state.value, exp_avg[i] = state.exp_avg, exp_avg_sq[i] = state.exp_avg_sq, ages[i] = age;
        put<kType, Index>(step, i, state.value);
    }
}

template <class Index, class Age>
void launch_adamw(const Adam& adam, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(adam.blocks);
    switch (adam.dtype) {
        case DType::f32:
            adamw<DType::f32, Index, Age><<<blocks, kThreads, 0, stream>>>(adam);
            break;
        case DType::bf16:
            adamw<DType::bf16, Index, Age><<<blocks, kThreads, 0, stream>>>(adam);
            break;
        case DType::f16:
            adamw<DType::f16, Index, Age><<<blocks, kThreads, 0, stream>>>(adam);
            break;
    }
}

template <class Index>
void launch_adamw(const Adam& adam, cudaStream_t stream) {
    if (adam.wide_age) {
        launch_adamw<Index, int32_t>(adam, stream);
    } else {
        launch_adamw<Index, int16_t>(adam, stream);
    }
}

const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

static_assert(kAdamBlock == 4 * kThreads, "a thread takes four active weights");

const char* launch_sparse_delta_dvalues(const Gather& gather, void* stream) {
    if (gather.count == 0) return nullptr;
    if (gather.wide_index) {
        launch_gather<int64_t>(gather, static_cast<cudaStream_t>(stream));
    } else {
        launch_gather<int32_t>(gather, static_cast<cudaStream_t>(stream));
    }
    return launch_error();
}

const char* launch_sparse_adamw(const Adam& adam, void* stream) {
    if (adam.blocks == 0) return nullptr;
    if (adam.wide_index) {
        launch_adamw<int64_t>(adam, static_cast<cudaStream_t>(stream));
    } else {
        launch_adamw<int32_t>(adam, static_cast<cudaStream_t>(stream));
    }
    return launch_error();
}

}  // namespace peftfast::cuda
