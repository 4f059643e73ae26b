// What the CPU bindings of the sparse delta and of its optimiser take apart alike.
#pragma once

#include "bind/checks_cpu.h"
#include "bind/sparse_delta_checks.h"
#include "cpu/sparse_delta.h"

namespace peftfast::bind {

inline cpu::Indices indices_of(const Tensor& indices) {
    check_cpu(indices, "indices");
    const bool wide = wide_indices(indices);
    return {indices.const_data_ptr(), wide, indices.numel()};
}

inline const float* floats_of(const Tensor& t, const char* name, int64_t count) {
    check_cpu(t, name);
    check_vector(t, name, ScalarType::Float, count);
    return static_cast<const float*>(t.const_data_ptr());
}

}  // namespace peftfast::bind
