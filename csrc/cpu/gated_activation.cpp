#include "cpu/gated_activation.h"

#include "../philox.h"

namespace peftfast::cpu {

// Pointers to the first element of a run of `count`, in the order of Gated's matrices.
struct GatedRun {
    const void *dh, *gate, *up;
    void *h, *dgate, *dup;
    int64_t count;
};

using GatedBody = void (*)(const GatedRun& run);

struct GatedKernels {
    GatedBody forward[kActivations][3], backward[kActivations][3];
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/gated_activation_kernels.h"
#define PEFTFAST_TABLE gated_table
#define PEFTFAST_WITH_DOT_BF16
#include "cpu/each_isa.h"

namespace peftfast::cpu {
namespace {

constexpr int64_t kRun = 2048;  // elements of a run; six of them in float32 are 48 KB, of an L2 cache

void each_run(const Gated& gated, GatedBody body, ParallelFor pool) {
    const Rows matrices[6] = {gated.dh, gated.gate, gated.up, gated.h, gated.dgate, gated.dup};
    int64_t rows = gated.rows, columns = gated.columns;
    bool whole = true;
    for (const Rows& one : matrices) whole = whole && (one.data == nullptr || one.stride == columns);
    if (whole) columns *= rows, rows = rows > 0 ? 1 : 0;  // one long row, so that narrow matrices fill their vectors
    const int64_t size = element_size(gated.dtype);
    const int64_t runs = (columns + kRun - 1) / kRun;
    parallel_for(pool, rows * runs, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / runs, column = i % runs * kRun;
            char* at[6];
            for (int m = 0; m < 6; ++m) {
                const Rows& one = matrices[m];
                at[m] = one.data == nullptr ? nullptr : (char*)one.data + (row * one.stride + column) * size;
            }
            body({at[0], at[1], at[2], at[3], at[4], at[5], columns - column < kRun ? columns - column : kRun});
        }
    });
}

}  // namespace

void gated_activation(const Gated& gated, ParallelFor pool) {
    each_run(gated, kernels_in_use().forward[(int)gated.activation][(int)gated.dtype], pool);
}

void gated_activation_backward(const Gated& gated, ParallelFor pool) {
    each_run(gated, kernels_in_use().backward[(int)gated.activation][(int)gated.dtype], pool);
}

}  // namespace peftfast::cpu
