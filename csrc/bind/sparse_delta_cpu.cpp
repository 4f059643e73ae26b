#include "bind/checks_cpu.h"
#include "bind/sparse_delta_checks.h"
#include "cpu/sparse_delta.h"

namespace peftfast::bind {
namespace {

cpu::Indices indices_of(const Tensor& indices) {
    check_cpu(indices, "indices");
    const bool wide = wide_indices(indices);
    return {indices.const_data_ptr(), wide, indices.numel()};
}

cpu::Rows rows_of(const Tensor& t, const char* name) {
    check_cpu(t, name);
    check_rows(t, name);
    return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

const float* floats_of(const Tensor& t, const char* name, int64_t count) {
    check_cpu(t, name);
    check_vector(t, name, ScalarType::Float, count);
    return static_cast<const float*>(t.const_data_ptr());
}

float* written_floats(Tensor& t, const char* name, int64_t count) {
    floats_of(t, name, count);
    return static_cast<float*>(t.mutable_data_ptr());
}

void sparse_delta_dvalues(const Tensor& dy, const Tensor& x, const Tensor& indices, Tensor out) {
    const cpu::Rows dy_rows = rows_of(dy, "dy"), x_rows = rows_of(x, "x");
    const DType dtype = float_dtype(dy, "dy");
    check_dtype(x, "x", dy.scalar_type());
    STD_TORCH_CHECK(x_rows.rows == dy_rows.rows, "x: expected ", dy_rows.rows, " rows, got ", x_rows.rows);
    const cpu::Indices at = indices_of(indices);
    check_cpu(out, "out");
    check_contiguous(out, "out");
    check_numel(out, "out", at.count);
    cpu::sparse_delta_dvalues(dy_rows, x_rows, dtype, at, out.mutable_data_ptr(), float_dtype(out, "out"), torch_pool);
}

void sparse_delta_patch(const Tensor& weight, const Tensor& indices, const Tensor& values, Tensor out) {
    check_cpu(weight, "weight");
    check_contiguous(weight, "weight");
    check_cpu(out, "out");
    check_vector(out, "out", weight.scalar_type(), weight.numel());
    const cpu::Indices at = indices_of(indices);
    cpu::sparse_delta_patch(weight.const_data_ptr(), float_dtype(weight, "weight"), weight.numel(), at,
                            floats_of(values, "values", at.count), out.mutable_data_ptr(), torch_pool);
}

void sparse_delta_write(Tensor weight, const Tensor& indices, const Tensor& base, const std::optional<Tensor>& values) {
    check_cpu(weight, "weight");
    check_contiguous(weight, "weight");
    const cpu::Indices at = indices_of(indices);
    check_cpu(base, "base");
    check_vector(base, "base", weight.scalar_type(), at.count);
    cpu::sparse_delta_write(weight.mutable_data_ptr(), float_dtype(weight, "weight"), weight.numel(), at,
                            base.const_data_ptr(), values ? floats_of(*values, "values", at.count) : nullptr,
                            torch_pool);
}

void sparse_adamw(Tensor values, const Tensor& grads, Tensor exp_avg, Tensor exp_avg_sq, Tensor age,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& indices,
                  const std::optional<Tensor>& base, const Tensor& hyper, const Tensor& corrections,
                  const std::optional<Tensor>& seed, int64_t tensor_id) {
    cpu::AdamBuffers buffers = {};
    const int64_t count = values.numel();
    buffers.count = count;
    buffers.grads = floats_of(grads, "grads", count);
    check_cpu(age, "age");
    buffers.wide_age = wide_age(age);
    check_contiguous(age, "age");
    check_numel(age, "age", count);
    check_cpu(corrections, "corrections");
    check_dtype(corrections, "corrections", ScalarType::Float);
    check_contiguous(corrections, "corrections");
    STD_TORCH_CHECK(corrections.dim() == 2 && corrections.size(0) == 2 && corrections.size(1) > 0,
                    "corrections: expected shape [2, ages], got ", shape_of(corrections));
    buffers.ages = corrections.size(1);
    buffers.corrections = static_cast<const float*>(corrections.const_data_ptr());
    const float* numbers = floats_of(hyper, "hyper", 7);
    const sparse::AdamHyper hyper_values = {numbers[0], numbers[1], numbers[2], numbers[3],
                                            numbers[4], numbers[5], numbers[6]};
    STD_TORCH_CHECK(weight.has_value() == indices.has_value() && weight.has_value() == base.has_value(),
                    "weight, indices, base: expected all or none");
    STD_TORCH_CHECK(tensor_id >= 0 && tensor_id <= 0xffffffffll, "tensor_id: expected a 32-bit word, got ", tensor_id);
    cpu::AdamWeight target = {};
    if (weight.has_value()) {
        check_cpu(*weight, "weight");
        check_contiguous(*weight, "weight");
        check_cpu(*base, "base");
        check_vector(*base, "base", weight->scalar_type(), count);
        target.indices = indices_of(*indices);
        check_numel(*indices, "indices", count);
        target.dtype = float_dtype(*weight, "weight");
        target.count = weight->numel();
        target.base = base->const_data_ptr();
        target.stochastic = seed.has_value();
        target.seed = seed.has_value() ? seed_value(*seed) : 0;
        target.tensor_id = static_cast<uint32_t>(tensor_id);
    }
    buffers.values = written_floats(values, "values", count);
    buffers.exp_avg = written_floats(exp_avg, "exp_avg", count);
    buffers.exp_avg_sq = written_floats(exp_avg_sq, "exp_avg_sq", count);
    buffers.age = age.mutable_data_ptr();
    if (weight.has_value()) target.data = weight->mutable_data_ptr();
    cpu::sparse_adamw(buffers, hyper_values, target, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def("sparse_delta_dvalues(Tensor dy, Tensor x, Tensor indices, Tensor(a!) out) -> ()");
    m.def("sparse_delta_patch(Tensor weight, Tensor indices, Tensor values, Tensor(a!) out) -> ()");
    m.def("sparse_delta_write(Tensor(a!) weight, Tensor indices, Tensor base, Tensor? values) -> ()");
    m.def(
        "sparse_adamw(Tensor(a!) values, Tensor grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) age, "
        "Tensor(e!)? weight, Tensor? indices, Tensor? base, Tensor hyper, Tensor corrections, Tensor? seed, "
        "int tensor_id) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("sparse_delta_dvalues", TORCH_BOX(&peftfast::bind::sparse_delta_dvalues));
    m.impl("sparse_delta_patch", TORCH_BOX(&peftfast::bind::sparse_delta_patch));
    m.impl("sparse_delta_write", TORCH_BOX(&peftfast::bind::sparse_delta_write));
    m.impl("sparse_adamw", TORCH_BOX(&peftfast::bind::sparse_adamw));
}
