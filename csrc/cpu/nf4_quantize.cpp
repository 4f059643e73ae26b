#include "../nf4.h"

#include "../philox.h"
#include "cpu/nf4.h"

namespace peftfast::cpu {

struct Nf4QuantizeKernels {
    void (*quantize)(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                     const uint8_t* order, uint8_t* packed, float* absmax, int64_t begin_block, int64_t end_block);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/nf4_quantize_kernels.h"
#define PEFTFAST_TABLE nf4_quantize_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void nf4_quantize(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                  const uint8_t* order, uint8_t* packed, float* absmax, ParallelFor pool) {
    const Nf4QuantizeKernels& kernels = kernels_in_use();
    const int64_t blocks = count / block_size + (count % block_size != 0);
    parallel_for(pool, blocks, 1 + 16384 / block_size, [&](int64_t begin, int64_t end) {
        kernels.quantize(weight, dtype, count, block_size, bounds, order, packed, absmax, begin, end);
    });
}

// One value in 64 or more comes here: a binary search each is nothing beside the weight itself.
void nf4_nest(const float* values, int64_t count, const float* bounds, bool snapped, uint8_t* index, float* absmax,
              ParallelFor pool) {
    constexpr int64_t kBlock = nf4::kNestedBlock;
    parallel_for(pool, (count + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kBlock, last = first + kBlock < count ? first + kBlock : count;
            uint32_t bits = 0;
            for (int64_t i = first; i < last; ++i) {
                const uint32_t own = nf4::magnitude_bits(values[i]);
                // bitsandbytes' CPU kernel passes a NaN over, the others do not.
                if (own > bits && !(snapped && own > 0x7f800000u)) bits = own;
            }
            const bool divided = !snapped && last - first < kBlock;
            float maximum = bits_float(bits);
            float scale = snapped ? nf4::divide(1.0f, maximum) : nf4::clamped_maximum(maximum);
            if (divided) maximum = scale;
            if (!snapped && !divided) scale = nf4::divide(1.0f, scale);
            absmax[block] = maximum;
            for (int64_t i = first; i < last; ++i) {
                index[i] = nf4::nested_index(bounds, nf4::scaled_value(values[i], scale, divided), snapped);
            }
        }
    });
}

}  // namespace peftfast::cpu
