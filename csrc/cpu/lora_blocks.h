// Register-blocked products on tiles. Included by lora_kernels.h inside an instruction set's namespace. An Operand says
// what an element is: a float32, or a pair of bfloat16 (lora_pairs.h), of which both products are added.
// Each block keeps its accumulators in registers; the remainders of rows and ranks run through smaller blocks of the
// same template, so an element's sum is formed in the same order wherever it lies in a tile. A tile is summed from zero
// and then added to what came before: one running sum over all terms would round against a total that has grown, with
// an error that grows like the number of terms instead of like its root.

struct Floats {
    typedef float Element;
    typedef Vec Vector;
    static constexpr int kTerms = 1;  // of a sum, to an element
    static inline Vector load(const float* p) { return vec_load(p); }
    static inline Vector set(float value) { return vec_set(value); }
    static inline Vec add_product(Vector a, Vector b, Vec c) { return vec_fma(a, b, c); }
};

// Lines of the tile to come, asked for between the products of this one: rows of a weight matrix lie pages apart, where
// no prefetcher of the processor's follows. Into L2, since the rows of a power of two of bytes share a few sets of L1.
struct Ahead {
    const char* at;       // of a tile's first column in row 0
    const int64_t* rows;  // the rows' numbers, or null: from `first` on
    int64_t first, row, end, stride, bytes;

    inline void ask(int64_t count) {
        for (; count > 0 && row < end; --count, ++row, ++first) {
            const char* line = at + (rows ? rows[row] : first) * stride;
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte, 0, 2);
        }
    }
};

// The first tile of a sum is where it begins; total need not have been written.
static inline void vec_add_to(float* total, Vec sum, bool begins) {
    vec_store(total, begins ? sum : vec_add(vec_load(total), sum));
}

// lanes[m][r] += x[m] * panel[r], lane by lane over the vectors of a tile: kRows * kRanks products for kRows + kRanks
// loads. An element's terms are columns.
template <class Operand, int kRows, int kRanks>
static void dot_block(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* panel,
                      int64_t ranks, int64_t vectors, float* lanes, bool begins) {
    Vec sum[kRows][kRanks];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) sum[m][r] = vec_zero();
    }
    for (int64_t v = 0; v < vectors; ++v) {
        typename Operand::Vector left[kRows];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) left[m] = Operand::load(x + m * ld + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) {
            const typename Operand::Vector right = Operand::load(panel + (v * ranks + r) * kWidth);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) sum[m][r] = Operand::add_product(left[m], right, sum[m][r]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) {
            vec_add_to(lanes + (m * ranks + r) * kWidth, sum[m][r], begins);
        }
    }
}

template <class Operand, int kRows>
static void dot_ranks(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* panel,
                      int64_t ranks, int64_t first, int64_t last, int64_t vectors, float* lanes, bool begins) {
    int64_t r = first;
    for (; r + kDotRanks <= last; r += kDotRanks) {
        dot_block<Operand, kRows, kDotRanks>(x, ld, panel + r * kWidth, ranks, vectors, lanes + r * kWidth, begins);
    }
    for (; r + 4 <= last; r += 4) {
        dot_block<Operand, kRows, 4>(x, ld, panel + r * kWidth, ranks, vectors, lanes + r * kWidth, begins);
    }
    for (; r < last; ++r) {
        dot_block<Operand, kRows, 1>(x, ld, panel + r * kWidth, ranks, vectors, lanes + r * kWidth, begins);
    }
}

// All of kDotPanel ranks of a few rows before the next rows: both stay in L1.
constexpr int64_t kDotPanel = 32;

template <class Operand>
static void dot_tile(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* panel,
                     int64_t rows, int64_t ranks, int64_t vectors, float* lanes, bool begins, Ahead& ahead) {
    for (int64_t first = 0; first < ranks; first += kDotPanel) {
        const int64_t last = at_most(ranks, first + kDotPanel);
        int64_t m = 0;
        for (; m + kDotRows <= rows; m += kDotRows) {
            ahead.ask(kDotRows);
            dot_ranks<Operand, kDotRows>(x + m * ld, ld, panel, ranks, first, last, vectors, lanes + m * ranks * kWidth,
                                         begins);
        }
        for (; m < rows; ++m) {
            dot_ranks<Operand, 1>(x + m * ld, ld, panel, ranks, first, last, vectors, lanes + m * ranks * kWidth,
                                  begins);
        }
    }
    ahead.ask(kTileRows);
}

