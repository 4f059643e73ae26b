// Kernels of cpu/zeroth_order_linear.cpp, compiled once for each instruction set. A tile of a few weight rows is
// decoded, moved both ways and multiplied with both inputs before the next is read: the moved rows stay in the second
// cache.

#include "cpu/zeroth_order_vector.h"
#include "cpu/nf4_lookup.h"

static void draw(const ZoMove& w, int64_t block, ZoDirection* direction) {
    if (direction->block == block || w.eps == 0.0f) return;
    direction->block = block;
    if (w.rademacher) {
        fill_signs(direction->z, (uint64_t)w.seed, block, w.tensor_id);
    } else {
        fill_normals<false>(direction->z, (uint64_t)w.seed, block, w.tensor_id, 0.0f);
    }
}

// plus = before + eps z, minus = before - eps z; plus may be before. An eps of 0 leaves even the sign of a zero.
static void move(const ZoMove& w, const float* before, const float* z, int64_t count, float* plus, float* minus) {
    const float eps = w.eps;
    if (eps == 0.0f) {
        for (int64_t i = 0; i < count; ++i) plus[i] = minus[i] = before[i];
    } else if (w.threshold == nullptr) {
        for (int64_t i = 0; i < count; ++i) {
            const float value = before[i], term = eps * z[i];
            plus[i] = value + term;
            minus[i] = value - term;
        }
    } else {
        const float threshold = *w.threshold;
        for (int64_t i = 0; i < count; ++i) {
            const float value = before[i], term = eps * z[i];
            const bool moves = __builtin_fabsf(value) <= threshold;
            plus[i] = moves ? value + term : value;
            minus[i] = moves ? value - term : value;
        }
    }
}

// Not inlined: GCC warns of a tail loop that a constant count makes impossible.
__attribute__((noinline)) static void round_floats(float* value, DType dtype, int64_t count) {
    if (dtype == DType::f32) return;
    alignas(64) uint16_t half[kZoBlock];
    store_floats(half, value, nullptr, dtype, 0, count);
    load_floats(value, half, dtype, 0, count);
}

// The sixteen values that a block with this maximum can have, as the dequantiser rounds them.
static void values_of(const Nf4Weight& weight, float maximum, DType dtype, float* table) {
    scale_table(weight.code, maximum, table);
    round_floats(table, dtype, 16);
}

static void decode_range(const ZoMove& w, int64_t begin, int64_t end, float* out) {
    alignas(64) float table[16];
    for (int64_t i = begin; i < end;) {
        const int64_t block = i / w.packed.block_size, next = (block + 1) * w.packed.block_size;
        const int64_t stop = next < end ? next : end;
        values_of(w.packed, block_maximum(w.packed.maxima, block), w.dtype, table);
        lookup_range(w.packed.packed, table, i, stop, out + (i - begin));
        i = stop;
    }
}

static void decode_moved_scales(const ZoMove& w, int64_t begin, int64_t end, float* plus, float* minus,
                                ZoDirection* direction) {
    alignas(64) float up[16], down[16];
    for (int64_t i = begin; i < end;) {
        const int64_t block = i / w.packed.block_size, next = (block + 1) * w.packed.block_size;
        const int64_t stop = next < end ? next : end;
        float more, less;
        draw(w, block / kZoBlock, direction);
        move(w, w.packed.maxima.absmax + block, direction->z + block % kZoBlock, 1, &more, &less);
        values_of(w.packed, more, w.dtype, up);
        values_of(w.packed, less, w.dtype, down);
        lookup_range(w.packed.packed, up, i, stop, plus + (i - begin));
        lookup_range(w.packed.packed, down, i, stop, minus + (i - begin));
        i = stop;
    }
}

// Elements begin .. end, which lie in one block of z, as floats that dtype holds.
static void moved_floats(const ZoMove& w, int64_t begin, int64_t end, float* plus, float* minus,
                         ZoDirection* direction) {
    const int64_t count = end - begin;
    if (w.of_scales) {
        decode_moved_scales(w, begin, end, plus, minus, direction);
        return;
    }
    draw(w, begin / kZoBlock, direction);
    if (w.dense != nullptr) {
        load_floats(plus, w.dense, w.dtype, begin, count);
    } else {
        decode_range(w, begin, end, plus);
    }
    move(w, plus, direction->z + begin % kZoBlock, count, plus, minus);
    round_floats(plus, w.dtype, count);
    round_floats(minus, w.dtype, count);
}

static int64_t end_of_block(int64_t element, int64_t end) {
    const int64_t next = (element / kZoBlock + 1) * kZoBlock;
    return next < end ? next : end;
}

