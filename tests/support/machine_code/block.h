// A block of threads on a multiprocessor: its registers and memories, and how instructions reach them.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool held, const std::string& otherwise) {
    if (!held) throw Fault(otherwise);
}

inline std::string hex(uint64_t value) {
    char text[20];
    snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
    return text;
}

template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

constexpr int kLanes = 32, kZero = 255, kUniformZero = 63, kTrue = 7;
constexpr int kMeetings = 17;  // BSSY's sixteen, and WARPSYNC's
constexpr uint32_t kAll = 0xffffffff, kUnwritten = 0xdeadbeef, kInFlight = 0x7fc0dead;
constexpr uint32_t kSharedBegin = 0x400;                       // what lies below is the system's
constexpr uint32_t kStackEnd = 0xfffdc0, kStackSize = 0x3000;  // of the memory that each thread has to itself
constexpr uint8_t kUnwrittenByte = 0xcd;

enum Kind : char {
    kRegister = 'R',
    kUniform = 'U',
    kPredicate = 'P',
    kUniformPredicate = 'Q',
    kImmediate = 'I',
    kFloat = 'F',  // an immediate written as a number; the value is float32's bits
    kConstant = 'C',
    kAddress = 'A',
    kMatrix = 'D',  // the descriptors of a product's factors
    kName = 'N',
};

struct Operand {
    char kind;
    bool negated, inverted, absolute, wide;  // inverted: not, of a predicate
    int half, index, uniform;                // -1 for none
    int64_t value;
    std::string name;
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

struct Opcode {
    Handler run;
    std::string modifiers;  // those it knows; "*" where it looks itself
    bool moves = false;     // whether it decides what the warp does next
};

struct Instruction {
    int64_t at;
    std::string opcode, text;
    std::vector<std::string> modifiers;
    bool guarded, uniform;  // uniform: of the datapath that works once for a warp
    Operand guard;
    std::vector<Operand> operands;
    int target;
    int sources;  // the first operand behind the result and the predicates that are results
    Handler run;
    bool moves;

    bool has(const char* modifier) const {
        for (const std::string& one : modifiers)
            if (one == modifier) return true;
        return false;
    }
    const Operand& operator[](size_t number) const {
        require(number < operands.size(), "an operand is missing");
        return operands[number];
    }
    size_t count() const { return operands.size(); }
};

// A tensor's bytes, from its first element to its last.
struct Extent {
    uint64_t begin, end;
};

// What a descriptor in the parameters tells the copy engine; sizes and the box in elements, the outer dimension first.
struct Map {
    uint64_t at, base;
    int64_t sizes[2], stride, width;  // of a row and of an element, in bytes
    int64_t box[2], swizzle;          // bytes of a row that are permuted, 0 for none
};

// How what the processor leaves open is decided: whether the asynchronous is done when it is asked for or as late as
// the program waits, and whether the warps go on in turn, the first ahead or the last ahead.
struct Order {
    int64_t late, ahead;
};

struct Program {
    std::vector<Instruction> code;
    std::map<int64_t, int> numbers;  // by address
};

struct Launch {
    const Program* program;
    std::vector<Extent> extents;
    std::vector<Map> maps;
    std::vector<uint8_t> constants;
    Order order;
    int64_t warps, shared;

    uint8_t* memory(uint64_t address, uint64_t size, const char* what) const {
        require(address % size == 0, std::string("a misaligned ") + what + " at " + hex(address));
        auto after = std::upper_bound(extents.begin(), extents.end(), address,
                                      [](uint64_t one, const Extent& extent) { return one < extent.begin; });
        require(after != extents.begin() && address + size <= (after - 1)->end,
                std::string("a ") + what + " of " + std::to_string(size) + " bytes at " + hex(address) +
                    ", outside of the launch's tensors");
        return reinterpret_cast<uint8_t*>(address);
    }
};

// Copies to shared memory (cp.async) and from it (the copy engine's) that a warp asked for, and when it waits for them.
struct Copy {
    uint32_t to;
    std::vector<uint8_t> bytes;
};

struct Store {
    const Map* map;
    int32_t x, y;
    uint32_t from;
};

struct Product {
    int accumulator, columns, depth,
        first;  // first: the register where the first factor begins, -1 where it is in shared memory
    uint64_t first_descriptor, second_descriptor;
    char kind;  // 'b' bfloat16, 'h' float16, 't' tf32
    bool adds, first_transposed, second_transposed;
};

template <typename One>
struct Groups {
    std::vector<One> open;
    std::deque<std::vector<One>> closed;

