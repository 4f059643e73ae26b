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
template <DType kCompute, DType kType>
__device__ __forceinline__ void load_pairs(const char* data, uint32_t (&pairs)[4]) {
    if constexpr (kType == kCompute) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(data));
        pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
    } else {
        const float4 low = __ldg(reinterpret_cast<const float4*>(data));
        const float4 high = __ldg(reinterpret_cast<const float4*>(data) + 1);
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
        piece.nested = __ldg(weight.nested_absmax + static_cast<uint64_t>(block) / nf4::kNestedBlock);
    } else {
        piece.absmax = __ldg(static_cast<const float*>(weight.absmax) + block);
    }
}

__device__ __forceinline__ float maximum_of(const Piece& piece, bool nested, const float* nested_code, float offset) {
    return nested ? nf4::unnest(nested_code[piece.byte], piece.nested, offset) : piece.absmax;
}

// Four pairs of one 32-bit word, rounded as the dequantiser rounds them. A byte's two values lie together in the table,
// which is there once for each thread of half a warp: no two of them meet in a bank. `replica`: the thread's, in bytes;
// it takes the bits that a byte's place leaves free.
template <DType kCompute>
__device__ __forceinline__ void decode_word(uint32_t word, float maximum, const char* table, uint32_t replica,
                                            uint32_t (&pairs)[4]) {
    static_assert(kReplicas * sizeof(float2) == 128, "a byte is moved by seven bits");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t at = ((i == 0 ? word << 7 : word >> (8 * i - 7)) & (255u << 7)) | replica;
        const float2 values = *reinterpret_cast<const float2*>(table + at);
        pairs[i] = pack_pair<kCompute>(nf4::scale_code(values.x, maximum), nf4::scale_code(values.y, maximum));
    }
}

// Where a thread's part of K lies.
struct Part {
    int64_t first_row, second_row;  // of the weight or of A
    int64_t column;                 // its first
    int64_t steps;                  // of kLinearColumns
    int group;
};

// Eight columns of two rows, four pairs each, times those of x.
template <DType kCompute, DType kX, int kTiles>
__device__ __forceinline__ void multiply_eight(float (&sums)[kTiles][4], const uint32_t (&upper)[4],
                                               const uint32_t (&lower)[4], const char* x, int64_t tile_bytes,
                                               int rows) {
    const uint32_t early[4] = {upper[0], lower[0], upper[1], lower[1]};
    const uint32_t late[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        uint32_t pairs[4] = {0, 0, 0, 0};
        if (8 * t < rows) load_pairs<kCompute, kX>(x + t * tile_bytes, pairs);
        multiply_tile<kCompute>(sums[t], early, pairs[0], pairs[1]);
        multiply_tile<kCompute>(sums[t], late, pairs[2], pairs[3]);
    }
}

template <DType kCompute, DType kX, int kTiles>
__device__ __forceinline__ void multiply_weight(const Nf4Linear& p, const Part& part, int shift, const float2* decode,
                                                const float* nested_code, float (&sums)[kTiles][4]) {
    if (part.steps <= 0) return;
    constexpr int kUnrolled =
        kTiles < 4 ? 4 : 1;  // what x needs of many tiles at once would not fit into the registers
    const bool nested = p.weight.nested_absmax != nullptr;
    const float offset = nested ? __ldg(p.weight.nested_offset) : 0.0f;
    const char* table = reinterpret_cast<const char*>(decode);
    const uint32_t replica = threadIdx.x % kReplicas * sizeof(float2);
    const uint64_t policy = once_policy();
    const int64_t x_bytes = element_size(kX), tile_bytes = 8 * p.K * x_bytes;
    const char* x = static_cast<const char*>(p.x) + (part.group * p.K + part.column) * x_bytes;
    const int rows = static_cast<int>(p.M) - part.group;  // of x from the thread's first on
    int64_t first_element = part.first_row * p.K + part.column, second_element = part.second_row * p.K + part.column;
    Piece next_first, next_second;
    load_piece(p.weight, shift, first_element, policy, next_first);
    load_piece(p.weight, shift, second_element, policy, next_second);
#pragma unroll 1
    for (int64_t left = part.steps; left > 0; --left) {
        const Piece first = next_first, second = next_second;
        if (left > 1) {  // in flight while this step is multiplied
            first_element += kLinearColumns, second_element += kLinearColumns;
            load_piece(p.weight, shift, first_element, policy, next_first);
            load_piece(p.weight, shift, second_element, policy, next_second);
        }
        const float first_maximum = maximum_of(first, nested, nested_code, offset);
        const float second_maximum = maximum_of(second, nested, nested_code, offset);
        uint4 first_words = first.words, second_words = second.words;
#pragma unroll(kUnrolled)
        for (int w = 0; w < 4; ++w) {
            uint32_t upper[4], lower[4];
            decode_word<kCompute>(first_words.x, first_maximum, table, replica, upper);
            decode_word<kCompute>(second_words.x, second_maximum, table, replica, lower);
            first_words = {first_words.y, first_words.z, first_words.w, first_words.x};
            second_words = {second_words.y, second_words.z, second_words.w, second_words.x};
            multiply_eight<kCompute, kX>(sums, upper, lower, x + 8 * w * x_bytes, tile_bytes, rows);
        }
        x += kLinearColumns * x_bytes;
    }
}

