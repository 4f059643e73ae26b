"""Launches of Triton kernels, compiled for sm_90 and run as machine code on CPU tensors."""

import ctypes
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.accesses import compiled, function
from tests.support.bounds import extent, tensors_of
from tests.support.compile_gate import specialised
from tests.support.sass import PARAMETERS, Parameter, parameters, read_cubin

from .program import program_text

ARCH = 90
# Of sm_90's bank of constants, in bytes: the end of a thread's own memory, the address of the parameters, a descriptor of memory as
# such.
_STACK_END, _PARAMETERS_AT, _ANY_MEMORY = 0x28, 0x198, 0x208
_CONSTANTS = 0x1210
_PARAMETERS_ADDRESS = 0x7F0000000210  # any that no tensor has
_SWIZZLES = (0, 32, 64, 128)  # bytes, as Triton numbers them


@dataclass(frozen=True)
class Order:
    """How what a GPU leaves open is decided. late: copies and products are done as late as they are waited for. ahead: 0 lets the warps
    take turns, 1 the first go on as far as it can, -1 the last."""

    late: bool = True
    ahead: int = 0


ORDERS = tuple(Order(late, ahead) for late in (True, False) for ahead in (0, 1, -1))


@dataclass(frozen=True)
class _Map:
    """A descriptor of the copy engine's, where it lies among the parameters."""

    at: int
    base: torch.Tensor
    meta: dict[str, Any]

    def fields(self) -> tuple[int, ...]:
        width = self.meta["elem_size"]
        sizes, steps = self.base.shape, self.base.stride()
        assert len(sizes) == 2 and steps[1] == 1, "a descriptor of another kind"
        box = self.meta["block_size"]
        return (self.at, self.base.data_ptr(), *sizes, steps[0] * width, width, *box, _SWIZZLES[self.meta["swizzle"]])


@dataclass
class _Kernel:
    """A compiled kernel of Triton's."""

    name: str
    handle: int
    threads: int
    shared: int
    parameters: list[Parameter]
    descriptors: list[dict[str, Any]]
    signature: dict[str, Any]


@cache
def _library() -> Any:
    source = Path(__file__).with_name("run.cpp")
    return compiled(source, *sorted(source.parent.glob("*.h")))


_said = ctypes.create_string_buffer(2000)
_kernels: dict[Any, _Kernel] = {}
_asked: dict[
    int, int
] = {}  # where tensors begin whose address was asked for, and where they end: a table may hold them
_tables: set[int] = set()  # where those of them begin that may be tables
_orders = itertools.cycle(ORDERS)


def load(text: str, name: str) -> int:
    """A program that program_text wrote, for execute.

    Raises:
        RuntimeError: it holds an instruction that is not known.
    """
    call = function(_library(), "load", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
    handle = call(text.encode(), _said, len(_said))
    if not handle:
        raise RuntimeError(f"{name}: {_said.value.decode()}")
    return handle


def _compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Kernel, dict[str, Any]]:
    import triton

    source, target, _, options, bound = specialised(kernel, args, kwargs, ARCH)
    key = (source.hash(), str(options))
    if key not in _kernels:
        made = triton.compile(source, target=target, options=options.__dict__)
        (code,) = read_cubin(made.asm["cubin"]).values()
        ptx, name = made.asm["ptx"], kernel.fn.__name__
        threads = re.search(r"\.reqntid (\d+)", ptx)
        assert threads is not None
        _kernels[key] = _Kernel(
            name,
            load(program_text(code), name),
            int(threads[1]),
            made.metadata.shared,
            parameters(ptx[ptx.index(".entry") :], ARCH),
            list(getattr(made.metadata, "tensordesc_meta", None) or []),
            source.signature,
        )
    return _kernels[key], bound


def _values(kernel: _Kernel, bound: dict[str, Any]) -> Iterator[Any]:
    """In the order of the parameters; a descriptor is followed by its sizes and strides."""
    for (name, kind), value in zip(kernel.signature.items(), bound.values(), strict=True):
        if kind == "constexpr":
            continue
        if type(value).__name__ == "TensorDescriptor":
            yield value
            yield from (*value.shape, *value.strides)
        else:
            assert not isinstance(value, tuple), f"a tuple as argument {name}"
            yield value.data_ptr() if isinstance(value, torch.Tensor) else value