    void close() {
        closed.push_back(std::move(open));
        open.clear();
    }
};

struct Warp {
    struct Block* block;
    int number;
    uint32_t registers[kZero + 9][kLanes], uniform[kUniformZero + 3], predicates[kTrue + 1];
    bool uniform_predicates[kTrue + 1];
    int place[kLanes];
    uint32_t done = 0, waiting = 0, spinning = 0;          // lanes, a bit each
    uint32_t parted[kMeetings] = {}, met[kMeetings] = {};  // lanes: that meet again, and those of them that wait there
    uint32_t mask = 0;                                     // the lanes that the instruction is done for
    bool on_uniform = false;                               // whether the uniform datapath does it
    Groups<Copy> copies;
    Groups<Store> stores;
    Groups<Product> products;
    std::map<int, std::vector<uint32_t>> accumulators;  // of products in flight, by their first register

    uint32_t runnable() const {
        uint32_t held = done | waiting | spinning;
        for (uint32_t lanes : met) held |= lanes;
        return ~held;
    }

    // Those who wait for each other at a place of a number go on when all are there who have not ended.
    void meet() {
        for (int i = 0; i < kMeetings; ++i)
            if ((met[i] | done) == (parted[i] | done)) met[i] = 0;
    }
};

struct Barrier {
    int64_t count, pending, bytes = 0;
    uint64_t phase = 0;
};

struct Transfer {
    const Map* map;
    int32_t x, y;
    uint32_t to, barrier;
};

// Who touched a byte of shared memory since the last barrier of all: warps, a bit each.
struct Touched {
    uint64_t since = 0;
    uint32_t readers = 0, writers = 0;
};

struct Block {
    const Launch& launch;
    int64_t place[3];  // in the grid
    std::vector<uint8_t> shared;
    std::vector<Touched> touched;
    uint64_t barriers = 1;  // of all threads, so far
    std::vector<Warp> warps;
    std::vector<std::vector<uint8_t>> stacks;
    std::map<uint32_t, Barrier> arrivals;
    std::deque<Transfer> transfers;

    explicit Block(const Launch& launch)
        : launch(launch),
          shared(kSharedBegin + launch.shared, kUnwrittenByte),
          touched(shared.size()),
          warps(launch.warps),
          stacks(kLanes * launch.warps) {
        for (size_t number = 0; number < warps.size(); ++number) {
            Warp& warp = warps[number];
            warp.block = this;
            warp.number = static_cast<int>(number);
            std::fill_n(warp.registers[0], kZero * kLanes, kUnwritten);
            std::fill_n(warp.registers[kZero], 9 * kLanes, 0);
            std::fill_n(warp.uniform, kUniformZero, kUnwritten);
            std::fill_n(warp.uniform + kUniformZero, 3, 0);
            std::fill_n(warp.predicates, kTrue, 0);
            std::fill_n(warp.uniform_predicates, kTrue, false);
            warp.predicates[kTrue] = kAll;
            warp.uniform_predicates[kTrue] = true;
            std::fill_n(warp.place, kLanes, 0);
        }
    }

    bool late() const { return launch.order.late != 0; }

    uint8_t* in_shared(uint64_t address, uint64_t size) {
        require(address >= kSharedBegin && address + size <= shared.size(),
                "shared memory at " + hex(address) + ", outside of the block's");
        require(address % size == 0, "misaligned in shared memory: " + hex(address));
        return shared.data() + address;
    }

