"""Wherever kernels are interpreted, a load or store whose mask is set outside of the launch's tensors is an error, also where another
tensor lies: from a tensor's first element to its last, and no further in its storage. A kernel that is given a table of addresses may
go where any tensor lay whose ``data_ptr`` was asked for."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of its first byte and of the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in strides)
    begin = _data_ptr(tensor)
    return begin, begin + count * tensor.element_size()


_data_ptr = torch.Tensor.data_ptr


def tensors_of(given: Any) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    if isinstance(given, (tuple, list)):
        return [tensor for one in given for tensor in tensors_of(one)]
    base = getattr(given, "base", None)  # of a view in another type, or of a descriptor
    return [] if base is None else tensors_of(base)


def watch_launches() -> None:
    """Raise IndexError from now on, inside of the interpreter's InterpreterError.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    from triton.runtime import interpreter

    from . import accesses

    library = accesses.compiled(Path(__file__).with_suffix(".cpp"))
    arrays = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    begin = accesses.function(library, "begin_launch", *arrays, ctypes.c_bool)
    add_known = accesses.function(library, "add_known", ctypes.c_uint64, ctypes.c_uint64)
    first_outside = accesses.function(library, "first_outside", *accesses.ARRAYS)
    accesses.refuse(first_outside, "the launch's tensors")
    call = interpreter.GridExecutor.__call__

    @functools.wraps(call)
    def watched(self: Any, *args: Any, **named: Any) -> Any:
        tensors = tensors_of((*args, *named.values()))
        extents = np.array([extent(tensor) for tensor in tensors], dtype=np.uint64).reshape(-1, 2).T.copy()
        has_tables = any(tensor.dtype == torch.int64 and tensor.dim() == 2 for tensor in tensors)
        begin(extents[0].ctypes.data, extents[1].ctypes.data, len(tensors), has_tables)
        return call(self, *args, **named)

    @functools.wraps(_data_ptr)
    def asked(self: torch.Tensor) -> int:
        address = _data_ptr(self)
        if address and self.device.type == "cpu" and self.layout is torch.strided:
            add_known(*extent(self))
        return address

    interpreter.GridExecutor.__call__ = watched
    torch.Tensor.data_ptr = asked
