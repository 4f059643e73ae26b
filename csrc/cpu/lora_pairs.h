// Operands of bfloat16 in pairs, for the instruction that adds both products of a pair in float32: twice the products
// of a fused multiply-add, and half the bytes, each exact before it is added. For operands that are bfloat16 as they
// come; the instruction takes denormals for zeros. Included by lora_kernels.h inside the namespace of AVX-512 with
// BF16.

struct Pairs {
    typedef uint32_t Element;
    typedef __m512i Vector;
    static constexpr int kTerms = 2;
    static inline Vector load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static inline Vector set(uint32_t pair) { return _mm512_set1_epi32((int)pair); }
    static inline Vec add_product(Vector a, Vector b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

constexpr int64_t kPairColumns = 2 * kWidth;  // of a vector of pairs along a row

// `count` elements from `offset` on, `stride` apart.
static void read_bf16(const Matrix& view, int64_t offset, int64_t stride, int64_t count, uint16_t* dst) {
    const uint16_t* src = (const uint16_t*)view.data + offset;
    if (stride == 1) {
        __builtin_memcpy(dst, src, count * sizeof(uint16_t));
        return;
    }
    for (int64_t i = 0; i < count; ++i) dst[i] = src[i * stride];
}

// The `count` first numbers at p, zeros behind; none where count is not positive.
static inline __m512i load_words(const uint16_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1, p);
}
static inline void store_words(uint32_t* p, int64_t count, __m512i words) {
    _mm512_mask_storeu_epi32(p, (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1), words);
}

// Sixteen numbers of two rows of bfloat16, pair by pair.
static inline __m512i pair_rows(const uint16_t* a, const uint16_t* b, int64_t count) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_words(a, at_most(16, count))));
    if (!b) return even;
    const __m512i odd = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_words(b, at_most(16, count))));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// A whole square of pack_columns(): kPairColumns columns of kWidth ranks that lie side by side.
static inline void pack_pair_square(const uint16_t* data, int64_t stride, uint32_t* out) {
    __m512i square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
        const uint16_t* at = data + 2 * i * stride;
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + stride)));
        square[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    transpose_words(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) _mm512_storeu_si512(out + i * kWidth, square[i]);
}

// kWidth columns of kWidth ranks, which are eight pairs, for pack_ranks().
static inline void pack_rank_square(const uint16_t* data, int64_t stride, int64_t ld, uint32_t* out) {
    __m512i square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
        square[i] = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(data + i * stride)));
    }
    transpose_words(square);
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) _mm512_storeu_si512(out + i * ld, square[i]);
}

// Blocks [begin, end) of kPairColumns columns of a view [R, C]: dst[block][r] of pairs of columns, zero past the last.
static void pack_columns(const Matrix& view, uint32_t* dst, int64_t begin, int64_t end) {
    const uint16_t* data = (const uint16_t*)view.data;
    for (int64_t block = begin; block < end; ++block) {
        uint32_t* out = dst + block * view.rows * kWidth;
        const int64_t first = block * kPairColumns, count = at_most(kPairColumns, view.columns - first);
        for (int64_t r = 0; r < view.rows && view.stride_column == 1; ++r) {
            _mm512_storeu_si512(out + r * kWidth, load_words(data + r * view.stride_row + first, count));
        }
        if (view.stride_column == 1) continue;
        if (view.stride_row == 1) {  // a column's ranks lie side by side
            for (int64_t r = 0; r < view.rows; r += kWidth) {
                if (count == kPairColumns && view.rows - r >= kWidth) {
                    pack_pair_square(data + first * view.stride_column + r, view.stride_column, out + r * kWidth);
                    continue;
                }
                __m512i square[kWidth];
                for (int64_t i = 0; i < kWidth; ++i) {
                    const uint16_t* a = data + (first + 2 * i) * view.stride_column + r;
                    square[i] = 2 * i >= count
                                    ? _mm512_setzero_si512()
                                    : pair_rows(a, 2 * i + 1 < count ? a + view.stride_column : nullptr, view.rows - r);
                }
                transpose_words(square);
                for (int64_t i = 0; i < at_most(kWidth, view.rows - r); ++i) {
                    _mm512_storeu_si512(out + (r + i) * kWidth, square[i]);
                }
            }
            continue;
        }
        if (count < kPairColumns) __builtin_memset(out, 0, view.rows * kWidth * sizeof(uint32_t));
        for (int64_t r = 0; r < view.rows; ++r) {
            read_bf16(view, r * view.stride_row + first * view.stride_column, view.stride_column, count,
                      (uint16_t*)(out + r * kWidth));
        }
    }
}

