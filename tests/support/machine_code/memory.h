// Constants, the tensors' memory, shared memory and the threads' own.
#pragma once
#include "block.h"

namespace machine {

inline int bytes_of(const Instruction& one) {
    if (one.has("128")) return 16;
    if (one.has("64")) return 8;
    if (one.has("U16") || one.has("S16")) return 2;
    return one.has("U8") || one.has("S8") ? 1 : 4;
}

inline uint64_t address(const Warp& warp, const Operand& at, int lane) {
    require(at.kind == kAddress, "no address");
    if (at.wide) {
        uint64_t sum = at.value;
        if (at.index != kZero)
            sum += warp.registers[at.index][lane] | static_cast<uint64_t>(warp.registers[at.index + 1][lane]) << 32;
        if (at.uniform != kUniformZero)
            sum += warp.uniform[at.uniform] | static_cast<uint64_t>(warp.uniform[at.uniform + 1]) << 32;
        return sum;
    }
    uint32_t sum = static_cast<uint32_t>(at.value);
    if (at.index != kZero) sum += warp.registers[at.index][lane];
    if (at.uniform != kUniformZero) sum += warp.uniform[at.uniform];
    return sum;
}

// Into registers from bytes, and back; less than four are extended.
inline void into(Warp& warp, const Instruction& one, const Operand& to, int lane, const uint8_t* from) {
    const int size = bytes_of(one);
    require(size <= 4 || to.index == kZero || to.index % (size / 4) == 0, "misaligned registers");
    for (int i = 0; i < std::max(1, size / 4); ++i) {
        uint32_t value = 0;
        memcpy(&value, from + 4 * i, std::min(size, 4));
        if (one.has("S16")) value = static_cast<uint32_t>(static_cast<int16_t>(value));
        if (one.has("S8")) value = static_cast<uint32_t>(static_cast<int8_t>(value));
        write(warp, to, lane, value, i);
    }
}

inline void out_of(const Warp& warp, const Operand& from, int lane, int size, uint8_t* to) {
    require(size <= 4 || from.index == kZero || from.index % (size / 4) == 0, "misaligned registers");
    for (int i = 0; i < std::max(1, size / 4); ++i) {
        const uint32_t value = raw(warp, from, lane, i);
        memcpy(to + 4 * i, &value, std::min(size, 4));
    }
}

inline void ldc(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) { into(warp, one, one[0], lane, constant(warp, one[1], lane, bytes_of(one))); });
}

inline void ldg(Warp& warp, const Instruction& one) {
    require(one.count() == 2 && one[1].wide, "operands");
    const int size = bytes_of(one);
    each(warp, [&](int lane) {
        into(warp, one, one[0], lane, warp.block->launch.memory(address(warp, one[1], lane), size, "load"));
    });
}

inline void stg(Warp& warp, const Instruction& one) {
    require(one.count() == 2 && one[0].wide, "operands");
    const int size = bytes_of(one);
    each(warp, [&](int lane) {
        out_of(warp, one[1], lane, size, warp.block->launch.memory(address(warp, one[0], lane), size, "store"));
    });
}

inline void lds(Warp& warp, const Instruction& one) {
    require(one.count() == 2, "operands");
    const int size = bytes_of(one);
    each(warp, [&](int lane) {
        uint8_t bytes[16];
        warp.block->read_shared(warp, address(warp, one[1], lane), bytes, size);
        into(warp, one, one[0], lane, bytes);
    });
}

inline void sts(Warp& warp, const Instruction& one) {
    require(one.count() == 2, "operands");
    const int size = bytes_of(one);
    each(warp, [&](int lane) {
        uint8_t bytes[16];
        out_of(warp, one[1], lane, size, bytes);
        warp.block->write_shared(warp, address(warp, one[0], lane), bytes, size);
    });
}

