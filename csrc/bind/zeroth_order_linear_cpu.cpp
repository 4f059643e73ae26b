#include "bind/nf4_weight_cpu.h"
#include "cpu/zeroth_order_linear.h"

namespace peftfast::bind {
namespace {

// Seed, eps and threshold of a move, whose values are read here.
void set_terms(cpu::ZoMove& move, const Tensor& seed, const Tensor& eps, const Optional& threshold, int64_t tensor_id,
               bool rademacher) {
    move.seed = static_cast<int64_t>(seed_value(seed));
    check_cpu(eps, "eps");
    check_dtype(eps, "eps", ScalarType::Float);
    check_numel(eps, "eps", 1);
    move.eps = *static_cast<const float*>(eps.const_data_ptr());
    if (threshold.has_value()) {
        check_cpu(*threshold, "threshold");
        check_dtype(*threshold, "threshold", ScalarType::Float);
        check_numel(*threshold, "threshold", 1);
        move.threshold = static_cast<const float*>(threshold->const_data_ptr());
    }
    STD_TORCH_CHECK(tensor_id >= 0 && tensor_id < (int64_t{1} << 32), "tensor_id: expected a value in [0, 2**32), got ",
                    tensor_id);
    move.tensor_id = static_cast<uint32_t>(tensor_id);
    move.rademacher = rademacher;
}

void set_packed(cpu::ZoMove& move, const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                int64_t count, bool of_scales) {
    move.packed = weight_of(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count);
    STD_TORCH_CHECK(!of_scales || !nested_absmax.has_value(),
                    "absmax: expected float32 block maxima where z moves them, got nested ones");
    move.of_scales = of_scales;
}

// A contiguous matrix or vector of `dtype`, or null.
void* floats_of(const Tensor& t, const char* name, DType dtype, int64_t count) {
    check_cpu(t, name);
    STD_TORCH_CHECK(float_dtype(t, name) == dtype, name, ": expected the weight's dtype");
    check_contiguous(t, name);
    check_numel(t, name, count);
    return const_cast<void*>(t.const_data_ptr());
}

void set_sides(cpu::ZoLinear& problem, const Tensor& x_plus, const Tensor& x_minus, const Optional& bias_plus,
               const Optional& bias_minus, Tensor& y_plus, Tensor& y_minus) {
    STD_TORCH_CHECK(x_plus.dim() == 2 && y_plus.dim() == 2, "x_plus, y_plus: expected two dimensions, got ",
                    shape_of(x_plus), " and ", shape_of(y_plus));
    STD_TORCH_CHECK(bias_plus.has_value() == bias_minus.has_value(), "bias_plus, bias_minus: expected both or none");
    problem.M = x_plus.size(0);
    problem.K = x_plus.size(1);
    problem.N = y_plus.size(1);
    const DType dtype = float_dtype(x_plus, "x_plus");
    problem.weight.dtype = dtype;
    problem.x[0] = floats_of(x_plus, "x_plus", dtype, problem.M * problem.K);
    problem.x[1] = floats_of(x_minus, "x_minus", dtype, problem.M * problem.K);
    problem.y[0] = floats_of(y_plus, "y_plus", dtype, problem.M * problem.N);
    problem.y[1] = floats_of(y_minus, "y_minus", dtype, problem.M * problem.N);
    if (bias_plus.has_value()) {
        problem.bias[0] = floats_of(*bias_plus, "bias_plus", dtype, problem.N);
        problem.bias[1] = floats_of(*bias_minus, "bias_minus", dtype, problem.N);
    }
}

void zo_linear(const Tensor& x_plus, const Tensor& x_minus, const Tensor& weight, const Optional& bias_plus,
               const Optional& bias_minus, const Tensor& seed, const Tensor& eps, const Optional& threshold,
               int64_t tensor_id, bool rademacher, Tensor y_plus, Tensor y_minus) {
    cpu::ZoLinear problem = {};
    set_sides(problem, x_plus, x_minus, bias_plus, bias_minus, y_plus, y_minus);
    problem.weight.dense = floats_of(weight, "weight", problem.weight.dtype, problem.N * problem.K);
    set_terms(problem.weight, seed, eps, threshold, tensor_id, rademacher);
    cpu::zo_linear(problem, torch_pool);
}

void zo_nf4_linear(const Tensor& x_plus, const Tensor& x_minus, const Tensor& packed, const Tensor& absmax,
                   const Tensor& code, int64_t block_size, const Optional& nested_absmax, const Optional& nested_code,
                   const Optional& nested_offset, const Optional& bias_plus, const Optional& bias_minus,
                   const Tensor& seed, const Tensor& eps, const Optional& threshold, int64_t tensor_id, bool rademacher,
                   bool of_scales, Tensor y_plus, Tensor y_minus) {
    cpu::ZoLinear problem = {};
    set_sides(problem, x_plus, x_minus, bias_plus, bias_minus, y_plus, y_minus);
    set_packed(problem.weight, packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset,
               problem.N * problem.K, of_scales);
    set_terms(problem.weight, seed, eps, threshold, tensor_id, rademacher);
    cpu::zo_linear(problem, torch_pool);
}

// Elements from `begin` on of a weight of `count` elements, moved both ways.
void zo_nf4_pair(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                 const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                 int64_t count, int64_t begin, const Tensor& seed, const Tensor& eps, const Optional& threshold,
                 int64_t tensor_id, bool rademacher, bool of_scales, Tensor plus, Tensor minus) {
    cpu::ZoMove move = {};
    move.dtype = float_dtype(plus, "plus");
    set_packed(move, packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count, of_scales);
    set_terms(move, seed, eps, threshold, tensor_id, rademacher);
    const int64_t taken = plus.numel();
    STD_TORCH_CHECK(begin >= 0 && begin <= count - taken, "begin: expected ", taken, " elements within the weight's ",
                    count, ", got from ", begin);
    void* up = floats_of(plus, "plus", move.dtype, taken);
    void* down = floats_of(minus, "minus", move.dtype, taken);
    cpu::zo_moved_pair(move, begin, taken, up, down, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "zo_linear(Tensor x_plus, Tensor x_minus, Tensor weight, Tensor? bias_plus, Tensor? bias_minus, Tensor seed, "
        "Tensor eps, Tensor? threshold, int tensor_id, bool rademacher, Tensor(a!) y_plus, Tensor(b!) y_minus) -> ()");
    m.def(
        "zo_nf4_linear(Tensor x_plus, Tensor x_minus, Tensor packed, Tensor absmax, Tensor code, int block_size, "
        "Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, Tensor? bias_plus, Tensor? bias_minus, "
        "Tensor seed, Tensor eps, Tensor? threshold, int tensor_id, bool rademacher, bool of_scales, "
        "Tensor(a!) y_plus, Tensor(b!) y_minus) -> ()");
    m.def(
        "zo_nf4_pair(Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, int count, int begin, Tensor seed, Tensor eps, "
        "Tensor? threshold, int tensor_id, bool rademacher, bool of_scales, Tensor(a!) plus, Tensor(b!) minus) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("zo_linear", TORCH_BOX(&peftfast::bind::zo_linear));
    m.impl("zo_nf4_linear", TORCH_BOX(&peftfast::bind::zo_nf4_linear));
    m.impl("zo_nf4_pair", TORCH_BOX(&peftfast::bind::zo_nf4_pair));
}
