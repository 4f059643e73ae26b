// Kernels of cpu/zeroth_order.cpp, compiled once for each instruction set. Blocks lie at multiples of kZoBlock in the
// logical tensor, so that z does not depend on where a shard or a task begins; a block's floats stay in L1.

#include "cpu/zeroth_order_vector.h"

static void zo_block(const ZoTensor& tensor, const ZoTerms& terms, int64_t block) {
    alignas(64) float before[kZoBlock], plus[kZoBlock], minus[kZoBlock], z[kZoBlock];
    alignas(64) uint32_t noise[kZoBlock / 2 + 4 * kCounters];
    const int64_t start = block * kZoBlock;  // logical
    const int64_t end = tensor.offset + tensor.count;
    const int64_t lead = tensor.offset > start ? tensor.offset - start : 0;
    const int64_t stop = end - start < kZoBlock ? end - start : kZoBlock;
    const int64_t first = start + lead - tensor.offset, count = stop - lead;
    // The arrays are worked through whole: outside [lead, stop) they hold zeros, which nothing traps on or stores.
    // Kept apart from what moves only where it is asked for again.
    float* loaded = tensor.threshold != nullptr ? before : plus;
    if (count < kZoBlock || tensor.source == nullptr) __builtin_memset(loaded, 0, sizeof before);
    if (tensor.source != nullptr) load_floats(loaded + lead, tensor.source, tensor.dtype, first, count);
    if (loaded == before) __builtin_memcpy(plus, before, sizeof plus);
    if (terms.decay != nullptr) {
        const float decay = *terms.decay;
        for (int64_t i = 0; i < kZoBlock; ++i) plus[i] = plus[i] * decay;
    }
    if (tensor.minus != nullptr) __builtin_memcpy(minus, plus, sizeof plus);
    for (int64_t k = 0; k < terms.count; ++k) {
        const float coefficient = terms.coefficients[k];
        if (coefficient == 0.0f) continue;
        const uint64_t seed = (uint64_t)terms.seeds[k];
        if (!terms.rademacher && tensor.source != nullptr && tensor.minus == nullptr) {
            fill_normals<true>(plus, seed, block, tensor.tensor_id, coefficient);
            continue;
        }
        if (terms.rademacher) {
            fill_signs(z, seed, block, tensor.tensor_id);
        } else {
            fill_normals<false>(z, seed, block, tensor.tensor_id, 0.0f);
        }
        if (tensor.source == nullptr) {
            for (int64_t i = 0; i < kZoBlock; ++i) plus[i] = coefficient * z[i];
        } else if (tensor.minus != nullptr) {
            for (int64_t i = 0; i < kZoBlock; ++i) {
                const float term = coefficient * z[i];
                plus[i] = plus[i] + term;
                minus[i] = minus[i] - term;
            }
        } else {
            for (int64_t i = 0; i < kZoBlock; ++i) plus[i] = plus[i] + coefficient * z[i];
        }
    }
    if (tensor.threshold != nullptr) {
        const float threshold = *tensor.threshold;
        for (int64_t i = 0; i < kZoBlock; ++i) {
            plus[i] = __builtin_fabsf(before[i]) <= threshold ? plus[i] : before[i];
        }
        if (tensor.minus != nullptr) {
            for (int64_t i = 0; i < kZoBlock; ++i) {
                minus[i] = __builtin_fabsf(before[i]) <= threshold ? minus[i] : before[i];
            }
        }
    }
    const uint16_t* draws = nullptr;
    if (terms.rounding_seed != nullptr && tensor.dtype != DType::f32) {
        constexpr int64_t kCount = kZoBlock / philox::kDrawsPerCounter;
        fill_words(noise, (uint64_t)*terms.rounding_seed, (uint64_t)block * kCount, kCount, tensor.tensor_id,
                   philox::kStreamRounding);
        draws = (const uint16_t*)noise + lead;  // little-endian: the low half of a word before its high half
    }
    store_floats(tensor.out, plus + lead, draws, tensor.dtype, first, count);
    if (tensor.minus != nullptr) store_floats(tensor.minus, minus + lead, draws, tensor.dtype, first, count);
}

static void zo_blocks(const ZoTensor& tensor, const ZoTerms& terms, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) zo_block(tensor, terms, block);
}

static void survey_words(uint64_t begin, uint64_t end, NormalSurvey* survey) {
    constexpr int kStep = 128;  // words at a time, two normals of each
    alignas(64) uint32_t words[kStep];
    alignas(64) float normals[2 * kStep];
    for (uint64_t first = begin; first < end; first += kStep) {
        for (int i = 0; i < kStep; ++i) words[i] = (uint32_t)first + i;
#if PEFTFAST_ISA
        for (int i = 0; i < kStep; i += kWidth) {
            Ints some;
            __builtin_memcpy(&some, words + i, sizeof some);
            store_interleaved(normals + 2 * i, normal_pairs(some, some));
        }
#else
        for (int i = 0; i < kStep; ++i) {
            const philox::Pair pair = philox::normal_pair(words[i], words[i]);
            normals[2 * i] = pair.first, normals[2 * i + 1] = pair.second;
        }
#endif
        const int count = end - first < kStep ? 2 * (int)(end - first) : 2 * kStep;
        uint32_t not_finite = 0, largest = 0, low = 0, high = 0;
        for (int i = 0; i < count; ++i) {
            const uint32_t bits = float_bits(normals[i]), magnitude = bits & 0x7fffffffu;
            not_finite += magnitude >= 0x7f800000u;
            largest = magnitude > largest ? magnitude : largest;
            low += bits & 0xffffu;
            high += bits >> 16;
        }
        survey->not_finite += not_finite;
        survey->largest = largest > survey->largest ? largest : survey->largest;
        survey->sum_of_bits += low + ((uint64_t)high << 16);
    }
}

static const ZoKernels zo_table = {zo_blocks, survey_words};
