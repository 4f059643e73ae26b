#include "autograd/signature.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <cstring>

namespace peftfast::autograd {

namespace {

// Marks of what follows in a key.
enum Kind : int64_t { kTensor = 1, kFloat, kInt, kBool, kNone, kObject, kSequence, kEnd };

// What a plain tensor's set of keys may hold: its backend, and what torch adds to each.
const c10::DispatchKeySet kPlain = c10::DispatchKeySet(
    {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU,
     c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

// A number for a string, kept for as long as the process runs. -1 where it cannot be kept, with no Python error set.
int64_t number_of(PyObject* text) {
    static PyObject* numbers = PyDict_New();
    if (PyObject* found = PyDict_GetItemWithError(numbers, text)) return PyLong_AsLongLong(found);
    PyErr_Clear();
    const int64_t number = PyDict_Size(numbers);
    PyObject* value = PyLong_FromLongLong(number);
    const bool kept = value != nullptr && PyDict_SetItem(numbers, text, value) == 0;
    Py_XDECREF(value);
    PyErr_Clear();
    return kept ? number : -1;
}

// Whether calls of torch's functions are seen by one of Python's modes. That of a default device, which sees them all
// to give tensors that are made without a device theirs, does not count: a recorded call makes none.
bool function_mode() {
    const int64_t modes = at::impl::PythonTorchFunctionTLS::stack_len();
    if (modes == 0 ||
        at::impl::PythonTorchFunctionTLS::get_disabled_state() == at::impl::TorchFunctionDisabledState::ALL_DISABLED) {
        return false;
    }
    if (modes > 1) return true;
    PyObject* mode = at::impl::PythonTorchFunctionTLS::get_stack_at(0)->ptr(getPyInterpreter());
    return std::strcmp(Py_TYPE(mode)->tp_name, "DeviceContext") != 0;
}

}  // namespace

bool Call::add(const at::Tensor& tensor, bool parameter, bool addressed) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if ((impl->key_set().raw_repr() & ~kPlain.raw_repr()) != 0) return false;
    if (impl->layout() != c10::kStrided || !impl->has_storage()) return false;
    // A view into memory that was freed has an address that is not null.
    if (impl->numel() == 0 || impl->storage().data() == nullptr) return false;
    const auto address = reinterpret_cast<uintptr_t>(impl->data());
    const c10::Device device = impl->device();
    const auto sizes = impl->sizes(), strides = impl->strides();
    key.push_back(kTensor | static_cast<int64_t>(tensor.scalar_type()) << 8 |
                  static_cast<int64_t>(device.type()) << 16 |
                  static_cast<int64_t>(static_cast<uint8_t>(device.index())) << 24 |
                  static_cast<int64_t>(address & 15) << 32 | static_cast<int64_t>(sizes.size()) << 40);
    key.insert(key.end(), sizes.begin(), sizes.end());
    key.insert(key.end(), strides.begin(), strides.end());
    if (parameter && addressed) key.push_back(static_cast<int64_t>(address));
    places.push_back(tensor);
    parameters.push_back(parameter);
    return true;
}

bool Call::add(PyObject* argument, bool addressed) {
    if (THPVariable_CheckExact(argument)) {
        const bool parameter = reinterpret_cast<PyObject*>(Py_TYPE(argument)) == ParameterClass;
        return add(THPVariable_Unpack(argument), parameter, addressed);
    }
    if (argument == Py_None) {
        key.push_back(kNone);
    } else if (PyFloat_CheckExact(argument)) {
        const double value = PyFloat_AS_DOUBLE(argument);
        if (value != value) return false;
        int64_t bits;
        std::memcpy(&bits, &value, sizeof bits);  // 0.0 == -0.0
        key.push_back(kFloat);
        key.push_back(bits);
    } else if (PyBool_Check(argument)) {
        key.push_back(kBool | (argument == Py_True ? 256 : 0));
    } else if (PyLong_CheckExact(argument)) {
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(argument, &overflow);
        if (overflow != 0) return false;
        key.push_back(kInt);
        key.push_back(value);
    } else if (THPDtype_Check(argument)) {
        key.push_back(kObject);
        key.push_back(static_cast<int64_t>(reinterpret_cast<THPDtype*>(argument)->scalar_type));
    } else if (PyUnicode_CheckExact(argument)) {
        const int64_t number = number_of(argument);
        if (number < 0) return false;
        key.push_back(kObject | 256);
        key.push_back(number);
    } else if (PyTuple_Check(argument) || PyList_CheckExact(argument)) {
        return add_all(argument);
    } else {
        return false;
    }
    places.emplace_back();
    parameters.push_back(false);
    return true;
}

bool Call::add_all(PyObject* sequence) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    key.push_back(kSequence | static_cast<int64_t>(PyList_Check(sequence)) << 8);
    for (Py_ssize_t i = 0; i < count; ++i) {
        // Kernels find the parameters of a list by a table of their addresses, which is made for these.
        if (!add(PySequence_Fast_GET_ITEM(sequence, i), true)) return false;
    }
    key.push_back(kEnd);
    return true;
}

bool undisturbed() {
    const auto local = c10::impl::tls_local_dispatch_key_set();
    return !function_mode() && (local.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0 &&
           (c10::default_excluded_set.raw_repr() & ~local.excluded_.raw_repr()) == 0 &&
           !torch::profiler::impl::profilerEnabled() && !torch::autograd::AnomalyMode::is_enabled() &&
           torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

}  // namespace peftfast::autograd
