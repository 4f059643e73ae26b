// What the CPU bindings share: the check of device and memory, and torch's thread pool as the kernels take it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "bind/checks.h"
#include "cpu/parallel.h"

namespace peftfast::bind {

inline void check_cpu(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got device type ", static_cast<int>(t.device().type()));
    check_memory(t, name);
}

inline uint64_t seed_value(const Tensor& seed) {
    check_cpu(seed, "seed");
    check_seed(seed);
    return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

inline void torch_pool(int64_t count, int64_t grain, cpu::RangeBody body, void* context) {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace peftfast::bind
