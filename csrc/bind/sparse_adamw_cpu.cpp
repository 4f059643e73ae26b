#include "bind/sparse_delta_cpu.h"
#include "cpu/sparse_adamw.h"

namespace peftfast::bind {
namespace {

float* written_floats(Tensor& t, const char* name, int64_t count) {
    floats_of(t, name, count);
    return static_cast<float*>(t.mutable_data_ptr());
}

// exp_avg and exp_avg_sq are float32, or bytes beside their maxima and what the bytes stand for.
void sparse_adamw(Tensor values, const Tensor& grads, Tensor exp_avg, Tensor exp_avg_sq,
                  std::optional<Tensor> exp_avg_max, std::optional<Tensor> exp_avg_sq_max,
                  const std::optional<Tensor>& codes, Tensor age, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& indices, const std::optional<Tensor>& base, const Tensor& hyper,
                  const Tensor& corrections, const std::optional<Tensor>& seed, int64_t tensor_id) {
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
    STD_TORCH_CHECK(codes.has_value() == exp_avg_max.has_value() && codes.has_value() == exp_avg_sq_max.has_value(),
                    "exp_avg_max, exp_avg_sq_max, codes: expected all or none");
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
    const ScalarType state = codes.has_value() ? ScalarType::Byte : ScalarType::Float;
    const int64_t blocks = (count + sparse::kStateBlock - 1) / sparse::kStateBlock;
    if (codes.has_value()) {
        buffers.codes = floats_of(*codes, "codes", 512);
        floats_of(*exp_avg_max, "exp_avg_max", blocks);
        floats_of(*exp_avg_sq_max, "exp_avg_sq_max", blocks);
    }
    for (const auto& [tensor, name] : {std::pair(&exp_avg, "exp_avg"), std::pair(&exp_avg_sq, "exp_avg_sq")}) {
        check_cpu(*tensor, name);
        check_vector(*tensor, name, state, count);
    }
    buffers.values = written_floats(values, "values", count);
    buffers.exp_avg = exp_avg.mutable_data_ptr();
    buffers.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
    if (codes.has_value()) {
        buffers.exp_avg_max = written_floats(*exp_avg_max, "exp_avg_max", blocks);
        buffers.exp_avg_sq_max = written_floats(*exp_avg_sq_max, "exp_avg_sq_max", blocks);
    }
    buffers.age = age.mutable_data_ptr();
    if (weight.has_value()) target.data = weight->mutable_data_ptr();
    cpu::sparse_adamw(buffers, hyper_values, target, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "sparse_adamw(Tensor(a!) values, Tensor grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(f!)? exp_avg_max, Tensor(g!)? exp_avg_sq_max, Tensor? codes, Tensor(d!) age, Tensor(e!)? weight, "
        "Tensor? indices, Tensor? base, Tensor hyper, Tensor corrections, Tensor? seed, int tensor_id) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) { m.impl("sparse_adamw", TORCH_BOX(&peftfast::bind::sparse_adamw)); }
