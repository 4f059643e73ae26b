#include "cpu/lora.h"

#include <memory>
#include <vector>

#include "../philox.h"
#include "cpu/lora_tables.h"

#define PEFTFAST_KERNELS "cpu/lora_kernels.h"
#define PEFTFAST_TABLE lora_table
#include "cpu/each_isa.h"

#if defined(PEFTFAST_HAS_DOT_BF16)
#define PEFTFAST_ISA 512
#define PEFTFAST_DOT_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace peftfast::cpu::avx512_bf16 {
#include "cpu/simd_avx512.h"
#include "cpu/lora_kernels.h"
}  // namespace peftfast::cpu::avx512_bf16
#pragma GCC pop_options
#undef PEFTFAST_DOT_BF16
#undef PEFTFAST_ISA
#endif

namespace peftfast::cpu {
namespace {

const LoraKernels& lora_kernels() {
#if defined(PEFTFAST_HAS_DOT_BF16)
    if (current_isa() == Isa::avx512_bf16) return avx512_bf16::lora_table;
#endif
    return kernels_in_use();
}

// The kernels of bfloat16 products, where there are any and all operands are bfloat16, so that nothing is rounded for
// them: a float32 adapter beside a bfloat16 base keeps its bits, as PEFT's own does.
struct PairsFor {
    const PairKernels* pairs = lora_kernels().pairs;

    void operand(const Matrix* matrix) {
        if (matrix && matrix->dtype != DType::bf16) pairs = nullptr;
    }
};

// Below about 2**18 multiply-adds (10 us on one core) waking a second thread costs more than it gives.
constexpr double kWorthAThread = 262144.0;

int64_t grain_for(int64_t tasks, double products) {
    const double share = products / static_cast<double>(at_least(tasks, 1));
    return share >= kWorthAThread ? 1 : static_cast<int64_t>(at_least(1, kWorthAThread / at_least(1, share)));
}

template <class Pack>
void pack_blocks(const Matrix& view, int64_t width, ParallelFor pool, const Pack& pack) {
    parallel_for(pool, ceil_div(view.columns, width), 1 + 8192 / (width * at_least(1, view.rows)), pack);
}

void pack_panel(const LoraKernels& kernels, const Matrix& view, int64_t width, float* dst, ParallelFor pool) {
    pack_blocks(view, width, pool, [&](int64_t begin, int64_t end) { kernels.pack(view, width, dst, begin, end); });
}

// Columns [column, column + ranks) of the rows of a term, [rows][R] contiguous: a packing whose blocks are the rows.
void pack_left(const LoraKernels& kernels, const Matrix& matrix, const Term& term, float* dst, ParallelFor pool) {
    if (term.ranks == 0) return;
    parallel_for(pool, term.row_count, 1 + 16384 / term.ranks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = term.rows ? term.rows[i] : i;
            const int64_t at = row * matrix.stride_row + term.column * matrix.stride_column;
            const Matrix one = {static_cast<char*>(matrix.data) + at * element_size(matrix.dtype),
                                matrix.dtype,
                                1,
                                term.ranks,
                                0,
                                matrix.stride_column};
            kernels.pack(one, term.ranks, dst + i * term.ranks, 0, 1);
        }
    });
}

void pack_left_pairs(const PairKernels& pairs, const Matrix& matrix, const Term& term, float* dst, ParallelFor pool) {
    if (term.ranks == 0) return;
    parallel_for(pool, ceil_div(term.row_count, 2), 1 + 8192 / term.ranks, [&](int64_t begin, int64_t end) {
        pairs.pack_rows(matrix, term.rows, term.row_count, term.column, term.ranks, reinterpret_cast<uint32_t*>(dst),
                        begin, end);
    });
}

Matrix columns_of(const Matrix& matrix, const Term& term) {
    Matrix part = matrix;
    part.data = static_cast<char*>(matrix.data) + term.column * matrix.stride_column * element_size(matrix.dtype);
    part.columns = term.ranks;
    return part;
}

void combine(const LoraKernels& kernels, const float* sums, int64_t parts, int64_t part_size, int64_t ld, double scale,
             const Matrix& out, const int64_t* rows, int64_t row_count, ParallelFor pool) {
    parallel_for(pool, row_count, 1 + 16384 / at_least(1, out.columns * parts), [&](int64_t begin, int64_t end) {
        kernels.combine(sums, parts, part_size, ld, static_cast<float>(scale), out, rows, begin, end);
    });
}

