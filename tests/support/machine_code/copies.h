// Copies that run beside the program: of each thread (cp.async), and the copy engine's tiles (TMA) with the barriers
// that count them.
#pragma once
#include "memory.h"
#include "products.h"

namespace machine {

inline void ldgsts(Warp& warp, const Instruction& one) {
    const int size = bytes_of(one);
    require(one.count() <= 3 && one[1].wide && !one[0].wide, "operands");
    each(warp, [&](int lane) {
        Copy copy{static_cast<uint32_t>(address(warp, one[0], lane)), std::vector<uint8_t>(size)};
        if (one.count() < 3 || predicate(warp, one[2], lane))  // else zeros
            memcpy(copy.bytes.data(), warp.block->launch.memory(address(warp, one[1], lane), size, "copy"), size);
        warp.block->write_shared(warp, copy.to, warp.block->late() ? nullptr : copy.bytes.data(), size);
        if (warp.block->late()) warp.copies.open.push_back(std::move(copy));
    });
}

inline void ldgdepbar(Warp& warp, const Instruction&) { warp.copies.close(); }

// A byte of the tile in shared memory, and of the matrix that it is of; null outside of that.
template <typename Function>
void each_of_tile(const Map& map, int32_t x, int32_t y, uint32_t tile, Function function) {
    const int64_t row_bytes = map.box[1] * map.width;
    require(map.swizzle == 0 || row_bytes == map.swizzle, "a row of the tile of another size");
    require(tile % 128 == 0 && (map.swizzle == 0 || tile % (8 * map.swizzle) == 0), "a misaligned tile");
    for (int64_t i = 0; i < map.box[0]; ++i)
        for (int64_t j = 0; j < map.box[1]; ++j) {
            const int64_t row = y + i, column = x + j;
            const bool inside = row >= 0 && row < map.sizes[0] && column >= 0 && column < map.sizes[1];
            uint32_t at = tile + static_cast<uint32_t>(i * row_bytes + j * map.width);
            at = permuted(at, static_cast<int>(map.swizzle));
            function(at, inside ? map.base + row * map.stride + column * map.width : 0);
        }
}

inline void turn(Block& block, Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    for (Warp& warp : block.warps) warp.spinning = 0;
}

inline Barrier& barrier_at(Block& block, uint32_t at) {
    auto found = block.arrivals.find(at);
    require(found != block.arrivals.end(), "no barrier at " + hex(at));
    return found->second;
}

inline bool Block::land() {
    if (transfers.empty()) return false;
    const Transfer one = transfers.front();
    transfers.pop_front();
    Barrier& barrier = barrier_at(*this, one.barrier);
    each_of_tile(*one.map, one.x, one.y, one.to, [&](uint32_t to, uint64_t from) {
        uint8_t bytes[16] = {};
        if (from) memcpy(bytes, launch.memory(from, one.map->width, "copy of a tile"), one.map->width);
        land_shared(to, bytes, one.map->width);
        barrier.bytes -= one.map->width;
    });
    turn(*this, barrier);
    return true;
}

inline const Map& map_at(const Warp& warp, int at) {
    const uint64_t address = warp.uniform[at] | static_cast<uint64_t>(warp.uniform[at + 1]) << 32;
    for (const Map& map : warp.block->launch.maps)
        if (map.at == address) return map;
    throw Fault("no descriptor at " + hex(address));
}

inline void utmaldg(Warp& warp, const Instruction& one) {
    require(one.count() == 2 && one.has("2D"), "operands");
    const uint32_t* given = warp.uniform + one[0].uniform;
    const Transfer transfer{&map_at(warp, one[1].uniform), static_cast<int32_t>(given[2]),
                            static_cast<int32_t>(given[3]), given[0], given[1]};
    each_of_tile(*transfer.map, transfer.x, transfer.y, transfer.to,
                 [&](uint32_t to, uint64_t) { warp.block->write_shared(warp, to, nullptr, transfer.map->width); });
    warp.block->transfers.push_back(transfer);
    if (!warp.block->late()) warp.block->land();
}

inline void store_tile(Warp& warp, const Store& one) {
    each_of_tile(*one.map, one.x, one.y, one.from, [&](uint32_t from, uint64_t to) {
        if (!to) return;
        warp.block->read_shared(warp, from, warp.block->launch.memory(to, one.map->width, "store of a tile"),
                                one.map->width);
    });
}

inline void utmastg(Warp& warp, const Instruction& one) {
    require(one.count() == 2 && one.has("2D"), "operands");
    const uint32_t* given = warp.uniform + one[0].uniform;
    const Store store{&map_at(warp, one[1].uniform), static_cast<int32_t>(given[1]), static_cast<int32_t>(given[2]),
                      given[0]};
    if (warp.block->late())
        warp.stores.open.push_back(store);
    else
        store_tile(warp, store);
}

inline void utmacmdflush(Warp& warp, const Instruction&) { warp.stores.close(); }

inline void depbar(Warp& warp, const Instruction& one) {
    require(one.count() == 2 && one[0].name == "SB0", "a wait of another kind");
    for (; static_cast<int64_t>(warp.copies.closed.size()) > one[1].value; warp.copies.closed.pop_front())
        for (const Copy& copy : warp.copies.closed.front())
            warp.block->write_shared(warp, copy.to, copy.bytes.data(), copy.bytes.size());
    for (; static_cast<int64_t>(warp.stores.closed.size()) > one[1].value; warp.stores.closed.pop_front())
        for (const Store& store : warp.stores.closed.front()) store_tile(warp, store);
}

inline void syncs(Warp& warp, const Instruction& one) {
    Block& block = *warp.block;
    const std::string& what = one.modifiers[0];
    if (what == "EXCH") {  // a new barrier, with its count in a word of its own making
        const uint32_t low = raw(warp, one[2], 0), high = raw(warp, one[2], 0, 1);
        const int64_t count = 0x100000 - (low >> 1);
        require(count > 0 && count <= 1024 && high == static_cast<uint32_t>((0x100000 - count) << 11),
                "a new barrier's word");
        const uint32_t at = static_cast<uint32_t>(address(warp, one[1], 0));
        require(block.arrivals.emplace(at, Barrier{count, count}).second, "a barrier anew at " + hex(at));
        return;
    }
    each(warp, [&](int lane) {
        const uint32_t at = static_cast<uint32_t>(address(warp, one[what == "CCTL" ? 0 : 1], lane));
        Barrier& barrier = barrier_at(block, at);
        if (what == "CCTL") {
            require(one.has("IV") && !barrier.bytes, "a barrier's end before its bytes came");
            block.arrivals.erase(at);
        } else if (what == "ARRIVE") {
            const int64_t bytes = word(warp, one[2], lane);
            require(one.has("TRANS64") && barrier.pending > 0 && bytes > 0 && bytes <= 262144, "an arrival");
            barrier.bytes += bytes;
            --barrier.pending;
            turn(block, barrier);
        } else {
            require(what == "PHASECHK" && one.has("TRYWAIT"), "a barrier's " + what);
            const uint32_t asked = word(warp, one[2], lane);
            const bool past = (barrier.phase & 1) != asked >> 31;
            require(!(asked & 0x7fffffff), "a phase " + hex(asked));
            write_predicate(warp, one[0], lane, past);
            if (!past) warp.spinning |= 1u << lane;
        }
    });
}

inline const std::map<std::string, Opcode> kCopies = {
    {"LDGSTS", {ldgsts, "E BYPASS 128 64 LTC128B"}},
    {"LDGDEPBAR", {ldgdepbar, ""}},
    {"DEPBAR", {depbar, "LE"}},
    {"UTMALDG", {utmaldg, "2D"}},
    {"UTMASTG", {utmastg, "2D"}},
    {"UTMACMDFLUSH", {utmacmdflush, ""}},
    {"SYNCS", {syncs, "*", true}},
};

}  // namespace machine
