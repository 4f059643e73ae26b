#include "bind/checks_cuda.h"
#include "cuda/philox.h"

namespace peftfast::bind {
namespace {

void dropout_mask(const Tensor& seed, double p, Tensor out) {
    check_probability(p);
    check_dtype(out, "out", ScalarType::Bool);
    STD_TORCH_CHECK(out.dim() == 2, "out: expected two dimensions, got shape ", shape_of(out));
    check_contiguous(out, "out");
    // 2^31 - 1 blocks of at least 256 elements.
    STD_TORCH_CHECK(out.numel() <= int64_t{0x7fffffff} * 256, "out: expected at most ", int64_t{0x7fffffff} * 256,
                    " elements, got ", out.numel());
    const int32_t device = out.get_device_index();
    check_cuda(out, "out", device);
    check_cuda(seed, "seed", device);
    check_seed(seed);
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_dropout_mask(static_cast<const int64_t*>(seed.const_data_ptr()), out.size(0), out.size(1),
                                           static_cast<uint32_t>(keep_threshold(p)),
                                           static_cast<uint8_t*>(out.mutable_data_ptr()), current_stream(device)),
                 "dropout_mask");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) { m.def("dropout_mask(Tensor seed, float p, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) { m.impl("dropout_mask", TORCH_BOX(&peftfast::bind::dropout_mask)); }
