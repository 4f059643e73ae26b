// An autograd Function of Python's whose calls are recorded, and from then on made without Python: forward, graph and
// backward.
#pragma once

#include "autograd/program.h"
#include "autograd/signature.h"

#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace peftfast::autograd {

// What a Function is in Python (peftfast.functional.node), and how often its calls were made here.
struct Hooks {
    std::string name;        // of the node in autograd's graph
    Object plain;            // the Function's own apply
    Object record_forward;   // (args, needs) -> description, with what the call made, or None
    Object record_backward;  // (attributes, needs, dys, saved) -> the same
    Object backward;         // (attributes, needs, dys, saved) -> the Function's gradients
    bool addressed = false;  // its kernels find its parameters by a table of addresses, as they find those of a list
    int64_t forwards = 0, backwards = 0;
    std::string refusal;  // why a call was last not held
};

struct Backward {
    Backward(PyObject* description, const std::vector<int>& arguments);

    std::vector<int> gradients;  // a place for each tensor among the forward's arguments, -1 for none
    Program program;
};

template <typename Recorded>
struct Entry {
    bool never = false;
    std::shared_ptr<Recorded> recorded;  // null while the call was only seen
};

template <typename Recorded>
using Entries = std::unordered_map<Key, Entry<Recorded>, KeyHash>;

// A recorded forward: what a node of the graph needs, beside the tensors that it saves.
struct Forward {
    Forward(std::shared_ptr<Hooks> hooks, PyObject* description, std::vector<int> arguments, PyObject* needs,
            const Call& call);

    std::shared_ptr<Hooks> hooks;
    std::vector<int> results, saved;  // places
    std::vector<bool> parameters;     // of what is saved, whether it is an nn.Parameter among the arguments
    bool single;                      // a tensor and no tuple
    bool materialize;                 // a gradient that is not there is one of zeros
    Object attributes, needs;
    std::vector<int> arguments;  // positions of the direct tensors among the arguments
    Program program;
    Entries<Backward> backwards;  // under the GIL
};

class Function {
  public:
    explicit Function(std::shared_ptr<Hooks> hooks) : hooks_(std::move(hooks)) {}

    // New reference, or null with a Python error.
    PyObject* call(PyObject* const* args, size_t count);
    void forget();
    int64_t recorded() const;
    const Hooks& hooks() const { return *hooks_; }

  private:
    PyObject* plain(PyObject* const* args, size_t count) const;
    std::shared_ptr<Forward> find(Call& call, PyObject* const* args, size_t count, uint64_t needs);

    std::shared_ptr<Hooks> hooks_;
    Entries<Forward> recordings_;
};

// What beside their arguments calls depend on: ((dictionary, list of its keys), ...), such as the process's
// environment; what gives the number of a set of their values, negative where nothing is to be recorded; and how many
// recordings a Function may have.
void configure(PyObject* sources, PyObject* number, size_t most);

}  // namespace peftfast::autograd
