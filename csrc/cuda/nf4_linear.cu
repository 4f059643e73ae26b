#include "../nf4.h"
#include "cuda/intrinsics.h"
#include "cuda/nf4.h"

namespace peftfast::cuda {
namespace {

// A warp multiplies 16 weight rows; the rows of x are the narrow side of the tensor cores' tile (16 x 8), so that few
// of them waste little. A thread reads 32 consecutive elements of two weight rows, which are its share of eight tiles:
// which 16 columns a tile multiplies does not matter as long as weight and x agree. One block fills a multiprocessor:
// its warps go their own ways and have the decoding table in common, which takes as long to write as three of their
// units. With more rows of x it is x whose reading takes the time: there a warp multiplies 32 weight rows with what it
// has read of it, for which fewer warps have the registers.
template <int kTiles>  // of x
constexpr bool kIsWide = 8 * kTiles > kLinearTileRows;

template <bool kWide>
struct Form {
    static constexpr int kRowTiles = kWide ? kLinearWideTileRows / kLinearTileRows : 1;
    static constexpr int kThreads = 32 * (kWide ? kLinearWideWarps : kLinearWarps);
};

constexpr int kChunk = 32;  // columns of a thread
constexpr int kUnitChunks = kLinearColumns / kChunk;
constexpr int kReplicas = 16;  // of the decoding table
constexpr int kTableBytes = 256 * 256, kShared = kTableBytes + 256 * sizeof(float);
constexpr int kFinishThreads = 128, kFinishRows = 8;  // of the second launch: columns and rows of y to a block
constexpr int kRanks = 64;                            // of S that it holds at a time
constexpr int kPartLanes = 4;                         // which share the parts of one element of S

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

// A chunk is kChunk elements, whose number has 32 bits, and a block 2^shift of them. This and a loop for each kind of
// maxima save a sixth of the instructions.
template <bool kWide>
__device__ __forceinline__ void load_piece(const Nf4Weight& weight, bool nested, int shift, uint32_t chunk,
                                           uint64_t policy, Piece& piece) {
    static_assert(kLinearElements / kChunk <= int64_t{1} << 32, "a chunk's number");
    const uint8_t* const packed = weight.packed + uint64_t{chunk} * (kChunk / 2);
    piece.words = kWide ? load_past_l1(packed) : load_once(packed, policy);
    const uint32_t block = chunk >> shift;
    if (nested) {
        piece.byte = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
        piece.nested = __ldg(weight.nested_absmax + block / static_cast<uint32_t>(nf4::kNestedBlock));
    } else {
        piece.absmax = __ldg(static_cast<const float*>(weight.absmax) + block);
    }
}

__device__ __forceinline__ float maximum_of(const Piece& piece, bool nested, const float* nested_code, float offset) {
    return nested ? nf4::unnest(nested_code[piece.byte], piece.nested, offset) : piece.absmax;
}

// Four pairs of one 32-bit word, rounded as the dequantiser rounds them. A byte's two values lie together in the table,
// which is there once for each lane of half a warp: no two of them meet in a bank. Where a value lies is two bytes put
// together, the packed one and `replica`, the lane's place; so each byte has 256 bytes of the table and uses half of
// them.
template <DType kCompute>
__device__ __forceinline__ void decode_word(uint32_t word, float maximum, const char* table, uint32_t replica,
                                            uint32_t (&pairs)[4]) {
    static_assert(kReplicas * sizeof(float2) <= 256, "a packed byte is the place's second byte");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t at = __byte_perm(word, replica, 0x5504 | i << 4);
        const float2 values = *reinterpret_cast<const float2*>(table + at);
        pairs[i] = pack_pair<kCompute>(nf4::scale_code(values.x, maximum), nf4::scale_code(values.y, maximum));
    }
}

__device__ __forceinline__ uint32_t first_unit(const Nf4LinearShares& shares, uint32_t warp) {
    return warp * shares.each + (warp < shares.more ? warp : shares.more);
}

__device__ __forceinline__ uint32_t warp_of(const Nf4LinearShares& shares, uint32_t unit) {
    const uint32_t longer = shares.more * (shares.each + 1);
    return unit < longer ? unit / (shares.each + 1) : shares.more + (unit - longer) / shares.each;
}

// A row tile and a group of rows of x, which units count together. Few rows are one group.
template <bool kWide>
struct Target {
    uint32_t tile;
    int first;  // row of x

