#include "bind/checks_cpu.h"
#include "cpu/philox.h"

namespace peftfast::bind {
namespace {

void dropout_mask(const Tensor& seed, double p, Tensor out) {
    check_probability(p);
    check_cpu(out, "out");
    check_dtype(out, "out", ScalarType::Bool);
    STD_TORCH_CHECK(out.dim() == 2, "out: expected two dimensions, got shape ", shape_of(out));
    check_contiguous(out, "out");
    const uint64_t key = seed_value(seed);
    cpu::dropout_mask(key, out.size(0), out.size(1), static_cast<uint32_t>(keep_threshold(p)),
                      static_cast<uint8_t*>(out.mutable_data_ptr()), torch_pool);
}

void philox_words(const Tensor& seed, int64_t start, int64_t tensor_id, int64_t stream, Tensor out) {
    constexpr int64_t kWordLimit = int64_t{1} << 32;
    STD_TORCH_CHECK(tensor_id >= 0 && tensor_id < kWordLimit, "tensor_id: expected a value in [0, 2**32), got ",
                    tensor_id);
    STD_TORCH_CHECK(stream >= 0 && stream < kWordLimit, "stream: expected a value in [0, 2**32), got ", stream);
    check_cpu(out, "out");
    check_dtype(out, "out", ScalarType::Long);
    STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == 4, "out: expected shape [count, 4], got ", shape_of(out));
    check_contiguous(out, "out");
    const uint64_t key = seed_value(seed);
    // A negative start is a counter above 2^63, as in the reference.
    cpu::philox_words(key, static_cast<uint64_t>(start), out.size(0), static_cast<uint32_t>(tensor_id),
                      static_cast<uint32_t>(stream), static_cast<int64_t*>(out.mutable_data_ptr()), torch_pool);
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cpu, m) {
    m.def("dropout_mask(Tensor seed, float p, Tensor(a!) out) -> ()");
    m.def("philox_words(Tensor seed, int start, int tensor_id, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cpu, CPU, m) {
    m.impl("dropout_mask", TORCH_BOX(&peftfast::bind::dropout_mask));
    m.impl("philox_words", TORCH_BOX(&peftfast::bind::philox_words));
}
