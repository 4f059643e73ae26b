// Vectors of eight floats, with fused multiply-add. Included by each_isa.h inside a namespace.

typedef __m256 Vec;
constexpr int kWidth = 8;

// Register blocks: 12 accumulators of the 16 registers, the rest for operands.
constexpr int kDotRows = 3, kDotRanks = 4;
constexpr int kOuterRanks = 4, kOuterVecs = 3;
constexpr int kExpandBlockRows = 6, kExpandVecs = 2;

static inline Vec vec_zero() { return _mm256_setzero_ps(); }
static inline Vec vec_set(float value) { return _mm256_set1_ps(value); }
static inline Vec vec_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void vec_store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec vec_add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec vec_mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec vec_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

static inline Vec vec_from_bf16(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Vec vec_load_bf16(const uint16_t* p) { return vec_from_bf16(_mm_loadu_si128((const __m128i*)p)); }
static inline Vec vec_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// narrow.h's bf16_from_float on eight lanes.
static inline __m128i vec_to_bf16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i narrow = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
}
static inline __m128i vec_to_f16(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec vec_round_bf16(Vec v) { return vec_from_bf16(vec_to_bf16(v)); }
static inline Vec vec_round_f16(Vec v) { return _mm256_cvtph_ps(vec_to_f16(v)); }
static inline void vec_store_bf16(uint16_t* p, Vec v) { _mm_storeu_si128((__m128i*)p, vec_to_bf16(v)); }
static inline void vec_store_f16(uint16_t* p, Vec v) { _mm_storeu_si128((__m128i*)p, vec_to_f16(v)); }

// Lanes whose bit is clear become zero; `bits` is a row's mask and `column`, a multiple of kWidth, the vector's place
// in it.
static inline Vec vec_keep(Vec v, const uint8_t* bits, int64_t column) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i mask = _mm256_and_si256(_mm256_set1_epi32(bits[column / 8]), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(mask, lane)));
}

// The lanes summed in one fixed order: halves, pairs.
static inline float vec_sum(Vec v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

static inline void vec_sums(const float* v, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = vec_sum(vec_load(v + i * kWidth));
}

// Eight rows of eight numbers to its columns: pairs, pairs of those, then halves.
static inline void vec_transpose(Vec v[kWidth]) {
    Vec pair[kWidth], four[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 2) {
        pair[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kWidth; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}

// Philox on four counters, one to a 64-bit lane; only a lane's low half is meaningful, which is all that mul_epu32
// reads.
typedef __m256i Counters;
constexpr int kCounters = 4;

static inline Counters counters_from(uint64_t q) {
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)q), _mm256_set_epi64x(3, 2, 1, 0));
}
static inline Counters counters_set(uint32_t word) { return _mm256_set1_epi64x(word); }
static inline Counters counters_multiply(Counters a, Counters b) { return _mm256_mul_epu32(a, b); }
static inline Counters counters_high(Counters a) { return _mm256_srli_epi64(a, 32); }
static inline Counters counters_xor(Counters a, Counters b, Counters c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
static inline void counters_store(uint64_t* p, Counters a) {
    _mm256_storeu_si256((__m256i*)p, _mm256_and_si256(a, _mm256_set1_epi64x(0xffffffff)));
}

// One byte of keep bits for each counter; `limit` is the threshold - 1. Unsigned a <= b where min(a, b) == a.
static inline void counters_keep(uint8_t* out, const Counters word[4], uint16_t limit) {
    const __m256i low = _mm256_blend_epi32(word[0], _mm256_slli_epi64(word[1], 32), 0xaa);
    const __m256i high = _mm256_blend_epi32(word[2], _mm256_slli_epi64(word[3], 32), 0xaa);
    const __m256i even = _mm256_unpacklo_epi64(low, high);  // counters 0 and 2, one to a 128-bit half
    const __m256i odd = _mm256_unpackhi_epi64(low, high);   // counters 1 and 3
    const __m256i limits = _mm256_set1_epi16((short)limit);
    const __m256i keep_even = _mm256_cmpeq_epi16(_mm256_min_epu16(even, limits), even);
    const __m256i keep_odd = _mm256_cmpeq_epi16(_mm256_min_epu16(odd, limits), odd);
    const uint32_t bits = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(keep_even, keep_odd));
    __builtin_memcpy(out, &bits, sizeof bits);
}
