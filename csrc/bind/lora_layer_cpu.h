// What the operators that join a layer's passes share: their arguments as matrices, and the library's products.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>
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

// Not torch::stable::new_empty, whose way through the dispatcher takes 1.3 us: a small layer makes five of them.
inline Tensor matrix(int64_t rows, int64_t columns, ScalarType dtype) {
    const std::array<int64_t, 2> size = {rows, columns}, strides = {columns, 1};
    const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle;
    const auto status =
        aoti_torch_empty_strided(2, size.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle);
    STD_TORCH_CHECK(status == 0, "could not allocate [", rows, ", ", columns, "]");
    return Tensor(handle);
}

// What a pass leaves for the next and nobody sees.
class Between {
  public:
    Between(DType dtype, int64_t rows, int64_t columns)
        : bytes_(rows * columns * element_size(dtype)), matrix_{bytes_.get(), dtype, rows, columns, columns, 1} {}
    const cpu::Matrix& operator*() const { return matrix_; }

  private:
    cpu::Scratch<char> bytes_;
    cpu::Matrix matrix_;
};

// y and S of a layer on x [.., K].
inline std::tuple<Tensor, Tensor> layer_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                const Tensor& a, const Tensor& b, const Optional& lora_bias,
                                                const Optional& seed, double p, double scaling) {
    using torch::stable::detail::from;
    check_weight(weight, x);
    const int64_t outputs = weight.size(0), inputs = weight.size(1);
    const cpu::Matrix x_m = flat(x, "x", inputs);
    STD_TORCH_CHECK(a.dim() == 2, "lora_a: expected two dimensions, got shape ", shape_of(a));
    const int64_t ranks = a.size(0);
    const cpu::Matrix a_m = factor(a, "lora_a", ranks, inputs), b_m = factor(b, "lora_b", outputs, ranks);
    const cpu::Dropout dropout = mask_of(seed, p);
    const cpu::Matrix offset = vector_of(lora_bias, "lora_bias", outputs);
    Tensor s = matrix(x_m.rows, ranks, x.scalar_type());
    Tensor y = product("aten::linear", {from(x), from(weight), from(bias)});
    const cpu::Matrix s_m = {s.mutable_data_ptr(), x_m.dtype, x_m.rows, ranks, ranks, 1};
    const cpu::Term shrink = {a_m, {}, dropout, 1.0, 0, ranks, nullptr, x_m.rows};
    cpu::lora_shrink(x_m, {&shrink, 1}, s_m, torch_pool);
    const cpu::Matrix y_m = flat(y, "y", outputs, true);
    const cpu::Term expand = {b_m, offset, {0, -1}, scaling, 0, ranks, nullptr, x_m.rows};
    cpu::lora_expand(y_m, s_m, {&expand, 1}, nullptr, y_m, torch_pool);
    return {y, s};
}

// dS into ds, and dB where it is needed.
inline Tensor output_side(const cpu::Matrix& dy, const Tensor& b, const Optional& s, double scaling, bool needs_b,
                          const cpu::Matrix& ds) {
    const int64_t outputs = b.size(0), ranks = b.size(1);
    const cpu::Matrix b_m = factor(b, "lora_b", outputs, ranks);
    if (!needs_b) {
        const cpu::Term shrink = {b_m.transposed(), {}, {0, -1}, scaling, 0, ranks, nullptr, dy.rows};
        cpu::lora_shrink(dy, {&shrink, 1}, ds, torch_pool);
        return Tensor();
    }
    STD_TORCH_CHECK(s.has_value(), "s: expected beside needs_b");
    Tensor db = matrix(outputs, ranks, b.scalar_type());
    const cpu::Matrix db_m = {db.mutable_data_ptr(), b_m.dtype, outputs, ranks, ranks, 1};
    const cpu::Term both = {b_m, db_m, {0, -1}, scaling, 0, ranks, nullptr, dy.rows};
    cpu::lora_dy_grads(dy, factor(*s, "s", dy.rows, ranks), {&both, 1}, ds, torch_pool);
    return db;
}

// dX in dy's shape but for the last dimension.
inline Tensor input_side(const Tensor& dy, const Optional& weight, const Optional& a, const cpu::Dropout& dropout,
                         const cpu::Matrix& ds) {
    using torch::stable::detail::from;
    STD_TORCH_CHECK(weight.has_value() && a.has_value(), "weight, lora_a: expected where x needs a gradient");
    check_weight(*weight, dy);
    const int64_t inputs = weight->size(1);
    const cpu::Matrix a_m = factor(*a, "lora_a", ds.columns, inputs);
    Tensor dx = product("aten::matmul", {from(dy), from(*weight)});
    const cpu::Matrix dx_m = flat(dx, "dx", inputs, true);
    const cpu::Term expand = {a_m.transposed(), {}, dropout, 1.0, 0, ds.columns, nullptr, ds.rows};
    cpu::lora_expand(dx_m, ds, {&expand, 1}, nullptr, dx_m, torch_pool);
    return dx;
}

// dA of x [M, K].
inline Tensor factor_grad(const cpu::Matrix& x, const cpu::Dropout& dropout, const cpu::Matrix& ds, ScalarType dtype) {
    STD_TORCH_CHECK(x.rows == ds.rows, "x: expected ", ds.rows, " rows, got ", x.rows);
    Tensor da = matrix(ds.columns, x.columns, dtype);
    const cpu::Matrix da_m = {da.mutable_data_ptr(), float_dtype(da, "da"), ds.columns, x.columns, x.columns, 1};
    const cpu::Term grad = {da_m, {}, dropout, 1.0, 0, ds.columns, nullptr, ds.rows};
    cpu::lora_weight_grad(ds, x, {&grad, 1}, torch_pool);
    return da;
}

}  // namespace peftfast::bind
