"""csrc/cuda as nvcc compiles it for sm_90, host code and kernels, in the emulator's place: the library's own launch functions launch on
a runtime of the house (cudart.cpp), and the kernels are run as machine code."""

import ctypes
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import nvcc_gate
from tests.support.cuda_emulator import build as emulator
from tests.support.sass import Parameter, parameters, read_cubin

from . import launch
from .program import program_text

_HERE = Path(__file__).resolve().parent
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *[ctypes.c_uint] * 4,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


@dataclass(frozen=True)
class _Kernel:
    """shared: the bytes that it declares itself."""

    shown: str
    handle: int
    parameters: list[Parameter]
    shared: int


def _kernels(made: nvcc_gate.Compiled) -> dict[str, _Kernel]:
    """By their mangled names."""
    entries = nvcc_gate.kernels_of(made.ptx)
    shared = {report.name: report.shared for report in made.reports}
    codes = read_cubin(made.cubin)
    return {
        name: _Kernel(shown, launch.load(program_text(code), shown), parameters(entries[name]), shared[name])
        for shown, (name, code) in zip(nvcc_gate.demangled(list(codes)), codes.items(), strict=True)
    }


def _run(kernel: _Kernel, grid: tuple[int, int, int], threads: int, arguments: Any, dynamic: int) -> None:
    constants = launch.constants_of(threads, grid)
    packed = b""
    for one, address in zip(kernel.parameters, arguments, strict=False):
        value = ctypes.string_at(address, one.size)
        constants[one.begin : one.begin + one.size] = value
        packed += value + bytes(-len(value) % 8)
    extents, shared = launch.asked_for(packed), -(-kernel.shared // 16) * 16 + dynamic
    launch.execute(kernel.handle, kernel.shown, extents, [], constants, grid, threads, shared, launch.turn())


def _launched(kernels: dict[str, _Kernel]) -> Any:
    """What cudart.cpp calls."""

    def launched(name, x, y, z, threads, arguments, shared, message, size) -> int:
        try:
            _run(kernels[name.decode()], (x, y, z), threads, arguments, shared)
            return 0
        except Exception as error:
            said = str(error) if isinstance(error, RuntimeError) else traceback.format_exc()
            text = said.encode()[: size - 1] + b"\0"
            ctypes.memmove(message, text, len(text))
            return 1

    return _LAUNCHED(launched)


def build(
    family: str,
    folder: Path,
    edit: tuple[str, str] | None = None,
    base: Path | None = None,
    races: bool = False,
) -> ctypes.CDLL:
    """As the emulator's; a test that looks for races where only the emulator does is left out.

    Raises:
        RuntimeError: what a compiler says. ValueError: the text to edit is in no source.
    """
    if races:
        pytest.skip("a test of the emulator")
    if nvcc_gate.nvcc_path() is None:
        pytest.skip("nvcc is not installed")
    sources = sorted((emulator.CSRC / "cuda").glob(f"{family}*.cu"))
    if edit is not None and not any(edit[0] in source.read_text() for source in sources):
        raise ValueError(f"no source has {edit[0]!r}")
    kernels: dict[str, _Kernel] = {}
    objects = []
    for source in sources:
        text = source.read_text()
        if edit is not None and edit[0] in text:
            changed = folder / source.name
            changed.write_text(text.replace(*edit).replace('#include "../', '#include "'))
            made = nvcc_gate.compile_source(changed)
        else:
            made = nvcc_gate.compiled(source.name)
        kernels |= _kernels(made)
        objects.append(folder / f"{source.stem}.o")
        objects[-1].write_bytes(made.object)
    for source in (emulator.HERE / f"{family}.cpp", _HERE / "cudart.cpp"):
        objects.append(folder / f"{source.stem}_host.o")
        nvcc_gate.run_nvcc(source, "-c", "-o", objects[-1])
    library = folder / f"{family}.so"
    # Its own runtime even where a CUDA build of torch has loaded the real one for all.
    emulator.run_compiler("-shared", "-Wl,-Bsymbolic", *objects, "-o", library)
    loaded = ctypes.CDLL(str(library))
    for function in emulator.FUNCTIONS[family]:
        getattr(loaded, function).restype = ctypes.c_char_p
    loaded.launched = _launched(kernels)  # as long as the library
    loaded.set_launched(loaded.launched)
    return loaded
