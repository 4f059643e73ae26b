#include "../nf4.h"
#include "cuda/intrinsics.h"
#include "cuda/nf4.h"

namespace peftfast::cuda {
namespace {

// Four warps, 16 weight rows each; the rows of x are the narrow side of the tensor cores' tile (16 x 8), so that few of
// them waste little. A thread reads 32 consecutive elements of two weight rows, which are its share of eight tiles:
// which 16 columns a tile multiplies does not matter as long as weight and x agree.
constexpr int kThreads = 128;
constexpr int kChunk = 32;     // columns of a thread; four threads make kLinearColumns
constexpr int kReplicas = 16;  // of the decoding table
// Blocks an SM: at most 128 registers, and 168 where there are 32 sums.
constexpr int blocks_of(int tiles) { return tiles < 8 ? 4 : 3; }
constexpr int kFinishThreads = 128, kFinishRows = 8;  // of the second launch: columns and rows of y to a block
constexpr int kRanks = 64;                            // of S that it holds at a time

template <DType kType>
__device__ __forceinline__ float element_of(const void* data, int64_t i) {
    if (kType == DType::f32) return __ldg(static_cast<const float*>(data) + i);
    const uint16_t half = __ldg(static_cast<const uint16_t*>(data) + i);
    return kType == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

__device__ __forceinline__ float any_element(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::f32) return element_of<DType::f32>(data, i);
    return dtype == DType::bf16 ? element_of<DType::bf16>(data, i) : element_of<DType::f16>(data, i);
}

// Eight elements of a 16-byte aligned row, of the compute dtype or float32, as four pairs of the compute dtype.
template <DType kCompute>
__device__ __forceinline__ void load_pairs(const void* data, DType dtype, int64_t i, uint32_t (&pairs)[4]) {
    if (dtype == kCompute) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i));
        pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
    } else {
        const float4 low = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(data) + i));
        const float4 high = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(data) + i) + 1);
        pairs[0] = pack_pair<kCompute>(low.x, low.y), pairs[1] = pack_pair<kCompute>(low.z, low.w);
        pairs[2] = pack_pair<kCompute>(high.x, high.y), pairs[3] = pack_pair<kCompute>(high.z, high.w);
    }
}

// What a thread has read of one weight row: 32 elements and the maximum of the block that they all lie in.
struct Piece {
    uint4 words;
    float absmax;
    uint8_t byte;
    float nested;
};

__device__ __forceinline__ void load_piece(const Nf4Weight& weight, int shift, int64_t element, uint64_t policy,
                                           Piece& piece) {
    piece.words = load_once(weight.packed + element / 2, policy);
    const int64_t block = element >> shift;
    if (weight.nested_absmax != nullptr) {
        piece.byte = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
        piece.nested = __ldg(weight.nested_absmax + block / nf4::kNestedBlock);
    } else {
        piece.absmax = __ldg(static_cast<const float*>(weight.absmax) + block);
    }
}

__device__ __forceinline__ float maximum_of(const Piece& piece, bool nested, const float* nested_code, float offset) {
    return nested ? nf4::unnest(nested_code[piece.byte], piece.nested, offset) : piece.absmax;
}

// Four pairs of one 32-bit word, rounded as the dequantiser rounds them. A byte's two values lie together in the table,
// which is there once for each thread of half a warp: no two of them meet in a bank.
template <DType kCompute>
__device__ __forceinline__ void decode_word(uint32_t word, float maximum, const float2* table, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 values = table[((word >> (8 * i)) & 255u) * kReplicas];
        pairs[i] = pack_pair<kCompute>(nf4::scale_code(values.x, maximum), nf4::scale_code(values.y, maximum));
    }
}

