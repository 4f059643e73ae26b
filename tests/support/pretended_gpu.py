"""A GPU that is none: tensors that say they lie on cuda:0 and hold a CPU tensor, so that every line that runs only with a GPU can be
run without one. What it finds are wrong names and arguments, tensors left on the CPU, generators of the other device, and waits where
none may be. It shows nothing of speed, streams or memory, and Triton kernels run interpreted.

:func:`installed` puts the pretence in place for a ``with`` block; ``python -m pytest -p tests.support.pretended_gpu`` for a session.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_RealGenerator = torch.Generator


class Pretended(torch.Tensor):
    """A tensor on cuda:0 by its own account; ``inner`` is the CPU tensor with its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride() if inner.layout == torch.strided else None,
            storage_offset=inner.storage_offset() if inner.layout == torch.strided else None,
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",  # for C++: its autograd engine asks the driver about any other
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretended({self.inner!r})"

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file is read onto the CPU

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        _waited("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Any) -> None: ...

    def cpu(self, memory_format: Any = None) -> torch.Tensor:
        return torch.ops.aten._to_copy.default(self, device=torch.device("cpu"))

    def cuda(self, *_: Any, **__: Any) -> "Pretended":
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copies = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return torch.ops.aten._to_copy.default(
                self, dtype=dtype or self.dtype, device=device, non_blocking=non_blocking
            )
        if (dtype is None or dtype == self.dtype) and not copies:
            return self
        return torch.ops.aten._to_copy.default(self, dtype=dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Pretended):
            if func == torch.Tensor.data.__set__:  # another object at each look
                value = args[1]
                with torch._C.DisableTorchFunctionSubclass():
                    func(*args)
                first.inner = value.inner
                return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what makes tensors on a device from nothing, and what moves them to one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._pin_memory.default:  # a build for CUDA would ask the driver
            return args[0].clone()
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(one, Pretended) for one in flat) or any(_is_cuda(one) for one in flat):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees what moves a CPU tensor to the device, which torch does not dispatch before it has asked the driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], Pretended):
            return _moved(func, *args, **kwargs)
        # C++ counts up to the number of classes on the CPU.
        if func is torch.nn.functional.one_hot and isinstance(args[0], Pretended):
            return Pretended(func(args[0].inner, *args[1:], **kwargs))
        return func(*args, **kwargs)


def _moved(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if func is torch.Tensor.cuda:
        args, kwargs = (CUDA,), {}
    elif args and isinstance(args[0], Pretended):
        args = (CUDA, args[0].dtype, *args[1:])
    copies = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda":
        return func(tensor, *args, copy=copies, **kwargs)
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype or tensor.dtype, device=CUDA, non_blocking=non_blocking)


_mode, _functions = _Mode(), _Functions()
_sync_debug = ["default"]


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _waited(what: str) -> None:
    if _sync_debug[0] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if _capturing[0]:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


