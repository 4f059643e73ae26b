"""CUDA sources compiled by nvcc for every architecture that we serve, and what ptxas says of each kernel; no GPU is
needed."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .sass import Code, read_cubin

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one architecture, as ptxas -v reports it; ``shared`` is what it declares itself, in bytes a block."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0

    def faults(self) -> list[str]:
        """What is wrong with it."""
        if self.spill_stores or self.spill_loads or self.stack:
            spills = f"{self.spill_stores} bytes of spill stores, {self.spill_loads} of spill loads"
            return [f"{self.name} on {self.arch}: {spills}, {self.stack} of stack"]
        return []


def nvcc_path() -> str | None:
    return shutil.which("nvcc")


_FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}")  # setup.py's


def run_nvcc(source: Path, *arguments: str | Path) -> str:
    """What nvcc and ptxas say of a source that compiles; a RuntimeError carries nvcc's message where it does not."""
    nvcc = nvcc_path()
    assert nvcc is not None
    command = [nvcc, *FLAGS, "-Xptxas", "-v", *map(str, arguments), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{output[-4000:]}")
    return output


def compile_report(source: Path, object_file: Path, architectures: Iterable[str] = ARCHITECTURES) -> list[KernelReport]:
    """Each kernel on each architecture."""
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return parse(run_nvcc(source, *gencode, "-c", "-o", object_file))


@dataclass(frozen=True)
class Compiled:
    """A source of csrc/cuda for one architecture: what ptxas reports, its PTX and its machine code, and the object with the host's
    code."""

    reports: list[KernelReport]
    ptx: str
    cubin: bytes
    object: bytes


def compile_source(source: Path, arch: str = "90a") -> Compiled:
    """Device and host code."""
    with tempfile.TemporaryDirectory() as folder:
        kept = ("--keep", "--keep-dir", folder)
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        target = Path(folder) / "out.o"
        output = run_nvcc(source, gencode, *kept, "-c", "-o", target)
        ptx, cubin = (Path(folder) / f"{source.stem}.{kind}" for kind in ("ptx", "cubin"))
        return Compiled(parse(output), ptx.read_text(), cubin.read_bytes(), target.read_bytes())


@cache
def compiled(name: str, arch: str = "90a") -> Compiled:
    """Of a file of csrc/cuda, once in a process: what a test asks of a source comes from one compilation of up to half a minute."""
    return compile_source(ROOT / "csrc" / "cuda" / name, arch)


def parse(output: str) -> list[KernelReport]:
    """Reports in ptxas' output: the entry function, its properties and its registers, one after the other."""
    reports = []
    pieces = _FUNCTION.split(output)[1:]
    for name, arch, text in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True):
        properties, registers = _PROPERTIES.search(text), _REGISTERS.search(text)
        if properties is None or registers is None:
            raise RuntimeError(f"ptxas said nothing of {name} on {arch}: {text[:500]}")
        shared = _SHARED.search(text)
        numbers = (*properties.groups(), shared[1] if shared else 0)
        reports.append(KernelReport(name, arch, int(registers[1]), *map(int, numbers)))
    return reports


def kernels_of(ptx: str) -> dict[str, str]:
    """Mangled name -> text of each kernel."""
    pieces = re.split(r"\.entry (\w+)\(", ptx)[1:]
    return dict(zip(pieces[0::2], pieces[1::2], strict=True))


@cache
def machine_code(name: str, arch: str = "90a") -> dict[str, tuple[Code, KernelReport]]:
    """The machine instructions of a source of csrc/cuda and what ptxas reports, by the kernels' demangled signatures."""
    reports = {report.name: report for report in compiled(name, arch).reports}
    kernels = read_cubin(compiled(name, arch).cubin)
    shown = demangled(list(kernels))
    return {one: (code, reports[full]) for one, (full, code) in zip(shown, kernels.items(), strict=True)}


def demangled(names: list[str]) -> list[str]:
    """Kernels' signatures, without our namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"peftfast::cuda::|\(anonymous namespace\)::|peftfast::", "", one) for one in done.stdout.splitlines()
    ]
