// Rows of x, A and B in float32, and S: what both kinds of few-row products share. Included inside an instruction set's
// namespace.

#include "cpu/nf4_lookup.h"

static inline float element_of(const FloatMatrix& matrix, int64_t offset) {
    if (matrix.dtype == DType::f32) return ((const float*)matrix.data)[offset];
    const uint16_t half = ((const uint16_t*)matrix.data)[offset];
    return matrix.dtype == DType::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

// A row in float32.
static void widen_row(const FloatMatrix& matrix, int64_t row, int64_t count, float* out) {
    const int64_t offset = row * matrix.row_stride;
    int64_t i = 0;
    if (matrix.column_stride == 1) {
        const int64_t whole = count / kWidth * kWidth;
        if (matrix.dtype == DType::f32) {
            for (; i < whole; i += kWidth) vec_store(out + i, vec_load((const float*)matrix.data + offset + i));
        } else if (matrix.dtype == DType::bf16) {
            for (; i < whole; i += kWidth) vec_store(out + i, vec_load_bf16((const uint16_t*)matrix.data + offset + i));
        } else {
            for (; i < whole; i += kWidth) vec_store(out + i, vec_load_f16((const uint16_t*)matrix.data + offset + i));
        }
    }
    for (; i < count; ++i) out[i] = element_of(matrix, offset + i * matrix.column_stride);
}

static void widen_x(const Nf4Linear& p, int64_t m, float* exact) { widen_row(p.x, m, p.K, exact); }

static inline float rounded(float value, DType dtype) {
    if (dtype == DType::bf16) return float_from_bf16(bf16_from_float(value));
    if (dtype == DType::f16) return float_from_f16(f16_from_float(value));
    return value;
}

// Columns whose products one float32 vector adds up; the vectors of further columns are added by their sums.
constexpr int64_t kPart = 8192;

static float dot(const float* a, const float* b, int64_t count) {
    float sum = 0.0f;
    for (int64_t part = 0; part < count; part += kPart) {
        const int64_t end = part + kPart < count ? part + kPart : count;
        Vec first = vec_zero(), second = vec_zero();
        int64_t i = part;
        for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
            first = vec_fma(vec_load(a + i), vec_load(b + i), first);
            second = vec_fma(vec_load(a + i + kWidth), vec_load(b + i + kWidth), second);
        }
        float tail = 0.0f;
        for (; i < end; ++i) tail += a[i] * b[i];
        sum += vec_sum(vec_add(first, second)) + tail;
    }
    return sum;
}

// A row in float32: where it lies, or widened into `scratch`.
static inline const float* float_row(const FloatMatrix& matrix, int64_t row, int64_t count, float* scratch) {
    if (matrix.dtype == DType::f32 && matrix.column_stride == 1) {
        return (const float*)matrix.data + row * matrix.row_stride;
    }
    widen_row(matrix, row, count, scratch);
    return scratch;
}

// Column r of S from row r of A, which may need `scratch`. `s` keeps what was stored, in float32.
static void shrink(const Nf4Linear& p, const float* exact, int64_t stride, int64_t r, float* scratch, float* s,
                   int64_t stride_s) {
    const float* row = float_row(p.lora_a, r, p.K, scratch);
    for (int64_t m = 0; m < p.M; ++m) {
        const float value = rounded(dot(exact + m * stride, row, p.K), p.compute);
        s[m * stride_s + r] = value;
        if (p.compute == DType::f32) {
            ((float*)p.s)[m * p.R + r] = value;
        } else {
            ((uint16_t*)p.s)[m * p.R + r] = p.compute == DType::bf16 ? bf16_from_float(value) : f16_from_float(value);
        }
    }
}

// Float32 maxima of the blocks of a tile, from block `begin` on.
struct Maxima {
    const float* values;
    int64_t begin;
};

// Those of weight rows begin .. end: where they lie, or computed into `scratch`.
static Maxima tile_maxima(const Nf4Linear& p, int64_t begin, int64_t end, float* scratch) {
    if (p.weight.maxima.bytes == nullptr) return {p.weight.maxima.absmax, 0};
    const int64_t size = p.weight.block_size, first = begin * p.K / size;
    fill_maxima(p.weight.maxima, first, (end * p.K - 1) / size + 1, scratch);
    return {scratch, first};
}
