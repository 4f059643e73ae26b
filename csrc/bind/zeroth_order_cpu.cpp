#include "bind/checks_cpu.h"
#include "bind/zeroth_order_checks.h"
#include "cpu/zeroth_order.h"

namespace peftfast::bind {
namespace {

void zo_apply(std::vector<Tensor> sources, std::vector<Tensor> outs, std::vector<Tensor> minus, const Tensor& seeds,
              const Tensor& coefficients, const std::optional<Tensor>& decay, const std::optional<Tensor>& thresholds,
              const std::optional<Tensor>& rounding_seed, std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets,
              bool rademacher) {
    check_zo(sources, outs, minus, seeds, coefficients, decay, thresholds, rounding_seed, tensor_ids, offsets);
    check_cpu(seeds, "seeds");
    check_cpu(coefficients, "coefficients");
    if (decay.has_value()) check_cpu(*decay, "decay");
    if (thresholds.has_value()) check_cpu(*thresholds, "thresholds");
    if (rounding_seed.has_value()) check_cpu(*rounding_seed, "rounding_seed");
    std::vector<cpu::ZoTensor> tensors(outs.size());
    for (size_t i = 0; i < outs.size(); ++i) {
        cpu::ZoTensor& tensor = tensors[i];
        check_cpu(outs[i], "outs");
        if (!sources.empty()) check_cpu(sources[i], "sources");
        if (!minus.empty()) check_cpu(minus[i], "minus");
        tensor.source = sources.empty() ? nullptr : sources[i].const_data_ptr();
        tensor.out = outs[i].mutable_data_ptr();
        tensor.minus = minus.empty() ? nullptr : minus[i].mutable_data_ptr();
        tensor.count = outs[i].numel();
        tensor.offset = offsets[i];
        tensor.threshold =
            thresholds.has_value() ? static_cast<const float*>(thresholds->const_data_ptr()) + i : nullptr;
        tensor.dtype = float_dtype(outs[i], "outs");
        tensor.tensor_id = static_cast<uint32_t>(tensor_ids[i]);
    }
    cpu::ZoTerms terms = {};
    terms.seeds = static_cast<const int64_t*>(seeds.const_data_ptr());
    terms.coefficients = static_cast<const float*>(coefficients.const_data_ptr());
    terms.count = seeds.numel();
    terms.decay = decay.has_value() ? static_cast<const float*>(decay->const_data_ptr()) : nullptr;
    terms.rounding_seed =
        rounding_seed.has_value() ? static_cast<const int64_t*>(rounding_seed->const_data_ptr()) : nullptr;
    terms.rademacher = rademacher;
    cpu::zo_apply(tensors.data(), static_cast<int64_t>(tensors.size()), terms, torch_pool);
}

// [not finite, bits of the largest magnitude, sum of the bits] over the words in [begin, end).
void normal_survey(int64_t begin, int64_t end, Tensor out) {
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= kWords, "begin, end: expected a range of words, got ", begin,
                    ", ", end);
    check_cpu(out, "out");
    check_dtype(out, "out", ScalarType::Long);
    check_contiguous(out, "out");
    check_numel(out, "out", 3);
    const cpu::NormalSurvey survey =
        cpu::survey_normals(static_cast<uint64_t>(begin), static_cast<uint64_t>(end), torch_pool);
    int64_t* result = static_cast<int64_t*>(out.mutable_data_ptr());
    result[0] = survey.not_finite;
    result[1] = survey.largest;
    result[2] = static_cast<int64_t>(survey.sum_of_bits);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "zo_apply(Tensor[] sources, Tensor(a!)[] outs, Tensor(b!)[] minus, Tensor seeds, Tensor coefficients, "
        "Tensor? decay, Tensor? thresholds, Tensor? rounding_seed, int[] tensor_ids, int[] offsets, bool rademacher) "
        "-> ()");
    m.def("normal_survey(int begin, int end, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("zo_apply", TORCH_BOX(&peftfast::bind::zo_apply));
    m.impl("normal_survey", TORCH_BOX(&peftfast::bind::normal_survey));
}
