#include "cpu/zeroth_order.h"

#include "../philox.h"

namespace peftfast::cpu {

struct ZoKernels {
    void (*blocks)(const ZoTensor& tensor, const ZoTerms& terms, int64_t begin, int64_t end);
    void (*survey)(uint64_t begin, uint64_t end, NormalSurvey* survey);
};

}  // namespace peftfast::cpu

#define PEFTFAST_KERNELS "cpu/zeroth_order_kernels.h"
#define PEFTFAST_TABLE zo_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {

void zo_apply(const ZoTensor* tensors, int64_t count, const ZoTerms& terms, ParallelFor pool) {
    const ZoKernels& kernels = kernels_in_use();
    const auto first_block = [](const ZoTensor& t) { return t.offset / kZoBlock; };
    const auto blocks_of = [&](const ZoTensor& t) {
        return t.count == 0 ? 0 : (t.offset + t.count + kZoBlock - 1) / kZoBlock - first_block(t);
    };
    Scratch<int64_t> starts(count + 1);
    starts.get()[0] = 0;
    for (int64_t t = 0; t < count; ++t) starts.get()[t + 1] = starts.get()[t] + blocks_of(tensors[t]);
    // 16 blocks take a thread about 10 us.
    parallel_for(pool, starts.get()[count], 16, [&](int64_t begin, int64_t end) {
        int64_t t = 0;
        while (starts.get()[t + 1] <= begin) ++t;
        while (begin < end) {
            const int64_t stop = end < starts.get()[t + 1] ? end : starts.get()[t + 1];
            const int64_t shift = first_block(tensors[t]) - starts.get()[t];
            if (begin < stop) kernels.blocks(tensors[t], terms, begin + shift, stop + shift);
            begin = stop;
            ++t;
        }
    });
}

NormalSurvey survey_normals(uint64_t begin, uint64_t end, ParallelFor pool) {
    constexpr int64_t kPart = int64_t{1} << 22;
    const ZoKernels& kernels = kernels_in_use();
    const int64_t parts = (static_cast<int64_t>(end - begin) + kPart - 1) / kPart;
    Scratch<NormalSurvey> found(parts);
    parallel_for(pool, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
            const uint64_t from = begin + static_cast<uint64_t>(part * kPart);
            NormalSurvey survey = {0, 0, 0};
            kernels.survey(from, end - from < kPart ? end : from + kPart, &survey);
            found.get()[part] = survey;
        }
    });
    NormalSurvey total = {0, 0, 0};
    for (int64_t part = 0; part < parts; ++part) {
        const NormalSurvey& one = found.get()[part];
        total.not_finite += one.not_finite;
        total.sum_of_bits += one.sum_of_bits;
        total.largest = one.largest > total.largest ? one.largest : total.largest;
    }
    return total;
}

}  // namespace peftfast::cpu
