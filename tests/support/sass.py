"""What a compiled kernel asks of a multiprocessor: its machine instructions by the unit that executes them, and their cycles.

A kernel that is to run at the memory's speed must finish the instructions of a byte before the next byte comes. Which instructions
those are only the binary says: this module disassembles it, finds its loops, and counts. Rates are those of the CUDA programming
guide's table of arithmetic throughput; what that table leaves out is said where it is assumed. The result is a bound from below: it
knows neither latencies nor how well warps hide them.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Warp instructions a multiprocessor takes in a cycle, all units together and by unit. alu: integer additions, shifts, logic,
# comparisons, selections, byte permutations, packed conversions (64 lanes). imad: integer products (64 lanes; of 32 x 32 -> 64 bits
# the guide says nothing: counted once where one instruction gives both halves, twice where it gives the upper one). special: roots,
# reciprocals and conversions of single numbers (16 lanes). memory: an access of up to 4 bytes a lane to shared or global memory, or a
# shuffle (32 lanes); wider ones count as many times.
RATES = {
    80: {"issue": 4.0, "alu": 2.0, "imad": 2.0, "float": 2.0, "special": 0.5, "memory": 1.0},
    90: {"issue": 4.0, "alu": 2.0, "imad": 2.0, "float": 4.0, "special": 0.5, "memory": 1.0},
    100: {"issue": 4.0, "alu": 2.0, "imad": 2.0, "float": 4.0, "special": 0.5, "memory": 1.0},
}
# Bytes of DRAM for each cycle of a multiprocessor: A100 80 GB 1.41 GHz x 108, 1.8 TB/s; H200 1.98 GHz x 132, 4.3 TB/s as others
# measured a copy; B200 1.97 GHz x 148, 7.2 TB/s (nine tenths of the data sheet).
DRAM_BYTES = {80: 11.8, 90: 16.5, 100: 24.7}

_ALU = frozenset(
    "LOP LOP3 PLOP3 IADD IADD3 VIADD VIADDMNMX VIMNMX IMNMX IABS SHF SHL SHR PRMT SEL FSEL ISETP FSETP FMNMX FCHK LEA BMSK SGXT I2FP "
    "F2FP MOV CS2R P2R R2P VOTE VABSDIFF DSETP HSETP2 HSET2 HMNMX2".split()
)
_FLOAT = frozenset("FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2".split())
_SPECIAL = frozenset("MUFU F2I I2F F2F FRND POPC FLO BREV".split())
_MEMORY = frozenset("LDS STS LDSM STSM LDG STG LDGSTS SHFL ATOMS ATOMG ATOM RED LD ST LDL STL".split())
_NOTHING = frozenset(["NOP"])  # the padding behind a kernel's end

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):")
_SECTION = re.compile(r"\.section\s+\.text\.([^\s,]+),")


@dataclass
class Counts:
    """Instructions of a warp, by unit; ``names`` are all of them by opcode."""

    units: dict[str, float] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def cycles(self, warps: int, arch: int) -> dict[str, float]:
        """Cycles that each unit of a multiprocessor is taken by so many warps."""
        return {unit: self.units.get(unit, 0) * warps / rate for unit, rate in RATES[arch].items()}


@dataclass
class Block:
    """Instructions that run one after the other, by opcode, and the numbers of the blocks that may come next; none after an exit."""

    names: dict[str, int]
    after: list[int]


@dataclass
class Code:
    """A kernel's instructions: all, those of each innermost loop in the order of the code, and its blocks from its beginning on."""

    whole: Counts
    loops: list[Counts]
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Code":
        """The code whose ``dataclasses.asdict`` this is."""
        loops, blocks = ([kind(**one) for one in values[name]] for kind, name in ((Counts, "loops"), (Block, "blocks")))
        return cls(Counts(**values["whole"]), loops, blocks)

    def without_loops(self) -> Counts:
        rest = Counter(self.whole.names)
        for loop in self.loops:
            rest.subtract(loop.names)
        return _count(name for name in rest.elements())

    def avoiding(self, cold: dict[str, int]) -> Counts:
        """The instructions that a run from the beginning to an exit can meet, each once, if it enters no block with so many of an
        opcode (or more): the way of a whole tile past the code for a ragged one, by what that one alone does."""
        warm = [all(block.names.get(name, 0) < times for name, times in cold.items()) for block in self.blocks]
        before: list[list[int]] = [[] for _ in self.blocks]
        for number, block in enumerate(self.blocks):
            for other in block.after:
                before[other].append(number)
        exits = [number for number, block in enumerate(self.blocks) if block.names.get("EXIT") or not block.after]
        reached = _spread([0], [block.after for block in self.blocks], warm)
        reached &= _spread(exits, before, warm)
        return _count(name for number in sorted(reached) for name in _repeated(self.blocks[number].names))