// Blocks [begin, end) of an expand's columns of a view [R, N]: dst[block][pair of ranks][lane], zero past the last
// column and rank.
static void pack_ranks(const Matrix& view, uint32_t* dst, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    const int64_t pairs = ceil_div(view.rows, 2);
    const uint16_t* data = (const uint16_t*)view.data;
    for (int64_t block = begin; block < end; ++block) {
        uint32_t* out = dst + block * pairs * kBlock;
        const int64_t first = block * kBlock, count = at_most(kBlock, view.columns - first);
        if (view.stride_column == 1) {
            for (int64_t r = 0; r < view.rows; r += 2) {
                const uint16_t* a = data + r * view.stride_row + first;
                const uint16_t* b = r + 1 < view.rows ? a + view.stride_row : nullptr;
                for (int64_t i = 0; i < kBlock; i += kWidth) {
                    _mm512_storeu_si512(out + r / 2 * kBlock + i, pair_rows(a + i, b ? b + i : nullptr, count - i));
                }
            }
            continue;
        }
        for (int64_t i = 0; i < kBlock && view.stride_row == 1; i += kWidth) {  // a column's ranks lie side by side
            for (int64_t pair = 0; pair < pairs; pair += kWidth / 2) {
                if (i + kWidth <= count && view.rows - 2 * pair >= kWidth) {
                    pack_rank_square(data + (first + i) * view.stride_column + 2 * pair, view.stride_column, kBlock,
                                     out + pair * kBlock + i);
                    continue;
                }
                __m512i square[kWidth];
                for (int64_t j = 0; j < kWidth; ++j) {
                    square[j] = i + j < count ? load_words(data + (first + i + j) * view.stride_column + 2 * pair,
                                                           view.rows - 2 * pair)
                                              : _mm512_setzero_si512();
                }
                transpose_words(square);
                for (int64_t j = 0; j < at_most(kWidth / 2, pairs - pair); ++j) {
                    _mm512_storeu_si512(out + (pair + j) * kBlock + i, square[j]);
                }
            }
        }
        if (view.stride_row == 1) continue;
        __builtin_memset(out, 0, pairs * kBlock * sizeof(uint32_t));
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t r = 0; r < view.rows; ++r) {
                ((uint16_t*)(out + r / 2 * kBlock + i))[r % 2] =
                    data[(first + i) * view.stride_column + r * view.stride_row];
            }
        }
    }
}

// How a tile of x is made of pairs of columns.
struct PairTiles : Pairs {
    static bool lies(const Matrix& x, int64_t columns) {
        return x.stride_column == 1 && columns % kPairColumns == 0 && x.stride_row % 2 == 0 &&
               (uintptr_t)x.data % sizeof(uint32_t) == 0;
    }
    static void read(const Matrix& x, int64_t offset, int64_t columns, uint32_t* dst) {
        uint16_t* out = (uint16_t*)dst;
        read_bf16(x, offset, x.stride_column, columns, out);
        for (int64_t j = columns; j % kPairColumns != 0; ++j) out[j] = 0;
    }
    static void keep(const uint8_t* bits, int64_t columns, const uint32_t* src, uint32_t* dst) {
        for (int64_t j = 0; j < columns; j += kPairColumns) {
            uint32_t mask;
            __builtin_memcpy(&mask, bits + j / 8, sizeof mask);
            _mm512_storeu_si512(dst + j / 2, _mm512_maskz_loadu_epi16(mask, src + j / 2));
        }
    }
    // Pairs of rows of a tile, an element a column: in the second half of `buffer`, whose first half may hold x. A row
    // without a second is paired with zeros.
    static const uint32_t* by_rows(const uint32_t* x, int64_t* ld, int64_t rows, int64_t columns, uint32_t* buffer) {
        const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                               6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(kWidth));
        uint32_t* out = buffer + kTileRows * kTileColumns / 2;
        for (int64_t m = 0; m < rows; m += 2) {
            const uint32_t* row = x + m * *ld;
            uint32_t* to = out + m / 2 * kTileColumns;
            for (int64_t j = 0; j < columns; j += kPairColumns) {
                const __m512i a = _mm512_loadu_si512(row + j / 2);
                const __m512i b = m + 1 < rows ? _mm512_loadu_si512(row + *ld + j / 2) : _mm512_setzero_si512();
                _mm512_storeu_si512(to + j, _mm512_permutex2var_epi16(a, first, b));
                _mm512_storeu_si512(to + j + kWidth, _mm512_permutex2var_epi16(a, second, b));
            }
        }
        *ld = kTileColumns;
        return out;
    }
    static void panel(const Matrix& view, uint32_t* dst) {
        pack_columns(view, dst, 0, ceil_div(view.columns, kPairColumns));
    }
    static void expand_panel(const Matrix& view, uint32_t* dst) {
        constexpr int64_t kBlock = kExpandVecs * kWidth;
        pack_ranks(view, dst, 0, ceil_div(view.columns, kBlock));
    }
    // Pairs of columns: dst[row][pair].
    template <class Run>
    static void factors(const Run& run, const Matrix& matrix, int64_t begin, int64_t end, uint32_t* dst) {
        const int64_t pairs = ceil_div(matrix.columns, 2);
        for (int64_t i = begin; i < end; ++i, dst += pairs) {
            read_bf16(matrix, run.row(i) * matrix.stride_row, matrix.stride_column, matrix.columns, (uint16_t*)dst);
            if (matrix.columns % 2) ((uint16_t*)dst)[matrix.columns] = 0;
        }
    }
    // Pairs of rows: dst[pair][r], with zeros for a second row past the last.
    template <class Run>
    static void left(const Run& run, const Matrix& matrix, int64_t begin, int64_t end, uint32_t* dst) {
        for (int64_t i = begin; i < end; i += 2, dst += matrix.columns) {
            const uint16_t* a = (const uint16_t*)matrix.data + run.row(i) * matrix.stride_row;
            const uint16_t* b =
                i + 1 < end ? (const uint16_t*)matrix.data + run.row(i + 1) * matrix.stride_row : nullptr;
            for (int64_t r = 0; r < matrix.columns && matrix.stride_column == 1; r += kWidth) {
                const int64_t count = matrix.columns - r;
                store_words(dst + r, count, pair_rows(a + r, b ? b + r : nullptr, count));
            }
            for (int64_t r = 0; r < matrix.columns && matrix.stride_column != 1; ++r) {
                const int64_t at = r * matrix.stride_column;
                dst[r] = a[at] | (b ? (uint32_t)b[at] << 16 : 0);
            }
        }
    }
};
static_assert(kTileColumns % kPairColumns == 0 && kTileRows % 2 == 0, "a whole tile is whole pairs");
