#include "cuda/zeroth_order.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "../philox.h"
#include "cuda/units.h"

namespace peftfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kWarpMask = 0xffffffffu;

// Units of 16 bytes a lane, `kUnit` elements each; a warp's tile is 32 times as much. Signs cost little beside the 128
// that their counter gives, and 1024 elements ask for as many words of signs as a warp has lanes. Where two results, or
// normals, take registers and code, it is half of that.
PEFTFAST_HD constexpr int units_of(DType dtype, bool minus, bool rademacher) {
    return dtype == DType::f32 || (rademacher && !minus) ? 4 : 2;
}
constexpr int64_t block_elements(DType dtype, bool minus, bool rademacher) {
    return units_of(dtype, minus, rademacher) * (dtype == DType::f32 ? 4 : 8) * kThreads;
}

struct Entry {
    const void* source;
    void* out;
    void* minus;
    int64_t count;
    int64_t offset;
    int64_t first_block;
    int64_t before;  // blocks of the logical tensor before the first, less first_block
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

// Stochastically, by a counter's eight draws.
template <DType kType>
__device__ __forceinline__ uint4 narrowed_by(const float (&values)[kUnit<kType>], const philox::Words& noise) {
    if constexpr (kType == DType::f32) return narrowed<kType>(values);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < kUnit<kType> / 2; ++i) {
        const uint32_t low = noise.word[i] & 0xffffu, high = noise.word[i] >> 16;
        if (kType == DType::bf16) {
            words[i] = bf16_from_float_by(values[2 * i], low) |
                       static_cast<uint32_t>(bf16_from_float_by(values[2 * i + 1], high)) << 16;
        } else {
            words[i] = f16_from_float_by(values[2 * i], low) |
                       static_cast<uint32_t>(f16_from_float_by(values[2 * i + 1], high)) << 16;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Elements `at` and on of the `count` at `source`, through shared memory: zeros in the place of those that are not
// there, which may be some at the front as well as some behind.
template <class T, int kUnits>
__device__ __forceinline__ void load_part(uint4 (&tile)[kUnits], const T* source, int64_t at, int64_t count,
                                          uint4* staging, int lane) {
    T* staged = reinterpret_cast<T*>(staging);
#pragma unroll 4
    for (int i = lane; i < kUnits * static_cast<int>(32 * sizeof(uint4) / sizeof(T)); i += 32) {
        staged[i] = at + i >= 0 && at + i < count ? source[at + i] : T{};
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) tile[u] = staging[32 * u + lane];
}

template <class T, int kUnits>
__device__ __forceinline__ void store_part(const uint4 (&tile)[kUnits], T* out, int64_t at, int64_t count,
                                           uint4* staging, int lane) {
    __syncwarp();  // what lay there before has been read
#pragma unroll
    for (int u = 0; u < kUnits; ++u) staging[32 * u + lane] = tile[u];
    __syncwarp();
    const T* staged = reinterpret_cast<const T*>(staging);
#pragma unroll 4
    for (int i = lane; i < kUnits * static_cast<int>(32 * sizeof(uint4) / sizeof(T)); i += 32) {
        if (at + i >= 0 && at + i < count) out[at + i] = staged[i];
    }
}

// Each of a tile's kCounters counters of signs is computed by four lanes, of which each keeps another word: lane l word
// l / kCounters of counter l % kCounters.
template <int kCounters>
__device__ __forceinline__ uint32_t signs_of_lane(uint64_t seed, uint64_t first, uint32_t tensor_id, int lane) {
    const philox::Words words =
        philox::words_at(seed, first | (lane % kCounters), tensor_id, philox::kStreamRademacher);
    const int word = lane / kCounters % 4;
    const uint32_t low = word & 1 ? words.word[1] : words.word[0], high = word & 1 ? words.word[3] : words.word[2];
    return word & 2 ? high : low;
}

// kPlain: no thresholds, rounded to nearest.
template <DType kType, bool kMinus, bool kRademacher, bool kPlain>
__global__ void __launch_bounds__(kThreads) apply(const __grid_constant__ Launch launch) {
    using T = std::conditional_t<kType == DType::f32, uint32_t, uint16_t>;
    constexpr int kElements = kUnit<kType>, kUnits = units_of(kType, kMinus, kRademacher);
    constexpr int kTile = 32 * kElements * kUnits;
    __shared__ uint4 staging[kWarps][32 * kUnits];
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
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t block = entry.before + static_cast<int64_t>(blockIdx.x);
    const int64_t element = (block * kWarps + warp) * kTile, at = element - entry.offset;
    // Of all of the block, so that no warp can diverge.
    const int64_t front = block * kWarps * kTile - entry.offset;
    const bool whole = entry.aligned && front >= 0 && front + kWarps * kTile <= entry.count;
    const bool sourced = entry.source != nullptr;
    uint4 before[kUnits];
    const T* source = static_cast<const T*>(entry.source);
    if (sourced && whole) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) before[u] = reinterpret_cast<const uint4*>(source + at)[32 * u + lane];
    } else if (sourced) {
        load_part(before, source, at, entry.count, staging[warp], lane);
    } else {  // -0, which leaves every term as it is
        const uint32_t zeros = kType == DType::f32 ? 0x80000000u : 0x80008000u;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) before[u] = make_uint4(zeros, zeros, zeros, zeros);
    }
    const float decay = terms.decay != nullptr && sourced ? __ldg(terms.decay) : 1.0f;
    float plus[kUnits][kElements], minus[kUnits][kElements];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
        widen<kType>(before[u], plus[u]);
#pragma unroll
        for (int i = 0; i < kElements; ++i) plus[u][i] = minus[u][i] = plus[u][i] * decay;
    }
    for (int64_t k = 0; k < terms.count; ++k) {
        const float coefficient = __ldg(terms.coefficients + k);
        if (coefficient == 0.0f) continue;
        const uint64_t seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(terms.seeds) + k));
        if (kRademacher) {
            // The lane's elements of a unit have their signs in one word, which is one `step` counters further in the
            // next unit.
            constexpr int kSigns = static_cast<int>(philox::kSignsPerCounter), kCounters = kTile / kSigns;
            constexpr int kStep = 32 * kElements / kSigns;
            const uint32_t own =
                signs_of_lane<kCounters>(seed, static_cast<uint64_t>(element / kSigns), entry.tensor_id, lane);
            const int first = lane * kElements, from = first % kSigns / 32 * kCounters + first / kSigns;
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                const uint32_t bits = __shfl_sync(kWarpMask, own, from + u * kStep) >> (first % 32);
#pragma unroll
                for (int i = 0; i < kElements; ++i) {
                    const float term = bits_float(float_bits(coefficient) ^ (bits << (31 - i) & 0x80000000u));
                    plus[u][i] = plus[u][i] + term;
                    if (kMinus) minus[u][i] = minus[u][i] - term;
                }
            }
        } else {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
#pragma unroll
                for (int i = 0; i < kElements; i += 4) {
                    const uint64_t q = static_cast<uint64_t>(element / 4) | ((32 * u + lane) * (kElements / 4) + i / 4);
                    const philox::Words words = philox::words_at(seed, q, entry.tensor_id, philox::kStreamGaussian);
                    const philox::Pair first = philox::normal_pair(words.word[0], words.word[1]);
                    const philox::Pair second = philox::normal_pair(words.word[2], words.word[3]);
                    const float z[4] = {first.first, first.second, second.first, second.second};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float term = coefficient * z[j];
                        plus[u][i + j] = plus[u][i + j] + term;
                        if (kMinus) minus[u][i + j] = minus[u][i + j] - term;
                    }
                }
            }
        }
    }
    if (!kPlain && terms.thresholds != nullptr) {
        const float threshold = __ldg(terms.thresholds + low);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            float stays[kElements];
            widen<kType>(before[u], stays);
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
                const bool moves = fabsf(stays[i]) <= threshold;
                plus[u][i] = moves ? plus[u][i] : stays[i];
                if (kMinus) minus[u][i] = moves ? minus[u][i] : stays[i];
            }
        }
    }
    uint4 after[kUnits];
    if (!kPlain && kType != DType::f32 && terms.rounding_seed != nullptr) {
        const uint64_t seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(terms.rounding_seed)));
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const uint64_t q = static_cast<uint64_t>(element / philox::kDrawsPerCounter) | (32 * u + lane);
            after[u] = narrowed_by<kType>(plus[u], philox::words_at(seed, q, entry.tensor_id, philox::kStreamRounding));
        }
    } else {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) after[u] = narrowed<kType>(plus[u]);
    }
    T* out = static_cast<T*>(entry.out);
    T* other = static_cast<T*>(entry.minus);
    uint4 opposite[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) opposite[u] = kMinus ? narrowed<kType>(minus[u]) : uint4();
    if (whole) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            reinterpret_cast<uint4*>(out + at)[32 * u + lane] = after[u];
            if (kMinus) reinterpret_cast<uint4*>(other + at)[32 * u + lane] = opposite[u];
        }
    } else {
        store_part(after, out, at, entry.count, staging[warp], lane);
        if (kMinus) store_part(opposite, other, at, entry.count, staging[warp], lane);
    }
}