// Products of one part of K for 64 rows of the weight, or of A past the weight's last tile; kTiles * 8 rows of x.
template <DType kCompute, int kTiles>
__global__ void __launch_bounds__(kThreads, blocks_of(kTiles))
    multiply_part(Nf4Linear p, int shift, int64_t steps_each) {
    __shared__ float2 decode[256 * kReplicas];
    __shared__ float nested_code[256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
    const int64_t weight_tiles = (p.N + kLinearTileRows - 1) / kLinearTileRows;
    const bool adapter = blockIdx.x >= weight_tiles, nested = p.weight.nested_absmax != nullptr;
    if (!adapter) {
        for (int i = threadIdx.x; i < 256 * kReplicas; i += kThreads) {
            const int byte = i / kReplicas;
            decode[i] = make_float2(__ldg(p.weight.code + byte / 16), __ldg(p.weight.code + byte % 16));
        }
        if (nested) {
            for (int i = threadIdx.x; i < 256; i += kThreads) nested_code[i] = __ldg(p.weight.nested_code + i);
        }
    }
    __syncthreads();
    const float offset = nested ? __ldg(p.weight.nested_offset) : 0.0f;
    const float2* table = decode + lane % kReplicas;
    const int64_t limit = adapter ? p.R : p.N;
    const int64_t tile = (blockIdx.x - (adapter ? weight_tiles : 0)) * kLinearTileRows + warp * 16;
    // Rows past the last read it again, and their products are dropped.
    const int64_t first_row = tile + group < limit ? tile + group : limit - 1;
    const int64_t second_row = tile + group + 8 < limit ? tile + group + 8 : limit - 1;
    const int64_t steps = p.K / kLinearColumns;
    const int64_t begin = blockIdx.y * steps_each, end = begin + steps_each < steps ? begin + steps_each : steps;
    float sums[kTiles][4] = {};
    uint64_t policy = once_policy();
    Piece first, second, next_first, next_second;
    const int64_t column = member * kChunk;
    if (!adapter && begin < end) {
        load_piece(p.weight, shift, first_row * p.K + begin * kLinearColumns + column, policy, next_first);
        load_piece(p.weight, shift, second_row * p.K + begin * kLinearColumns + column, policy, next_second);
    }
    for (int64_t step = begin; step < end; ++step) {
        const int64_t k = step * kLinearColumns + column;
        float first_maximum = 0.0f, second_maximum = 0.0f;
        if (!adapter) {
            first = next_first, second = next_second;
            if (step + 1 < end) {  // in flight while this step is multiplied
                load_piece(p.weight, shift, first_row * p.K + k + kLinearColumns, policy, next_first);
                load_piece(p.weight, shift, second_row * p.K + k + kLinearColumns, policy, next_second);
            }
            first_maximum = maximum_of(first, nested, nested_code, offset);
            second_maximum = maximum_of(second, nested, nested_code, offset);
        }
        const uint32_t first_words[4] = {first.words.x, first.words.y, first.words.z, first.words.w};
        const uint32_t second_words[4] = {second.words.x, second.words.y, second.words.z, second.words.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t upper[4], lower[4];
            if (adapter) {
                load_pairs<kCompute>(p.lora_a, p.a_dtype, first_row * p.K + k + 8 * w, upper);
                load_pairs<kCompute>(p.lora_a, p.a_dtype, second_row * p.K + k + 8 * w, lower);
            } else {
                decode_word<kCompute>(first_words[w], first_maximum, table, upper);
                decode_word<kCompute>(second_words[w], second_maximum, table, lower);
            }
            const uint32_t early[4] = {upper[0], lower[0], upper[1], lower[1]};
            const uint32_t late[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                uint32_t x[4] = {0, 0, 0, 0};
                const int64_t m = t * 8 + group;
                if (m < p.M) load_pairs<kCompute>(p.x, p.x_dtype, m * p.K + k + 8 * w, x);
                multiply_tile<kCompute>(sums[t], early, x[0], x[1]);
                multiply_tile<kCompute>(sums[t], late, x[2], x[3]);
            }
        }
    }
    const int64_t width = p.N + p.R, start = adapter ? p.N : 0;
    float* partial = p.partial + blockIdx.y * p.M * width + start;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows group and group + 8, columns 2 * member and the next
            const int64_t row = tile + group + (i / 2) * 8, m = t * 8 + 2 * member + i % 2;
            if (row < limit && m < p.M) partial[m * width + row] = sums[t][i];
        }
    }
}

__device__ __forceinline__ float rounded(float value, DType dtype) {
    if (dtype == DType::f32) return value;
    return dtype == DType::bf16 ? float_from_bf16(bf16_from_float(value)) : float_from_f16(f16_from_float(value));
}

