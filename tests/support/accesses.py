"""Every address that Triton's kernels read and write in the interpreter, shown to ``races``, ``bounds`` and ``sanitized``."""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from triton.runtime import interpreter

from .cuda_emulator.build import run_compiler

ARRAYS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)  # of an access, as a C function takes it
# What is done ("load", "store", "atomic"), the addresses, which of them are meant, how many bytes each.
Watch = Callable[[str, np.ndarray, np.ndarray, int], None]


class _Watched:
    """The part of Triton's interpreter that touches memory."""

    def __init__(self, plain: Any, watch: Watch) -> None:
        self._plain, self._watch = plain, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def _show(self, kind: str, addresses: Any, mask: Any, dtype: Any) -> None:
        addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
        mask = np.ascontiguousarray(np.broadcast_to(mask, addresses.shape), dtype=bool)
        self._watch(kind, addresses, mask, np.dtype(dtype).itemsize)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._show("load", addresses, mask, dtype)
        return self._plain.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._show("store", addresses, mask, value.dtype)
        return self._plain.store(addresses, value, mask)

    def atomic_cas(self, addresses: Any, compared: Any, value: Any, order: Any) -> Any:
        self._show("atomic", addresses, True, value.dtype)
        return self._plain.atomic_cas(addresses, compared, value, order)

    def atomic_rmw(self, kind: Any, addresses: Any, value: Any, mask: Any, order: Any) -> Any:
        self._show("atomic", addresses, mask, value.dtype)
        return self._plain.atomic_rmw(kind, addresses, value, mask, order)


def watch(function: Watch) -> None:
    """From now on ``function`` is shown each access before it is made; what it raises ends the kernel."""
    interpreter._interpreter = _Watched(interpreter._interpreter, function)


def refuse(first: Any, where: str) -> None:
    """From now on an access ends the kernel by an IndexError where the C function ``first`` finds an address of it, and not 0."""

    def look(kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        found = first(addresses.ctypes.data, mask.ctypes.data, addresses.size, size)
        if found:
            raise IndexError(f"{kind} of {size} bytes at {found:#x}, outside of {where}")

    watch(look)


def program() -> int:
    """The number of the program that runs in its launch's grid."""
    builder = interpreter.interpreter_builder
    (x, y, z), (width, height, _) = builder.grid_idx, builder.grid_dim
    return int((z * height + y) * width + x)


def compiled(source: Path, *headers: Path) -> ctypes.PyDLL:
    """The C++ file, which may include ``headers``, as a library, compiled once for all processes. Its functions keep the GIL: what they
    know is the process's, and any thread may ask a tensor for its address.

    Raises:
        FileNotFoundError: there is no C++ compiler. RuntimeError: what it says.
    """
    name = hashlib.sha256(b"".join(one.read_bytes() for one in (source, *headers))).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"peftfast-{source.stem}-{name}.so")
    if not target.is_file():
        part = target.with_name(f"{target.name}.{os.getpid()}")
        run_compiler("-std=c++17", "-O2", "-fPIC", "-shared", source, "-o", part)
        part.replace(target)
    return ctypes.PyDLL(str(target))


def function(library: ctypes.PyDLL, name: str, *arguments: Any) -> Any:
    found = getattr(library, name)
    found.argtypes, found.restype = list(arguments), ctypes.c_uint64
    return found
