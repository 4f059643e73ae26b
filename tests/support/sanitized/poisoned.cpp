// Asks the sanitizer, whose runtime is preloaded, for every address that a load or store of the interpreter would take.
#include <stddef.h>
#include <stdint.h>

extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);

// The first address of which `size` bytes are not all a live allocation's, or 0.
extern "C" uint64_t first_poisoned(const uint64_t* addresses, const bool* mask, size_t count, size_t size) {
    for (size_t i = 0; i < count; ++i)
        if (mask[i] && __asan_region_is_poisoned(reinterpret_cast<void*>(addresses[i]), size)) return addresses[i];
    return 0;
}
