#include "bind/checks_cuda.h"
#include "bind/sparse_delta_checks.h"
#include "cuda/sparse_delta.h"

namespace peftfast::bind {
namespace {

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// dyt [N, padded], xt [K, padded].
void sparse_delta_dvalues(const Tensor& dyt, const Tensor& xt, const Tensor& indices, Tensor out) {
    const int32_t device = out.get_device_index();
    for (const auto& [tensor, name] : {std::pair(&dyt, "dyt"), std::pair(&xt, "xt")}) {
        check_cuda(*tensor, name, device);
        check_contiguous(*tensor, name);
        check_dtype(*tensor, name, dyt.scalar_type());
        STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(1) == dyt.size(1) && tensor->size(1) > 0 &&
                            tensor->size(1) % cuda::kRowMultiple == 0,
                        name, ": expected two dimensions, the second of dyt's size and a multiple of ",
                        cuda::kRowMultiple, ", got shape ", shape_of(*tensor));
        STD_TORCH_CHECK(aligned(*tensor), name, ": expected to start at a multiple of 16 bytes");
    }
    check_cuda(indices, "indices", device);
    check_cuda(out, "out", device);
    cuda::Gather gather = {};
    gather.wide_index = wide_indices(indices);
    gather.count = indices.numel();
    STD_TORCH_CHECK(gather.count <= int64_t{0x7fffffff} * 32, "indices: expected at most ", int64_t{0x7fffffff} * 32,
                    ", got ", gather.count);
    check_contiguous(out, "out");
    check_numel(out, "out", gather.count);
    gather.dtype = float_dtype(dyt, "dyt");
    gather.out_dtype = float_dtype(out, "out");
    gather.dyt = dyt.const_data_ptr();
    gather.xt = xt.const_data_ptr();
    gather.n = dyt.size(0);
    gather.k = xt.size(0);
    gather.padded = dyt.size(1);
    gather.indices = indices.const_data_ptr();
    gather.out = out.mutable_data_ptr();
    check_launch(cuda::launch_sparse_delta_dvalues(gather, current_stream(device)), "sparse_delta_dvalues");
}

// The table holds addresses, so that whoever makes it answers for them: peftfast/ops/sparse_delta.py checks the
// tensors.
void sparse_adamw(Tensor table, const Tensor& layer, const Tensor& first, const Tensor& hyper,
                  const Tensor& corrections, const std::optional<Tensor>& seed, const Tensor& weight_like,
                  const Tensor& index_like, const Tensor& age_like) {
    const int32_t device = table.get_device_index();
    check_cuda(table, "table", device);
    check_vector(table, "table", ScalarType::Long, table.size(0) * cuda::kAdamColumns);
    check_cuda(layer, "layer", device);
    check_vector(layer, "layer", ScalarType::Int, layer.numel());
    check_cuda(first, "first", device);
    check_vector(first, "first", ScalarType::Long, layer.numel());
    check_cuda(hyper, "hyper", device);
    check_vector(hyper, "hyper", ScalarType::Float, 7);
    check_cuda(corrections, "corrections", device);
    check_dtype(corrections, "corrections", ScalarType::Float);
    check_contiguous(corrections, "corrections");
    STD_TORCH_CHECK(corrections.dim() == 2 && corrections.size(0) == 2 && corrections.size(1) > 0,
                    "corrections: expected shape [2, ages], got ", shape_of(corrections));
    cuda::Adam adam = {};
    if (seed.has_value()) {
        check_cuda(*seed, "seed", device);
        check_seed(*seed);
        adam.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    STD_TORCH_CHECK(layer.numel() <= 0x7fffffff, "layer: expected at most 2147483647 blocks, got ", layer.numel());
    adam.table = static_cast<const int64_t*>(table.const_data_ptr());
    adam.layer = static_cast<const int32_t*>(layer.const_data_ptr());
    adam.first = static_cast<const int64_t*>(first.const_data_ptr());
    adam.blocks = layer.numel();
    adam.hyper = static_cast<const float*>(hyper.const_data_ptr());
    adam.corrections = static_cast<const float*>(corrections.const_data_ptr());
    adam.ages = corrections.size(1);
    adam.dtype = float_dtype(weight_like, "weight_like");
    adam.wide_index = wide_indices(index_like);
    adam.wide_age = wide_age(age_like);
    check_launch(cuda::launch_sparse_adamw(adam, current_stream(device)), "sparse_adamw");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) {
    m.def("sparse_delta_dvalues(Tensor dyt, Tensor xt, Tensor indices, Tensor(a!) out) -> ()");
    m.def(
        "sparse_adamw(Tensor(a!) table, Tensor layer, Tensor first, Tensor hyper, Tensor corrections, Tensor? seed, "
        "Tensor weight_like, Tensor index_like, Tensor age_like) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) {
    m.impl("sparse_delta_dvalues", TORCH_BOX(&peftfast::bind::sparse_delta_dvalues));
    m.impl("sparse_adamw", TORCH_BOX(&peftfast::bind::sparse_adamw));
}
