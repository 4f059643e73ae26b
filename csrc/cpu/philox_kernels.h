// Kernels of cpu/philox.cpp, compiled once for each instruction set.

#include "cpu/philox_vector.h"

constexpr int64_t kMaskCounters = 64;  // of a row at a time: 512 columns

static void mask_rows(uint64_t seed, int64_t columns, uint32_t threshold, uint8_t* out, int64_t begin, int64_t end) {
    const int64_t counters = (columns + philox::kDrawsPerCounter - 1) / philox::kDrawsPerCounter;
    uint8_t bits[kMaskCounters + 8];
    for (int64_t row = begin; row < end; ++row) {
        uint8_t* out_row = out + row * columns;
        for (int64_t first = 0; first < counters; first += kMaskCounters) {
            const int64_t count = counters - first < kMaskCounters ? counters - first : kMaskCounters;
            keep_bytes(bits, seed, (uint64_t)(row * counters + first), count, threshold);
            const int64_t width = columns - first * 8 < count * 8 ? columns - first * 8 : count * 8;
            for (int64_t group = 0; group < width / 8; ++group) {
                // Bit i of the byte to the lowest bit of byte i: the multiplications place copies 7 bits apart.
                const uint64_t byte = bits[group];
                const uint64_t low = (byte & 0x0f) * 0x0204081u & 0x01010101u;
                const uint64_t high = (byte >> 4) * 0x0204081u & 0x01010101u;
                const uint64_t spread = low | high << 32;
                __builtin_memcpy(out_row + (first + group) * 8, &spread, sizeof spread);
            }
            for (int64_t i = width / 8 * 8; i < width; ++i) out_row[first * 8 + i] = bits[i / 8] >> (i % 8) & 1;
        }
    }
}

static void words_range(uint64_t seed, uint64_t start, uint32_t tensor_id, uint32_t stream, int64_t* out, int64_t begin,
                        int64_t end) {
    for (int64_t first = begin; first < end; first += kCounters) {
        Counters word[4];
        philox_at(word, seed, start + first, tensor_id, stream);
        uint64_t stored[4][kCounters];
        for (int i = 0; i < 4; ++i) counters_store(stored[i], word[i]);
        for (int64_t j = 0; j < kCounters && first + j < end; ++j) {
            for (int i = 0; i < 4; ++i) out[(first + j) * 4 + i] = (int64_t)stored[i][j];
        }
    }
}

static const PhiloxKernels philox_table = {mask_rows, words_range};
