// What the operators that join a layer's passes share: their arguments as matrices, and the library's products.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "bind/checks_cpu.h"
#include "cpu/lora.h"

namespace peftfast::bind {

using Optional = std::optional<Tensor>;

inline cpu::Matrix flat(const Tensor& t, const char* name, int64_t columns, bool written = false) {
    check_cpu(t, name);
    check_contiguous(t, name);
    STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) == columns && columns > 0, name, ": expected [.., ", columns,
                    "], got shape ", shape_of(t));
    void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    return {data, float_dtype(t, name), t.numel() / columns, columns, columns, 1};
}

inline cpu::Matrix factor(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    check_cpu(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ",
                    columns, "], got ", shape_of(t));
    return {const_cast<void*>(t.const_data_ptr()), float_dtype(t, name), rows, columns, t.stride(0), t.stride(1)};
}

inline cpu::Dropout mask_of(const Optional& seed, double p) {
    check_probability(p);
    if (!seed.has_value() || p == 0.0) return {0, -1};
    return {seed_value(*seed), keep_threshold(p)};
}

// A row [N] such as a bias; no data where it is not given.
inline cpu::Matrix vector_of(const Optional& t, const char* name, int64_t columns) {
    if (!t.has_value()) return {};
    check_cpu(*t, name);
    check_numel(*t, name, columns);
    STD_TORCH_CHECK(t->dim() == 1, name, ": expected one dimension, got shape ", shape_of(*t));
    return {const_cast<void*>(t->const_data_ptr()), float_dtype(*t, name), 1, columns, 0, t->stride(0)};
}

inline void check_weight(const Tensor& weight, const Tensor& like) {
    check_cpu(weight, "weight");
    STD_TORCH_CHECK(weight.dim() == 2, "weight: expected two dimensions, got shape ", shape_of(weight));
    check_dtype(weight, "weight", like.scalar_type());
}

inline Tensor product(const char* name, std::vector<StableIValue> stack) {
    // torch's own check of a status is a macro of another name in 2.11.
    const auto status = torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
    STD_TORCH_CHECK(status == 0, name, " failed");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
    const std::array<int64_t, 2> size = {rows, columns};
    return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

}  // namespace peftfast::bind
