// Between matrices as they come and what the products of a tile read and leave, in float32. Included by lora_kernels.h.

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

// A whole square of pack_across() and of combine_columns(), in registers.
template <DType kType>
static void pack_square(const Matrix& view, int64_t at, int64_t width, float* out) {
    Vec square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = load_as<kType>(view.data, at + i * view.stride_column);
    vec_transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) vec_store(out + i * width, square[i]);
}

template <DType kType>
static void combine_square(const float* sums, int64_t parts, int64_t part_size, int64_t ld, Vec factor,
                           const Matrix& out, int64_t at) {
    Vec square[kWidth];
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) square[r] = vec_load(sums + r * ld);
    for (int64_t part = 1; part < parts; ++part) {
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) square[r] = vec_add(square[r], vec_load(sums + part * part_size + r * ld));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) square[r] = vec_mul(square[r], factor);
    vec_transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store_as<kType>(out.data, at + i * out.stride_column, square[i]);
}

#define PEFTFAST_BY_DTYPE(dtype, function, ...) \
    switch (dtype) {                            \
        case DType::f32:                        \
            function<DType::f32>(__VA_ARGS__);  \
            break;                              \
        case DType::bf16:                       \
            function<DType::bf16>(__VA_ARGS__); \
            break;                              \
        case DType::f16:                        \
            function<DType::f16>(__VA_ARGS__);  \
    }

// pack() of `count` columns from `first` on where the ranks of a column lie side by side: squares of vectors,
// transposed.
static void pack_across(const Matrix& view, int64_t first, int64_t count, int64_t width, float* out) {
    float lanes[kWidth * (kWidth + 1)];
    const bool run = view.rows <= kWidth && view.stride_column == view.rows;  // the columns are one run of memory
    for (int64_t column = 0; column < count; column += kWidth) {
        const int64_t columns = at_most(kWidth, count - column);
        for (int64_t rank = 0; rank < view.rows; rank += kWidth) {
            const int64_t ranks = at_most(kWidth, view.rows - rank), step = run ? ranks : kWidth;
            const int64_t at = (first + column) * view.stride_column + rank;
            if (columns == kWidth && ranks == kWidth) {
                PEFTFAST_BY_DTYPE(view.dtype, pack_square, view, at, width, out + rank * width + column);
                continue;
            }
            if (run) widen(view.data, view.dtype, at, 1, columns * ranks, lanes);
            for (int64_t i = 0; i < columns && !run; ++i) {
                widen(view.data, view.dtype, at + i * view.stride_column, 1, ranks, lanes + i * kWidth);
            }
            Vec square[kWidth];
            for (int64_t i = 0; i < kWidth; ++i) square[i] = i < columns ? vec_load(lanes + i * step) : vec_zero();
            vec_transpose(square);
            for (int64_t r = 0; r < ranks; ++r) vec_store(out + (rank + r) * width + column, square[r]);
        }
    }
}

static void pack(const Matrix& view, int64_t width, float* dst, int64_t begin, int64_t end) {
    const bool across = view.stride_row == 1 && view.stride_column != 1 && width % kWidth == 0;
    for (int64_t block = begin; block < end; ++block) {
        float* out = dst + block * view.rows * width;
        const int64_t first = block * width;
        const int64_t count = at_most(width, view.columns - first);
        if (count < width) __builtin_memset(out, 0, view.rows * width * sizeof(float));
        if (across) {
            pack_across(view, first, count, width, out);
            continue;
        }
        for (int64_t r = 0; r < view.rows; ++r) {
            widen(view.data, view.dtype, r * view.stride_row + first * view.stride_column, view.stride_column, count,
                  out + r * width);
        }
    }
}

static void combine(const float* sums, int64_t parts, int64_t part_size, int64_t ld, float scale, const Matrix& out,
                    const int64_t* rows, int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 256;
    float total[kChunk];
    const Vec factor = vec_set(scale);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t out_row = (rows ? rows[row] : row) * out.stride_row;
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
            narrow(total, count, out.data, out.dtype, out_row + column * out.stride_column, out.stride_column);
        }
    }
}

// Sums of ranks r.. of columns c.. where out's ranks lie side by side: a row of them, or of all, is one store.
static void combine_columns(const float* sums, int64_t parts, int64_t part_size, int64_t ld, float scale,
                            const Matrix& out, int64_t begin, int64_t end) {
    if (out.stride_row != 1 || out.stride_column == 1) {
        const Matrix part = columns_from(out, begin, end);
        combine(sums + begin, parts, part_size, ld, scale, part, nullptr, 0, out.rows);
        return;
    }
    float lanes[kWidth * (kWidth + 1)];
    const Vec factor = vec_set(scale);
    const bool run = out.rows <= kWidth && out.stride_column == out.rows;
    for (int64_t column = begin; column < end; column += kWidth) {
        const int64_t columns = at_most(kWidth, end - column);
        for (int64_t rank = 0; rank < out.rows; rank += kWidth) {
            const int64_t ranks = at_most(kWidth, out.rows - rank), at = column * out.stride_column + rank;
            const float* own = sums + rank * ld + column;
            if (columns == kWidth && ranks == kWidth) {
                PEFTFAST_BY_DTYPE(out.dtype, combine_square, own, parts, part_size, ld, factor, out, at);
                continue;
            }
            Vec square[kWidth];
            for (int64_t r = 0; r < kWidth; ++r) square[r] = vec_zero();
            for (int64_t r = 0; r < ranks; ++r) {
                Vec sum = vec_load(own + r * ld);
                for (int64_t part = 1; part < parts; ++part) {
                    sum = vec_add(sum, vec_load(own + part * part_size + r * ld));
                }
                square[r] = vec_mul(sum, factor);
            }
            vec_transpose(square);
            if (run) {  // each store's last lanes are written again by the next
                for (int64_t i = 0; i < columns; ++i) vec_store(lanes + i * ranks, square[i]);
                narrow(lanes, columns * ranks, out.data, out.dtype, at, 1);
                continue;
            }
            for (int64_t i = 0; i < columns; ++i) {
                vec_store(lanes, square[i]);
                narrow(lanes, ranks, out.data, out.dtype, at + i * out.stride_column, 1);
            }
        }
    }
}
#undef PEFTFAST_BY_DTYPE
