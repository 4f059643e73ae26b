#include "cpu/sparse_adamw.h"

namespace peftfast::cpu {

struct AdamKernels {
    void (*adamw)(const AdamBuffers& buffers, const sparse::AdamHyper& hyper, const AdamWeight& weight, int64_t begin,
                  int64_t end);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/sparse_adamw_kernels.h"
#define PEFTFAST_TABLE adamw_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void sparse_adamw(const AdamBuffers& buffers, const sparse::AdamHyper& hyper, const AdamWeight& weight,
                  ParallelFor pool) {
    const AdamKernels& kernels = kernels_in_use();
    // Where a range is cut moves no element between a vector and a tail, and parts no block of states.
    constexpr int64_t kGroup = sparse::kStateBlock;
    parallel_for(pool, (buffers.count + kGroup - 1) / kGroup, 16, [&](int64_t begin, int64_t end) {
        const int64_t last = end * kGroup < buffers.count ? end * kGroup : buffers.count;
        kernels.adamw(buffers, hyper, weight, begin * kGroup, last);
    });
}

}  // namespace peftfast::cpu
