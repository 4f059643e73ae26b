// The few-row product in bfloat16 by the instruction that adds pairs of bfloat16 products in float32: the weight is
// rounded as the dequantiser rounds it (but for denormals, which the instruction takes for zeros). Included once,
// inside the namespace of AVX-512 with BF16.
//
// A vector is 64 packed bytes, 128 columns of a row: 32 words of four elements each. The permutation that looks a value
// up reads the low five bits of a word, so that a shift a nibble is all the unpacking there is, and x lies sorted by
// the element's place in its word. The fifth bit chooses between two tables of sixteen, one for each half of the
// vector: a block has 64 elements or more, hence at most two in a vector. At 2048 x 2048 and one row the loop takes 53
// us of a Zen 5 at 4.3 GHz, of which reading the bytes from its third cache alone takes 17.

#include "cpu/nf4_rows.h"

typedef uint16_t Element;
constexpr int64_t kColumns = 128;
constexpr int kPlaces = 4;  // elements of a word

// Sixteen float32 sums, one of each vector, in their order.
static inline Vec sums_of(const float* vectors, int64_t stride) {
    Vec quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float* four = vectors + 4 * i * stride;
        const Vec a = vec_load(four), b = vec_load(four + stride);
        const Vec c = vec_load(four + 2 * stride), d = vec_load(four + 3 * stride);
        const Vec ab = vec_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const Vec cd = vec_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        quarter[i] = vec_add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    const Vec low =
        vec_add(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88), _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    const Vec high =
        vec_add(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88), _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return vec_add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// A row of x, `many` of which are multiplied together, from its first place in their block on: groups of kColumns,
// within them rows, within those the four places of a word. The last group is filled up with zeros.
static void dot_prepare_row(const Nf4Linear& p, int64_t m, const float* exact, int64_t many, Element* scratch,
                            Element* x) {
    const uint16_t* row = (const uint16_t*)p.x.data + m * p.x.row_stride;
    if (p.x.dtype != DType::bf16 || p.x.column_stride != 1) {
        int64_t k = 0;
        for (; k + kWidth <= p.K; k += kWidth) vec_store_bf16(scratch + k, vec_load(exact + k));
        for (; k < p.K; ++k) scratch[k] = bf16_from_float(exact[k]);
        row = scratch;
    }
    for (int64_t k = 0; k < p.K; k += kColumns, x += many * kColumns) {
        for (int part = 0; part < 4; ++part) {
            const bool there = k + 32 * part < p.K;
            const __m512i words = there ? _mm512_loadu_si512(row + k + 32 * part) : _mm512_setzero_si512();
            Element* out = x + 8 * part;
            // The first element of a byte lies in its high nibble, behind the second.
            _mm_storeu_si128((__m128i*)(out + 32), _mm512_cvtepi64_epi16(words));
            _mm_storeu_si128((__m128i*)out, _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 16)));
            _mm_storeu_si128((__m128i*)(out + 96), _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 32)));
            _mm_storeu_si128((__m128i*)(out + 64), _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 48)));
        }
    }
}

// The products of kM rows of x with one vector of a weight row: of 64 columns from element `flat` on, and of 64 more
// where it is whole. Fewer rows have several sums each, or one product would wait for the other.
template <int kM, int kChains, bool kWhole>
static inline __attribute__((always_inline)) void dot_group(const uint8_t* bytes, Vec code, const float* maxima,
                                                            int64_t flat, int shift, const Element* x,
                                                            Vec (&sum)[kM][kChains]) {
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    __m512i words;
    Vec second = vec_zero();
    if (kWhole) {
        words = _mm512_loadu_si512(bytes);
        second = vec_mul(code, vec_set(maxima[(flat + 64) >> shift]));
    } else {
        words = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)bytes));
    }
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(second, vec_mul(code, vec_set(maxima[flat >> shift])));
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
        const __m512i shifted = place == 0 ? words : _mm512_srli_epi16(words, 4 * place);
        const __m512i index = _mm512_ternarylogic_epi32(shifted, nibble, half, 0xea);  // and, then or
        const __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 16
        for (int m = 0; m < kM; ++m) {
            const __m512bh other = (__m512bh)_mm512_loadu_si512(x + (m * kPlaces + place) * 32);
            Vec& target = sum[m][place % kChains];
            target = _mm512_dpbf16_ps(target, weight, other);
        }
    }
}

// sums[m] (+)= the products of kM rows of x with `columns` of a weight row that begin at element `flat`, a multiple of
// 64.
template <int kM>
static void dot_row(const Nf4Linear& p, const float* maxima, int shift, const Element* x, int64_t flat, int64_t columns,
                    bool add, float* sums) {
    constexpr int kChains = kM < 4 ? 4 : kM < 8 ? 2 : 1;
    const Vec code = vec_load(p.weight.code);
    const uint8_t* bytes = p.weight.packed + flat / 2;
    Vec sum[kM][kChains];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
        sum[m][0] = add ? vec_load(sums + m * kWidth) : vec_zero();
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sum[m][c] = vec_zero();
    }
    const int64_t end = flat + columns;
    for (; flat + kColumns <= end; flat += kColumns, bytes += kColumns / 2, x += kM * kColumns) {
        dot_group<kM, kChains, true>(bytes, code, maxima, flat, shift, x, sum);
    }
    if (flat < end) dot_group<kM, kChains, false>(bytes, code, maxima, flat, shift, x, sum);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
        Vec total = sum[m][0];
        if (kChains == 2) total = vec_add(total, sum[m][kChains - 1]);
        if (kChains == 4) {
            total = vec_add(vec_add(total, sum[m][1 % kChains]), vec_add(sum[m][2 % kChains], sum[m][kChains - 1]));
        }
        vec_store(sums + m * kWidth, total);
    }
}

