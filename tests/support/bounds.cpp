// Where the launch that runs may read and write.
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <vector>

namespace {

struct Range {
    uint64_t begin, end;
};

std::vector<Range> given;            // the launch's tensors
std::map<uint64_t, uint64_t> known;  // begin and end of what may stand in a table of addresses
bool tables = false;                 // such a table is among the launch's tensors

bool in_known(uint64_t begin, uint64_t end) {
    auto after = known.upper_bound(begin);
    return after != known.begin() && end <= (--after)->second;
}

}  // namespace

extern "C" uint64_t begin_launch(const uint64_t* begins, const uint64_t* ends, size_t count, bool has_tables) {
    given.clear();
    for (size_t i = 0; i < count; ++i) given.push_back({begins[i], ends[i]});
    tables = has_tables;
    return 0;
}

extern "C" uint64_t add_known(uint64_t begin, uint64_t end) {
    auto next = known.upper_bound(begin);
    if (next != known.begin() && std::prev(next)->second >= begin) --next;
    while (next != known.end() && next->first <= end) {  // one range of all that meet
        begin = std::min(begin, next->first);
        end = std::max(end, next->second);
        next = known.erase(next);
    }
    known[begin] = end;
    return 0;
}

// The first address of which `size` bytes are not all one tensor's, or 0.
extern "C" uint64_t first_outside(const uint64_t* addresses, const bool* mask, size_t count, size_t size) {
    size_t last = 0;
    for (size_t i = 0; i < count; ++i) {
        if (!mask[i]) continue;
        const uint64_t begin = addresses[i], end = begin + size;
        const auto holds = [&](const Range& range) { return range.begin <= begin && end <= range.end; };
        if (last < given.size() && holds(given[last])) continue;
        const auto found = std::find_if(given.begin(), given.end(), holds);
        if (found != given.end()) {
            last = found - given.begin();
        } else if (!tables || !in_known(begin, end)) {
            return begin;
        }
    }
    return 0;
}
