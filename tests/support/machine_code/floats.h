// Floating-point numbers. Roots, reciprocals, logarithms and powers of two are the nearest numbers, where a GPU's may
// be some apart.
#pragma once
#include <fenv.h>
#include <math.h>

#include "block.h"

namespace machine {

inline int direction(const Instruction& one) {
    return one.has("RM") ? FE_DOWNWARD : one.has("RP") ? FE_UPWARD : one.has("RZ") ? FE_TOWARDZERO : FE_TONEAREST;
}

// A number of 16 bits, with so many of them behind the leading one: 10 float16, 7 bfloat16.
inline double widened(uint16_t bits, int fraction) {
    const int most = (1 << (15 - fraction)) - 1, exponent = bits >> fraction & most,
              rest = bits & ((1 << fraction) - 1);
    double value;
    if (exponent == most)
        value = rest ? NAN : INFINITY;
    else
        value = ldexp(exponent ? rest + (1 << fraction) : rest, std::max(exponent, 1) - most / 2 - fraction);
    return bits >> 15 ? -value : value;
}

inline uint16_t narrowed(double value, int fraction) {
    const int most = (1 << (15 - fraction)) - 1,
              least = 1 - most / 2;  // exponents: of infinity, of the smallest number
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) return 0x7fff;
    if (value == 0) return sign;
    value = fabs(value);
    const int exponent = isinf(value) ? most : std::max(ilogb(value), least);
    if (exponent >= most - most / 2) return sign | most << fraction;
    const auto steps = static_cast<uint32_t>(nearbyint(ldexp(value, fraction - exponent)));
    return sign | std::min<uint32_t>(((exponent - least) << fraction) + steps, most << fraction);
}

inline int fraction_of(const Instruction& one) { return one.has("BF16") || one.has("BF16_V2") ? 7 : 10; }

// Volatile, so that nothing is computed before the rounding is set.
inline float fma_towards(int direction, float a, float b, float c) {
    fesetround(direction);
    const volatile float x = a, y = b, z = c;
    const volatile float result = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return result;
}

template <typename Integer>
float float_towards(int direction, Integer value) {
    fesetround(direction);
    const volatile Integer from = value;
    const volatile float result = static_cast<float>(from);
    fesetround(FE_TONEAREST);
    return result;
}

inline float flushed(float value) { return fpclassify(value) == FP_SUBNORMAL ? copysignf(0, value) : value; }

// One operand after another, flushed where the instruction flushes, to one result.
template <typename Function>
void float32(Warp& warp, const Instruction& one, Function f) {
    const bool flushes = one.has("FTZ");
    each(warp, [&](int lane) {
        float from[3] = {};
        for (size_t i = 1; i < one.count() && i < 4 && one[i].kind != kPredicate; ++i) {
            from[i - 1] = number(warp, one[i], lane);
            if (flushes) from[i - 1] = flushed(from[i - 1]);
        }
        const float result = f(from, lane);
        write(warp, one[0], lane, flushes ? flushed(result) : result);
    });
}

inline void fadd(Warp& warp, const Instruction& one) {
    float32(warp, one, [](const float* x, int) { return x[0] + x[1]; });
}

inline void fmul(Warp& warp, const Instruction& one) {
    float32(warp, one, [](const float* x, int) { return x[0] * x[1]; });
}

inline void ffma(Warp& warp, const Instruction& one) {
    const int towards = direction(one);
    float32(warp, one, [&](const float* x, int) {
        return towards == FE_TONEAREST ? fmaf(x[0], x[1], x[2]) : fma_towards(towards, x[0], x[1], x[2]);
    });
}

inline void fmnmx(Warp& warp, const Instruction& one) {
    const bool keeps_nan = one.has("NAN");
    float32(warp, one, [&](const float* x, int lane) {
        if (keeps_nan && (isnan(x[0]) || isnan(x[1]))) return NAN;
        return predicate(warp, one[3], lane) ? fminf(x[0], x[1]) : fmaxf(x[0], x[1]);
    });
}

inline void fsel(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        write(warp, one[0], lane, number(warp, predicate(warp, one[3], lane) ? one[1] : one[2], lane));
    });
}

// By the modifier: LT is false of what has no order, LTU true.
inline bool compare_numbers(const std::string& how, double a, double b) {
    const bool unordered = isnan(a) || isnan(b);
    if (how == "NAN") return unordered;
    if (how == "NUM") return !unordered;
    return unordered ? how.size() == 3 : compare(how.substr(0, 2), a, b);
}