def _put(constants: bytearray, at: int, size: int, value: int) -> None:
    constants[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def constants_of(threads: int, grid: tuple[int, int, int]) -> bytearray:
    """The bank of constants without the parameters."""
    constants = bytearray(_CONSTANTS)
    for place, value in enumerate((threads, 1, 1, *grid)):
        _put(constants, 4 * place, 4, value)
    _put(constants, _STACK_END, 4, 0xFFFDC0)
    _put(constants, _PARAMETERS_AT, 8, _PARAMETERS_ADDRESS)
    _put(constants, _ANY_MEMORY, 8, 0x1234567800000000)
    return constants


def _constants(kernel: _Kernel, bound: dict[str, Any], grid: tuple[int, int, int]) -> tuple[bytearray, list[_Map]]:
    constants, maps = constants_of(kernel.threads, grid), []
    for one, value in zip(kernel.parameters, _values(kernel, bound), strict=False):
        if one.array:
            at = _PARAMETERS_ADDRESS + one.begin - PARAMETERS[ARCH]
            maps.append(_Map(at, value.base, kernel.descriptors[len(maps)]))
        elif one.kind == "f" or isinstance(value, float):
            kind = np.float32 if one.size == 4 else np.float64
            constants[one.begin : one.begin + one.size] = np.array(value, kind).tobytes()
        else:
            _put(constants, one.begin, one.size, int(value))
    return constants, maps


def _is_table(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.int64 and tensor.dim() == 2


def asked_for(packed: bytes) -> list[tuple[int, int]]:
    """The extents of the tensors whose address is among these bytes, and, where one of them may be a table of addresses, of all."""
    words = set(np.frombuffer(packed, np.uint64).tolist())
    if words & _tables:
        return list(_asked.items())
    return [(begin, end) for begin, end in _asked.items() if any(begin <= word < end for word in words)]


def turn() -> Order:
    """The next launch's order."""
    return next(_orders)


def run(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: tuple[int, ...]) -> None:
    """One launch of Triton's, block after block.

    Raises:
        RuntimeError: where the program does what it must not, or an instruction is not known.
    """
    made, bound = _compiled(kernel, args, kwargs)
    grid = (*grid, 1, 1)[:3]
    if not math.prod(grid):
        return
    constants, maps = _constants(made, bound, grid)
    tensors = [vars(tensor).get("inner", tensor) for tensor in tensors_of(list(bound.values()))]  # of a pretended GPU's
    extents = [extent(tensor) for tensor in tensors]
    if any(map(_is_table, tensors)):
        extents += _asked.items()
    execute(made.handle, made.name, extents, maps, constants, grid, made.threads, made.shared, turn())


def execute(
    handle: int,
    name: str,
    extents: list[tuple[int, int]],
    maps: list[_Map],
    constants: bytes,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    order: Order,
) -> None:
    """A loaded program, block after block; ``extents`` are the addresses that it may go to.

    Raises:
        RuntimeError: where the program does what it must not.
    """
    assert threads % 32 == 0, "a part of a warp"
    spans = np.array(_merged([one for one in extents if one[1]]), dtype=np.uint64).reshape(-1, 2)
    fields = np.array([one.fields() for one in maps], dtype=np.int64).reshape(-1, 9)
    given = np.frombuffer(constants, np.uint8)
    sizes = np.array(grid, dtype=np.int64)
    number, array = ctypes.c_int64, ctypes.c_void_p
    counted = (array, number)
    call = function(
        _library(), "run", ctypes.c_uint64, *counted, *counted, *counted, array, *[number] * 4, ctypes.c_char_p, number
    )
    shown = [item for one in (spans, fields, given) for item in (one.ctypes.data, len(one))]
    last = (threads // 32, shared, order.late, order.ahead)
    if not call(handle, *shown, sizes.ctypes.data, *last, _said, len(_said)):
        raise RuntimeError(f"{name}, {order}: {_said.value.decode()}")


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


@contextmanager
def executed(*orders: Order) -> Iterator[None]:
    """Within the block every launch is run as machine code, the first in the first of the orders, the next in the next one."""
    from triton.runtime.jit import JITFunction

    global _orders
    plain, data_ptr, _orders = JITFunction.run, torch.Tensor.data_ptr, itertools.cycle(orders)

    def launched(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        run(self, args, kwargs, grid)

    def asked(self: torch.Tensor) -> int:
        address = data_ptr(self)
        if address and self.device.type == "cpu" and self.layout is torch.strided:
            begin, end = extent(self)
            _asked[begin] = max(end, _asked.get(begin, 0))
            (_tables.add if _is_table(self) else _tables.discard)(begin)
        return address

    JITFunction.run, torch.Tensor.data_ptr = launched, asked
    try:
        yield
    finally:
        JITFunction.run, torch.Tensor.data_ptr = plain, data_ptr
