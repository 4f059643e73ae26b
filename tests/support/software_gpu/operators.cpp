// Every operator that torch computes on CUDA, computed by the CPU's kernel on the same memory: its tensors are handed
// on as tensors of the CPU at their addresses, and what it makes is copied to the device.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

extern "C" {
void software_gpu_submit(void* stream, const char* what, void (*function)(void*), void* context);
int software_gpu_capturing(void* stream);
}

namespace {

using c10::IValue;
using Stack = torch::jit::Stack;
using Tensors = std::vector<at::Tensor>;
using Optionals = c10::List<std::optional<at::Tensor>>;

template <typename T>
T& kept() {
    static T* value = new T;
    return *value;
}

at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    at::Tensor made = at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                                    at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    return made;
}

at::Tensor on_cuda(const at::Tensor& given) {
    if (!given.defined() || given.is_cuda()) return given;
    at::Tensor tensor = given.resolve_conj().resolve_neg();
    if (!tensor.is_non_overlapping_and_dense()) tensor = tensor.contiguous();
    const auto options = tensor.options().device(at::Device(at::kCUDA, 0)).pinned_memory(false);
    at::Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), options);
    if (tensor.numel())
        memcpy(made.mutable_data_ptr(), tensor.const_data_ptr(), tensor.numel() * tensor.element_size());
    return made;
}

template <typename Call>
void each_tensor(const IValue& value, Call call) {
    if (value.isTensor()) {
        call(value.toTensor());
    } else if (value.isTensorList()) {
        for (const at::Tensor one : value.toTensorList()) call(one);
    } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor> one : value.toOptionalTensorList())
            if (one) call(*one);
    }
}

// A CUDA generator's numbers are those of a CPU's, of the same seed and place.
struct Numbers {
    uint64_t seed = 0, offset = 0;
    at::Generator generator;
};
struct AllNumbers : std::map<c10::GeneratorImpl*, Numbers> {};

IValue generator_of(at::Generator given, bool capturing) {
    TORCH_CHECK(!given.device().is_cpu(), "Expected a 'cuda' device type for generator but found 'cpu'");
    auto* cuda = given.get<at::CUDAGeneratorImpl>();
    Numbers& own = kept<AllNumbers>()[cuda];
    std::lock_guard<std::mutex> lock(given.mutex());
    const uint64_t seed = cuda->current_seed(), offset = capturing ? own.offset : cuda->philox_offset_per_thread();
    if (!own.generator.defined() || own.seed != seed || own.offset != offset)
        own = {seed, offset, at::detail::createCPUGenerator(seed ^ (offset * 0x9E3779B97F4A7C15ull))};
    if (!capturing) cuda->set_philox_offset_per_thread(own.offset = offset + 4);
    return own.generator;
}

