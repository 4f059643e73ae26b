// Kernels of cpu/nf4_linear.cpp, compiled once for each instruction set. Packed bytes are read once and decoded in
// registers: a vector of bytes is a vector of even elements and one of odd ones, so x lies sorted in the same way.

#include "cpu/nf4_rows.h"

constexpr int64_t kLanes = kWidth;
static inline Vec multiply_add(Vec weight, const float* x, Vec sum) { return vec_fma(weight, vec_load(x), sum); }
#if PEFTFAST_ISA == 512
struct Values {
    __m512 all;
};
static inline Values block_values(const float* code, float maximum) {
    return {vec_mul(vec_load(code), vec_set(maximum))};
}
static inline void decode(const uint8_t* bytes, const Values& values, Vec* even, Vec* odd) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    *even = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), values.all);
    *odd = _mm512_permutexvar_ps(index, values.all);  // which reads the low 4 bits
}
#elif PEFTFAST_ISA == 256
struct Values {
    __m256 lower, upper;
};
static inline Values block_values(const float* code, float maximum) {
    const Vec factor = vec_set(maximum);
    return {vec_mul(vec_load(code), factor), vec_mul(vec_load(code + 8), factor)};
}
static inline Vec decode_eight(__m256i index, const Values& values) {
    const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the nibble to the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.lower, index),
                            _mm256_permutevar8x32_ps(values.upper, index), is_upper);
}
static inline void decode(const uint8_t* bytes, const Values& values, Vec* even, Vec* odd) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
    *even = decode_eight(_mm256_srli_epi32(index, 4), values);
    *odd = decode_eight(index, values);
}
#else
struct Values {
    float all[16];
};
static inline Values block_values(const float* code, float maximum) {
    Values values;
    scale_table(code, maximum, values.all);
    return values;
}
static inline void decode(const uint8_t* bytes, const Values& values, Vec* even, Vec* odd) {
    for (int i = 0; i < 4; ++i) {
        (*even)[i] = values.all[bytes[i] >> 4];
        (*odd)[i] = values.all[bytes[i] & 15];
    }
}
#endif
constexpr int64_t kGroup = 2 * kLanes;  // columns that are decoded together

constexpr int kRowsAtOnce = 8;  // of x

// Row m of x rounded to the compute dtype, into x. Where `sorted`, x is made of up to eight rows each, within them of
// groups, within those of rows, and a group has its even columns before its odd ones: that is the order in which the
// products read it.
static void prepare_row(const Nf4Linear& p, int64_t m, bool sorted, const float* exact, float* x) {
    if (!sorted) {
        for (int64_t k = 0; k < p.K; ++k) x[m * p.K + k] = rounded(exact[k], p.compute);
        return;
    }
    const int64_t first = m / kRowsAtOnce * kRowsAtOnce;
    const int64_t many = p.M - first < kRowsAtOnce ? p.M - first : kRowsAtOnce;
    float* target = x + first * p.K + (m - first) * kGroup;
    for (int64_t k = 0; k < p.K; k += kGroup, target += many * kGroup) {
        for (int64_t i = 0; i < kLanes; ++i) {
            target[i] = rounded(exact[k + 2 * i], p.compute);
            target[kLanes + i] = rounded(exact[k + 2 * i + 1], p.compute);
        }
    }
}

// Adds the products of kM rows of x with weight rows n .. n + kN over columns begin .. end to out[m * kN + row]. A
// group lies in one block; kAligned: so do blocks in rows.
template <int kM, int kN, bool kAligned>
static void add_products(const Nf4Linear& p, const float* x, const Maxima& maxima, int64_t n, int64_t begin,
                         int64_t end, float* out) {
    const int64_t size = p.weight.block_size;
    const uint8_t* bytes[kN];
    const float* maximum[kN];  // of the block that the next column lies in
    int64_t left[kN];          // how many columns remain of it
    for (int i = 0; i < kN; ++i) {
        const int64_t first = (n + i) * p.K + begin;
        bytes[i] = p.weight.packed + first / 2;
        maximum[i] = maxima.values + (first / size - maxima.begin);
        left[i] = size - first % size;
    }
    // Eight sums or more hide the latency of an addition; fewer are doubled.
    constexpr int kOdd = kM * kN < 8 ? kM * kN : 0;
    Vec sums[kM * kN + kOdd];
    for (int i = 0; i < kM * kN + kOdd; ++i) sums[i] = vec_zero();
    x += begin * kM;
    for (int64_t k = begin; k < end;) {
        Values values[kN];
        int64_t count = end - k < left[0] ? end - k : left[0];
        for (int i = 0; i < kN; ++i) {
            values[i] = block_values(p.weight.code, *maximum[i]);
            if (!kAligned && left[i] < count) count = left[i];
        }
        for (int64_t j = 0; j < count; j += kGroup, x += kM * kGroup) {
            for (int i = 0; i < kN; ++i) {
                Vec even, odd;
                decode(bytes[i] + j / 2, values[i], &even, &odd);
                for (int m = 0; m < kM; ++m) {
                    Vec &sum = sums[m * kN + i], &odd_sum = sums[m * kN + i + kOdd];
                    sum = multiply_add(even, x + m * kGroup, sum);
                    odd_sum = multiply_add(odd, x + m * kGroup + kLanes, odd_sum);
                }
            }
        }
        k += count;
        for (int i = 0; i < kN; ++i) {
            bytes[i] += count / 2;
            left[i] -= count;
            if (kAligned || left[i] == 0) {  // a part that ends within a block ends the loop
                ++maximum[i];
                left[i] = size;
            }
        }
    }
    for (int i = 0; i < kM * kN; ++i) out[i] += vec_sum(kOdd > 0 ? vec_add(sums[i], sums[i + kOdd]) : sums[i]);
}

