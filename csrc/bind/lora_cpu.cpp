#include "bind/checks_cpu.h"
#include "cpu/lora.h"

namespace peftfast::bind {
namespace {

cpu::Matrix matrix_of(const Tensor& t, const char* name, bool written = false) {
    check_cpu(t, name);
    STD_TORCH_CHECK(t.dim() == 2, name, ": expected two dimensions, got shape ", shape_of(t));
    const DType dtype = float_dtype(t, name);
    void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    return {data, dtype, t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

void check_shape(const cpu::Matrix& m, const char* name, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(m.rows == rows && m.columns == columns, name, ": expected shape [", rows, ", ", columns, "], got [",
                    m.rows, ", ", m.columns, "]");
}

// No seed or p == 0: no dropout, as in the reference.
cpu::Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
    check_probability(p);
    if (!seed.has_value()) return {0, -1};
    const uint64_t key = seed_value(*seed);
    if (p == 0.0) return {0, -1};
    return {key, keep_threshold(p)};
}

void lora_shrink(const Tensor& x, const Tensor& w, const std::optional<Tensor>& seed, double p, double scaling,
                 Tensor out) {
    const cpu::Matrix x_m = matrix_of(x, "x"), w_m = matrix_of(w, "w"), out_m = matrix_of(out, "out", true);
    check_shape(w_m, "w", w_m.rows, x_m.columns);
    check_shape(out_m, "out", x_m.rows, w_m.rows);
    cpu::lora_shrink(x_m, w_m, dropout_of(seed, p), scaling, out_m, torch_pool);
}

void lora_expand(const Tensor& base, const Tensor& s, const Tensor& w, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& seed, double p, double scaling, Tensor out) {
    const cpu::Matrix base_m = matrix_of(base, "base"), s_m = matrix_of(s, "s"), w_m = matrix_of(w, "w");
    const cpu::Matrix out_m = matrix_of(out, "out", true);
    check_shape(s_m, "s", base_m.rows, s_m.columns);
    check_shape(w_m, "w", base_m.columns, s_m.columns);
    check_shape(out_m, "out", base_m.rows, base_m.columns);
    cpu::Matrix bias_m = {};
    if (bias.has_value() && bias->numel() > 0) {
        check_cpu(*bias, "bias");
        STD_TORCH_CHECK(bias->dim() == 1, "bias: expected one dimension, got shape ", shape_of(*bias));
        bias_m = {const_cast<void*>(bias->const_data_ptr()),
                  float_dtype(*bias, "bias"),
                  1,
                  bias->size(0),
                  0,
                  bias->stride(0)};
    }
    if (bias.has_value()) check_numel(*bias, "bias", base_m.columns);
    cpu::lora_expand(base_m, s_m, w_m, bias_m, dropout_of(seed, p), scaling, out_m, torch_pool);
}

void lora_weight_grad(const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, double p, double scaling,
                      Tensor out) {
    const cpu::Matrix ds_m = matrix_of(ds, "ds"), x_m = matrix_of(x, "x"), out_m = matrix_of(out, "out", true);
    check_shape(ds_m, "ds", x_m.rows, ds_m.columns);
    check_shape(out_m, "out", ds_m.columns, x_m.columns);
    cpu::lora_weight_grad(ds_m, x_m, dropout_of(seed, p), scaling, out_m, torch_pool);
}

void lora_dy_grads(const Tensor& dy, const Tensor& s, const Tensor& b, double scaling, Tensor ds, Tensor db) {
    const cpu::Matrix dy_m = matrix_of(dy, "dy"), s_m = matrix_of(s, "s"), b_m = matrix_of(b, "b");
    const cpu::Matrix ds_m = matrix_of(ds, "ds", true), db_m = matrix_of(db, "db", true);
    check_shape(s_m, "s", dy_m.rows, s_m.columns);
    check_shape(b_m, "b", dy_m.columns, s_m.columns);
    check_shape(ds_m, "ds", dy_m.rows, s_m.columns);
    check_shape(db_m, "db", dy_m.columns, s_m.columns);
    cpu::lora_dy_grads(dy_m, s_m, b_m, scaling, ds_m, db_m, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def("lora_shrink(Tensor x, Tensor w, Tensor? seed, float p, float scaling, Tensor(a!) out) -> ()");
    m.def(
        "lora_expand(Tensor base, Tensor s, Tensor w, Tensor? bias, Tensor? seed, float p, float scaling, "
        "Tensor(a!) out) -> ()");
    m.def("lora_weight_grad(Tensor ds, Tensor x, Tensor? seed, float p, float scaling, Tensor(a!) out) -> ()");
    m.def("lora_dy_grads(Tensor dy, Tensor s, Tensor b, float scaling, Tensor(a!) ds, Tensor(b!) db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("lora_shrink", TORCH_BOX(&peftfast::bind::lora_shrink));
    m.impl("lora_expand", TORCH_BOX(&peftfast::bind::lora_expand));
    m.impl("lora_weight_grad", TORCH_BOX(&peftfast::bind::lora_weight_grad));
    m.impl("lora_dy_grads", TORCH_BOX(&peftfast::bind::lora_dy_grads));
}
