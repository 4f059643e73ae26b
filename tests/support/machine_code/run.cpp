// Programs in machine code of sm_90, run thread by thread: what launch.py calls. How it is meant is in __init__.py.
#include <sstream>

#include "copies.h"
#include "floats.h"
#include "integers.h"
#include "memory.h"
#include "products.h"

namespace machine {
namespace {

constexpr int64_t kLongest = 200'000'000;  // instructions of a block's warps, before it is taken to hang

void bra(Warp& warp, const Instruction& one) {
    if (one.has("DIV")) return;  // where a warp may part: it does not have to
    require(one.target >= 0, "a branch to nowhere");
    each(warp, [&](int lane) {
        bool taken = true;
        for (const Operand& operand : one.operands)
            if (operand.kind != kName) taken = taken && predicate(warp, operand, lane);
        if (taken) warp.place[lane] = one.target;
    });
}

void call(Warp& warp, const Instruction& one) {
    require(one.target >= 0, "a call of nothing");
    each(warp, [&](int lane) { warp.place[lane] = one.target; });
}

void ret(Warp& warp, const Instruction& one) {
    const std::map<int64_t, int>& numbers = warp.block->launch.program->numbers;
    each(warp, [&](int lane) {
        auto found = numbers.find(static_cast<int64_t>(pair(warp, one[0], lane)));
        require(found != numbers.end(), "a return to nowhere");
        warp.place[lane] = found->second;
    });
}

void leave(Warp& warp, const Instruction&) {
    warp.done |= warp.mask;
    warp.meet();
}

int meeting(const Instruction& one) {
    const int number = std::stoi(one[0].name.substr(1));
    require(number < kMeetings - 1, "a place to meet at");
    return number;
}

void bssy(Warp& warp, const Instruction& one) { warp.parted[meeting(one)] = warp.mask; }

void arrive(Warp& warp, int number) {
    require(!(warp.mask & ~warp.parted[number]), "threads meet that did not part");
    warp.met[number] |= warp.mask;
    warp.meet();
}

void bsync(Warp& warp, const Instruction& one) { arrive(warp, meeting(one)); }

void warpsync(Warp& warp, const Instruction& one) {
    require(one.has("ALL") || (one[0].kind == kImmediate && one[0].value == kAll), "a part of a warp that meets");
    warp.parted[kMeetings - 1] = kAll;
    arrive(warp, kMeetings - 1);
}

void bar(Warp& warp, const Instruction& one) {
    require(one.has("SYNC") && one.count() == 1 && one[0].value == 0, "a barrier of another kind");
    warp.waiting |= warp.mask;
}

void nothing(Warp&, const Instruction&) {}

// What does nothing here: memory has one order and no caches, and a launch begins where the last has ended.
const std::map<std::string, Opcode> kControl = {
    {"BRA", {bra, "DIV U", true}},
    {"CALL", {call, "REL NOINC", true}},
    {"RET", {ret, "REL NODEC", true}},
    {"EXIT", {leave, "", true}},
    {"BAR", {bar, "SYNC DEFER_BLOCKING", true}},
    {"BSSY", {bssy, ""}},
    {"BSYNC", {bsync, "", true}},
    {"WARPSYNC", {warpsync, "ALL", true}},
    {"NOP", {nothing, ""}},
    {"MEMBAR", {nothing, "*"}},
    {"FENCE", {nothing, "*"}},
    {"ERRBAR", {nothing, "*"}},
    {"YIELD", {nothing, "*"}},
    {"CCTL", {nothing, "*"}},
    {"PREEXIT", {nothing, ""}},
    {"ACQBULK", {nothing, ""}},
};

const Opcode* known(const std::string& name) {
    for (const auto* table : {&kIntegers, &kFloats, &kMemory, &kProducts, &kCopies, &kControl})
        if (auto found = table->find(name); found != table->end()) return &found->second;
    return nullptr;
}

std::vector<std::string> split(const std::string& text, char by) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
    return parts;
}

// As program.py writes it: kind, flags, half, index, uniform register, value, name.
Operand operand_of(const std::string& text) {
    const std::vector<std::string> parts = split(text, ' ');
    require(parts.size() >= 6, "an operand: " + text);
    const int flags = std::stoi(parts[1]);
    return {parts[0][0],          (flags & 1) != 0,
            (flags & 2) != 0,     (flags & 4) != 0,
            (flags & 8) != 0,     std::stoi(parts[2]),
            std::stoi(parts[3]),  std::stoi(parts[4]),
            std::stoll(parts[5]), parts.size() > 6 ? parts[6] : ""};
}

Instruction instruction_of(const std::string& line) {
    const std::vector<std::string> parts = split(line, '\t');  // address, text, name, guard, target, operands
    require(parts.size() >= 5, "an instruction: " + line);
    Instruction one{};
    one.at = std::stoll(parts[0]);
    one.text = parts[1];
    one.modifiers = split(parts[2], '.');
    one.opcode = one.modifiers[0];
    one.modifiers.erase(one.modifiers.begin());
    one.guarded = parts[3] != "-";
    if (one.guarded) one.guard = operand_of(parts[3]);
    one.target = std::stoi(parts[4]);
    for (size_t i = 5; i < parts.size(); ++i) one.operands.push_back(operand_of(parts[i]));
    one.sources = 1;
    const auto is_predicate = [](const Operand& operand) {
        return (operand.kind == kPredicate || operand.kind == kUniformPredicate) && !operand.inverted;
    };
    while (one.sources < static_cast<int>(one.operands.size()) && is_predicate(one.operands[one.sources]))
        ++one.sources;
    const Opcode* opcode = known(one.opcode);
    if (!opcode && one.opcode[0] == 'U') {
        opcode = known(one.opcode.substr(1));
        one.uniform = true;
        one.opcode.erase(0, 1);
    }
    require(opcode, "an instruction that is not known: " + one.text);
    if (opcode->modifiers != "*") {
        const std::vector<std::string> allowed = split(opcode->modifiers, ' ');
        for (const std::string& modifier : one.modifiers)
            require(std::count(allowed.begin(), allowed.end(), modifier), "a modifier that is not known: " + one.text);
    }
    one.run = opcode->run;
    one.moves = opcode->moves;
    return one;
}

// Until the warp may have moved elsewhere, or waits; how many instructions that were.
int64_t advance(Warp& warp, const Program& program) {
    const uint32_t runnable = warp.runnable();
    int first = INT32_MAX, others = INT32_MAX;
    for (int lane = 0; lane < kLanes; ++lane)
        if (runnable >> lane & 1) first = std::min(first, warp.place[lane]);
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(runnable >> lane & 1)) continue;
        if (warp.place[lane] == first)
            lanes |= 1u << lane;
        else
            others = std::min(others, warp.place[lane]);
    }
    const auto go_to = [&](int place) {
        for (int lane = 0; lane < kLanes; ++lane)
            if (lanes >> lane & 1) warp.place[lane] = place;
    };
    for (int place = first;; ++place) {
        if (place == others) return go_to(place), place - first;
        require(place < static_cast<int>(program.code.size()), "behind the program's end");
        const Instruction& one = program.code[place];
        try {
            warp.mask = lanes;
            warp.on_uniform = false;
            if (one.guarded) {
                warp.mask = 0;
                for (int lane = 0; lane < kLanes; ++lane)
                    if (lanes >> lane & 1) warp.mask |= static_cast<uint32_t>(predicate(warp, one.guard, lane)) << lane;
            }
            warp.on_uniform = one.uniform;
            if (one.moves) {
                go_to(place + 1);
                if (warp.mask) one.run(warp, one);
                return place + 1 - first;
            }
            if (warp.mask) one.run(warp, one);
        } catch (const Fault& fault) {
            throw Fault(hex(one.at) + " " + one.text + ": " + fault.what());
        }
    }
}

