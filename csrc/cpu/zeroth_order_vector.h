// What the kernels of the zeroth order share: z of a block of the logical tensor, and rows of floats read from and
// written to any dtype. Included by kernel files inside an instruction set's namespace, after its vectors.

#include "cpu/philox_vector.h"
#include "cpu/normal_vector.h"

// z, or with kAdd value + coefficient * z. Words first and normals after them, four chains of operations side by side
// in each: a chain is long, and the next one lies beyond the reach of a processor's scheduler (AVX-512 on a Zen 5, ns
// for a bfloat16 weight moved: both in one loop 0.8, in a loop each 0.54, words by fours 0.48, normals too 0.42).
template <bool kAdd>
static void fill_normals(float* value, uint64_t seed, int64_t block, uint32_t tensor_id, float coefficient) {
    constexpr int64_t kCount = kZoBlock / philox::kNormalsPerCounter;
    constexpr int kAtOnce = 4;
    static_assert(kCount / kCounters % kAtOnce == 0, "blocks of z hold whole rounds");
    const uint64_t first = (uint64_t)block * kCount;
#if PEFTFAST_ISA
    Ints radius_words[kCount / kCounters], angle_words[kCount / kCounters];
    for (int64_t i = 0; i < kCount / kCounters; i += kAtOnce) {
        Counters word[kAtOnce][4];
        philox_groups<kAtOnce>(word, seed, first + i * kCounters, tensor_id, philox::kStreamGaussian);
#pragma GCC unroll 4
        for (int g = 0; g < kAtOnce; ++g) {
            radius_words[i + g] = ints_pair(word[g][0], word[g][2]);
            angle_words[i + g] = ints_pair(word[g][1], word[g][3]);
        }
    }
    const Vec factor = vec_set(coefficient);
    for (int64_t i = 0; i < kCount / kCounters; i += kAtOnce) {
        VecPair normals[kAtOnce];
        normal_pairs_of<kAtOnce>(radius_words + i, angle_words + i, normals);
#pragma GCC unroll 4
        for (int g = 0; g < kAtOnce; ++g, value += kNormals) {
            const VecPair z = interleave(normals[g].first, normals[g].second);
            vec_store(value, kAdd ? vec_add(vec_load(value), vec_mul(factor, z.first)) : z.first);
            vec_store(value + kWidth, kAdd ? vec_add(vec_load(value + kWidth), vec_mul(factor, z.second)) : z.second);
        }
    }
#else
    float z[kNormals];
    for (int64_t i = 0; i < kCount; i += kCounters, value += kNormals) {
        Counters word[4];
        philox_at(word, seed, first + i, tensor_id, philox::kStreamGaussian);
        store_normals(z, word);
        for (int j = 0; j < kNormals; ++j) value[j] = kAdd ? value[j] + coefficient * z[j] : z[j];
    }
#endif
}

static void fill_words(uint32_t* out, uint64_t seed, uint64_t first, int64_t count, uint32_t tensor_id,
                       uint32_t stream) {
    for (int64_t i = 0; i < count; i += kCounters) {
        Counters word[4];
        philox_at(word, seed, first + i, tensor_id, stream);
        store_words(out + 4 * i, word);
    }
}

static void fill_signs(float* z, uint64_t seed, int64_t block, uint32_t tensor_id) {
    constexpr int64_t kCount = kZoBlock / philox::kSignsPerCounter;
    uint32_t words[4 * (kCount + kCounters)];
    fill_words(words, seed, (uint64_t)block * kCount, kCount, tensor_id, philox::kStreamRademacher);
    for (int64_t i = 0; i < 4 * kCount; ++i) {
        for (int bit = 0; bit < 32; ++bit) z[32 * i + bit] = philox::sign_of(words[i], bit);
    }
}

// Elements [begin, end) of the tensor to value[0 ..]; what a vector reads past the end of a row stays inside it.
static void load_floats(float* value, const void* source, DType dtype, int64_t begin, int64_t count) {
    int64_t i = 0;
    switch (dtype) {
        case DType::f32:
            __builtin_memcpy(value, (const float*)source + begin, count * sizeof(float));
            return;
        case DType::bf16: {
            const uint16_t* p = (const uint16_t*)source + begin;
            for (; i + kWidth <= count; i += kWidth) vec_store(value + i, vec_load_bf16(p + i));
            for (; i < count; ++i) value[i] = float_from_bf16(p[i]);
            return;
        }
        case DType::f16: {
            const uint16_t* p = (const uint16_t*)source + begin;
            for (; i + kWidth <= count; i += kWidth) vec_store(value + i, vec_load_f16(p + i));
            for (; i < count; ++i) value[i] = float_from_f16(p[i]);
            return;
        }
    }
}

static void store_floats(void* out, const float* value, const uint16_t* draws, DType dtype, int64_t begin,
                         int64_t count) {
    uint16_t* p = (uint16_t*)out + begin;
    int64_t i = 0;
    if (dtype == DType::f32) {
        __builtin_memcpy((float*)out + begin, value, count * sizeof(float));
    } else if (dtype == DType::bf16 && draws != nullptr) {
        for (; i < count; ++i) p[i] = bf16_from_float_by(value[i], draws[i]);
    } else if (dtype == DType::bf16) {
        for (; i + kWidth <= count; i += kWidth) vec_store_bf16(p + i, vec_load(value + i));
        for (; i < count; ++i) p[i] = bf16_from_float(value[i]);
    } else if (draws != nullptr) {
        for (; i < count; ++i) p[i] = f16_from_float_by(value[i], draws[i]);
    } else {
        for (; i + kWidth <= count; i += kWidth) vec_store_f16(p + i, vec_load(value + i));
        for (; i < count; ++i) p[i] = f16_from_float(value[i]);
    }
}
