"""Calls that are recorded once and then replayed, so that a GPU's launches do not wait for Python.

What a launch needs (an implementation, a configuration, a grid, a compiled kernel) depends only on shapes, strides, dtypes, alignments
and plain values, which repeat from one training step to the next. Finding it anew costs the host about 40 us a launch; a call of the
compiled kernel costs a tenth. A :class:`Replayed` function is called as it is the first time, recorded the second time that such
arguments come, and from then on what was recorded is done again with the tensors at hand: the same kernels with the same grids, and
torch's operators between them. Nothing is captured on the device, and memory comes from torch.empty at every call.

A recording holds what went through torch's dispatcher and through ``peftfast.kernels.launch``. A call that it cannot hold (a tensor
from elsewhere, a value read from the device, an argument of another kind) is never replayed. Neither is any call while something must
see single operators: torch.compile, a dispatch mode, functorch, the profiler, Triton's launch hooks.

Host time of a LoRA layer, r = 4, under dropout, launches left out, us of one thread (Zen 5, torch 2.13, triton 3.7, 2026-11-21;
``python -m benchmarks.host``): forward 134 without replay, 26 with, PEFT's 34; with the backward 372, 91 and 76.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..configs.variable import Choice, settings
from ..kernels import launch as launches  # type: ignore[attr-defined]
from ..kernels import streams  # type: ignore[attr-defined]

# Of one function: a model's layers times the numbers of tokens that its batches have. One that has seen more begins again. A recording
# and its key take about 8 kB.
MOST_RECORDINGS = 8192
_PLAIN = (Tensor, torch.nn.Parameter)
# Below it an address may be an offset into memory that was freed, which costs time to ask.
_LOW = 1 << 33
_VALUES = (torch.dtype, type(None), str, torch.device)
choice = Choice("PEFTFAST_REPLAY", ("auto", "never"))
_SEEN, _NEVER = "seen once", "cannot be recorded"


def allowed(first: Any) -> bool:
    """Whether a call may be replayed of which this is a tensor: a plain one on a GPU, with nothing to be differentiated or cast, and
    nobody watching single operators. A compiler is asked for first: it cannot trace the other questions."""
    return (
        not torch.compiler.is_compiling()
        and type(first) in _PLAIN
        and _on_gpu(first)
        and choice() == "auto"
        and not (
            torch.is_grad_enabled()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd._profiler_enabled()
            or torch._C._is_any_autocast_enabled()
        )
    )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def signature(args: Sequence[Any], flat: list[Any]) -> tuple[Any, ...] | None:
    """All that the kernels of a call depend on but the addresses and contents of its tensors; None for a call not to be replayed. Its
    arguments, those in lists too, are added to ``flat``."""
    key: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            address = arg.data_ptr() if arg.layout is torch.strided else 0
            if address < _LOW and (not address or launches.freed(arg)):
                return None
            key += (arg.dtype, arg.shape, arg.stride(), address & 15, arg.get_device())
        elif kind is float:
            if arg != arg:
                return None
            key += (float, arg, math.copysign(1.0, arg))  # 0.0 == -0.0
        elif kind is int or kind is bool:
            key += (kind, arg)  # 1 == 1.0 == True, and Triton compiles three kernels
        elif kind in _VALUES:
            key.append(arg)
        elif isinstance(arg, list | tuple):
            nested = signature(arg, flat)
            if nested is None:
                return None
            # A list's parameters are handed to kernels as a table of addresses, which is made for these.
            key.append((kind, nested, tuple([one.data_ptr() for one in arg if type(one) is torch.nn.Parameter])))
            continue
        else:
            return None
        flat.append(arg)
    return tuple(key)


class Recorder(TorchDispatchMode):
    """Writes down what runs under it. Every value has a place: the arguments first, then constants and results as they come; a tensor
    is known by its identity, for which all are kept alive."""

    def __init__(self, args: Sequence[Any], flat: list[Any], addressed: Sequence[Any] = ()) -> None:
        super().__init__()
        self.values = list(flat)
        self.inputs = len(self.values)
        self.constants: list[int] = []
        self.steps: list[OperatorStep | LaunchStep] = []
        self.launches = 0
        self.refusal = ""
        self._aside = False
        tensors = [(id(one), place) for place, one in enumerate(self.values) if isinstance(one, Tensor)]
        self._places = dict(tensors)
        if len(self._places) < len(tensors):
            self.refuse("one tensor stands for two arguments")
        listed: list[Any] = []
        signature([arg for arg in args if isinstance(arg, list | tuple)], listed)
        listed += [one for one in addressed if not isinstance(one, list | tuple)]
        listed = [one for one in listed if type(one) is torch.nn.Parameter]
        known = {id(one) for one in listed}
        # The address of another tensor is not in the key, though it may be a parameter's now: a parameter's detached self.
        others = {one.data_ptr() for one in self.values if isinstance(one, Tensor) and id(one) not in known}
        self._addressed = {one.data_ptr() for one in listed} - others

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block operators are not written down."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def place(self, value: Any) -> Any:
        """Where an argument of a step stands; a plain one becomes a constant."""
        if isinstance(value, Tensor):
            if id(value) not in self._places:
                self.refuse("a tensor that is neither an argument nor made by a step")
            return self._places.get(id(value), 0)
        if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
            return [self.place(one) for one in value]
        self.values.append(value)
        self.constants.append(len(self.values) - 1)
        return self.constants[-1]

    def _result(self, value: Any) -> int:
        """Where a step's result stands: what an operator in place returns stands where its argument does."""
        if not isinstance(value, Tensor):
            self.refuse(f"an operator that gives a {type(value).__name__} to the host")
            return 0
        if id(value) not in self._places:
            self.values.append(value)
            self._places[id(value)] = len(self.values) - 1
        return self._places[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        slots = [self.place(one) for one in args]
        named = {name: self.place(one) for name, one in kwargs.items()}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default and slots[0] >= self.inputs:
            self._places[id(out)] = slots[0]  # what torch.empty does to its result, seen from within a dispatch mode
            self.values.append(out)
            return out
        into: Any = None
        if isinstance(out, tuple | list):
            into = [self._result(one) for one in out]
        elif out is not None:
            into = self._result(out)
        keywords = kwargs if func is torch.ops.aten.empty.memory_format else {}
        self.steps.append(OperatorStep(func, slots, named, keywords, into))
        return out

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        self.launches += 1
        for one in (*args, *constants.values()):
            if not isinstance(one, Tensor | int | float | None) and not type(one).__module__.startswith(
                "triton.language"
            ):
                self.refuse(f"a {type(one).__name__} as a kernel's argument")
        slots = [self.place(one) for one in args]
        if not hasattr(compiled, "packed_metadata"):  # interpreted
            named = {name: self.place(one) for name, one in constants.items()}
            self.steps.append(LaunchStep(kernel, None, grid, slots, named))
            return
        # A compiled kernel takes its constexprs too, in order, and skips them; the compiler's options are none of its arguments.
        names = kernel.arg_names[len(args) :]
        if any(name not in constants for name in names):
            self.refuse("a kernel's argument left to its default")
            return
        slots += [self.place(constants[name]) for name in names]
        self.steps.append(LaunchStep(kernel, compiled, (*grid, 1, 1)[:3], slots, {}))

    def constant(self, tensor: Tensor, addressed: Sequence[Tensor]) -> None:
        if any(one.data_ptr() not in self._addressed for one in addressed):
            self.refuse("a table of addresses of tensors that are this call's own")
        elif id(tensor) not in self._places:
            self.values.append(tensor)
            self.constants.append(len(self.values) - 1)
            self._places[id(tensor)] = self.constants[-1]


@dataclass
class OperatorStep:
    """An operator of torch's: where its arguments stand, by position and by name, and its results: one, several or none.
    ``keywords``: of an allocation, the values of the named ones."""

    operator: Any
    slots: list[Any]
    named: dict[str, int]
    keywords: dict[str, Any]
    into: int | list[int] | None

    def again(self) -> Callable[[list[Any], Any], None]:
        call, named = _SHORTER.get(self.operator, self.operator), self.named
        if self.operator is torch.ops.aten.empty.memory_format and (allocate := _allocation(self.keywords)):
            call, named = allocate, {}
        return _operator(call, self.slots, named, self.into)


@dataclass
class LaunchStep:
    """A kernel's launch; ``compiled`` is None where Triton interprets it, and only then ``named`` is not empty."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    slots: list[int]
    named: dict[str, int]

    def again(self) -> Callable[[list[Any], Any], None]:
        if self.compiled is None:
            return _operator(self.kernel[self.grid], self.slots, self.named, None)
        return _launch(self.compiled, self.grid, self.slots)


# The same operators by a shorter way from Python.
_SHORTER: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: Tensor.view,
    torch.ops.aten.t.default: Tensor.t,
    torch.ops.aten.permute.default: Tensor.permute,
    torch.ops.aten.mm.default: torch.mm,
}


def _allocation(keywords: dict[str, Any]) -> Callable[..., Any] | None:
    """torch.empty where a call of its operator has nothing but a dtype and a device."""
    rest = {name: value for name, value in keywords.items() if name not in ("dtype", "device")}
    if rest.pop("layout", torch.strided) is not torch.strided or any(rest.values()):
        return None
    return functools.partial(torch.empty, dtype=keywords.get("dtype"), device=keywords.get("device"))


def _operator(
    func: Callable[..., Any], slots: list[Any], named: dict[str, Any], into: int | list[int] | None
) -> Callable[[list[Any], Any], None]:
    nested = any(isinstance(one, list) for one in slots)
    if isinstance(into, int) and not named and not nested and len(slots) <= 2:
        first, second = slots[0], slots[-1]

        def one(values: list[Any], stream: Any) -> None:
            values[into] = func(values[first])

        def two(values: list[Any], stream: Any) -> None:
            values[into] = func(values[first], values[second])

        return one if len(slots) == 1 else two

    def step(values: list[Any], stream: Any) -> None:
        keywords = {name: values[i] for name, i in named.items()} if named else {}
        if nested:
            out = func(*[[values[j] for j in i] if isinstance(i, list) else values[i] for i in slots], **keywords)
        else:
            out = func(*[values[i] for i in slots], **keywords)
        if isinstance(into, int):
            values[into] = out
        elif into is not None:
            for place, one in zip(into, out, strict=True):
                values[place] = one

    return step


def _launch(compiled: Any, grid: tuple[int, ...], slots: list[int]) -> Callable[[list[Any], Any], None]:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = grid

    def step(values: list[Any], stream: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *[values[i] for i in slots])

    return step


class Device:
    """The device on which a recording was made, as Triton's driver knows it, and its current stream. ``kept``: tensors that the
    recording holds, which other streams than the one that it was made on have to wait for."""

    def __init__(self, kept: Sequence[Tensor] = ()) -> None:
        import triton

        active = triton.runtime.driver.active
        self.current, self._stream = active.get_current_device, active.get_current_stream
        self._hooks = triton.knobs.runtime
        self.index = self.current()
        self._kept = streams.Made(*kept) if any([one.is_cuda for one in kept]) else None

    def stream(self) -> Any:
        """What a launch takes, or None where somebody waits for launches by Triton's hooks."""
        enter, leave = self._hooks.launch_enter_hook, self._hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return None
        stream = self._stream(self.index)
        # A graph that is being captured reads them for as long as it lives, on a stream that is known too.
        if self._kept is not None and (stream not in self._kept.streams or torch.cuda.is_current_stream_capturing()):
            self._kept.meet()
        return stream


class Recording:
    """What a call did, to be done again. ``launches`` and ``operators``: how many."""

    def __init__(self, recorder: Recorder, result: int | tuple[int | None, ...] | None, device: Device | None) -> None:
        self._rest: list[Any] = [None] * (len(recorder.values) - recorder.inputs)
        for place in recorder.constants:
            self._rest[place - recorder.inputs] = recorder.values[place]
        self._steps = [step.again() for step in recorder.steps]
        self._result = result
        self._device = device
        self.launches = recorder.launches
        self.operators = len(recorder.steps) - recorder.launches

    def stream(self) -> Any:
        return 0 if self._device is None else self._device.stream()

    def __call__(self, flat: list[Any], stream: Any) -> Any:
        if self._device is not None and self._device.current() != self._device.index:
            with torch.cuda.device(self._device.index):
                return self._again(flat, stream)
        return self._again(flat, stream)

    def _again(self, flat: list[Any], stream: Any) -> Any:
        values = flat + self._rest
        for step in self._steps:
            step(values, stream)
        result = self._result
        if type(result) is tuple:
            return tuple([None if place is None else values[place] for place in result])
        return None if result is None else values[result]  # type: ignore[index]


_all: list["Replayed"] = []
forgetful: list[Callable[[], None]] = []  # what drops recordings that are kept elsewhere


def forget() -> None:
    """Drop all recordings: what they depend on beside their arguments (a table of configurations) has been changed."""
    for one in _all:
        one.recordings.clear()
    for call in forgetful:
        call()


class Replayed:
    """``function`` of positional tensors, lists of tensors and plain values, which reads nothing else that changes but the watched
    variables and gives a tensor, a tuple of tensors and None, or None. ``plain`` does the same and is called where nothing is
    recorded or replayed."""

    def __init__(self, function: Callable[..., Any], plain: Callable[..., Any] | None = None) -> None:
        self._function, self._plain = function, plain or function
        self.recordings: dict[Any, Any] = {}
        _all.append(self)

    def __call__(self, *args: Any) -> Any:
        flat: list[Any] = []
        key = signature(args, flat)
        if key is None:
            return self._plain(*args)
        key = (key, settings())
        found = self.recordings.get(key)
        if type(found) is Recording:
            stream = found.stream()
            return self._plain(*args) if stream is None else found(flat, stream)
        if found is _SEEN:
            return self._record(key, args, flat)
        if found is None:
            if len(self.recordings) >= MOST_RECORDINGS:
                self.recordings.clear()
            self.recordings[key] = _SEEN
        return self._plain(*args)

    def _record(self, key: Any, args: Sequence[Any], flat: list[Any]) -> Any:
        recorder, out, device = record(self._function, args, flat)
        several = isinstance(out, tuple | list)
        result: Any = None
        if several:
            result = tuple(None if one is None else recorder.place(one) for one in out)
        elif out is not None:
            result = recorder.place(out)
        self.recordings[key] = _NEVER if recorder.refusal else Recording(recorder, result, device)
        return out


def record(
    function: Callable[..., Any], args: Sequence[Any], flat: list[Any], addressed: Sequence[Any] = ()
) -> tuple[Recorder, Any, Device | None]:
    """Call ``function`` and write down what it does. The device is None where no compiled kernel was launched. ``addressed``:
    parameters whose addresses are a part of the call's key, beside those in lists."""
    recorder = Recorder(args, flat, addressed)
    with _on_device_of(flat):
        # Of modes of torch's functions none is here but that of a default device, which the operators' implementations are not to see.
        with torch._C.DisableTorchFunction(), recorder, launches.recorded_by(recorder):
            out = function(*args)
        if not recorder.launches or _interpreted():
            return recorder, out, None
        kept = [recorder.values[place] for place in recorder.constants]
        return recorder, out, Device([one for one in kept if isinstance(one, Tensor)])


def _on_device_of(values: Sequence[Any]) -> Any:
    """The context in which these values' device is the current one."""
    device = next((one.device for one in values if isinstance(one, Tensor) and one.is_cuda), None)
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
