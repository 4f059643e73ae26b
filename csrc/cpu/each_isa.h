// Includes the file named by PEFTFAST_KERNELS once for each instruction set, in a namespace of its own under that set's
// target. No guard: a family's .cpp includes it once, after everything else. The kernels include nothing and call no
// inline function of the standard library, whose one merged copy could end up with instructions that a smaller CPU
// lacks. Lambdas are avoided in them too: inside a template they would be instantiated at the end of the file, under
// the default target. A family with PEFTFAST_WITH_DOT_BF16 has kernels of its own for AVX-512 with products of
// bfloat16, and PEFTFAST_DOT_BF16 is defined while they are compiled.

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(PEFTFAST_WITH_DOT_BF16) && defined(PEFTFAST_HAS_DOT_BF16)
#define PEFTFAST_ISA 512
#define PEFTFAST_DOT_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace peftfast::cpu::avx512_bf16 {
#include "cpu/simd_avx512.h"
#include PEFTFAST_KERNELS
}  // namespace peftfast::cpu::avx512_bf16
#pragma GCC pop_options
#undef PEFTFAST_DOT_BF16
#undef PEFTFAST_ISA
#endif

#define PEFTFAST_ISA 512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace peftfast::cpu::avx512 {
#include "cpu/simd_avx512.h"
#include PEFTFAST_KERNELS
}  // namespace peftfast::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PEFTFAST_ISA

#define PEFTFAST_ISA 256
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace peftfast::cpu::avx2 {
#include "cpu/simd_avx2.h"
#include PEFTFAST_KERNELS
}  // namespace peftfast::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PEFTFAST_ISA
#endif

#define PEFTFAST_ISA 0
namespace peftfast::cpu::scalar {
#include "cpu/simd_scalar.h"
#include PEFTFAST_KERNELS
}  // namespace peftfast::cpu::scalar
#undef PEFTFAST_ISA

namespace peftfast::cpu {

// The table that PEFTFAST_TABLE names, of the instruction set in use.
static const auto& kernels_in_use() {
#if defined(__x86_64__) && defined(__GNUC__)
    switch (current_isa()) {
        case Isa::avx512_bf16:
#if defined(PEFTFAST_WITH_DOT_BF16) && defined(PEFTFAST_HAS_DOT_BF16)
            return avx512_bf16::PEFTFAST_TABLE;
#endif
        case Isa::avx512:
            return avx512::PEFTFAST_TABLE;
        case Isa::avx2:
            return avx2::PEFTFAST_TABLE;
        default:
            break;
    }
#endif
    return scalar::PEFTFAST_TABLE;
}

}  // namespace peftfast::cpu
