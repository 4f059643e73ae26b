// Philox on kCounters counters at a time. Included by kernel files inside an instruction set's namespace, after its
// vectors.

static inline void philox_at(Counters word[4], uint64_t seed, uint64_t q, uint32_t tensor_id, uint32_t stream) {
    const Counters multiplier0 = counters_set(philox::kMultiplier0), multiplier1 = counters_set(philox::kMultiplier1);
    Counters c0 = counters_from(q), c1 = counters_high(c0), c2 = counters_set(tensor_id), c3 = counters_set(stream);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
        const Counters product0 = counters_multiply(c0, multiplier0), product1 = counters_multiply(c2, multiplier1);
        c0 = counters_xor(counters_high(product1), c1, counters_set(k0));
        c1 = product1;
        c2 = counters_xor(counters_high(product0), c3, counters_set(k1));
        c3 = product0;
        k0 += philox::kWeyl0;
        k1 += philox::kWeyl1;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// Keep bits of `count` counters from q on, a byte each. Writes up to kCounters - 1 bytes past the end: the caller
// leaves room.
static void keep_bytes(uint8_t* out, uint64_t seed, uint64_t q, int64_t count, uint32_t threshold) {
    if (threshold == 0) {
        __builtin_memset(out, 0, count);
        return;
    }
    for (int64_t i = 0; i < count; i += kCounters) {
        Counters word[4];
        philox_at(word, seed, q + i, 0, philox::kStreamDropout);
        counters_keep(out + i, word, (uint16_t)(threshold - 1));
    }
}
