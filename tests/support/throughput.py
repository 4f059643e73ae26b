"""Do the kernels that only move bytes leave the memory time to? For each: the cycles that its instructions take of a
multiprocessor beside those that its bytes take of the memory, from the binary alone.

``python -m tests.support.throughput [--arch 80 | 90 | 100] [--only TEXT] [--opcodes]`` prints the table. A share of 0.5 means that the
busiest unit works half of the time that the memory does; towards 1 nothing is left for what no count shows, and past it the kernel is
bound by that unit. The speed is what :mod:`.multiprocessor` makes of latencies, barriers, the programs that fit at once and a last
wave besides: the part of the memory's speed that the launch reaches.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import nvcc_gate
from .compile_gate import Finding, run_gate
from .multiprocessor import MULTIPROCESSORS, Way, cycles, resident, steps_of
from .sass import DRAM_BYTES, Code, Counts

# Arguments that all programs read, so that they lie in the L2 cache: factors, tables, settings.
CACHED = frozenset(
    "w_ptr b_ptr s_ptr ds_ptr bias_ptr seed_ptr seeds_ptr code_ptr codes_ptr nested_absmax_ptr nested_code_ptr nested_offset_ptr "
    "coefficients_ptr thresholds_ptr threshold_ptr rounding_ptr eps_ptr decay_ptr table_ptr hyper_ptr corrections_ptr".split()
)


@dataclass(frozen=True)
class Grid:
    """What csrc/cuda launches, which no launcher of ours tells: the warps of a block, how many blocks, and at which byte of the
    parameters the pointers lie that CACHED names."""

    warps: int
    blocks: int
    parameters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """One kernel at one setting.

    Attributes:
        name: of the kernel, and for one of csrc/cuda a part of its demangled signature.
        source: a launcher of support/launches.py, or a file of csrc/cuda.
        bytes: what a program reads and writes in the counted range, from the launch's constants.
        limit: what the busiest unit may take of the memory's time on sm_90, under triton 3.6 and 3.7.1; past 1 where the definition
            itself asks for so much, or where nothing better is known.
        loop: the innermost loop of the most instructions is what counts, else the whole kernel, its loops once.
        rounds: past 1, the loop around an innermost one is what counts, with so many rounds of the inner.
        launch: of a loop, bytes that all programs move in it, from which it follows how often it runs. None: no speed is asked.
        speed: of the memory's, what a launch reaches at least on sm_90, under triton 3.6 and 3.7.1.
        trips: of a whole kernel, how often its loop runs, from the launch's constants.
        cached: further arguments of the kernel that lie in the L2 cache.
        grid: of a kernel of csrc/cuda.
        straight: of a whole kernel, the loops are left out, which a whole tile does not enter.
        cold: of a whole kernel, blocks with so many of an opcode are left out, and what leads to them alone: the code of a ragged tile,
            which no other enters, and of a root's argument that is no normal number.
    """

    name: str
    source: str
    bytes: Callable[[dict[str, int]], float]
    limit: float
    options: dict[str, Any] = field(default_factory=dict)
    loop: bool = False
    rounds: int = 1
    launch: float | None = None
    speed: float = 0.0
    trips: Callable[[dict[str, int]], int] = lambda _: 1
    cached: tuple[str, ...] = ()
    straight: bool = False
    cold: dict[str, int] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def cuda(self) -> bool:
        return self.grid is not None

    def faults(self, load: "Load") -> list[str]:
        """How the load is past the limits."""
        found = []
        if load.share > self.limit:
            share = f"{load.busiest} works {load.share:.2f} of the memory's time"
            found.append(f"{self.label}: {share}, at most {self.limit}: {load.units}")
        if (load.speed or 0.0) < self.speed:
            found.append(f"{self.label}: {load.speed or 0.0:.2f} of the memory's speed, at least {self.speed}")
        return found

    @property
    def label(self) -> str:
        return " ".join([self.source, self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Load:
    """Of a pass: cycles of the memory and of each unit, for as many bytes; ``names`` are the instructions by opcode, ``speed`` the part
    of the memory's speed that a launch reaches, None where none is asked."""

    label: str
    memory: float
    units: dict[str, float]
    names: dict[str, int]
    speed: float | None = None

    @property
    def busiest(self) -> str:
        return max(self.units, key=lambda unit: self.units[unit])

    @property
    def share(self) -> float:
        """Of the memory's time the busiest unit's."""
        return self.units[self.busiest] / self.memory