// The same for one row of x where a group is a block, one weight row after the other: the packed bytes are then a
// single stream, which the processor reads ahead of. Eight groups at a time hide the latency of decoding and adding.
static void add_row_products(const Nf4Linear& p, const float* x, const Maxima& maxima, int64_t n, int64_t begin,
                             int64_t end, float* out) {
    constexpr int kGroups = 8;
    const int64_t first = n * p.K + begin;
    const uint8_t* bytes = p.weight.packed + first / 2;
    const float* maximum = maxima.values + (first / kGroup - maxima.begin);
    x += begin;
    Vec sums[kGroups];
    for (int i = 0; i < kGroups; ++i) sums[i] = vec_zero();
    int64_t groups = (end - begin) / kGroup;
    for (; groups >= kGroups; groups -= kGroups) {
        for (int i = 0; i < kGroups; ++i) {
            Vec even, odd;
            decode(bytes + i * (kGroup / 2), block_values(p.weight.code, maximum[i]), &even, &odd);
            sums[i] = multiply_add(even, x + i * kGroup, sums[i]);
            sums[i] = multiply_add(odd, x + i * kGroup + kLanes, sums[i]);
        }
        bytes += kGroups * (kGroup / 2), maximum += kGroups, x += kGroups * kGroup;
    }
    for (; groups > 0; --groups) {
        Vec even, odd;
        decode(bytes, block_values(p.weight.code, *maximum), &even, &odd);
        sums[0] = multiply_add(odd, x + kLanes, multiply_add(even, x, sums[0]));
        bytes += kGroup / 2, ++maximum, x += kGroup;
    }
    for (int i = 1; i < kGroups; ++i) sums[0] = vec_add(sums[0], sums[i]);
    out[0] += vec_sum(sums[0]);
}

typedef void (*AddProducts)(const Nf4Linear& p, const float* x, const Maxima& maxima, int64_t n, int64_t begin,
                            int64_t end, float* out);
// Weight rows at once, by rows of x: as many as leave the sums in registers.
constexpr int kTwo = kWidth >= 16 ? 2 : 1, kFour = 2 * kTwo;
static const int kWeightRows[kRowsAtOnce] = {kFour, kFour, kTwo, kTwo, kTwo, kTwo, kTwo, kTwo};
#define PEFTFAST_BY_ROWS(aligned)                                                                      \
    {add_products<1, kFour, aligned>, add_products<2, kFour, aligned>, add_products<3, kTwo, aligned>, \
     add_products<4, kTwo, aligned>,  add_products<5, kTwo, aligned>,  add_products<6, kTwo, aligned>, \
     add_products<7, kTwo, aligned>,  add_products<8, kTwo, aligned>}
static const AddProducts kSeveral[2][kRowsAtOnce] = {PEFTFAST_BY_ROWS(false), PEFTFAST_BY_ROWS(true)};
#undef PEFTFAST_BY_ROWS
// The last weight rows, one by one.
static const AddProducts kSingle[kRowsAtOnce] = {
    add_products<1, 1, false>, add_products<2, 1, false>, add_products<3, 1, false>, add_products<4, 1, false>,
    add_products<5, 1, false>, add_products<6, 1, false>, add_products<7, 1, false>, add_products<8, 1, false>};

