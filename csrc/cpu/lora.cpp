#include "cpu/lora.h"

#include <algorithm>
#include <vector>

#include "../philox.h"
#include "cpu/lora_tables.h"

#define PEFTFAST_KERNELS "cpu/lora_kernels.h"
#define PEFTFAST_TABLE lora_table
#define PEFTFAST_WITH_DOT_BF16
#include "cpu/each_isa.h"

namespace peftfast::cpu {
namespace {

// The kernels of bfloat16 products, where there are any and all operands are bfloat16, so that nothing is rounded for
// them: a float32 adapter beside a bfloat16 base keeps its bits, as PEFT's own does.
struct PairsFor {
    const PairKernels* pairs = kernels_in_use().pairs;

    void operand(const Matrix* matrix) {
        if (matrix && matrix->dtype != DType::bf16) pairs = nullptr;
    }
};

// Below about 2**18 multiply-adds (10 us on one core) waking a second thread costs more than it gives.
constexpr int64_t kWorthAThread = 262144;
constexpr int64_t kCopied = 16;  // multiply-adds that an element packed, or taken from a sum, costs about as much as

int64_t grain_for(int64_t tasks, double products) {
    const double share = products / static_cast<double>(at_least(tasks, 1));
    return share >= kWorthAThread ? 1 : static_cast<int64_t>(at_least(1, kWorthAThread / at_least(1, share)));
}

// Steps [begin, end) of a job, of `cost` multiply-adds together.
struct Item {
    size_t job;
    int64_t begin, end, cost;
};

// `count` steps of a job of `cost` multiply-adds each, in items of `size`.
void add_items(std::vector<Item>& items, size_t job, int64_t count, int64_t size, int64_t cost) {
    for (int64_t i = 0; i < count; i += size) {
        const int64_t end = at_most(count, i + size);
        items.push_back({job, i, end, at_least(1, (end - i) * cost)});
    }
}

// The items of all jobs in one go of the pool, which is shared out by what they cost: a pass over the rows of many
// adapters wakes the threads once. `run_range` gets items [begin, end).
template <class RunRange>
void run_items(const std::vector<Item>& items, ParallelFor pool, const RunRange& run_range) {
    std::vector<int64_t> starts;
    int64_t total = 0;
    for (const Item& item : items) {
        starts.push_back(total);
        total += item.cost;
    }
    parallel_for(pool, total, kWorthAThread, [&](int64_t begin, int64_t end) {
        const auto first = std::lower_bound(starts.begin(), starts.end(), begin);
        const auto last = std::lower_bound(first, starts.end(), end);
        if (first != last) run_range(items.data() + (first - starts.begin()), items.data() + (last - starts.begin()));
    });
}

template <class Run>
void run_each(const std::vector<Item>& items, ParallelFor pool, const Run& run) {
    run_items(items, pool, [&](const Item* begin, const Item* end) {
        for (const Item* item = begin; item != end; ++item) run(item->job, item->begin, item->end);
    });
}

void pack_row(const LoraKernels& kernels, const Matrix& row, float* dst) {
    const int64_t width = kernels.expand_width;
    kernels.pack(row, width, dst, 0, ceil_div(row.columns, width));
}

Matrix columns_of(const Matrix& matrix, const Term& term) {
    return columns_from(matrix, term.column, term.column + term.ranks);
}

// Rows that follow one another need no list.
template <class Run>
void take_rows(Run& run, const Term& term) {
    run.rows = term.rows, run.first_row = 0, run.row_count = term.row_count;
    if (run.rows && run.row_count > 0 && run.rows[run.row_count - 1] - run.rows[0] == run.row_count - 1) {
        run.first_row = run.rows[0], run.rows = nullptr;
    }
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
    // No part is empty but the only one.
    sweep.row_parts = at_least(1, ceil_div(sweep.row_count, at_least(1, sweep.rows_per_part())));
    sweep.column_parts = at_least(1, ceil_div(sweep.x.columns, at_least(1, sweep.columns_per_part())));
}

// What a sweep is to do for one term. A null matrix leaves a product out: `panel` [R, C] makes rows of `row_out`,
// `left` [M, R of all terms] makes `column_out` [R, C].
struct Request {
    const Term* term;
    const Matrix *panel, *left, *row_out, *column_out;
};

// Sweeps over x: one for all requests where they act on all rows, else one for each, over its own rows.
class Sweeps {
  public:
    Sweeps(const Matrix& x, const std::vector<Request>& requests, ParallelFor pool) : requests_(requests), pool_(pool) {
        bool together = true;
        use_.operand(&x);
        for (const Request& request : requests) {
            use_.operand(request.panel);
            use_.operand(request.left);
            together = together && request.term->rows == nullptr;
            add_product(request);
        }
        const size_t each = together ? requests.size() : 1;
        for (size_t first = 0; first < requests.size(); first += each) add_sweep(x, first, each);
    }

