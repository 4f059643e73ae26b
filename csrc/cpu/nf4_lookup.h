// Decoding 4-bit blocks: what the dequantiser and the few-row product share. Included inside an instruction set's
// namespace. A block has one maximum, so its sixteen possible values are computed and rounded once and the
// elements look them up: the same bits as rounding each element, at a sixteenth of the work.

template <class T>
static void lookup_plain(const uint8_t* packed, const T* table, int64_t begin, int64_t end, T* out) {
    for (int64_t i = begin; i < end; ++i) out[i - begin] = table[nf4::nibble(packed[i / 2], i)];
}

// `count` elements, a multiple of 32, from the start of `packed`.
#if PEFTFAST_ISA == 512
static inline void lookup(const uint8_t* packed, const uint16_t* table, int64_t count, uint16_t* out) {
    // Both halves of the 32-entry permutation hold the table, so that bit 4 of an index does not matter.
    const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)table));
    for (int64_t i = 0; i < count; i += 32) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, values));
    }
}
static inline void lookup(const uint8_t* packed, const float* table, int64_t count, float* out) {
    const __m512 values = _mm512_load_ps(table);
    for (int64_t i = 0; i < count; i += 16) {  // permutexvar_ps reads the low 4 bits of an index
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, values));
    }
}
#elif PEFTFAST_ISA == 256
static inline void lookup(const uint8_t* packed, const uint16_t* table, int64_t count, uint16_t* out) {
    // By halves, as the table was stored: one load across two fresh stores would wait for both to reach the cache.
    const __m256i values = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128((const __m128i*)table)),
                                                   _mm_load_si128((const __m128i*)(table + 8)), 1);
    const __m256i even = _mm256_set1_epi16(0x00ff);
    const __m256i both = _mm256_permute4x64_epi64(  // low bytes of the sixteen values, then their high bytes
        _mm256_packus_epi16(_mm256_and_si256(values, even), _mm256_srli_epi16(values, 8)), 0xd8);
    const __m256i low_bytes = _mm256_permute4x64_epi64(both, 0x44), high_bytes = _mm256_permute4x64_epi64(both, 0xee);
    for (int64_t i = 0; i < count; i += 32) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
        const __m256i index = _mm256_and_si256(
            _mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8)), _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(low_bytes, index), high = _mm256_shuffle_epi8(high_bytes, index);
        const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
        _mm256_storeu_si256((__m256i*)(out + i), _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i*)(out + i + 16), _mm256_permute2x128_si256(first, second, 0x31));
    }
}
static inline void lookup(const uint8_t* packed, const float* table, int64_t count, float* out) {
    const __m256 lower = _mm256_load_ps(table), upper = _mm256_load_ps(table + 8);
    for (int64_t i = 0; i < count; i += 8) {
        int32_t four;
        __builtin_memcpy(&four, packed + i / 2, sizeof four);
        const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the nibble to the sign
        const __m256 value =
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index), is_upper);
        _mm256_storeu_ps(out + i, value);
    }
}
#else
template <class T>
static inline void lookup(const uint8_t* packed, const T* table, int64_t count, T* out) {
    for (int64_t i = 0; i < count / 2; ++i) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
}
#endif

// Elements begin .. end of one block to `out`. A range that begins inside a byte has its first element looked up alone.
template <class T>
static inline void lookup_range(const uint8_t* packed, const T* table, int64_t begin, int64_t end, T* out) {
    if (begin % 2 != 0 && begin < end) {
        lookup_plain(packed, table, begin, begin + 1, out);
        ++begin, ++out;
    }
    const int64_t whole = begin + (end - begin) / 32 * 32;
    if (whole > begin) lookup(packed + begin / 2, table, whole - begin, out);
    if (whole < end) lookup_plain(packed, table, whole, end, out + (whole - begin));
}

static inline float block_maximum(const BlockMaxima& maxima, int64_t block) {
    if (maxima.bytes == nullptr) return maxima.absmax[block];
    return nf4::unnest(maxima.nested_code[maxima.bytes[block]], maxima.nested_absmax[block / nf4::kNestedBlock],
                       maxima.nested_offset);
}

#if PEFTFAST_ISA == 512
// Entries of a table of 256 by indices below 256: eight permutations of 32 entries each and a tree of choices, at half
// the time of a gather.
static inline Vec lookup_256(__m512i index, const float* table) {
    Vec part[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        part[i] = _mm512_permutex2var_ps(vec_load(table + 32 * i), index, vec_load(table + 32 * i + 16));
    }
    const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    const __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] = _mm512_mask_blend_ps(bit5, part[2 * i], part[2 * i + 1]);
    return _mm512_mask_blend_ps(bit7, _mm512_mask_blend_ps(bit6, part[0], part[1]),
                                _mm512_mask_blend_ps(bit6, part[2], part[3]));
}
#endif

// Maxima of blocks begin .. end.
static void fill_maxima(const BlockMaxima& maxima, int64_t begin, int64_t end, float* out) {
    int64_t block = begin;
#if PEFTFAST_ISA == 512
    if (maxima.bytes != nullptr) {
        // Sixteen blocks from a multiple of sixteen share their nested maximum.
        for (; block < end && block % 16 != 0; ++block) out[block - begin] = block_maximum(maxima, block);
        for (; block + 16 <= end; block += 16) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(maxima.bytes + block)));
            const Vec nested = vec_set(maxima.nested_absmax[block / nf4::kNestedBlock]);
            const Vec product = vec_mul(lookup_256(index, maxima.nested_code), nested);
            vec_store(out + (block - begin), vec_add(product, vec_set(maxima.nested_offset)));
        }
    }
#endif
    for (; block < end; ++block) out[block - begin] = block_maximum(maxima, block);
}

static inline void scale_table(const float* code, float maximum, float* scaled) {
    const Vec factor = vec_set(maximum);
    for (int i = 0; i < 16; i += kWidth) vec_store(scaled + i, vec_mul(vec_load(code + i), factor));
}

template <DType kType>
static inline void fill_table(uint16_t* table, const float* scaled) {
    for (int i = 0; i < 16; i += kWidth) {
        if (kType == DType::bf16) {
            vec_store_bf16(table + i, vec_load(scaled + i));
        } else {
            vec_store_f16(table + i, vec_load(scaled + i));
        }
    }
}
template <DType kType>
static inline void fill_table(float* table, const float* scaled) {
    for (int i = 0; i < 16; i += kWidth) vec_store(table + i, vec_load(scaled + i));
}

template <class T, DType kType>
static void dequantize_blocks(const Nf4Weight& weight, const Nf4Slab& slab, T* out, int64_t begin, int64_t end) {
    alignas(64) float scaled[16];
    alignas(64) T table[16];
    int64_t i = begin * weight.block_size < slab.begin ? slab.begin : begin * weight.block_size;
    int64_t column = (i - slab.begin) % slab.width;
    T* row = out + (i - slab.begin) / slab.width * slab.stride;
    for (int64_t block = begin; block < end; ++block) {
        scale_table(weight.code, block_maximum(weight.maxima, block), scaled);
        fill_table<kType>(table, scaled);
        const int64_t last = (block + 1) * weight.block_size < slab.end ? (block + 1) * weight.block_size : slab.end;
        while (i < last) {  // the pieces of the block that lie in one row each
            const int64_t stop = slab.width - column < last - i ? i + slab.width - column : last;
            lookup_range(weight.packed, table, i, stop, row + column);
            column += stop - i;
            i = stop;
            if (column == slab.width) {
                column = 0;
                row += slab.stride;
            }
        }
    }
}
