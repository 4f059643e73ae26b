#include "autograd/function.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <mutex>
#include <stdexcept>
#include <utility>

namespace peftfast::autograd {

namespace {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Saved = std::vector<SavedVariable>;

constexpr size_t kMostArguments = 64;

struct Settings {
    Object sources, number;
    size_t most = 0;
    std::vector<Object> values;  // of the sources' keys, as they were when the number was asked for
    int64_t current = -1;

    // Calls see(value, borrowed or null) for each key of each source while it answers true.
    template <typename See>
    bool each(See see) const {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sources.get()); ++i) {
            PyObject* source = PyTuple_GET_ITEM(sources.get(), i);
            PyObject *dictionary = PyTuple_GET_ITEM(source, 0), *keys = PyTuple_GET_ITEM(source, 1);
            for (Py_ssize_t k = 0; k < PyList_GET_SIZE(keys); ++k) {
                if (!see(PyDict_GetItem(dictionary, PyList_GET_ITEM(keys, k)))) return false;
            }
        }
        return true;
    }

    bool are(const std::vector<Object>& given) const {
        size_t count = 0;
        return each([&](PyObject* value) { return count < given.size() && value == given[count++].get(); }) &&
               count == given.size();
    }
};

Settings& settings() {
    static Settings* settings = new Settings;  // Python is gone when statics are destroyed
    return *settings;
}

[[noreturn]] void throw_python() {
    python_error error;
    error.persist();
    throw error;
}

PyObject* checked(PyObject* owned) {
    if (owned == nullptr) throw_python();
    return owned;
}

// The number of the values now, negative where nothing is to be recorded.
int64_t settings_number() {
    Settings& known = settings();
    if (!known.sources) return -1;  // not configured
    if (!known.values.empty() && known.are(known.values)) return known.current;
    std::vector<Object> values;
    known.each([&](PyObject* value) {
        values.emplace_back(value);
        return true;
    });
    const Object number = Object::taken(checked(PyObject_CallNoArgs(known.number.get())));
    if (!known.are(values)) return -1;  // another thread has changed one meanwhile: whose number this is is not known
    known.values = std::move(values);
    known.current = PyLong_AsLongLong(number.get());
    return known.current;
}

Object tuple_of(const std::vector<at::Tensor>& tensors) {
    Object tuple = Object::taken(checked(PyTuple_New(static_cast<Py_ssize_t>(tensors.size()))));
    for (size_t i = 0; i < tensors.size(); ++i) {
        PyObject* one = tensors[i].defined() ? checked(THPVariable_Wrap(tensors[i])) : Py_NewRef(Py_None);
        PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), one);
    }
    return tuple;
}

PyObject* described(PyObject* description, Py_ssize_t index) {
    if (!PyTuple_Check(description) || index >= PyTuple_GET_SIZE(description)) {
        throw std::invalid_argument("a description is too short");
    }
    return PyTuple_GET_ITEM(description, index);
}

std::vector<int> joined(std::vector<int> first, const std::vector<int>& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

// What a recording holds of Python's may run Python's code as it goes: the table is empty by then.
template <typename Recorded>
void clear(Entries<Recorded>& entries) {
    Entries<Recorded> gone;
    gone.swap(entries);
}

// A recording, or null where its description cannot be held.
template <typename Make>
auto held(Hooks& hooks, Make make) -> decltype(make()) {
    try {
        return make();
    } catch (const std::exception& error) {
        hooks.refusal = error.what();
        return nullptr;
    }
}

// Whether there was an entry already; there is one now, and not more than so many of others.
template <typename Recorded>
bool seen_before(Entries<Recorded>& entries, const Key& key) {
    if (entries.find(key) != entries.end()) return true;
    if (entries.size() >= settings().most) clear(entries);
    entries.emplace(key, Entry<Recorded>{});
    return false;
}

bool is_parameter(const at::Tensor& tensor) {
    const Object wrapped = Object::taken(checked(THPVariable_Wrap(tensor)));
    return reinterpret_cast<PyObject*>(Py_TYPE(wrapped.get())) == ParameterClass;
}

struct LayerNode : public torch::autograd::Node {
    LayerNode(edge_list&& edges, std::shared_ptr<Forward> recorded)
        : Node(std::move(edges)), forward(std::move(recorded)) {}

    std::string name() const override { return forward->hooks->name; }

    void release_variables() override { const auto kept = taken(true); }

    // The engine's tracer would have to see Python's operators.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
        TORCH_CHECK_NOT_IMPLEMENTED(
            false, name(),
            ": compiled autograd cannot see into this node; set PEFTFAST_AUTOGRAD=python for one that it can");
    }

    variable_list apply(variable_list&& dys) override;
    variable_list in_python(const variable_list& dys, const variable_list& given) const;
    variable_list gradients_of(PyObject* all) const;
    std::shared_ptr<Backward> find(const Key& key, const variable_list& dys, const variable_list& given,
                                   variable_list& gradients) const;

    // What is saved, which may be gone then: hooks on it, and what it holds, run Python's code, and not under the lock.
    std::shared_ptr<Saved> taken(bool away) {
        std::lock_guard<std::mutex> lock(mutex_);
        return away ? std::exchange(saved, nullptr) : saved;
    }

    std::shared_ptr<Forward> forward;
    std::shared_ptr<Saved> saved;  // those of forward->saved that are tensors
};