    void run() {
        const Scratch<float> buffer(share_out(nullptr));
        share_out(buffer.get());
        pack();
        sweep();
        combine();
    }

  private:
    void add_product(const Request& request) {
        const Term& term = *request.term;
        Product product = {term.dropout, term.ranks, {}, nullptr, {}, nullptr, nullptr, {}, 0.0f};
        product.scale = static_cast<float>(term.scaling * term.dropout.scale());
        if (request.panel) product.panel = *request.panel;
        if (request.left) product.left = columns_of(*request.left, term), product.column_out = *request.column_out;
        products_.push_back(product);
    }

    void add_sweep(const Matrix& x, size_t first, size_t count) {
        Sweep sweep = {x, nullptr, 0, 0, products_.data() + first, static_cast<int64_t>(count), 0, 1, 1};
        take_rows(sweep, *requests_[first].term);
        for (size_t i = first; i < first + count; ++i) sweep.ranks += products_[i].ranks;
        partition(sweep, requests_[first].left != nullptr);
        sweeps_.push_back(sweep);
        of_.insert(of_.end(), count, sweeps_.size() - 1);
    }

    // Gives each product its share of the buffer, and says how much that takes: sums of parts, and the panel where
    // several row parts meet it.
    int64_t share_out(float* buffer) {
        int64_t used = 0;
        const auto take = [&](int64_t count) {
            float* own = buffer ? buffer + used : nullptr;
            used += ceil_div(count, kMostLanes) * kMostLanes;
            return own;
        };
        for (size_t i = 0; i < products_.size(); ++i) {
            const Sweep& sweep = sweeps_[of_[i]];
            Product& product = products_[i];
            const int64_t sums = product.ranks * sweep.padded_columns();
            if (requests_[i].panel) {
                product.row_sums = take(sweep.column_parts * sweep.row_count * product.ranks);
                if (sweep.row_parts > 1) product.packed = take(sums);
            }
            if (requests_[i].left && sweep.row_parts > 1) product.column_sums = take(sweep.row_parts * sums);
        }
        return used;
    }

    void pack() {
        const int64_t width = use_.pairs ? 2 * kernels_.dot_width : kernels_.dot_width;
        std::vector<Item> items;
        for (size_t i = 0; i < products_.size(); ++i) {
            const Product& product = products_[i];
            if (!product.packed) continue;
            add_items(items, i, ceil_div(product.panel.columns, width), 8, kCopied * width * product.ranks);
        }
        run_each(items, pool_, [&](size_t i, int64_t begin, int64_t end) {
            void* packed = const_cast<void*>(products_[i].packed);
            if (use_.pairs) {
                use_.pairs->pack_columns(products_[i].panel, static_cast<uint32_t*>(packed), begin, end);
            } else {
                kernels_.pack(products_[i].panel, width, static_cast<float*>(packed), begin, end);
            }
        });
    }

    void sweep() {
        std::vector<Item> items;
        int64_t most = 0;
        for (size_t i = 0; i < sweeps_.size(); ++i) {
            const Sweep& sweep = sweeps_[i];
            const int64_t each = sweep.products->by_rows() && sweep.products->by_columns() ? 2 : 1;
            // What is packed or taken from the sums costs as much as about kCopied more rows.
            const int64_t rows = sweep.rows_per_part() + kCopied, columns = sweep.columns_per_part();
            for (int64_t task = 0; task < sweep.row_parts * sweep.column_parts; ++task) {
                const int64_t begin = task % sweep.column_parts * columns;
                const int64_t own = at_most(sweep.x.columns, begin + columns) - begin;
                items.push_back({i, task, task + 1, at_least(1, rows * own * (sweep.ranks + 8) * each)});
            }
            most = at_least(most, sweep.scratch());
        }
        const auto run = use_.pairs ? use_.pairs->sweep : kernels_.sweep;
        run_items(items, pool_, [&](const Item* begin, const Item* end) {
            const Scratch<float> scratch(most);
            for (const Item* item = begin; item != end; ++item) run(sweeps_[item->job], item->begin, scratch.get());
        });
    }

