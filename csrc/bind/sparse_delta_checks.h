// What the CPU and the CUDA binding of the sparse delta check alike.
#pragma once

#include "bind/checks.h"

namespace peftfast::bind {

// Whether indices are of 8 bytes.
inline bool wide_indices(const Tensor& indices) {
    const ScalarType type = indices.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "indices: expected dtype int32 or int64, got ",
                    torch::headeronly::toString(type));
    check_contiguous(indices, "indices");
    STD_TORCH_CHECK(indices.dim() == 1, "indices: expected one dimension, got shape ", shape_of(indices));
    return type == ScalarType::Long;
}

inline bool wide_age(const Tensor& age) {
    const ScalarType type = age.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Short, "age: expected dtype int16 or int32, got ",
                    torch::headeronly::toString(type));
    return type == ScalarType::Int;
}

inline void check_vector(const Tensor& t, const char* name, ScalarType dtype, int64_t count) {
    check_dtype(t, name, dtype);
    check_contiguous(t, name);
    check_numel(t, name, count);
}

// A matrix whose rows are contiguous.
inline void check_rows(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2, name, ": expected two dimensions, got shape ", shape_of(t));
    STD_TORCH_CHECK(t.numel() == 0 || t.size(1) <= 1 || t.stride(1) == 1, name,
                    ": expected contiguous rows, got a column stride of ", t.stride(1));
}

}  // namespace peftfast::bind
