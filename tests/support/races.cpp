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
    Page() {
        std::fill(writer, writer + kPage, kNobody);
        std::fill(reader, reader + kPage, kNobody);
    }
};

std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;

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

// 1: another program wrote one of the bytes. 2: this one did before.
extern "C" uint64_t note_reads(const uint64_t* addresses, const bool* mask, size_t count, size_t size,
                               int32_t program) {
    for (size_t i = 0; i < count; ++i) {
        if (!mask[i]) continue;
        for (uint64_t address = addresses[i]; address < addresses[i] + size; ++address) {
            Page& page = page_of(address);
            const int32_t writer = page.writer[address % kPage];
            if (writer != kNobody) return writer == program ? 2 : 1;
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
        }
    }
    return 0;
}
