// Kernels of cpu/sparse_delta.cpp, compiled once for each instruction set.

#if PEFTFAST_ISA == 512
static inline Vec vec_sqrt(Vec a) { return _mm512_sqrt_ps(a); }
static inline Vec vec_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec vec_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
#elif PEFTFAST_ISA == 256
static inline Vec vec_sqrt(Vec a) { return _mm256_sqrt_ps(a); }
static inline Vec vec_div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec vec_sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
#else
static inline Vec vec_sqrt(Vec a) {
    return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
static inline Vec vec_div(Vec a, Vec b) { return a / b; }
static inline Vec vec_sub(Vec a, Vec b) { return a - b; }
#endif

static inline int64_t support_at(const Indices& indices, int64_t position) {
    return indices.wide ? ((const int64_t*)indices.data)[position] : ((const int32_t*)indices.data)[position];
}

template <DType kType>
static inline Vec load_as(const void* p, int64_t i) {
    if (kType == DType::bf16) return vec_load_bf16((const uint16_t*)p + i);
    if (kType == DType::f16) return vec_load_f16((const uint16_t*)p + i);
    return vec_load((const float*)p + i);
}
template <DType kType>
static inline float get_as(const void* p, int64_t i) {
    if (kType == DType::bf16) return float_from_bf16(((const uint16_t*)p)[i]);
    if (kType == DType::f16) return float_from_f16(((const uint16_t*)p)[i]);
    return ((const float*)p)[i];
}
template <DType kType>
static inline void set_as(void* p, int64_t i, float value) {
    if (kType == DType::bf16) {
        ((uint16_t*)p)[i] = bf16_from_float(value);
    } else if (kType == DType::f16) {
        ((uint16_t*)p)[i] = f16_from_float(value);
    } else {
        ((float*)p)[i] = value;
    }
}

// Eight rows of eight 16-bit elements to eight columns: pairs of elements, then of pairs, then of quadruples.
typedef uint16_t Eight __attribute__((vector_size(16)));
typedef uint32_t Four __attribute__((vector_size(16)));
typedef uint64_t Two __attribute__((vector_size(16)));

static inline void transpose_block(const uint16_t* const* rows, int64_t column, uint16_t* target, int64_t stride) {
    Eight in[8];
    for (int i = 0; i < 8; ++i) __builtin_memcpy(&in[i], rows[i] + column, sizeof in[i]);
    Four pairs[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = (Four)__builtin_shufflevector(in[2 * i], in[2 * i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
        pairs[2 * i + 1] = (Four)__builtin_shufflevector(in[2 * i], in[2 * i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    Two quads[8];  // [half of the rows][two columns]
    for (int half = 0; half < 2; ++half) {
        for (int part = 0; part < 2; ++part) {
            const Four a = pairs[4 * half + part], b = pairs[4 * half + 2 + part];
            quads[4 * half + 2 * part] = (Two)__builtin_shufflevector(a, b, 0, 4, 1, 5);
            quads[4 * half + 2 * part + 1] = (Two)__builtin_shufflevector(a, b, 2, 6, 3, 7);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const Two even = __builtin_shufflevector(quads[i], quads[4 + i], 0, 2);
        const Two odd = __builtin_shufflevector(quads[i], quads[4 + i], 1, 3);
        __builtin_memcpy(target + (2 * i) * stride, &even, sizeof even);
        __builtin_memcpy(target + (2 * i + 1) * stride, &odd, sizeof odd);
    }
}

static inline void transpose_block(const float* const* rows, int64_t column, float* target, int64_t stride) {
    typedef float Floats __attribute__((vector_size(16)));
    for (int top = 0; top < 8; top += 4) {
        for (int left = 0; left < 8; left += 4) {
            Floats in[4];
            for (int i = 0; i < 4; ++i) __builtin_memcpy(&in[i], rows[top + i] + column + left, sizeof in[i]);
            const Floats a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
            const Floats b = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
            const Floats c = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
            const Floats d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
            const Floats out[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                                   __builtin_shufflevector(b, d, 0, 1, 4, 5),
                                   __builtin_shufflevector(b, d, 2, 3, 6, 7)};
            for (int i = 0; i < 4; ++i) __builtin_memcpy(target + (left + i) * stride + top, &out[i], sizeof out[i]);
        }
    }
}

template <class T>
static void transpose_typed(const Rows& source, int64_t first, int64_t rows, int64_t padded, T* slab, int64_t begin,
                            int64_t end) {
    const T* origin = (const T*)source.data + first * source.stride_row;
    const int64_t whole_rows = rows / 8 * 8, whole_end = begin + (end - begin) / 8 * 8;
    for (int64_t top = 0; top < whole_rows; top += 8) {
        const T* lines[8];
        for (int i = 0; i < 8; ++i) lines[i] = origin + (top + i) * source.stride_row;
        for (int64_t column = begin; column < whole_end; column += 8) {
            transpose_block(lines, column, slab + column * padded + top, padded);
        }
    }
    for (int64_t column = begin; column < end; ++column) {
        T* target = slab + column * padded;
        const int64_t from = column < whole_end ? whole_rows : 0;
        for (int64_t row = from; row < rows; ++row) target[row] = origin[row * source.stride_row + column];
        for (int64_t row = rows; row < padded; ++row) target[row] = 0;
    }
}

static void transpose(const Rows& source, bool wide, int64_t first, int64_t rows, int64_t padded, void* slab,
                      int64_t begin, int64_t end) {
    if (wide) return transpose_typed(source, first, rows, padded, (float*)slab, begin, end);
    transpose_typed(source, first, rows, padded, (uint16_t*)slab, begin, end);
}

// `padded` is a multiple of 32: two vectors of the widest, four sums of the others.
template <DType kType>
static inline float dot(const float* a, const void* b, int64_t padded) {
    Vec sum0 = vec_zero(), sum1 = vec_zero();
    for (int64_t i = 0; i < padded; i += 2 * kWidth) {
        sum0 = vec_fma(vec_load(a + i), load_as<kType>(b, i), sum0);
        sum1 = vec_fma(vec_load(a + i + kWidth), load_as<kType>(b, i + kWidth), sum1);
    }
    return vec_sum(vec_add(sum0, sum1));
}

template <DType kType>
static void dots_typed(const void* dy_slab, const void* x_slab, int64_t padded, int64_t n, int64_t k,
                       const Indices& indices, float* sums, bool add, int64_t begin, int64_t end) {
    constexpr int64_t kSize = element_size(kType);
    constexpr int64_t kAhead = 4;  // x's columns come from anywhere: asked for this many positions before their use
    alignas(64) float row[kSlabRows];
    int64_t row_first = 0, row_index = -1;
    for (int64_t s = begin; s < end; ++s) {
        const int64_t index = support_at(indices, s);
        if (index < 0 || index >= n * k) {
            sums[s] = 0.0f;
            continue;
        }
        if (row_index < 0 || index < row_first || index >= row_first + k) {
            row_index = index / k;
            row_first = row_index * k;
            const char* line = (const char*)dy_slab + row_index * padded * kSize;
            for (int64_t i = 0; i < padded; i += kWidth) vec_store(row + i, load_as<kType>(line, i));
        }
        if (s + kAhead < end) {
            const int64_t next = support_at(indices, s + kAhead) - row_first;
            if (next >= 0 && next < k) {
                const char* line = (const char*)x_slab + next * padded * kSize;
                for (int64_t byte = 0; byte < padded * kSize; byte += 64) __builtin_prefetch(line + byte);
            }
        }
        const float sum = dot<kType>(row, (const char*)x_slab + (index - row_first) * padded * kSize, padded);
        sums[s] = add ? sums[s] + sum : sum;
    }
}

static void dots(const void* dy_slab, const void* x_slab, DType dtype, int64_t padded, int64_t n, int64_t k,
                 const Indices& indices, float* sums, bool add, int64_t begin, int64_t end) {
    switch (dtype) {
        case DType::f32:
            return dots_typed<DType::f32>(dy_slab, x_slab, padded, n, k, indices, sums, add, begin, end);
        case DType::bf16:
            return dots_typed<DType::bf16>(dy_slab, x_slab, padded, n, k, indices, sums, add, begin, end);
        case DType::f16:
            return dots_typed<DType::f16>(dy_slab, x_slab, padded, n, k, indices, sums, add, begin, end);
    }
}

static void narrow(const float* sums, void* out, DType dtype, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        if (dtype == DType::bf16) {
            set_as<DType::bf16>(out, i, sums[i]);
        } else {
            set_as<DType::f16>(out, i, sums[i]);
        }
    }
}

template <DType kType>
static void add_typed(void* weight, int64_t low, int64_t high, const Indices& indices, const float* values,
                      int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
        const int64_t index = support_at(indices, s);
        if (index >= low && index < high) set_as<kType>(weight, index, get_as<kType>(weight, index) + values[s]);
    }
}

static void add(void* weight, DType dtype, int64_t low, int64_t high, const Indices& indices, const float* values,
                int64_t begin, int64_t end) {
    switch (dtype) {
        case DType::f32:
            return add_typed<DType::f32>(weight, low, high, indices, values, begin, end);
        case DType::bf16:
            return add_typed<DType::bf16>(weight, low, high, indices, values, begin, end);
        case DType::f16:
            return add_typed<DType::f16>(weight, low, high, indices, values, begin, end);
    }
}

template <DType kType, class T>
static void write_typed(T* weight, int64_t count, const Indices& indices, const T* base, const float* values,
                        int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
        const int64_t index = support_at(indices, s);
        if (index < 0 || index >= count) continue;
        if (values == nullptr) {
            weight[index] = base[s];
        } else {
            set_as<kType>(weight, index, get_as<kType>(base, s) + values[s]);
        }
    }
}

static void write(void* weight, DType dtype, int64_t count, const Indices& indices, const void* base,
                  const float* values, int64_t begin, int64_t end) {
    uint16_t* halves = (uint16_t*)weight;
    switch (dtype) {
        case DType::f32:
            return write_typed<DType::f32>((float*)weight, count, indices, (const float*)base, values, begin, end);
        case DType::bf16:
            return write_typed<DType::bf16>(halves, count, indices, (const uint16_t*)base, values, begin, end);
        case DType::f16:
            return write_typed<DType::f16>(halves, count, indices, (const uint16_t*)base, values, begin, end);
    }
}

// weight[index] = round(base + value) for `count` <= kPutBlock active weights from s on; values are those just
// computed.
constexpr int64_t kPutBlock = 64;

template <DType kType>
static inline void put(const AdamWeight& weight, int64_t s, int64_t count, const float* values) {
    alignas(64) float sums[kPutBlock];
    alignas(64) uint16_t halves[kPutBlock];
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const Vec sum = vec_add(load_as<kType>(weight.base, s + i), vec_load(values + i));
        vec_store(sums + i, sum);
        if (kType == DType::bf16) vec_store_bf16(halves + i, sum);
        if (kType == DType::f16) vec_store_f16(halves + i, sum);
    }
    for (; i < count; ++i) {
        sums[i] = get_as<kType>(weight.base, s + i) + values[i];
        if (kType != DType::f32) set_as<kType>(halves, i, sums[i]);
    }
    float* floats = (float*)weight.data;
    uint16_t* shorts = (uint16_t*)weight.data;
    const uint64_t size = (uint64_t)weight.count;
    for (i = 0; i < count; ++i) {
        const int64_t index = support_at(weight.indices, s + i);
        if ((uint64_t)index >= size) continue;
        if (kType == DType::f32) {
            floats[index] = sums[i];
        } else if (kType == DType::bf16 && weight.stochastic) {
            shorts[index] =
                sparse::stochastic_bf16(sums[i], sparse::rounding_draw(weight.seed, index, weight.tensor_id));
        } else {
            shorts[index] = halves[i];
        }
    }
}

// The lines that `count` active weights from s on lie in, asked for before they are written.
static inline void prefetch_weight(const AdamWeight& weight, int64_t size, int64_t s, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t index = support_at(weight.indices, s + i);
        if ((uint64_t)index < (uint64_t)weight.count) __builtin_prefetch((const char*)weight.data + index * size, 1);
    }
}

template <class Age>
static inline Age older(Age age) {
    constexpr Age kOldest = sizeof(Age) == 2 ? (Age)0x7fff : (Age)0x7fffffff;
    return age == kOldest ? kOldest : (Age)(age + 1);
}

static inline int64_t within(int64_t age, int64_t ages) { return age < 0 ? 0 : age < ages ? age : ages - 1; }

template <DType kType, class Age>
static void adamw_typed(const AdamBuffers& b, const sparse::AdamHyper& h, const AdamWeight& target, int64_t begin,
                        int64_t end) {
    // Copies: a store through a vector type may alias anything, and would make the compiler read these again.
    const AdamBuffers buffers = b;
    const AdamWeight weight = target;
    const float *table1 = b.corrections, *table2 = b.corrections + b.ages, *grads = b.grads;
    float *values = b.values, *exp_avg = b.exp_avg, *exp_avg_sq = b.exp_avg_sq;
    Age* age = (Age*)b.age;
    const int64_t ages = buffers.ages;
    const sparse::AdamHyper hyper = h;
    const Vec lr = vec_set(h.lr), beta1 = vec_set(h.beta1), rest1 = vec_set(h.rest1), beta2 = vec_set(h.beta2);
    const Vec rest2 = vec_set(h.rest2), eps = vec_set(h.eps), keep = vec_set(h.keep);
    alignas(64) float correction1[kPutBlock], correction2[kPutBlock];
    for (int64_t s = begin; s < end; s += kPutBlock) {
        const int64_t count = end - s < kPutBlock ? end - s : kPutBlock;
        if (weight.data != nullptr) {
            // 2 M of 200 M weights: 6.1 ns each with one block ahead, 5.3 with four, 5.3 with eight (Zen 5,
            // 2026-11-21).
            const int64_t ahead = s + 4 * kPutBlock;
            const int64_t next = end - ahead < kPutBlock ? end - ahead : kPutBlock;
            prefetch_weight(weight, element_size(kType), ahead, next);
        }
        const Age first_age = age[s];
        Age different = 0;
        for (int64_t i = 0; i < count; ++i) different |= (Age)(age[s + i] ^ first_age);
        for (int64_t i = 0; i < count; ++i) age[s + i] = older(age[s + i]);
        if (different == 0) {
            const int64_t at = within(age[s], ages);
            for (int64_t i = 0; i < kPutBlock; ++i) correction1[i] = table1[at];
            for (int64_t i = 0; i < kPutBlock; ++i) correction2[i] = table2[at];
        } else {
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = within(age[s + i], ages);
                correction1[i] = table1[at], correction2[i] = table2[at];
            }
        }
        int64_t i = 0;
        // sparse::adam on a vector, each operation rounded alone as there.
        for (; i + kWidth <= count; i += kWidth) {
            const Vec grad = vec_load(grads + s + i);
            const Vec first = vec_add(vec_mul(vec_load(exp_avg + s + i), beta1), vec_mul(grad, rest1));
            const Vec second =
                vec_add(vec_mul(vec_load(exp_avg_sq + s + i), beta2), vec_mul(vec_mul(grad, rest2), grad));
            const Vec step = vec_div(vec_mul(vec_mul(lr, vec_load(correction1 + i)), first),
                                     vec_add(vec_mul(vec_sqrt(second), vec_load(correction2 + i)), eps));
            vec_store(exp_avg + s + i, first);
            vec_store(exp_avg_sq + s + i, second);
            vec_store(values + s + i, vec_sub(vec_mul(vec_load(values + s + i), keep), step));
        }
        for (; i < count; ++i) {
            const float grad = grads[s + i];
            const float first = exp_avg[s + i] * hyper.beta1 + grad * hyper.rest1;
            const float second = exp_avg_sq[s + i] * hyper.beta2 + (grad * hyper.rest2) * grad;
            const float root = __builtin_sqrtf(second) * correction2[i] + hyper.eps;
            exp_avg[s + i] = first, exp_avg_sq[s + i] = second;
            values[s + i] = values[s + i] * hyper.keep - (hyper.lr * correction1[i]) * first / root;
        }
        if (weight.data != nullptr) put<kType>(weight, s, count, values + s);
    }
}

template <class Age>
static void adamw_aged(const AdamBuffers& b, const sparse::AdamHyper& hyper, const AdamWeight& weight, int64_t begin,
                       int64_t end) {
    switch (weight.dtype) {
        case DType::f32:
            return adamw_typed<DType::f32, Age>(b, hyper, weight, begin, end);
        case DType::bf16:
            return adamw_typed<DType::bf16, Age>(b, hyper, weight, begin, end);
        case DType::f16:
            return adamw_typed<DType::f16, Age>(b, hyper, weight, begin, end);
    }
}

static void adamw(const AdamBuffers& b, const sparse::AdamHyper& hyper, const AdamWeight& weight, int64_t begin,
                  int64_t end) {
    if (b.wide_age) return adamw_aged<int32_t>(b, hyper, weight, begin, end);
    adamw_aged<int16_t>(b, hyper, weight, begin, end);
}

static const SparseKernels sparse_table = {transpose, dots, narrow, add, write, adamw};
