// Plain C++ for any architecture: groups of four floats in the compilers' own vector type, which they map to whatever
// the baseline has (SSE2, NEON). No fused multiply-add. Included by each_isa.h inside a namespace.

typedef float Vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;

// Register blocks: 8 accumulators of the 16 registers of baseline x86-64.
constexpr int kDotRows = 2, kDotRanks = 4;
constexpr int kOuterRanks = 4, kOuterVecs = 2;
constexpr int kExpandBlockRows = 4, kExpandVecs = 2;

static inline Vec vec_set(float value) { return Vec{value, value, value, value}; }
static inline Vec vec_zero() { return Vec{0.0f, 0.0f, 0.0f, 0.0f}; }
static inline Vec vec_load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline void vec_store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
static inline Vec vec_add(Vec a, Vec b) { return a + b; }
static inline Vec vec_mul(Vec a, Vec b) { return a * b; }
static inline Vec vec_fma(Vec a, Vec b, Vec c) { return a * b + c; }

static inline Vec vec_load_bf16(const uint16_t* p) {
    Vec v;
    for (int i = 0; i < 4; ++i) v[i] = float_from_bf16(p[i]);
    return v;
}
static inline Vec vec_load_f16(const uint16_t* p) {
    Vec v;
    for (int i = 0; i < 4; ++i) v[i] = float_from_f16(p[i]);
    return v;
}
static inline void vec_store_bf16(uint16_t* p, Vec v) {
    for (int i = 0; i < 4; ++i) p[i] = bf16_from_float(v[i]);
}
static inline void vec_store_f16(uint16_t* p, Vec v) {
    for (int i = 0; i < 4; ++i) p[i] = f16_from_float(v[i]);
}

static inline Vec vec_round_bf16(Vec v) {
    for (int i = 0; i < 4; ++i) v[i] = float_from_bf16(bf16_from_float(v[i]));
    return v;
}
static inline Vec vec_round_f16(Vec v) {
    for (int i = 0; i < 4; ++i) v[i] = float_from_f16(f16_from_float(v[i]));
    return v;
}

// Lanes whose bit is clear become zero; `bits` is a row's mask and `column`, a multiple of kWidth, the vector's place
// in it.
static inline Vec vec_keep(Vec v, const uint8_t* bits, int64_t column) {
    typedef int32_t Lanes __attribute__((vector_size(16)));
    const int32_t byte = bits[column / 8] >> (column % 8);
    const Lanes lane = {1, 2, 4, 8};
    const Lanes kept = ((Lanes{byte, byte, byte, byte} & lane) == lane) & (Lanes)v;
    return (Vec)kept;
}

static inline float vec_sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

static inline void vec_sums(const float* v, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = vec_sum(vec_load(v + i * kWidth));
}

// Four rows of four numbers to its columns.
static inline void vec_transpose(Vec v[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
        for (int j = 0; j < i; ++j) {
            const float below = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = below;
        }
    }
}

// Philox on one counter at a time.
typedef uint64_t Counters;
constexpr int kCounters = 1;

static inline Counters counters_from(uint64_t q) { return q; }
static inline Counters counters_set(uint32_t word) { return word; }
static inline Counters counters_multiply(Counters a, Counters b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
static inline Counters counters_high(Counters a) { return a >> 32; }
static inline Counters counters_xor(Counters a, Counters b, Counters c) { return a ^ b ^ c; }
static inline void counters_store(uint64_t* p, Counters a) { *p = a & 0xffffffffu; }

// One byte of keep bits; `limit` is the threshold - 1.
static inline void counters_keep(uint8_t* out, const Counters word[4], uint16_t limit) {
    const philox::Words words = {{(uint32_t)word[0], (uint32_t)word[1], (uint32_t)word[2], (uint32_t)word[3]}};
    *out = (uint8_t)philox::keep_bits(words, (uint32_t)limit + 1);
}
