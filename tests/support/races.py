"""The programs of a launch run one after the other in Triton's interpreter, and together on a GPU. What then depends on their order is
an error wherever kernels are interpreted: a byte that one program writes and another reads or writes, and one that a program reads
after it wrote it, which its other threads may do before where there is no tl.debug_barrier between. No kernel has atomics, which would
put programs in order: one is refused."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

_FOUND = {
    1: "another program of its launch writes",
    2: "it wrote itself, without a barrier",
    3: "another program of its launch reads",
}


class Race(AssertionError):
    """Two accesses of a launch meet at an address, and nothing says which comes first."""


def watch_launches() -> None:
    """Raise Race from now on, inside of the interpreter's InterpreterError.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    from triton.runtime import interpreter

    from . import accesses

    library = accesses.compiled(Path(__file__).with_name("races.cpp"))
    begin, pass_barrier = (accesses.function(library, name) for name in ("begin_launch", "pass_barrier"))
    note = {
        kind: accesses.function(library, f"note_{kind}", *accesses.ARRAYS, ctypes.c_int32)
        for kind in ("reads", "writes")
    }

    def look(kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        if kind == "atomic":
            raise Race("an atomic: which program comes first is not known")
        program, does = accesses.program(), "reads" if kind == "load" else "writes"
        found = note[does](addresses.ctypes.data, mask.ctypes.data, addresses.size, size, program)
        if found:
            raise Race(f"program {program} {does} what {_FOUND[found]}")

    accesses.watch(look)
    builder = interpreter.InterpreterBuilder
    set_grid_dim, create_barrier = builder.set_grid_dim, builder.create_barrier

    def begun(self: Any, *sizes: int) -> None:
        begin()
        set_grid_dim(self, *sizes)

    def passed(self: Any) -> Any:
        pass_barrier()
        return create_barrier(self)

    builder.set_grid_dim, builder.create_barrier = begun, passed