template <DType kType, bool kMinus, bool kRademacher>
void start(const Launch& launch, unsigned blocks, cudaStream_t stream) {
    if (launch.terms.thresholds == nullptr && (kType == DType::f32 || launch.terms.rounding_seed == nullptr)) {
        apply<kType, kMinus, kRademacher, true><<<blocks, kThreads, 0, stream>>>(launch);
    } else {
        apply<kType, kMinus, kRademacher, false><<<blocks, kThreads, 0, stream>>>(launch);
    }
}

template <DType kType>
void start(const Launch& launch, int64_t blocks, bool minus, cudaStream_t stream) {
    const unsigned grid = static_cast<unsigned>(blocks);
    if (minus) {
        if (launch.terms.rademacher) return start<kType, true, true>(launch, grid, stream);
        return start<kType, true, false>(launch, grid, stream);
    }
    if (launch.terms.rademacher) return start<kType, false, true>(launch, grid, stream);
    return start<kType, false, false>(launch, grid, stream);
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
        const bool minus = tensors[begin].minus != nullptr;
        const int64_t each = block_elements(dtype, minus, terms.rademacher);
        int64_t blocks = 0;
        const int64_t end = begin + kZoTensors < count ? begin + kZoTensors : count;
        launch.tensors = static_cast<int32_t>(end - begin);
        for (int64_t t = begin; t < end; ++t) {
            const ZoTensor& one = tensors[t];
            const int64_t before = one.offset / each;
            launch.entries[t - begin] = {one.source, one.out,         one.minus,     one.count,   one.offset,
                                         blocks,     before - blocks, one.tensor_id, aligned(one)};
            if (one.count) blocks += (one.offset + one.count + each - 1) / each - before;
        }
        if (blocks == 0) continue;
        if (blocks > 0x7fffffff) return "more than 2**42 elements in one launch";
        switch (dtype) {
            case DType::f32:
                start<DType::f32>(launch, blocks, minus, cuda_stream);
                break;
            case DType::bf16:
                start<DType::bf16>(launch, blocks, minus, cuda_stream);
                break;
            case DType::f16:
                start<DType::f16>(launch, blocks, minus, cuda_stream);
                break;
        }
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    return nullptr;
}

}  // namespace peftfast::cuda
