"""Cubins without a GPU: what a launcher would launch, compiled for a given architecture, and what the binary shows.

Run as a program it reads lists of requests, each a line of JSON, from standard input and answers each by a line with its findings. It
is a program because kernels that were decorated under TRITON_INTERPRET cannot be compiled: :func:`run_gate` starts it with that
variable removed, whatever the test process has set. It serves one call after the other, since its imports take two seconds, and ends
when none has come for a minute.

The launchers themselves are called, on meta tensors, and the launch that they make is caught and specialised by
triton's own code (pointers and integers divisible by 16, integers equal to 1, None). What is examined is therefore
what a GPU would run.
"""

import atexit
import json
import math
import os
import re
import select
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.sass import PARAMETERS, Code, parameters, read_cubin

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds that the program waits for a call
# Shared memory that one block can ask for: CUDA programming guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@dataclass
class Finding:
    """What one binary shows.

    Attributes:
        stack: bytes of local memory a thread; a spilled register is there.
        shared: bytes of shared memory a block.
        matrix: the tensor core instructions in it.
        philox_calls: Philox4x32-10 calls that a thread makes in straight-line code, by their twenty 32 x 32 -> 64 bit
            products.
        streams: kernel argument -> "load" or "store" -> bytes an access -> how many such instructions.
        bulk: "load" or "store" -> how many instructions hand a tile to the copy engine.
        waits: how many wgmma each of its waits leaves in flight, in the order of the code.
        in_registers: how many wgmma read their first factor from registers.
        warps: of a program. constants: the launch's constexpr integers. stages: of its loops. programs: how many are launched.
        parameters: where each argument begins among the compiled kernel's parameters, in bytes.
        narrow_products: of a stride and a number, in 32 bits: past 2**31 elements they are addresses of something else.
        code: its machine instructions, where the request asked for them by "code".
    """

    label: str
    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    matrix: list[str]
    philox_calls: int
    streams: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    bulk: dict[str, int] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    in_registers: int = 0
    warps: int = 0
    constants: dict[str, int] = field(default_factory=dict)
    stages: int = 0
    programs: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    narrow_products: list[str] = field(default_factory=list)
    code: Code | None = None

    def faults(self, wide: tuple[str, ...] = (), matrix: bool = False) -> list[str]:
        """What is wrong with the binary; ``wide`` names the arguments whose every access must be of 16 bytes."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of local memory a thread: registers are spilled")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.arch]}")
        found += [f"a product with a stride in 32 bits: {one}" for one in self.narrow_products]
        if self.in_registers and any(self.waits):
            found.append("a wgmma is in flight while the registers of its first factor are written")
        if matrix and MATRIX_INSTRUCTION[self.arch] not in self.matrix:
            found.append(f"no {MATRIX_INSTRUCTION[self.arch]}")
        for argument in wide:
            accesses = self.streams.get(argument)
            if not accesses:
                found.append(f"{argument}: never accessed")
            for direction, widths in (accesses or {}).items():
                if set(widths) != {"16"}:
                    found.append(f"{argument}: {direction}s of {', '.join(sorted(widths))} bytes, expected 16")
        return [f"{self.label} on sm_{self.arch}, {self.kernel}: {one}" for one in found]


def run_gate(requests: list[dict[str, Any]]) -> list[Finding]:
    """Findings for requests, in order; a request that launches several kernels gives several.

    A request has "launcher" (a function of LAUNCHERS or PLANTED below), "arch" and the launcher's own arguments. With "front" it is
    only taken to Triton's first representation, a tenth of the time: whether the compiler takes the kernel with these arguments at all.
    With "code", the name of a kernel, its binary is disassembled too, which takes as long as a compilation.
    """
    left_out = ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    answer = json.loads(_answer(json.dumps(requests), environment))
    if isinstance(answer, str):
        raise RuntimeError(f"the compile gate failed:\n{answer[-4000:]}")
    findings = [Finding(**finding) for finding in answer]
    for finding in findings:
        if isinstance(finding.code, dict):
            finding.code = Code.of(finding.code)
    return findings


class _Program:
    """This file as a program, with what it says besides its answers in a file."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.said = environment, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )
        atexit.register(self.end)

    def answer(self, line: str) -> str:
        """Nothing where it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self.process.stdout.readline()

    def end(self) -> str:
        """What it has said."""
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        self.said.seek(0)
        return self.said.read()


_program: _Program | None = None


def _answer(line: str, environment: dict[str, str]) -> str:
    global _program
    if _program is not None and (_program.environment != environment or _program.process.poll() is not None):
        _program.end()
        _program = None
    begun = _program is None
    _program = _program or _Program(environment)
    answer = _program.answer(line)
    if not answer:
        said, _program = _program.end(), None
        if begun:
            raise RuntimeError(f"the compile gate failed:\n{said[-4000:]}")
        return _answer(line, environment)  # it had just ended, or the calls before this one are to blame
    return answer


@contextmanager
def caught_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any], int]]]:
    """Launches are recorded, as (kernel, arguments, keyword arguments, programs), instead of made."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], int]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs, math.prod(grid)))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    programs: int,
    arch: int,
    label: str,
    front: bool = False,
    code: str = "",
) -> Finding:
    """Compile one caught launch for sm_<arch> and read the binary; with ``front`` only into the first representation, the kernel that
    is called ``code`` down to the machine instructions."""
    import triton

    source, target, backend, options, _ = specialised(kernel, args, kwargs, arch)
    signature = source.signature
    if front:
        _first_representation(source, target, backend, options)
        return Finding(label, kernel.fn.__name__, arch, 0, 0, 0, [], 0)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    ptx = compiled.asm["ptx"]
    registers, stack = _resource_usage(compiled.asm["cubin"])
    arguments = [name for name, kind in signature.items() if kind != "constexpr" for _ in range(_parameters(kind))]
    pointers = {index: name for index, name in enumerate(arguments) if signature[name].startswith("*")}
    matrix = [name for name in sorted(set(MATRIX_INSTRUCTION.values())) if name in ptx]
    name = kernel.fn.__name__
    calls = len(re.findall(r"mul\.(?:hi|wide)\.u32", ptx)) // 20
    streams = access_widths(ptx, pointers)
    bulk = {
        "load": len(re.findall(r"cp\.async\.bulk\.tensor\.\S*shared\S*\.global", ptx)),
        "store": len(re.findall(r"cp\.async\.bulk\.tensor\.\S*global\.shared", ptx)),
    }
    waits = [int(left) for left in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)]
    finding = Finding(
        label, name, arch, registers, stack, compiled.metadata.shared, matrix, calls, streams, bulk, waits
    )
    finding.in_registers = len(re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, \{", ptx))
    finding.warps = compiled.metadata.num_warps
    finding.constants = {name: value for name, value in kwargs.items() if name.isupper() and isinstance(value, int)}
    finding.stages, finding.programs = compiled.metadata.num_stages, programs
    for one in parameters(ptx, arch):
        if one.number < len(arguments):
            finding.parameters.setdefault(arguments[one.number], one.begin - PARAMETERS[arch])
    finding.narrow_products = narrow_products(compiled.asm["ttir"])
    if code == name:
        (finding.code,) = read_cubin(compiled.asm["cubin"]).values()
    return finding


def specialised(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: int) -> tuple[Any, ...]:
    """What triton.compile makes a launch's binary of: the source, the target, its backend, the options; and the arguments by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    triton.runtime.driver.set_active(Driver(target))
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), target, backend, options, bound


@dataclass(frozen=True)
class Driver:
    """What kernels ask which GPU they are compiled for."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target


def _parameters(kind: str) -> int:
    """Of the compiled kernel's parameters, how many an argument becomes: a matrix's descriptor brings two sizes and two strides."""
    return 5 if kind.startswith("tensordesc") else 1


_OPERATION = re.compile(r"\s*(%\w+)(?:[:#]\d+)? = ([\w.]+) (.*?) : (.*?)(?: loc\(.*)?$")


def narrow_products(ttir: str) -> list[str]:
    """The products with an argument called a stride that Triton's own representation computes in 32 bits."""
    strides = set(re.findall(r"%\w*stride\w*(?=: i32)", ttir))
    found = []
    for result, operation, operands, kinds in filter(None, map(_operation, ttir.splitlines())):
        if strides & set(re.findall(r"%\w+", operands)) and "i64" not in kinds:
            if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
                strides.add(result)
            elif operation == "arith.muli":
                found.append(operands)
    return found


def _operation(line: str) -> tuple[str, ...] | None:
    match = _OPERATION.match(line)
    return match.groups() if match else None


def _first_representation(source: Any, target: Any, backend: Any, options: Any) -> None:
    import inspect

    from triton._C.libtriton import ir

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    rest = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    takes_target = "target" in inspect.signature(source.make_ir).parameters
    source.make_ir(*((target,) if takes_target else ()), options, *rest)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread, by cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_GLOBAL = re.compile(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bufs](\d+)\s+(.*)")
_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\]\s*,\s*\[([^\]]*)\]\s*,\s*(0x[0-9a-f]+|\d+)")


