"""What a compiled kernel asks of a multiprocessor: its machine instructions by the unit that executes them, and their cycles.

A kernel that is to run at the memory's speed must finish the instructions of a byte before the next byte comes. Which instructions
those are only the binary says: this module disassembles it, finds its loops, and counts. Rates are those of the CUDA programming
guide's table of arithmetic throughput; what that table leaves out is said where it is assumed. The result is a bound from below: it
knows neither latencies nor how well warps hide them.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
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
# Where a kernel's parameters begin in the bank of constants, in bytes.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}

_ALU = frozenset(
    "LOP LOP3 PLOP3 IADD IADD3 VIADD VIADDMNMX VIMNMX IMNMX IABS SHF SHL SHR PRMT SEL FSEL ISETP FSETP FMNMX FCHK LEA BMSK SGXT I2FP "
    "F2FP MOV CS2R P2R R2P VOTE VABSDIFF DSETP HSETP2 HSET2 HMNMX2".split()
)
_FLOAT = frozenset("FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2".split())
_SPECIAL = frozenset("MUFU F2I I2F F2F FRND POPC FLO BREV".split())
_MEMORY = frozenset("LDS STS LDSM STSM LDG STG LDGSTS SHFL ATOMS ATOMG ATOM RED LD ST LDL STL".split())
_NOTHING = frozenset(["NOP"])  # the padding behind a kernel's end

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SECOND_WORD = re.compile(r"^\s+/\* 0x(\w{16}) \*/")
_LABEL = re.compile(r"^([.$][$\w]+):")
_SECTION = re.compile(r"\.section\s+\.text\.([^\s,]+),")
_PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.([busf])(\d+)[^,()]*?_param_(\d+)(?:\[(\d+)\])?")


@dataclass
class Counts:
    """Instructions of a warp, by unit; ``names`` are all of them by opcode."""

    units: dict[str, float] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def cycles(self, warps: int, arch: int) -> dict[str, float]:
        """Cycles that each unit of a multiprocessor is taken by so many warps."""
        return {unit: self.units.get(unit, 0) * warps / rate for unit, rate in RATES[arch].items()}


@dataclass
class Instruction:
    """One instruction, with what its bits tell the scheduler (as others found them out, from Volta on).

    Attributes:
        stall: cycles until the warp's next instruction may be issued.
        done, read: the scoreboard, of six, that is released when the result is there, and when the operands were read; 7 for none.
        waits: those that must be released before, a bit each.
        target: the number of the instruction to which it may go instead of the next; a branch or a call.
        follows: whether the next one may follow.
    """

    at: int
    predicate: str
    name: str
    operands: str
    stall: int = 1
    done: int = 7
    read: int = 7
    waits: int = 0
    target: int | None = None
    follows: bool = True

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Block:
    """Instructions that run one after the other, by opcode, and the numbers of the blocks that may come next; none after an exit."""

    names: dict[str, int]
    after: list[int]


@dataclass
class Code:
    """A kernel's instructions in order, and of each label the number of the one behind it."""

    instructions: list[Instruction]
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Code":
        """The code whose ``dataclasses.asdict`` this is."""
        return cls([Instruction(**one) for one in values["instructions"]], values["labels"])

    @cached_property
    def whole(self) -> Counts:
        return _count(one.name for one in self.instructions)

    @cached_property
    def loop_ranges(self) -> list[tuple[int, int]]:
        """The numbers of the first and the last instruction of each innermost loop, in order."""
        ranges = self._all_loops
        return [one for one in sorted(ranges) if not any(_around(one, other) for other in ranges)]

    @cached_property
    def _all_loops(self) -> set[tuple[int, int]]:
        # A branch to itself is the padding that ends every kernel.
        return {
            (one.target, number)
            for number, one in enumerate(self.instructions)
            if one.opcode == "BRA" and one.target is not None and one.target < number
        }

    @cached_property
    def longest_loop(self) -> tuple[int, int] | None:
        """Of the innermost loops' ranges. Not the first: where the compiler's waits for barriers are loops too."""
        return max(self.loop_ranges, key=lambda one: one[1] - one[0], default=None)

    @cached_property
    def longest_nest(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The range of the longest innermost loop with another around it, and that one's; of equals, that with the longer outer one."""
        nests = []
        for inner in self.loop_ranges:
            outer = [one for one in self._all_loops if _around(one, inner)]
            if outer:
                nests.append((inner, min(outer, key=lambda one: one[1] - one[0])))
        return max(nests, key=lambda nest: [high - low for low, high in nest], default=None)

    def nested(self, rounds: int) -> Counts:
        """What the outer of the longest nest's loops holds, with so many rounds of the inner one."""
        assert self.longest_nest is not None
        inner, outer = ([one.name for one in self.instructions[low : high + 1]] for low, high in self.longest_nest)
        return _count(outer + inner * (rounds - 1))

    @cached_property
    def loops(self) -> list[Counts]:
        """What each innermost loop holds."""
        return [_count(one.name for one in self.instructions[low : high + 1]) for low, high in self.loop_ranges]

    @cached_property
    def blocks(self) -> list[Block]:
        """From the kernel's beginning on."""
        starts = {0} | {one.target for one in self.instructions if one.target is not None}
        for number, one in enumerate(self.instructions[:-1]):
            if not one.follows or one.target is not None or one.name == "EXIT":
                starts.add(number + 1)
        number_of = {start: i for i, start in enumerate(sorted(starts))}
        blocks: list[Block] = []
        for number, one in enumerate(self.instructions):
            if number in number_of:
                blocks.append(Block({}, []))
            names, after = blocks[-1].names, blocks[-1].after
            names[one.name] = names.get(one.name, 0) + 1
            if one.target is not None:
                after.append(number_of[one.target])
            if one.follows and number + 1 in number_of:
                after.append(number_of[number + 1])
        return blocks

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
        reached = spread([0], [block.after for block in self.blocks], warm)
        reached &= spread(exits, before, warm)
        return _count(name for number in sorted(reached) for name in _repeated(self.blocks[number].names))


def spread(start: list[int], after: list[list[int]], allowed: list[bool]) -> set[int]:
    """What can be reached from ``start``, over what is allowed."""
    found, open_ = set(), list(start)
    while open_:
        one = open_.pop()
        if allowed[one] and one not in found:
            found.add(one)
            open_.extend(after[one])
    return found


def _around(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[0] and other[1] < one[1]


def _repeated(names: dict[str, int]) -> list[str]:
    return [name for name, times in names.items() for _ in range(times)]


def read_cubin(cubin: bytes) -> dict[str, Code]:
    """The kernels of a cubin by their (mangled) names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", "-hex", file.name], capture_output=True, text=True, check=True
        ).stdout
    parts = _SECTION.split(text)
    return {name: read_listing(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def _tool(name: str) -> str:
    """One of the CUDA tools that triton brings."""
    from triton import knobs

    return str(getattr(knobs.nvidia, name).path)


def read_listing(text: str) -> Code:
    """One kernel of nvdisasm's listing; what the scheduler is told only where it was made with -hex."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.search(line):
            instructions.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4].strip()))
        elif (match := _SECOND_WORD.match(line)) and instructions:
            bits, one = int(match[1], 16) >> 41, instructions[-1]
            one.stall, one.done, one.read, one.waits = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
    for one in instructions:
        one.follows, label = _leaving(one)
        one.target = labels.get(label) if label else None
    return Code(instructions, labels)


