// The contract of a 4-bit weight, the same for the CPU and the CUDA binding.
#pragma once

#include "bind/checks.h"
#include "../nf4.h"

namespace peftfast::bind {

// Sizes first: the kernels read packed[(count - 1) / 2], absmax[(count - 1) / block_size] and nested_absmax[that /
// 256]. Indices into the two tables are a nibble and a byte, so their sizes are all that has to be checked. Returns
// whether absmax is nested.
inline bool check_nf4(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                      const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                      const std::optional<Tensor>& nested_offset, const Tensor& out) {
    STD_TORCH_CHECK(block_size > 0, "block_size: expected a positive number, got ", block_size);
    const int64_t count = out.numel();
    const int64_t blocks = count / block_size + (count % block_size != 0);
    check_contiguous(out, "out");
    check_dtype(packed, "packed", ScalarType::Byte);
    check_contiguous(packed, "packed");
    check_numel(packed, "packed", count / 2 + count % 2);
    check_dtype(code, "code", ScalarType::Float);
    check_contiguous(code, "code");
    check_numel(code, "code", 16);
    check_contiguous(absmax, "absmax");
    check_numel(absmax, "absmax", blocks);
    const bool nested = nested_absmax.has_value();
    STD_TORCH_CHECK(nested == nested_code.has_value() && nested == nested_offset.has_value(),
                    "nested_absmax, nested_code, nested_offset: expected all or none, got ", nested, ", ",
                    nested_code.has_value(), ", ", nested_offset.has_value());
    check_dtype(absmax, "absmax", nested ? ScalarType::Byte : ScalarType::Float);
    if (nested) {
        check_dtype(*nested_absmax, "nested_absmax", ScalarType::Float);
        check_contiguous(*nested_absmax, "nested_absmax");
        check_numel(*nested_absmax, "nested_absmax", (blocks + nf4::kNestedBlock - 1) / nf4::kNestedBlock);
        check_dtype(*nested_code, "nested_code", ScalarType::Float);
        check_contiguous(*nested_code, "nested_code");
        check_numel(*nested_code, "nested_code", 256);
        check_dtype(*nested_offset, "nested_offset", ScalarType::Float);
        check_numel(*nested_offset, "nested_offset", 1);
    }
    return nested;
}

}  // namespace peftfast::bind