    static_assert(kLinearRows <= 2 * kLinearGroupRows, "one group or two");
    __device__ __forceinline__ Target(const Nf4LinearShares& shares, uint32_t number)
        : tile(kWide ? number >> (shares.groups - 1) : number),
          first(kWide ? static_cast<int>(number & (shares.groups - 1)) * kLinearGroupRows : 0) {}
};

// The places in a matrix [limit, width] of the rows that a thread has of a row tile, two of each 16. Rows past the last
// are the last again, and their products are dropped.
template <class Place, int kRowTiles>
struct Rows {
    Place at[2 * kRowTiles];

    __device__ __forceinline__ void enter(Place tile, Place column, Place limit, Place width) {
        const Place first = tile * (kRowTiles * kLinearTileRows) + threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const Place row = first + 8 * i;
            at[i] = (row < limit ? row : limit - 1) * width + column;
        }
    }
};

// A warp's sums of one row tile, into its part of them.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void store_sums(float* part, uint32_t tile, int first_of_x, int64_t limit, int64_t M,
                                           const float (&sums)[kRowTiles][kTiles][4]) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // rows group and group + 8, columns 2 * member and the next
                const int64_t row = int64_t{tile} * (kRowTiles * kLinearTileRows) + group + (2 * r + i / 2) * 8;
                const int64_t m = first_of_x + t * 8 + 2 * member + i % 2;
                if (row < limit && m < M) part[m * limit + row] = sums[r][t][i];
            }
        }
    }
}

// Eight columns of a thread's rows, four pairs each, times those of x.
template <DType kCompute, DType kX, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_eight(float (&sums)[kRowTiles][kTiles][4],
                                               const uint32_t (&pairs)[2 * kRowTiles][4], const char* x,
                                               int64_t tile_bytes, int rows) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        uint32_t of_x[4] = {0, 0, 0, 0};
        if (8 * t < rows) load_pairs<kCompute, kX>(x + t * tile_bytes, of_x);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            const uint32_t (&upper)[4] = pairs[2 * r], (&lower)[4] = pairs[2 * r + 1];
            const uint32_t early[4] = {upper[0], lower[0], upper[1], lower[1]};
            const uint32_t late[4] = {upper[2], lower[2], upper[3], lower[3]};
            multiply_tile<kCompute>(sums[r][t], early, of_x[0], of_x[1]);
            multiply_tile<kCompute>(sums[r][t], late, of_x[2], of_x[3]);
        }
    }
}

// A warp's units of the weight, `left` of them from unit `step` of a row tile and a group on, and of the first of them
// what was read before the decoding table is there.
template <bool kWide>
struct Walk {
    static constexpr int kRows = 2 * Form<kWide>::kRowTiles;  // a thread's

    uint32_t number, step;
    int left;
    Rows<uint32_t, Form<kWide>::kRowTiles> rows;  // in chunks
    Piece pieces[kRows];

    __device__ __forceinline__ void enter(const Nf4Linear& p, uint32_t tile, uint32_t step) {
        rows.enter(tile, step * kUnitChunks + threadIdx.x % kUnitChunks, static_cast<uint32_t>(p.N),
                   static_cast<uint32_t>(p.K / kChunk));
    }

    __device__ __forceinline__ void go_on() {
#pragma unroll
        for (int i = 0; i < kRows; ++i) rows.at[i] += kUnitChunks;
    }

    __device__ __forceinline__ void read(const Nf4Weight& weight, bool nested, int shift, uint64_t policy) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) load_piece<kWide>(weight, nested, shift, rows.at[i], policy, pieces[i]);
    }
};

