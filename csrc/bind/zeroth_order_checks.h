// The contract of the perturbing operators, the same for the CPU and the CUDA binding.
#pragma once

#include <vector>

#include "bind/checks.h"

namespace peftfast::bind {

constexpr int64_t kWords = int64_t{1} << 32;

inline bool overlapping(const Tensor& a, const Tensor& b) {
    const char *first = static_cast<const char*>(a.const_data_ptr()),
               *second = static_cast<const char*>(b.const_data_ptr());
    const int64_t size = a.numel() * static_cast<int64_t>(element_size(float_dtype(a, "outs")));
    return first != second && first < second + size && second < first + size;
}

// Everything but devices. `minus` has one tensor for each of `outs`, or none.
inline void check_zo(const std::vector<Tensor>& sources, const std::vector<Tensor>& outs,
                     const std::vector<Tensor>& minus, const Tensor& seeds, const Tensor& coefficients,
                     const std::optional<Tensor>& decay, const std::optional<Tensor>& thresholds,
                     const std::optional<Tensor>& rounding_seed, const std::vector<int64_t>& tensor_ids,
                     const std::vector<int64_t>& offsets) {
    const size_t count = outs.size();
    STD_TORCH_CHECK((sources.empty() || sources.size() == count) && (minus.empty() || minus.size() == count),
                    "sources, outs, minus: expected equal lengths or none, got ", sources.size(), ", ", count, ", ",
                    minus.size());
    STD_TORCH_CHECK(tensor_ids.size() == count && offsets.size() == count, "tensor_ids, offsets: expected ", count,
                    " each, got ", tensor_ids.size(), ", ", offsets.size());
    check_dtype(seeds, "seeds", ScalarType::Long);
    check_contiguous(seeds, "seeds");
    check_dtype(coefficients, "coefficients", ScalarType::Float);
    check_contiguous(coefficients, "coefficients");
    check_numel(coefficients, "coefficients", seeds.numel());
    if (decay.has_value()) {
        check_dtype(*decay, "decay", ScalarType::Float);
        check_numel(*decay, "decay", 1);
    }
    if (thresholds.has_value()) {
        check_dtype(*thresholds, "thresholds", ScalarType::Float);
        check_contiguous(*thresholds, "thresholds");
        check_numel(*thresholds, "thresholds", static_cast<int64_t>(count));
    }
    if (rounding_seed.has_value()) check_seed(*rounding_seed);
    for (size_t i = 0; i < count; ++i) {
        const Tensor* all[3] = {&outs[i], sources.empty() ? nullptr : &sources[i], minus.empty() ? nullptr : &minus[i]};
        for (const Tensor* one : all) {
            if (one == nullptr) continue;
            float_dtype(*one, "outs");
            check_dtype(*one, "sources, minus", outs[i].scalar_type());
            check_contiguous(*one, "sources, outs, minus");
            check_numel(*one, "sources, minus", outs[i].numel());
            STD_TORCH_CHECK(!overlapping(outs[i], *one), "sources, outs, minus: expected the same memory or apart");
            STD_TORCH_CHECK(one != all[2] || one->numel() == 0 || one->const_data_ptr() != outs[i].const_data_ptr(),
                            "minus: expected memory apart from outs");
        }
        STD_TORCH_CHECK(tensor_ids[i] >= 0 && tensor_ids[i] < kWords, "tensor_ids: expected values in [0, 2**32), got ",
                        tensor_ids[i]);
        STD_TORCH_CHECK(offsets[i] >= 0 && offsets[i] <= (int64_t{1} << 62),
                        "offsets: expected values in [0, 2**62], got ", offsets[i]);
    }
}

}  // namespace peftfast::bind