// Elements begin .. end of both moved weights to elements at .. of `plus` and `minus`.
static void moved_pair(const ZoMove& w, int64_t begin, int64_t end, int64_t at, void* plus, void* minus,
                       ZoDirection* direction) {
    alignas(64) float up[kZoBlock], down[kZoBlock];
    for (int64_t i = begin; i < end;) {
        const int64_t stop = end_of_block(i, end);
        moved_floats(w, i, stop, up, down, direction);
        store_floats(plus, up, nullptr, w.dtype, at + (i - begin), stop - i);
        store_floats(minus, down, nullptr, w.dtype, at + (i - begin), stop - i);
        i = stop;
    }
}

static void widen_floats(const void* x, DType dtype, int64_t begin, int64_t count, float* out) {
    load_floats(out, x, dtype, begin, count);
}

constexpr int kInputs = kWidth >= 16 ? 4 : 2;  // rows of x at once; with four weight rows the sums stay in registers
// Columns whose products one float32 vector adds up: as many terms a lane, and so as small an error, at every width.
constexpr int64_t kColumns = 128 * kWidth;

// sums[m * kN + n] += the products of columns begin .. end of kM rows of x with kN weight rows, all K apart.
template <int kM, int kN>
static void add_dots(const float* x, const float* w, int64_t K, int64_t begin, int64_t end, float* sums) {
    Vec parts[kM * kN];
    float tails[kM * kN];
    for (int i = 0; i < kM * kN; ++i) parts[i] = vec_zero(), tails[i] = 0.0f;
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
        Vec row[kN];
        for (int n = 0; n < kN; ++n) row[n] = vec_load(w + n * K + k);
        for (int m = 0; m < kM; ++m) {
            const Vec input = vec_load(x + m * K + k);
            for (int n = 0; n < kN; ++n) parts[m * kN + n] = vec_fma(input, row[n], parts[m * kN + n]);
        }
    }
    for (; k < end; ++k) {
        for (int i = 0; i < kM * kN; ++i) tails[i] += x[i / kN * K + k] * w[i % kN * K + k];
    }
    for (int i = 0; i < kM * kN; ++i) sums[i] += vec_sum(parts[i]) + tails[i];
}

typedef void (*AddDots)(const float* x, const float* w, int64_t K, int64_t begin, int64_t end, float* sums);
static const AddDots kFourRows[4] = {add_dots<1, 4>, add_dots<2, 4>, add_dots<3, 4>, add_dots<4, 4>};
static const AddDots kOneRow[4] = {add_dots<1, 1>, add_dots<2, 1>, add_dots<3, 1>, add_dots<4, 1>};

// products[n * M + m] of `rows` weight rows with all of x.
static void multiply_rows(const float* x, const float* w, int64_t M, int64_t K, int64_t rows, float* products) {
    float sums[16];
    for (int64_t i = 0; i < rows * M; ++i) products[i] = 0.0f;
    for (int64_t begin = 0; begin < K; begin += kColumns) {
        const int64_t end = begin + kColumns < K ? begin + kColumns : K;
        for (int64_t n = 0; n < rows;) {
            const int taken = rows - n >= 4 ? 4 : 1;
            for (int64_t m = 0; m < M; m += kInputs) {
                const int many = (int)(M - m < kInputs ? M - m : kInputs);
                for (int i = 0; i < many * taken; ++i) sums[i] = 0.0f;
                (taken == 4 ? kFourRows : kOneRow)[many - 1](x + m * K, w + n * K, K, begin, end, sums);
                for (int i = 0; i < many * taken; ++i) products[(n + i % taken) * M + m + i / taken] += sums[i];
            }
            n += taken;
        }
    }
}

static float element_at(const void* data, DType dtype, int64_t at) {
    if (dtype == DType::f32) return ((const float*)data)[at];
    const uint16_t half = ((const uint16_t*)data)[at];
    return dtype == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

static void zo_tile(const ZoLinear& p, const float* const* x, int64_t begin, int64_t end, float* moved, float* products,
                    ZoDirection* direction) {
    const int64_t rows = end - begin, count = rows * p.K;
    const DType dtype = p.weight.dtype;
    for (int64_t i = 0; i < count;) {
        const int64_t stop = end_of_block(begin * p.K + i, end * p.K) - begin * p.K;
        moved_floats(p.weight, begin * p.K + i, begin * p.K + stop, moved + i, moved + count + i, direction);
        i = stop;
    }
    for (int side = 0; side < 2; ++side) {
        multiply_rows(x[side], moved + side * count, p.M, p.K, rows, products);
        for (int64_t m = 0; m < p.M; ++m) {
            for (int64_t n = 0; n < rows; ++n) {
                float value = products[n * p.M + m];
                if (p.bias[side] != nullptr) value += element_at(p.bias[side], dtype, begin + n);
                store_floats(p.y[side], &value, nullptr, dtype, m * p.N + begin + n, 1);
            }
        }
    }
}

static const ZoLinearKernels zo_linear_table = {widen_floats, zo_tile, moved_pair};
