"""Which dtype a layer computes in, decided once for each call."""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor


def autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a device type; False for one that has none, such as meta, where torch's own question raises."""
    # torch 2.11 cannot trace is_autocast_available: not asked for the devices that are known to have it.
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def compute_dtype_of(x: Tensor, asked: torch.dtype | None = None) -> torch.dtype:
    """The dtype asked for (a quantised layer's own), else autocast's if it is on for x's device, else x's."""
    if asked is not None:
        if not isinstance(asked, torch.dtype) or not asked.is_floating_point or asked.itemsize < 2:
            raise TypeError(f"compute_dtype: expected a floating dtype of at least 16 bits, got {asked!r}")
        return asked
    if autocast_on(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    dtype = x.dtype
    if dtype.itemsize < 2 and dtype.is_floating_point:
        raise TypeError(f"x: expected at least 16 bits without a compute_dtype, got {dtype}")
    return dtype


def autocast_off(device_type: str) -> Any:
    """A context without autocast, free where there is none: the operators' dtypes are explicit and must not be cast again."""
    if autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def cache_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A class decorator: ``apply`` of a Function with setup_context asks inspect.signature(forward) at every call, which costs 70 us
    for eighteen parameters unless the answer lies there."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function
