#include "cpu/zeroth_order_linear.h"

#include "../nf4.h"
#include "../philox.h"

namespace peftfast::cpu {

// The z of the block that was asked for last: elements come in order, and z is drawn by blocks.
struct ZoDirection {
    alignas(64) float z[kZoBlock];
    int64_t block;
};

// Weight rows of a tile: enough for 4096 elements, so that blocks of z which two tiles share are few.
static int64_t tile_rows(int64_t K) {
    const int64_t rows = (4096 / (K + 1) + 4) / 4 * 4;
    return rows < 64 ? rows : 64;
}

struct ZoLinearKernels {
    void (*widen)(const void* x, DType dtype, int64_t begin, int64_t count, float* out);
    void (*tile)(const ZoLinear& problem, const float* const* x, int64_t begin, int64_t end, float* moved,
                 float* products, ZoDirection* direction);
    void (*pair)(const ZoMove& weight, int64_t begin, int64_t end, int64_t at, void* plus, void* minus,
                 ZoDirection* direction);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/zeroth_order_linear_kernels.h"
#define PEFTFAST_TABLE zo_linear_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void zo_linear(const ZoLinear& problem, ParallelFor pool) {
    const ZoLinear& p = problem;
    if (p.M == 0 || p.N == 0) return;
    const ZoLinearKernels& kernels = kernels_in_use();
    const bool exact = p.weight.dtype == DType::f32;
    Scratch<float> wide(exact ? 0 : 2 * p.M * p.K);
    const float* x[2];
    for (int side = 0; side < 2; ++side) {
        float* out = wide.get() + side * p.M * p.K;
        if (!exact) {
            parallel_for(pool, p.M * p.K, 1 << 16, [&](int64_t begin, int64_t end) {
                kernels.widen(p.x[side], p.weight.dtype, begin, end - begin, out + begin);
            });
        }
        x[side] = exact ? static_cast<const float*>(p.x[side]) : out;
    }
    const int64_t rows = tile_rows(p.K);
    parallel_for(pool, (p.N + rows - 1) / rows, 4, [&](int64_t begin, int64_t end) {
        Scratch<ZoDirection> direction(1);
        Scratch<float> moved(2 * rows * p.K), products(2 * rows * p.M);
        direction.get()->block = -1;
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t last = (tile + 1) * rows < p.N ? (tile + 1) * rows : p.N;
            kernels.tile(p, x, tile * rows, last, moved.get(), products.get(), direction.get());
        }
    });
}

void zo_moved_pair(const ZoMove& weight, int64_t begin, int64_t count, void* plus, void* minus, ParallelFor pool) {
    const ZoLinearKernels& kernels = kernels_in_use();
    const int64_t first = begin / kZoBlock, last = (begin + count + kZoBlock - 1) / kZoBlock;
    if (count == 0) return;
    parallel_for(pool, last - first, 16, [&](int64_t from, int64_t to) {
        Scratch<ZoDirection> direction(1);
        direction.get()->block = -1;
        const int64_t low = (first + from) * kZoBlock, high = (first + to) * kZoBlock;
        const int64_t start = low < begin ? begin : low, stop = high < begin + count ? high : begin + count;
        kernels.pair(weight, start, stop, start - begin, plus, minus, direction.get());
    });
}

}  // namespace peftfast::cpu