// Parts of a sweep: about 256 rows each, fewer where the column sums of all parts would pass 64 MiB, and columns cut as
// well where that leaves fewer than eight tasks.
void partition(Sweep& sweep, bool by_columns) {
    const int64_t column_bytes = at_least(1, sweep.ranks * sweep.padded_columns() * 4);
    int64_t most = 64;
    if (by_columns) most = at_most(most, at_least(1, (int64_t{64} << 20) / column_bytes));
    sweep.row_parts = at_least(1, at_most(most, ceil_div(sweep.row_count, 256)));
    sweep.column_parts = 1;
    if (sweep.row_parts < 8) {
        const int64_t most_columns = at_least(1, sweep.x.columns / (4 * kTileColumns));
        sweep.column_parts = at_most(most_columns, ceil_div(8, sweep.row_parts));
    }
}

void run_sweep(const LoraKernels& kernels, const PairKernels* pairs, const Sweep& sweep, int64_t products_each,
               ParallelFor pool) {
    const int64_t tasks = sweep.row_parts * sweep.column_parts;
    const double products = static_cast<double>(sweep.row_count) * static_cast<double>(sweep.x.columns) *
                            static_cast<double>(sweep.ranks + 8) * static_cast<double>(products_each);
    parallel_for(pool, tasks, grain_for(tasks, products), [&](int64_t begin, int64_t end) {
        Scratch<float> scratch(kernels.sweep_scratch(sweep.ranks));
        const auto run = pairs ? pairs->sweep : kernels.sweep;
        for (int64_t task = begin; task < end; ++task) run(sweep, task, scratch.get());
    });
}

// What a sweep is to do for one term. A null matrix leaves a product out: `panel` [R, C] makes rows of `row_out`,
// `left` [M, R of all terms] makes `column_out` [R, C].
struct Request {
    const Term* term;
    const Matrix *panel, *left, *row_out, *column_out;
};

// All requests act on the same rows.
void sweep_together(const Matrix& x, const std::vector<Request>& requests, const PairKernels* pairs, ParallelFor pool) {
    const LoraKernels& kernels = lora_kernels();
    const int64_t width = kernels.dot_width;
    const Term& first = *requests.front().term;
    const bool by_rows = requests.front().panel != nullptr, by_columns = requests.front().left != nullptr;
    std::vector<Product> products;
    Sweep sweep = {x, first.rows, first.row_count, nullptr, 0, 0, 1, 1};
    for (const Request& request : requests) sweep.ranks += request.term->ranks;
    partition(sweep, by_columns);
    const int64_t padded = sweep.padded_columns();
    const int64_t panel_size = by_rows ? ceil_div(x.columns, width) * width : 0;
    const int64_t left_size = by_columns ? sweep.row_count : 0;
    const int64_t row_size = by_rows ? sweep.column_parts * sweep.row_count : 0;
    const int64_t column_size = by_columns ? sweep.row_parts * padded : 0;
    // One buffer: a term's share of each part lies at its first rank times the part's size. Pairs take half of it or a
    // little more.
    Scratch<float> buffer(sweep.ranks * (panel_size + left_size + row_size + column_size));
    int64_t rank = 0;
    for (const Request& request : requests) {
        float* panel = buffer.get() + rank * panel_size;
        float* left = buffer.get() + sweep.ranks * panel_size + rank * left_size;
        float* row_sums = buffer.get() + sweep.ranks * (panel_size + left_size) + rank * row_size;
        float* column_sums = buffer.get() + sweep.ranks * (panel_size + left_size + row_size) + rank * column_size;
        if (by_rows && pairs) {
            pack_blocks(*request.panel, 2 * width, pool, [&](int64_t begin, int64_t end) {
                pairs->pack_columns(*request.panel, reinterpret_cast<uint32_t*>(panel), begin, end);
            });
        } else if (by_rows) {
            pack_panel(kernels, *request.panel, width, panel, pool);
        }
        if (by_columns && pairs) {
            pack_left_pairs(*pairs, *request.left, *request.term, left, pool);
        } else if (by_columns) {
            pack_left(kernels, *request.left, *request.term, left, pool);
        }
        products.push_back({request.term->dropout, request.term->ranks, by_rows ? panel : nullptr,
                            by_columns ? left : nullptr, row_sums, column_sums});
        rank += request.term->ranks;
    }
    sweep.products = products.data();
    sweep.count = static_cast<int64_t>(products.size());
    run_sweep(kernels, pairs, sweep, by_rows && by_columns ? 2 : 1, pool);
    for (size_t i = 0; i < requests.size(); ++i) {
        const Term& term = *requests[i].term;
        const double scale = term.scaling * term.dropout.scale();
        const int64_t ranks = term.ranks;
        if (by_rows) {
            combine(kernels, products[i].row_sums, sweep.column_parts, sweep.row_count * ranks, ranks, scale,
                    columns_of(*requests[i].row_out, term), sweep.rows, sweep.row_count, pool);
        }
        if (by_columns) {
            combine(kernels, products[i].column_sums, sweep.row_parts, ranks * padded, padded, scale,
                    *requests[i].column_out, nullptr, ranks, pool);
        }
    }
}

