#include "../nf4.h"

#include "../philox.h"
#include "cpu/nf4.h"

namespace peftfast::cpu {

// Weight rows that one thread takes at a time.
constexpr int64_t kTileRows = 32;

struct Nf4LinearKernels {
    void (*prepare_row)(const Nf4Linear& problem, int64_t m, bool sorted, float* exact, void* x);
    void (*shrink)(const Nf4Linear& problem, const float* exact, int64_t stride, int64_t r, float* scratch, float* s,
                   int64_t stride_s);
    void (*linear_rows)(const Nf4Linear& problem, bool sorted, const void* x, const float* s, int64_t padded,
                        float* scratch, int64_t begin, int64_t end);
    int64_t width;    // of a vector of floats
    int64_t group;    // columns decoded together, which must divide K and the block size where x is sorted
    int64_t at_once;  // rows of x
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/nf4_linear_kernels.h"
#define PEFTFAST_TABLE nf4_linear_table
#include "cpu/each_isa.h"

// The same kernels once more where AVX-512 has bfloat16 products.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PEFTFAST_HAS_DOT_BF16
#define PEFTFAST_DOT_BF16
#define PEFTFAST_ISA 512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace peftfast::cpu::avx512_bf16 {
#include "cpu/simd_avx512.h"
#include PEFTFAST_KERNELS
}  // namespace peftfast::cpu::avx512_bf16
#pragma GCC pop_options
#undef PEFTFAST_ISA
#undef PEFTFAST_DOT_BF16
#endif

namespace peftfast::cpu {

static bool divides(int64_t group, const Nf4Linear& p) { return p.K % group == 0 && p.weight.block_size % group == 0; }

static const Nf4LinearKernels& kernels_for(const Nf4Linear& p) {
#if defined(PEFTFAST_HAS_DOT_BF16)
    static const bool has_dot = __builtin_cpu_supports("avx512bf16");
    const Nf4LinearKernels& dot = avx512_bf16::nf4_linear_table;
    if (has_dot && current_isa() == Isa::avx512 && p.compute == DType::bf16 && divides(dot.group, p)) return dot;
#endif
    return kernels_in_use();
}

void nf4_linear(const Nf4Linear& problem, ParallelFor pool) {
    const Nf4Linear& p = problem;
    if (p.M == 0) return;
    const Nf4LinearKernels& kernels = kernels_for(p);
    const bool sorted = p.K > 0 && divides(kernels.group, p);
    const int64_t padded = (p.R + kernels.width - 1) / kernels.width * kernels.width;
    Scratch<float> exact(p.M * p.K), x(p.M * p.K), s(p.M * padded);
    for (int64_t i = 0; i < p.M * padded; ++i) s.get()[i] = 0.0f;
    for (int64_t m = 0; m < p.M; ++m) {
        kernels.prepare_row(p, m, sorted, exact.get() + m * p.K, x.get());
    }
    // 2**16 products take a thread a few microseconds.
    parallel_for(pool, p.R, 1 + 65536 / (p.M * p.K + 1), [&](int64_t begin, int64_t end) {
        Scratch<float> row(p.K);
        for (int64_t r = begin; r < end; ++r) {
            kernels.shrink(p, exact.get(), p.K, r, row.get(), s.get(), padded);
        }
    });
    const int64_t grain = 1 + 65536 / (kTileRows * p.M * p.K + 1);
    parallel_for(pool, (p.N + kTileRows - 1) / kTileRows, grain, [&](int64_t begin, int64_t end) {
        Scratch<float> scratch(padded + kTileRows * kernels.at_once + p.K + 2);
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t last = (tile + 1) * kTileRows < p.N ? (tile + 1) * kTileRows : p.N;
            kernels.linear_rows(p, sorted, x.get(), s.get(), padded, scratch.get(), tile * kTileRows, last);
        }
    });
}

}  // namespace peftfast::cpu
