// Integers, logic, predicates and the registers of others.
#pragma once
#include "block.h"

namespace machine {

inline void iadd3(Warp& warp, const Instruction& one) {
    const int from = one.sources;
    const bool wide = one.has("64"), carries = one.has("X");
    require(carries ? one.count() >= from + 4u : one.count() == from + 3u, "operands");
    each(warp, [&](int lane) {
        if (wide) {
            require(from == 1 && !carries, "a carry of 64 bits");
            write_pair(warp, one[0], lane,
                       pair(warp, one[1], lane) + pair(warp, one[2], lane) + pair(warp, one[3], lane));
            return;
        }
        uint64_t sum = 0;
        for (int i = 0; i < 3; ++i) sum += carried(warp, one[from + i], lane);
        for (size_t i = from + 3; i < one.count(); ++i) sum += predicate(warp, one[i], lane);
        write(warp, one[0], lane, static_cast<uint32_t>(sum));
        for (int i = 1; i < from; ++i) write_predicate(warp, one[i], lane, (sum >> 32) >= static_cast<uint64_t>(i));
    });
}

inline void viadd(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) { write(warp, one[0], lane, word(warp, one[1], lane) + word(warp, one[2], lane)); });
}

// The smaller of the operands from the first on, or the larger; the last one says which.
inline uint32_t chosen(Warp& warp, const Instruction& one, int lane, uint32_t first, size_t next) {
    const bool smaller = predicate(warp, one[one.count() - 1], lane);
    for (size_t i = next; i + 1 < one.count(); ++i) {
        const uint32_t other = word(warp, one[i], lane);
        const bool less = one.has("U32") ? other < first : static_cast<int32_t>(other) < static_cast<int32_t>(first);
        if (other != first && less == smaller) first = other;
    }
    return first;
}

inline void vimnmx(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) { write(warp, one[0], lane, chosen(warp, one, lane, word(warp, one[1], lane), 2)); });
}

inline void viaddmnmx(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const uint32_t sum = word(warp, one[1], lane) + word(warp, one[2], lane);
        write(warp, one[0], lane, chosen(warp, one, lane, sum, 3));
    });
}

inline void iabs(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const uint32_t value = word(warp, one[1], lane);
        write(warp, one[0], lane, value >> 31 ? 0 - value : value);
    });
}

inline void imad(Warp& warp, const Instruction& one) {
    const int from = one.sources;
    const bool wide = one.has("WIDE"), high = one.has("HI"), is_unsigned = one.has("U32"), carry = one.has("X");
    require(one.count() == from + 3u + carry && from <= 1 + (wide || high), "operands");
    each(warp, [&](int lane) {
        const Operand &a = one[from], &b = one[from + 1], &c = one[from + 2];
        if (!wide && !high) {
            uint32_t value = word(warp, a, lane) * word(warp, b, lane) + word(warp, c, lane);
            if (carry) value += predicate(warp, one[from + 3], lane);
            return write(warp, one[0], lane, value);
        }
        const uint64_t product =
            is_unsigned ? static_cast<uint64_t>(word(warp, a, lane)) * word(warp, b, lane)
                        : static_cast<uint64_t>(static_cast<int64_t>(integer(warp, a, lane)) * integer(warp, b, lane));
        const uint64_t sum = product + pair(warp, c, lane);
        if (high)
            write(warp, one[0], lane, static_cast<uint32_t>(sum >> 32));
        else
            write_pair(warp, one[0], lane, sum);
        if (from == 2) write_predicate(warp, one[1], lane, sum < product);
    });
}

inline void isetp(Warp& warp, const Instruction& one) {
    const bool extends = one.has("EX"), is_unsigned = one.has("U32");
    const std::string& how = one.modifiers[0];
    require(one.count() == 5u + extends, "operands");
    each(warp, [&](int lane) {
        bool held = is_unsigned ? compare(how, word(warp, one[2], lane), word(warp, one[3], lane))
                                : compare(how, integer(warp, one[2], lane), integer(warp, one[3], lane));
        if (extends) {  // the lower halves' answer counts where the upper ones are the same
            const bool same = word(warp, one[2], lane) == word(warp, one[3], lane);
            const bool below = predicate(warp, one[5], lane);
            held = how == "NE" ? held || below : same ? below : held && how != "EQ";
        }
        const bool other = predicate(warp, one[4], lane);
        write_predicate(warp, one[0], lane, joined(one, held, other));
        write_predicate(warp, one[1], lane, joined(one, !held, other));
    });
}

