#include "cuda/zeroth_order.h"

#include <cuda_runtime.h>

#include "../philox.h"

namespace peftfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlock = 2048;  // elements: eight a thread, a multiple of the 128 signs of a counter

struct Entry {
    const void* source;
    void* out;
    void* minus;
    int64_t count;
    int64_t offset;
    int64_t first_block;
    uint32_t tensor_id;
    uint32_t aligned;  // pointers and offset allow 16-byte accesses
};

// The whole table travels as a kernel parameter (up to 32,764 bytes since CUDA 12.1): no copy to the device, and a
// captured graph holds it.
struct Launch {
    ZoTerms terms;
    int32_t tensors;
    Entry entries[kZoTensors];
};
static_assert(sizeof(Launch) <= 32764, "kernel parameters");

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(Bf16 value) { return float_from_bf16(value.bits); }
__device__ __forceinline__ float widened(F16 value) { return float_from_f16(value.bits); }
__device__ __forceinline__ void narrow_to(float& out, float value) { out = value; }
__device__ __forceinline__ void narrow_to(Bf16& out, float value) { out.bits = bf16_from_float(value); }
__device__ __forceinline__ void narrow_to(F16& out, float value) { out.bits = f16_from_float(value); }
__device__ __forceinline__ void narrow_by(float& out, float value, uint32_t) { out = value; }
__device__ __forceinline__ void narrow_by(Bf16& out, float value, uint32_t draw) {
    out.bits = bf16_from_float_by(value, draw);
}
__device__ __forceinline__ void narrow_by(F16& out, float value, uint32_t draw) {
    out.bits = f16_from_float_by(value, draw);
}

// z of the kWidth elements from `element` on, a multiple of kWidth.
template <int kWidth, bool kRademacher>
__device__ __forceinline__ void direction(float* z, uint64_t seed, int64_t element, uint32_t tensor_id) {
    if (kRademacher) {
        const philox::Words words = philox::words_at(seed, static_cast<uint64_t>(element / philox::kSignsPerCounter),
                                                     tensor_id, philox::kStreamRademacher);
        const int bit = static_cast<int>(element % philox::kSignsPerCounter);
        const uint32_t low = bit & 32 ? words.word[1] : words.word[0], high = bit & 32 ? words.word[3] : words.word[2];
        const uint32_t bits = (bit & 64 ? high : low) >> (bit & 31);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = philox::sign_of(bits, i);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const philox::Words words =
                philox::words_at(seed, static_cast<uint64_t>(element / 4 + i / 4), tensor_id, philox::kStreamGaussian);
            const philox::Pair first = philox::normal_pair(words.word[0], words.word[1]);
            const philox::Pair second = philox::normal_pair(words.word[2], words.word[3]);
            z[i] = first.first, z[i + 1] = first.second, z[i + 2] = second.first, z[i + 3] = second.second;
        }
    }
}

template <class T, int kWidth>
__device__ __forceinline__ void load(T (&values)[kWidth], const void* source, int64_t at, int64_t count, bool whole) {
    const T* from = static_cast<const T*>(source) + at;
    if (whole) {
        *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] = at + i >= 0 && at + i < count ? from[i] : T{};
    }
}

template <class T, int kWidth>
__device__ __forceinline__ void store(const float (&values)[kWidth], void* out, int64_t at, int64_t count, bool whole,
                                      const uint32_t* noise) {
    alignas(16) T narrow[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if (noise != nullptr) {
            narrow_by(narrow[i], values[i], (noise[i / 2] >> (16 * (i % 2))) & 0xffffu);
        } else {
            narrow_to(narrow[i], values[i]);
        }
    }
    T* to = static_cast<T*>(out) + at;
    if (whole) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(narrow);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (at + i >= 0 && at + i < count) to[i] = narrow[i];
        }
    }
}