def access_widths(ptx: str, pointers: dict[int, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Accesses to global memory by kernel argument, direction and bytes.

    The address of each access is followed back to the pointer parameters that it was computed from. A value that was
    itself loaded ends the search, so that an index read from one tensor does not tie it to the next; an address that
    leads to no parameter at all was read from a table of pointers, and counts under "*" and the table's name.
    """
    loaded: dict[str, list[str]] = {}
    origin: dict[str, set[str]] = defaultdict(set)
    edges: dict[str, set[str]] = defaultdict(set)
    accesses = []
    for line in ptx.replace("\n\t ", " ").splitlines():
        line = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line.split("//")[0]).rstrip().rstrip(";")
        if match := _ASYNC.search(line):
            accesses.append(("load", int(match[2], 0), _REGISTER.findall(match[1])))
        elif match := _GLOBAL.search(line):
            address = re.search(r"\[([^\]]*)\]", match[4])
            assert address is not None
            width = int(match[2] or 1) * int(match[3]) // 8
            accesses.append(("load" if match[1] == "ld" else "store", width, _REGISTER.findall(address[1])))
            if match[1] == "ld":
                for register in _REGISTER.findall(match[4].split("[")[0]):
                    loaded[register] = _REGISTER.findall(address[1])
        elif parameter := _PARAMETER.search(line):
            if int(parameter[1]) in pointers:
                origin[_REGISTER.findall(line)[0]].add(pointers[int(parameter[1])])
        elif line.startswith(("ld.", "bar", "mbarrier")):
            continue
        elif len(registers := _REGISTER.findall(line)) > 1:
            edges[registers[0]].update(registers[1:])

    def sources(register: str) -> set[str]:
        found, seen, open_ = set(), set(), [register]
        while open_:
            one = open_.pop()
            if one not in seen:
                seen.add(one)
                found |= origin[one]
                open_.extend(edges[one])
        if not found:
            tables = [address for one in seen if one in loaded for address in loaded[one]]
            found = {f"*{name}" for address in tables for name in sources(address) if not name.startswith("*")}
        return found

    widths: dict[str, dict[str, dict[str, int]]] = {}
    for direction, width, registers in accesses:
        for argument in set().union(*map(sources, registers)):
            counts = widths.setdefault(argument, {}).setdefault(direction, {})
            counts[str(width)] = counts.get(str(width), 0) + 1
    return widths


def _launcher(name: str) -> Callable[..., Any]:
    from tests.support import launches, planted_kernels

    return getattr(launches, name, None) or getattr(planted_kernels, name)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    while select.select([sys.stdin], [], [], PATIENCE)[0] and (line := sys.stdin.readline()):
        try:
            answer: Any = [finding for request in json.loads(line) for finding in _findings(request)]
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def _findings(request: dict[str, Any]) -> list[dict[str, Any]]:
    launcher, arch = request.pop("launcher"), request.pop("arch")
    front, code = request.pop("front", False), request.pop("code", "")
    label = f"{launcher} " + " ".join(f"{name}={value}" for name, value in request.items())
    with caught_launches() as caught:
        _launcher(launcher)(**request, arch=arch)
    return [asdict(compile_launch(*launch, arch, label, front, code)) for launch in caught]


if __name__ == "__main__":
    main()