variable_list LayerNode::apply(variable_list&& dys) {
    variable_list given(forward->saved.size());
    {
        const auto kept = taken(false);
        TORCH_CHECK(kept != nullptr, torch::autograd::ERR_BACKWARD_TWICE);
        size_t next = 0;
        for (size_t i = 0; i < given.size(); ++i) {
            if (forward->saved[i] >= 0) given[i] = (*kept)[next++].unpack();
        }
    }
    for (size_t i = 0; i < dys.size(); ++i) {
        if (!dys[i].defined() && forward->materialize) dys[i] = input_metadata(i).zeros_like();
    }
    pybind11::gil_scoped_acquire gil;
    if (at::GradMode::is_enabled() || !undisturbed()) return in_python(dys, given);
    Call call;
    call.key.reserve(96);
    call.places.reserve(dys.size() + given.size());
    call.key.push_back(settings_number());
    if (call.key[0] < 0) return in_python(dys, given);
    const auto add = [&](const at::Tensor& tensor, bool parameter) {
        return tensor.defined() ? call.add(tensor, parameter, forward->hooks->addressed) : call.add(Py_None, false);
    };
    for (const at::Tensor& dy : dys) {
        if (!add(dy, false)) return in_python(dys, given);
    }
    for (size_t i = 0; i < given.size(); ++i) {
        // A hook may have given another tensor for a parameter, whose address is no part of the key.
        const bool parameter = forward->hooks->addressed && forward->parameters[i] && is_parameter(given[i]);
        if (!add(given[i], parameter)) return in_python(dys, given);
    }
    variable_list gradients;
    const std::shared_ptr<Backward> backward = find(call.key, dys, given, gradients);
    if (!backward) return in_python(dys, given);
    if (gradients.empty()) {
        if (!backward->program.run(call.places)) return in_python(dys, given);
        for (int place : backward->gradients) gradients.push_back(place < 0 ? at::Tensor() : call.places[place]);
    }
    ++forward->hooks->backwards;
    return gradients;
}

// Its gradients too where it is recorded by this call.
std::shared_ptr<Backward> LayerNode::find(const Key& key, const variable_list& dys, const variable_list& given,
                                          variable_list& gradients) const {
    auto& entries = forward->backwards;
    seen_before(entries, key);  // its forward has come twice
    const Entry<Backward>& found = entries.at(key);
    if (found.never || found.recorded) return found.recorded;
    const Object first = tuple_of(dys), second = tuple_of(given);
    const Object description = Object::taken(
        checked(PyObject_CallFunctionObjArgs(forward->hooks->record_backward.get(), forward->attributes.get(),
                                             forward->needs.get(), first.get(), second.get(), nullptr)));
    std::shared_ptr<Backward> made;
    if (description.get() != Py_None) {
        made = held(*forward->hooks, [&] { return std::make_shared<Backward>(description.get(), forward->arguments); });
    }
    entries[key] = {made == nullptr, made};
    if (made) gradients = gradients_of(described(description.get(), 2));
    return made;
}

variable_list LayerNode::in_python(const variable_list& dys, const variable_list& given) const {
    const Object first = tuple_of(dys), second = tuple_of(given);
    const Object found =
        Object::taken(checked(PyObject_CallFunctionObjArgs(forward->hooks->backward.get(), forward->attributes.get(),
                                                           forward->needs.get(), first.get(), second.get(), nullptr)));
    return gradients_of(found.get());
}

// Those of the tensors among the forward's arguments, of a tuple for all of these.
variable_list LayerNode::gradients_of(PyObject* all) const {
    variable_list gradients;
    for (int argument : forward->arguments) {
        PyObject* one = described(all, argument);
        gradients.push_back(THPVariable_Check(one) ? THPVariable_Unpack(one) : at::Tensor());
    }
    return gradients;
}

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
auto make_node(edge_list&& edges, std::shared_ptr<Forward> forward) {
    return c10::make_intrusive<LayerNode>(std::move(edges), std::move(forward));
}
#else
auto make_node(edge_list&& edges, std::shared_ptr<Forward> forward) {
    return std::shared_ptr<LayerNode>(new LayerNode(std::move(edges), std::move(forward)), torch::autograd::deleteNode);
}
#endif

}  // namespace

void configure(PyObject* sources, PyObject* number, size_t most) {
    Settings& known = settings();
    known.sources = Object(sources);
    known.number = Object(number);
    known.most = most;
    known.values.clear();
}

// (program, places of the gradients of all the forward's arguments, the gradients of the recorded call)
Backward::Backward(PyObject* description, const std::vector<int>& arguments)
    : gradients([&] {
          const std::vector<int> all = places_of(described(description, 1));
          std::vector<int> own;
          for (int argument : arguments) own.push_back(all.at(argument));
          return own;
      }()),
      program(described(description, 0), gradients) {}