    void combine() {
        std::vector<Item> items;
        const size_t count = products_.size();
        for (size_t i = 0; i < count; ++i) {
            const Sweep& sweep = sweeps_[of_[i]];
            const int64_t cost = kCopied * products_[i].ranks;
            if (requests_[i].panel) add_items(items, i, sweep.row_count, 64, cost * sweep.column_parts);
            if (products_[i].column_sums) add_items(items, count + i, sweep.x.columns, 256, cost * sweep.row_parts);
        }
        run_each(items, pool_, [&](size_t job, int64_t begin, int64_t end) {
            const size_t i = job % count;
            const Sweep& sweep = sweeps_[of_[i]];
            const Product& product = products_[i];
            const int64_t ranks = product.ranks, padded = sweep.padded_columns();
            if (job >= count) {
                kernels_.combine_columns(product.column_sums, sweep.row_parts, ranks * padded, padded, product.scale,
                                         product.column_out, begin, end);
                return;
            }
            const Matrix out = rows_from(columns_of(*requests_[i].row_out, *requests_[i].term), sweep.first_row);
            kernels_.combine(product.row_sums, sweep.column_parts, sweep.row_count * ranks, ranks, product.scale, out,
                             sweep.rows, begin, end);
        });
    }

    const std::vector<Request>& requests_;
    const LoraKernels& kernels_ = kernels_in_use();
    PairsFor use_;
    ParallelFor pool_;
    std::vector<Product> products_;
    std::vector<Sweep> sweeps_;
    std::vector<size_t> of_;  // the sweep of each product
};

void sweep_products(const Matrix& x, const std::vector<Request>& requests, ParallelFor pool) {
    if (!requests.empty()) Sweeps(x, requests, pool).run();
}

// A term writes its columns in its own rows: zero in the others. The terms lie side by side, all with rows or none.
void zero_rows(const Matrix& out, const Terms& terms, ParallelFor pool) {
    if (terms.count == 0 || !terms.data[0].rows) return;
    const Term& last = terms.data[terms.count - 1];
    const Matrix part = columns_from(out, terms.data[0].column, last.column + last.ranks);
    const int64_t size = element_size(out.dtype), bytes = at_least(1, part.columns * size);
    parallel_for(pool, part.rows, 1 + 131072 / bytes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            char* at = static_cast<char*>(part.data) + row * part.stride_row * size;
            if (part.stride_column == 1) {
                std::fill_n(at, part.columns * size, 0);
                continue;
            }
            for (int64_t i = 0; i < part.columns; ++i) std::fill_n(at + i * part.stride_column * size, size, 0);
        }
    });
}

}  // namespace

void lora_shrink(const Matrix& x, const Terms& terms, const Matrix& out, ParallelFor pool) {
    std::vector<Request> requests;
    zero_rows(out, terms, pool);
    for (int64_t i = 0; i < terms.count; ++i) {
        requests.push_back({&terms.data[i], &terms.data[i].w, nullptr, &out, nullptr});
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
    }
    zero_rows(ds, terms, pool);
    std::vector<Request> requests;
    for (int64_t i = 0; i < terms.count; ++i) requests.push_back({&terms.data[i], &panels[i], &s, &ds, &outs[i]});
    sweep_products(dy, requests, pool);
}