    void read_shared(const Warp& warp, uint64_t address, void* to, uint64_t size) {
        memcpy(to, in_shared(address, size), size);
        const uint32_t own = 1u << warp.number;
        for (uint64_t i = address; i < address + size; ++i) {
            Touched& byte = fresh(i);
            require(!byte.writers || (byte.writers & own), race(warp, i, "reads", "wrote"));
            byte.readers |= own;
        }
    }

    // ``from`` null: nothing yet, where a copy is to come.
    void write_shared(const Warp& warp, uint64_t address, const uint8_t* from, uint64_t size) {
        uint8_t* to = in_shared(address, size);
        const uint32_t own = 1u << warp.number;
        for (uint64_t i = 0; i < size; ++i) {
            Touched& byte = fresh(address + i);
            const bool same = from && to[i] == from[i];  // threads that hold the same write it more than once
            require(same || !((byte.readers | byte.writers) & ~own), race(warp, address + i, "writes", "touched"));
            byte.writers |= own;
            to[i] = from ? from[i] : kUnwrittenByte;
        }
    }

    // The copy engine's bytes: whoever waited for its barrier may read them.
    void land_shared(uint64_t address, const uint8_t* from, uint64_t size) {
        memcpy(in_shared(address, size), from, size);
        for (uint64_t i = address; i < address + size; ++i) touched[i] = Touched{barriers, 0, 0};
    }

    bool land();  // the oldest transfer, if there is one

  private:
    Touched& fresh(uint64_t address) {
        Touched& byte = touched[address];
        if (byte.since != barriers) byte = Touched{barriers, 0, 0};
        return byte;
    }

