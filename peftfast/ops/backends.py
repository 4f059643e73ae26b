"""The backends that are not the definition: the C++ library for CPU tensors, the CUDA library and Triton.

Each gives an ``available`` verdict for the process, which is all that an implementation's table row needs besides its own
``accepts``. Triton is imported on first use: it costs 0.2 to 0.5 s.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..configs.device import Device
from ..kernels import launch as launches  # type: ignore[attr-defined]
from . import native
from .dispatch import Verdict, requested_backend

Function = TypeVar("Function", bound=Callable[..., Any])
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(family: str) -> ModuleType:
    """The Triton kernels of a family, imported when first asked for."""
    return importlib.import_module(f"peftfast.kernels.{family}")


@functools.cache
def _interpreted() -> bool:
    """Triton decides between interpreting and compiling when a kernel is decorated, by this variable."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def constant_when_compiled(function: Function) -> Function:
    """``function`` of plain values, whose result a compiler takes as it is and does not trace. It does what
    torch.compiler.assume_constant_result does, which itself imports torch._dynamo, and with it triton; and it takes a cached function,
    of which dynamo warns and whose cache it ignores."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    if hasattr(function, "cache_clear"):
        call.cache_clear = function.cache_clear  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@constant_when_compiled
@functools.cache
def triton_available() -> Verdict:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return False, "no CUDA device, and the interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return True, ""


def cpu_available() -> Verdict:
    return native.cpu_available()


def cuda_available() -> Verdict:
    return native.cuda_available()


def takes_cuda(*tensors: Tensor | None) -> Verdict:
    """Whether the CUDA library takes these floating tensors: on a CUDA device, float32, bfloat16 or float16."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return False, f"the CUDA library serves CUDA tensors, these are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return False, f"the CUDA library takes float32, bfloat16 and float16, got {tensor.dtype}"
    return True, ""


def undisturbed() -> bool:
    """Whether a caller may join operators into one of the C++ library: it is there, no backend is asked for by name, and no dispatch
    mode watches, which would not see the single ones; but who records a call for replay writes down the one."""
    watching = torch._C._len_torch_dispatch_stack() - launches.recording()
    return requested_backend() is None and not watching and native.cpu_available()[0]


# The modes of selective checkpointing, by the names that torch 2.11 to 2.13 give them.
_KEEPERS = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


def results_are_kept() -> bool:
    """Whether a dispatch mode keeps what single operators return, to give it once more when a checkpoint is computed again: nothing may
    then be added to a product in place, or it is added twice. A compiler's graph knows what is written in place."""
    if torch.compiler.is_compiling():
        return False
    modes = torch._C._len_torch_dispatch_stack()
    return modes > launches.recording() and any(
        type(torch._C._get_dispatch_stack_at(i)).__name__ in _KEEPERS for i in range(modes)
    )


def takes_cpu(*tensors: Tensor | None) -> Verdict:
    """Whether the C++ library takes these floating tensors: CPU, float32, bfloat16 or float16."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return False, f"the C++ library serves CPU tensors, these are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return False, f"the C++ library takes float32, bfloat16 and float16, got {tensor.dtype}"
    return True, ""


def takes_triton(*tensors: Tensor | None) -> Verdict:
    """Whether the Triton kernels take these tensors: on a CUDA device, or on the CPU under the interpreter."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and _interpreted()):
            return False, f"Triton serves CUDA tensors, these are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return False, f"the Triton kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    return True, ""


def multiplies_on_triton(*tensors: Tensor | None) -> Verdict:
    """:func:`takes_triton` for a kernel that forms products: on a GPU whose tensor cores Triton uses."""
    ok, reason = takes_triton(*tensors)
    if ok:
        index = next((one.get_device() for one in tensors if one is not None and one.is_cuda), None)
        return (True, "") if index is None else gpu_multiplies(index)
    return ok, reason


def dtype_name(dtype: torch.dtype) -> str:
    """How the configurations, which import no torch, name a dtype."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@constant_when_compiled
@functools.cache
def gpu_multiplies(index: int | None = None) -> Verdict:
    """Whether Triton forms products on a GPU's tensor cores; without an index, on those of every GPU at hand."""
    for number in range(torch.cuda.device_count()) if index is None else (index,):
        device = cuda_device(number)
        if not device.tensor_cores:
            version = "".join(map(str, device.capability))
            return False, f"cuda:{number} is an sm_{version}, Triton multiplies on tensor cores from sm_80 on"
    return True, ""


_INTERPRETED_DEVICE = Device(capability=(9, 0), multiprocessors=2)  # few: the interpreter runs every program of a grid


def device_of(tensor: Tensor) -> Device:
    """What the launch configurations ask of a tensor's device."""
    return cuda_device(tensor.get_device()) if tensor.is_cuda else _INTERPRETED_DEVICE


def on_device(tensor: Tensor) -> Any:
    """The context in which a launch for this tensor happens: Triton launches on the current device, not the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NO_GUARD


class _NoGuard:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NO_GUARD = _NoGuard()
