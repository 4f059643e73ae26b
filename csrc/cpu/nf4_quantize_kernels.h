// Kernels of cpu/nf4_quantize.cpp, compiled once for each instruction set. A value's rank among the sorted codes is how
// many of the fifteen bounds lie below it; comparisons that are false for a NaN leave it the last.

static inline Vec load_vec(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::f32) return vec_load((const float*)data + i);
    if (dtype == DType::bf16) return vec_load_bf16((const uint16_t*)data + i);
    return vec_load_f16((const uint16_t*)data + i);
}

static inline float load_one(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::f32) return ((const float*)data)[i];
    if (dtype == DType::bf16) return float_from_bf16(((const uint16_t*)data)[i]);
    return float_from_f16(((const uint16_t*)data)[i]);
}

// Ranks of 32 values that lie in `values`, as bytes.
#if PEFTFAST_ISA == 512
static inline uint32_t largest_magnitude(const void* data, DType dtype, int64_t begin, int64_t end) {
    __m512i most = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t i = begin; i < end; i += 16) {
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load_vec(data, dtype, i)), magnitude));
    }
    return _mm512_reduce_max_epu32(most);
}
static inline __m128i rank_sixteen(__m512 value, __m512 scale, __m512 bounds) {
    value = _mm512_mul_ps(value, scale);
    // min and max give their second operand for a NaN.
    value = _mm512_max_ps(_mm512_set1_ps(-1.0f), _mm512_min_ps(_mm512_set1_ps(1.0f), value));
    __m512i rank = _mm512_setzero_si512();
    for (int step = 8; step > 0; step /= 2) {  // entry 15 of the bounds is infinite
        const __m512i next = _mm512_add_epi32(rank, _mm512_set1_epi32(step));
        const __m512 bound = _mm512_permutexvar_ps(_mm512_sub_epi32(next, _mm512_set1_epi32(1)), bounds);
        rank = _mm512_mask_mov_epi32(rank, _mm512_cmp_ps_mask(bound, value, _CMP_NGE_UQ), next);
    }
    return _mm512_cvtepi32_epi8(rank);
}
static inline void pack_block(const void* data, DType dtype, int64_t begin, int64_t end, float scale,
                              const float* bounds, const uint8_t* order, uint8_t* packed) {
    const __m512 scales = _mm512_set1_ps(scale), limits = _mm512_load_ps(bounds);
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)order));
    for (int64_t i = begin; i < end; i += 32) {
        const __m256i ranks =
            _mm256_inserti128_si256(_mm256_castsi128_si256(rank_sixteen(load_vec(data, dtype, i), scales, limits)),
                                    rank_sixteen(load_vec(data, dtype, i + 16), scales, limits), 1);
        const __m256i index = _mm256_shuffle_epi8(codes, ranks);
        const __m256i pairs = _mm256_maddubs_epi16(index, _mm256_set1_epi16(0x0110));  // 16 * even + odd
        _mm_storeu_si128((__m128i*)(packed + i / 2), _mm256_cvtepi16_epi8(pairs));
    }
}
#elif PEFTFAST_ISA == 256
static inline uint32_t largest_magnitude(const void* data, DType dtype, int64_t begin, int64_t end) {
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t i = begin; i < end; i += 8) {
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load_vec(data, dtype, i)), magnitude));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, most);
    uint32_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
    return bits;
}
static inline __m256i rank_eight(__m256 value, __m256 scale, const float* bounds) {
    value = _mm256_mul_ps(value, scale);
    value = _mm256_max_ps(_mm256_set1_ps(-1.0f), _mm256_min_ps(_mm256_set1_ps(1.0f), value));
    __m256i rank = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) {  // a true comparison is -1
        rank = _mm256_sub_epi32(
            rank, _mm256_castps_si256(_mm256_cmp_ps(_mm256_broadcast_ss(bounds + i), value, _CMP_NGE_UQ)));
    }
    return rank;
}
static inline void pack_block(const void* data, DType dtype, int64_t begin, int64_t end, float scale,
                              const float* bounds, const uint8_t* order, uint8_t* packed) {
    const __m256 scales = _mm256_set1_ps(scale);
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)order));
    for (int64_t i = begin; i < end; i += 32) {
        const __m256i first = _mm256_packus_epi32(rank_eight(load_vec(data, dtype, i), scales, bounds),
                                                  rank_eight(load_vec(data, dtype, i + 8), scales, bounds));
        const __m256i second = _mm256_packus_epi32(rank_eight(load_vec(data, dtype, i + 16), scales, bounds),
                                                   rank_eight(load_vec(data, dtype, i + 24), scales, bounds));
        // The packs work in halves: 0-3, 8-11, 16-19, 24-27 | 4-7, ... in groups of four bytes.
        const __m256i mixed = _mm256_packus_epi16(first, second);
        const __m256i ranks = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m256i index = _mm256_shuffle_epi8(codes, ranks);
        const __m256i pairs = _mm256_maddubs_epi16(index, _mm256_set1_epi16(0x0110));
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i*)(packed + i / 2), _mm256_castsi256_si128(bytes));
    }
}
#else
static inline uint32_t largest_magnitude(const void* data, DType dtype, int64_t begin, int64_t end) {
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t own = nf4::magnitude_bits(load_one(data, dtype, i));
        bits = own > bits ? own : bits;
    }
    return bits;
}
static inline void pack_block(const void* data, DType dtype, int64_t begin, int64_t end, float scale,
                              const float* bounds, const uint8_t* order, uint8_t* packed) {
    for (int64_t i = begin; i < end; i += 2) {
        uint32_t pair = 0;
        for (int64_t j = i; j < i + 2; ++j) {
            const float value = nf4::scaled_value(load_one(data, dtype, j), scale, false);
            pair = pair * 16 + order[nf4::bounds_below(bounds, 15, value)];
        }
        packed[i / 2] = (uint8_t)pair;
    }
}
#endif

static void quantize(const void* weight, DType dtype, int64_t count, int64_t block_size, const float* bounds,
                     const uint8_t* order, uint8_t* packed, float* absmax, int64_t begin, int64_t end) {
    alignas(64) float limits[16];
    for (int i = 0; i < 15; ++i) limits[i] = bounds[i];
    limits[15] = bits_float(0x7f800000u);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * block_size;
        if (first + block_size <= count) {
            const float maximum = bits_float(largest_magnitude(weight, dtype, first, first + block_size));
            absmax[block] = maximum;
            const float scale = nf4::divide(1.0f, nf4::clamped_maximum(maximum));
            pack_block(weight, dtype, first, first + block_size, scale, limits, order, packed);
            continue;
        }
        uint32_t bits = 0;  // the short last block
        for (int64_t i = first; i < count; ++i) {
            const uint32_t own = nf4::magnitude_bits(load_one(weight, dtype, i));
            bits = own > bits ? own : bits;
        }
        const float maximum = nf4::clamped_maximum(bits_float(bits));
        absmax[block] = maximum;
        for (int64_t i = first; i < count + count % 2; i += 2) {
            uint32_t pair = 0;
            for (int64_t j = i; j < i + 2; ++j) {  // an odd count is completed by a zero
                const float value = j < count ? nf4::scaled_value(load_one(weight, dtype, j), maximum, true) : 0.0f;
                pair = pair * 16 + order[nf4::bounds_below(limits, 15, value)];
            }
            packed[i / 2] = (uint8_t)pair;
        }
    }
}

static const Nf4QuantizeKernels nf4_quantize_table = {quantize};
