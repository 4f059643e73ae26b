// Kernels of cpu/lora.cpp, compiled once for each instruction set.

#include "cpu/philox_vector.h"
#include "cpu/lora_blocks.h"
#include "cpu/typed_vector.h"
#include "cpu/lora_pack.h"

// How a tile of x is made of float32.
struct FloatTiles : Floats {
    static bool lies(const Matrix& x, int64_t columns) {
        return x.dtype == DType::f32 && x.stride_column == 1 && columns % kWidth == 0;
    }
    // `columns` elements from `offset` on, and zeros up to a whole vector.
    static void read(const Matrix& x, int64_t offset, int64_t columns, float* dst) {
        widen(x.data, x.dtype, offset, x.stride_column, columns, dst);
        for (int64_t j = columns; j % kWidth != 0; ++j) dst[j] = 0.0f;
    }
    static void keep(const uint8_t* bits, int64_t columns, const float* src, float* dst) {
        for (int64_t j = 0; j < columns; j += kWidth) vec_store(dst + j, vec_keep(vec_load(src + j), bits, j));
    }
    // A tile as the outer products read it: as it is.
    static const float* by_rows(const float* x, int64_t* ld, int64_t rows, int64_t columns, float* buffer) { return x; }
    // What the products of a tile read beside it: dst[block][r][lane] of a view [R, C], and dst[row][r] of rows
    // [begin, end) of those that are swept or expanded (`run`), of a matrix [M, R].
    static void panel(const Matrix& view, float* dst) { pack(view, kWidth, dst, 0, ceil_div(view.columns, kWidth)); }
    static void expand_panel(const Matrix& view, float* dst) {
        constexpr int64_t kBlock = kExpandVecs * kWidth;
        pack(view, kBlock, dst, 0, ceil_div(view.columns, kBlock));
    }
    template <class Run>
    static void factors(const Run& run, const Matrix& matrix, int64_t begin, int64_t end, float* dst) {
        for (int64_t i = begin; i < end; ++i, dst += matrix.columns) {
            widen(matrix.data, matrix.dtype, run.row(i) * matrix.stride_row, matrix.stride_column, matrix.columns, dst);
        }
    }
    template <class Run>
    static void left(const Run& run, const Matrix& matrix, int64_t begin, int64_t end, float* dst) {
        factors(run, matrix, begin, end, dst);
    }
};

#if defined(PEFTFAST_DOT_BF16)
#include "cpu/lora_pairs.h"
#endif

// One row of a tile under a mask; dst may be src.
template <class Tiles>
static inline void mask_row(const Sweep& s, const Dropout& dropout, int64_t row, int64_t column, int64_t columns,
                            const typename Tiles::Element* src, typename Tiles::Element* dst) {
    const int64_t counters = ceil_div(s.x.columns, philox::kDrawsPerCounter);
    uint8_t bits[kTileColumns / 8 + 8];
    keep_bytes(bits, dropout.seed, (uint64_t)(row * counters + column / 8), ceil_div(columns, 8),
               (uint32_t)dropout.threshold);
    Tiles::keep(bits, columns, src, dst);
}

// A tile of x, in rows of kTileColumns with zeros up to a whole vector, under `dropout` unless that is null. Returns
// where it is: x itself where nothing has to be done to it.
template <class Tiles>
static const typename Tiles::Element* stage(const Sweep& s, const Dropout* dropout, int64_t row, int64_t rows,
                                            int64_t column, int64_t columns, typename Tiles::Element* tile,
                                            int64_t* ld) {
    typedef typename Tiles::Element Element;
    const Matrix& x = s.x;
    if (!dropout && !s.rows && Tiles::lies(x, columns)) {
        *ld = x.stride_row / Tiles::kTerms;
        return (const Element*)x.data + (s.row(row) * x.stride_row + column) / Tiles::kTerms;
    }
    *ld = kTileColumns / Tiles::kTerms;
    for (int64_t i = 0; i < rows; ++i) {
        Element* dst = tile + i * *ld;
        const int64_t at = s.row(row + i);
        Tiles::read(x, at * x.stride_row + column * x.stride_column, columns, dst);
        if (dropout) mask_row<Tiles>(s, *dropout, at, column, columns, dst, dst);
    }
    return tile;
}

// One task of a sweep: its part of x, and where a product that begins at `rank` has what it reads and adds to.
template <class Tiles>
struct Part {
    typedef typename Tiles::Element Element;
    const Sweep& s;
    int64_t row_part, column_part, row_begin, row_end, column_begin, column_end;
    float *lanes, *panels, *sums, *lefts;