// One sweep where every term acts on all rows, else one a term, each over its own rows.
void sweep_products(const Matrix& x, const std::vector<Request>& requests, ParallelFor pool) {
    if (requests.empty()) return;
    PairsFor use;
    use.operand(&x);
    bool together = true;
    for (const Request& request : requests) {
        use.operand(request.panel);
        use.operand(request.left);
        together = together && request.term->rows == nullptr;
    }
    if (together) return sweep_together(x, requests, use.pairs, pool);
    for (const Request& request : requests) sweep_together(x, {request}, use.pairs, pool);
}

// The rows of each term leave the others of its columns untouched: zero there.
void zero_columns(const Matrix& out, const Term& term) {
    if (!term.rows || term.ranks == 0) return;
    const Matrix part = columns_of(out, term);
    const int64_t size = element_size(out.dtype);
    for (int64_t row = 0; row < part.rows; ++row) {
        for (int64_t column = 0; column < part.columns; ++column) {
            char* at = static_cast<char*>(part.data) + (row * part.stride_row + column * part.stride_column) * size;
            for (int64_t byte = 0; byte < size; ++byte) at[byte] = 0;
        }
    }
}

}  // namespace

void lora_shrink(const Matrix& x, const Terms& terms, const Matrix& out, ParallelFor pool) {
    std::vector<Request> requests;
    for (int64_t i = 0; i < terms.count; ++i) {
        const Term& term = terms.data[i];
        zero_columns(out, term);
        requests.push_back({&term, &term.w, nullptr, &out, nullptr});
    }
    sweep_products(x, requests, pool);
}

void lora_weight_grad(const Matrix& ds, const Matrix& x, const Terms& terms, ParallelFor pool) {
    std::vector<Request> requests;
    for (int64_t i = 0; i < terms.count; ++i) {
        requests.push_back({&terms.data[i], nullptr, &ds, nullptr, &terms.data[i].w});
    }
    sweep_products(x, requests, pool);
}

void lora_dy_grads(const Matrix& dy, const Matrix& s, const Terms& terms, const Matrix& ds, ParallelFor pool) {
    std::vector<Matrix> panels, outs;
    for (int64_t i = 0; i < terms.count; ++i) {
        panels.push_back(terms.data[i].w.transposed());
        outs.push_back(terms.data[i].bias.transposed());
        zero_columns(ds, terms.data[i]);
    }
    std::vector<Request> requests;
    for (int64_t i = 0; i < terms.count; ++i) requests.push_back({&terms.data[i], &panels[i], &s, &ds, &outs[i]});
    sweep_products(dy, requests, pool);
}

namespace {

// What an expand needs of one term, packed.
struct PackedTerm {
    Scratch<float> panel, left, bias;

    PackedTerm(const LoraKernels& kernels, const PairKernels* pairs, const Matrix& s, const Term& term, int64_t padded,
               ParallelFor pool)
        : panel(padded * term.ranks), left(term.row_count * term.ranks), bias(term.bias.data ? padded : 0) {
        const Matrix view = term.w.transposed();
        if (pairs) {
            pack_blocks(view, kernels.expand_width, pool, [&](int64_t begin, int64_t end) {
                pairs->pack_ranks(view, reinterpret_cast<uint32_t*>(panel.get()), begin, end);
            });
            parallel_for(pool, term.row_count, 1 + 16384 / at_least(1, term.ranks), [&](int64_t begin, int64_t end) {
                pairs->pack_factors(s, term.rows, term.column, term.ranks, reinterpret_cast<uint32_t*>(left.get()),
                                    begin, end);
            });
        } else {
            pack_panel(kernels, view, kernels.expand_width, panel.get(), pool);
            pack_left(kernels, s, term, left.get(), pool);
        }
        if (term.bias.data) pack_panel(kernels, term.bias, kernels.expand_width, bias.get(), pool);
    }
};

void run_expand(const LoraKernels& kernels, const PairKernels* pairs, const Expansion& expansion, ParallelFor pool) {
    const int64_t row_tasks = ceil_div(expansion.row_count, kExpandRows);
    const int64_t tasks = row_tasks * ceil_div(expansion.base.columns, kExpandColumns);
    const auto run = pairs ? pairs->expand : kernels.expand;
    int64_t ranks = 8;
    for (int64_t t = 0; t < expansion.count; ++t) ranks += expansion.terms[t].ranks;
    const double products = static_cast<double>(expansion.row_count) * static_cast<double>(expansion.base.columns) *
                            static_cast<double>(ranks);
    // An element's value does not depend on the partition: only the order over r matters, and no sum is cut.
    parallel_for(pool, tasks, grain_for(tasks, products), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task % row_tasks * kExpandRows, column = task / row_tasks * kExpandColumns;
            run(expansion, row, at_most(expansion.row_count, row + kExpandRows), column,
                at_most(expansion.base.columns, column + kExpandColumns));
        }
    });
}

}  // namespace

