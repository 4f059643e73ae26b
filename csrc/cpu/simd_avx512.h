// Vectors of sixteen floats. Included by each_isa.h inside a namespace.

typedef __m512 Vec;
constexpr int kWidth = 16;

// Register blocks: 24 accumulators of the 32 registers, the rest for operands.
constexpr int kDotRows = 3, kDotRanks = 8;
constexpr int kOuterRanks = 8, kOuterVecs = 3;
constexpr int kExpandBlockRows = 6, kExpandVecs = 4;

static inline Vec vec_zero() { return _mm512_setzero_ps(); }
static inline Vec vec_set(float value) { return _mm512_set1_ps(value); }
static inline Vec vec_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void vec_store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec vec_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec vec_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec vec_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

static inline Vec vec_from_bf16(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec vec_load_bf16(const uint16_t* p) { return vec_from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
static inline Vec vec_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// narrow.h's bf16_from_float on sixteen lanes.
static inline __m256i vec_to_bf16(Vec v) {
#if defined(PEFTFAST_DOT_BF16)
    // The instruction rounds as this does, but takes denormals for zeros.
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0x20) == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
static inline __m256i vec_to_f16(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec vec_round_bf16(Vec v) { return vec_from_bf16(vec_to_bf16(v)); }
static inline Vec vec_round_f16(Vec v) { return _mm512_cvtph_ps(vec_to_f16(v)); }
static inline void vec_store_bf16(uint16_t* p, Vec v) { _mm256_storeu_si256((__m256i*)p, vec_to_bf16(v)); }
static inline void vec_store_f16(uint16_t* p, Vec v) { _mm256_storeu_si256((__m256i*)p, vec_to_f16(v)); }

// Lanes whose bit is clear become zero; `bits` is a row's mask and `column`, a multiple of kWidth, the vector's place
// in it.
static inline Vec vec_keep(Vec v, const uint8_t* bits, int64_t column) {
    uint16_t mask;
    __builtin_memcpy(&mask, bits + column / 8, sizeof mask);
    return _mm512_maskz_mov_ps(mask, v);
}

// The lanes summed in one fixed order: halves, quarters, pairs.
static inline float vec_sum(Vec v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

// vec_sum of `count` vectors one after the other, sixteen at a time: each of the same additions, of lanes brought
// side by side.
static inline void vec_sums(const float* v, int64_t count, float* out) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        Vec half[8], quarter[4], pair[2];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const Vec a = vec_load(v + (i + 2 * j) * kWidth), b = vec_load(v + (i + 2 * j + 1) * kWidth);
            half[j] = vec_add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Vec a = half[2 * j], b = half[2 * j + 1];
            quarter[j] = vec_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const Vec a = quarter[2 * j], b = quarter[2 * j + 1];
            pair[j] = vec_add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
        }
        const Vec sums = vec_add(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
        vec_store(out + i, _mm512_permutexvar_ps(order, sums));
    }
    for (; i < count; ++i) out[i] = vec_sum(vec_load(v + i * kWidth));
}

// Sixteen rows of sixteen numbers of 32 bits to its columns: pairs of numbers, pairs of those, then 128-bit lanes.
static inline void transpose_words(__m512i v[kWidth]) {
    __m512i pair[kWidth], four[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 4) {
        four[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        four[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        four[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(four[i], four[i + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(four[i], four[i + 4], 0xdd);
        const __m512i last_even = _mm512_shuffle_i32x4(four[i + 8], four[i + 12], 0x88);
        const __m512i last_odd = _mm512_shuffle_i32x4(four[i + 8], four[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(even, last_even, 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(odd, last_odd, 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(even, last_even, 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(odd, last_odd, 0xdd);
    }
}
static inline void vec_transpose(Vec v[kWidth]) {
    __m512i words[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) words[i] = _mm512_castps_si512(v[i]);
    transpose_words(words);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = _mm512_castsi512_ps(words[i]);
}

// Philox on eight counters, one to a 64-bit lane; only a lane's low half is meaningful, which is all that mul_epu32
// reads.
typedef __m512i Counters;
constexpr int kCounters = 8;

static inline Counters counters_from(uint64_t q) {
    return _mm512_add_epi64(_mm512_set1_epi64((long long)q), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
static inline Counters counters_set(uint32_t word) { return _mm512_set1_epi64(word); }
static inline Counters counters_multiply(Counters a, Counters b) { return _mm512_mul_epu32(a, b); }
static inline Counters counters_high(Counters a) { return _mm512_srli_epi64(a, 32); }
static inline Counters counters_xor(Counters a, Counters b, Counters c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
static inline void counters_store(uint64_t* p, Counters a) {
    _mm512_storeu_si512(p, _mm512_and_si512(a, _mm512_set1_epi64(0xffffffff)));
}

// One byte of keep bits for each counter; `limit` is the threshold - 1.
static inline void counters_keep(uint8_t* out, const Counters word[4], uint16_t limit) {
    const __mmask16 odd = 0xaaaa;  // the upper half of each 64-bit lane
    const __m512i low = _mm512_mask_blend_epi32(odd, word[0], _mm512_slli_epi64(word[1], 32));
    const __m512i high = _mm512_mask_blend_epi32(odd, word[2], _mm512_slli_epi64(word[3], 32));
    const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    const __m512i limits = _mm512_set1_epi16((short)limit);
    const uint64_t bits = (uint64_t)_mm512_cmple_epu16_mask(_mm512_permutex2var_epi64(low, first, high), limits) |
                          (uint64_t)_mm512_cmple_epu16_mask(_mm512_permutex2var_epi64(low, second, high), limits) << 32;
    __builtin_memcpy(out, &bits, sizeof bits);
}
