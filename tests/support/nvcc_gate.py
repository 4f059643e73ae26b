"""CUDA sources compiled by nvcc for every architecture that we serve, and what ptxas says of each kernel; no GPU is
needed."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .sass import Code, read_cubin

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one architecture, as ptxas -v reports it."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

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


def compile_report(source: Path, object_file: Path) -> list[KernelReport]:
    """Compile with the flags of setup.py; a RuntimeError carries nvcc's message."""
    nvcc = nvcc_path()
    assert nvcc is not None
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [nvcc, *flags, *gencode, "-c", str(source), "-o", str(object_file)], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{output[-4000:]}")
    return parse(output)


def parse(output: str) -> list[KernelReport]:
    """Reports in ptxas' output: the entry function, its properties and its registers, one after the other."""
    reports = []
    pieces = _FUNCTION.split(output)[1:]
    for name, arch, text in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True):
        properties, registers = _PROPERTIES.search(text), _REGISTERS.search(text)
        if properties is None or registers is None:
            raise RuntimeError(f"ptxas said nothing of {name} on {arch}: {text[:500]}")
        reports.append(KernelReport(name, arch, int(registers[1]), *map(int, properties.groups())))
    return reports


def compile_ptx(source: Path, target: Path, arch: str = "90a") -> str:
    """The PTX of a source; a RuntimeError carries nvcc's message."""
    nvcc = nvcc_path()
    assert nvcc is not None
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=compute_{arch}", "-ptx", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([nvcc, *flags, str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{(done.stdout + done.stderr)[-4000:]}")
    return target.read_text()


def kernels_of(ptx: str) -> dict[str, str]:
    """Mangled name -> text of each kernel."""
    pieces = re.split(r"\.entry (\w+)\(", ptx)[1:]
    return dict(zip(pieces[0::2], pieces[1::2], strict=True))


@cache
def machine_code(name: str, arch: str = "90a") -> dict[str, Code]:
    """The machine instructions of a source of csrc/cuda, by the kernels' demangled signatures without our namespaces."""
    nvcc, source = nvcc_path(), ROOT / "csrc" / "cuda" / name
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.cubin"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", "-cubin", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run([nvcc, *flags, str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile:\n{(done.stdout + done.stderr)[-4000:]}")
        kernels = read_cubin(target.read_bytes())
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"peftfast::cuda::|\(anonymous namespace\)::|peftfast::", "", one) for one in names]
    return dict(zip(short, kernels.values(), strict=True))