def _leaving(one: Instruction) -> tuple[bool, str | None]:
    """Whether the next instruction may follow, and the label to which a branch or a call may go."""
    target = re.search(r"\((\.L\w+)\)", one.operands)
    # A condition may stand before the branch or among its operands.
    conditional = bool(one.predicate) or "," in one.operands or one.name.startswith("BRA.")
    if one.opcode == "BRA":
        return conditional, target[1] if target else None
    if one.opcode == "CALL":
        return True, target[1] if target else None
    return bool(one.predicate) or one.opcode not in ("EXIT", "RET"), None


@dataclass(frozen=True)
class Parameter:
    """Where a kernel's parameter lies in the bank of constants, in bytes. kind: PTX's letter, "f" for a number with a fraction; array:
    whether it is more than one number, a struct or a descriptor."""

    number: int
    begin: int
    size: int
    kind: str
    array: bool


def parameters(ptx: str, arch: int = 90) -> list[Parameter]:
    """Those of the first entry in ``ptx``, in order."""
    found, end = [], PARAMETERS[arch]
    for alignment, kind, bits, number, count in _PARAMETER.findall(ptx.partition("\n{")[0]):
        each = int(bits) // 8
        multiple = max(int(alignment or 1), each)
        begin = -(-end // multiple) * multiple
        end = begin + each * int(count or 1)
        found.append(Parameter(int(number), begin, end - begin, kind, count != ""))
    return found


def kernel_of(assembly: str, inputs: int, outputs: int, given: list[str], parameters: str = "") -> str:
    """PTX that stores what inline assembly for 32-bit registers ($0 the first output, inputs behind the outputs) computes where its
    parameter ``to`` says; ``given`` puts the inputs into %in0 and so on."""
    names = [f"%out{i}" for i in range(outputs)] + [f"%in{i}" for i in range(inputs)]
    for i in reversed(range(len(names))):
        assembly = assembly.replace(f"${i}", names[i])
    lines = [
        f".visible .entry computed(.param .u64 to{parameters}) {{",
        f".reg .b32 {', '.join(names)};\n.reg .b64 %to;\nld.param.u64 %to, [to];\ncvta.to.global.u64 %to, %to;",
        *given,
        assembly,
        *(f"st.global.u32 [%to+{4 * i}], %out{i};" for i in range(outputs)),
        "ret;\n}\n",
    ]
    return "\n".join(lines)


def assembled(ptx: str, folder: Path, arch: int = 90) -> bytes:
    """The cubin that ptxas makes of PTX without its head; the files are left in ``folder``."""
    source, target = folder / "assembled.ptx", folder / "assembled.cubin"
    source.write_text(f".version 8.0\n.target sm_{arch}\n.address_size 64\n{ptx}")
    command = [_tool("ptxas"), f"-arch=sm_{arch}", "-O3", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stdout}{done.stderr}")
    return target.read_bytes()


def folded_by_ptxas(assembly: str, inputs: list[int], outputs: int, arch: int = 90) -> list[int]:
    """What inline assembly for 32-bit registers ($0 the first output, inputs behind the outputs) makes of constants: ptxas computes it
    and its code holds the results. A RuntimeError where ptxas left the computation to the processor."""
    ptx = kernel_of(assembly, len(inputs), outputs, [f"mov.u32 %in{i}, {value:#x};" for i, value in enumerate(inputs)])
    with tempfile.TemporaryDirectory() as folder:
        assembled(ptx, Path(folder), arch)
        command = [_tool("nvdisasm"), "-c", "-hex", str(Path(folder) / "assembled.cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
        unit, weight = unit_of(name)
        units["issue"] += times
        if unit:
            units[unit] += times * weight
    return Counts(dict(units), dict(counts.most_common()))


def unit_of(name: str) -> tuple[str | None, int]:
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