_MOVES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize")
# What asks the host for a value that lies on the device, or for a size that depends on one.
_WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
)
# Scalars of the other device that torch takes, and indices on the CPU, which it moves.
_MIXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, Pretended)]
    asked = kwargs.get("device")
    if name.startswith("peftfast::"):
        with _mode, _functions, torch.no_grad():
            return _operator(name.split("::")[1])._run(*_bound(func, args, kwargs))
    moves = name in _MOVES
    if not moves and ours and name not in _MIXES and not name.startswith("prim::"):
        left = [one for one in tensors if not isinstance(one, Pretended) and one.dim() and one.device.type != "meta"]
        if left:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            )
    if name in _WAITS and ours:
        _waited(name)
    generator = kwargs.get("generator")
    if generator is not None and (ours or _is_cuda(asked)) != (generator._cdata in _generators):
        raise RuntimeError(f"{name}: Expected a '{'cuda' if ours else 'cpu'}' device type for generator")
    if moves and _crosses(name, args, asked, ours, kwargs):
        _waited(f"{name} between host and device")
    on_cpu = {key: torch.device("cpu") if _is_cuda(value) else value for key, value in kwargs.items()}
    inner_args = tree_map(lambda one: one.inner if isinstance(one, Pretended) else one, args)
    inner_kwargs = tree_map(lambda one: one.inner if isinstance(one, Pretended) else one, on_cpu)
    inner_args = tree_map(lambda one: torch.device("cpu") if _is_cuda(one) else one, inner_args)
    result = func(*inner_args, **inner_kwargs)
    # C++ takes these tensors for CPU ones: what it makes beside one of them lies where that one does, and so does a cast's gradient.
    leaves = asked is not None and not _is_cuda(asked) and not (ours and (not moves or _in_backward()))
    known = {id(one.inner): one for one in ours}
    for one in tensors:
        known.setdefault(id(one), one)

    def wrap(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or isinstance(one, Pretended) or one.device.type == "meta":
            return one
        if id(one) in known:
            return known[id(one)]
        return one if leaves else Pretended(one)

    return tree_map(wrap, result)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _crosses(name: str, args: Any, asked: Any, ours: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from pageable memory to the device or back, for which torch waits."""
    if name == "aten::_to_copy":
        from_device, to_device = isinstance(args[0], Pretended), _is_cuda(asked) or (asked is None and bool(ours))
        return from_device != to_device and not kwargs.get("non_blocking")
    return isinstance(args[0], Pretended) != isinstance(args[1], Pretended) and not (
        kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    )


def _bound(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    values = list(args)
    for argument in func._schema.arguments[len(values) :]:
        values.append(kwargs.get(argument.name, argument.default_value))
    return values


@functools.cache
def _operator(name: str) -> Any:
    from peftfast.ops import OPERATORS

    return OPERATORS[name]


_generators: dict[int, Any] = {}  # the dispatcher hands on another Python object of the same generator


class _Kind(type(_RealGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, one: Any) -> bool:
        return isinstance(one, _RealGenerator)


class Generator(_RealGenerator, metaclass=_Kind):
    """Of the pretended device; a CPU generator in truth."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return _RealGenerator(device)
        made = super().__new__(cls, "cpu")
        _generators[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.cuda_stream = CUDA, id(self)

    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()


_streams: list[Stream] = [Stream()]
_clock = [0.0]
_capturing = [False]


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        _clock[0] += 1e-2
        self.at = _clock[0]

    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
    def elapsed_time(self, end: "Event") -> float:
        assert self.at is not None and end.at is not None, "both events must be recorded"
        return end.at - self.at


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


class CUDAGraph:
    """A graph that has captured nothing: a replay does nothing."""

    captured = False

    def replay(self) -> None:
        assert self.captured, "replay before capture_end"

    def reset(self) -> None: ...
    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def _graph(graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global") -> Any:
    chosen = stream or Stream()
    if chosen is _streams[0]:
        raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
    _capturing[0] = True
    try:
        with _stream(chosen):
            yield
        graph.captured = True
    finally:
        _capturing[0] = False


def _properties(device: Any = None) -> Any:
    """An H200's, but for the number of multiprocessors: the interpreter runs every program of a grid."""
    return SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=2, total_memory=150 * 10**9, L2_cache_size=60 * 2**20,
        uuid="00000000-0000-0000-0000-000000000000", warp_size=32, is_integrated=False, gcnArchName="", regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=233472, shared_memory_per_block_optin=232448, max_threads_per_multi_processor=2048,
    )  # fmt: skip


def _set_sync_debug(mode: Any) -> None:
    _sync_debug[0] = str(mode)


class _Device(contextlib.nullcontext):  # type: ignore[type-arg]
    """torch.cuda.device."""


def _read_onto(load: Any) -> Any:
    """torch.load, which asks the driver where map_location names the device."""

    @functools.wraps(load)
    def read(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        moves = isinstance(map_location, str | torch.device) and torch.device(map_location).type == "cuda"
        found = load(file, map_location="cpu" if moves else map_location, **kwargs)
        return tree_map(lambda one: one.to(CUDA) if isinstance(one, torch.Tensor) else one, found) if moves else found

    return read


_STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "_is_compiled": lambda: True,
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "synchronize": lambda device=None: None,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: "NVIDIA H200",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "current_stream": lambda device=None: _streams[-1],
    "default_stream": lambda device=None: _streams[0],
    "is_current_stream_capturing": lambda: _capturing[0],
    "Stream": Stream,
    "Event": Event,
    "stream": _stream,
    "CUDAGraph": CUDAGraph,
    "graph_pool_handle": lambda: (0, 1),
    "set_stream": lambda stream: None,
    "graph": _graph,
    "device": _Device,
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (64 * 2**30, 150 * 10**9),
    "set_sync_debug_mode": _set_sync_debug,
    "get_sync_debug_mode": lambda: 0,
    "manual_seed": torch.default_generator.manual_seed,
    "manual_seed_all": torch.default_generator.manual_seed,
    "_sleep": lambda cycles: None,
    "default_generators": (
        SimpleNamespace(
            clone_state=lambda: None,
            graphsafe_set_state=lambda state: None,
            get_state=torch.default_generator.get_state,
            set_state=torch.default_generator.set_state,
            manual_seed=torch.default_generator.manual_seed,
            initial_seed=torch.default_generator.initial_seed,
        ),
    ),
    "profiler": SimpleNamespace(start=lambda: None, stop=lambda: None),
    "get_rng_state": lambda device="cuda": torch.default_generator.get_state(),
    "set_rng_state": lambda state, device="cuda": torch.default_generator.set_state(state),
    "get_rng_state_all": lambda: [torch.default_generator.get_state()],
    "set_rng_state_all": lambda states: torch.default_generator.set_state(states[0]),
}


# Modules that take plain tensors alone, by asking for the type.
_PARTICULAR = (
    "optim.arguments",
    "functional.nf4",
    "functional.lora",
    "integrations.peft_guards",
    "integrations.peft_call",
)


def _plain(value: Any) -> Any:
    found = value.__class__
    if found is Pretended:
        return torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.Tensor
    return found


def _unwrapped(call: Any) -> Any:
    """A launch of the interpreter, on the CPU tensors within."""

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside = tree_map(lambda one: one.inner if isinstance(one, Pretended) else one, (args, kwargs))
        for i, one in enumerate(tree_flatten((args, kwargs))[0]):
            if isinstance(one, torch.Tensor) and not isinstance(one, Pretended):
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?): {one}")
        return call(self, *inside[0], **inside[1])

    return launch


_asking = [False]


def _made_on(real: Any) -> Any:
    """torch.tensor and its like, which copy to the device where dispatch does not show it."""

    @functools.wraps(real)
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None and _asking[0]:  # torch.get_default_device makes a tensor to see where it lies
            return real(data, *args, **kwargs)
        _asking[0] = True
        try:
            wanted = torch.get_default_device() if device is None else torch.device(device)
        finally:
            _asking[0] = False
        if isinstance(data, Pretended):
            return data.to(*([] if device is None else [device]), **kwargs)
        if wanted.type != "cuda":
            return real(data, *args, device=device, **kwargs)
        needs = kwargs.pop("requires_grad", False)
        if not isinstance(data, torch.Tensor) or data.device.type == "cpu":
            _waited(f"{real.__name__} of host data")
        return Pretended(real(data, *args, device="cpu", **kwargs)).requires_grad_(needs)

    return make


@contextlib.contextmanager
def installed() -> Iterator[None]:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch._dynamo.device_interface  # while there is no GPU: with one it asks torch for what a CPU build lacks

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401 - now: with a GPU it would load its CUDA library for good, and its CPU's results change
    from triton.runtime.interpreter import GridExecutor

    from peftfast.ops import backends

    torch.utils._device._device_constructors()  # kept by torch: what it finds first, and inside those are stand-ins
    with contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(mock.patch.object(torch, name, _made_on(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "load", _read_onto(torch.load)))
        for name, stand_in in _STAND_INS.items():
            for module in (torch.cuda, torch.cuda.random):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        for name, stand_in in (
            ("_cuda_getCurrentRawStream", lambda _: _streams[-1].cuda_stream),
            ("_cuda_endAllocateToPool", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(torch._C, name, stand_in, create=True))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        for name in _PARTICULAR:
            module = importlib.import_module(f"peftfast.{name}")
            stack.enter_context(mock.patch.object(module, "type", _plain, create=True))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", _unwrapped(GridExecutor.__call__)))
        for cached in (backends.cuda_device, backends.gpu_multiplies, backends.triton_available):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        with _mode, _functions:
            yield


_session: list[Any] = []  # kept: a context that nobody holds is left


def pytest_load_initial_conftests() -> None:
    """As a plugin: before the first conftest asks whether there is a GPU."""
    _session.append(installed())
    _session[0].__enter__()
