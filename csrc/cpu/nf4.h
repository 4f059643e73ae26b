// Dequantising 4-bit weights on the CPU. Raw pointers, no torch.
#pragma once

#include "cpu/parallel.h"
#include "narrow.h"

namespace peftfast::cpu {

// Block maxima: `absmax` alone, or bytes with their nested scale when `bytes` is set.
struct BlockMaxima {
    const float* absmax;
    const uint8_t* bytes;
    const float* nested_absmax;  // one for 256 bytes
    const float* nested_code;    // 256 entries
    float nested_offset;
};

struct Nf4Weight {
    const uint8_t* packed;  // two elements to a byte, the even one in the high nibble
    BlockMaxima maxima;
    const float* code;  // 16 entries
    int64_t block_size;
    int64_t count;
};

// out[i] = code[nibble i] * maximum of i's block, rounded once to dtype.
void nf4_dequantize(const Nf4Weight& weight, void* out, DType dtype, ParallelFor pool);

}  // namespace peftfast::cpu