def _spread(start: list[int], after: list[list[int]], allowed: list[bool]) -> set[int]:
    found, open_ = set(), list(start)
    while open_:
        one = open_.pop()
        if allowed[one] and one not in found:
            found.add(one)
            open_.extend(after[one])
    return found


def _repeated(names: dict[str, int]) -> list[str]:
    return [name for name, times in names.items() for _ in range(times)]


def read_cubin(cubin: bytes) -> dict[str, Code]:
    """The kernels of a cubin by their (mangled) names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    parts = _SECTION.split(text)
    return {name: read_listing(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def _tool(name: str) -> str:
    """One of the CUDA tools that triton brings."""
    from triton import knobs

    return str(getattr(knobs.nvidia, name).path)


def read_listing(text: str) -> Code:
    """One kernel of nvdisasm's listing."""
    instructions: list[tuple[int, str, str]] = []
    # Of each instruction whether the next one may follow it, and where else it may go.
    leaves: list[tuple[bool, str | None]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _INSTRUCTION.search(line):
            labels.update(dict.fromkeys(waiting, int(match[1], 16)))
            waiting = []
            instructions.append((int(match[1], 16), match[3], match[4]))
            leaves.append(_leaving(bool(match[2]), match[3], match[4]))
    ranges = []
    for at, name, operands in instructions:
        target = re.search(r"\((\.L\w+)\)", operands)
        # A branch to itself is the padding that ends every kernel.
        if name.startswith("BRA") and target and labels.get(target[1], at) < at:
            ranges.append((labels[target[1]], at))
    inner = [
        one for one in sorted(set(ranges)) if not any(one[0] <= other[0] and other[1] < one[1] for other in ranges)
    ]
    whole = _count(name for _, name, _ in instructions)
    loops = [_count(name for at, name, _ in instructions if low <= at <= high) for low, high in inner]
    return Code(whole, loops, _blocks([(at, name) for at, name, _ in instructions], leaves, labels))


def _leaving(predicated: bool, name: str, operands: str) -> tuple[bool, str | None]:
    """Whether the next instruction may follow, and the label to which a branch or a call may go."""
    first = name.split(".")[0]
    target = re.search(r"\((\.L\w+)\)", operands)
    # A condition may stand before the branch or among its operands.
    conditional = predicated or "," in operands or name.startswith("BRA.")
    if first == "BRA":
        return conditional, target[1] if target else None
    if first == "CALL":
        return True, target[1] if target else None
    return predicated or first not in ("EXIT", "RET"), None


def _blocks(
    instructions: list[tuple[int, str]], leaves: list[tuple[bool, str | None]], labels: dict[str, int]
) -> list[Block]:
    starts = {labels[target] for _, target in leaves if target in labels} | {instructions[0][0]}
    for (follows, target), (at, _) in zip(leaves[:-1], instructions[1:], strict=True):
        if not follows or target:
            starts.add(at)
    starts |= {after for (_, name), (after, _) in itertools.pairwise(instructions) if name == "EXIT"}
    number = {at: i for i, at in enumerate(sorted(starts))}
    blocks: list[Block] = []
    for i, ((at, name), (follows, target)) in enumerate(zip(instructions, leaves, strict=True)):
        if at in number:
            blocks.append(Block({}, []))
        names, after = blocks[-1].names, blocks[-1].after
        names[name] = names.get(name, 0) + 1
        if target in labels:
            after.append(number[labels[target]])
        if follows and i + 1 < len(instructions) and instructions[i + 1][0] in number:
            after.append(number[instructions[i + 1][0]])
    return blocks


def folded_by_ptxas(assembly: str, inputs: list[int], outputs: int, arch: int = 90) -> list[int]:
    """What inline assembly for 32-bit registers ($0 the first output, inputs behind the outputs) makes of constants: ptxas computes it
    and its code holds the results. A RuntimeError where ptxas left the computation to the processor."""
    names = [f"%out{i}" for i in range(outputs)] + [f"%in{i}" for i in range(len(inputs))]
    for i in reversed(range(len(names))):
        assembly = assembly.replace(f"${i}", names[i])
    lines = [
        f".version 8.0\n.target sm_{arch}\n.address_size 64\n.visible .entry folded(.param .u64 to) {{",
        f".reg .b32 {', '.join(names)};\n.reg .b64 %to;\nld.param.u64 %to, [to];\ncvta.to.global.u64 %to, %to;",
        *(f"mov.u32 %in{i}, {value:#x};" for i, value in enumerate(inputs)),
        assembly,
        *(f"st.global.u32 [%to+{4 * i}], %out{i};" for i in range(outputs)),
        "ret;\n}\n",
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "folded.ptx", Path(folder) / "folded.cubin"
        source.write_text("\n".join(lines))
        subprocess.run(
            [_tool("ptxas"), f"-arch=sm_{arch}", "-O3", str(source), "-o", str(target)], check=True, capture_output=True
        )
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", "-hex", str(target)], capture_output=True, text=True, check=True
        ).stdout
    held, results = {"RZ": 0}, {}
    for line in text.splitlines():
        if store := re.search(r"STG\.E desc\[\S+\[R\d+\.64(?:\+0x(\w+))?\], (R\w+)", line):
            results[int(store[1] or "0", 16) // 4] = held.get(store[2])
        elif moved := re.search(r"/\s+(?:MOV|IMAD\.MOV\.U32|HFMA2\.MMA|HFMA2) (R\d+),.*/\* 0x(\w{16}) \*/", line):
            held[moved[1]] = int(moved[2], 16) >> 32  # the immediate's place in every instruction that has one
        elif written := re.search(r"/\s+\w\S* (R\d+),", line):
            held.pop(written[1], None)
    found = [results.get(i) for i in range(outputs)]
    if None in found:
        raise RuntimeError(f"ptxas did not compute {assembly!r} of {inputs}:\n{text}")
    return [value for value in found if value is not None]


def _count(names) -> Counts:
    counts = Counter(name for name in names if name not in _NOTHING)
    units: Counter[str] = Counter()
    for name, times in counts.items():
        unit, weight = _unit(name)
        units["issue"] += times
        if unit:
            units[unit] += times * weight
    return Counts(dict(units), dict(counts.most_common()))


def _unit(name: str) -> tuple[str | None, int]:
    """The unit that executes an instruction and how many times it is counted there; None where that bounds nothing of ours (branches,
    barriers, the uniform datapath, tensor cores)."""
    first = name.split(".")[0]
    if first == "IMAD":
        return "imad", 2 if name.startswith("IMAD.HI") else 1
    if first in _ALU:
        return "alu", 1
    if first in _FLOAT:
        return "float", 1
    if first in _SPECIAL:
        return "special", 1
    if first in _MEMORY:
        bits = (
            512
            if first in ("LDSM", "STSM") and name.endswith(".4")
            else int((re.findall(r"\.(64|128)\b", name) or ["32"])[-1])
        )
        return "memory", 4 if first in ("LDSM", "STSM") and bits == 512 else bits // 32
    return None, 0