// One value of y from the base product. s and b are padded with zeros to `padded` ranks, a multiple of the width.
static inline void finish(const Nf4Linear& p, int64_t m, int64_t n, float value, const float* s, const float* b,
                          int64_t padded) {
    if (p.bias.data != nullptr) value += element_of(p.bias, n * p.bias.column_stride);
    if (p.R > 0 || p.lora_bias.data != nullptr) {
        Vec sum = vec_zero();
        for (int64_t r = 0; r < padded; r += kWidth) {
            sum = vec_fma(vec_load(s + m * padded + r), vec_load(b + r), sum);
        }
        float added = vec_sum(sum);
        if (p.lora_bias.data != nullptr) added += element_of(p.lora_bias, n * p.lora_bias.column_stride);
        value += p.scaling * added;
    }
    const int64_t at = m * p.N + n;
    if (p.y_dtype == DType::f32) {
        ((float*)p.y)[at] = value;
    } else {
        ((uint16_t*)p.y)[at] = p.y_dtype == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

// Products of `many` rows of x with weight rows begin .. end, to products[(n - begin) * kRowsAtOnce + m]. Columns are
// taken in parts, so that those of x stay in the first cache while all the weight rows pass.
static void multiply_tile(const Nf4Linear& p, const float* x, const Maxima& maxima, int many, int64_t begin,
                          int64_t end, float* products) {
    const int64_t size = p.weight.block_size;
    int64_t part = 16384 / ((int64_t)sizeof(float) * many) / 512 * 512;
    part = part < 512 ? 512 : part > kPart ? kPart : part;
    const bool stream = many == 1 && size == kGroup;
    const AddProducts several = stream ? add_row_products : kSeveral[p.K % size == 0][many - 1];
    const int rows = stream ? 1 : kWeightRows[many - 1];
    float sums[kRowsAtOnce * 4];
    for (int64_t i = 0; i < (end - begin) * kRowsAtOnce; ++i) products[i] = 0.0f;
    for (int64_t k = 0; k < p.K; k += part) {
        const int64_t stop = k + part < p.K ? k + part : p.K;
        for (int64_t n = begin; n < end;) {
            const int taken = rows <= end - n ? rows : 1;
            for (int i = 0; i < taken * many; ++i) sums[i] = 0.0f;
            (taken == rows ? several : kSingle[many - 1])(p, x, maxima, n, k, stop, sums);
            for (int i = 0; i < taken; ++i) {
                for (int m = 0; m < many; ++m) products[(n + i - begin) * kRowsAtOnce + m] += sums[m * taken + i];
            }
            n += taken;
        }
    }
}

// The same from a decoded weight row, for sizes that no group divides.
static void multiply_rows(const Nf4Linear& p, const float* x, int many, int64_t begin, int64_t end, float* weight,
                          float* products) {
    const int64_t size = p.weight.block_size;
    for (int64_t n = begin; n < end; ++n) {
        const Nf4Slab slab = {n * p.K, (n + 1) * p.K, p.K, p.K};
        if (p.K > 0) {
            dequantize_blocks<float, DType::f32>(p.weight, slab, weight, slab.begin / size, (slab.end - 1) / size + 1);
        }
        for (int m = 0; m < many; ++m) products[(n - begin) * kRowsAtOnce + m] = dot(x + m * p.K, weight, p.K);
    }
}

// Rows begin .. end of the weight, at most kTileRows. `scratch` holds a row of B, the products,
// and a weight row or the tile's maxima, of which there are at most as many and two more.
static void linear_rows(const Nf4Linear& p, bool sorted, const float* x, const float* s, int64_t padded, float* scratch,
                        int64_t begin, int64_t end) {
    float* b = scratch;
    float* products = scratch + padded;
    float* weight = products + kTileRows * kRowsAtOnce;
    for (int64_t r = p.R; r < padded; ++r) b[r] = 0.0f;
    // In the place of the row, which is not decoded.
    const Maxima maxima = sorted ? tile_maxima(p, begin, end, weight) : Maxima{};
    for (int64_t m = 0; m < p.M; m += kRowsAtOnce) {
        const int many = (int)(p.M - m < kRowsAtOnce ? p.M - m : kRowsAtOnce);
        if (sorted) {
            multiply_tile(p, x + m * p.K, maxima, many, begin, end, products);
        } else {
            multiply_rows(p, x + m * p.K, many, begin, end, weight, products);
        }
        for (int64_t n = begin; n < end; ++n) {
            const float* row = b;
            if (p.R == padded) {
                row = float_row(p.lora_b, n, p.R, b);
            } else if (p.R > 0) {
                widen_row(p.lora_b, n, p.R, b);
            }
            for (int i = 0; i < many; ++i) {
                finish(p, m + i, n, products[(n - begin) * kRowsAtOnce + i], s, row, padded);
            }
        }
    }
}

static const Nf4LinearKernels nf4_linear_table = {widen_x, prepare_row, shrink,     linear_rows,
                                                  kWidth,  kGroup,      kRowsAtOnce};
