#include "bind/checks_cuda.h"
#include "bind/nf4_checks.h"
#include "cuda/nf4.h"

namespace peftfast::bind {
namespace {

using Optional = std::optional<Tensor>;

// A launch has 2^31 - 1 blocks of at least 256 elements.
void check_elements(int64_t count, const char* name) {
    STD_TORCH_CHECK(count <= int64_t{0x7fffffff} * 256, name, ": expected at most ", int64_t{0x7fffffff} * 256,
                    " elements, got ", count);
}

cuda::Nf4Weight weight_of(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                          const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                          int64_t count, int32_t device) {
    const bool nested = check_nf4(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count);
    check_elements(count, "count");
    check_cuda(packed, "packed", device);
    check_cuda(absmax, "absmax", device);
    check_cuda(code, "code", device);
    cuda::Nf4Weight weight = {};
    weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    weight.absmax = absmax.const_data_ptr();
    weight.code = static_cast<const float*>(code.const_data_ptr());
    weight.block_size = block_size;
    weight.count = count;
    if (nested) {
        check_cuda(*nested_absmax, "nested_absmax", device);
        check_cuda(*nested_code, "nested_code", device);
        check_cuda(*nested_offset, "nested_offset", device);
        weight.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
        weight.nested_code = static_cast<const float*>(nested_code->const_data_ptr());
        weight.nested_offset = static_cast<const float*>(nested_offset->const_data_ptr());
    }
    return weight;
}

void check_power_of_two(int64_t block_size) {
    STD_TORCH_CHECK(block_size >= 32 && (block_size & (block_size - 1)) == 0,
                    "block_size: expected a power of two from 32 on, got ", block_size);
}

void nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                    const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                    int64_t count, int64_t first_row, Tensor out) {
    const DType dtype = float_dtype(out, "out");
    const int32_t device = out.get_device_index();
    check_cuda(out, "out", device);
    const cuda::Nf4Weight weight =
        weight_of(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, count, device);
    const Slab slab = check_slab(out, count, first_row);
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_nf4_dequantize(weight, {slab.begin, slab.end, slab.width, slab.stride},
                                             out.mutable_data_ptr(), dtype, current_stream(device)),
                 "nf4_dequantize");
}

void nf4_quantize(const Tensor& weight, int64_t block_size, const Tensor& bounds, const Tensor& order, Tensor packed,
                  Tensor absmax) {
    const DType dtype = float_dtype(weight, "weight");
    check_quantize(weight, block_size, bounds, order, packed, absmax);
    check_power_of_two(block_size);
    check_elements(weight.numel(), "weight");
    const int32_t device = weight.get_device_index();
    check_cuda(weight, "weight", device);
    check_cuda(bounds, "bounds", device);
    check_cuda(order, "order", device);
    check_cuda(packed, "packed", device);
    check_cuda(absmax, "absmax", device);
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_nf4_quantize(weight.const_data_ptr(), dtype, weight.numel(), block_size,
                                           static_cast<const float*>(bounds.const_data_ptr()),
                                           static_cast<const uint8_t*>(order.const_data_ptr()),
                                           static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                           static_cast<float*>(absmax.mutable_data_ptr()), current_stream(device)),
                 "nf4_quantize");
}

void nf4_nest(const Tensor& values, const Tensor& bounds, bool snapped, Tensor index, Tensor absmax) {
    check_nest(values, bounds, index, absmax);
    check_elements(values.numel(), "values");
    const int32_t device = values.get_device_index();
    check_cuda(values, "values", device);
    check_cuda(bounds, "bounds", device);
    check_cuda(index, "index", device);
    check_cuda(absmax, "absmax", device);
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_nf4_nest(static_cast<const float*>(values.const_data_ptr()), values.numel(),
                                       static_cast<const float*>(bounds.const_data_ptr()), snapped,
                                       static_cast<uint8_t*>(index.mutable_data_ptr()),
                                       static_cast<float*>(absmax.mutable_data_ptr()), current_stream(device)),
                 "nf4_nest");
}

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, int32_t device) {
    check_cuda(t, name, device);
    check_contiguous(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ",
                    columns, "], got ", shape_of(t));
}

const void* vector_of(const Optional& t, const char* name, int64_t size, int32_t device, DType* dtype) {
    if (!t.has_value()) return nullptr;
    check_cuda(*t, name, device);
    check_contiguous(*t, name);
    check_numel(*t, name, size);
    *dtype = float_dtype(*t, name);
    return t->const_data_ptr();
}

void check_aligned(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                    ": expected an address that 16 divides");
}

void nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t block_size,
                const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset,
                const Optional& bias, const Optional& lora_a, const Optional& lora_b, const Optional& lora_bias,
                double scaling, int64_t warps, Tensor partial, Tensor s, Tensor y) {
    const int32_t device = x.get_device_index();
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "x, y: expected 2 dimensions");
    STD_TORCH_CHECK(lora_a.has_value() == lora_b.has_value(), "lora_a, lora_b: expected both or none");
    STD_TORCH_CHECK(lora_a.has_value() || !lora_bias.has_value(), "lora_bias: expected an adapter with it");
    cuda::Nf4Linear problem = {};
    problem.M = x.size(0);
    problem.K = x.size(1);
    problem.N = y.size(1);
    STD_TORCH_CHECK(problem.M <= cuda::kLinearRows, "x: expected at most ", cuda::kLinearRows, " rows, got ",
                    problem.M);
    STD_TORCH_CHECK(problem.K % cuda::kLinearColumns == 0, "x: expected a multiple of ", cuda::kLinearColumns,
                    " columns, got ", problem.K);
    STD_TORCH_CHECK(problem.N == 0 || problem.K <= cuda::kLinearElements / problem.N,
                    "y, x: expected a weight of at most ", cuda::kLinearElements, " elements, got ", problem.N, " x ",
                    problem.K);
    check_power_of_two(block_size);
    check_matrix(x, "x", problem.M, problem.K, device);
    check_matrix(y, "y", problem.M, problem.N, device);
    problem.x = x.const_data_ptr();
    problem.x_dtype = float_dtype(x, "x");
    problem.weight = weight_of(packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset,
                               problem.N * problem.K, device);
    problem.compute = float_dtype(s, "s");
    STD_TORCH_CHECK(problem.compute != DType::f32, "s: expected dtype bfloat16 or float16, the compute dtype");
    STD_TORCH_CHECK(problem.x_dtype == problem.compute || problem.x_dtype == DType::f32,
                    "x: expected float32 or the dtype of s");
    problem.bias = vector_of(bias, "bias", problem.N, device, &problem.bias_dtype);
    if (lora_a.has_value()) {
        problem.R = lora_a->dim() == 2 ? lora_a->size(0) : 0;
        check_matrix(*lora_a, "lora_a", problem.R, problem.K, device);
        check_matrix(*lora_b, "lora_b", problem.N, problem.R, device);
        problem.lora_a = lora_a->const_data_ptr();
        problem.a_dtype = float_dtype(*lora_a, "lora_a");
        STD_TORCH_CHECK(problem.a_dtype == problem.compute || problem.a_dtype == DType::f32,
                        "lora_a: expected float32 or the dtype of s");
        problem.lora_b = lora_b->const_data_ptr();
        problem.b_dtype = float_dtype(*lora_b, "lora_b");
        problem.lora_bias = vector_of(lora_bias, "lora_bias", problem.N, device, &problem.lora_bias_dtype);
        check_aligned(*lora_a, "lora_a");
    }
    check_aligned(x, "x");
    check_aligned(packed, "packed");
    check_matrix(s, "s", problem.M, problem.R, device);
    check_cuda(partial, "partial", device);
    check_contiguous(partial, "partial");
    check_dtype(partial, "partial", ScalarType::Float);
    STD_TORCH_CHECK(warps >= 1 && warps <= 65536, "warps: expected 1 to 65536, got ", warps);
    problem.warps = warps;
    const cuda::Nf4LinearShares shares(problem.M, problem.N, problem.K, problem.R, warps);
    check_numel(partial, "partial", shares.scratch);
    problem.scaling = static_cast<float>(scaling);
    problem.partial = static_cast<float*>(partial.mutable_data_ptr());
    problem.s = s.mutable_data_ptr();
    problem.y = y.mutable_data_ptr();
    problem.y_dtype = float_dtype(y, "y");
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(cuda::launch_nf4_linear(problem, current_stream(device)), "nf4_linear");
}

}  // namespace
}  // namespace peftfast::bind

STABLE_TORCH_LIBRARY_FRAGMENT(peftfast_cuda, m) {
    m.def(
        "nf4_dequantize(Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, int count, int first_row, Tensor(a!) out) -> ()");
    m.def(
        "nf4_quantize(Tensor weight, int block_size, Tensor bounds, Tensor order, Tensor(a!) packed, "
        "Tensor(b!) absmax) -> ()");
    m.def("nf4_nest(Tensor values, Tensor bounds, bool snapped, Tensor(a!) index, Tensor(b!) absmax) -> ()");
    m.def(
        "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor code, int block_size, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? lora_bias, "
        "float scaling, int warps, Tensor(a!) partial, Tensor(b!) s, Tensor(c!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(peftfast_cuda, CUDA, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peftfast::bind::nf4_dequantize));
    m.impl("nf4_quantize", TORCH_BOX(&peftfast::bind::nf4_quantize));
    m.impl("nf4_nest", TORCH_BOX(&peftfast::bind::nf4_nest));
    m.impl("nf4_linear", TORCH_BOX(&peftfast::bind::nf4_linear));
}
