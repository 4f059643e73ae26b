// Kernels of cpu/lora.cpp, compiled once for each instruction set.

#include "cpu/philox_vector.h"
#include "cpu/lora_blocks.h"

static inline float element(const void* data, DType dtype, int64_t offset) {
    switch (dtype) {
        case DType::f32:
            return ((const float*)data)[offset];
        case DType::bf16:
            return float_from_bf16(((const uint16_t*)data)[offset]);
        default:
            return float_from_f16(((const uint16_t*)data)[offset]);
    }
}

static inline void set_element(void* data, DType dtype, int64_t offset, float value) {
    switch (dtype) {
        case DType::f32:
            ((float*)data)[offset] = value;
            return;
        case DType::bf16:
            ((uint16_t*)data)[offset] = bf16_from_float(value);
            return;
        default:
            ((uint16_t*)data)[offset] = f16_from_float(value);
    }
}

// `count` elements from `offset` on, `stride` apart, to float32. Only whole vectors are read as such.
static void widen(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count, float* dst) {
    int64_t i = 0;
    if (stride == 1) {
        const int64_t whole = count / kWidth * kWidth;
        if (dtype == DType::f32) {
            const float* src = (const float*)data + offset;
            for (; i < whole; i += kWidth) vec_store(dst + i, vec_load(src + i));
        } else if (dtype == DType::bf16) {
            const uint16_t* src = (const uint16_t*)data + offset;
            for (; i < whole; i += kWidth) vec_store(dst + i, vec_load_bf16(src + i));
        } else {
            const uint16_t* src = (const uint16_t*)data + offset;
            for (; i < whole; i += kWidth) vec_store(dst + i, vec_load_f16(src + i));
        }
    }
    for (; i < count; ++i) dst[i] = element(data, dtype, offset + i * stride);
}

static void narrow(const float* src, int64_t count, void* data, DType dtype, int64_t offset, int64_t stride) {
    int64_t i = 0;
    if (stride == 1) {
        const int64_t whole = count / kWidth * kWidth;
        if (dtype == DType::f32) {
            float* dst = (float*)data + offset;
            for (; i < whole; i += kWidth) vec_store(dst + i, vec_load(src + i));
        } else if (dtype == DType::bf16) {
            uint16_t* dst = (uint16_t*)data + offset;
            for (; i < whole; i += kWidth) vec_store_bf16(dst + i, vec_load(src + i));
        } else {
            uint16_t* dst = (uint16_t*)data + offset;
            for (; i < whole; i += kWidth) vec_store_f16(dst + i, vec_load(src + i));
        }
    }
    for (; i < count; ++i) set_element(data, dtype, offset + i * stride, src[i]);
}

static void pack(const Matrix& view, int64_t width, float* dst, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        float* out = dst + block * view.rows * width;
        const int64_t first = block * width;
        const int64_t count = at_most(width, view.columns - first);
        if (count < width) __builtin_memset(out, 0, view.rows * width * sizeof(float));
        if (view.stride_row == 1 && view.stride_column != 1 && view.dtype == DType::f32) {
            for (int64_t i = 0; i < count; ++i) {
                const float* src = (const float*)view.data + (first + i) * view.stride_column;
                for (int64_t r = 0; r < view.rows; ++r) out[r * width + i] = src[r];
            }
            continue;
        }
        for (int64_t r = 0; r < view.rows; ++r) {
            widen(view.data, view.dtype, r * view.stride_row + first * view.stride_column, view.stride_column, count,
                  out + r * width);
        }
    }
}

// A tile of x as float32, masked, in rows of kTileColumns with zeros up to a whole vector. Returns where it is: x
// itself where nothing has to be done to it.
static const float* stage(const Sweep& s, int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile,
                          int64_t* ld) {
    const Matrix& x = s.x;
    const bool mask = s.dropout.active();
    if (!mask && x.dtype == DType::f32 && x.stride_column == 1 && columns % kWidth == 0) {
        *ld = x.stride_row;
        return (const float*)x.data + row * x.stride_row + column;
    }
    *ld = kTileColumns;
    const int64_t counters = ceil_div(x.columns, philox::kDrawsPerCounter);
    const int64_t padded = ceil_div(columns, kWidth) * kWidth;
    uint8_t bits[kTileColumns / 8 + 8];
    for (int64_t i = 0; i < rows; ++i) {
        float* dst = tile + i * kTileColumns;
        widen(x.data, x.dtype, (row + i) * x.stride_row + column * x.stride_column, x.stride_column, columns, dst);
        for (int64_t j = columns; j < padded; ++j) dst[j] = 0.0f;
        if (!mask) continue;
        keep_bytes(bits, s.dropout.seed, (uint64_t)((row + i) * counters + column / 8), ceil_div(columns, 8),
                   (uint32_t)s.dropout.threshold);
        for (int64_t j = 0; j < padded; j += kWidth) vec_store(dst + j, vec_keep(vec_load(dst + j), bits, j));
    }
    return tile;
}

static int64_t sweep_scratch(int64_t ranks) { return kTileRows * (kTileColumns + ranks * kWidth); }

