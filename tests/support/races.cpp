// Who read and who wrote each byte in the launch that runs, program by program.
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

namespace {

constexpr int32_t kNobody = -1, kSeveral = -2;
constexpr uint64_t kPage = 4096;

struct Page {
    int32_t writer[kPage], reader[kPage];
    uint64_t written[kPage];  // how many barriers had been passed
    Page() {
        std::fill(writer, writer + kPage, kNobody);
        std::fill(reader, reader + kPage, kNobody);
    }
};

std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
uint64_t barriers = 0;

Page& page_of(uint64_t address) {
    std::unique_ptr<Page>& page = pages[address / kPage];
    if (!page) page = std::make_unique<Page>();
    return *page;
}

}  // namespace

extern "C" uint64_t begin_launch() {
    pages.clear();
    return 0;
}

extern "C" uint64_t pass_barrier() { return ++barriers; }

// 1: another program wrote one of the bytes. 2: this one did, and passed no barrier since.
extern "C" uint64_t note_reads(const uint64_t* addresses, const bool* mask, size_t count, size_t size,
                               int32_t program) {
    for (size_t i = 0; i < count; ++i) {
        if (!mask[i]) continue;
        for (uint64_t address = addresses[i]; address < addresses[i] + size; ++address) {
            Page& page = page_of(address);
            const int32_t writer = page.writer[address % kPage];
            if (writer != kNobody && writer != program) return 1;
            if (writer == program && page.written[address % kPage] == barriers) return 2;
            int32_t& reader = page.reader[address % kPage];
            if (reader != program) reader = reader == kNobody ? program : kSeveral;
        }
    }
    return 0;
}

// 1: another program wrote one of the bytes. 3: another one read it.
extern "C" uint64_t note_writes(const uint64_t* addresses, const bool* mask, size_t count, size_t size,
                                int32_t program) {
    for (size_t i = 0; i < count; ++i) {
        if (!mask[i]) continue;
        for (uint64_t address = addresses[i]; address < addresses[i] + size; ++address) {
            Page& page = page_of(address);
            int32_t& writer = page.writer[address % kPage];
            const int32_t reader = page.reader[address % kPage];
            if (writer != kNobody && writer != program) return 1;
            if (reader != kNobody && reader != program) return 3;
            writer = program;
            page.written[address % kPage] = barriers;
        }
    }
    return 0;
}