template <DType kCompute, DType kX, int kTiles, bool kNested>
__device__ __forceinline__ void multiply_weight(const Nf4Linear& p, const Nf4LinearShares& shares, int shift,
                                                uint32_t warp, uint64_t policy, const char* table,
                                                const float* nested_code, Walk<kIsWide<kTiles>>& walk) {
    constexpr bool kWide = kIsWide<kTiles>;
    constexpr int kRows = Walk<kWide>::kRows;
    const float offset = kNested ? __ldg(p.weight.nested_offset) : 0.0f;
    const uint32_t replica = threadIdx.x % kReplicas * sizeof(float2);
    const int64_t x_bytes = element_size(kX), tile_bytes = 8 * p.K * x_bytes;
    const int group = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * kChunk;
    const char* first_of_x = static_cast<const char*>(p.x) + (group * p.K + column) * x_bytes;
    float* partial = p.partial + shares.adapter_scratch;
    while (true) {
        const Target<kWide> target(shares, walk.number);
        const char* x = first_of_x + (target.first * p.K + int64_t{walk.step} * kLinearColumns) * x_bytes;
        const int rows = static_cast<int>(p.M) - target.first - group;  // of x from the thread's first on
        const int in_tile = static_cast<int>(shares.steps - walk.step),
                  here = walk.left < in_tile ? walk.left : in_tile;
        const int last = walk.left > here ? 0 : 1;  // with so many steps left there is nothing more to read
        float sums[Form<kWide>::kRowTiles][kTiles][4] = {};
#pragma unroll 1
        for (int left = here; left > 0; --left) {
            Piece pieces[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) pieces[i] = walk.pieces[i];
            if (left > last) {  // in flight while this unit is multiplied
                if (left > 1) {
                    walk.go_on();
                } else {
                    walk.enter(p, Target<kWide>(shares, walk.number + 1).tile, 0);
                }
                walk.read(p.weight, kNested, shift, policy);
            }
            float maxima[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) maxima[i] = maximum_of(pieces[i], kNested, nested_code, offset);
#pragma unroll(kWide ? 2 : 4)
            for (int w = 0; w < 4; ++w) {
                uint32_t pairs[kRows][4];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    uint4& words = pieces[i].words;
                    decode_word<kCompute>(words.x, maxima[i], table, replica, pairs[i]);
                    words = {words.y, words.z, words.w, words.x};
                }
                multiply_eight<kCompute, kX>(sums, pairs, x + 8 * w * x_bytes, tile_bytes, rows);
            }
            x += kLinearColumns * x_bytes;
        }
        const int64_t part = warp - warp_of(shares, shares.adapter_units + walk.number * shares.steps);
        store_sums(partial + part * p.M * p.N, target.tile, target.first, p.N, p.M, sums);
        walk.left -= here;
        if (walk.left == 0) return;
        ++walk.number, walk.step = 0;
    }
}

// Units begin .. end, which are A's.
template <DType kCompute, DType kX, DType kA, int kTiles>
__device__ __forceinline__ void multiply_adapter(const Nf4Linear& p, const Nf4LinearShares& shares, uint32_t warp,
                                                 uint32_t begin, uint32_t end) {
    constexpr int kColumns = 32;  // of the warp at a time, eight of a thread
    const int64_t x_bytes = element_size(kX), a_bytes = element_size(kA), tile_bytes = 8 * p.K * x_bytes;
    const int group = threadIdx.x % 32 / 4;
    while (begin < end) {
        const uint32_t number = begin / shares.adapter_steps, step = begin - number * shares.adapter_steps;
        const uint32_t in_tile = shares.adapter_steps - step, here = end - begin < in_tile ? end - begin : in_tile;
        const int64_t column = int64_t{step} * shares.adapter_columns + threadIdx.x % 4 * 8;
        const Target<kIsWide<kTiles>> target(shares, number);
        const int rows = static_cast<int>(p.M) - target.first - group;
        Rows<int64_t, 1> a;
        a.enter(target.tile, column, p.R, p.K);
        const char* x = static_cast<const char*>(p.x) + (int64_t{target.first + group} * p.K + column) * x_bytes;
        const char* first = static_cast<const char*>(p.lora_a) + a.at[0] * a_bytes;
        const char* second = static_cast<const char*>(p.lora_a) + a.at[1] * a_bytes;
        float sums[1][kTiles][4] = {};
#pragma unroll 2
        for (uint32_t left = here * (shares.adapter_columns / kColumns); left > 0; --left) {
            uint32_t pairs[2][4];
            load_pairs<kCompute, kA>(first, pairs[0]);
            load_pairs<kCompute, kA>(second, pairs[1]);
            multiply_eight<kCompute, kX>(sums, pairs, x, tile_bytes, rows);
            first += kColumns * a_bytes, second += kColumns * a_bytes, x += kColumns * x_bytes;
        }
        const int64_t part = warp - warp_of(shares, number * shares.adapter_steps);
        store_sums(p.partial + part * p.M * p.R, target.tile, target.first, p.R, p.M, sums);
        begin += here;
    }
}