    Part(const Sweep& sweep, int64_t task, float* scratch)
        : s(sweep), row_part(task / sweep.column_parts), column_part(task % sweep.column_parts) {
        row_begin = row_part * s.rows_per_part();
        row_end = at_most(s.row_count, row_begin + s.rows_per_part());
        column_begin = column_part * s.columns_per_part();
        column_end = at_most(s.x.columns, column_begin + s.columns_per_part());
        lanes = scratch + 2 * kTileRows * kTileColumns;
        panels = lanes + s.ranks * kTileRows * kWidth;
        sums = panels + s.ranks * s.columns_per_part();
        lefts = sums + s.ranks * s.columns_per_part();
    }
    Element* panel(const Product& p, int64_t rank) const {
        if (p.packed) return (Element*)p.packed + column_begin / Tiles::kTerms * p.ranks;
        return (Element*)panels + rank * s.columns_per_part();
    }
    Element* left(int64_t rank) const { return (Element*)lefts + rank * s.rows_per_part(); }
    float* column_sums(const Product& p, int64_t rank) const {
        if (p.column_sums) return p.column_sums + row_part * p.ranks * s.padded_columns() + column_begin;
        return sums + rank * s.columns_per_part();
    }
    int64_t ld_sums(const Product& p) const { return p.column_sums ? s.padded_columns() : s.columns_per_part(); }

    void begin() const {
        const int64_t padded = ceil_div(column_end - column_begin, kTileColumns) * kTileColumns;
        for (int64_t i = 0, rank = 0; i < s.count; rank += s.products[i++].ranks) {
            const Product& p = s.products[i];
            if (p.by_rows() && !p.packed) {
                Tiles::panel(columns_from(p.panel, column_begin, column_end), panel(p, rank));
            }
            if (!p.by_columns()) continue;
            Tiles::left(s, p.left, row_begin, row_end, left(rank));
            for (int64_t r = 0; r < p.ranks && row_begin >= row_end; ++r) {  // else the first tile begins the sums
                __builtin_memset(column_sums(p, rank) + r * ld_sums(p), 0, padded * sizeof(float));
            }
        }
    }
    void finish() const {
        for (int64_t i = 0, rank = 0; i < s.count; rank += s.products[i++].ranks) {
            const Product& p = s.products[i];
            if (!p.by_columns() || p.column_sums) continue;
            combine_columns(column_sums(p, rank), 1, 0, ld_sums(p), p.scale,
                            columns_from(p.column_out, column_begin, column_end), 0, column_end - column_begin);
        }
    }
};

// The tile that comes after the one at (row, column).
template <class Tiles>
static inline Ahead ahead_of(const Part<Tiles>& part, int64_t row, int64_t column) {
    const Matrix& x = part.s.x;
    column += kTileColumns;
    if (column >= part.column_end) column = part.column_begin, row += kTileRows;
    const int64_t rows = at_most(kTileRows, part.row_end - row);
    if (rows <= 0 || x.stride_column != 1) return {nullptr, nullptr, 0, 0, 0, 0, 0};
    const int64_t size = element_size(x.dtype), columns = at_most(kTileColumns, part.column_end - column);
    return {(const char*)x.data + column * size,
            part.s.rows,
            part.s.first_row + row,
            row,
            row + rows,
            x.stride_row * size,
            columns * size};
}

template <class Tiles>
static void sweep(const Sweep& s, int64_t task, float* scratch) {
    typedef typename Tiles::Element Element;
    static_assert(sizeof(Element) == sizeof(float), "buffers are counted in floats");
    const Part<Tiles> part(s, task, scratch);
    Element* tile = (Element*)scratch;
    Element* masked = tile + kTileRows * kTileColumns;
    float* lanes = part.lanes;  // of each product [kTileRows][R][kWidth], summed at the end
    part.begin();
    for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
        const int64_t rows = at_most(kTileRows, part.row_end - row);
        if (part.column_begin >= part.column_end) {
            __builtin_memset(lanes, 0, rows * s.ranks * kWidth * sizeof(float));
        }
        for (int64_t column = part.column_begin; column < part.column_end; column += kTileColumns) {
            const int64_t columns = at_most(kTileColumns, part.column_end - column), done = column - part.column_begin;
            Ahead ahead = ahead_of(part, row, column);
            int64_t plain_ld;
            const Dropout* own = s.count == 1 && s.products[0].dropout.active() ? &s.products[0].dropout : nullptr;
            const Element* plain = stage<Tiles>(s, own, row, rows, column, columns, tile, &plain_ld);
            for (int64_t i = 0, rank = 0; i < s.count; rank += s.products[i++].ranks) {
                const Product& p = s.products[i];
                const bool masks = p.dropout.active() && !own;
                const Element* x = masks ? masked : plain;
                int64_t ld = masks ? kTileColumns / Tiles::kTerms : plain_ld;
                for (int64_t m = 0; masks && m < rows; ++m) {
                    mask_row<Tiles>(s, p.dropout, s.row(row + m), column, columns, plain + m * plain_ld,
                                    masked + m * ld);
                }
                if (p.by_rows()) {
                    dot_tile<Tiles>(x, ld, part.panel(p, rank) + done / Tiles::kTerms * p.ranks, rows, p.ranks,
                                    ceil_div(columns, kWidth * Tiles::kTerms), lanes + rank * rows * kWidth, done == 0,
                                    ahead);
                }
                if (p.by_columns()) {
                    const Element* right = Tiles::by_rows(x, &ld, rows, columns, masks ? masked : tile);
                    outer_tile<Tiles>(right, ld, part.left(rank) + (row - part.row_begin) / Tiles::kTerms * p.ranks,
                                      ceil_div(rows, Tiles::kTerms), p.ranks, ceil_div(columns, kWidth),
                                      part.column_sums(p, rank) + done, part.ld_sums(p), row == part.row_begin, ahead);
                }
            }
        }
        for (int64_t i = 0, rank = 0; i < s.count; rank += s.products[i++].ranks) {
            const Product& p = s.products[i];
            if (!p.by_rows()) continue;
            vec_sums(lanes + rank * rows * kWidth, rows * p.ranks,
                     p.row_sums + (part.column_part * s.row_count + row) * p.ranks);
        }
    }
    part.finish();
}

