#include "bind/checks_cuda.h"
#include "bind/nf4_checks.h"
#include "cuda/nf4.h"

namespace peftfast::bind {
namespace {

void nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                    const std::optional<Tensor>& nested_offset, Tensor out) {
    const DType dtype = float_dtype(out, "out");
    const bool nested = check_nf4(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, out);
    // 2^31 - 1 blocks of at least 256 elements.
    STD_TORCH_CHECK(out.numel() <= int64_t{0x7fffffff} * 256, "out: expected at most ", int64_t{0x7fffffff} * 256,
                    " elements, got ", out.numel());
    const int32_t device = out.get_device_index();
    check_cuda(out, "out", device);
    check_cuda(packed, "packed", device);
    check_cuda(absmax, "absmax", device);
    check_cuda(code, "code", device);
    cuda::Nf4Weight weight = {};
    weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    weight.absmax = absmax.const_data_ptr();
    weight.code = static_cast<const float*>(code.const_data_ptr());
    weight.block_size = block_size;
    weight.count = out.numel();
    if (nested) {
        check_cuda(*nested_absmax, "nested_absmax", device);
        check_cuda(*nested_code, "nested_code", device);
        check_cuda(*nested_offset, "nested_offset", device);
        weight.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
        weight.nested_code = static_cast<const float*>(nested_code->const_data_ptr());
        weight.nested_offset = static_cast<const float*>(nested_offset->const_data_ptr());
    }
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_nf4_dequantize(weight, out.mutable_data_ptr(), dtype, current_stream(device)),
                 "nf4_dequantize");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) {
    m.def(
        "nf4_dequantize(Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peftfast::bind::nf4_dequantize));
}