void lora_expand(const Matrix& base, const Matrix& s, const Terms& terms, const Dora* dora, const Matrix& out,
                 ParallelFor pool) {
    if (base.rows == 0 || base.columns == 0) return;
    const LoraKernels& kernels = kernels_in_use();
    PairsFor use;
    use.operand(&s);
    for (int64_t t = 0; t < terms.count; ++t) use.operand(&terms.data[t].w);
    const PairKernels* pairs = use.pairs;
    const int64_t width = kernels.expand_width, blocks = ceil_div(base.columns, width), padded = blocks * width;
    const bool together = terms.count > 0 && terms.data[0].rows == nullptr;

    Expansion whole = {base, out, {}, {}, nullptr, 0, base.rows, nullptr, 0, 0, nullptr, nullptr};
    Scratch<float> gain(dora ? padded : 0), gain_bias(dora && dora->bias.data ? padded : 0);
    if (dora) {
        pack_row(kernels, dora->gain, gain.get());
        whole.plain = dora->plain, whole.z = dora->z, whole.gain = gain.get();
        if (dora->bias.data) pack_row(kernels, dora->bias, gain_bias.get()), whole.gain_bias = gain_bias.get();
    }
    std::vector<ExpandTerm> ready;
    std::vector<Expansion> expansions;
    ready.reserve(static_cast<size_t>(terms.count));
    int64_t used = 0;
    for (int64_t t = 0; t < terms.count; ++t) {
        const Term& term = terms.data[t];
        ready.push_back({term.dropout, term.ranks, columns_of(s, term), term.w.transposed(), nullptr, nullptr,
                         static_cast<float>(term.scaling * term.dropout.scale())});
        if (!together || t == 0) {
            Expansion expansion = whole;
            expansion.terms = &ready.back(), expansion.count = 0;
            take_rows(expansion, term);
            expansions.push_back(expansion);
        }
        Expansion& own = expansions.back();
        ++own.count, own.ranks += term.ranks;
        used += (own.row_count > kExpandRows ? padded * term.ranks : 0) + (term.bias.data ? padded : 0);
    }

    // A panel that several tasks of rows meet is packed before them, and every bias.
    const Scratch<float> buffer(used);
    float* next = buffer.get();
    std::vector<Item> packing, tasks;
    const size_t count = ready.size();
    for (size_t t = 0; t < count; ++t) {
        ExpandTerm& term = ready[t];
        if (expansions[together ? 0 : t].row_count > kExpandRows) {
            term.packed = next, next += padded * term.ranks;
            add_items(packing, t, blocks, 4, kCopied * width * term.ranks);
        }
        if (terms.data[t].bias.data) {
            term.bias = next, next += padded;
            add_items(packing, count + t, 1, 1, kCopied * padded);
        }
    }
    run_each(packing, pool, [&](size_t job, int64_t begin, int64_t end) {
        const ExpandTerm& term = ready[job % count];
        void* packed = const_cast<void*>(term.packed);
        if (job >= count) {
            pack_row(kernels, terms.data[job - count].bias, const_cast<float*>(term.bias));
        } else if (pairs) {
            pairs->pack_ranks(term.panel, static_cast<uint32_t*>(packed), begin, end);
        } else {
            kernels.pack(term.panel, width, static_cast<float*>(packed), begin, end);
        }
    });

    int64_t most = 0;
    for (size_t i = 0; i < expansions.size(); ++i) {
        const Expansion& own = expansions[i];
        const int64_t row_tasks = ceil_div(own.row_count, kExpandRows);
        const int64_t rows = ceil_div(own.row_count, at_least(1, row_tasks)) + (row_tasks == 1 ? kCopied : 0);
        const int64_t cost = rows * at_most(base.columns, kExpandColumns) * (own.ranks + 8);
        add_items(tasks, i, row_tasks * ceil_div(base.columns, kExpandColumns), 1, cost);
        most = at_least(most, own.scratch());
    }
    const auto run = pairs ? pairs->expand : kernels.expand;
    // An element's value does not depend on the partition: only the order over r matters, and no sum is cut.
    run_items(tasks, pool, [&](const Item* begin, const Item* end) {
        const Scratch<float> scratch(most);
        for (const Item* item = begin; item != end; ++item) {
            const Expansion& own = expansions[item->job];
            const int64_t row_tasks = ceil_div(own.row_count, kExpandRows);
            const int64_t row = item->begin % row_tasks * kExpandRows;
            const int64_t column = item->begin / row_tasks * kExpandColumns;
            run(own, row, at_most(own.row_count, row + kExpandRows), column,
                at_most(base.columns, column + kExpandColumns), scratch.get());
        }
    });
}

void lora_gain_grads(const Matrix& dy, const Matrix& z, const Matrix& factor, const Matrix& out, const Matrix& sums,
                     ParallelFor pool) {
    const LoraKernels& kernels = kernels_in_use();
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
    if (sums.data) kernels.combine(totals.get(), parts, columns, columns, 1.0f, sums, nullptr, 0, 1);
}

void lora_dropout_add(const Matrix& base, const Matrix& x, const Dropout& dropout, const Corner& at, double scale,
                      const Matrix& out, ParallelFor pool) {
    const LoraKernels& kernels = kernels_in_use();
    const double products = 2.0 * static_cast<double>(x.rows) * static_cast<double>(x.columns);
    parallel_for(pool, x.rows, grain_for(x.rows, products), [&](int64_t begin, int64_t end) {
        kernels.dropout_add(base, x, dropout, at, static_cast<float>(scale), out, begin, end);
    });
}

}  // namespace peftfast::cpu
