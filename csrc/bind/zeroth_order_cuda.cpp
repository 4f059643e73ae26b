#include "bind/checks_cuda.h"
#include "bind/zeroth_order_checks.h"
#include "cuda/zeroth_order.h"

namespace peftfast::bind {
namespace {

void zo_apply(std::vector<Tensor> sources, std::vector<Tensor> outs, std::vector<Tensor> minus, const Tensor& seeds,
              const Tensor& coefficients, const std::optional<Tensor>& decay, const std::optional<Tensor>& thresholds,
              const std::optional<Tensor>& rounding_seed, std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets,
              bool rademacher) {
    check_zo(sources, outs, minus, seeds, coefficients, decay, thresholds, rounding_seed, tensor_ids, offsets);
    if (outs.empty()) return;
    const int32_t device = outs[0].get_device_index();
    check_cuda(seeds, "seeds", device);
    check_cuda(coefficients, "coefficients", device);
    if (decay.has_value()) check_cuda(*decay, "decay", device);
    if (thresholds.has_value()) check_cuda(*thresholds, "thresholds", device);
    if (rounding_seed.has_value()) check_cuda(*rounding_seed, "rounding_seed", device);
    std::vector<cuda::ZoTensor> tensors(outs.size());
    for (size_t i = 0; i < outs.size(); ++i) {
        check_dtype(outs[i], "outs", outs[0].scalar_type());
        check_cuda(outs[i], "outs", device);
        if (!sources.empty()) check_cuda(sources[i], "sources", device);
        if (!minus.empty()) check_cuda(minus[i], "minus", device);
        cuda::ZoTensor& tensor = tensors[i];
        tensor.source = sources.empty() ? nullptr : sources[i].const_data_ptr();
        tensor.out = outs[i].mutable_data_ptr();
        tensor.minus = minus.empty() ? nullptr : minus[i].mutable_data_ptr();
        tensor.count = outs[i].numel();
        tensor.offset = offsets[i];
        tensor.tensor_id = static_cast<uint32_t>(tensor_ids[i]);
    }
    cuda::ZoTerms terms = {};
    terms.seeds = static_cast<const int64_t*>(seeds.const_data_ptr());
    terms.coefficients = static_cast<const float*>(coefficients.const_data_ptr());
    terms.count = seeds.numel();
    terms.decay = decay.has_value() ? static_cast<const float*>(decay->const_data_ptr()) : nullptr;
    terms.thresholds = thresholds.has_value() ? static_cast<const float*>(thresholds->const_data_ptr()) : nullptr;
    terms.rounding_seed =
        rounding_seed.has_value() ? static_cast<const int64_t*>(rounding_seed->const_data_ptr()) : nullptr;
    terms.rademacher = rademacher;
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_zo_apply(tensors.data(), static_cast<int64_t>(tensors.size()), terms,
                                       float_dtype(outs[0], "outs"), current_stream(device)),
                 "zo_apply");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) {
    m.def(
        "zo_apply(Tensor[] sources, Tensor(a!)[] outs, Tensor(b!)[] minus, Tensor seeds, Tensor coefficients, "
        "Tensor? decay, Tensor? thresholds, Tensor? rounding_seed, int[] tensor_ids, int[] offsets, bool rademacher) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) { m.impl("zo_apply", TORCH_BOX(&peftfast::bind::zo_apply)); }
