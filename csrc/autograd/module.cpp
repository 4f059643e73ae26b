// The Python module of this folder: peftfast._autograd.
#include "autograd/function.h"

#include <torch/csrc/Exceptions.h>
#include <torch/version.h>

#include <structmember.h>

#include <cstddef>
#include <new>

namespace {

using peftfast::autograd::Function;
using peftfast::autograd::Hooks;
using peftfast::autograd::Object;

constexpr long kInterface = 1;  // as peftfast/ops/native.py has it

struct FunctionObject {
    PyObject_HEAD vectorcallfunc vectorcall;
    Function* function;
};

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
    HANDLE_TH_ERRORS
    if (names != nullptr && PyTuple_GET_SIZE(names) > 0) {
        PyErr_SetString(PyExc_TypeError, "a Function is called with positional arguments alone");
        return nullptr;
    }
    return reinterpret_cast<FunctionObject*>(self)->function->call(args, PyVectorcall_NARGS(flags));
    END_HANDLE_TH_ERRORS
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
    const char* name;
    PyObject *plain, *record_forward, *record_backward, *backward;
    int addressed;
    if (!PyArg_ParseTuple(args, "spOOOO", &name, &addressed, &plain, &record_forward, &record_backward, &backward))
        return nullptr;
    auto* self = reinterpret_cast<FunctionObject*>(type->tp_alloc(type, 0));
    if (self == nullptr) return nullptr;
    auto hooks = std::make_shared<Hooks>();
    hooks->name = name;
    hooks->addressed = addressed != 0;
    hooks->plain = Object(plain);
    hooks->record_forward = Object(record_forward);
    hooks->record_backward = Object(record_backward);
    hooks->backward = Object(backward);
    self->vectorcall = call;
    self->function = new Function(std::move(hooks));
    return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* self) {
    delete reinterpret_cast<FunctionObject*>(self)->function;
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* forget(PyObject* self, PyObject*) {
    reinterpret_cast<FunctionObject*>(self)->function->forget();
    Py_RETURN_NONE;
}

PyObject* counts(PyObject* self, PyObject*) {
    const Function& function = *reinterpret_cast<FunctionObject*>(self)->function;
    const Hooks& hooks = function.hooks();
    return Py_BuildValue("{sLsLsLss}", "recorded", function.recorded(), "forwards", hooks.forwards, "backwards",
                         hooks.backwards, "refusal", hooks.refusal.c_str());
}

PyObject* configure(PyObject*, PyObject* args) {
    PyObject *sources, *number;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "O!On", &PyTuple_Type, &sources, &number, &most)) return nullptr;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sources); ++i) {
        PyObject *dictionary, *keys;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(sources, i), "O!O!", &PyDict_Type, &dictionary, &PyList_Type, &keys))
            return nullptr;
    }
    peftfast::autograd::configure(sources, number, static_cast<size_t>(most));
    Py_RETURN_NONE;
}

PyMethodDef function_methods[] = {{"forget", forget, METH_NOARGS, "Drop all recordings."},
                                  {"counts", counts, METH_NOARGS,
                                   "Recordings that are held, calls made from them, and why a call was last not held."},
                                  {nullptr, nullptr, 0, nullptr}};

PyMemberDef function_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(FunctionObject, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot function_slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_methods, function_methods},
                                {Py_tp_members, function_members},
                                {0, nullptr}};

PyType_Spec function_spec = {"peftfast._autograd.Function", sizeof(FunctionObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, function_slots};

PyMethodDef module_methods[] = {
    {"configure", configure, METH_VARARGS, "((dictionary, keys), ...), what numbers their values, most recordings."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, module_methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__autograd() {
    PyObject* module = PyModule_Create(&module_definition);
    if (module == nullptr) return nullptr;
    PyObject* type = PyType_FromSpec(&function_spec);
    if (type == nullptr || PyModule_AddObject(module, "Function", type) < 0 ||
        PyModule_AddIntConstant(module, "interface", kInterface) < 0) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