void check_nothing_left(const Warp& warp) {
    bool left = !warp.stores.open.empty();
    for (const std::vector<Store>& group : warp.stores.closed) left |= !group.empty();
    require(!left, "the block ends before its tiles are stored");
}

int64_t run_block(Block& block) {
    const int64_t ahead = block.launch.order.ahead;
    int64_t steps = 0;
    for (;;) {
        bool went = false, alive = false, all_wait = true;
        for (size_t i = 0; i < block.warps.size(); ++i) {
            Warp& warp = block.warps[ahead < 0 ? block.warps.size() - 1 - i : i];
            alive |= warp.done != kAll;
            while (warp.runnable()) {
                steps += advance(warp, *block.launch.program);
                require(steps < kLongest, "the block does not end");
                went = true;
                if (!ahead) break;
            }
            all_wait &= (warp.done | warp.waiting) == kAll;
            if (went && ahead) break;  // what it did may let one go on that comes before it
        }
        if (!alive) break;
        if (went) continue;
        if (block.land()) continue;
        require(all_wait, "a deadlock: threads wait for a copy that nobody asked for, or for others of their warp");
        ++block.barriers;
        for (Warp& warp : block.warps) warp.waiting = 0;
    }
    for (const Warp& warp : block.warps) check_nothing_left(warp);
    return steps;
}

void say(const std::string& message, char* to, int64_t size) { snprintf(to, size, "%s", message.c_str()); }

}  // namespace
}  // namespace machine

extern "C" {

// A program for run; null, and why, where it holds what is not known.
uint64_t load(const char* text, char* message, int64_t size) {
    using namespace machine;
    try {
        auto program = std::make_unique<Program>();
        for (const std::string& line : split(text, '\n')) program->code.push_back(instruction_of(line));
        for (size_t i = 0; i < program->code.size(); ++i) program->numbers[program->code[i].at] = static_cast<int>(i);
        return reinterpret_cast<uint64_t>(program.release());
    } catch (const std::exception& error) {
        say(error.what(), message, size);
        return 0;
    }
}

// Every block of the grid; how many instructions of warps that were, or 0 and what went wrong. Places and sizes are
// those of Launch.
uint64_t run(uint64_t program, const machine::Extent* extents, int64_t extent_count, const machine::Map* maps,
             int64_t map_count, const uint8_t* constants, int64_t constant_count, const int64_t* grid, int64_t warps,
             int64_t shared, int64_t late, int64_t ahead, char* message, int64_t size) {
    using namespace machine;
    Launch launch{reinterpret_cast<const Program*>(program),
                  {extents, extents + extent_count},
                  {maps, maps + map_count},
                  {constants, constants + constant_count},
                  {late, ahead},
                  warps,
                  shared};
    uint64_t steps = 0;
    int64_t place[3] = {};
    try {
        for (place[2] = 0; place[2] < grid[2]; ++place[2])
            for (place[1] = 0; place[1] < grid[1]; ++place[1])
                for (place[0] = 0; place[0] < grid[0]; ++place[0]) {
                    Block block(launch);
                    std::copy_n(place, 3, block.place);
                    steps += run_block(block);
                }
        return steps;
    } catch (const std::exception& error) {
        say("block " + std::to_string(place[0]) + ", " + std::to_string(place[1]) + ", " + std::to_string(place[2]) +
                ": " + error.what(),
            message, size);
        return 0;
    }
}
}
