// Kernels of cpu/gated_activation.cpp, compiled once for each instruction set. Everything is computed in float32 and
// rounded where the stock expression rounds; the tail of a run goes through the same vectors.

#include "cpu/typed_vector.h"

#if PEFTFAST_ISA == 512
static inline Vec vec_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec vec_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec vec_abs(Vec a) { return _mm512_abs_ps(a); }
// The second where one of them is no number.
static inline Vec vec_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec vec_min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// Lanes of `below` where a < 0, else of `above`.
static inline Vec vec_by_sign(Vec a, Vec below, Vec above) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ), above, below);
}
// 0 where a <= 0, else b.
static inline Vec vec_where_positive(Vec a, Vec b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NLE_UQ), b);
}
// 2^n, where the bits of `shifted` end in n.
static inline Vec power_of_two(Vec shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
}
#elif PEFTFAST_ISA == 256
static inline Vec vec_sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec vec_div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec vec_abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Vec vec_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec vec_min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec vec_by_sign(Vec a, Vec below, Vec above) {
    return _mm256_blendv_ps(above, below, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_LT_OQ));
}
static inline Vec vec_where_positive(Vec a, Vec b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NLE_UQ), b);
}
static inline Vec power_of_two(Vec shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
#else
typedef int32_t Lanes __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
static inline Vec vec_sub(Vec a, Vec b) { return a - b; }
static inline Vec vec_div(Vec a, Vec b) { return a / b; }
static inline Vec vec_pick(Lanes yes, Vec a, Vec b) { return (Vec)((yes & (Lanes)a) | (~yes & (Lanes)b)); }
static inline Vec vec_abs(Vec a) { return (Vec)((Bits)a & 0x7fffffffu); }
static inline Vec vec_max(Vec a, Vec b) { return vec_pick(a > b, a, b); }
static inline Vec vec_min(Vec a, Vec b) { return vec_pick(a < b, a, b); }
static inline Vec vec_by_sign(Vec a, Vec below, Vec above) { return vec_pick(a < vec_zero(), below, above); }
static inline Vec vec_where_positive(Vec a, Vec b) { return (Vec)(~(a <= vec_zero()) & (Lanes)b); }
static inline Vec power_of_two(Vec shifted) { return (Vec)(((Bits)shifted << 23) + 0x3f800000u); }
#endif

// e^x for x <= 0 to a relative 3e-7; 0 below -87.7, where e^x leaves the normal numbers. x = n ln 2 + r with |r| <=
// ln 2 / 2; the sum of x / ln 2 and 1.5 * 2^23 has n in its last bits; e^r = 1 + r + r^2 p(r), p fitted for the
// smallest relative error (3e-9), as are the coefficients below.
static inline Vec vec_exp_below(Vec x) {
    const Vec bounded = vec_max(vec_set(-88.0f), x), magic = vec_set(12582912.0f);
    const Vec shifted = vec_fma(bounded, vec_set(1.44269504f), magic);
    const Vec n = vec_sub(shifted, magic);
    Vec r = vec_fma(n, vec_set(-0.693359375f), bounded);  // nine bits of ln 2, so that the product is exact
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    Vec p = vec_fma(vec_set(0.0013814225094392896f), r, vec_set(0.008368901908397675f));
    p = vec_fma(p, r, vec_set(0.04166840761899948f));
    p = vec_fma(p, r, vec_set(0.1666651964187622f));
    p = vec_fma(p, r, vec_set(0.4999999403953552f));
    p = vec_add(vec_fma(p, vec_mul(r, r), r), vec_set(1.0f));
    return vec_mul(p, power_of_two(shifted));
}

// 1 / (1 + e^-z) and what it lacks of 1, each without cancellation.
struct Sigmoid {
    Vec value, rest;
};
static inline Sigmoid sigmoid(Vec z) {
    const Vec power = vec_exp_below(vec_sub(vec_zero(), vec_abs(z)));
    const Vec large = vec_div(vec_set(1.0f), vec_add(vec_set(1.0f), power)), small = vec_mul(power, large);
    return {vec_by_sign(z, small, large), vec_by_sign(z, large, small)};
}

struct Curve {
    Vec value, slope;  // act(g), act'(g)
};

// The normal distribution below -a is e^(-a^2 / 2) t q(t) with t = 1 / (1 + 0.275 a), to a relative 4e-8 before
// rounding.
constexpr float kArea[9] = {0.10970274358987808f, 0.10978952795267105f,  0.10123566538095474f,
                            0.08260376751422882f, 0.07959850877523422f,  -0.023337963968515396f,
                            0.12017668783664703f, -0.10601762682199478f, 0.026248708367347717f};

// Near 0 it is 1/2 + a c(a^2), to a relative 3e-9 up to 1.25: half of 1 is exact, where the product above is not.
constexpr float kCentre[6] = {0.3989422619342804f,     -0.066490039229393f,     0.009971682913601398f,
                              -0.0011829622089862823f, 0.00011048229498555884f, -6.679582384094829e-06f};

template <Activation kActivation, bool kSlope>
static inline Curve curve_of(Vec g) {
    if (kActivation == Activation::relu) {
        return {vec_where_positive(g, g), kSlope ? vec_where_positive(g, vec_set(1.0f)) : g};
    }
    if (kActivation == Activation::gelu) {
        const Vec a = vec_abs(g), square = vec_mul(g, g);
        const Vec density = vec_exp_below(vec_mul(square, vec_set(-0.5f)));
        const Vec t = vec_div(vec_set(1.0f), vec_fma(a, vec_set(0.275f), vec_set(1.0f)));
        Vec q = vec_set(kArea[8]);
#pragma GCC unroll 8
        for (int i = 7; i >= 0; --i) q = vec_fma(q, t, vec_set(kArea[i]));
        const Vec below = vec_mul(density, vec_mul(q, t));
        Vec c = vec_set(kCentre[5]);
#pragma GCC unroll 5
        for (int i = 4; i >= 0; --i) c = vec_fma(c, square, vec_set(kCentre[i]));
        const Vec far = vec_by_sign(g, below, vec_sub(vec_set(1.0f), below));
        const Vec area = vec_by_sign(vec_sub(a, vec_set(1.25f)), vec_fma(g, c, vec_set(0.5f)), far);
        return {vec_mul(g, area), kSlope ? vec_fma(g, vec_mul(density, vec_set(0.3989422804f)), area) : g};
    }
    // silu is g sigmoid(g), gelu by tanh g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
    Vec z = g, steep = vec_set(1.0f);
    if (kActivation == Activation::gelu_tanh) {
        const Vec square = vec_min(vec_set(1e6f), vec_mul(g, g));  // beyond, the sigmoid is 0 or 1 already
        const Vec linear = vec_set(1.5957691216f), cubic = vec_set(1.5957691216f * 0.044715f);
        z = vec_mul(g, vec_fma(square, cubic, linear));
        steep = vec_fma(square, vec_set(3.0f * 1.5957691216f * 0.044715f), linear);
    }
    const Sigmoid half = sigmoid(z);
    const Vec value = vec_mul(g, half.value);
    if (!kSlope) return {value, g};
    const Vec bend = kActivation == Activation::silu ? half.rest : vec_mul(half.rest, steep);
    return {value, vec_fma(value, bend, half.value)};
}

// The first `count` < kWidth lanes; the others read as 0 and are not written.
template <DType kType>
static inline Vec load_some(const void* p, int64_t i, int64_t count) {
    alignas(64) unsigned char lanes[kWidth * sizeof(float)] = {};
    const int64_t size = element_size(kType);
    __builtin_memcpy(lanes, (const char*)p + i * size, count * size);
    return load_as<kType>(lanes, 0);
}

template <DType kType>
static inline void store_some(void* p, int64_t i, int64_t count, Vec v) {
    alignas(64) unsigned char lanes[kWidth * sizeof(float)];
    const int64_t size = element_size(kType);
    store_as<kType>(lanes, 0, v);
    __builtin_memcpy((char*)p + i * size, lanes, count * size);
}

// What stands between two operators of the stock expression: rounded to its dtype, so that a model trained by the pass
// stays as near to one trained by the expression as two stock runs are. Where nothing was rounded in between, a
// bfloat16 Qwen-shaped model moved by 0.008 in 60 steps, two stock runs by 0.0013.
template <DType kType>
static inline Vec between(Vec v) {
    if (kType == DType::bf16) return vec_round_bf16(v);
    if (kType == DType::f16) return vec_round_f16(v);
    return v;
}

template <Activation kActivation, DType kType>
static inline Vec product(Vec g, Vec u) {
    return vec_mul(between<kType>(curve_of<kActivation, false>(g).value), u);
}

template <Activation kActivation, DType kType>
static void gated_forward(const GatedRun& run) {
    int64_t i = 0;
    for (; i + kWidth <= run.count; i += kWidth) {
        store_as<kType>(run.h, i, product<kActivation, kType>(load_as<kType>(run.gate, i), load_as<kType>(run.up, i)));
    }
    const int64_t rest = run.count - i;
    if (rest > 0) {
        const Vec g = load_some<kType>(run.gate, i, rest), u = load_some<kType>(run.up, i, rest);
        store_some<kType>(run.h, i, rest, product<kActivation, kType>(g, u));
    }
}

struct Gradients {
    Vec dgate, dup, h;
};

template <Activation kActivation, DType kType>
static inline Gradients gradients_of(Vec d, Vec g, Vec u) {
    const Curve curve = curve_of<kActivation, true>(g);
    const Vec value = between<kType>(curve.value);
    return {vec_mul(between<kType>(vec_mul(d, u)), curve.slope), vec_mul(d, value), vec_mul(value, u)};
}

template <Activation kActivation, DType kType>
static void gated_backward(const GatedRun& run) {
    int64_t i = 0;
    for (; i + kWidth <= run.count; i += kWidth) {
        const Gradients found = gradients_of<kActivation, kType>(load_as<kType>(run.dh, i), load_as<kType>(run.gate, i),
                                                                 load_as<kType>(run.up, i));
        store_as<kType>(run.dgate, i, found.dgate);
        store_as<kType>(run.dup, i, found.dup);
        if (run.h != nullptr) store_as<kType>(run.h, i, found.h);
    }
    const int64_t rest = run.count - i;
    if (rest > 0) {
        const Gradients found = gradients_of<kActivation, kType>(
            load_some<kType>(run.dh, i, rest), load_some<kType>(run.gate, i, rest), load_some<kType>(run.up, i, rest));
        store_some<kType>(run.dgate, i, rest, found.dgate);
        store_some<kType>(run.dup, i, rest, found.dup);
        if (run.h != nullptr) store_some<kType>(run.h, i, rest, found.h);
    }
}

#define PEFTFAST_DTYPES(body, activation)                                                 \
    {body<Activation::activation, DType::f32>, body<Activation::activation, DType::bf16>, \
     body<Activation::activation, DType::f16>}
#define PEFTFAST_ACTIVATIONS(body)                                                               \
    {PEFTFAST_DTYPES(body, silu), PEFTFAST_DTYPES(body, gelu), PEFTFAST_DTYPES(body, gelu_tanh), \
     PEFTFAST_DTYPES(body, relu)}
static const GatedKernels gated_table = {PEFTFAST_ACTIVATIONS(gated_forward), PEFTFAST_ACTIVATIONS(gated_backward)};
#undef PEFTFAST_ACTIVATIONS
#undef PEFTFAST_DTYPES