inline uint8_t* in_stack(Warp& warp, const Operand& at, int lane, int size) {
    std::vector<uint8_t>& stack = warp.block->stacks[kLanes * warp.number + lane];
    if (stack.empty()) stack.assign(kStackSize, kUnwrittenByte);
    const uint64_t place = address(warp, at, lane);
    require(place >= kStackEnd - kStackSize && place + size <= kStackEnd && place % size == 0,
            "outside of the thread's own memory: " + hex(place));
    return stack.data() + (place - (kStackEnd - kStackSize));
}

inline void ldl(Warp& warp, const Instruction& one) {
    each(warp, [&](int lane) { into(warp, one, one[0], lane, in_stack(warp, one[1], lane, bytes_of(one))); });
}

inline void stl(Warp& warp, const Instruction& one) {
    each(warp,
         [&](int lane) { out_of(warp, one[1], lane, bytes_of(one), in_stack(warp, one[0], lane, bytes_of(one))); });
}

// Matrices of 8 x 8 numbers of 16 bits: thread 8 i + r has the address of the i-th one's row r, and each thread two
// neighbours of a row, or transposed of a column.
inline void matrices(Warp& warp, const Instruction& one, bool loads) {
    whole_warp(warp);
    require(one.has("16") && one.count() == 2, "a matrix of another kind");
    const Operand &at = one[loads], &held = one[!loads];
    const bool transposed = one.has("MT88");
    const int count = one.has("4") ? 4 : one.has("2") ? 2 : 1;
    require(held.index % count == 0, "misaligned registers");
    uint64_t rows[kLanes];  // read before the registers are written that hold them
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = address(warp, at, lane);
    for (int i = 0; i < count; ++i) {
        uint16_t matrix[8][8];
        const auto entry = [&](int lane, int which) -> uint16_t& {
            const int row = lane / 4, column = 2 * (lane % 4) + which;
            return transposed ? matrix[column][row] : matrix[row][column];
        };
        if (loads) {
            for (int row = 0; row < 8; ++row)
                warp.block->read_shared(warp, rows[8 * i + row], matrix[row], sizeof matrix[row]);
            for (int lane = 0; lane < kLanes; ++lane)
                write(warp, held, lane, static_cast<uint32_t>(entry(lane, 0) | entry(lane, 1) << 16), i);
        } else {
            for (int lane = 0; lane < kLanes; ++lane)
                for (int which = 0; which < 2; ++which)
                    entry(lane, which) = static_cast<uint16_t>(raw(warp, held, lane, i) >> 16 * which);
            for (int row = 0; row < 8; ++row)
                warp.block->write_shared(warp, rows[8 * i + row], reinterpret_cast<const uint8_t*>(matrix[row]),
                                         sizeof matrix[row]);
        }
    }
}

inline void ldsm(Warp& warp, const Instruction& one) { matrices(warp, one, true); }
inline void stsm(Warp& warp, const Instruction& one) { matrices(warp, one, false); }

inline const std::map<std::string, Opcode> kMemory = {
    {"LDC", {ldc, "64 U8 U16 S8 S16"}},
    {"LDG", {ldg, "E 128 64 U16 U8 S8 S16 CONSTANT STRONG GPU EF EL NA LTC128B"}},
    // Of an address that may be any memory's: that of a tensor.
    {"LD", {ldg, "E 128 64 U16 U8 S8 S16"}},
    {"ST", {stg, "E 128 64 U16 U8"}},
    {"STG", {stg, "E 128 64 U16 U8 EF"}},
    {"LDS", {lds, "128 64 U16 U8 S8 S16"}},
    {"STS", {sts, "128 64 U16 U8"}},
    {"LDL", {ldl, "128 64 U16 U8 LU"}},
    {"STL", {stl, "128 64 U16 U8"}},
    {"LDSM", {ldsm, "16 M88 MT88 2 4"}},
    {"STSM", {stsm, "16 M88 MT88 2 4"}},
};

}  // namespace machine
