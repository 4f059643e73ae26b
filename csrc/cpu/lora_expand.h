// What is added to a layer's product: base + keep(scale * left panel) and DoRA's sum. Included by lora_kernels.h inside
// an instruction set's namespace.

// DoRA's z and out for `count` columns of one row. Where the gain is 1 and delta 0, out has the bits of what it starts
// from.
static void finish_dora_row(const Expansion& e, const float* base, const float* delta, float scaling, int64_t row,
                            int64_t column, int64_t count) {
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    const Vec scale = vec_set(scaling), minus_one = vec_set(-1.0f);
    float z[kBlock], out[kBlock], plain[kBlock];
    const float* start = base;
    if (e.plain.data) {
        for (int64_t i = count; i < kBlock; ++i) plain[i] = 0.0f;
        widen(e.plain.data, e.plain.dtype, row * e.plain.stride_row + column * e.plain.stride_column,
              e.plain.stride_column, count, plain);
        start = plain;
    }
    for (int64_t i = 0; i < kBlock; i += kWidth) {
        const Vec term = vec_mul(vec_load(delta + i), scale), gain = vec_load(e.gain + column + i);
        Vec inner = vec_load(base + i);
        if (e.gain_bias) inner = vec_fma(vec_load(e.gain_bias + column + i), minus_one, inner);
        vec_store(z + i, vec_add(inner, term));
        const Vec sum = vec_fma(vec_add(gain, minus_one), inner, vec_load(start + i));
        vec_store(out + i, vec_fma(gain, term, sum));
    }
    if (e.z.data) {
        narrow(z, count, e.z.data, e.z.dtype, row * e.z.stride_row + column * e.z.stride_column, e.z.stride_column);
    }
    narrow(out, count, e.out.data, e.out.dtype, row * e.out.stride_row + column * e.out.stride_column,
           e.out.stride_column);
}

// Where a lone term's block is neither ragged nor strided nor converted, and its ranks are one sum: base +
// keep(scale * delta) from registers.
template <class Tiles, int kRows, DType kType>
static void finish_rows(const Expansion& e, const typename Tiles::Element* left, const typename Tiles::Element* panel,
                        int64_t ranks, const uint8_t* bits, int64_t ld_bits, int64_t row, int64_t column) {
    const ExpandTerm& term = e.terms[0];
    Vec sum[kRows][kExpandVecs];
    expand_sums<Tiles, kRows>(left, ranks, panel, term.bias ? term.bias + column : nullptr, ranks, sum);
    const Vec scale = vec_set(term.scale);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
        const int64_t at = e.row(row + m);
        const int64_t from = at * e.base.stride_row + column, to = at * e.out.stride_row + column;
#pragma GCC unroll 8
        for (int v = 0; v < kExpandVecs; ++v) {
            Vec own = vec_mul(sum[m][v], scale);
            if (bits) own = vec_keep(own, bits + m * ld_bits, v * kWidth);
            store_as<kType>(e.out.data, to + v * kWidth, vec_add(load_as<kType>(e.base.data, from + v * kWidth), own));
        }
    }
}

template <class Tiles, DType kType>
static void finish_block(const Expansion& e, const typename Tiles::Element* left, const typename Tiles::Element* panel,
                         int64_t rows, int64_t ranks, const uint8_t* bits, int64_t ld_bits, int64_t row,
                         int64_t column) {
    int64_t m = 0;
    for (; m + kExpandBlockRows <= rows; m += kExpandBlockRows) {
        finish_rows<Tiles, kExpandBlockRows, kType>(e, left + m * ranks, panel, ranks,
                                                    bits ? bits + m * ld_bits : nullptr, ld_bits, row + m, column);
    }
    for (; m + 2 <= rows; m += 2) {
        finish_rows<Tiles, 2, kType>(e, left + m * ranks, panel, ranks, bits ? bits + m * ld_bits : nullptr, ld_bits,
                                     row + m, column);
    }
    for (; m < rows; ++m) {
        finish_rows<Tiles, 1, kType>(e, left + m * ranks, panel, ranks, bits ? bits + m * ld_bits : nullptr, ld_bits,
                                     row + m, column);
    }
}

// base + keep(scale * delta) for `count` columns of one row; delta is a whole register block wide.
static void finish_row(const Expansion& e, const float* delta, float scaling, const uint8_t* bits, int64_t bit_column,
                       int64_t row, int64_t column, int64_t count) {
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    const Vec scale = vec_set(scaling);
    float sum[kBlock], base[kBlock];
    for (int64_t i = count; i < kBlock; ++i) base[i] = 0.0f;
    widen(e.base.data, e.base.dtype, row * e.base.stride_row + column * e.base.stride_column, e.base.stride_column,
          count, base);
    if (e.gain) return finish_dora_row(e, base, delta, scaling, row, column, count);
    for (int64_t i = 0; i < kBlock; i += kWidth) {
        Vec term = vec_mul(vec_load(delta + i), scale);
        if (bits) term = vec_keep(term, bits, bit_column + i);
        vec_store(sum + i, vec_add(vec_load(base + i), term));
    }
    narrow(sum, count, e.out.data, e.out.dtype, row * e.out.stride_row + column * e.out.stride_column,
           e.out.stride_column);
}

