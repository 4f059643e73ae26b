// Takes the place of ThreadSanitizer's library: the compiler calls it before each access, and it knows the emulator's
// threads. Two accesses of a byte, one of them a write, must be of one thread, or have a barrier of their block between
// them, or a __syncwarp of their warp; those of two blocks nothing orders. A shuffle or a matrix product is no order.
// Two writes of the same value are no race. Beside AddressSanitizer (tests/support/sanitized) each address is asked for
// there.
#include <cuda_runtime.h>
#include <link.h>

#include <string.h>

#include <memory>
#include <unordered_map>

extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);

namespace {

constexpr uint64_t kPage = 4096;

struct Access {
    int thread = -1;
    uint64_t barriers, syncs;
};

struct Cell {
    Access write, reads[4];  // of what more threads read since the last barrier the first four
};

struct Blocks {
    int64_t writer = -1, reader = -1;  // kSeveral of more than one
};
constexpr int64_t kSeveral = -2;

template <class T>
class Memory {
  public:
    T& at(uintptr_t address) {
        std::unique_ptr<T[]>& page = pages_[address / kPage];
        if (!page) page.reset(new T[kPage]);
        return page[address % kPage];
    }
    void clear() { pages_.clear(); }

  private:
    std::unordered_map<uintptr_t, std::unique_ptr<T[]>> pages_;
};

Memory<Cell> of_block;
Memory<Blocks> of_launch;
int64_t block = 0;

struct Range {
    uintptr_t begin = 0, end = 0;
    bool holds(uintptr_t address) const { return begin <= address && address < end; }
};

// Where this library keeps what is neither constant nor a tensor's: shared memory.
Range writable_range() {
    Range found;
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* result) {
            Range data;
            bool here = false;
            for (int i = 0; i < object->dlpi_phnum; ++i) {
                const auto& part = object->dlpi_phdr[i];
                if (part.p_type != PT_LOAD) continue;
                const Range range = {object->dlpi_addr + part.p_vaddr, object->dlpi_addr + part.p_vaddr + part.p_memsz};
                here |= range.holds(reinterpret_cast<uintptr_t>(&block));
                if (part.p_flags & PF_W) data = range;
            }
            if (here) *static_cast<Range*>(result) = data;
            return here ? 1 : 0;
        },
        &found);
    return found;
}

bool in_order(const Access& before, const emulated::Place& now) {
    if (before.thread < 0 || before.thread == static_cast<int>(now.thread) || before.barriers != now.barriers)
        return true;
    return before.thread / 32 == static_cast<int>(now.thread) / 32 && before.syncs != now.syncs;
}

bool is_emulators(const void* p) {
    const auto within = [p](const dim3& index) { return p >= &index && p < &index + 1; };
    return within(emulated::thread_index) || within(emulated::block_index) || p == &emulated::in_kernel ||
           emulated::Block::current().is_own(p);
}

// A write over another thread's, which must leave what is there: seen when the next access, or the end, comes.
struct Repeated {
    const void* at = nullptr;
    size_t size;
    char bytes[16];

    void begin(const void* address, size_t count) {
        if (count > sizeof bytes) emulated::fail("two threads write a range");
        at = address, size = count;
        memcpy(bytes, address, count);
    }
    void end() {
        if (at != nullptr && memcmp(at, bytes, size) != 0) emulated::fail("two threads write different values");
        at = nullptr;
    }
} repeated;

void look(void* pointer, size_t size, bool writes) {
    repeated.end();
    if (!emulated::in_kernel || is_emulators(pointer)) return;
    if (__asan_region_is_poisoned != nullptr && __asan_region_is_poisoned(pointer, size) != nullptr)
        emulated::fail("an access outside of every allocation");
    static const Range shared = writable_range();
    const emulated::Place now = emulated::Block::current().place();
    const Access own = {static_cast<int>(now.thread), now.barriers, now.syncs};
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
    for (uintptr_t address = begin; address < begin + size; ++address) {
        Cell& cell = of_block.at(address);
        if (!in_order(cell.write, now)) {
            if (!writes) emulated::fail("two threads of a block: one wrote what the other reads");
            repeated.begin(pointer, size);
        }
        if (writes) {
            for (const Access& read : cell.reads)
                if (!in_order(read, now)) emulated::fail("two threads of a block: one read what the other writes");
            cell.write = own;
        } else {
            if (shared.holds(address) && cell.write.thread < 0)
                emulated::fail("shared memory that nobody wrote is read");
            Access* slot = nullptr;
            for (Access& read : cell.reads)
                if (read.thread == own.thread ||
                    (slot == nullptr && (read.thread < 0 || read.barriers != now.barriers)))
                    slot = &read;
            if (slot != nullptr) *slot = own;
        }
        if (shared.holds(address)) continue;
        Blocks& blocks = of_launch.at(address);
        if (blocks.writer >= 0 && blocks.writer != block) {
            if (!writes) emulated::fail("two blocks: one wrote what the other reads");
            repeated.begin(pointer, size);
        }
        if (writes && blocks.reader != -1 && blocks.reader != block)
            emulated::fail("two blocks: one read what the other writes");
        if (writes) blocks.writer = block;
        if (!writes && blocks.reader != block) blocks.reader = blocks.reader == -1 ? block : kSeveral;
    }
}

}  // namespace

namespace emulated {
void begin_launch() {
    of_launch.clear();
    block = 0;
}
void begin_block() {
    of_block.clear();
    ++block;
}
void end_launch() { repeated.end(); }
}  // namespace emulated

#define ACCESSES(kSize)                                                   \
    void __tsan_read##kSize(void* p) { look(p, kSize, false); }           \
    void __tsan_write##kSize(void* p) { look(p, kSize, true); }           \
    void __tsan_unaligned_read##kSize(void* p) { look(p, kSize, false); } \
    void __tsan_unaligned_write##kSize(void* p) { look(p, kSize, true); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t size) { look(p, size, false); }
void __tsan_write_range(void* p, size_t size) { look(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }
}
