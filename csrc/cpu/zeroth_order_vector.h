// What the kernels of the zeroth order share: z of a block of the logical tensor, and rows of floats read from and
// written to any dtype. Included by kernel files inside an instruction set's namespace, after its vectors.

#include "cpu/philox_vector.h"
#include "cpu/normal_vector.h"

// z, or with kAdd value + coefficient * z. Words first and normals after them: each loop's chain of operations is long,
// and the shorter the body, the more of its rounds a processor has in flight (20 M normals with AVX-512 on a Zen 5:
// 11 ms in place of 16).
template <bool kAdd>
static void fill_normals(float* value, uint64_t seed, int64_t block, uint32_t tensor_id, float coefficient) {
    constexpr int64_t kCount = kZoBlock / philox::kNormalsPerCounter;
    const uint64_t first = (uint64_t)block * kCount;
#if PEFTFAST_ISA
    Ints radius_words[kCount / kCounters], angle_words[kCount / kCounters];
    for (int64_t i = 0; i < kCount / kCounters; ++i) {
        Counters word[4];
        philox_at(word, seed, first + i * kCounters, tensor_id, philox::kStreamGaussian);
        radius_words[i] = ints_pair(word[0], word[2]);
        angle_words[i] = ints_pair(word[1], word[3]);
    }
    const Vec factor = vec_set(coefficient);
    for (int64_t i = 0; i < kCount / kCounters; ++i, value += kNormals) {
        const VecPair normals = normal_pairs(radius_words[i], angle_words[i]);
        if (kAdd) {
            const VecPair z = interleave(normals.first, normals.second);
            vec_store(value, vec_add(vec_load(value), vec_mul(factor, z.first)));
            vec_store(value + kWidth, vec_add(vec_load(value + kWidth), vec_mul(factor, z.second)));
        } else {
            store_interleaved(value, normals);
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
