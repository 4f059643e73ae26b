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
                      const std::optional<Tensor>& nested_offset, int64_t count) {
    STD_TORCH_CHECK(block_size > 0, "block_size: expected a positive number, got ", block_size);
    STD_TORCH_CHECK(count >= 0, "count: expected the elements of the weight, got ", count);
    const int64_t blocks = count / block_size + (count % block_size != 0);
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

// Where the elements of `out` come from and go: all of the weight into a contiguous tensor of any shape, or rows
// `first_row` .. of it into a matrix whose rows may lie apart.
struct Slab {
    int64_t begin, end, width, stride;
};
inline Slab check_slab(const Tensor& out, int64_t count, int64_t first_row) {
    if (out.is_contiguous() && out.numel() == count && first_row == 0) return {0, count, count > 0 ? count : 1, count};
    STD_TORCH_CHECK(out.dim() == 2 && out.stride(1) == 1 && (out.stride(0) >= out.size(1) || out.size(0) < 2),
                    "out: expected a contiguous tensor, or rows of consecutive elements, got shape ", shape_of(out));
    const int64_t rows = out.size(0), width = out.size(1);
    STD_TORCH_CHECK(
        first_row >= 0 && (rows == 0 || width == 0 || (count % width == 0 && first_row <= count / width - rows)),
        "out: expected rows within the weight's ", count, " elements, got shape ", shape_of(out), " from row ",
        first_row);
    if (rows == 0 || width == 0) return {0, 0, 1, 1};
    return {first_row * width, (first_row + rows) * width, width, out.stride(0)};
}

// The kernels write packed[(count - 1) / 2] and absmax[(count - 1) / block_size]; a rank among the 15 bounds is what
// `order` is indexed with. Whole blocks must not share a byte.
inline void check_quantize(const Tensor& weight, int64_t block_size, const Tensor& bounds, const Tensor& order,
                           const Tensor& packed, const Tensor& absmax) {
    STD_TORCH_CHECK(block_size > 0 && block_size % 32 == 0, "block_size: expected a multiple of 32, got ", block_size);
    const int64_t count = weight.numel();
    check_contiguous(weight, "weight");
    check_dtype(bounds, "bounds", ScalarType::Float);
    check_contiguous(bounds, "bounds");
    check_numel(bounds, "bounds", 15);
    check_dtype(order, "order", ScalarType::Byte);
    check_contiguous(order, "order");
    check_numel(order, "order", 16);
    check_dtype(packed, "packed", ScalarType::Byte);
    check_contiguous(packed, "packed");
    check_numel(packed, "packed", count / 2 + count % 2);
    check_dtype(absmax, "absmax", ScalarType::Float);
    check_contiguous(absmax, "absmax");
    check_numel(absmax, "absmax", count / block_size + (count % block_size != 0));
}

inline void check_nest(const Tensor& values, const Tensor& bounds, const Tensor& index, const Tensor& absmax) {
    check_dtype(values, "values", ScalarType::Float);
    check_contiguous(values, "values");
    check_dtype(bounds, "bounds", ScalarType::Float);
    check_contiguous(bounds, "bounds");
    check_numel(bounds, "bounds", 255);
    check_dtype(index, "index", ScalarType::Byte);
    check_contiguous(index, "index");
    check_numel(index, "index", values.numel());
    check_dtype(absmax, "absmax", ScalarType::Float);
    check_contiguous(absmax, "absmax");
    check_numel(absmax, "absmax", (values.numel() + nf4::kNestedBlock - 1) / nf4::kNestedBlock);
}

}  // namespace peftfast::bind