// (program, places of the results, whether they are one tensor, places of what is saved, whether gradients are
// materialized, attributes, ((place, tensor), ...) of what the recorded call made of these)
Forward::Forward(std::shared_ptr<Hooks> hooks, PyObject* description, std::vector<int> arguments, PyObject* needs,
                 const Call& call)
    : hooks(std::move(hooks)),
      results(places_of(described(description, 1))),
      saved(places_of(described(description, 3))),
      single(described(description, 2) == Py_True),
      materialize(described(description, 4) == Py_True),
      attributes(described(description, 5)),
      needs(needs),
      arguments(std::move(arguments)),
      program(described(description, 0), joined(results, saved)) {
    for (int place : saved) {
        parameters.push_back(place >= 0 && static_cast<size_t>(place) < call.parameters.size() &&
                             call.parameters[place]);
    }
}

void Function::forget() { clear(recordings_); }

int64_t Function::recorded() const {
    int64_t count = 0;
    for (const auto& [key, entry] : recordings_) {
        if (!entry.recorded) continue;
        ++count;
        for (const auto& backward : entry.recorded->backwards) count += backward.second.recorded != nullptr;
    }
    return count;
}

PyObject* Function::plain(PyObject* const* args, size_t count) const {
    return PyObject_Vectorcall(hooks_->plain.get(), args, count, nullptr);
}

PyObject* Function::call(PyObject* const* args, size_t count) {
    if (count > kMostArguments || !undisturbed()) return plain(args, count);
    Call call;
    call.key.reserve(160);
    call.places.reserve(count + 8);
    call.key.push_back(settings_number());
    if (call.key[0] < 0) return plain(args, count);
    uint64_t needs = 0;
    for (size_t i = 0; i < count; ++i) {
        if (!call.add(args[i], hooks_->addressed)) return plain(args, count);
        // Also where no graph is recorded: torch tells its Functions the same then.
        if (THPVariable_Check(args[i]) && THPVariable_Unpack(args[i]).requires_grad()) needs |= uint64_t{1} << i;
    }
    call.key.push_back(static_cast<int64_t>(needs));
    const std::shared_ptr<Forward> forward = find(call, args, count, needs);
    if (!forward || !(call.made || forward->program.run(call.places))) return plain(args, count);
    ++hooks_->forwards;

    if (needs != 0 && at::GradMode::is_enabled()) {
        edge_list edges;
        edges.reserve(forward->arguments.size());
        for (int argument : forward->arguments) {
            const at::Tensor& tensor = THPVariable_Unpack(args[argument]);
            edges.push_back(tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor) : Edge());
        }
        auto node = make_node(std::move(edges), forward);
        node->saved = std::make_shared<Saved>();
        node->saved->reserve(forward->saved.size());
        for (int place : forward->saved) {
            if (place >= 0) node->saved->emplace_back(call.places[place], /*is_output=*/false);
        }
        for (int place : forward->results) torch::autograd::set_history(call.places[place], node);
    }
    if (forward->single) return THPVariable_Wrap(std::move(call.places[forward->results[0]]));
    std::vector<at::Tensor> results;
    for (int place : forward->results) results.push_back(call.places[place]);
    return Py_NewRef(tuple_of(results).get());
}

std::shared_ptr<Forward> Function::find(Call& call, PyObject* const* args, size_t count, uint64_t needs) {
    const Key& key = call.key;
    if (!seen_before(recordings_, key)) return nullptr;
    const Entry<Forward>& found = recordings_.at(key);
    if (found.never || found.recorded) return found.recorded;
    const Object given = Object::taken(checked(PyTuple_New(static_cast<Py_ssize_t>(count))));
    const Object needed = Object::taken(checked(PyTuple_New(static_cast<Py_ssize_t>(count))));
    std::vector<int> arguments;
    for (size_t i = 0; i < count; ++i) {
        PyTuple_SET_ITEM(given.get(), static_cast<Py_ssize_t>(i), Py_NewRef(args[i]));
        PyTuple_SET_ITEM(needed.get(), static_cast<Py_ssize_t>(i), PyBool_FromLong(needs >> i & 1));
        if (THPVariable_Check(args[i])) arguments.push_back(static_cast<int>(i));
    }
    const Object description = Object::taken(
        checked(PyObject_CallFunctionObjArgs(hooks_->record_forward.get(), given.get(), needed.get(), nullptr)));
    std::shared_ptr<Forward> made;
    if (description.get() != Py_None) {
        made = held(*hooks_, [&] {
            return std::make_shared<Forward>(hooks_, description.get(), std::move(arguments), needed.get(), call);
        });
    }
    recordings_[key] = {made == nullptr, made};
    if (made) {
        put(described(description.get(), 6), call.places);
        call.made = true;
    }
    return made;
}

}  // namespace peftfast::autograd
