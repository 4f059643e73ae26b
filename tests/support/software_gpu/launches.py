"""Launches of compiled Triton kernels, done by Triton's interpreter on the addresses that the launcher packed."""

import ctypes
import importlib.util
import os
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_uint64,
    *[ctypes.c_uint] * 3,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
)
_AGAIN = ctypes.CFUNCTYPE(None, ctypes.c_int)
_NUMBERS = {
    **{"i1": np.bool_, "u1": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64},
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32, 64)},
}
_WIDTHS = {"i8": 1, "u8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
counts: dict[str, int] = {}  # launches of each kernel


class _Launches:
    def __init__(self, driver: ctypes.CDLL) -> None:
        import triton.language as tl
        from triton.compiler import compiler
        from triton.runtime import interpreter, jit

        from tests.support.interpreter import count_to_a_tensor

        count_to_a_tensor()
        self.tl, self.interpreter, self.jit = tl, interpreter, jit
        self._driver = driver
        driver.software_gpu_allocated.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        driver.software_gpu_capturing.argtypes = [ctypes.c_void_p]
        self._functions: dict[int, tuple[Any, Any]] = {}
        self._captured: list[tuple[Any, ...]] = []
        self._interpreted: dict[Any, Any] = {}
        self._patched: dict[int, Any] = {}  # of the launch that runs: scopes of the interpreter's by a module's globals
        self._lock = threading.RLock()
        self._running = threading.local()
        self._known_by_handle(compiler)
        self._compiled_no_further()
        self._called_by_kernels()
        self._accesses_are_checked()
        self._kept = _LAUNCH(self._launch), _AGAIN(self._again)
        driver.software_gpu_set_launch(*self._kept)

    def _known_by_handle(self, compiler: ModuleType) -> None:
        plain, functions = compiler.CompiledKernel._init_handles, self._functions

        def init_handles(kernel: Any) -> None:
            plain(kernel)
            functions[kernel.function] = kernel.src, kernel.metadata

        compiler.CompiledKernel._init_handles = init_handles

    def _compiled_no_further(self) -> None:
        """Than the dialect that knows a launch's parameters: LLVM and ptxas take most of the time, and nothing runs what they make."""
        from triton.backends.nvidia.compiler import CUDABackend

        plain = CUDABackend.add_stages

        def named(module: Any, metadata: dict[str, Any]) -> bytes:
            found = re.search(r"tt\.func public @([\w.$]+)", str(module))
            assert found is not None
            metadata.update(name=found.group(1), shared=0, tmem_size=None)
            for kind in ("global", "profile"):
                metadata.update({f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1})
            return b"not compiled"

        def add_stages(backend: Any, stages: dict[str, Any], *rest: Any) -> None:
            plain(backend, stages, *rest)
            for name in ("llir", "ptx", "cubin"):
                stages.pop(name, None)
            stages["cubin"] = named

        CUDABackend.add_stages = add_stages

    def _rewritten(self, function: Any) -> Any:
        if function not in self._interpreted:
            self._interpreted[function] = self.interpreter.InterpretedFunction(function)
        return self._interpreted[function].rewrite()

    def _patch(self, function: Any) -> None:
        key = id(function.__globals__)
        if key not in self._patched:
            self._patched[key] = self.interpreter._patch_lang(function)

    def _called_by_kernels(self) -> None:
        plain = self.jit.JITFunction.__call__

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(self._running, "name", ""):
                return plain(function, *args, **kwargs)
            self._patch(function.fn)
            return self._rewritten(function.fn)(*args, **kwargs)

        self.jit.JITFunction.__call__ = call

    def _accesses_are_checked(self) -> None:
        builder = self.interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def checked_load(own: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._check(pointers, mask, "a load")
            return load(own, pointers, mask, *rest, **named)

        def checked_store(own: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._check(pointers, mask, "a store")
            return store(own, pointers, value, mask, *rest, **named)

        builder.create_masked_load, builder.create_masked_store = checked_load, checked_store

    def _check(self, pointers: Any, mask: Any, what: str) -> None:
        addresses = pointers.data
        if mask is not None:
            taken = np.asarray(mask if isinstance(mask, np.ndarray) else mask.data, dtype=bool)
            addresses, taken = np.broadcast_arrays(addresses, taken)
            addresses = addresses[taken]
        if addresses.size == 0:
            return
        size = max(1, pointers.dtype.element_ty.primitive_bitwidth // 8)
        allocated = self._driver.software_gpu_allocated
        if not allocated(int(addresses.min()), int(addresses.max()) + size):
            outside = [one for one in map(int, np.unique(addresses)) if not allocated(one, one + size)]
            if outside:
                name = self._running.name
                raise RuntimeError(f"{name}: {what} of {len(outside)} elements outside of the device's memory")

    def _tensor(self, value: Any, dtype: Any, kind: Any) -> Any:
        return self.tl.tensor(self.interpreter.TensorHandle(np.array([value], dtype=kind), dtype), dtype)

    def _value(self, address: int, kind: str) -> Any:
        dtype = self.tl.str_to_ty(kind, None)
        if kind[0] == "*":
            return self._tensor(ctypes.c_uint64.from_address(address).value, dtype, np.uint64)
        number = np.dtype(_NUMBERS[kind])
        raw = (ctypes.c_char * number.itemsize).from_address(address)
        return self._tensor(np.frombuffer(raw, number)[0], dtype, number)

    def _descriptor(self, address: int, kind: str) -> Any:
        """As runtime.cpp's TensorMap has it, innermost dimension first."""
        dtype, shape = re.match(r"tensordesc<([^\[>]*)\[([^\]]*)\]", kind).groups()  # type: ignore[union-attr]
        raw = bytes((ctypes.c_char * 128).from_address(address))
        rank, padded = raw[8], raw[9]
        sizes = np.frombuffer(raw, np.uint64, 5, 32)[:rank][::-1]
        strides = np.frombuffer(raw, np.uint32, 5, 72)[: rank - 1][::-1] // _WIDTHS[dtype]
        base = self._tensor(int.from_bytes(raw[:8], "little"), self.tl.str_to_ty(f"*{dtype}", None), np.uint64)
        semantic = self.interpreter.TritonSemantic(self.interpreter.InterpreterBuilder())
        steps = [self._tensor(one, self.tl.int64, np.int64) for one in strides]
        return semantic.make_tensor_descriptor(
            base=base,
            shape=[self._tensor(one, self.tl.int32, np.int32) for one in sizes],
            strides=[*steps, self.tl.constexpr(1)],
            block_shape=[self.tl.constexpr(int(one)) for one in shape.split(",")],
            padding_option="nan" if padded else "zero",
        )

    def _arguments(self, source: Any, metadata: Any, parameters: Any) -> dict[str, Any]:
        place = 0

        def one(kind: Any, path: tuple[int, ...]) -> Any:
            nonlocal place
            if isinstance(kind, tuple):
                return tuple(one(inner, (*path, i)) for i, inner in enumerate(kind))
            if kind == "constexpr":
                return source.constants[path]
            address = parameters[place]
            if not kind.startswith("tensordesc"):
                place += 1
                return self._value(address, kind)
            assert getattr(metadata, "tensordesc_meta", None), "a descriptor that is handed on as a pointer"
            place += 1 + 2 * (kind.split("]")[0].count(",") + 1)  # and sizes and strides, which the map has too
            return self._descriptor(address, kind)

        return {name: one(kind, (i,)) for i, (name, kind) in enumerate(source.signature.items())}

    def _execute(self, function: Any, given: dict[str, Any], grid: tuple[int, int, int]) -> None:
        counts[function.__name__] = counts.get(function.__name__, 0) + 1
        numerics = sys.modules.get("peftfast.kernels.numerics")
        before = getattr(numerics, "_INTERPRETED", None)
        outer = self._patched, getattr(self._running, "name", "")
        self._patched, self._running.name = {}, function.__name__
        try:
            if numerics is not None:
                numerics._INTERPRETED = self.tl.constexpr(True)  # type: ignore[attr-defined]
            inner = self._rewritten(function)
            self._patch(function)
            marked = {name for name, kind in function.__annotations__.items() if "constexpr" in str(kind)}
            arguments = {
                name: self.interpreter._implicit_cvt(value)
                if name not in marked and isinstance(value, int | tuple) and not isinstance(value, bool)
                else value
                for name, value in given.items()
            }
            builder = self.interpreter.interpreter_builder
            builder.set_grid_dim(*grid)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the interpreter's own
                for place in np.ndindex(*grid):
                    builder.set_grid_idx(*place)
                    inner(**arguments)
        finally:
            for scope in reversed(self._patched.values()):
                scope.restore()
            self._patched, self._running.name = outer
            if numerics is not None:
                numerics._INTERPRETED = before  # type: ignore[attr-defined]

    def _launch(self, handle: int, x: int, y: int, z: int, parameters: Any, stream: int) -> int:
        try:
            source, metadata = self._functions[handle]
            job = source.fn.fn, self._arguments(source, metadata, parameters), (x, y, z)
            number = 0
            if self._driver.software_gpu_capturing(stream):
                self._captured.append(job)
                number = len(self._captured) - 1
            with self._lock:
                self._execute(*job)
            return number
        except BaseException:  # into C, which has no exceptions: the launcher raises
            traceback.print_exc()
            return -1

    def _again(self, number: int) -> None:
        with self._lock:
            self._execute(*self._captured[number])


_installed: list[_Launches] = []


def install(folder: str) -> None:
    """Put the software GPU in place for this process, which :mod:`build` has made in ``folder`` and preloaded."""
    import torch
    from torch.backends import cuda

    from .build import CUDA_LIBRARY

    path = next(Path(folder).glob("software_gpu_operators*"))
    loader = importlib.util.spec_from_file_location("software_gpu_operators", path)
    assert loader is not None and loader.loader is not None
    operators = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(operators)
    operators.take_over("aten")
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes  # noqa: F401  its CUDA kernels too

        operators.take_over("bitsandbytes")
    for name in ("flash", "mem_efficient", "cudnn"):  # which only CUDA has
        getattr(cuda, f"enable_{name}_sdp")(False)
    load = torch.ops.load_library

    def load_library(given: str) -> None:
        emulated = os.path.basename(given).startswith("_cuda") and "peftfast" in given
        load(os.path.join(folder, CUDA_LIBRARY) if emulated else given)

    torch.ops.load_library = load_library
    _installed.append(_Launches(ctypes.CDLL("libcuda.so.1")))
