#include "cpu/nf4.h"

#include "../nf4.h"
#include "../philox.h"

namespace peftfast::cpu {

struct Nf4Kernels {
    void (*dequantize)(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, int64_t begin_block,
                       int64_t end_block);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/nf4_kernels.h"
#define PEFTFAST_TABLE nf4_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void nf4_dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, ParallelFor pool) {
    if (slab.begin >= slab.end) return;
    const Nf4Kernels& kernels = kernels_in_use();
    const int64_t first = slab.begin / weight.block_size;
    const int64_t blocks = (slab.end - 1) / weight.block_size + 1 - first;
    // 2**16 elements take a thread about 10 us.
    parallel_for(pool, blocks, 1 + 65536 / weight.block_size, [&](int64_t begin, int64_t end) {
        kernels.dequantize(weight, slab, out, dtype, first + begin, first + end);
    });
}

}  // namespace peftfast::cpu