template <class T, bool kMinus, bool kRademacher>
__global__ void __launch_bounds__(kThreads) apply(const __grid_constant__ Launch launch) {
    constexpr int kWidth = 16 / sizeof(T);  // elements of one access
    int low = 0, high = launch.tensors;
    while (high - low > 1) {  // the last tensor whose first block is not after this one
        const int middle = (low + high) / 2;
        if (launch.entries[middle].first_block <= static_cast<int64_t>(blockIdx.x)) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const Entry& entry = launch.entries[low];
    const ZoTerms& terms = launch.terms;
    const int64_t block = entry.offset / kBlock + static_cast<int64_t>(blockIdx.x) - entry.first_block;
    const float decay = terms.decay != nullptr ? __ldg(terms.decay) : 1.0f;
    // Eight elements a thread, in accesses that lie next to those of its neighbours.
#pragma unroll 1
    for (int unit = 0; unit < 8 / kWidth; ++unit) {
        const int64_t element = block * kBlock + (unit * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
        const int64_t at = element - entry.offset;
        if (at + kWidth <= 0 || at >= entry.count) continue;
        const bool whole = entry.aligned && at >= 0 && at + kWidth <= entry.count;
        float before[kWidth], plus[kWidth], minus[kWidth];
        if (entry.source != nullptr) {
            alignas(16) T values[kWidth];
            load<T, kWidth>(values, entry.source, at, entry.count, whole);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) before[i] = widened(values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) before[i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) plus[i] = minus[i] = before[i] * decay;
        for (int64_t k = 0; k < terms.count; ++k) {
            const float coefficient = __ldg(terms.coefficients + k);
            if (coefficient == 0.0f) continue;
            float z[kWidth];
            const uint64_t seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(terms.seeds) + k));
            direction<kWidth, kRademacher>(z, seed, element, entry.tensor_id);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const float term = coefficient * z[i];
                plus[i] = entry.source != nullptr ? plus[i] + term : term;
                if (kMinus) minus[i] = minus[i] - term;
            }
        }
        if (terms.thresholds != nullptr) {
            const float threshold = __ldg(terms.thresholds + low);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const bool moves = fabsf(before[i]) <= threshold;
                plus[i] = moves ? plus[i] : before[i];
                if (kMinus) minus[i] = moves ? minus[i] : before[i];
            }
        }
        if (terms.rounding_seed != nullptr && sizeof(T) == 2) {
            const uint64_t seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(terms.rounding_seed)));
            const philox::Words noise =
                philox::words_at(seed, static_cast<uint64_t>(element / philox::kDrawsPerCounter), entry.tensor_id,
                                 philox::kStreamRounding);
            store<T, kWidth>(plus, entry.out, at, entry.count, whole, noise.word);
        } else {
            store<T, kWidth>(plus, entry.out, at, entry.count, whole, nullptr);
        }
        if (kMinus) store<T, kWidth>(minus, entry.minus, at, entry.count, whole, nullptr);
    }
}

template <class T>
void start(const Launch& launch, int64_t blocks, bool minus, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(blocks));
    if (minus) {
        if (launch.terms.rademacher) {
            apply<T, true, true><<<grid, kThreads, 0, stream>>>(launch);
        } else {
            apply<T, true, false><<<grid, kThreads, 0, stream>>>(launch);
        }
    } else if (launch.terms.rademacher) {
        apply<T, false, true><<<grid, kThreads, 0, stream>>>(launch);
    } else {
        apply<T, false, false><<<grid, kThreads, 0, stream>>>(launch);
    }
}

bool aligned(const ZoTensor& tensor) {
    const uintptr_t pointers = reinterpret_cast<uintptr_t>(tensor.source) | reinterpret_cast<uintptr_t>(tensor.out) |
                               reinterpret_cast<uintptr_t>(tensor.minus);
    return pointers % 16 == 0 && tensor.offset % 8 == 0;
}

}  // namespace

const char* launch_zo_apply(const ZoTensor* tensors, int64_t count, const ZoTerms& terms, DType dtype, void* stream) {
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    for (int64_t begin = 0; begin < count; begin += kZoTensors) {
        Launch launch = {};
        launch.terms = terms;
        if (terms.thresholds != nullptr) launch.terms.thresholds += begin;
        int64_t blocks = 0;
        const int64_t end = begin + kZoTensors < count ? begin + kZoTensors : count;
        launch.tensors = static_cast<int32_t>(end - begin);
        for (int64_t t = begin; t < end; ++t) {
            const ZoTensor& one = tensors[t];
            launch.entries[t - begin] = {one.source, one.out, one.minus,     one.count,
                                         one.offset, blocks,  one.tensor_id, aligned(one)};
            const int64_t last = (one.offset + one.count + kBlock - 1) / kBlock;
            if (one.count) blocks += last - one.offset / kBlock;
        }
        if (blocks == 0) continue;
        if (blocks > 0x7fffffff) return "more than 2**42 elements in one launch";
        const bool minus = tensors[begin].minus != nullptr;
        switch (dtype) {
            case DType::f32:
                start<float>(launch, blocks, minus, cuda_stream);
                break;
            case DType::bf16:
                start<Bf16>(launch, blocks, minus, cuda_stream);
                break;
            case DType::f16:
                start<F16>(launch, blocks, minus, cuda_stream);
                break;
        }
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    return nullptr;
}

}  // namespace peftfast::cuda
