#include "cpu/nf4.h"

#include "../nf4.h"
#include "../philox.h"

namespace peftfast::cpu {

struct Nf4Kernels {
    void (*dequantize)(const Nf4Weight& weight, void* out, DType dtype, int64_t begin_block, int64_t end_block);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/nf4_kernels.h"
#define PEFTFAST_TABLE nf4_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void nf4_dequantize(const Nf4Weight& weight, void* out, DType dtype, ParallelFor pool) {
    const Nf4Kernels& kernels = kernels_in_use();
    const int64_t blocks = weight.count / weight.block_size + (weight.count % weight.block_size != 0);
    // 2**16 elements take a thread about 10 us.
    parallel_for(pool, blocks, 1 + 65536 / weight.block_size,
                 [&](int64_t begin, int64_t end) { kernels.dequantize(weight, out, dtype, begin, end); });
}

}  // namespace peftfast::cpu
