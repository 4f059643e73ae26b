#include "bind/nf4_weight_cpu.h"

namespace peftfast::bind {
namespace {

void nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                    const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                    int64_t count, int64_t first_row, Tensor out) {
    const DType dtype = float_dtype(out, "out");
    const cpu::Nf4Weight weight =
        weight_of(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count);
    check_cpu(out, "out");
    const Slab slab = check_slab(out, count, first_row);
    cpu::nf4_dequantize(weight, {slab.begin, slab.end, slab.width, slab.stride}, out.mutable_data_ptr(), dtype,
                        torch_pool);
}

void nf4_quantize(const Tensor& weight, int64_t block_size, const Tensor& bounds, const Tensor& order, Tensor packed,
                  Tensor absmax) {
    const DType dtype = float_dtype(weight, "weight");
    check_quantize(weight, block_size, bounds, order, packed, absmax);
    check_cpu(weight, "weight");
    check_cpu(bounds, "bounds");
    check_cpu(order, "order");
    check_cpu(packed, "packed");
    check_cpu(absmax, "absmax");
    cpu::nf4_quantize(
        weight.const_data_ptr(), dtype, weight.numel(), block_size, static_cast<const float*>(bounds.const_data_ptr()),
        static_cast<const uint8_t*>(order.const_data_ptr()), static_cast<uint8_t*>(packed.mutable_data_ptr()),
        static_cast<float*>(absmax.mutable_data_ptr()), torch_pool);
}

void nf4_nest(const Tensor& values, const Tensor& bounds, bool snapped, Tensor index, Tensor absmax) {
    check_nest(values, bounds, index, absmax);
    check_cpu(values, "values");
    check_cpu(bounds, "bounds");
    check_cpu(index, "index");
    check_cpu(absmax, "absmax");
    cpu::nf4_nest(static_cast<const float*>(values.const_data_ptr()), values.numel(),
                  static_cast<const float*>(bounds.const_data_ptr()), snapped,
                  static_cast<uint8_t*>(index.mutable_data_ptr()), static_cast<float*>(absmax.mutable_data_ptr()),
                  torch_pool);
}

cpu::FloatMatrix matrix_of(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    check_cpu(t, name);
    const DType dtype = float_dtype(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ",
                    columns, "], got ", shape_of(t));
    return {t.const_data_ptr(), dtype, t.stride(0), t.stride(1)};
}

cpu::FloatMatrix vector_of(const Optional& t, const char* name, int64_t size) {
    if (!t.has_value()) return {};
    check_cpu(*t, name);
    const DType dtype = float_dtype(*t, name);
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, name, ": expected shape [", size, "], got ", shape_of(*t));
    return {t->const_data_ptr(), dtype, 0, t->stride(0)};
}

void nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                const Optional& bias, const Optional& lora_a, const Optional& lora_b, const Optional& lora_bias,
                double scaling, Tensor s, Tensor y) {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "x, y: expected two dimensions, got ", shape_of(x), " and ",
                    shape_of(y));
    STD_TORCH_CHECK(lora_a.has_value() == lora_b.has_value(), "lora_a, lora_b: expected both or none");
    STD_TORCH_CHECK(lora_a.has_value() || !lora_bias.has_value(), "lora_bias: expected an adapter with it");
    cpu::Nf4Linear problem = {};
    problem.M = x.size(0);
    problem.K = x.size(1);
    problem.N = y.size(1);
    problem.x = matrix_of(x, "x", problem.M, problem.K);
    problem.weight =
        weight_of(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, problem.N * problem.K);
    problem.bias = vector_of(bias, "bias", problem.N);
    if (lora_a.has_value()) {
        problem.R = lora_a->dim() == 2 ? lora_a->size(0) : 0;
        problem.lora_a = matrix_of(*lora_a, "lora_a", problem.R, problem.K);
        problem.lora_b = matrix_of(*lora_b, "lora_b", problem.N, problem.R);
        problem.lora_bias = vector_of(lora_bias, "lora_bias", problem.N);
    }
    problem.scaling = static_cast<float>(scaling);
    problem.compute = float_dtype(s, "s");
    matrix_of(s, "s", problem.M, problem.R);
    matrix_of(y, "y", problem.M, problem.N);
    check_contiguous(s, "s");
    check_contiguous(y, "y");
    problem.s = s.mutable_data_ptr();
    problem.y = y.mutable_data_ptr();
    problem.y_dtype = float_dtype(y, "y");
    cpu::nf4_linear(problem, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "nf4_dequantize(Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, int count, int first_row, Tensor(a!) out) -> ()");
    m.def(
        "nf4_quantize(Tensor weight, int block_size, Tensor bounds, Tensor order, Tensor(a!) packed, "
        "Tensor(b!) absmax) -> ()");
    m.def("nf4_nest(Tensor values, Tensor bounds, bool snapped, Tensor(a!) index, Tensor(b!) absmax) -> ()");
    m.def(
        "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? lora_bias, "
        "float scaling, Tensor(a!) s, Tensor(b!) y) -> ()");
    m.def("nf4_linear_has_dot() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CompositeExplicitAutograd, m) {
    m.impl("nf4_linear_has_dot", TORCH_BOX(&peftfast::cpu::nf4_linear_has_dot));
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peftfast::bind::nf4_dequantize));
    m.impl("nf4_quantize", TORCH_BOX(&peftfast::bind::nf4_quantize));
    m.impl("nf4_nest", TORCH_BOX(&peftfast::bind::nf4_nest));
    m.impl("nf4_linear", TORCH_BOX(&peftfast::bind::nf4_linear));
}
