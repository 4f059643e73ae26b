// Kernels of cpu/sparse_blocks.cpp, compiled once for each instruction set. `side` is a multiple of 16.

// Sums held in registers: 8 rows of two vectors of the 32 registers of AVX-512, 4 of the 16 of others.
constexpr int kTileRows = PEFTFAST_ISA == 512 ? 8 : 4;

static void widen(const void* source, DType dtype, int64_t stride, int64_t rows, int64_t side, float* target) {
    for (int64_t row = 0; row < rows; ++row) {
        float* to = target + row * side;
        const uint16_t* half = (const uint16_t*)source + row * stride;
        const float* whole = (const float*)source + row * stride;
        if (dtype == DType::bf16) {
            for (int64_t i = 0; i < side; i += kWidth) vec_store(to + i, vec_load_bf16(half + i));
        } else if (dtype == DType::f16) {
            for (int64_t i = 0; i < side; i += kWidth) vec_store(to + i, vec_load_f16(half + i));
        } else {
            for (int64_t i = 0; i < side; i += kWidth) vec_store(to + i, vec_load(whole + i));
        }
    }
}

// kTileRows rows of the block by kVecs vectors of its columns.
template <int kVecs>
static inline void multiply_tile(const float* dy, const float* x, int64_t rows, int64_t side, float* sums, bool add) {
    Vec tile[kTileRows][kVecs];
    for (int i = 0; i < kTileRows; ++i) {
        for (int v = 0; v < kVecs; ++v) tile[i][v] = vec_zero();
    }
    for (int64_t m = 0; m < rows; ++m) {
        Vec right[kVecs];
        for (int v = 0; v < kVecs; ++v) right[v] = vec_load(x + m * side + v * kWidth);
        for (int i = 0; i < kTileRows; ++i) {
            const Vec left = vec_set(dy[m * side + i]);
            for (int v = 0; v < kVecs; ++v) tile[i][v] = vec_fma(left, right[v], tile[i][v]);
        }
    }
    for (int i = 0; i < kTileRows; ++i) {
        for (int v = 0; v < kVecs; ++v) {
            float* at = sums + i * side + v * kWidth;
            vec_store(at, add ? vec_add(vec_load(at), tile[i][v]) : tile[i][v]);
        }
    }
}

static void multiply(const float* dy, const float* x, int64_t rows, int64_t side, float* sums, bool add) {
    for (int64_t i = 0; i < side; i += kTileRows) {
        int64_t j = 0;
        for (; j + 2 * kWidth <= side; j += 2 * kWidth) {
            multiply_tile<2>(dy + i, x + j, rows, side, sums + i * side + j, add);
        }
        for (; j < side; j += kWidth) multiply_tile<1>(dy + i, x + j, rows, side, sums + i * side + j, add);
    }
}

static void store(const float* sums, int64_t side, void* out, DType dtype, int64_t stride) {
    for (int64_t i = 0; i < side; ++i) {
        const float* from = sums + i * side;
        if (dtype == DType::f32) {
            float* to = (float*)out + i * stride;
            for (int64_t j = 0; j < side; j += kWidth) vec_store(to + j, vec_load(from + j));
        } else {
            uint16_t* to = (uint16_t*)out + i * stride;
            for (int64_t j = 0; j < side; j += kWidth) {
                if (dtype == DType::bf16) {
                    vec_store_bf16(to + j, vec_load(from + j));
                } else {
                    vec_store_f16(to + j, vec_load(from + j));
                }
            }
        }
    }
}

static const BlockKernels block_table = {widen, multiply, store};
