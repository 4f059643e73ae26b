#include "cpu/philox.h"

#include "../philox.h"
#include "narrow.h"

namespace peftfast::cpu {

struct PhiloxKernels {
    void (*mask_rows)(uint64_t seed, int64_t columns, uint32_t threshold, uint8_t* out, int64_t begin, int64_t end);
    void (*words_range)(uint64_t seed, uint64_t start, uint32_t tensor_id, uint32_t stream, int64_t* out, int64_t begin,
                        int64_t end);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/philox_kernels.h"
#define PEFTFAST_TABLE philox_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

// A thread is worth waking for about 10 us: 2**16 draws or 2**13 counters.
void dropout_mask(uint64_t seed, int64_t rows, int64_t columns, uint32_t threshold, uint8_t* out, ParallelFor pool) {
    if (columns == 0) return;
    const PhiloxKernels& kernels = kernels_in_use();
    parallel_for(pool, rows, 1 + 65536 / columns,
                 [&](int64_t begin, int64_t end) { kernels.mask_rows(seed, columns, threshold, out, begin, end); });
}

void philox_words(uint64_t seed, uint64_t start, int64_t count, uint32_t tensor_id, uint32_t stream, int64_t* out,
                  ParallelFor pool) {
    const PhiloxKernels& kernels = kernels_in_use();
    parallel_for(pool, count, 8192, [&](int64_t begin, int64_t end) {
        kernels.words_range(seed, start, tensor_id, stream, out, begin, end);
    });
}

}  // namespace peftfast::cpu
