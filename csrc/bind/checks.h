// Checks shared by the bindings: every size, dtype, device and stride that the kernels assume. A failed one raises
// before anything is written.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>

#include "narrow.h"

namespace peftfast::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
    std::string text = "[";
    for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
    return text + "]";
}

// That a tensor's elements lie in its storage: wrappers that shard or offload a model free the memory of a tensor that
// stays (untyped_storage().resize_(0)), and of a view into it the address is then not even null.
inline void check_memory(const Tensor& t, const char* name) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t last = t.storage_offset();
    for (size_t i = 0; i < sizes.size(); ++i) {
        if (sizes[i] == 0) return;
        last += (sizes[i] - 1) * strides[i];
    }
    int64_t held = 0;
    const auto status = aoti_torch_get_storage_size(t.get(), &held);
    const int64_t needed = (last + 1) * static_cast<int64_t>(t.element_size());
    STD_TORCH_CHECK(status == 0 && needed <= held, name, ": expected ", needed,
                    " bytes of memory, but its storage holds ", held, ", as one that was freed does");
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
    STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got shape ", shape_of(t));
}

inline void check_numel(const Tensor& t, const char* name, int64_t expected) {
    STD_TORCH_CHECK(t.numel() == expected, name, ": expected ", expected, " elements, got ", t.numel(), " in shape ",
                    shape_of(t));
}

inline DType float_dtype(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return DType::f32;
        case ScalarType::BFloat16:
            return DType::bf16;
        case ScalarType::Half:
            return DType::f16;
        default:
            STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ",
                            torch::headeronly::toString(t.scalar_type()));
            return DType::f32;
    }
}

inline void check_probability(double p) { STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "p: expected 0 <= p <= 1, got ", p); }

// reference/philox.py keep_threshold: nearbyint rounds ties to even, as Python's round does.
inline int32_t keep_threshold(double p) { return static_cast<int32_t>(std::nearbyint(65536.0 * (1.0 - p))); }

inline void check_seed(const Tensor& seed) {
    check_dtype(seed, "seed", ScalarType::Long);
    check_numel(seed, "seed", 1);
}

}  // namespace peftfast::bind