__device__ __forceinline__ void store(void* data, DType dtype, int64_t i, float value) {
    if (dtype == DType::f32) {
        static_cast<float*>(data)[i] = value;
    } else {
        static_cast<uint16_t*>(data)[i] = dtype == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

// The parts' sum, in their order.
__device__ __forceinline__ float whole(const Nf4Linear& p, int64_t m, int64_t column) {
    const int64_t width = p.N + p.R;
    float sum = 0.0f;
    for (int64_t part = 0; part < p.splits; ++part) {
        sum = __fadd_rn(sum, p.partial[(part * p.M + m) * width + column]);
    }
    return sum;
}

__global__ void __launch_bounds__(kFinishThreads) finish(Nf4Linear p) {
    __shared__ float s[kFinishRows][kRanks];
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kFinishRows;
    const int rows = static_cast<int>(p.M - first < kFinishRows ? p.M - first : kFinishRows);
    float added[kFinishRows] = {};
    for (int64_t rank = 0; rank < p.R; rank += kRanks) {
        const int ranks = static_cast<int>(p.R - rank < kRanks ? p.R - rank : kRanks);
        for (int i = threadIdx.x; i < rows * ranks; i += kFinishThreads) {
            const int m = i / ranks, r = i % ranks;
            const float value = rounded(whole(p, first + m, p.N + rank + r), p.compute);
            s[m][r] = value;
            if (blockIdx.x == 0) store(p.s, p.compute, (first + m) * p.R + rank + r, value);
        }
        __syncthreads();
        if (n < p.N) {
            for (int r = 0; r < ranks; ++r) {
                const float b = any_element(p.lora_b, p.b_dtype, n * p.R + rank + r);
#pragma unroll
                for (int m = 0; m < kFinishRows; ++m) {
                    if (m < rows) added[m] = __fmaf_rn(s[m][r], b, added[m]);
                }
            }
        }
        __syncthreads();
    }
    if (n >= p.N) return;
    const float bias = p.bias != nullptr ? any_element(p.bias, p.bias_dtype, n) : 0.0f;
    const float lora_bias = p.lora_bias != nullptr ? any_element(p.lora_bias, p.lora_bias_dtype, n) : 0.0f;
#pragma unroll
    for (int m = 0; m < kFinishRows; ++m) {
        if (m >= rows) break;
        float value = __fadd_rn(whole(p, first + m, n), bias);
        if (p.R > 0) value = __fmaf_rn(p.scaling, __fadd_rn(added[m], lora_bias), value);
        store(p.y, p.y_dtype, (first + m) * p.N + n, value);
    }
}

template <DType kCompute, int kTiles>
void launch(const Nf4Linear& p, cudaStream_t stream) {
    int shift = 5;
    while ((int64_t{1} << shift) < p.weight.block_size) ++shift;
    const int64_t steps = p.K / kLinearColumns, each = (steps + p.splits - 1) / p.splits;
    const int64_t tiles = (p.N + kLinearTileRows - 1) / kLinearTileRows + (p.R + kLinearTileRows - 1) / kLinearTileRows;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits));
    multiply_part<kCompute, kTiles><<<grid, kThreads, 0, stream>>>(p, shift, each);
}

template <DType kCompute>
void launch(const Nf4Linear& p, cudaStream_t stream) {
    if (p.M <= 8) return launch<kCompute, 1>(p, stream);
    if (p.M <= 16) return launch<kCompute, 2>(p, stream);
    if (p.M <= 32) return launch<kCompute, 4>(p, stream);
    return launch<kCompute, 8>(p, stream);
}

}  // namespace

const char* launch_nf4_linear(const Nf4Linear& p, void* stream) {
    if (p.M == 0 || p.N == 0) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.compute == DType::bf16) {
        launch<DType::bf16>(p, cuda_stream);
    } else {
        launch<DType::f16>(p, cuda_stream);
    }
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) {
        const dim3 grid(static_cast<unsigned>((p.N + kFinishThreads - 1) / kFinishThreads),
                        static_cast<unsigned>((p.M + kFinishRows - 1) / kFinishRows));
        finish<<<grid, kFinishThreads, 0, cuda_stream>>>(p);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
