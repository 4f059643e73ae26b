"""Autograd Functions whose calls are made by csrc/autograd: what costs a layer's time on the host is Python between its launches.

The library keeps a recording (:mod:`peftfast.ops.replay`) of each kind of call: of the forward when its arguments come a second time,
with what it saves; of the backward likewise. After that a call looks its recording up, does the same operators and launches with the
tensors at hand, and adds a node to autograd's graph, all in C++. A call that cannot be recorded, and any while somebody watches (modes
of functions or of dispatch, the profiler, autocast, anomaly mode, functorch, forward-mode differentiation), is the Function's own.

Host time of a LoRA layer, 16 x 16, r = 4, two rows, launches left out, us of one thread (Zen 5, torch 2.13, triton 3.7, 2026-11-21;
``python -m benchmarks.host``): forward 10 and with the backward 31, in Python 26 and 89, PEFT's 27 and 65, the frozen layer's 5 and 17;
under dropout 13 and 33, 29 and 95, 33 and 74. A Function in Python that computes nothing takes 8 and 28.

The library serves the version of torch that it was built with (setup.py); without it the Functions are called as Python has them.
``PEFTFAST_AUTOGRAD=python`` asks for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import variable
from ..configs.variable import Choice
from ..ops import native, replay

choice = Choice("PEFTFAST_AUTOGRAD", ("auto", "python"))
_numbers: dict[tuple[Any, ...], int] = {}
_states: list[dict[str, Any]] = []
_all: list[Function] = []


class _Context:
    """What a Function finds in its ``ctx``. Attributes that it sets itself are in ``vars``."""

    __slots__ = ("__dict__", "materialize", "needs_input_grad", "saved_tensors")

    def __init__(self, needs: tuple[bool, ...], saved: tuple[Tensor | None, ...] = (), attributes: Any = ()) -> None:
        self.needs_input_grad, self.saved_tensors, self.materialize = needs, saved, True
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


def _settings_number() -> int:
    """Of the environment's values, for the library's keys; -1 where it must leave all calls to Python."""
    if choice() == "python" or replay.choice() == "never":
        return -1
    values = variable.settings(), *[tuple(state.items()) for state in _states]
    return _numbers.setdefault(values, len(_numbers))


def watch(state: dict[str, Any]) -> None:
    """Calls with other values in ``state``, whose keys stay as they are, are other calls."""
    _states.append(state)
    if _library.cache_info().currsize:  # the library knows those before this one
        _library.cache_clear()
        _library()


def _apart(args: Sequence[Any], flat: list[Any], seen: set[int]) -> list[Any]:
    """The arguments, no tensor twice, since a recording tells them apart by their identity; all that they hold is added to ``flat``."""
    given: list[Any] = []
    for value in args:
        if isinstance(value, list | tuple):
            parts = _apart(value, flat, seen)
            given.append(type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts))
            continue
        if isinstance(value, Tensor):
            if id(value) in seen:
                twin = value.detach()
                value = torch.nn.Parameter(twin, requires_grad=False) if type(value) is torch.nn.Parameter else twin
            seen.add(id(value))
        flat.append(value)
        given.append(value)
    return given


def _described(recorder: replay.Recorder, step: replay.OperatorStep | replay.LaunchStep) -> tuple[Any, ...]:
    def value(slot: Any) -> tuple[str, Any]:
        if isinstance(slot, list):
            if not all(isinstance(recorder.values[one], Tensor) for one in slot):
                recorder.refuse("a list that is not of tensors alone")
            return "tensors", slot
        one = recorder.values[slot]
        return ("tensor", slot) if isinstance(one, Tensor) else ("value", one)

    if isinstance(step, replay.LaunchStep):
        if step.compiled is None:
            if step.named:
                names, values = list(step.named), [value(slot) for slot in step.named.values()]
                call = step.kernel[step.grid]
                return "launch", _ByName(call, len(step.slots), names), [*map(value, step.slots), *values]
            return "launch", step.kernel[step.grid], [value(slot) for slot in step.slots]
        compiled = step.compiled
        head = [("value", one) for one in step.grid] + [("stream", None)]
        head += [("value", one) for one in (compiled.function, compiled.packed_metadata, None, None, None)]
        args = [("address" if kind == "tensor" else kind, one) for kind, one in map(value, step.slots)]
        return "launch", compiled.run, head + args
    schema = step.operator._schema
    args = [value(slot) for slot in step.slots]
    for argument in schema.arguments[len(args) :]:
        if argument.name in step.named:
            args.append(value(step.named[argument.name]))
        else:
            args.append(("value", argument.default_value))
    into = [] if step.into is None else step.into if isinstance(step.into, list) else [step.into]
    return "operator", schema.name, schema.overload_name, args, into


class _ByName:
    """A call whose last arguments go by names."""

    def __init__(self, call: Callable[..., Any], positional: int, names: list[str]) -> None:
        self._call, self._positional, self._names = call, positional, names

    def __call__(self, *args: Any) -> None:
        count = self._positional
        self._call(*args[:count], **dict(zip(self._names, args[count:], strict=True)))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(one) for one in value)
    if isinstance(value, Tensor):
        return True
    return _holds_tensor(list(value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()))


@functools.cache
def _library() -> Any:
    """The compiled module, told what calls depend on beside their arguments; None where it is not available."""
    if not native.autograd_available()[0] or not isinstance(variable._environment, dict):
        return None
    library = native.autograd_module()
    sources = [(variable._environment, variable._keys), *[(state, list(state)) for state in _states]]
    library.configure(tuple(sources), _settings_number, replay.MOST_RECORDINGS)
    return library


class Function:
    """``function``, an autograd Function with ``forward(ctx, ...)``, by the library where that is available.

    ``apply`` is for all callers; ``call`` for one that is not being compiled, with arguments of which the first alone may be of a
    functorch transform, as :func:`shortest` has it. ``addressed``: kernels find its parameters by a table of their addresses.
    """

    def __init__(self, function: Any, addressed: bool = False) -> None:
        self._function, self._addressed = function, addressed
        self.call: Callable[..., Any] = self._first_call
        self.general: Callable[..., Any] = self._first_general
        self.native: Any = None
        _all.append(self)
        replay.forgetful.append(self.forget)

    def forget(self) -> None:
        if self.native is not None:
            self.native.forget()

    def _choose(self) -> None:
        library = _library()
        if library is None:
            self.call, self.general = shortest(self._function), self._function.apply
            return
        name = f"{self._function.__name__}Backward"
        hooks = (self._function.apply, self._record_forward, self._record_backward, self._backward)
        self.native = self.call = self.general = library.Function(name, self._addressed, *hooks)

    def apply(self, *args: Any) -> Any:
        return self._function.apply(*args) if torch.compiler.is_compiling() else self.general(*args)

    def _first_call(self, *args: Any) -> Any:
        self._choose()
        return self.call(*args)

    def _first_general(self, *args: Any) -> Any:
        self._choose()
        return self.general(*args)

    def _record_forward(self, args: tuple[Any, ...], needs: tuple[bool, ...]) -> tuple[Any, ...] | None:
        context = _Context(needs)
        flat: list[Any] = []
        given = _apart(args, flat, set())
        addressed = given if self._addressed else []
        try:
            with torch.no_grad():
                recorder, out, device = replay.record(
                    lambda *own: self._function.forward(context, *own), given, flat, addressed
                )
        except torch.OutOfMemoryError:
            return None  # the recording keeps all intermediate tensors to its end, which the call itself does not
        single = isinstance(out, Tensor)
        results = [recorder.place(one) for one in ([out] if single else out)]
        if any(place < recorder.inputs for place in results) or len(set(results)) < len(results):
            recorder.refuse("a result that is an argument or another result")
        saved = [None if one is None else recorder.place(one) for one in context.saved_tensors]
        if not all(isinstance(one, Tensor) and one.is_floating_point() for one in ([out] if single else out)):
            recorder.refuse("a result that has no gradient")
        elif any(one._is_view() for one in ([out] if single else out)):
            recorder.refuse("a result that is a view, into which autograd lets nobody write")
        if set(results).intersection(saved):
            recorder.refuse("a result that is saved: the node would hold itself")
        attributes = dict(vars(context))
        if _holds_tensor(list(attributes.values())):
            recorder.refuse("a tensor as an attribute of ctx")
        program = _program(recorder, device)
        made = sorted({place for place in (*results, *saved) if place is not None and place >= recorder.inputs})
        values = [(place, recorder.values[place]) for place in made]
        return program and (program, results, single, saved, context.materialize, attributes, values)

    def _backward(self, attributes: Any, needs: tuple[bool, ...], dys: tuple[Any, ...], saved: tuple[Any, ...]) -> Any:
        found = self._function.backward(_Context(needs, saved, attributes), *dys)
        return found if isinstance(found, tuple) else (found,)

    def _record_backward(
        self, attributes: Any, needs: tuple[bool, ...], dys: tuple[Any, ...], saved: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        def backward(*given: Any) -> Any:
            return self._backward(attributes, needs, given[: len(dys)], given[len(dys) :])

        flat: list[Any] = []
        given = _apart((*dys, *saved), flat, set())
        try:
            recorder, found, device = replay.record(backward, given, flat, given if self._addressed else [])
        except torch.OutOfMemoryError:
            return None
        places = [None if one is None else recorder.place(one) for one in found]
        made = [place for place in places if place is not None]
        if any(place < recorder.inputs for place in made) or len(set(made)) < len(made):
            recorder.refuse("a gradient that is an argument or another gradient")
        program = _program(recorder, device)
        return program and (program, places, found)


def known() -> list[Function]:
    """All Functions that the library may call."""
    return list(_all)


def _program(recorder: replay.Recorder, device: replay.Device | None) -> tuple[Any, ...] | None:
    """What the library makes a program of: the numbers of inputs and of places, constant tensors, steps, and what gives the stream of
    the launches or None where they may not be made."""
    steps = [_described(recorder, step) for step in recorder.steps]
    constants = [(place, recorder.values[place]) for place in recorder.constants]
    constants = [(place, one) for place, one in constants if isinstance(one, Tensor)]
    if recorder.refusal:
        return None
    return recorder.inputs, len(recorder.values), constants, steps, None if device is None else device.stream


def shortest(function: Any) -> Any:
    """A Function's ``apply`` without what Function.apply does before it, a sixth of a small layer's forward: to unwrap every argument
    that a functorch transform left behind. For a caller that is not being compiled; x, the first argument, is asked, and those after it
    are as plain as parameters and fresh seeds are.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(x: Tensor, *rest: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return function.apply(x, *rest)
        return apply(x, *rest)

    return run
