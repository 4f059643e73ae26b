#include "cpu/lora.h"

#include "cpu/lora_tables.h"
#include "../philox.h"

#define PEFTFAST_KERNELS "cpu/lora_kernels.h"
#define PEFTFAST_TABLE lora_table
#include "cpu/each_isa.h"

namespace peftfast::cpu {
namespace {

// Below about 2**18 multiply-adds (10 us on one core) waking a second thread costs more than it gives.
constexpr double kWorthAThread = 262144.0;

int64_t grain_for(int64_t tasks, double products) {
    const double share = products / static_cast<double>(at_least(tasks, 1));
    return share >= kWorthAThread ? 1 : static_cast<int64_t>(at_least(1, kWorthAThread / at_least(1, share)));
}

void pack_panel(const LoraKernels& kernels, const Matrix& view, int64_t width, float* dst, ParallelFor pool) {
    const int64_t grain = 1 + 8192 / (width * at_least(1, view.rows));
    parallel_for(pool, ceil_div(view.columns, width), grain,
                 [&](int64_t begin, int64_t end) { kernels.pack(view, width, dst, begin, end); });
}

// [M][R] contiguous: a packing whose blocks are the rows.
void pack_left(const LoraKernels& kernels, const Matrix& matrix, float* dst, ParallelFor pool) {
    const Matrix rows = {matrix.data, matrix.dtype, 1, matrix.columns, 0, matrix.stride_column};
    parallel_for(pool, matrix.rows, 1 + 16384 / at_least(1, matrix.columns), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end && matrix.columns > 0; ++m) {
            Matrix row = rows;
            row.data = static_cast<char*>(matrix.data) + m * matrix.stride_row * element_size(matrix.dtype);
            kernels.pack(row, matrix.columns, dst + m * matrix.columns, 0, 1);
        }
    });
}

void combine(const LoraKernels& kernels, const float* sums, int64_t parts, int64_t part_size, int64_t ld, double scale,
             const Matrix& out, ParallelFor pool) {
    parallel_for(pool, out.rows, 1 + 16384 / at_least(1, out.columns * parts), [&](int64_t begin, int64_t end) {
        kernels.combine(sums, parts, part_size, ld, static_cast<float>(scale), out, begin, end);
    });
}

// Parts of a sweep: about 256 rows each, fewer where the column sums of all parts would pass 64 MiB, and columns cut as
// well where that leaves fewer than eight tasks.
void partition(Sweep& sweep) {
    const int64_t column_bytes = at_least(1, sweep.ranks * sweep.padded_columns() * 4);
    int64_t most = 64;
    if (sweep.left) most = at_most(most, at_least(1, (int64_t{64} << 20) / column_bytes));
    sweep.row_parts = at_least(1, at_most(most, ceil_div(sweep.x.rows, 256)));
    sweep.column_parts = 1;
    if (sweep.row_parts < 8) {
        const int64_t most_columns = at_least(1, sweep.x.columns / (4 * kTileColumns));
        sweep.column_parts = at_most(most_columns, ceil_div(8, sweep.row_parts));
    }
}

void run_sweep(const LoraKernels& kernels, const Sweep& sweep, ParallelFor pool) {
    const int64_t tasks = sweep.row_parts * sweep.column_parts;
    const double products = static_cast<double>(sweep.x.rows) * static_cast<double>(sweep.x.columns) *
                            static_cast<double>(sweep.ranks + 8) * (sweep.panel && sweep.left ? 2 : 1);
    parallel_for(pool, tasks, grain_for(tasks, products), [&](int64_t begin, int64_t end) {
        Scratch<float> scratch(kernels.sweep_scratch(sweep.ranks));
        for (int64_t task = begin; task < end; ++task) kernels.sweep(sweep, task, scratch.get());
    });
}