template <DType kCompute, DType kX, DType kA, int kTiles>
__device__ __forceinline__ void multiply_adapter(const Nf4Linear& p, const Part& part, float (&sums)[kTiles][4]) {
    const int64_t x_bytes = element_size(kX), a_bytes = element_size(kA), tile_bytes = 8 * p.K * x_bytes;
    const char* x = static_cast<const char*>(p.x) + (part.group * p.K + part.column) * x_bytes;
    const char* a = static_cast<const char*>(p.lora_a) + (part.first_row * p.K + part.column) * a_bytes;
    const int64_t second = (part.second_row - part.first_row) * p.K * a_bytes;
    const int rows = static_cast<int>(p.M) - part.group;
#pragma unroll 1
    for (int64_t left = part.steps; left > 0; --left) {
#pragma unroll 1
        for (int w = 0; w < 4; ++w) {
            uint32_t upper[4], lower[4];
            load_pairs<kCompute, kA>(a + 8 * w * a_bytes, upper);
            load_pairs<kCompute, kA>(a + 8 * w * a_bytes + second, lower);
            multiply_eight<kCompute, kX>(sums, upper, lower, x + 8 * w * x_bytes, tile_bytes, rows);
        }
        x += kLinearColumns * x_bytes, a += kLinearColumns * a_bytes;
    }
}

// Products of one part of K for 64 rows of the weight, or of A past the weight's last tile; kTiles * 8 rows of x.
template <DType kCompute, DType kX, int kTiles>
__global__ void __launch_bounds__(kThreads, blocks_of(kTiles))
    multiply_part(Nf4Linear p, int shift, int64_t steps_each) {
    __shared__ float2 decode[256 * kReplicas];
    __shared__ float nested_code[256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
    const int64_t weight_tiles = (p.N + kLinearTileRows - 1) / kLinearTileRows;
    const bool adapter = blockIdx.x >= weight_tiles;
    const int64_t limit = adapter ? p.R : p.N;
    const int64_t tile = (blockIdx.x - (adapter ? weight_tiles : 0)) * kLinearTileRows + warp * 16;
    const int64_t steps = p.K / kLinearColumns;
    const int64_t begin = blockIdx.y * steps_each, end = begin + steps_each < steps ? begin + steps_each : steps;
    // Rows past the last read it again, and their products are dropped.
    const int64_t first_row = tile + group < limit ? tile + group : limit - 1;
    const int64_t second_row = tile + group + 8 < limit ? tile + group + 8 : limit - 1;
    const Part part = {first_row, second_row, begin * kLinearColumns + member * kChunk, end - begin, group};
    float sums[kTiles][4] = {};
    if (adapter) {
        if (p.a_dtype == kCompute) {
            multiply_adapter<kCompute, kX, kCompute>(p, part, sums);
        } else {
            multiply_adapter<kCompute, kX, DType::f32>(p, part, sums);
        }
    } else {
        // Entry high * 256 + low * 16 + replica; a thread has one replica and two low nibbles.
        static_assert(kThreads == 8 * kReplicas, "places of the table");
        const float low[2] = {__ldg(p.weight.code + threadIdx.x / kReplicas),
                              __ldg(p.weight.code + threadIdx.x / kReplicas + 8)};
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            decode[i * kThreads + threadIdx.x] = make_float2(__ldg(p.weight.code + i / 2), low[i % 2]);
        }
        if (p.weight.nested_absmax != nullptr) {
            for (int i = threadIdx.x; i < 256; i += kThreads) nested_code[i] = __ldg(p.weight.nested_code + i);
        }
        __syncthreads();
        multiply_weight<kCompute, kX>(p, part, shift, decode, nested_code, sums);
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
        if (p.R > 0 || p.lora_bias != nullptr) value = __fmaf_rn(p.scaling, __fadd_rn(added[m], lora_bias), value);
        store(p.y, p.y_dtype, (first + m) * p.N + n, value);
    }
}

template <DType kCompute, DType kX, int kTiles>
void launch(const Nf4Linear& p, cudaStream_t stream) {
    int shift = 5;
    while ((int64_t{1} << shift) < p.weight.block_size) ++shift;
    const int64_t steps = p.K / kLinearColumns, each = (steps + p.splits - 1) / p.splits;
    const int64_t tiles = (p.N + kLinearTileRows - 1) / kLinearTileRows + (p.R + kLinearTileRows - 1) / kLinearTileRows;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits));
    multiply_part<kCompute, kX, kTiles><<<grid, kThreads, 0, stream>>>(p, shift, each);
}

template <DType kCompute, DType kX>
void launch(const Nf4Linear& p, cudaStream_t stream) {
    if (p.M <= 8) return launch<kCompute, kX, 1>(p, stream);
    if (p.M <= 16) return launch<kCompute, kX, 2>(p, stream);
    if (p.M <= 32) return launch<kCompute, kX, 4>(p, stream);
    return launch<kCompute, kX, 8>(p, stream);
}

template <DType kCompute>
void launch(const Nf4Linear& p, cudaStream_t stream) {
    if (p.x_dtype == kCompute) return launch<kCompute, kCompute>(p, stream);
    return launch<kCompute, DType::f32>(p, stream);
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
