// Kernels of cpu/nf4.cpp, compiled once for each instruction set.

#include "cpu/nf4_lookup.h"

static void dequantize(const Nf4Weight& weight, const Nf4Slab& slab, void* out, DType dtype, int64_t begin,
                       int64_t end) {
    switch (dtype) {
        case DType::f32:
            return dequantize_blocks<float, DType::f32>(weight, slab, (float*)out, begin, end);
        case DType::bf16:
            return dequantize_blocks<uint16_t, DType::bf16>(weight, slab, (uint16_t*)out, begin, end);
        case DType::f16:
            return dequantize_blocks<uint16_t, DType::f16>(weight, slab, (uint16_t*)out, begin, end);
    }
}

static const Nf4Kernels nf4_table = {dequantize};
