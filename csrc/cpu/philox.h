// Philox words and dropout masks on the CPU. Raw pointers, no torch.
#pragma once

#include "cpu/parallel.h"

namespace peftfast::cpu {

// Bytes of 0 or 1, [rows, columns]: row `row` and column `column` take draw column % 8 of counter
// row * ceil(columns / 8) + column / 8. threshold is in [0, 65536].
void dropout_mask(uint64_t seed, int64_t rows, int64_t columns, uint32_t threshold, uint8_t* out, ParallelFor pool);

// [count, 4] words of the counters start, start + 1, ...
void philox_words(uint64_t seed, uint64_t start, int64_t count, uint32_t tensor_id, uint32_t stream, int64_t* out,
                  ParallelFor pool);

}  // namespace peftfast::cpu