static void sweep(const Sweep& s, int64_t task, float* scratch) {
    const int64_t row_part = task / s.column_parts, column_part = task % s.column_parts;
    const int64_t row_begin = row_part * s.rows_per_part();
    const int64_t row_end = at_most(s.x.rows, row_begin + s.rows_per_part());
    const int64_t column_begin = column_part * s.columns_per_part();
    const int64_t column_end = at_most(s.x.columns, column_begin + s.columns_per_part());
    const int64_t ranks = s.ranks, ld_sums = s.padded_columns();
    float* tile = scratch;
    float* row_lanes = scratch + kTileRows * kTileColumns;  // [kTileRows][R][kWidth], summed over lanes at the end
    float* column_sums = s.left ? s.column_sums + row_part * ranks * ld_sums : nullptr;
    if (s.left) {
        for (int64_t r = 0; r < ranks && column_begin < column_end; ++r) {
            const int64_t padded = ceil_div(column_end - column_begin, kTileColumns) * kTileColumns;
            __builtin_memset(column_sums + r * ld_sums + column_begin, 0, padded * sizeof(float));
        }
    }
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
        const int64_t rows = at_most(kTileRows, row_end - row);
        if (s.panel) __builtin_memset(row_lanes, 0, rows * ranks * kWidth * sizeof(float));
        for (int64_t column = column_begin; column < column_end; column += kTileColumns) {
            const int64_t columns = at_most(kTileColumns, column_end - column);
            const int64_t vectors = ceil_div(columns, kWidth);
            int64_t ld;
            const float* x = stage(s, row, rows, column, columns, tile, &ld);
            if (s.panel) dot_tile(x, ld, s.panel + column * ranks, rows, ranks, vectors, row_lanes);
            if (s.left) outer_tile(x, ld, s.left + row * ranks, rows, ranks, vectors, column_sums + column, ld_sums);
        }
        if (!s.panel) continue;
        float* out = s.row_sums + (column_part * s.x.rows + row) * ranks;
        for (int64_t i = 0; i < rows * ranks; ++i) out[i] = vec_sum(vec_load(row_lanes + i * kWidth));
    }
}

static void combine(const float* sums, int64_t parts, int64_t part_size, int64_t ld, float scale, const Matrix& out,
                    int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 256;
    float total[kChunk];
    const Vec factor = vec_set(scale);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < out.columns; column += kChunk) {
            const int64_t count = at_most(kChunk, out.columns - column);
            const float* src = sums + row * ld + column;
            const int64_t whole = count / kWidth * kWidth;
            for (int64_t i = 0; i < whole; i += kWidth) {
                Vec sum = vec_load(src + i);
                for (int64_t part = 1; part < parts; ++part) sum = vec_add(sum, vec_load(src + part * part_size + i));
                vec_store(total + i, vec_mul(sum, factor));
            }
            for (int64_t i = whole; i < count; ++i) {
                float sum = src[i];
                for (int64_t part = 1; part < parts; ++part) sum += src[part * part_size + i];
                total[i] = sum * scale;
            }
            narrow(total, count, out.data, out.dtype, row * out.stride_row + column * out.stride_column,
                   out.stride_column);
        }
    }
}

// out = base + keep(scale * delta) for `count` columns of one row; delta is a whole register block wide.
static void finish_row(const Expansion& e, const float* delta, const uint8_t* bits, int64_t bit_column, int64_t row,
                       int64_t column, int64_t count) {
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    const int64_t base_at = row * e.base.stride_row + column * e.base.stride_column;
    const int64_t out_at = row * e.out.stride_row + column * e.out.stride_column;
    const Vec scale = vec_set(e.scale);
    float sum[kBlock];
    for (int64_t i = count; i < kBlock; ++i) sum[i] = 0.0f;
    widen(e.base.data, e.base.dtype, base_at, e.base.stride_column, count, sum);
    for (int64_t i = 0; i < kBlock; i += kWidth) {
        Vec term = vec_mul(vec_load(delta + i), scale);
        if (bits) term = vec_keep(term, bits, bit_column + i);
        vec_store(sum + i, vec_add(vec_load(sum + i), term));
    }
    narrow(sum, count, e.out.data, e.out.dtype, out_at, e.out.stride_column);
}

static void expand(const Expansion& e, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    constexpr int64_t kBlock = kExpandVecs * kWidth;
    constexpr int64_t kBits = kExpandColumns / 8 + 16;
    static_assert(kExpandColumns % kBlock == 0, "the mask buffer holds whole blocks");
    uint8_t bits[kExpandBlockRows][kBits];
    float delta[kExpandBlockRows * kBlock];
    const int64_t counters = ceil_div(e.base.columns, philox::kDrawsPerCounter);
    const bool mask = e.dropout.active();
    for (int64_t row = row_begin; row < row_end; row += kExpandBlockRows) {
        const int64_t rows = at_most(kExpandBlockRows, row_end - row);
        for (int64_t i = 0; i < rows && mask; ++i) {
            keep_bytes(bits[i], e.dropout.seed, (uint64_t)((row + i) * counters + column_begin / 8),
                       ceil_div(column_end - column_begin, 8), (uint32_t)e.dropout.threshold);
        }
        for (int64_t column = column_begin; column < column_end; column += kBlock) {
            const float* bias = e.bias ? e.bias + column : nullptr;
            expand_block(e.left + row * e.ranks, e.panel + column * e.ranks, bias, rows, e.ranks, delta);
            const int64_t count = at_most(kBlock, column_end - column);
            for (int64_t i = 0; i < rows; ++i) {
                finish_row(e, delta + i * kBlock, mask ? bits[i] : nullptr, column - column_begin, row + i, column,
                           count);
            }
        }
    }
}

static const LoraKernels lora_table = {kWidth, kExpandVecs * kWidth, pack, sweep_scratch, sweep, combine, expand};
