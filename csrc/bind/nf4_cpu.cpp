#include "bind/checks_cpu.h"
#include "bind/nf4_checks.h"
#include "cpu/nf4.h"

namespace peftfast::bind {
namespace {

void nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                    const std::optional<Tensor>& nested_offset, Tensor out) {
    const DType dtype = float_dtype(out, "out");
    const bool nested = check_nf4(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, out);
    check_cpu(packed, "packed");
    check_cpu(absmax, "absmax");
    check_cpu(code, "code");
    check_cpu(out, "out");
    cpu::Nf4Weight weight = {};
    weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    weight.code = static_cast<const float*>(code.const_data_ptr());
    weight.block_size = block_size;
    weight.count = out.numel();
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
    cpu::nf4_dequantize(weight, out.mutable_data_ptr(), dtype, torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def(
        "nf4_dequantize(Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peftfast::bind::nf4_dequantize));
}