// sums[r][vector] += left[m][r] * x[m][vector] over the rows of a tile, in order. An element's terms are rows, and
// `rows` counts elements.
template <class Operand, int kRanks, int kVecs>
static void outer_block(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* left,
                        int64_t rows, int64_t ranks, float* sums, int64_t ld_sums, bool begins) {
    Vec sum[kRanks][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[r][v] = vec_zero();
    }
    for (int64_t m = 0; m < rows; ++m) {
        typename Operand::Vector right[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) right[v] = Operand::load(x + m * ld + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) {
            const typename Operand::Vector factor = Operand::set(left[m * ranks + r]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[r][v] = Operand::add_product(factor, right[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            vec_add_to(sums + r * ld_sums + v * kWidth, sum[r][v], begins);
        }
    }
}

template <class Operand, int kRanks>
static void outer_vectors(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* left,
                          int64_t rows, int64_t ranks, int64_t vectors, float* sums, int64_t ld_sums, bool begins,
                          Ahead& ahead) {
    int64_t v = 0;
    for (; v + kOuterVecs <= vectors; v += kOuterVecs) {
        ahead.ask(kDotRows);
        outer_block<Operand, kRanks, kOuterVecs>(x + v * kWidth, ld, left, rows, ranks, sums + v * kWidth, ld_sums,
                                                 begins);
    }
    for (; v < vectors; ++v) {
        outer_block<Operand, kRanks, 1>(x + v * kWidth, ld, left, rows, ranks, sums + v * kWidth, ld_sums, begins);
    }
}

template <class Operand>
static void outer_tile(const typename Operand::Element* x, int64_t ld, const typename Operand::Element* left,
                       int64_t rows, int64_t ranks, int64_t vectors, float* sums, int64_t ld_sums, bool begins,
                       Ahead& ahead) {
    int64_t r = 0;
    for (; r + kOuterRanks <= ranks; r += kOuterRanks) {
        outer_vectors<Operand, kOuterRanks>(x, ld, left + r, rows, ranks, vectors, sums + r * ld_sums, ld_sums, begins,
                                            ahead);
    }
    for (; r + 4 <= ranks; r += 4) {
        outer_vectors<Operand, 4>(x, ld, left + r, rows, ranks, vectors, sums + r * ld_sums, ld_sums, begins, ahead);
    }
    for (; r < ranks; ++r)
        outer_vectors<Operand, 1>(x, ld, left + r, rows, ranks, vectors, sums + r * ld_sums, ld_sums, begins, ahead);
    ahead.ask(kTileRows);
}

constexpr int64_t kExpandRanks = 32;  // of a partial sum

// sum[m][column] = start[column] + sum over the ranks of left[m][r] * panel[r][column], for one block of columns, with
// start the bias or nothing. `ranks` counts elements.
template <class Operand, int kRows>
static inline __attribute__((always_inline)) void expand_sums(const typename Operand::Element* left, int64_t ld_left,
                                                              const typename Operand::Element* panel, const float* bias,
                                                              int64_t ranks, Vec (&sum)[kRows][kExpandVecs]) {
    constexpr int kBlock = kExpandVecs * kWidth;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kExpandVecs; ++v) sum[m][v] = bias ? vec_load(bias + v * kWidth) : vec_zero();
    }
    for (int64_t r = 0; r < ranks; ++r) {
        typename Operand::Vector right[kExpandVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kExpandVecs; ++v) right[v] = Operand::load(panel + r * kBlock + v * kWidth);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const typename Operand::Vector factor = Operand::set(left[m * ld_left + r]);
#pragma GCC unroll 8
            for (int v = 0; v < kExpandVecs; ++v) sum[m][v] = Operand::add_product(factor, right[v], sum[m][v]);
        }
    }
}

// delta = those sums, or with `add` those sums added to it.
template <class Operand, int kRows>
static void expand_rows(const typename Operand::Element* left, int64_t ld_left, const typename Operand::Element* panel,
                        const float* bias, int64_t ranks, bool add, float* delta) {
    constexpr int kBlock = kExpandVecs * kWidth;
    Vec sum[kRows][kExpandVecs];
    expand_sums<Operand, kRows>(left, ld_left, panel, bias, ranks, sum);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kExpandVecs; ++v) {
            float* out = delta + m * kBlock + v * kWidth;
            vec_store(out, add ? vec_add(vec_load(out), sum[m][v]) : sum[m][v]);
        }
    }
}

template <class Operand>
static void expand_block(const typename Operand::Element* left, const typename Operand::Element* panel,
                         const float* bias, int64_t rows, int64_t ranks, float* delta) {
    constexpr int kBlock = kExpandVecs * kWidth, kPart = kExpandRanks / Operand::kTerms;
    int64_t first = 0;
    do {  // once at least: with no rank at all there is still a bias
        const int64_t count = at_most(kPart, ranks - first);
        const float* start = first == 0 ? bias : nullptr;
        const typename Operand::Element* part = panel + first * kBlock;
        int64_t m = 0;
        for (; m + kExpandBlockRows <= rows; m += kExpandBlockRows) {
            expand_rows<Operand, kExpandBlockRows>(left + m * ranks + first, ranks, part, start, count, first > 0,
                                                   delta + m * kBlock);
        }
        for (; m + 2 <= rows; m += 2) {
            expand_rows<Operand, 2>(left + m * ranks + first, ranks, part, start, count, first > 0, delta + m * kBlock);
        }
        for (; m < rows; ++m) {
            expand_rows<Operand, 1>(left + m * ranks + first, ranks, part, start, count, first > 0, delta + m * kBlock);
        }
        first += kPart;
    } while (first < ranks);
}
