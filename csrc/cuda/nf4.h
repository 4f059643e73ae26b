// Dequantising 4-bit weights on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include "narrow.h"

namespace peftfast::cuda {

struct Nf4Weight {
    const uint8_t* packed;       // two elements to a byte, the even one in the high nibble
    const void* absmax;          // float32, or bytes where nested_absmax is set
    const float* code;           // 16 entries
    const float* nested_absmax;  // one for 256 bytes, or null
    const float* nested_code;    // 256 entries
    const float* nested_offset;  // one
    int64_t block_size;
    int64_t count;
};

// out[i] = code[nibble i] * maximum of i's block, rounded once to dtype, in one launch. `stream` is a cudaStream_t.
// Returns nullptr, or the text of the launch's error.
const char* launch_nf4_dequantize(const Nf4Weight& weight, void* out, DType dtype, void* stream);

}  // namespace peftfast::cuda