const char* const kComparisons = "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM AND OR FTZ BF16_V2";

inline void write_comparison(Warp& warp, const Instruction& one, int lane, bool held) {
    const bool other = predicate(warp, one[4], lane);
    write_predicate(warp, one[0], lane, joined(one, held, other));
    write_predicate(warp, one[1], lane, joined(one, !held, other));
}

inline void fsetp(Warp& warp, const Instruction& one) {
    require(one.count() == 5, "operands");
    const bool flushes = one.has("FTZ");
    each(warp, [&](int lane) {
        float a = number(warp, one[2], lane), b = number(warp, one[3], lane);
        if (flushes) a = flushed(a), b = flushed(b);
        write_comparison(warp, one, lane, compare_numbers(one.modifiers[0], a, b));
    });
}

// One or zero.
inline void fset(Warp& warp, const Instruction& one) {
    require(one.count() == 4 && one.modifiers.size() == 3 && one.has("BF"), "operands");
    each(warp, [&](int lane) {
        const bool held = compare_numbers(one.modifiers[1], number(warp, one[1], lane), number(warp, one[2], lane));
        write(warp, one[0], lane, joined(one, held, predicate(warp, one[3], lane)) ? 1.0f : 0.0f);
    });
}

inline void dsetp(Warp& warp, const Instruction& one) {
    require(one.count() == 5, "operands");
    each(warp, [&](int lane) {
        const auto a = bits_as<double>(pair(warp, one[2], lane)), b = bits_as<double>(pair(warp, one[3], lane));
        write_comparison(warp, one, lane, compare_numbers(one.modifiers[0], a, b));
    });
}

// Whether a quotient needs the long way: by the exponents alone.
inline void fchk(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const auto exponent = [&](const Operand& from) {
            return static_cast<int>(bits_as<uint32_t>(number(warp, from, lane)) >> 23 & 255);
        };
        const int a = exponent(one[1]), b = exponent(one[2]);
        const bool plain = a > 30 && a < 250 && b > 2 && b < 250 && a - b < 120 && a - b > -90;
        write_predicate(warp, one[0], lane, !plain);
    });
}

inline void mufu(Warp& warp, const Instruction& one) {
    const std::string& what = one.modifiers[0];
    each(warp, [&](int lane) {
        const double x = number(warp, one[1], lane);
        const double value = what == "EX2"   ? exp2(x)
                             : what == "RCP" ? 1 / x
                             : what == "RSQ" ? 1 / sqrt(x)
                             : what == "LG2" ? log2(x)
                                             : sqrt(x);
        write(warp, one[0], lane, static_cast<float>(value));
    });
}

// Half of an operand of two numbers.
inline double half(const Warp& warp, const Instruction& one, const Operand& from, int lane, int which) {
    const uint32_t both = raw(warp, from, lane);
    auto bits = static_cast<uint16_t>(both >> 16 * (from.half < 0 ? which : from.half));
    if (from.absolute) bits &= 0x7fff;
    if (from.negated) bits ^= 0x8000;
    return widened(bits, fraction_of(one));
}

// The operands' halves from the second operand on; immediates come in pairs, the upper half first.
inline void halves(const Warp& warp, const Instruction& one, int lane, int which, double* to) {
    for (size_t i = 1; i < one.count(); ++i) {
        const bool immediate = one[i].kind == kFloat;
        if (immediate)
            *to++ = bits_as<float>(static_cast<uint32_t>(one[i + !which].value));
        else
            *to++ = half(warp, one, one[i], lane, which);
        i += immediate;
    }
}

inline void hfma2(Warp& warp, const Instruction& one) {
    const int fraction = fraction_of(one);
    each(warp, [&](int lane) {
        double x[8] = {};
        if (one.has("F32")) {  // one sum, in float32
            require(one.opcode == "HADD2", "float32 of " + one.opcode);
            halves(warp, one, lane, 0, x);
            return write(warp, one[0], lane, static_cast<float>(x[0] + x[1]));
        }
        uint32_t value = 0;
        for (int which = 0; which < 2; ++which) {
            halves(warp, one, lane, which, x);
            const double result = one.opcode == "HADD2"   ? x[0] + x[1]
                                  : one.opcode == "HMUL2" ? x[0] * x[1]
                                                          : x[0] * x[1] + x[2];
            value |= static_cast<uint32_t>(narrowed(result, fraction)) << 16 * which;
        }
        write(warp, one[0], lane, value);
    });
}

