"""A multiprocessor that runs machine code as far as time goes: which warp issues when, and for what it waits.

What :mod:`.sass` counts is a bound: the busiest unit, if every warp always had something to do. Here the warps of as many programs
as fit run the kernel's own instructions. Each waits for the scoreboards that its instruction names, for barriers, for groups of
asynchronous copies and for a free unit, and bytes wait for the memory. No value is computed, so a warp's way through the code is given.

What the model leaves out: conflicts of shared memory's banks, the L1 cache, other multiprocessors (each has its share of the memory at
any time), and that a busy memory answers later. Latencies are those that others measured on an H100, in cycles.
"""

import ctypes
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from .accesses import compiled
from .sass import DRAM_BYTES, PARAMETERS, RATES, Code, Instruction, spread, unit_of

# Cycles until a result is there. A memory's is that of an access that finds nobody before it.
DRAM, L2, SHARED, OTHER = 700, 270, 30, 25
_READ = 20  # until an access has read its operands
_TENSOR = 40  # a matrix instruction's, beyond the time in which it takes the unit
_START = 200  # from a program's end to the beginning of the one that takes its place
_BARRIER = 20
L2_BYTES = 38.0  # for each cycle of a multiprocessor: 10 TB/s of 132
# Of a multiprocessor. Shared memory holds 1024 bytes more of each program.
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}

_LONGEST = 1 << 20
_OF_A_PART = ("alu", "imad", "float", "special")

_REGISTER = re.compile(r"\bU?R\d+\b")
_CONSTANT = re.compile(r"c\[0x0\]\[0x(\w+)\]")


