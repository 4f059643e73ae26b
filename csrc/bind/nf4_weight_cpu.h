// A 4-bit weight as the CPU kernels take it, checked.
#pragma once

#include "bind/checks_cpu.h"
#include "bind/nf4_checks.h"
#include "cpu/nf4.h"

namespace peftfast::bind {

using Optional = std::optional<Tensor>;

inline cpu::Nf4Weight weight_of(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                                const Optional& nested_absmax, const Optional& nested_code,
                                const Optional& nested_offset, int64_t count) {
    const bool nested = check_nf4(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count);
    check_cpu(packed, "packed");
    check_cpu(absmax, "absmax");
    check_cpu(code, "code");
    cpu::Nf4Weight weight = {};
    weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    weight.code = static_cast<const float*>(code.const_data_ptr());
    weight.block_size = block_size;
    weight.count = count;
    if (nested) {
        check_cpu(*nested_absmax, "nested_absmax");
        check_cpu(*nested_code, "nested_code");
        check_cpu(*nested_offset, "nested_offset");
        weight.maxima.bytes = static_cast<const uint8_t*>(absmax.const_data_ptr());
        weight.maxima.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
        weight.maxima.nested_code = static_cast<const float*>(nested_code->const_data_ptr());
        weight.maxima.nested_offset = *static_cast<const float*>(nested_offset->const_data_ptr());
    } else {
        weight.maxima.absmax = static_cast<const float*>(absmax.const_data_ptr());
    }
    return weight;
}

}  // namespace peftfast::bind
