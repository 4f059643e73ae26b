// What a recording depends on: all of a call's arguments but the addresses and the contents of its tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/python_headers.h>

#include <cstdint>
#include <vector>

namespace peftfast::autograd {

using Key = std::vector<int64_t>;

struct KeyHash {
    size_t operator()(const Key& key) const {
        uint64_t hash = 0x9e3779b97f4a7c15u ^ key.size();
        for (int64_t word : key) {
            hash ^= static_cast<uint64_t>(word);
            hash *= 0xff51afd7ed558ccdu;
            hash ^= hash >> 32;
        }
        return hash;
    }
};

// The arguments as places: each tensor, and each plain value as one that is not defined, those of a list in its order.
struct Call {
    Key key;
    std::vector<at::Tensor> places;
    std::vector<bool> parameters;  // of each place, whether it is an nn.Parameter
    bool made = false;             // by being recorded: what it gives and saves stands in its places too

    // False for an argument that no recording holds. ``addressed``: a parameter's address is a part of the key.
    bool add(PyObject* argument, bool addressed);
    bool add(const at::Tensor& tensor, bool parameter, bool addressed);

  private:
    bool add_all(PyObject* sequence);
};

// Whether nothing in this thread sees or changes single operators: modes of functions or of dispatch, functorch,
// autocast, tracers, the profiler, anomaly mode, forward-mode differentiation. Under the GIL.
bool undisturbed();

}  // namespace peftfast::autograd
