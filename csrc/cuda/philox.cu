#include "cuda/philox.h"

#include <cuda_runtime.h>

#include "../philox.h"

namespace peftfast::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ uint32_t counter_bits(uint64_t seed, int64_t q, uint32_t threshold) {
    return philox::keep_bits(philox::words_at(seed, static_cast<uint64_t>(q), 0, philox::kStreamDropout), threshold);
}

// Bits i .. i + 3 to the lowest bits of four bytes: the multiplication places copies seven bits apart.
__device__ __forceinline__ uint32_t spread(uint32_t bits, int i) {
    return (((bits >> i) & 15u) * 0x0204081u) & 0x01010101u;
}

// Two counters a thread, one 16-byte store. Needs columns % 16 == 0, so that counters are consecutive across rows.
__global__ void __launch_bounds__(kThreads)
    mask_pairs(const int64_t* seed, int64_t pairs, uint32_t threshold, uint4* out) {
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (pair >= pairs) return;
    const uint64_t key = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(seed)));
    const uint32_t first = counter_bits(key, 2 * pair, threshold), second = counter_bits(key, 2 * pair + 1, threshold);
    out[pair] = make_uint4(spread(first, 0), spread(first, 4), spread(second, 0), spread(second, 4));
}

// One counter a thread, byte stores: any width.
__global__ void __launch_bounds__(kThreads) mask_counters(const int64_t* seed, int64_t counters, int64_t per_row,
                                                          int64_t columns, uint32_t threshold, uint8_t* out) {
    const int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (q >= counters) return;
    const uint64_t key = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(seed)));
    const uint32_t bits = counter_bits(key, q, threshold);
    const int64_t row = q / per_row, column = (q - row * per_row) * philox::kDrawsPerCounter;
    for (int i = 0; i < philox::kDrawsPerCounter && column + i < columns; ++i) {
        out[row * columns + column + i] = (bits >> i) & 1u;
    }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

const char* launch_dropout_mask(const int64_t* seed, int64_t rows, int64_t columns, uint32_t threshold, uint8_t* out,
                                void* stream) {
    if (rows == 0 || columns == 0) return nullptr;
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    const int64_t per_row = (columns + philox::kDrawsPerCounter - 1) / philox::kDrawsPerCounter;
    if (columns % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        const int64_t pairs = rows * per_row / 2;
        mask_pairs<<<blocks_for(pairs), kThreads, 0, cuda_stream>>>(seed, pairs, threshold,
                                                                    reinterpret_cast<uint4*>(out));
    } else {
        const int64_t counters = rows * per_row;
        mask_counters<<<blocks_for(counters), kThreads, 0, cuda_stream>>>(seed, counters, per_row, columns, threshold,
                                                                          out);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftfast::cuda
