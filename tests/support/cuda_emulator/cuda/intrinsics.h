// csrc/cuda/intrinsics.h on a CPU.
#pragma once

#include <cuda_runtime.h>

#include "narrow.h"

namespace peftfast::cuda {

inline uint64_t once_policy() { return 0; }

inline uint4 load_once(const void* p, uint64_t) { return __ldg(static_cast<const uint4*>(p)); }

inline uint4 load_past_l1(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

inline char* dynamic_shared() { return emulated::dynamic_shared; }

template <auto kKernel>
cudaError_t allow_shared(int bytes) {
    emulated::shared_allowed = static_cast<size_t>(bytes);
    return cudaSuccess;
}

// One launch runs after the other here.
inline void let_the_next_begin() {}
inline void wait_for_the_last() {}
template <class... Parameters>
cudaError_t launch_behind(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream,
                          const Parameters&... arguments) {
    emulated::launch(grid, threads, 0, stream, [=] { kernel(arguments...); });  // a captured graph does it again
    return cudaSuccess;
}

inline uint16_t half_of(DType type, float value) {
    return type == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
}
inline float float_of(DType type, uint16_t half) {
    return type == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

template <DType kCompute>
inline uint32_t pack_pair(float low, float high) {
    return half_of(kCompute, low) | static_cast<uint32_t>(half_of(kCompute, high)) << 16;
}

// PTX ISA, mma.m16n8k16: lane 4 g + t holds of a the columns 2t, 2t + 1 (registers 0: row g, 1: row g + 8) and the same
// plus 8 (2, 3); of b the rows 2t, 2t + 1 (0) and those plus 8 (1), column g; of the sum row g, columns 2t and 2t + 1,
// then row g + 8.
template <DType kCompute>
inline void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
        uint32_t a[4], b[2];
    };
    const Operands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Operands* all = emulated::Block::current().exchange(own);
    const unsigned lane = emulated::Block::current().lane();
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)] >> (16 * (k % 2));
            const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8] >> (16 * (k % 2));
            sum[i] +=
                float_of(kCompute, static_cast<uint16_t>(left)) * float_of(kCompute, static_cast<uint16_t>(right));
        }
    }
}

}  // namespace peftfast::cuda
