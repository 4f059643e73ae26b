// Dropout masks on CUDA. Raw pointers and a stream; no torch, no CUDA header.
#pragma once

#include <stdint.h>

namespace peftfast::cuda {

// Bytes of 0 or 1, [rows, columns]; the seed is read on the device. threshold is in [0, 65536]. `stream` is a
// cudaStream_t. Returns nullptr, or the text of the launch's error.
const char* launch_dropout_mask(const int64_t* seed, int64_t rows, int64_t columns, uint32_t threshold, uint8_t* out,
                                void* stream);

}  // namespace peftfast::cuda