void lora_expand(const Matrix& base, const Matrix& s, const Terms& terms, const Dora* dora, const Matrix& out,
                 ParallelFor pool) {
    if (base.rows == 0 || base.columns == 0) return;
    const LoraKernels& kernels = lora_kernels();
    PairsFor use;
    use.operand(&s);
    for (int64_t t = 0; t < terms.count; ++t) use.operand(&terms.data[t].w);
    const PairKernels* pairs = use.pairs;
    const int64_t width = kernels.expand_width, padded = ceil_div(base.columns, width) * width;
    Scratch<float> gain(dora ? padded : 0), gain_bias(dora && dora->bias.data ? padded : 0);
    if (dora) pack_panel(kernels, dora->gain, width, gain.get(), pool);
    if (dora && dora->bias.data) pack_panel(kernels, dora->bias, width, gain_bias.get(), pool);
    Expansion expansion = {base, out, {}, {}, nullptr, base.rows, nullptr, 0, nullptr, nullptr};
    if (dora) {
        expansion.plain = dora->plain, expansion.z = dora->z, expansion.gain = gain.get();
        expansion.gain_bias = dora->bias.data ? gain_bias.get() : nullptr;
    }
    std::vector<std::unique_ptr<PackedTerm>> packed;
    std::vector<ExpandTerm> ready;
    for (int64_t t = 0; t < terms.count; ++t) {
        const Term& term = terms.data[t];
        packed.push_back(std::make_unique<PackedTerm>(kernels, pairs, s, term, padded, pool));
        const PackedTerm& own = *packed.back();
        ready.push_back({term.dropout, term.ranks, own.left.get(), own.panel.get(),
                         term.bias.data ? own.bias.get() : nullptr,
                         static_cast<float>(term.scaling * term.dropout.scale())});
    }
    if (terms.count > 0 && terms.data[0].rows == nullptr) {
        expansion.terms = ready.data(), expansion.count = terms.count;
        return run_expand(kernels, pairs, expansion, pool);
    }
    for (int64_t t = 0; t < terms.count; ++t) {
        expansion.terms = &ready[t], expansion.count = 1;
        expansion.rows = terms.data[t].rows, expansion.row_count = terms.data[t].row_count;
        run_expand(kernels, pairs, expansion, pool);
    }
}

void lora_gain_grads(const Matrix& dy, const Matrix& z, const Matrix& factor, const Matrix& out, const Matrix& sums,
                     ParallelFor pool) {
    const LoraKernels& kernels = lora_kernels();
    const int64_t columns = dy.columns, parts = at_least(1, at_most(64, ceil_div(dy.rows, 128)));
    const int64_t rows = ceil_div(dy.rows, parts);
    Scratch<float> factors(columns), totals(parts * columns);
    kernels.pack(factor, at_least(1, columns), factors.get(), 0, columns > 0);
    for (int64_t i = 0; i < parts * columns; ++i) totals.get()[i] = 0.0f;
    const double products = 2.0 * static_cast<double>(dy.rows) * static_cast<double>(columns);
    parallel_for(pool, parts, grain_for(parts, products), [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            kernels.gain_grads(dy, z, factors.get(), out, totals.get() + part * columns, part * rows,
                               at_most(dy.rows, (part + 1) * rows));
        }
    });
    if (sums.data) combine(kernels, totals.get(), parts, columns, columns, 1.0, sums, nullptr, 1, pool);
}

void lora_dropout_add(const Matrix& base, const Matrix& x, const Dropout& dropout, const Corner& at, double scale,
                      const Matrix& out, ParallelFor pool) {
    const LoraKernels& kernels = lora_kernels();
    const double products = 2.0 * static_cast<double>(x.rows) * static_cast<double>(x.columns);
    parallel_for(pool, x.rows, grain_for(x.rows, products), [&](int64_t begin, int64_t end) {
        kernels.dropout_add(base, x, dropout, at, static_cast<float>(scale), out, begin, end);
    });
}

}  // namespace peftfast::cpu