typedef void (*DotRow)(const Nf4Linear& p, const float* maxima, int shift, const Element* x, int64_t flat,
                       int64_t columns, bool add, float* sums);
static const DotRow kDotRow[kDotRowsAtOnce] = {
    dot_row<1>, dot_row<2>,  dot_row<3>,  dot_row<4>,  dot_row<5>,  dot_row<6>,  dot_row<7>,  dot_row<8>,
    dot_row<9>, dot_row<10>, dot_row<11>, dot_row<12>, dot_row<13>, dot_row<14>, dot_row<15>, dot_row<16>};

// Values of a row of y from column n on.
static void store_outputs(const Nf4Linear& p, int64_t m, int64_t n, int64_t count, Vec value) {
    float single[kWidth];
    uint16_t narrow[kWidth];
    const int64_t at = m * p.N + n;
    if (p.y_dtype == DType::f32) {
        float* out = count == kWidth ? (float*)p.y + at : single;
        vec_store(out, value);
        for (int64_t i = 0; out == single && i < count; ++i) ((float*)p.y)[at + i] = single[i];
        return;
    }
    uint16_t* out = count == kWidth ? (uint16_t*)p.y + at : narrow;
    if (p.y_dtype == DType::bf16) {
        vec_store_bf16(out, value);
    } else {
        vec_store_f16(out, value);
    }
    for (int64_t i = 0; out == narrow && i < count; ++i) ((uint16_t*)p.y)[at + i] = narrow[i];
}

// Weight rows begin .. end, at most sixteen, for all rows of x, `many` at a time. s, times the scaling, is padded with
// zeros to `padded` ranks. `scratch` holds the sums, a row of B, and the maxima of the tile.
static void dot_tile(const Nf4Linear& p, const Element* x, int64_t many, const float* s, int64_t padded, float* scratch,
                     int64_t begin, int64_t end) {
    float* sums = scratch;  // [weight row][row of x][kWidth]
    float* b = sums + kDotTile * kDotRowsAtOnce * kWidth;
    float* values = b + padded;
    const int shift = __builtin_ctzll((unsigned long long)p.weight.block_size);
    const int64_t whole = (p.K + kColumns - 1) / kColumns * kColumns;
    const Maxima tile = tile_maxima(p, begin, end, values);
    const float* maxima = tile.values - tile.begin;
    for (int64_t r = p.R; r < padded; ++r) b[r] = 0.0f;
    alignas(64) float total[kWidth] = {0};  // what all rows add
    for (int64_t n = begin; n < end; ++n) {
        if (p.bias.data != nullptr) total[n - begin] = element_of(p.bias, n * p.bias.column_stride);
        if (p.lora_bias.data != nullptr) {
            total[n - begin] += p.scaling * element_of(p.lora_bias, n * p.lora_bias.column_stride);
        }
    }
    for (int64_t first = 0; first < p.M; first += many) {
        const int64_t rows = many < p.M - first ? many : p.M - first;
        const Element* block = x + first * whole;
        // The columns of x that are taken at a time stay in the first cache while the weight rows pass.
        const int64_t part = 16384 / rows / kColumns * kColumns;
        const int64_t stride = rows * kWidth;
        for (int64_t k = 0; k < p.K; k += part) {
            const int64_t columns = part < p.K - k ? part : p.K - k;
            for (int64_t n = begin; n < end; ++n) {
                kDotRow[rows - 1](p, maxima, shift, block + k * rows, n * p.K + k, columns, k > 0,
                                  sums + (n - begin) * stride);
            }
        }
        for (int64_t n = begin; n < end && p.R > 0; ++n) {
            widen_row(p.lora_b, n, p.R, b);
            for (int64_t m = 0; m < rows; ++m) {
                float* sum = sums + (n - begin) * stride + m * kWidth;
                Vec added = vec_load(sum);
                for (int64_t r = 0; r < padded; r += kWidth) {
                    added = vec_fma(vec_load(s + (first + m) * padded + r), vec_load(b + r), added);
                }
                vec_store(sum, added);
            }
        }
        for (int64_t i = (end - begin) * stride; i < kDotTile * stride; i += kWidth) vec_store(sums + i, vec_zero());
        for (int64_t m = 0; m < rows; ++m) {
            const Vec value = vec_add(sums_of(sums + m * kWidth, stride), vec_load(total));
            store_outputs(p, first + m, begin, end - begin, value);
        }
    }
}

static const Nf4DotKernels nf4_dot_table = {dot_prepare_row, dot_tile};