def resident(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many programs a multiprocessor holds at once."""
    of_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, _SHARED[arch] // (shared + 1024), _WARPS // warps, _PROGRAMS)


@dataclass
class Step:
    """One instruction of a warp's way.

    Attributes:
        unit, weight: the unit that executes it and how many times it is counted there.
        size: bytes that a warp's access to global memory moves; cached: they lie in the L2 cache.
        keeps: groups of copies that a wait leaves open; None: no such wait.
        columns: of a matrix instruction.
    """

    kind: str
    unit: str | None
    weight: int
    stall: int
    done: int
    read: int
    waits: int
    size: int = 0
    cached: bool = False
    keeps: int | None = None
    columns: int = 0


@dataclass(frozen=True)
class Way:
    """Which way a warp takes through the code.

    Attributes:
        trips: how often it goes through the loop of the most instructions; 0: past all innermost loops.
        rounds: past 1, trips are those of the loop around an innermost one, which it goes through so often in each.
        ahead: how many trips before the last its copies run out, which the loop asks for ahead.
        cold: blocks with so many of an opcode are not entered.
        cached: offsets among the parameters of the pointers to what lies in the L2 cache.
    """

    trips: int = 1
    rounds: int = 1
    ahead: int = 0
    cold: dict[str, int] = field(default_factory=dict)
    cached: Collection[int] = ()


def steps_of(code: Code, way: Way, arch: int) -> list[Step]:
    """What a warp executes from the beginning to an exit; of a program that takes one tile after the other, for the first."""
    instructions = code.instructions
    # The loops from the outermost on, how often each is to run, and how often it has.
    loops = [code.longest_loop] if way.rounds == 1 else [*reversed(code.longest_nest or ())]
    wanted, trips = [way.trips, way.rounds][: len(loops)], [0] * len(loops)
    loop = loops[-1] if loops else None
    avoided = _cold_instructions(code, way.cold)
    if not way.trips:
        avoided |= {number for low, high in code.loop_ranges for number in range(low, high + 1)}
    exits = [number for number, one in enumerate(instructions) if one.opcode == "EXIT"]
    ending = _leading_to(code, exits, avoided)
    entering = _leading_to(code, [loop[0]], avoided) if loop and way.trips else set()
    origins = _Origins(PARAMETERS[arch])
    found: list[Step] = []
    number = 0
    while len(found) < _LONGEST:
        one = instructions[number]
        for i, one_loop in enumerate(loops):
            if one_loop and number == one_loop[0] and way.trips:
                trips[i] += 1
                trips[i + 1 :] = [0] * (len(trips) - i - 1)
        sources = origins.follow(one)
        if not one.predicate.startswith("@!PT"):
            step = _step(one, bool(sources & set(way.cached)))
            if step.kind == "LDGSTS" and trips[0] > way.trips - way.ahead:
                step.size = 0
            found.append(step)
        back = one.target is not None and one.target <= number and not one.follows
        if (one.opcode == "EXIT" and not one.predicate) or back:
            return found
        again = {one_loop for one_loop, times, done in zip(loops, wanted, trips, strict=True) if done < times}
        number = _next(number, one, again, entering if loops and not trips[-1] else set(), ending)
    raise RuntimeError(f"the way has not come to an exit after {len(found)} instructions")


def _next(
    number: int, one: Instruction, again: Collection[tuple[int, int] | None], entering: set[int], ending: set[int]
) -> int:
    if one.opcode != "BRA" or one.target is None:
        return number + 1
    if not one.follows or (one.target, number) in again:
        return one.target
    for wanted in (entering, ending):
        ahead = [choice for choice in (number + 1, one.target) if choice > number and choice in wanted]
        if ahead:
            return ahead[0]
    raise RuntimeError(f"no way leads on from {one.name} {one.operands} at {one.at:#x}")


def _cold_instructions(code: Code, cold: dict[str, int]) -> set[int]:
    if not cold:
        return set()
    found, number = set(), 0
    for block in code.blocks:
        size = sum(block.names.values())
        if any(block.names.get(name, 0) >= times for name, times in cold.items()):
            found.update(range(number, number + size))
        number += size
    return found


def _leading_to(code: Code, goals: list[int], avoided: set[int]) -> set[int]:
    """The instructions from which a goal can be reached."""
    before: list[list[int]] = [[] for _ in range(len(code.instructions) + 1)]
    for number, one in enumerate(code.instructions):
        if one.target is not None and one.opcode == "BRA":
            before[one.target].append(number)
        if one.follows:
            before[number + 1].append(number)
    return spread(goals, before, [number not in avoided for number in range(len(before))])


class _Origins:
    """Which parameters each register was computed from, along one way; what was loaded comes from none."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.of: dict[str, frozenset[int]] = {}

    def follow(self, one: Instruction) -> frozenset[int]:
        """The parameters that the operands come from: of a load or a store the address's."""
        names = _REGISTER.findall(one.operands)
        writes = one.opcode not in ("STG", "STS", "LDGSTS", "ST", "RED", "BRA", "EXIT")
        if one.opcode == "STG":
            names = _REGISTER.findall(one.operands.rpartition("],")[0] or one.operands)
        sources = frozenset().union(*(self.of.get(name, frozenset()) for name in (names[1:] if writes else names)))
        sources |= {
            int(place, 16) - self.first for place in _CONSTANT.findall(one.operands) if int(place, 16) >= self.first
        }
        if writes and names:
            kind, place = re.fullmatch(r"(U?R)(\d+)", names[0]).groups()  # type: ignore[union-attr]
            loaded = one.opcode in ("LDG", "LDS", "LD")
            for i in range(2 if ".64" in one.name or "WIDE" in one.name else 1):
                self.of[f"{kind}{int(place) + i}"] = frozenset() if loaded else sources
        return sources


def _step(one: Instruction, cached: bool) -> Step:
    unit, weight = unit_of(one.name)
    columns = 16 if one.opcode == "HMMA" else 0  # as long as so many columns of a warp group's instruction
    if one.opcode == "HGMMA":
        columns = int(re.search(r"64x(\d+)x", one.name)[1])  # type: ignore[index]
    step = Step(one.opcode, unit, weight, max(1, one.stall), one.done, one.read, one.waits, columns=columns)
    if one.opcode in ("LDG", "STG", "LDGSTS"):
        bits = [int(bits) for bits in re.findall(r"\.[US]?(8|16|32|64|128)\b", one.name)]
        step.size, step.cached = 32 * (bits[-1] if bits else 32) // 8, cached and one.opcode != "STG"
    elif one.opcode == "DEPBAR" and (match := re.search(r"SB\d, 0x(\w+)", one.operands)) and ".LE" in one.name:
        step.keeps = int(match[1], 16)
    elif one.name.startswith("WARPGROUP.DEPBAR"):
        step.kind = "matrix wait"
    return step


_UNITS = {None: -1, **{unit: number for number, unit in enumerate(_OF_A_PART)}, "memory": 4}
_KINDS = {"LDGSTS": 1, "LDGDEPBAR": 2, "BAR": 3, "matrix wait": 4}


def cycles(steps: list[Step], warps: int, programs: int, at_once: int, arch: int, scale: float = 1.0) -> float:
    """How long a multiprocessor takes for so many programs, so many of them at once, whose warps all go the same way. Of the bytes that
    the memory is asked for it moves the part ``scale``: less than 1 where lanes ask for the same ones."""
    rows = [
        (
            *(_KINDS.get(one.kind, 0), _UNITS[one.unit], one.weight, one.stall, one.done, one.read, one.waits),
            *(one.size, one.cached, -1 if one.keeps is None else one.keeps, one.columns),
        )
        for one in steps
    ]
    table = np.array(rows, dtype=np.int32)
    # Cycles for which an instruction takes a unit of one of the four parts; shared by them is the memory's.
    taken = np.array([4 / RATES[arch][unit] for unit in _OF_A_PART])
    latencies = np.array([DRAM, L2, SHARED, OTHER, _READ, _TENSOR, _START, _BARRIER], dtype=np.float64)
    sizes, rates = (len(steps), warps, programs, at_once), (DRAM_BYTES[arch] / scale, L2_BYTES)
    return float(_library().cycles(table.ctypes.data, *sizes, taken.ctypes.data, *rates, latencies.ctypes.data))


def why_not() -> str:
    """Why the model cannot run here, or an empty string."""
    return "" if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


@cache
def _library() -> ctypes.CDLL:
    library = compiled(Path(__file__).with_suffix(".cpp"))
    number, real, array = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    library.cycles.argtypes = [array, *4 * [number], array, real, real, array]
    library.cycles.restype = real
    return library
