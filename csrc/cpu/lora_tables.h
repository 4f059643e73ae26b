// What cpu/lora.cpp hands to its kernels, and the table of them that each instruction set fills.
#pragma once

#include "cpu/lora.h"

namespace peftfast::cpu {

// A tile of the big matrix: 24 rows of 192 columns are 18 KiB as float32, so that it stays in a 32 or 48 KiB L1 cache
// beside the panels it meets. 192 columns are 24 Philox counters and a multiple of every register block.
constexpr int64_t kTileRows = 24;
constexpr int64_t kTileColumns = 192;
constexpr int64_t kMostLanes = 16;  // of a vector of any instruction set

constexpr int64_t kExpandColumns = 2048;  // per mask buffer: 256 bytes a row
constexpr int64_t kExpandRows = 48;       // per task: enough to reuse the panel from L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }

// Columns [begin, end) of a matrix, and its rows from `begin` on.
inline Matrix columns_from(const Matrix& matrix, int64_t begin, int64_t end) {
    Matrix part = matrix;
    part.data = static_cast<char*>(matrix.data) + begin * matrix.stride_column * element_size(matrix.dtype);
    part.columns = end - begin;
    return part;
}
inline Matrix rows_from(const Matrix& matrix, int64_t begin) {
    return columns_from(matrix.transposed(), begin, matrix.rows).transposed();
}

// One term's share of a sweep: row products (with `panel`) and column products (with `left`), either or both.
struct Product {
    Dropout dropout;
    int64_t ranks;
    Matrix panel;        // [R, C]
    const void* packed;  // panel as pack() writes it for kWidth columns, or pack_columns(); null: a task packs its own
    Matrix left;         // [rows of x, R]
    float* row_sums;     // [column_parts][rows][R]; null: no row products
    float* column_sums;  // [row_parts][R][padded_columns]; null: the one row part finishes them
    Matrix column_out;   // [R, C]; no data: no column products
    float scale;

    bool by_rows() const { return row_sums != nullptr; }
    bool by_columns() const { return column_out.data != nullptr; }
};

// One sweep over x [M, C], which is x or dy, for all its products. The sweep is cut into row_parts * column_parts tasks
// by the shape alone, never by the number of threads.
struct Sweep {
    Matrix x;
    const int64_t* rows;  // those of x that are swept; null: row_count from first_row on
    int64_t first_row, row_count;
    const Product* products;
    int64_t count, ranks;  // ranks: of all products together
    int64_t row_parts, column_parts;

    int64_t row(int64_t i) const { return rows ? rows[i] : first_row + i; }
    int64_t padded_columns() const { return ceil_div(x.columns, kTileColumns) * kTileColumns; }
    int64_t rows_per_part() const { return ceil_div(ceil_div(row_count, row_parts), 2) * 2; }  // pairs stay together
    int64_t columns_per_part() const {
        return ceil_div(ceil_div(x.columns, kTileColumns), column_parts) * kTileColumns;
    }
    // Floats of a task: two tiles, the lanes of a tile's row products, and a part's panels, column sums and left
    // factors.
    int64_t scratch() const {
        return 2 * kTileRows * kTileColumns +
               ranks * (kTileRows * kMostLanes + 2 * columns_per_part() + rows_per_part());
    }
};

struct ExpandTerm {
    Dropout dropout;
    int64_t ranks;
    Matrix left;   // [rows of base, R]
    Matrix panel;  // [R, N]
    const void*
        packed;  // panel as pack() writes it for expand_width columns, or pack_ranks(); null: a task packs its own
    const float* bias;  // [N / width][width], or null
    float scale;
};

struct Expansion {
    Matrix base, out, plain, z;  // plain and z may have no data
    const int64_t* rows;         // as a Sweep's
    int64_t first_row, row_count;
    const ExpandTerm* terms;
    int64_t count, ranks;    // ranks: of all terms together
    const float* gain;       // [N / width][width], or null
    const float* gain_bias;  // as gain

    int64_t row(int64_t i) const { return rows ? rows[i] : first_row + i; }
    // Floats of a task: its rows' left factors, and panels.
    int64_t scratch() const {
        return ranks * (kExpandRows + ceil_div(at_most(kExpandColumns, base.columns), kTileColumns) * kTileColumns);
    }
};

// The passes in bfloat16 products: cpu/lora_pairs.h.
struct PairKernels {
    void (*pack_columns)(const Matrix& view, uint32_t* dst, int64_t begin, int64_t end);
    void (*pack_ranks)(const Matrix& view, uint32_t* dst, int64_t begin, int64_t end);
    void (*sweep)(const Sweep& sweep, int64_t task, float* scratch);
    void (*expand)(const Expansion& expansion, int64_t row_begin, int64_t row_end, int64_t column_begin,
                   int64_t column_end, float* scratch);
};

struct LoraKernels {
    int64_t dot_width, expand_width;
    // Blocks [begin, end) of `width` columns of a view [R, C]: dst[block][r][lane], zero past the last column.
    void (*pack)(const Matrix& view, int64_t width, float* dst, int64_t begin, int64_t end);
    void (*sweep)(const Sweep& sweep, int64_t task, float* scratch);
    // Rows [begin, end) of out = scale * (sum of `parts` matrices, `part_size` floats apart, in order); row i goes to
    // row rows[i] of out where rows is not null.
    void (*combine)(const float* sums, int64_t parts, int64_t part_size, int64_t ld, float scale, const Matrix& out,
                    const int64_t* rows, int64_t begin, int64_t end);
    // The same for columns [begin, end) of all rows; begin is a multiple of a vector, and the sums go on to a whole
    // one.
    void (*combine_columns)(const float* sums, int64_t parts, int64_t part_size, int64_t ld, float scale,
                            const Matrix& out, int64_t begin, int64_t end);
    void (*expand)(const Expansion& expansion, int64_t row_begin, int64_t row_end, int64_t column_begin,
                   int64_t column_end, float* scratch);
    // Rows [begin, end): out = factor * dy, and totals [N] = the sum of dy * z over them.
    void (*gain_grads)(const Matrix& dy, const Matrix& z, const float* factor, const Matrix& out, float* totals,
                       int64_t begin, int64_t end);
    void (*dropout_add)(const Matrix& base, const Matrix& x, const Dropout& dropout, const Corner& at, float scale,
                        const Matrix& out, int64_t begin, int64_t end);
    const PairKernels* pairs;  // null: this instruction set has no bfloat16 products
};

}  // namespace peftfast::cpu