// A warp's units; kTiles * 8 rows of x at a time. Neighbours' are those of warps of different blocks: so the longer
// shares are spread.
template <DType kCompute, DType kX, int kTiles>
__global__ void __launch_bounds__(Form<kIsWide<kTiles>>::kThreads, 1)
    multiply_part(const __grid_constant__ Nf4Linear p, const __grid_constant__ Nf4LinearShares shares, int shift) {
    let_the_next_begin();
    char* table = dynamic_shared();
    float* nested_code = reinterpret_cast<float*>(table + kTableBytes);
    const uint32_t warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const bool works = warp < shares.warps;
    const uint32_t begin = works ? first_unit(shares, warp) : 0, end = works ? first_unit(shares, warp + 1) : 0;
    const uint32_t unit = begin > shares.adapter_units ? begin - shares.adapter_units : 0;
    const bool nested = p.weight.nested_absmax != nullptr;
    const uint64_t policy = once_policy();
    Walk<kIsWide<kTiles>> walk;
    walk.left = static_cast<int>(end - shares.adapter_units - unit);
    if (walk.left > 0) {
        walk.number = unit / shares.steps, walk.step = unit - walk.number * shares.steps;
        walk.enter(p, Target<kIsWide<kTiles>>(shares, walk.number).tile, walk.step);
        walk.read(p.weight, nested, shift, policy);
    }
    // Eight threads write a byte's row of the table: one low nibble to a thread.
    constexpr int kThreads = Form<kIsWide<kTiles>>::kThreads, kBytes = kThreads / 8;
    static_assert(kReplicas == 16 && kBytes % 16 == 0, "places of the table");
    const float low = __ldg(p.weight.code + threadIdx.x / 8 % 16);
#pragma unroll
    for (int first = 0; first < 256; first += kBytes) {
        const int byte = first + threadIdx.x / 8;
        if (first + kBytes > 256 && byte >= 256) break;
        const float high = __ldg(p.weight.code + byte / 16);
        *reinterpret_cast<float4*>(table + 256 * byte + threadIdx.x % 8 * 16) = {high, low, high, low};
    }
    if (nested && threadIdx.x < 256) {
        nested_code[threadIdx.x] = __ldg(p.weight.nested_code + threadIdx.x);
    }
    __syncthreads();
    if (begin < shares.adapter_units) {
        const uint32_t adapter_end = end < shares.adapter_units ? end : shares.adapter_units;
        if (p.a_dtype == kCompute) {
            multiply_adapter<kCompute, kX, kCompute, kTiles>(p, shares, warp, begin, adapter_end);
        } else {
            multiply_adapter<kCompute, kX, DType::f32, kTiles>(p, shares, warp, begin, adapter_end);
        }
    }
    if (walk.left <= 0) return;
    if (nested) {
        multiply_weight<kCompute, kX, kTiles, true>(p, shares, shift, warp, policy, table, nested_code, walk);
    } else {
        multiply_weight<kCompute, kX, kTiles, false>(p, shares, shift, warp, policy, table, nested_code, walk);
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

// What units count of a row tile and the group of a row of x.
__device__ __forceinline__ uint32_t number_of(const Nf4LinearShares& shares, int64_t tile, int64_t m) {
    return static_cast<uint32_t>(tile) * shares.groups + static_cast<uint32_t>(m / kLinearGroupRows);
}

// How many parts there are of a row tile whose units, so many, begin with `unit`.
__device__ __forceinline__ uint32_t parts_of(const Nf4LinearShares& shares, uint32_t unit, uint32_t steps) {
    return steps == 0 ? 0 : warp_of(shares, unit + steps - 1) - warp_of(shares, unit) + 1;
}

// Of one element of S the parts' sum, in every one of the kPartLanes lanes that share them.
__device__ __forceinline__ float adapter_sum(const Nf4Linear& p, const Nf4LinearShares& shares, int64_t m, int64_t rank,
                                             int lane) {
    const uint32_t steps = shares.adapter_steps, number = number_of(shares, rank / kLinearTileRows, m);
    const int64_t count = parts_of(shares, number * steps, steps);
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t part = lane; part < count; part += kPartLanes) {
        sum = __fadd_rn(sum, p.partial[(part * p.M + m) * p.R + rank]);
    }
#pragma unroll
    for (int distance = kPartLanes / 2; distance > 0; distance /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
    }
    return sum;
}

// Without the 1 ptxas keeps to 56 registers and spills.
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish(const __grid_constant__ Nf4Linear p, const __grid_constant__ Nf4LinearShares shares) {
    __shared__ float s[kFinishRows][kRanks];
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kFinishRows;
    const int rows = static_cast<int>(p.M - first < kFinishRows ? p.M - first : kFinishRows);
    float sums[kFinishRows] = {}, added[kFinishRows] = {};
    wait_for_the_last();
    if (n < p.N) {
        static_assert(kLinearGroupRows % kFinishRows == 0, "a block's rows are of one group");
        const uint32_t unit = shares.adapter_units + number_of(shares, n / shares.tile_rows, first) * shares.steps;
        const int64_t count = parts_of(shares, unit, shares.steps);
        const float* partial = p.partial + shares.adapter_scratch + first * p.N + n;
#pragma unroll 2
        for (int64_t part = 0; part < count; ++part) {
#pragma unroll
            for (int m = 0; m < kFinishRows; ++m) {
                if (m < rows) sums[m] = __fadd_rn(sums[m], partial[(part * p.M + m) * p.N]);
            }
        }
    }
    for (int64_t rank = 0; rank < p.R; rank += kRanks) {
        const int ranks = static_cast<int>(p.R - rank < kRanks ? p.R - rank : kRanks), count = rows * ranks;
        const int lane = threadIdx.x % kPartLanes, each = kFinishThreads / kPartLanes;
        // All lanes go as often around.
        for (int begin = 0; begin < count; begin += each) {
            const int i = begin + threadIdx.x / kPartLanes, known = i < count ? i : count - 1;
            const int m = known / ranks, r = known % ranks;
            const float value = rounded(adapter_sum(p, shares, first + m, rank + r, lane), p.compute);
            if (i >= count || lane > 0) continue;
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
        float value = __fadd_rn(sums[m], bias);
        if (p.R > 0 || p.lora_bias != nullptr) value = __fmaf_rn(p.scaling, __fadd_rn(added[m], lora_bias), value);
        store(p.y, p.y_dtype, (first + m) * p.N + n, value);
    }
}

template <DType kCompute, DType kX, int kTiles>
cudaError_t launch(const Nf4Linear& p, const Nf4LinearShares& shares, cudaStream_t stream) {
    int shift = 0;
    while ((int64_t{kChunk} << shift) < p.weight.block_size) ++shift;
    constexpr int kThreads = Form<kIsWide<kTiles>>::kThreads;
    const unsigned blocks = (shares.warps + kThreads / 32 - 1) / (kThreads / 32);
    const cudaError_t error = allow_shared<multiply_part<kCompute, kX, kTiles>>(kShared);
    if (error != cudaSuccess) return error;
    multiply_part<kCompute, kX, kTiles><<<blocks, kThreads, kShared, stream>>>(p, shares, shift);
    return cudaGetLastError();
}

template <DType kCompute, DType kX>
cudaError_t launch(const Nf4Linear& p, const Nf4LinearShares& shares, cudaStream_t stream) {
    if (p.M <= 8) return launch<kCompute, kX, 1>(p, shares, stream);
    if (p.M <= kLinearTileRows) return launch<kCompute, kX, 2>(p, shares, stream);
    return launch<kCompute, kX, kLinearGroupRows / 8>(p, shares, stream);
}

template <DType kCompute>
cudaError_t launch(const Nf4Linear& p, const Nf4LinearShares& shares, cudaStream_t stream) {
    if (p.x_dtype == kCompute) return launch<kCompute, kCompute>(p, shares, stream);
    return launch<kCompute, DType::f32>(p, shares, stream);
}

}  // namespace

const char* launch_nf4_linear(const Nf4Linear& p, void* stream) {
    if (p.M == 0 || (p.N == 0 && p.R == 0)) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    const Nf4LinearShares shares(p.M, p.N, p.K, p.R, p.warps);
    cudaError_t error = cudaSuccess;
    if (shares.units > 0) {
        error = p.compute == DType::bf16 ? launch<DType::bf16>(p, shares, cuda_stream)
                                         : launch<DType::f16>(p, shares, cuda_stream);
    }
    if (error == cudaSuccess) {
        const int64_t columns = p.N > 0 ? p.N : 1;  // a weight without rows leaves S
        const dim3 grid(static_cast<unsigned>((columns + kFinishThreads - 1) / kFinishThreads),
                        static_cast<unsigned>((p.M + kFinishRows - 1) / kFinishRows));
        error = launch_behind(finish, grid, kFinishThreads, cuda_stream, p, shares);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