    static std::string race(const Warp& warp, uint64_t address, const char* does, const char* did) {
        return "a race: warp " + std::to_string(warp.number) + " " + does + " shared memory at " + hex(address) +
               " that another warp " + did + " since the last barrier";
    }
};

// The lanes that the instruction is done for; one for all where the uniform datapath does it.
template <typename Function>
void each(const Warp& warp, Function function) {
    if (warp.on_uniform) return function(0);
    for (int lane = 0; lane < kLanes; ++lane)
        if (warp.mask >> lane & 1) function(lane);
}

// So many bytes of the bank of constants, where an operand says and its register beyond that.
inline const uint8_t* constant(const Warp& warp, const Operand& from, int lane, uint64_t size, uint64_t after = 0) {
    require(from.kind == kConstant && (from.index < 0 || !warp.on_uniform), "no constant");
    const std::vector<uint8_t>& constants = warp.block->launch.constants;
    uint64_t at = from.value + after;
    if (from.index >= 0) at += static_cast<int32_t>(warp.registers[from.index][lane]);
    if (from.uniform >= 0) at += static_cast<int32_t>(warp.uniform[from.uniform]);
    require(at % size == 0 && at + size <= constants.size(), "outside of the constants, or misaligned: " + hex(at));
    return constants.data() + at;
}

// The bits of an operand, or of the register so many after it.
inline uint32_t raw(const Warp& warp, const Operand& from, int lane, int after = 0) {
    switch (from.kind) {
        case kRegister:
            require(!warp.on_uniform, "a thread's register on the uniform datapath");
            return from.index == kZero ? 0 : warp.registers[from.index + after][lane];
        case kUniform:
            return from.index == kUniformZero ? 0 : warp.uniform[from.index + after];
        case kImmediate:
        case kFloat:
            require(after == 0, "a pair of immediates");
            return static_cast<uint32_t>(from.value);
        case kConstant: {
            uint32_t value;
            memcpy(&value, constant(warp, from, lane, 4, 4 * after), sizeof value);
            return value;
        }
        case kName:
            if (from.name == "SRZ") return 0;
    }
    throw Fault("no number: an operand of kind " + std::string(1, from.kind));
}

inline uint32_t word(const Warp& warp, const Operand& from, int lane) {
    require(!from.absolute && from.half < 0, "no integer");
    uint32_t value = raw(warp, from, lane);
    if (from.negated) value = 0 - value;
    return from.inverted ? ~value : value;
}

inline int32_t integer(const Warp& warp, const Operand& from, int lane) {
    return static_cast<int32_t>(word(warp, from, lane));
}

// With the carry that a negation has: of zero, 2 ** 32.
inline uint64_t carried(const Warp& warp, const Operand& from, int lane) {
    uint64_t value = raw(warp, from, lane);
    if (from.negated) value = (value ^ kAll) + 1;
    return from.inverted ? value ^ kAll : value;
}

inline uint64_t pair(const Warp& warp, const Operand& from, int lane) {
    if (from.kind == kImmediate) {  // its sign fills the upper half
        const int64_t value = static_cast<int32_t>(from.value);
        return static_cast<uint64_t>(value);
    }
    const bool even =
        from.kind == kConstant || from.index % 2 == 0 || from.index == kZero || from.index == kUniformZero;
    require(even, "an odd register pair");
    uint64_t value = raw(warp, from, lane) | static_cast<uint64_t>(raw(warp, from, lane, 1)) << 32;
    if (from.negated) value = 0 - value;
    return from.inverted ? ~value : value;
}

inline float number(const Warp& warp, const Operand& from, int lane) {
    require(from.half < 0 && !from.inverted, "no float32");
    uint32_t value = raw(warp, from, lane);
    if (from.absolute) value &= 0x7fffffff;
    if (from.negated) value ^= 0x80000000;
    return bits_as<float>(value);
}

inline bool predicate(const Warp& warp, const Operand& from, int lane) {
    bool value;
    if (from.kind == kPredicate) {
        require(!warp.on_uniform || from.index == kTrue, "a thread's predicate on the uniform datapath");
        value = warp.predicates[from.index] >> lane & 1;
    } else {
        require(from.kind == kUniformPredicate, "no predicate");
        value = warp.uniform_predicates[from.index];
    }
    return value != from.inverted;
}

inline void write(Warp& warp, const Operand& to, int lane, uint32_t value, int after = 0) {
    if (to.kind == kRegister) {
        require(!warp.on_uniform, "the uniform datapath writes a thread's register");
        if (to.index != kZero) warp.registers[to.index + after][lane] = value;
    } else {
        require(to.kind == kUniform, "no register to write to");
        if (to.index != kUniformZero) warp.uniform[to.index + after] = value;
    }
}

inline void write(Warp& warp, const Operand& to, int lane, float value) {
    write(warp, to, lane, bits_as<uint32_t>(value));
}

inline void write_pair(Warp& warp, const Operand& to, int lane, uint64_t value) {
    require(to.index % 2 == 0 || to.index == kZero || to.index == kUniformZero, "an odd register pair");
    write(warp, to, lane, static_cast<uint32_t>(value));
    write(warp, to, lane, static_cast<uint32_t>(value >> 32), 1);
}

inline void write_predicate(Warp& warp, const Operand& to, int lane, bool value) {
    require(!to.inverted, "an inverted predicate to write to");
    if (to.index == kTrue) return;
    if (to.kind == kUniformPredicate) {
        warp.uniform_predicates[to.index] = value;
    } else {
        require(to.kind == kPredicate, "no predicate to write to");
        const uint32_t bit = 1u << lane;
        warp.predicates[to.index] = value ? warp.predicates[to.index] | bit : warp.predicates[to.index] & ~bit;
    }
}

template <typename Value>
bool compare(const std::string& how, Value a, Value b) {
    if (how == "EQ") return a == b;
    if (how == "NE") return a != b;
    if (how == "LT") return a < b;
    if (how == "LE") return a <= b;
    if (how == "GT") return a > b;
    require(how == "GE", "comparison " + how);
    return a >= b;
}

// A comparison's answer with the predicate that it is joined to.
inline bool joined(const Instruction& one, bool a, bool b) {
    return one.has("AND") ? a && b : one.has("OR") ? a || b : a != b;
}

inline void whole_warp(const Warp& warp) { require(warp.mask == kAll, "only a part of the warp"); }

}  // namespace machine