// Either product may be left out by a null matrix: `panel_view` [R, C] makes row_out [M, R], `left` [M, R] column_out
// [R, C].
void sweep_products(const Matrix& x, const Dropout& dropout, int64_t ranks, const Matrix* panel_view,
                    const Matrix* left, double scaling, const Matrix* row_out, const Matrix* column_out,
                    ParallelFor pool) {
    const LoraKernels& kernels = kernels_in_use();
    Sweep sweep = {x, dropout, ranks, nullptr, nullptr, 1, 1, nullptr, nullptr};
    const int64_t width = kernels.dot_width;
    Scratch<float> panel(panel_view ? ceil_div(x.columns, width) * width * ranks : 0);
    Scratch<float> left_rows(left ? x.rows * ranks : 0);
    if (panel_view) pack_panel(kernels, *panel_view, width, panel.get(), pool);
    if (left) pack_left(kernels, *left, left_rows.get(), pool);
    sweep.panel = panel_view ? panel.get() : nullptr;
    sweep.left = left ? left_rows.get() : nullptr;
    partition(sweep);
    const int64_t padded = sweep.padded_columns();
    Scratch<float> row_sums(panel_view ? sweep.column_parts * x.rows * ranks : 0);
    Scratch<float> column_sums(left ? sweep.row_parts * ranks * padded : 0);
    sweep.row_sums = row_sums.get();
    sweep.column_sums = column_sums.get();
    run_sweep(kernels, sweep, pool);
    const double scale = scaling * dropout.scale();
    if (row_out) {
        combine(kernels, row_sums.get(), sweep.column_parts, x.rows * ranks, ranks, scale, *row_out, pool);
    }
    if (column_out) {
        combine(kernels, column_sums.get(), sweep.row_parts, ranks * padded, padded, scale, *column_out, pool);
    }
}

}  // namespace

void lora_shrink(const Matrix& x, const Matrix& w, const Dropout& dropout, double scaling, const Matrix& out,
                 ParallelFor pool) {
    sweep_products(x, dropout, w.rows, &w, nullptr, scaling, &out, nullptr, pool);
}

void lora_weight_grad(const Matrix& ds, const Matrix& x, const Dropout& dropout, double scaling, const Matrix& out,
                      ParallelFor pool) {
    sweep_products(x, dropout, ds.columns, nullptr, &ds, scaling, nullptr, &out, pool);
}

void lora_dy_grads(const Matrix& dy, const Matrix& s, const Matrix& b, double scaling, const Matrix& ds,
                   const Matrix& db, ParallelFor pool) {
    const Matrix panel_view = b.transposed(), column_out = db.transposed();
    sweep_products(dy, Dropout{0, -1}, s.columns, &panel_view, &s, scaling, &ds, &column_out, pool);
}

void lora_expand(const Matrix& base, const Matrix& s, const Matrix& w, const Matrix& bias, const Dropout& dropout,
                 double scaling, const Matrix& out, ParallelFor pool) {
    if (base.rows == 0 || base.columns == 0) return;
    const LoraKernels& kernels = kernels_in_use();
    const int64_t ranks = s.columns, width = kernels.expand_width;
    const int64_t padded = ceil_div(base.columns, width) * width;
    Scratch<float> panel(padded * ranks);
    Scratch<float> left(base.rows * ranks);
    Scratch<float> bias_row(bias.data ? padded : 0);
    pack_panel(kernels, w.transposed(), width, panel.get(), pool);
    pack_left(kernels, s, left.get(), pool);
    if (bias.data) pack_panel(kernels, bias, width, bias_row.get(), pool);
    const Expansion expansion = {base,
                                 out,
                                 dropout,
                                 ranks,
                                 left.get(),
                                 panel.get(),
                                 bias.data ? bias_row.get() : nullptr,
                                 static_cast<float>(scaling * dropout.scale())};
    const int64_t row_tasks = ceil_div(base.rows, kExpandRows), column_tasks = ceil_div(base.columns, kExpandColumns);
    const int64_t tasks = row_tasks * column_tasks;
    const double products =
        static_cast<double>(base.rows) * static_cast<double>(base.columns) * static_cast<double>(ranks + 8);
    // An element's value does not depend on the partition: only the order over r matters, and no sum is cut.
    parallel_for(pool, tasks, grain_for(tasks, products), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task % row_tasks * kExpandRows, column = task / row_tasks * kExpandColumns;
            kernels.expand(expansion, row, at_most(base.rows, row + kExpandRows), column,
                           at_most(base.columns, column + kExpandColumns));
        }
    });
}

}  // namespace peftfast::cpu
