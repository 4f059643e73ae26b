// A recorded call: torch's operators and kernels' launches in order, between numbered places that hold tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <utility>
#include <vector>

namespace peftfast::autograd {

// An owned reference to a Python object. Made, copied and dropped under the GIL, which dropping takes by itself.
class Object {
  public:
    Object() = default;
    explicit Object(PyObject* borrowed) : object_(borrowed) { Py_XINCREF(borrowed); }
    Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Object& operator=(Object&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Object();

    static Object taken(PyObject* owned) {
        Object object;
        object.object_ = owned;
        return object;
    }
    PyObject* get() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

  private:
    PyObject* object_ = nullptr;
};

struct Argument {
    enum class Kind : uint8_t { Constant, Tensor, Tensors, Address, Stream };
    Kind kind = Kind::Constant;
    int place = -1;
    std::vector<int> places;
    c10::IValue value;  // an operator's constant
    Object object;      // a launch's constant
};

struct Step {
    std::optional<c10::OperatorHandle> operation;  // or a launch
    bool quick = false;                            // gives memory or a view: not worth letting go of the GIL
    int viewed = -1;                               // place of the tensor of which the results are views
    std::vector<int64_t> sizes;                    // of an aten::empty without strides
    std::optional<at::TensorOptions> options;
    Object callable;
    std::vector<Argument> arguments;
    std::vector<int> results;
    std::vector<int> done;  // places that no later step reads
};

class Program {
  public:
    // From what peftfast.functional.node hands over: (places, [(place, tensor)], steps, ready or None), and the places
    // to be kept to the end. Throws std::invalid_argument for a step that it cannot hold, python_error for a Python
    // error.
    Program(PyObject* description, const std::vector<int>& kept);

    // Fills the places behind the inputs. Under the GIL, which it lets go of while an operator runs. False, with
    // nothing done, where launches must not be made from here now.
    bool run(std::vector<at::Tensor>& places) const;

  private:
    void add_operator(PyObject* step);
    void add_launch(PyObject* step);
    void forget_early(const std::vector<int>& kept, size_t inputs);
    void operate(const Step& step, std::vector<at::Tensor>& places) const;
    void launch(const Step& step, std::vector<at::Tensor>& places, PyObject* stream) const;

    size_t size_ = 0;
    std::vector<std::pair<int, at::Tensor>> constants_;
    std::vector<Step> steps_;
    Object ready_;  // gives the stream of the launches, or None
};

// A tuple of places, None as -1.
std::vector<int> places_of(PyObject* sequence);
// ((place, tensor), ...) as they stand in these places.
void put(PyObject* described, std::vector<at::Tensor>& places);

}  // namespace peftfast::autograd
