"""Do the kernels that only move bytes leave the processor time to? For each: the cycles that its instructions take of a
multiprocessor beside those that its bytes take of the memory, from the binary alone.

``python -m tests.support.throughput [--arch 80 | 90 | 100] [--only TEXT] [--opcodes]`` prints the table. 0.5 means that the busiest unit works half of the time that the
memory does; towards 1 nothing is left for what no count shows (latencies, barriers, a last wave), and past it the kernel is bound by
that unit.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import nvcc_gate
from .compile_gate import Finding, run_gate
from .sass import DRAM_BYTES, Code, Counts

M, WIDTH = 8192, 4096  # rows and width of the passes below: a training step's
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LONGEST = -1  # loop: where the compiler's waits for barriers are loops too
PACKED = 0.5 + 1 / 64  # of an element in blocks of 64 with nested maxima


@dataclass(frozen=True)
class Pass:
    """One kernel at one setting.

    Attributes:
        name: of the kernel, and for one of csrc/cuda a part of its demangled signature.
        source: a launcher of support/launches.py, or a file of csrc/cuda.
        bytes: what a program (a warp, for csrc/cuda) reads and writes in the counted range, from the launch's constants.
        loop: the innermost loop that is counted, in the order of the code; None: all of the kernel but its loops, which a whole tile
            does not enter. ``whole``: all of it, loops once.
        cold: of a whole kernel, blocks with so many of an opcode are left out, and what leads to them alone: the code of a ragged tile,
            which no other enters, and of a root's argument that is no normal number.
    """

    name: str
    source: str
    bytes: Callable[[dict[str, int]], float]
    options: dict[str, Any] = field(default_factory=dict)
    loop: int | None = None
    whole: bool = False
    cold: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.source, self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Load:
    """Of a pass: cycles of the memory and of each unit, for as many bytes."""

    label: str
    memory: float
    units: dict[str, float]
    names: dict[str, int]

    @property
    def busiest(self) -> str:
        return max(self.units, key=lambda unit: self.units[unit])

    @property
    def share(self) -> float:
        """Of the memory's time the busiest unit's."""
        return self.units[self.busiest] / self.memory


def _tile(size: int) -> Callable[[dict[str, int]], float]:
    return lambda constants: constants["BLOCK_M"] * constants["BLOCK_C"] * size


def _lora() -> list[Pass]:
    passes = []
    for wide, narrow, dropout in (
        ("bfloat16", "float32", True),
        ("bfloat16", "float32", False),
        ("float32", "float32", True),
    ):
        size = SIZES[wide]
        for rank in (16, 64):
            kind = {"M": M, "R": rank, "wide": wide, "narrow": narrow, "compute": "bfloat16", "dropout": dropout}
            passes.append(Pass("_lora_shrink_kernel", "lora_shrink", _tile(size), kind, 0))
            passes.append(Pass("_lora_expand_kernel", "lora_expand", _tile(2 * size), kind, whole=True))
            passes.append(Pass("_lora_weight_grad_kernel", "lora_weight_grad", _tile(size), kind, 0))
            if not dropout:
                passes.append(Pass("_lora_dy_grads_kernel", "lora_dy_grads", _tile(size), kind, 0))
    return passes


def _nf4() -> list[Pass]:
    passes = []
    for dtype in ("bfloat16", "float32"):
        kind = {"dtype": dtype, "block_size": 64, "nested": True}

        def moved(constants: dict[str, int], size: int = SIZES[dtype]) -> float:
            return constants["BLOCKS"] * 64 * (PACKED + size)

        passes.append(Pass("_nf4_dequantize_kernel", "nf4_dequantize", moved, kind, whole=True))
    for kind, size in (("Bf16", 2), ("float", 4)):
        for apart in ("false", "true"):
            name = f"dequantize_tiles<{kind}, true, {apart}>"
            passes.append(Pass(name, "nf4.cu", lambda _, size=size: 1024 * (PACKED + size)))
    return passes


# A ragged tile's loads of elements of so many bytes: beside those, a few 4-byte loads read settings and tables.
NARROW_LOADS = {2: {"LDG.E.U16": 1}, 4: {"LDG.E": 8}}


# A ragged tile's loads of elements of so many bytes: beside those, a few 4-byte loads read settings and tables.
NARROW_LOADS = {2: {"LDG.E.U16": 1}, 4: {"LDG.E": 8}}


def _zeroth_order() -> list[Pass]:
    passes = []
    for dtype, rademacher in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        size = SIZES[dtype]
        kind = {"dtype": dtype, "rademacher": rademacher}
        passes.append(
            Pass(
                "_perturb_kernel",
                "perturb",
                lambda constants, size=size: 2 * size * constants["BLOCK"],
                kind,
                whole=True,
                cold={f"STG.E{'.U16' if size == 2 else ''}": 1, **NARROW_LOADS[size], "CALL.REL.NOINC": 1},
            )
        )
        cuda, width = ("Bf16", 8) if size == 2 else ("float", 4)
        name = f"apply<{cuda}, false, {str(rademacher).lower()}>"
        passes.append(Pass(name, "zeroth_order.cu", lambda _, bytes_=2 * size * width * 32: bytes_, whole=True))
    return passes


def _weights(size: float) -> Callable[[dict[str, int]], float]:
    """Of a step of a product of a few rows, whose x stays in a cache."""
    return lambda constants: size * constants["BLOCK_N"] * constants["BLOCK_K"]


def _quantised() -> list[Pass]:
    few = {"M": 16, "x": "bfloat16", "compute": "bfloat16", "out": "bfloat16", "nested": True}
    passes = [Pass("_nf4_linear_kernel", "nf4_linear", _weights(PACKED), few, 0)]
    for transposed in (False, True):
        kind = {"M": 64, "R": 16, "transposed": transposed, "dropout": False, "nested": True, "candidate": 0}
        passes.append(Pass("_nf4_product_kernel", "nf4_product", _weights(PACKED), kind, LONGEST))
    for dtype in ("bfloat16", "float32"):

        def columns(constants: dict[str, int], size: int = SIZES[dtype]) -> float:
            return constants["ROWS"] * constants["COLUMNS"] * (PACKED + size)

        def blocks(constants: dict[str, int], size: int = SIZES[dtype]) -> float:
            return constants["BLOCKS"] * 64 * (PACKED + size)

        passes += [
            Pass(
                "_nf4_columns_kernel", "nf4_dequantize_columns", columns, {"dtype": dtype, "nested": True}, whole=True
            ),
            # Without the loops over the delta's entries, one in a hundred of the elements.
            Pass("_nf4_dequantize_kernel", "sparse_delta_dequantize", blocks, {"dtype": dtype}),
        ]
    for rademacher in (False, True):
        kind = {"M": 16, "dtype": "bfloat16", "rademacher": rademacher}
        passes.append(Pass("_zo_linear_kernel", "zo_linear", _weights(2), kind, 0))
    for distribution in ("gaussian", "rademacher", "scales"):
        kind = {"M": 16, "dtype": "bfloat16", "distribution": distribution, "nested": True}
        passes.append(Pass("_zo_nf4_linear_kernel", "zo_nf4_linear", _weights(PACKED), kind, 0))
    return passes


def _sparse() -> list[Pass]:
    passes = []
    for stochastic in (False, True):
        for small in (False, True):
            # Value read and written, gradient, two states, age, index, base, and the weight's own two bytes of a sector.
            size = 8 + 4 + (4 if small else 16) + 4 + 4 + 2 + 2

            def entries(constants: dict[str, int], size: int = size) -> float:
                return size * constants["BLOCK"]

            kind = {"dtype": "bfloat16", "stochastic": stochastic, "small": small}
            # A ragged block's values are stored one by one.
            cold = {"STG.E": 4, "CALL.REL.NOINC": 1}
            passes.append(Pass("_sparse_adamw_kernel", "sparse_adamw_step", entries, kind, whole=True, cold=cold))
    product = {"M": 64, "R": 16, "transposed": True, "dropout": False, "nested": True, "candidate": 0}
    passes.append(Pass("_reduce_partials_kernel", "nf4_product", lambda constants: 4 * constants["BLOCK"], product, 0))
    return passes


PASSES = _lora() + _nf4() + _zeroth_order() + _quantised() + _sparse()


def loads(passes: list[Pass], arch: int) -> list[Load]:
    """What the passes' binaries ask, in order; those of csrc/cuda need nvcc."""
    triton = [one for one in passes if not one.source.endswith(".cu")]
    findings = run_gate([{"launcher": one.source, "arch": arch, "code": True} | one.options for one in triton])
    found: dict[str, Load] = {}
    for one, finding in zip(triton, _main_kernels(triton, findings), strict=True):
        assert finding.code is not None
        counts = _range(finding.code, one)
        found[one.label] = _load(one, counts, finding.warps, arch, one.bytes(finding.constants))
    for one in passes:
        if one.source.endswith(".cu"):
            found[one.label] = _load(one, _range(_cuda_kernel(one.source, one.name, arch), one), 1, arch, one.bytes({}))
    return [found[one.label] for one in passes]


