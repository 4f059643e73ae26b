// The launch function of the dropout mask for ctypes.
#include "cuda/philox.h"

extern "C" const char* dropout_mask(const void* seed, int64_t rows, int64_t columns, int64_t threshold, void* out) {
    return peftfast::cuda::launch_dropout_mask(static_cast<const int64_t*>(seed), rows, columns,
                                               static_cast<uint32_t>(threshold), static_cast<uint8_t*>(out), nullptr);
}