inline void lea(Warp& warp, const Instruction& one) {
    const bool high = one.has("HI"), extended = one.has("SX32"), carry = one.has("X");
    const int from = one.sources, shift_at = from + (high && !extended ? 3 : 2);
    require(one.count() == shift_at + 1u + carry && from <= 2, "operands");
    require(!one[from].negated || from == 1, "a carry of a negated address");
    each(warp, [&](int lane) {
        const uint32_t low = word(warp, one[from], lane), shift = word(warp, one[shift_at], lane);
        uint64_t value = low;
        if (high) {
            value = extended ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(low)))
                             : low | static_cast<uint64_t>(word(warp, one[from + 2], lane)) << 32;
            value = (value << shift) >> 32;
        } else {
            value <<= shift;
        }
        uint64_t sum = (value & kAll) + carried(warp, one[from + 1], lane);
        if (carry) sum += predicate(warp, one[shift_at + 1], lane);
        write(warp, one[0], lane, static_cast<uint32_t>(sum));
        if (from == 2) write_predicate(warp, one[1], lane, sum >> 32);
    });
}

// Of three values the function whose table of values is given, bit by bit.
inline uint32_t by_table(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t value = 0;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) value |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return value;
}

inline void lop3(Warp& warp, const Instruction& one) {
    const int to = one[0].kind == kPredicate || one[0].kind == kUniformPredicate;
    require(one.count() == to + 6u, "operands");
    each(warp, [&](int lane) {
        const uint32_t value = by_table(word(warp, one[to + 1], lane), word(warp, one[to + 2], lane),
                                        word(warp, one[to + 3], lane), one[to + 4].value);
        write(warp, one[to], lane, value);
        if (to) write_predicate(warp, one[0], lane, value || predicate(warp, one[to + 5], lane));
    });
}

inline void plop3(Warp& warp, const Instruction& one) {
    require(one.count() == 7, "operands");
    each(warp, [&](int lane) {
        const int place =
            4 * predicate(warp, one[2], lane) + 2 * predicate(warp, one[3], lane) + predicate(warp, one[4], lane);
        write_predicate(warp, one[0], lane, one[5].value >> place & 1);
        write_predicate(warp, one[1], lane, one[6].value >> place & 1);
    });
}

inline void sel(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        write(warp, one[0], lane, word(warp, predicate(warp, one[3], lane) ? one[1] : one[2], lane));
    });
}

inline void sgxt(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const uint32_t bits = std::min<uint32_t>(word(warp, one[2], lane), 32);
        uint64_t value = word(warp, one[1], lane) & ((1ull << bits) - 1);
        if (!one.has("U32") && bits) {
            const uint64_t sign = 1ull << (bits - 1);
            value = (value ^ sign) - sign;
        }
        write(warp, one[0], lane, static_cast<uint32_t>(value));
    });
}

inline void shf(Warp& warp, const Instruction& one) {
    const bool wide = one.has("U64") || one.has("S64"), left = one.has("L"),
               is_signed = one.has("S32") || one.has("S64");
    each(warp, [&](int lane) {
        const uint64_t both = word(warp, one[1], lane) | static_cast<uint64_t>(word(warp, one[3], lane)) << 32;
        const uint32_t asked = word(warp, one[2], lane), most = wide ? 64 : 32;
        const uint32_t by = one.has("W") ? asked & (most - 1) : std::min(asked, most), kept = std::min(by, 63u);
        uint64_t value;
        if (left)
            value = by > 63 ? 0 : both << by;
        else if (is_signed)
            value = static_cast<uint64_t>(static_cast<int64_t>(both) >> kept);
        else
            value = by > 63 ? 0 : both >> by;
        write(warp, one[0], lane, static_cast<uint32_t>(one.has("HI") ? value >> 32 : value));
    });
}

inline void prmt(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const uint64_t both = word(warp, one[1], lane) | static_cast<uint64_t>(word(warp, one[3], lane)) << 32;
        const uint32_t picks = word(warp, one[2], lane);
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            const uint32_t pick = picks >> 4 * i & 15;
            uint32_t byte = both >> 8 * (pick & 7) & 255;
            if (pick & 8) byte = byte & 128 ? 255 : 0;
            value |= byte << 8 * i;
        }
        write(warp, one[0], lane, value);
    });
}

inline void mov(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) { write(warp, one[0], lane, word(warp, one[1], lane)); });
}

inline void popc(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        write(warp, one[0], lane, static_cast<uint32_t>(__builtin_popcount(word(warp, one[1], lane))));
    });
}

inline uint32_t special(const Warp& warp, const std::string& name, int lane) {
    if (name == "SR_TID.X") return kLanes * warp.number + lane;
    if (name == "SR_LANEID") return lane;
    if (name.rfind("SR_CTAID.", 0) == 0) return static_cast<uint32_t>(warp.block->place[name.back() - 'X']);
    require(name == "SR_TID.Y" || name == "SR_TID.Z" || name == "SR_CgaCtaId", "special register " + name);
    return 0;
}

inline void s2r(Warp& warp, const Instruction& one) {
    const std::string& name = one[1].name;
    require(one.opcode == "S2R" || (name != "SR_TID.X" && name != "SR_LANEID"), "threads differ in " + name);
    each(warp, [&](int lane) { write(warp, one[0], lane, special(warp, name, lane)); });
}

inline void cs2r(Warp& warp, const Instruction& one) {
    require(one[1].name == "SRZ", "special register " + one[1].name);
    each(warp, [&](int lane) {
        write(warp, one[0], lane, 0u);
        if (!one.has("32")) write(warp, one[0], lane, 0u, 1);
    });
}

