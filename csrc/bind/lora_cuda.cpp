#include "bind/checks_cuda.h"
#include "cuda/lora.h"

namespace peftfast::bind {
namespace {

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, int32_t device) {
    check_cuda(t, name, device);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ",
                    columns, "], got ", shape_of(t));
    STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, name, ": expected adjacent columns, got a stride of ",
                    t.stride(1));
}

// partials: float32 [splits, M, R]; the sum over K is cut into that many parts.
void lora_shrink(const Tensor& x, const Tensor& w, const std::optional<Tensor>& seed, double p, double scaling,
                 Tensor partials, Tensor out) {
    check_probability(p);
    STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2, "x, w: expected two dimensions, got shapes ", shape_of(x), " and ",
                    shape_of(w));
    const int32_t device = x.get_device_index();
    const int64_t rows = x.size(0), columns = x.size(1), ranks = w.size(0);
    check_matrix(x, "x", rows, columns, device);
    check_matrix(w, "w", ranks, columns, device);
    check_matrix(out, "out", rows, ranks, device);
    check_contiguous(out, "out");
    check_cuda(partials, "partials", device);
    check_dtype(partials, "partials", ScalarType::Float);
    check_contiguous(partials, "partials");
    STD_TORCH_CHECK(partials.dim() == 3 && partials.size(0) >= 1 && partials.size(0) < 65536 &&
                        partials.size(1) == rows && partials.size(2) == ranks,
                    "partials: expected shape [splits, ", rows, ", ", ranks, "], got ", shape_of(partials));
    // Grid limits: 2^31 - 1 blocks of 32 rows, 65535 of 16 ranks.
    STD_TORCH_CHECK(rows <= int64_t{0x7fffffff} * 32 && ranks <= 65535 * 16, "x, w: too many rows or ranks");
    const int64_t* key = nullptr;
    if (seed.has_value() && p > 0.0) {
        check_cuda(*seed, "seed", device);
        check_seed(*seed);
        key = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    const int32_t threshold = keep_threshold(p);
    const double keep = key == nullptr ? 1.0 : threshold == 0 ? 0.0 : 65536.0 / threshold;
    const cuda::Shrink shrink = {x.const_data_ptr(),
                                 w.const_data_ptr(),
                                 float_dtype(x, "x"),
                                 float_dtype(w, "w"),
                                 float_dtype(out, "out"),
                                 rows,
                                 columns,
                                 ranks,
                                 x.stride(0),
                                 w.stride(0),
                                 key,
                                 static_cast<uint32_t>(threshold),
                                 static_cast<float>(scaling * keep),
                                 partials.size(0),
                                 static_cast<float*>(partials.mutable_data_ptr()),
                                 out.mutable_data_ptr()};
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_lora_shrink(shrink, current_stream(device)), "lora_shrink");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) {
    m.def(
        "lora_shrink(Tensor x, Tensor w, Tensor? seed, float p, float scaling, Tensor(b!) partials, Tensor(a!) out) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) { m.impl("lora_shrink", TORCH_BOX(&peftfast::bind::lora_shrink)); }