def _main_kernels(passes: list[Pass], findings: list[Finding]) -> list[Finding]:
    """Of each request the finding of the kernel that its pass names; the others add partial sums."""
    chosen, rest = [], iter(findings)
    for one in passes:
        chosen.append(next(finding for finding in rest if finding.kernel == one.name))
    return chosen


def _cuda_kernel(source: str, name: str, arch: int) -> Code:
    kernels = nvcc_gate.machine_code(source, "90a" if arch == 90 else str(arch))
    (found,) = [code for signature, code in kernels.items() if name in signature]
    return found


def _range(code: Code, one: Pass) -> Counts:
    if one.loop == LONGEST:
        return max(code.loops, key=lambda loop: loop.units["issue"])
    if one.loop is not None:
        return code.loops[one.loop]
    if one.whole:
        return code.avoiding(one.cold) if one.cold else code.whole
    rest = Counts(dict(code.whole.units), dict(code.whole.names))
    for loop in code.loops:
        for unit, times in loop.units.items():
            rest.units[unit] -= times
        for name, times in loop.names.items():
            rest.names[name] -= times
    return rest


def _load(one: Pass, counts: Counts, warps: int, arch: int, moved: float) -> Load:
    return Load(one.label, moved / DRAM_BYTES[arch], counts.cycles(warps, arch), counts.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(DRAM_BYTES), default=90)
    parser.add_argument("--only", default="", help="passes whose label holds this")
    parser.add_argument("--opcodes", action="store_true", help="and the instructions that they are made of")
    arguments = parser.parse_args()
    for load in loads([one for one in PASSES if arguments.only in one.label], arguments.arch):
        units = "  ".join(f"{unit} {cycles / load.memory:.2f}" for unit, cycles in load.units.items())
        print(f"{load.share:5.2f}  {load.busiest:7} {load.label:130} {units}")
        if arguments.opcodes:
            print("       " + ", ".join(f"{name} {times}" for name, times in load.names.items()))


if __name__ == "__main__":
    main()