IValue handed_on(const IValue& value, const c10::Type& type, bool capturing) {
    const bool optional = type.kind() == c10::TypeKind::ListType &&
                          type.castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::OptionalType;
    if (value.isOptionalTensorList() || (optional && value.isTensorList())) {
        Optionals made;
        if (value.isTensorList()) {
            for (const at::Tensor one : value.toTensorList()) made.push_back(on_cpu(one));
        } else {
            for (const std::optional<at::Tensor> one : value.toOptionalTensorList())
                made.push_back(one ? std::optional<at::Tensor>(on_cpu(*one)) : std::nullopt);
        }
        return made;
    }
    if (value.isTensor()) return on_cpu(value.toTensor());
    if (value.isTensorList()) {
        Tensors made;
        for (const at::Tensor one : value.toTensorList()) made.push_back(on_cpu(one));
        return made;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(at::kCPU);
    if (value.isGenerator()) return generator_of(value.toGenerator(), capturing);
    return value;
}

// Products that only CUDA has: of narrow operands in a wider dtype.
bool wide_product(const std::string& name, Stack& stack) {
    const auto wide = [&](int i, int dtype) { return stack[i].toTensor().to(stack[dtype].toScalarType()); };
    if (name == "aten::mm.dtype") {
        stack = {at::mm(wide(0, 2), wide(1, 2))};
    } else if (name == "aten::bmm.dtype") {
        stack = {at::bmm(wide(0, 2), wide(1, 2))};
    } else if (name == "aten::mm.dtype_out") {
        stack = {stack[3].toTensor().copy_(at::mm(wide(0, 2), wide(1, 2)))};
    } else if (name == "aten::addmm.dtype") {
        stack = {at::addmm(wide(0, 3), wide(1, 3), wide(2, 3), stack[4].toScalar(), stack[5].toScalar())};
    } else {
        return false;
    }
    return true;
}

// Whether the host waits for the device to make this call.
bool waits(const std::string& name, const Stack& arguments) {
    static const std::set<std::string> always = {
        "aten::_local_scalar_dense", "aten::nonzero",    "aten::equal",      "aten::masked_select", "aten::_unique2",
        "aten::unique_consecutive",  "aten::unique_dim", "aten::is_nonzero",
    };
    if (always.count(name)) return true;
    if (name == "aten::copy_") {
        const at::Tensor to = arguments[0].toTensor(), from = arguments[1].toTensor();
        return to.is_cuda() != from.is_cuda() && !arguments[2].toBool() && to.numel() > 0;
    }
    bool masked = false;
    if (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_")
        each_tensor(arguments[1], [&](const at::Tensor& one) { masked |= one.defined() && one.dtype() == at::kBool; });
    return masked;
}

// One call; kept by a captured graph, which makes it again with the values that its tensors have then.
struct Job {
    c10::OperatorHandle op;
    std::string name;
    Stack given, handed;
    Stack results;
    Tensors places;  // of the results, where the first call put them
    bool done = false;
    std::exception_ptr error;

    void run() {
        Stack stack;
        for (size_t i = 0; i < handed.size(); ++i) {
            const auto& type = *op.schema().arguments()[i].type();
            const bool drawn = done && given[i].isGenerator();
            stack.push_back(handed_on(drawn ? given[i] : handed[i], type, false));  // lists of this call's own
        }
        try {
            at::AutoDispatchBelowADInplaceOrView below;
            if (!wide_product(name, stack)) op.callBoxed(&stack);
        } catch (...) {
            error = std::current_exception();
            return;
        }
        if (!done) {
            results = std::move(stack);
            done = true;
            return;
        }
        size_t place = 0;
        for (const IValue& value : stack) {
            each_tensor(value, [&](const at::Tensor& one) {
                const at::Tensor& to = places.at(place++);
                if (to.defined() && to.numel() && to.data_ptr() != one.data_ptr()) to.copy_(one);
            });
        }
    }
};

void compute(const c10::OperatorHandle& op, Stack* stack) {
    const auto& schema = op.schema();
    const auto& arguments = schema.arguments();
    Stack given(stack->end() - arguments.size(), stack->end());
    torch::jit::drop(*stack, arguments.size());
    void* stream = c10::cuda::getCurrentCUDAStream().stream();
    const bool capturing = software_gpu_capturing(stream);
    const std::string name = c10::toString(op.operator_name());
    if (waits(schema.name(), given)) {
        TORCH_CHECK(!capturing, name, ": the host waits for the device while a graph is captured");
        if (c10::cuda::warning_state().get_sync_debug_mode() != c10::cuda::SyncDebugMode::L_DISABLED)
            c10::cuda::warn_or_error_on_sync();
    }
    auto job = std::make_unique<Job>(Job{op, name});
    std::vector<size_t> grown;  // outputs that have no memory yet
    bool cuda = false;
    for (size_t i = 0; i < given.size(); ++i) {
        cuda |= given[i].isDevice() && given[i].toDevice().is_cuda();
        each_tensor(given[i], [&](const at::Tensor& one) { cuda |= one.defined() && one.is_cuda(); });
        const bool empty = arguments[i].is_out() && given[i].isTensor() && given[i].toTensor().is_cuda() &&
                           given[i].toTensor().numel() == 0;
        if (empty) grown.push_back(i);
        job->handed.push_back(empty ? IValue(at::empty({0}, given[i].toTensor().options().device(at::kCPU)))
                                    : handed_on(given[i], *arguments[i].type(), capturing));
    }
    for (const IValue& value : given) job->given.push_back(value.isGenerator() ? value : IValue());
    software_gpu_submit(stream, name.c_str(), [](void* one) { static_cast<Job*>(one)->run(); }, job.get());
    if (job->error) std::rethrow_exception(job->error);
    for (size_t i : grown) {
        const at::Tensor to = given[i].toTensor(), value = job->handed[i].toTensor();
        to.resize_(value.sizes());
        if (value.numel()) on_cpu(to).copy_(value);
    }
    for (size_t r = 0; r < schema.returns().size(); ++r) {
        IValue value = job->results[r];
        const auto* alias = schema.returns()[r].alias_info();
        bool argument = false;
        for (size_t i = 0; alias && i < given.size() && !argument; ++i) {
            const auto* own = arguments[i].alias_info();
            argument = own && !own->beforeSets().empty() && own->beforeSets() == alias->beforeSets();
            if (argument) value = given[i];
        }
        if (!argument && cuda && value.isTensor()) value = on_cuda(value.toTensor());
        if (!argument && cuda && value.isTensorList()) {
            Tensors made;
            each_tensor(value, [&](const at::Tensor& one) { made.push_back(on_cuda(one)); });
            value = made;
        }
        if (capturing) each_tensor(value, [&](const at::Tensor& one) { job->places.push_back(on_cpu(one)); });
        stack->push_back(value);
    }
    job->results.clear();
    if (capturing) job.release();  // the graph's
}

// What makes tensors and views of them stays torch's own.
const std::set<std::string> kOwn = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::as_strided",
    "aten::view",
    "aten::_reshape_alias",
    "aten::unfold",
    "aten::view_as_real",
    "aten::view_as_complex",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Tensor",
    "aten::set_.source_Storage_storage_offset",
    "aten::resize_",
    "aten::record_stream",
    "aten::_efficientzerotensor",
    "aten::is_set_to",
    "aten::is_pinned",
    "aten::_pin_memory",
};

struct Libraries : std::vector<std::unique_ptr<torch::Library>> {};

// Take the place of all CUDA kernels of a namespace's operators; how many.
int take_over(const std::string& space) {
    const auto key = c10::DispatchKey::CUDA;
    const auto names = c10::Dispatcher::singleton().getRegistrationsForDispatchKey(key);
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, space, key, __FILE__, __LINE__);
    int count = 0;
    for (const auto& name : names) {
        const std::string full = c10::toString(name);
        if (name.getNamespace().value_or("") != space || kOwn.count(full)) continue;
        library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
        ++count;
    }
    if (space == "aten") library->impl("copy_", torch::CppFunction::makeFromBoxedFunction<&compute>());
    kept<Libraries>().push_back(std::move(library));
    return count;
}

}  // namespace

PYBIND11_MODULE(software_gpu_operators, module) { module.def("take_over", &take_over); }
