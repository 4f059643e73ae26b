#include "cuda/lora.h"

#include <cuda_runtime.h>

#include "../philox.h"

namespace peftfast::cuda {
namespace {

// A lane owns eight columns, which are one Philox counter and, in 16 bits, one 16-byte load; a warp so walks along K in
// steps of 256 columns with kRows rows and kRanks ranks at once. x is read once for every kRanks ranks.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;
constexpr int kRanks = 16;
constexpr int kLane = 8;
constexpr int kStep = 32 * kLane;

// Eight adjacent elements as float32; zeros past the end. kWhole: the eight exist or none does, 16-byte aligned.
template <DType kDtype, bool kWhole>
__device__ __forceinline__ void load_eight(const void* data, int64_t at, int64_t left, float* out) {
    if (kWhole && left > 0) {
        if (kDtype == DType::f32) {
            const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 four = __ldg(source + i);
                out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
            }
        } else {
            const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at));
            const uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint16_t half = static_cast<uint16_t>(four[i / 2] >> (16 * (i % 2)));
                out[i] = kDtype == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
        out[i] = 0.0f;
        if (kWhole || i >= left) continue;
        if (kDtype == DType::f32) {
            out[i] = static_cast<const float*>(data)[at + i];
        } else {
            const uint16_t half = static_cast<const uint16_t*>(data)[at + i];
            out[i] = kDtype == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
        }
    }
}

__device__ __forceinline__ float rounded(float value, DType dtype) {
    if (dtype == DType::bf16) return float_from_bf16(bf16_from_float(value));
    if (dtype == DType::f16) return float_from_f16(f16_from_float(value));
    return value;
}

__device__ __forceinline__ float element_of(const void* data, DType dtype, int64_t at) {
    if (dtype == DType::f32) return __ldg(static_cast<const float*>(data) + at);
    const uint16_t half = __ldg(static_cast<const uint16_t*>(data) + at);
    return dtype == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

__device__ __forceinline__ void store(void* data, DType dtype, int64_t at, float value) {
    if (dtype == DType::f32) {
        static_cast<float*>(data)[at] = value;
    } else {
        static_cast<uint16_t*>(data)[at] = dtype == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

// Grid: row blocks, rank blocks, splits of K.
template <DType kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) shrink_rows(Shrink s) {
    // w's tile as float4 [rank][half of a lane's eight][lane]: neighbouring lanes read neighbouring banks.
    __shared__ float4 tile[kRanks][2][32];
    const int lane = threadIdx.x % 32;
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows;
    const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * kRanks;
    const int64_t steps = (s.columns + kStep - 1) / kStep, per_split = (steps + s.splits - 1) / s.splits;
    const int64_t begin = blockIdx.z * per_split, end = begin + per_split < steps ? begin + per_split : steps;
    const int64_t counters = (s.columns + kLane - 1) / kLane;
    const uint64_t key = s.seed ? static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(s.seed))) : 0;
    float sum[kRows][kRanks];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int r = 0; r < kRanks; ++r) sum[m][r] = 0.0f;
    }
    for (int64_t step = begin; step < end; ++step) {
        __syncthreads();
        for (int i = threadIdx.x; i < kRanks * kStep; i += kThreads) {
            const int rank = i / kStep, column = i % kStep;
            float value = 0.0f;
            if (first_rank + rank < s.ranks && step * kStep + column < s.columns) {
                value = element_of(s.w, s.w_dtype, (first_rank + rank) * s.stride_w + step * kStep + column);
            }
            float* at = reinterpret_cast<float*>(&tile[rank][column % kLane / 4][column / kLane]);
            at[column % 4] = rounded(value, s.dtype);
        }
        __syncthreads();
        const int64_t column = step * kStep + lane * kLane, left = s.columns - column;
        float x[kRows][kLane];
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
            const int64_t row = first_row + m;
            load_eight<kDtype, kWhole>(s.x, row * s.stride_x + column, row < s.rows ? left : 0, x[m]);
            uint32_t bits = 0xffu;
            if (s.seed) {
                const uint64_t q = static_cast<uint64_t>(row * counters + column / kLane);
                bits = philox::keep_bits(philox::words_at(key, q, 0, philox::kStreamDropout), s.threshold);
            }
#pragma unroll
            for (int i = 0; i < kLane; ++i) x[m][i] = bits >> i & 1u ? x[m][i] : 0.0f;
            if (s.dtype != kDtype) {
#pragma unroll
                for (int i = 0; i < kLane; ++i) x[m][i] = rounded(x[m][i], s.dtype);
            }
        }
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            const float4 low = tile[r][0][lane], high = tile[r][1][lane];
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
                float part = fmaf(x[m][0], low.x, fmaf(x[m][1], low.y, fmaf(x[m][2], low.z, x[m][3] * low.w)));
                part = fmaf(x[m][4], high.x, fmaf(x[m][5], high.y, fmaf(x[m][6], high.z, fmaf(x[m][7], high.w, part))));
                sum[m][r] += part;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            float total = sum[m][r];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                total += __shfl_xor_sync(0xffffffffu, total, distance);
            }
            const int64_t row = first_row + m, rank = first_rank + r;
            if (lane != (m * kRanks + r) % 32 || row >= s.rows || rank >= s.ranks) continue;
            const int64_t at = row * s.ranks + rank;
            if (s.splits == 1) {
                store(s.out, s.dtype, at, total * s.scale);
            } else {
                s.partials[blockIdx.z * s.rows * s.ranks + at] = total;
            }
        }
    }
}

// out = scale * the sum of the partials, first to last.
__global__ void __launch_bounds__(kThreads) add_partials(Shrink s) {
    const int64_t count = s.rows * s.ranks, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= count) return;
    float total = 0.0f;
    for (int64_t split = 0; split < s.splits; ++split) total += s.partials[split * count + at];
    store(s.out, s.dtype, at, total * s.scale);
}

template <DType kDtype>
void launch(const Shrink& s, bool whole, dim3 grid, cudaStream_t stream) {
    if (whole) {
        shrink_rows<kDtype, true><<<grid, kThreads, 0, stream>>>(s);
    } else {
        shrink_rows<kDtype, false><<<grid, kThreads, 0, stream>>>(s);
    }
}

}  // namespace

const char* launch_lora_shrink(const Shrink& s, void* stream) {
    if (s.rows == 0 || s.ranks == 0) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    const int64_t each = kWarps * kRows;
    const dim3 grid(static_cast<unsigned>((s.rows + each - 1) / each),
                    static_cast<unsigned>((s.ranks + kRanks - 1) / kRanks), static_cast<unsigned>(s.splits));
    const int64_t size = element_size(s.x_dtype);
    const bool whole =
        s.columns % kLane == 0 && s.stride_x * size % 16 == 0 && reinterpret_cast<uintptr_t>(s.x) % 16 == 0;
    if (s.x_dtype == DType::f32) {
        launch<DType::f32>(s, whole, grid, cuda_stream);
    } else if (s.x_dtype == DType::bf16) {
        launch<DType::bf16>(s, whole, grid, cuda_stream);
    } else {
        launch<DType::f16>(s, whole, grid, cuda_stream);
    }
    if (s.splits > 1) {
        const int64_t blocks = (s.rows * s.ranks + kThreads - 1) / kThreads;
        add_partials<<<static_cast<unsigned>(blocks), kThreads, 0, cuda_stream>>>(s);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
