// philox::normal_pair on vectors: the 4 * kCounters normals of kCounters counters. Included by kernel files inside an
// instruction set's namespace, after cpu/philox_vector.h.

constexpr int kNormals = 4 * kCounters;

#if PEFTFAST_ISA == 512
typedef __m512i Ints;
static inline Ints ints_set(uint32_t value) { return _mm512_set1_epi32((int)value); }
static inline Ints ints_add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Ints ints_sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
static inline Ints ints_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
static inline Ints ints_left_2(Ints a) { return _mm512_slli_epi32(a, 2); }
static inline Ints ints_exponent(Ints a) { return _mm512_srai_epi32(a, 23); }
static inline Ints ints_of(Vec v) { return _mm512_castps_si512(v); }
static inline Vec vec_of(Ints a) { return _mm512_castsi512_ps(a); }
static inline Vec vec_from_signed(Ints a) { return _mm512_cvtepi32_ps(a); }
static inline Vec vec_from_unsigned(Ints a) { return _mm512_cvtepu32_ps(a); }
static inline Vec vec_sqrt(Vec v) { return _mm512_sqrt_ps(v); }
static inline Vec vec_xor(Vec v, Ints a) { return _mm512_xor_ps(v, _mm512_castsi512_ps(a)); }
// Lanes of `yes` where bit 30 of `a` is set, else of `no`.
static inline Vec vec_choose(Ints a, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(a, _mm512_set1_epi32(1 << 30)), no, yes);
}
// Counter j's word of `a` in lane 2j, its word of `b` in lane 2j + 1.
static inline Ints ints_pair(Counters a, Counters b) {
    return _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32));
}
struct VecPair {
    Vec first, second;
};
static inline VecPair interleave(Vec even, Vec odd) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    return VecPair{_mm512_permutex2var_ps(even, first, odd), _mm512_permutex2var_ps(even, second, odd)};
}
// The words of kCounters counters in order, four to a counter.
static inline void store_words(uint32_t* out, const Counters word[4]) {
    const __m512i low = ints_pair(word[0], word[1]), high = ints_pair(word[2], word[3]);
    const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(low, second, high));
}
#elif PEFTFAST_ISA == 256
typedef __m256i Ints;
static inline Ints ints_set(uint32_t value) { return _mm256_set1_epi32((int)value); }
static inline Ints ints_add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
static inline Ints ints_sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
static inline Ints ints_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
static inline Ints ints_left_2(Ints a) { return _mm256_slli_epi32(a, 2); }
static inline Ints ints_exponent(Ints a) { return _mm256_srai_epi32(a, 23); }
static inline Ints ints_of(Vec v) { return _mm256_castps_si256(v); }
static inline Vec vec_of(Ints a) { return _mm256_castsi256_ps(a); }
static inline Vec vec_from_signed(Ints a) { return _mm256_cvtepi32_ps(a); }
// Halves apart are exact, so that their sum is rounded once.
static inline Vec vec_from_unsigned(Ints a) {
    const Vec high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16)), _mm256_set1_ps(65536.0f));
    return _mm256_add_ps(high, _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xffff))));
}
static inline Vec vec_sqrt(Vec v) { return _mm256_sqrt_ps(v); }
static inline Vec vec_xor(Vec v, Ints a) { return _mm256_xor_ps(v, _mm256_castsi256_ps(a)); }
static inline Vec vec_choose(Ints a, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_slli_epi32(a, 1)));
}
static inline Ints ints_pair(Counters a, Counters b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa); }
struct VecPair {
    Vec first, second;
};
static inline VecPair interleave(Vec even, Vec odd) {
    const Vec low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    return VecPair{_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
static inline void store_words(uint32_t* out, const Counters word[4]) {
    const __m256i low = ints_pair(word[0], word[1]), high = ints_pair(word[2], word[3]);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i*)(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
#else
static inline void store_words(uint32_t* out, const Counters word[4]) {
    for (int i = 0; i < 4; ++i) out[i] = (uint32_t)word[i];
}
#endif

#if PEFTFAST_ISA
constexpr float kLog[8] = {philox::kLog0, philox::kLog1, philox::kLog2, philox::kLog3,
                           philox::kLog4, philox::kLog5, philox::kLog6, philox::kLog7};
constexpr float kSin[4] = {philox::kSin0, philox::kSin1, philox::kSin2, philox::kSin3};
constexpr float kCos[3] = {philox::kCos0, philox::kCos1, philox::kCos2};

// philox::normal_pair of kPairs vectors of words, step by step side by side, for the reason that philox_groups gives.
#define PEFTFAST_EACH _Pragma("GCC unroll 4") for (int g = 0; g < kPairs; ++g)
template <int kPairs>
static inline void normal_pairs_of(const Ints* radius_words, const Ints* angle_words, VecPair* out) {
    Ints from_root[kPairs];
    Vec f[kPairs], log[kPairs], radius[kPairs], y[kPairs], square[kPairs], sine[kPairs], cosine[kPairs];
    PEFTFAST_EACH {
        const Vec t = vec_add(vec_from_unsigned(radius_words[g]), vec_set(0.5f));
        from_root[g] = ints_sub(ints_of(t), ints_set(philox::kSqrtHalfBits));
    }
    PEFTFAST_EACH {
        const Ints mantissa = ints_add(ints_and(from_root[g], ints_set(0x7fffff)), ints_set(philox::kSqrtHalfBits));
        f[g] = vec_add(vec_of(mantissa), vec_set(-1.0f));
        log[g] = vec_set(kLog[7]);
    }
#pragma GCC unroll 7
    for (int i = 6; i >= 0; --i) {
        PEFTFAST_EACH log[g] = vec_add(vec_mul(log[g], f[g]), vec_set(kLog[i]));
    }
    PEFTFAST_EACH {
        const Vec steps = vec_from_signed(ints_sub(ints_set(32), ints_exponent(from_root[g])));
        radius[g] = vec_sqrt(vec_add(vec_mul(f[g], log[g]), vec_mul(steps, vec_set(philox::kTwoLn2))));
    }
    PEFTFAST_EACH {
        y[g] = vec_mul(vec_from_signed(ints_left_2(angle_words[g])), vec_set(0x1p-31f));
        square[g] = vec_mul(y[g], y[g]);
        sine[g] = vec_set(kSin[3]);
        cosine[g] = vec_set(kCos[2]);
    }
#pragma GCC unroll 3
    for (int i = 2; i >= 0; --i) {
        PEFTFAST_EACH sine[g] = vec_add(vec_mul(sine[g], square[g]), vec_set(kSin[i]));
    }
#pragma GCC unroll 2
    for (int i = 1; i >= 0; --i) {
        PEFTFAST_EACH cosine[g] = vec_add(vec_mul(cosine[g], square[g]), vec_set(kCos[i]));
    }
    PEFTFAST_EACH {
        const Ints turned = ints_add(angle_words[g], ints_set(1u << 29)), top = ints_set(1u << 31);
        sine[g] = vec_mul(y[g], sine[g]);
        cosine[g] = vec_add(vec_mul(square[g], cosine[g]), vec_set(1.0f));
        const Vec first =
            vec_xor(vec_choose(turned, sine[g], cosine[g]), ints_and(ints_add(turned, ints_set(1u << 30)), top));
        const Vec second = vec_xor(vec_choose(turned, cosine[g], sine[g]), ints_and(turned, top));
        out[g] = VecPair{vec_mul(radius[g], first), vec_mul(radius[g], second)};
    }
}
#undef PEFTFAST_EACH
static inline VecPair normal_pairs(Ints radius_words, Ints angle_words) {
    VecPair pair;
    normal_pairs_of<1>(&radius_words, &angle_words, &pair);
    return pair;
}

static inline void store_interleaved(float* out, VecPair pair) {
    const VecPair in_order = interleave(pair.first, pair.second);
    vec_store(out, in_order.first);
    vec_store(out + kWidth, in_order.second);
}
#endif

// kNormals normals of the counters in `word`, in the order of their elements.
static inline void store_normals(float* out, const Counters word[4]) {
#if PEFTFAST_ISA
    store_interleaved(out, normal_pairs(ints_pair(word[0], word[2]), ints_pair(word[1], word[3])));
#else
    for (int i = 0; i < 4; i += 2) {
        const philox::Pair pair = philox::normal_pair((uint32_t)word[i], (uint32_t)word[i + 1]);
        out[i] = pair.first, out[i + 1] = pair.second;
    }
#endif
}
