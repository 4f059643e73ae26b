#include "autograd/program.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace peftfast::autograd {

Object::~Object() {
    if (object_ == nullptr || !Py_IsInitialized()) return;
    const PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(object_);
    PyGILState_Release(state);
}

namespace {

void check_python() {
    if (!PyErr_Occurred()) return;
    python_error error;
    error.persist();
    throw error;
}

int int_of(PyObject* number) {
    const long value = PyLong_AsLong(number);
    check_python();
    return static_cast<int>(value);
}

std::string text_of(PyObject* text) {
    const char* value = PyUnicode_AsUTF8(text);
    check_python();
    return value;
}

// A sequence's item, borrowed; the descriptions are lists and tuples.
PyObject* item(PyObject* sequence, Py_ssize_t index) {
    if (!PyTuple_Check(sequence) && !PyList_Check(sequence)) throw std::invalid_argument("a description is a sequence");
    if (index >= PySequence_Fast_GET_SIZE(sequence)) throw std::invalid_argument("a description is too short");
    return PySequence_Fast_GET_ITEM(sequence, index);
}

Py_ssize_t length(PyObject* sequence) {
    const Py_ssize_t size = PySequence_Size(sequence);
    check_python();
    return size;
}

template <typename T, typename Read>
c10::List<T> list_of(PyObject* sequence, Read read) {
    c10::List<T> values;
    for (Py_ssize_t i = 0; i < length(sequence); ++i) values.push_back(read(item(sequence, i)));
    check_python();
    return values;
}

// A plain Python value as an operator's argument of this type.
c10::IValue value_of(PyObject* value, const c10::Type& type) {
    if (value == Py_None) return {};
    if (type.kind() == c10::TypeKind::OptionalType)
        return value_of(value, *type.castRaw<c10::OptionalType>()->getElementType());
    if (PyTuple_Check(value) || PyList_Check(value)) {
        if (type.kind() != c10::TypeKind::ListType) throw std::invalid_argument("a list for " + type.str());
        switch (type.castRaw<c10::ListType>()->getElementType()->kind()) {
            case c10::TypeKind::IntType:
            case c10::TypeKind::SymIntType:
                return list_of<int64_t>(value, PyLong_AsLongLong);
            case c10::TypeKind::FloatType:
                return list_of<double>(value, PyFloat_AsDouble);
            case c10::TypeKind::BoolType:
                return list_of<bool>(value, [](PyObject* one) { return PyObject_IsTrue(one) == 1; });
            default:
                if (length(value) == 0 && *type.castRaw<c10::ListType>()->getElementType() == *c10::TensorType::get()) {
                    return c10::List<at::Tensor>();
                }
                throw std::invalid_argument("a list of " + type.str());
        }
    }
    if (type.kind() == c10::TypeKind::TensorType) {  // a number beside a tensor
        if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value))
            throw std::invalid_argument("no number for a tensor");
        const at::Tensor number = c10::scalar_to_tensor(
            PyFloat_CheckExact(value) ? at::Scalar(PyFloat_AS_DOUBLE(value))
                                      : at::Scalar(static_cast<int64_t>(PyLong_AsLongLong(value))));
        check_python();
        number.unsafeGetTensorImpl()->set_wrapped_number(true);
        return number;
    }
    if (type.kind() == c10::TypeKind::FloatType) {
        const double number = PyFloat_AsDouble(value);
        check_python();
        return number;
    }
    if (PyBool_Check(value)) return value == Py_True;
    if (PyLong_CheckExact(value)) {
        const int64_t number = PyLong_AsLongLong(value);
        check_python();
        return number;
    }
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (PyUnicode_Check(value)) return text_of(value);
    if (THPDtype_Check(value)) return static_cast<int64_t>(reinterpret_cast<THPDtype*>(value)->scalar_type);
    if (THPDevice_Check(value)) return reinterpret_cast<THPDevice*>(value)->device;
    if (THPLayout_Check(value)) return static_cast<int64_t>(reinterpret_cast<THPLayout*>(value)->layout);
    if (THPMemoryFormat_Check(value))
        return static_cast<int64_t>(reinterpret_cast<THPMemoryFormat*>(value)->memory_format);
    throw std::invalid_argument(std::string("a ") + Py_TYPE(value)->tp_name + " as an operator's argument");
}