#include "cpu/lora_expand.h"

static void gain_grads(const Matrix& dy, const Matrix& z, const float* factor, const Matrix& out, float* totals,
                       int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 256, kRows = 8;  // a sum over kRows is added to what came before as a whole
    float left[kColumns], right[kColumns], part[kColumns];
    for (int64_t column = 0; column < dy.columns; column += kColumns) {
        const int64_t count = at_most(kColumns, dy.columns - column);
        for (int64_t i = 0; i < count; ++i) totals[column + i] = 0.0f;
        for (int64_t first = begin; first < end; first += kRows) {
            for (int64_t i = 0; i < count; ++i) part[i] = 0.0f;
            for (int64_t row = first; row < at_most(end, first + kRows); ++row) {
                widen(dy.data, dy.dtype, row * dy.stride_row + column * dy.stride_column, dy.stride_column, count,
                      left);
                widen(z.data, z.dtype, row * z.stride_row + column * z.stride_column, z.stride_column, count, right);
                for (int64_t i = 0; i < count; ++i) part[i] += left[i] * right[i];
                for (int64_t i = 0; i < count; ++i) left[i] *= factor[column + i];
                narrow(left, count, out.data, out.dtype, row * out.stride_row + column * out.stride_column,
                       out.stride_column);
            }
            for (int64_t i = 0; i < count; ++i) totals[column + i] += part[i];
        }
    }
}

static void dropout_add(const Matrix& base, const Matrix& x, const Dropout& dropout, const Corner& at, float factor,
                        const Matrix& out, int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 512;
    const int64_t counters = ceil_div(at.width, philox::kDrawsPerCounter);
    const Vec scale = vec_set(factor);
    uint8_t bits[kColumns / 8 + 8];
    float value[kColumns], start[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) value[i] = start[i] = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < x.columns; column += kColumns) {
            const int64_t count = at_most(kColumns, x.columns - column);
            widen(x.data, x.dtype, row * x.stride_row + column * x.stride_column, x.stride_column, count, value);
            if (base.data) {
                widen(base.data, base.dtype, row * base.stride_row + column * base.stride_column, base.stride_column,
                      count, start);
            }
            if (dropout.active()) {
                keep_bytes(bits, dropout.seed, (uint64_t)((at.row + row) * counters + (at.column + column) / 8),
                           ceil_div(count, 8), (uint32_t)dropout.threshold);
            }
            for (int64_t i = 0; i < count; i += kWidth) {
                Vec term = vec_mul(vec_load(value + i), scale);
                if (dropout.active()) term = vec_keep(term, bits, i);
                vec_store(value + i, base.data ? vec_add(vec_load(start + i), term) : term);
            }
            narrow(value, count, out.data, out.dtype, row * out.stride_row + column * out.stride_column,
                   out.stride_column);
        }
    }
}

#if defined(PEFTFAST_DOT_BF16)
static const PairKernels pair_kernels = {pack_columns, pack_ranks, sweep<PairTiles>, expand<PairTiles>};
static const PairKernels* const pairs_of_table = &pair_kernels;
#else
static const PairKernels* const pairs_of_table = nullptr;
#endif

static const LoraKernels lora_table = {
    kWidth,          kExpandVecs * kWidth, pack,       sweep<FloatTiles>, combine,
    combine_columns, expand<FloatTiles>,   gain_grads, dropout_add,       pairs_of_table};
