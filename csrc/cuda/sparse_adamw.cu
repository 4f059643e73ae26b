#include "cuda/sparse_adamw.h"

#include <cuda_runtime.h>

#include "../sparse_delta.h"

namespace peftfast::cuda {
namespace {

constexpr int kWarp = 32;

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
    if (kType == DType::f32) {
        static_cast<float*>(weight)[index] = sum;
    } else if (kType == DType::bf16 && step.seed != nullptr) {
        const uint32_t draw =
            sparse::rounding_draw(static_cast<uint64_t>(*step.seed), index, static_cast<uint32_t>(step.row[10]));
        static_cast<uint16_t*>(weight)[index] = sparse::stochastic_bf16(sum, draw);
    } else {
        static_cast<uint16_t*>(weight)[index] = kType == DType::bf16 ? bf16_from_float(sum) : f16_from_float(sum);
    }
}

// Neighbours of one thread: 16 bytes of each array of bytes or float32 at a time, or what it has of ages.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Neighbours {
    T at[kCount];
};

// Those of them that lie before `count`; zeros behind.
template <class T, int kCount>
__device__ __forceinline__ Neighbours<T, kCount> taken(const T* from, int64_t s, int64_t count) {
    if (s + kCount <= count) return *reinterpret_cast<const Neighbours<T, kCount>*>(from + s);
    Neighbours<T, kCount> found = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (s + i < count) found.at[i] = from[s + i];
    }
    return found;
}

template <class T, int kCount>
__device__ __forceinline__ void given(T* to, int64_t s, int64_t count, const Neighbours<T, kCount>& values) {
    if (s + kCount <= count) {
        *reinterpret_cast<Neighbours<T, kCount>*>(to + s) = values;
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (s + i < count) to[s + i] = values.at[i];
    }
}

// The states of one thread, in float32 while a step lasts.
template <int kCount>
using States = Neighbours<float, kCount>;

// Bytes of a block of states, which is the eight neighbours of a warp's threads: the maximum never leaves the warp.
constexpr int kByteCount = sparse::kStateBlock / kWarp;

__device__ __forceinline__ States<kByteCount> decoded(const int64_t* row, const float* codes, int column, int64_t s,
                                                      int64_t count) {
    const auto bytes = taken<uint8_t, kByteCount>(address<const uint8_t>(row, column), s, count);
    const float largest = s < count ? address<const float>(row, column + 9)[s / sparse::kStateBlock] : 0.0f;
    States<kByteCount> states;
#pragma unroll
    for (int i = 0; i < kByteCount; ++i) states.at[i] = __ldg(codes + bytes.at[i]) * largest;
    return states;
}

// Called by all threads of a warp.
template <bool kSigned>
__device__ __forceinline__ void encoded(const int64_t* row, int column, int64_t s, int64_t count,
                                        const States<kByteCount>& states) {
    uint32_t most = 0;  // NaN is above infinity
#pragma unroll
    for (int i = 0; i < kByteCount; ++i) {
        const uint32_t size = s + i < count ? float_bits(states.at[i]) & 0x7fffffffu : 0u;
        most = size > most ? size : most;
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, most, distance);
        most = other > most ? other : most;
    }
    const float largest = bits_float(most), unit = most == 0 ? 1.0f : largest;
    Neighbours<uint8_t, kByteCount> bytes;
#pragma unroll
    for (int i = 0; i < kByteCount; ++i) {
#if defined(__CUDA_ARCH__)
        const float part = __fdiv_rn(states.at[i], unit);
#else
        const float part = states.at[i] / unit;
#endif
        bytes.at[i] = static_cast<uint8_t>(sparse::state_byte<kSigned>(part));
    }
    given(address<uint8_t>(row, column), s, count, bytes);
    __syncwarp();  // the maximum of before has been read by all: a shuffle puts no memory in order
    if (s < count && s % sparse::kStateBlock == 0) address<float>(row, column + 9)[s / sparse::kStateBlock] = largest;
}

// Left alone, ptxas stops at 48 registers for sm_100 and spills a word.
constexpr int kMinBlocks = 4;

// kCount neighbours a thread. A thread behind the end takes part in its warp's maxima and writes nothing.
template <DType kType, class Index, class Age, bool kBytes>
__global__ void __launch_bounds__(kAdamBlock / (kBytes ? kByteCount : 4), kMinBlocks) adamw(Adam adam) {
    constexpr int kCount = kBytes ? kByteCount : 4;
    const int64_t* row = adam.table + static_cast<int64_t>(adam.layer[blockIdx.x]) * kAdamColumns;
    const float* h = adam.hyper;
    const Step step = {row, {h[0], h[1], h[2], h[3], h[4], h[5], h[6]}, adam.corrections, adam.ages, adam.seed};
    const int64_t count = row[8], s = adam.first[blockIdx.x] + static_cast<int64_t>(threadIdx.x) * kCount;
    auto value = taken<float, kCount>(address<const float>(row, 0), s, count);
    const auto grad = taken<float, kCount>(address<const float>(row, 1), s, count);
    auto age = taken<Age, kCount>(address<const Age>(row, 4), s, count);
    States<kCount> first, second;
    if constexpr (kBytes) {
        first = decoded(row, adam.codes, 2, s, count);
        second = decoded(row, adam.codes + 256, 3, s, count);
    } else {
        first = taken<float, kCount>(address<const float>(row, 2), s, count);
        second = taken<float, kCount>(address<const float>(row, 3), s, count);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        age.at[i] = older(age.at[i]);
        const sparse::AdamState state = advance(step, {value.at[i], first.at[i], second.at[i]}, grad.at[i], age.at[i]);
        value.at[i] = state.value, first.at[i] = state.exp_avg, second.at[i] = state.exp_avg_sq;
    }
    given(address<float>(row, 0), s, count, value);
    given(address<Age>(row, 4), s, count, age);
    if constexpr (kBytes) {
        encoded<true>(row, 2, s, count, first);
        encoded<false>(row, 3, s, count, second);
    } else {
        given(address<float>(row, 2), s, count, first);
        given(address<float>(row, 3), s, count, second);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (s + i < count) put<kType, Index>(step, s + i, value.at[i]);
    }
}

template <DType kType, class Index, class Age>
void launch_states(const Adam& adam, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(adam.blocks);
    if (adam.codes != nullptr) {
        adamw<kType, Index, Age, true><<<blocks, kAdamBlock / kByteCount, 0, stream>>>(adam);
    } else {
        adamw<kType, Index, Age, false><<<blocks, kAdamBlock / 4, 0, stream>>>(adam);
    }
}

template <class Index, class Age>
void launch_typed(const Adam& adam, cudaStream_t stream) {
    switch (adam.dtype) {
        case DType::f32:
            return launch_states<DType::f32, Index, Age>(adam, stream);
        case DType::bf16:
            return launch_states<DType::bf16, Index, Age>(adam, stream);
        case DType::f16:
            return launch_states<DType::f16, Index, Age>(adam, stream);
    }
}

template <class Index>
void launch_indexed(const Adam& adam, cudaStream_t stream) {
    if (adam.wide_age) {
        launch_typed<Index, int32_t>(adam, stream);
    } else {
        launch_typed<Index, int16_t>(adam, stream);
    }
}

}  // namespace

const char* launch_sparse_adamw(const Adam& adam, void* stream) {
    if (adam.blocks == 0) return nullptr;
    if (adam.wide_index) {
        launch_indexed<int64_t>(adam, static_cast<cudaStream_t>(stream));
    } else {
        launch_indexed<int32_t>(adam, static_cast<cudaStream_t>(stream));
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