inline void hsetp2(Warp& warp, const Instruction& one) {
    require(one.count() == 5 && one.has("AND"), "operands");
    const std::string& how = one.modifiers[one.has("BF16_V2")];
    each(warp, [&](int lane) {
        bool held[2];
        for (int which = 0; which < 2; ++which)
            held[which] =
                compare_numbers(how, half(warp, one, one[2], lane, which), half(warp, one, one[3], lane, which));
        const bool other = predicate(warp, one[4], lane);
        for (int which = 0; which < 2; ++which) write_predicate(warp, one[which], lane, held[which] && other);
    });
}

inline void f2fp(Warp& warp, const Instruction& one) {
    const int fraction = fraction_of(one);
    require(one.has("PACK_AB"), "another packing");
    each(warp, [&](int lane) {
        const uint32_t upper = narrowed(number(warp, one[1], lane), fraction);
        write(warp, one[0], lane, upper << 16 | narrowed(number(warp, one[2], lane), fraction));
    });
}

inline void f2f(Warp& warp, const Instruction& one) {
    require(one.modifiers.size() == 2 && one.modifiers[1] == "F32", "a conversion of another kind");
    each(warp, [&](int lane) {
        const float x = number(warp, one[1], lane);
        if (one.has("F64"))
            write_pair(warp, one[0], lane, bits_as<uint64_t>(static_cast<double>(x)));
        else
            write(warp, one[0], lane, static_cast<uint32_t>(narrowed(x, fraction_of(one))));
    });
}

inline void f2i(Warp& warp, const Instruction& one) {
    const bool wide = one.has("U64") || one.has("S64"), is_unsigned = one.has("U64") || one.has("U32");
    each(warp, [&](int lane) {
        const float x = number(warp, one[1], lane);
        const double whole = one.has("TRUNC")   ? trunc(x)
                             : one.has("FLOOR") ? floor(x)
                             : one.has("CEIL")  ? ceil(x)
                                                : nearbyint(x);
        const double end = ldexp(1, (wide ? 64 : 32) - !is_unsigned);  // past the largest integer
        const uint64_t largest = (wide ? ~0ull : kAll) >> !is_unsigned, smallest = is_unsigned ? 0 : ~largest;
        uint64_t value;
        if (isnan(whole) || whole < (is_unsigned ? 0 : -end))
            value = smallest;
        else if (whole >= end)
            value = largest;
        else
            value = is_unsigned ? static_cast<uint64_t>(whole) : static_cast<uint64_t>(static_cast<int64_t>(whole));
        if (wide)
            write_pair(warp, one[0], lane, value);
        else
            write(warp, one[0], lane, static_cast<uint32_t>(value));
    });
}

inline void i2f(Warp& warp, const Instruction& one) {
    const int towards = direction(one);
    each(warp, [&](int lane) {
        const Operand& from = one[1];
        float value;
        if (one.has("U64"))
            value = float_towards(towards, pair(warp, from, lane));
        else if (one.has("S64"))
            value = float_towards(towards, static_cast<int64_t>(pair(warp, from, lane)));
        else
            value = float_towards<int64_t>(
                towards, one.has("U32") ? int64_t{word(warp, from, lane)} : integer(warp, from, lane));
        write(warp, one[0], lane, value);
    });
}

inline const std::map<std::string, Opcode> kFloats = {
    {"FADD", {fadd, "FTZ"}},
    {"FMUL", {fmul, "FTZ"}},
    {"FFMA", {ffma, "FTZ RM RP RZ"}},
    {"FMNMX", {fmnmx, "NAN"}},
    {"FSEL", {fsel, ""}},
    {"FSETP", {fsetp, kComparisons}},
    {"FSET", {fset, "*"}},
    {"DSETP", {dsetp, kComparisons}},
    {"FCHK", {fchk, ""}},
    {"MUFU", {mufu, "EX2 RCP RSQ LG2 SQRT"}},
    {"HFMA2", {hfma2, "MMA BF16_V2"}},
    {"HADD2", {hfma2, "MMA BF16_V2 F32"}},
    {"HMUL2", {hfma2, "MMA BF16_V2"}},
    {"HSETP2", {hsetp2, kComparisons}},
    {"F2FP", {f2fp, "BF16 F16 F32 PACK_AB"}},
    {"F2F", {f2f, "BF16 F16 F32 F64"}},
    {"F2I", {f2i, "FTZ U32 TRUNC NTZ U64 S64 FLOOR CEIL"}},
    {"I2F", {i2f, "RP U32 U64 S64 S32"}},
    {"I2FP", {i2f, "F32 U32 S32"}},
};

}  // namespace machine