def loads(passes: list[Pass], arch: int) -> list[Load]:
    """What the passes' binaries ask, in order; those of csrc/cuda need nvcc."""
    triton = [one for one in passes if not one.cuda]
    requests = [{"launcher": one.source, "arch": arch, "code": one.name} | one.options for one in triton]
    findings = iter(_main_kernels(triton, run_gate(requests)) if requests else [])
    return [load_of(one, cuda_finding(one, arch) if one.cuda else next(findings)) for one in passes]


def load_of(one: Pass, finding: Finding) -> Load:
    """Of a pass whose kernel was found with its machine code."""
    assert finding.code is not None
    counts = _range(finding.code, one)
    memory = one.bytes(finding.constants) / DRAM_BYTES[finding.arch]
    return Load(one.label, memory, counts.cycles(finding.warps, finding.arch), counts.names, speed_of(one, finding))


def _main_kernels(passes: list[Pass], findings: list[Finding]) -> list[Finding]:
    """Of each request the finding of the kernel that its pass names; the others add partial sums."""
    chosen, rest = [], iter(findings)
    for one in passes:
        chosen.append(next(finding for finding in rest if finding.kernel == one.name))
    return chosen


def cuda_finding(one: Pass, arch: int) -> Finding:
    """Of a pass of csrc/cuda, which needs nvcc."""
    assert one.grid is not None
    kernels = nvcc_gate.machine_code(one.source, "90a" if arch == 90 else str(arch))
    ((code, report),) = [found for signature, found in kernels.items() if one.name in signature]
    finding = Finding(one.label, one.name, arch, report.registers, report.stack, report.shared, [], 0, code=code)
    finding.warps, finding.programs, finding.parameters = one.grid.warps, one.grid.blocks, one.grid.parameters
    return finding


def _range(code: Code, one: Pass) -> Counts:
    if one.loop and one.rounds > 1:
        return code.nested(one.rounds)
    if one.loop:
        assert code.longest_loop is not None
        return code.loops[code.loop_ranges.index(code.longest_loop)]
    if one.straight:
        return code.without_loops()
    return code.avoiding(one.cold) if one.cold else code.whole


def speed_of(one: Pass, finding: Finding) -> float | None:
    """The part of the memory's speed that a launch reaches, None for a loop of which no launch is told."""
    arch, moved = finding.arch, one.bytes(finding.constants)
    launch = one.launch if one.loop else finding.programs * moved
    if launch is None or finding.code is None:
        return None
    trips = 0 if one.straight else one.trips(finding.constants)
    if one.loop:
        trips = max(1, math.ceil(launch / (finding.programs * moved)))
    # A loop's copies are asked for as many trips ahead as it has stages less one.
    cached = {place for name, place in finding.parameters.items() if name in CACHED or name in one.cached}
    way = Way(trips, one.rounds, max(0, finding.stages - 1) if trips else 0, one.cold, cached)
    steps = steps_of(finding.code, way, arch)
    asked = finding.warps * sum(step.size for step in steps if not step.cached)
    at_once = resident(finding.registers, finding.shared, finding.warps, arch)
    share = -(-finding.programs // MULTIPROCESSORS[arch])
    some = share if one.loop else min(share, 6 * at_once)  # the rest goes on in the same way
    # What a loop's programs write besides (partial sums) is moved too; elsewhere lanes ask for the same bytes, or for parts of sectors.
    scale = 1.0 if one.loop else moved / asked
    taken = cycles(steps, finding.warps, some, at_once, arch, scale) * share / some
    return launch / MULTIPROCESSORS[arch] / DRAM_BYTES[arch] / taken


def faults(passes: list[Pass]) -> list[str]:
    """Which passes are past their limits on sm_90, and by what."""
    return [fault for one, load in zip(passes, loads(passes, 90), strict=True) for fault in one.faults(load)]


def main() -> None:
    from .throughput_passes import PASSES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(DRAM_BYTES), default=90)
    parser.add_argument("--only", default="", help="passes whose label holds this")
    parser.add_argument("--opcodes", action="store_true", help="and the instructions that they are made of")
    arguments = parser.parse_args()
    passes = [one for one in PASSES if arguments.only in one.label]
    for one, load in zip(passes, loads(passes, arguments.arch), strict=True):
        units = "  ".join(f"{unit} {cycles / load.memory:.2f}" for unit, cycles in load.units.items())
        speed = "" if load.speed is None else f"{load.speed:.2f}"
        print(f"{load.share:5.2f} of {one.limit:5.2f}  {load.busiest:7} {speed:>5} {load.label:130} {units}")
        if arguments.opcodes:
            print("       " + ", ".join(f"{name} {times}" for name, times in load.names.items()))


if __name__ == "__main__":
    main()