// (kind, payload): "tensor" place, "tensors" places, "address" place, "stream" None, "value" object.
Argument argument_of(PyObject* described) {
    Argument argument;
    const std::string kind = text_of(item(described, 0));
    PyObject* payload = item(described, 1);
    if (kind == "tensor" || kind == "address") {
        argument.kind = kind == "tensor" ? Argument::Kind::Tensor : Argument::Kind::Address;
        argument.place = int_of(payload);
    } else if (kind == "tensors") {
        argument.kind = Argument::Kind::Tensors;
        argument.places = places_of(payload);
    } else if (kind == "stream") {
        argument.kind = Argument::Kind::Stream;
    } else {
        argument.object = Object(payload);
    }
    return argument;
}

bool gives_views(const c10::FunctionSchema& schema) {
    const auto& returns = schema.returns();
    return !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
}

// Gives memory or a view of an argument: takes less time than letting go of the GIL is worth.
bool is_quick(const c10::FunctionSchema& schema) {
    return schema.name().rfind("aten::empty", 0) == 0 || schema.name() == "aten::_unsafe_view" || gives_views(schema);
}

}  // namespace

std::vector<int> places_of(PyObject* sequence) {
    std::vector<int> places;
    for (Py_ssize_t i = 0; i < length(sequence); ++i) {
        PyObject* one = item(sequence, i);
        places.push_back(one == Py_None ? -1 : int_of(one));
    }
    return places;
}

void put(PyObject* described, std::vector<at::Tensor>& places) {
    for (Py_ssize_t i = 0; i < length(described); ++i) {
        PyObject* one = item(described, i);
        const size_t place = int_of(item(one, 0));
        if (places.size() <= place) places.resize(place + 1);
        places[place] = THPVariable_Unpack(item(one, 1));
    }
}

Program::Program(PyObject* description, const std::vector<int>& kept) {
    const int inputs = int_of(item(description, 0));
    size_ = int_of(item(description, 1));
    PyObject* constants = item(description, 2);
    for (Py_ssize_t i = 0; i < length(constants); ++i) {
        PyObject* one = item(constants, i);
        constants_.emplace_back(int_of(item(one, 0)), THPVariable_Unpack(item(one, 1)));
    }
    PyObject* steps = item(description, 3);
    for (Py_ssize_t i = 0; i < length(steps); ++i) {
        PyObject* step = item(steps, i);
        if (text_of(item(step, 0)) == "operator") {
            add_operator(step);
        } else {
            add_launch(step);
        }
    }
    if (item(description, 4) != Py_None) ready_ = Object(item(description, 4));
    forget_early(kept, inputs);
}

// ("operator", name, overload, arguments in the schema's order, places of the results)
void Program::add_operator(PyObject* described) {
    Step step;
    step.operation = c10::Dispatcher::singleton().findSchemaOrThrow(text_of(item(described, 1)).c_str(),
                                                                    text_of(item(described, 2)).c_str());
    const c10::FunctionSchema& schema = step.operation->schema();
    PyObject* arguments = item(described, 3);
    if (static_cast<size_t>(length(arguments)) != schema.arguments().size()) {
        throw std::invalid_argument("not all arguments of " + schema.name());
    }
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
        PyObject* one = item(arguments, static_cast<Py_ssize_t>(i));
        Argument argument = argument_of(one);
        if (argument.kind == Argument::Kind::Constant) {
            argument.value = value_of(argument.object.get(), *schema.arguments()[i].type());
            argument.object = Object();
        }
        if (argument.kind == Argument::Kind::Tensor && step.viewed < 0 && gives_views(schema) &&
            schema.arguments()[i].alias_info() != nullptr) {
            step.viewed = argument.place;
        }
        step.arguments.push_back(std::move(argument));
    }
    step.results = places_of(item(described, 4));
    step.quick = is_quick(schema);
    if (schema.name() == "aten::empty" && schema.overload_name() == "memory_format") {
        const auto& given = step.arguments;  // size, dtype, layout, device, pin_memory, memory_format
        const bool strided = given[2].value.isNone() || given[2].value.toLayout() == c10::kStrided;
        const bool pinned = !given[4].value.isNone() && given[4].value.toBool();
        if (strided && !pinned && given[5].value.isNone() && !given[1].value.isNone() && !given[3].value.isNone()) {
            step.sizes = given[0].value.toIntVector();
            step.options = at::TensorOptions().dtype(given[1].value.toScalarType()).device(given[3].value.toDevice());
        }
    }
    steps_.push_back(std::move(step));
}

// ("launch", callable, arguments)
void Program::add_launch(PyObject* described) {
    Step step;
    step.callable = Object(item(described, 1));
    PyObject* arguments = item(described, 2);
    for (Py_ssize_t i = 0; i < length(arguments); ++i) step.arguments.push_back(argument_of(item(arguments, i)));
    steps_.push_back(std::move(step));
}