inline int first_lane(const Warp& warp) { return __builtin_ctz(warp.mask); }

inline void r2ur(Warp& warp, const Instruction& one) {
    const uint32_t value = word(warp, one[1], first_lane(warp));
    each(warp, [&](int lane) { require(word(warp, one[1], lane) == value, "threads differ in a uniform value"); });
    write(warp, one[0], 0, value);
}

inline void redux(Warp& warp, const Instruction& one) {
    require(one.has("S32"), "unsigned");
    int32_t found = integer(warp, one[1], first_lane(warp));
    each(warp, [&](int lane) {
        const int32_t other = integer(warp, one[1], lane);
        found = one.has("MAX") ? std::max(found, other) : std::min(found, other);
    });
    write(warp, one[0], 0, static_cast<uint32_t>(found));
}

inline void voteu(Warp& warp, const Instruction& one) {
    require(one.count() == 2, "operands");
    bool any = false, all = true;
    each(warp, [&](int lane) {
        const bool held = predicate(warp, one[1], lane);
        any |= held;
        all &= held;
    });
    write_predicate(warp, one[0], 0, one.has("ANY") ? any : all);
}

inline void elect(Warp& warp, const Instruction& one) {
    require(one[1].kind == kUniform && one[1].index == kUniformZero, "operands");
    each(warp, [&](int lane) { write_predicate(warp, one[0], lane, lane == first_lane(warp)); });
}

// Predicates as the bits of a register; the mask says which.
inline void p2r(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        uint32_t held = 0;
        for (int i = 0; i < kTrue; ++i)
            held |= static_cast<uint32_t>(warp.on_uniform ? warp.uniform_predicates[i] : warp.predicates[i] >> lane & 1)
                    << i;
        const uint32_t mask = one[3].value;
        write(warp, one[0], lane, (word(warp, one[2], lane) & ~mask) | (held & mask));
    });
}

inline void r2p(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) {
        const uint32_t held = word(warp, one[1], lane);
        for (int i = 0; i < kTrue; ++i) {
            const Operand to{kPredicate, false, false, false, false, -1, i, -1, 0, ""};
            if (one[2].value >> i & 1) write_predicate(warp, to, lane, held >> i & 1);
        }
    });
}

// The last operand's upper bits are those of a lane's number that say to which part of the warp it belongs.
inline void shfl(Warp& warp, const Instruction& one) {
    const bool crossed = one.has("BFLY");
    const uint32_t part = one[4].value >> 8;
    require((crossed || one.has("IDX")) && one[0].index == kTrue && (one[4].value & 0xff) == 0x1f && part < kLanes,
            "a shuffle of another kind");
    uint32_t given[kLanes], from[kLanes];
    each(warp, [&](int lane) {
        const uint32_t asked = word(warp, one[3], lane);
        given[lane] = word(warp, one[2], lane);
        from[lane] = crossed ? lane ^ asked : (lane & part) | (asked & 31 & ~part);
        require(from[lane] < kLanes && warp.mask >> from[lane] & 1, "a shuffle from a thread that is not there");
        require(((from[lane] ^ lane) & part) == 0, "a shuffle across parts of a warp");
    });
    each(warp, [&](int lane) { write(warp, one[1], lane, given[from[lane]]); });
}

inline const std::map<std::string, Opcode> kIntegers = {
    {"IADD3", {iadd3, "X 64"}},
    {"VIADD", {viadd, ""}},
    {"VIADDMNMX", {viaddmnmx, "U32"}},
    {"VIMNMX", {vimnmx, "U32"}},
    {"VIMNMX3", {vimnmx, "U32"}},
    {"IMNMX", {vimnmx, "U32"}},
    {"IABS", {iabs, ""}},
    {"IMAD", {imad, "MOV U32 SHL IADD X WIDE HI"}},
    {"ISETP", {isetp, "U32 AND OR XOR EX EQ NE LT LE GT GE"}},
    {"LEA", {lea, "HI X SX32"}},
    {"LOP3", {lop3, "LUT"}},
    {"PLOP3", {plop3, "LUT"}},
    {"SEL", {sel, ""}},
    {"SGXT", {sgxt, "U32"}},
    {"SHF", {shf, "L R U32 S32 U64 S64 HI W"}},
    {"PRMT", {prmt, ""}},
    {"MOV", {mov, "32"}},
    {"POPC", {popc, ""}},
    {"S2R", {s2r, ""}},
    {"S2UR", {s2r, ""}},
    {"CS2R", {cs2r, "32"}},
    {"R2UR", {r2ur, ""}},
    {"REDUX", {redux, "MAX MIN S32"}},
    {"VOTEU", {voteu, "ANY ALL"}},
    {"ELECT", {elect, ""}},
    {"P2R", {p2r, ""}},
    {"P2UR", {p2r, ""}},
    {"R2P", {r2p, ""}},
    {"SHFL", {shfl, "BFLY IDX"}},
};

}  // namespace machine