// total (+)= keep(scale * delta), for one register block of a row.
static void add_term(const float* delta, float scaling, const uint8_t* bits, bool add, float* total) {
    const Vec scale = vec_set(scaling);
    for (int64_t i = 0; i < kExpandVecs * kWidth; i += kWidth) {
        Vec term = vec_mul(vec_load(delta + i), scale);
        if (bits) term = vec_keep(term, bits, i);
        vec_store(total + i, add ? vec_add(vec_load(total + i), term) : term);
    }
}

// Asks for the lines of `rows` rows of a block of base that are expanded after this one.
static inline void ask_for(const Expansion& e, int64_t row, int64_t rows, int64_t column) {
    const int64_t size = element_size(e.base.dtype);
    for (int64_t i = row; i < at_most(row + rows, e.row_count); ++i) {
        const char* at = (const char*)e.base.data + (e.row(i) * e.base.stride_row + column) * size;
        for (int64_t byte = 0; byte < kExpandVecs * kWidth * size; byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }
}

template <class Tiles>
static void expand(const Expansion& e, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                   float* scratch) {
    typedef typename Tiles::Element Element;
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    constexpr int64_t kBits = kExpandColumns / 8 + 16;
    static_assert(kExpandColumns % kBlock == 0, "the mask buffer holds whole blocks");
    uint8_t bits[kExpandBlockRows][kBits];
    float delta[kExpandBlockRows * kBlock], total[kExpandBlockRows * kBlock];
    const int64_t counters = ceil_div(e.base.columns, philox::kDrawsPerCounter);
    const bool alone = e.count == 1, asks = e.base.stride_column == 1;
    const ExpandTerm& first = e.terms[0];
    const bool plain = alone && !e.gain && e.base.dtype == e.out.dtype && asks && e.out.stride_column == 1 &&
                       first.ranks <= kExpandRanks;
    // Of each term its rows' factors, one after the other, then its panel.
    Element* panels = (Element*)scratch + e.ranks * kExpandRows;
    const int64_t panel_columns = ceil_div(column_end - column_begin, kBlock) * kBlock;
    for (int64_t t = 0, rank = 0; t < e.count; rank += e.terms[t++].ranks) {
        const ExpandTerm& term = e.terms[t];
        Tiles::factors(e, term.left, row_begin, row_end, (Element*)scratch + rank * kExpandRows);
        if (!term.packed) {
            Tiles::expand_panel(columns_from(term.panel, column_begin, column_end), panels + rank * panel_columns);
        }
    }
    for (int64_t row = row_begin; row < row_end; row += kExpandBlockRows) {
        const int64_t rows = at_most(kExpandBlockRows, row_end - row);
        for (int64_t i = 0; i < rows && alone && first.dropout.active(); ++i) {
            keep_bytes(bits[i], first.dropout.seed, (uint64_t)(e.row(row + i) * counters + column_begin / 8),
                       ceil_div(column_end - column_begin, 8), (uint32_t)first.dropout.threshold);
        }
        for (int64_t column = column_begin; column < column_end; column += kBlock) {
            const int64_t count = at_most(kBlock, column_end - column);
            if (asks) ask_for(e, row + kExpandBlockRows, kExpandBlockRows, column);
            for (int64_t t = 0, rank = 0; t < e.count; rank += e.terms[t++].ranks) {
                const ExpandTerm& term = e.terms[t];
                const int64_t elements = ceil_div(term.ranks, Tiles::kTerms);
                const Element* left = (const Element*)scratch + rank * kExpandRows + (row - row_begin) * elements;
                const Element* panel = term.packed ? (const Element*)term.packed + column * elements
                                                   : panels + rank * panel_columns + (column - column_begin) * elements;
                if (plain && count == kBlock) {
                    const uint8_t* own = term.dropout.active() ? bits[0] + (column - column_begin) / 8 : nullptr;
                    switch (e.out.dtype) {
                        case DType::f32:
                            finish_block<Tiles, DType::f32>(e, left, panel, rows, elements, own, kBits, row, column);
                            break;
                        case DType::bf16:
                            finish_block<Tiles, DType::bf16>(e, left, panel, rows, elements, own, kBits, row, column);
                            break;
                        case DType::f16:
                            finish_block<Tiles, DType::f16>(e, left, panel, rows, elements, own, kBits, row, column);
                    }
                    continue;
                }
                expand_block<Tiles>(left, panel, term.bias ? term.bias + column : nullptr, rows, elements, delta);
                for (int64_t i = 0; i < rows && !alone; ++i) {
                    if (term.dropout.active()) {
                        keep_bytes(bits[i], term.dropout.seed, (uint64_t)(e.row(row + i) * counters + column / 8),
                                   ceil_div(count, 8), (uint32_t)term.dropout.threshold);
                    }
                    add_term(delta + i * kBlock, term.scale, term.dropout.active() ? bits[i] : nullptr, t > 0,
                             total + i * kBlock);
                }
            }
            for (int64_t i = 0; i < rows && !(plain && count == kBlock); ++i) {
                if (alone) {
                    finish_row(e, delta + i * kBlock, first.scale, first.dropout.active() ? bits[i] : nullptr,
                               column - column_begin, e.row(row + i), column, count);
                } else {
                    finish_row(e, total + i * kBlock, 1.0f, nullptr, 0, e.row(row + i), column, count);
                }
            }
        }
    }
}