void Program::forget_early(const std::vector<int>& kept, size_t inputs) {
    std::vector<bool> alive(size_, false);
    for (int place : kept) {
        if (place >= 0) alive.at(place) = true;
    }
    for (size_t place = 0; place < inputs; ++place) alive.at(place) = true;  // not this program's to drop
    const auto last_use = [&](Step& step, int place) {
        if (place < 0 || alive.at(place)) return;
        alive[place] = true;
        step.done.push_back(place);
    };
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        for (const Argument& argument : step->arguments) {
            last_use(*step, argument.place);
            for (int place : argument.places) last_use(*step, place);
        }
        for (int place : step->results) last_use(*step, place);
    }
}

bool Program::run(std::vector<at::Tensor>& places) const {
    c10::OptionalDeviceGuard guard;
    Object stream;
    if (ready_) {
        for (const at::Tensor& tensor : places) {
            if (tensor.defined() && !tensor.is_cpu()) {
                guard.reset_device(tensor.device());
                break;
            }
        }
        stream = Object::taken(PyObject_CallNoArgs(ready_.get()));
        check_python();
        if (stream.get() == Py_None) return false;
    }
    places.resize(size_);
    for (const auto& [place, tensor] : constants_) places[place] = tensor;
    // Nothing in here is a view that autograd would have to know of: what leaves it is fresh, or saved.
    at::AutoDispatchBelowADInplaceOrView below;
    c10::AutoGradMode no_grad(false);
    for (const Step& step : steps_) {
        if (step.options) {
            places[step.results[0]] = at::empty(step.sizes, *step.options);
        } else if (step.operation) {
            operate(step, places);
        } else {
            launch(step, places, stream.get());
        }
        for (int place : step.done) places[place].reset();
    }
    return true;
}

void Program::operate(const Step& step, std::vector<at::Tensor>& places) const {
    torch::jit::Stack stack;
    stack.reserve(step.arguments.size());
    for (const Argument& argument : step.arguments) {
        if (argument.kind == Argument::Kind::Tensor) {
            stack.emplace_back(places[argument.place]);
        } else if (argument.kind == Argument::Kind::Tensors) {
            c10::List<at::Tensor> tensors;
            tensors.reserve(argument.places.size());
            for (int place : argument.places) tensors.push_back(places[place]);
            stack.emplace_back(std::move(tensors));
        } else {
            stack.push_back(argument.value);
        }
    }
    if (step.quick) {
        step.operation->callBoxed(stack);
    } else {
        pybind11::gil_scoped_release released;
        step.operation->callBoxed(stack);
    }
    if (stack.size() == 1 && stack[0].isTensorList()) {
        const auto tensors = stack[0].toTensorVector();
        for (size_t i = 0; i < step.results.size(); ++i) places[step.results[i]] = tensors.at(i);
    } else {
        for (size_t i = 0; i < step.results.size(); ++i) places[step.results[i]] = std::move(stack.at(i)).toTensor();
    }
    if (step.viewed < 0) return;
    // So that what is saved of a view is seen to be out of date where its base is written, as it is above these
    // dispatch keys.
    const at::Tensor& viewed = places[step.viewed];
    if (viewed.is_inference()) return;  // it has no version
    const c10::VariableVersion counter = torch::autograd::impl::version_counter(viewed);
    for (int place : step.results) {
        // Nor has a view that is made in inference mode.
        if (!places[place].is_inference()) torch::autograd::impl::set_version_counter(places[place], counter);
    }
}

void Program::launch(const Step& step, std::vector<at::Tensor>& places, PyObject* stream) const {
    const size_t count = step.arguments.size();
    std::vector<Object> made;
    made.reserve(count);
    std::vector<PyObject*> given(count + 1);
    for (size_t i = 0; i < count; ++i) {
        const Argument& argument = step.arguments[i];
        PyObject*& at = given[i + 1];
        if (argument.kind == Argument::Kind::Constant) {
            at = argument.object.get();
            continue;
        }
        if (argument.kind == Argument::Kind::Stream) {
            at = stream;
            continue;
        }
        const at::Tensor& tensor = places[argument.place];
        if (argument.kind == Argument::Kind::Address) {
            at = PyLong_FromUnsignedLongLong(reinterpret_cast<uintptr_t>(tensor.data_ptr()));
        } else {
            at = THPVariable_Wrap(tensor);
        }
        check_python();
        made.push_back(Object::taken(at));
    }
    Object result = Object::taken(
        PyObject_Vectorcall(step.callable.get(), given.data() + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    check_python();
}

}  // namespace peftfast::autograd
