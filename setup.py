"""Build of peftfast: metadata is in pyproject.toml, the choice of compiled parts in the variable PEFTFAST_BUILD.

``none`` (the default) makes a pure Python and Triton wheel and needs no compiler; ``cpu``, ``cuda`` and ``cpu,cuda``
add the libraries globbed from csrc/. They are on libtorch's stable ABI and hold no Python, so one build serves torch
>= 2.11 and every Python; build with ``--no-build-isolation``, or the build environment fetches another torch. Any of
them also adds the module of csrc/autograd, which serves the torch and the Python of the build alone, and which all
others do without.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BACKENDS = ("cpu", "cuda")
BUILD_VARIABLE = "PEFTFAST_BUILD"
ARCHITECTURES_VARIABLE = "PEFTFAST_CUDA_ARCHITECTURES"
# sm_90a is Hopper with its architecture-specific instructions; the PTX of the last serves what comes later.
DEFAULT_ARCHITECTURES = "80;90a;100"
OLDEST_ARCHITECTURE = 80  # csrc/cuda uses its conversions of two values at once and its matrix instruction
STABLE_ABI_VERSION = "0x020b000000000000"  # torch 2.11
AUTOGRAD = "peftfast._autograd"

# Folders at the top of the repository that a wheel holds inside the package.
MOVED_FOLDERS = ("kernels", "benchmarks")
MOVED_SUFFIXES = (".py", ".json", ".csv", ".md")

AUTOGRAD_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-DNDEBUG",
]
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    # The code states which multiply-adds are fused. No -march=native: the instruction set is chosen at run time.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-function",
    "-Wno-unused-parameter",  # torch's stable headers
    "-Wno-uninitialized",  # GCC 12 reports its own AVX-512 headers
    "-Wno-maybe-uninitialized",
]


def requested_backends() -> list[str]:
    """The compiled parts asked for. Raises ValueError for an unknown name."""
    text = os.environ.get(BUILD_VARIABLE, "none").strip() or "none"
    if text == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{BUILD_VARIABLE}: expected none, cpu, cuda or cpu,cuda, got {text!r}")
    return names


def glob_sources(backend: str) -> list[str]:
    suffix = "cpp" if backend == "cpu" else "cu"
    sources = [*(ROOT / "csrc" / backend).glob(f"*.{suffix}"), *(ROOT / "csrc" / "bind").glob(f"*_{backend}.cpp")]
    return sorted(str(source.relative_to(ROOT)) for source in sources)


def extensions() -> list[Extension]:
    depends = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    backends = requested_backends()
    libraries = [
        Extension(f"peftfast._{backend}", glob_sources(backend), depends=depends, py_limited_api=True)
        for backend in backends
    ]
    if backends:
        sources = sorted(str(source.relative_to(ROOT)) for source in (ROOT / "csrc" / "autograd").glob("*.cpp"))
        # Where it does not build, for want of Python's headers or under a torch of another interface, the rest is as it was.
        libraries.append(Extension(AUTOGRAD, sources, depends=depends, optional=True))
    return libraries


def find_nvcc(cuda_home: str | None) -> str:
    """Path of nvcc. Raises RuntimeError where torch or the machine has no CUDA."""
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(
            f"{BUILD_VARIABLE}=cuda: torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        )
    candidate = Path(cuda_home, "bin", "nvcc") if cuda_home else None
    nvcc = str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError(f"{BUILD_VARIABLE}=cuda: nvcc was found neither under CUDA_HOME nor on PATH")
    return nvcc


def find_toolkit(nvcc: str) -> Path:
    """The toolkit's folder as nvcc itself reports it: what is on PATH may be a script that runs another."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parents[1]


def job_count() -> int:
    """How many compilers run at once: MAX_JOBS, as torch's own extensions take it, or the number of cores. One takes 0.3 GB."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if text and not (text.isdigit() and int(text) > 0):
        raise ValueError(f"MAX_JOBS: expected a whole number of at least 1, got {text!r}")
    return int(text) if text else os.cpu_count() or 1


def architectures() -> list[str]:
    """Those of the variable, or the default where it is empty. Raises ValueError for what names no architecture."""
    text = os.environ.get(ARCHITECTURES_VARIABLE, "").strip() or DEFAULT_ARCHITECTURES
    names = [name.strip() for name in text.split(";")]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise ValueError(f"{ARCHITECTURES_VARIABLE}: expected such as {DEFAULT_ARCHITECTURES}, got {text!r}")
        if int(name.rstrip("af")) < OLDEST_ARCHITECTURE:
            raise ValueError(
                f"{ARCHITECTURES_VARIABLE}: expected {OLDEST_ARCHITECTURE} or newer, got {name!r} in {text!r}"
            )
    return names


def architecture_flags() -> list[str]:
    names = architectures()
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class BuildLibraries(build_ext):
    """Compiles the libraries with the include paths of the torch that is installed."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # torch loads the libraries; there is no PyInit

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        torch_library = str(Path(torch.__file__).parent / "lib")
        ext.include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
        if ext.name == AUTOGRAD:
            self._set_up_autograd(ext, torch_library)
            super().build_extension(ext)
            return
        ext.define_macros = [("TORCH_TARGET_VERSION", STABLE_ABI_VERSION)]
        ext.library_dirs = [torch_library]
        ext.extra_compile_args = list(CPU_FLAGS)
        ext.language = "c++"
        if ext.name.endswith("_cuda"):
            self._add_cuda_objects(ext, cpp_extension.CUDA_HOME)
        else:
            ext.libraries = ["torch_cpu", "c10"]
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        name = super().get_ext_filename(fullname)
        if not fullname.endswith("_autograd"):
            return name
        import torch

        return name.replace("_autograd.", f"_autograd.torch-{torch.__version__}.", 1)

    def _set_up_autograd(self, ext: Extension, torch_library: str) -> None:
        """A Python module on torch's whole C++ interface. Its files take most of their time in torch's headers: side by side."""
        ext.library_dirs = [torch_library]
        ext.libraries = ["torch_cpu", "torch_python", "c10"]
        ext.language = "c++"
        flags = [*AUTOGRAD_FLAGS, *(f"-isystem{path}" for path in ext.include_dirs[1:])]
        flags += [f"-I{ext.include_dirs[0]}", f"-I{sysconfig.get_path('include')}"]
        folder = Path(self.build_temp, "autograd")
        folder.mkdir(parents=True, exist_ok=True)
        targets = [str(folder / f"{Path(source).stem}.o") for source in ext.sources]
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", os.environ.get("CFLAGS", "")))

        def compile_one(source: str, target: str) -> None:
            subprocess.run([*compiler, *flags, *extra, "-c", source, "-o", target], check=True)

        try:
            with ThreadPoolExecutor(job_count()) as pool:
                list(pool.map(compile_one, ext.sources, targets))
        except (OSError, subprocess.CalledProcessError) as error:
            for folder in (self.build_lib, ROOT):  # what an earlier build left is not for these sources
                Path(folder, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            raise CompileError(str(error)) from error  # setuptools' own, which leaves an optional extension out
        ext.extra_objects = targets
        ext.depends = [*ext.depends, *ext.sources]  # or setuptools would not link anew what is only an object by then
        ext.sources = []

    def _add_cuda_objects(self, ext: Extension, cuda_home: str | None) -> None:
        nvcc = find_nvcc(cuda_home)
        toolkit = find_toolkit(nvcc)
        # The library says it again when it is asked whether it runs on a GPU.
        ext.define_macros += [("USE_CUDA", None), (ARCHITECTURES_VARIABLE, f'"{";".join(architectures())}"')]
        ext.include_dirs.append(str(toolkit / "include"))
        ext.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
        ext.libraries = ["torch_cpu", "torch_cuda", "c10", "cudart"]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        sources = [source for source in ext.sources if source.endswith(".cu")]
        targets = [str(folder / f"{Path(source).stem}.cuda.o") for source in sources]
        jobs = job_count()
        # Files side by side, and where cores are left the architectures of a file too: one file takes half of all the time.
        flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
        flags += ["--threads", str(max(1, jobs // len(sources)))]

        def compile_one(source: str, target: str) -> None:
            subprocess.run([nvcc, *flags, *architecture_flags(), "-c", source, "-o", target], check=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, sources, targets))
        ext.extra_objects += targets
        ext.depends = [*ext.depends, *sources]  # as above
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]


class BuildPython(build_py):
    """Copies the folders that lie beside the package in the repository into it."""

    def _moved_files(self) -> list[tuple[Path, Path]]:
        pairs = []
        for folder in MOVED_FOLDERS:
            for source in sorted((ROOT / folder).rglob("*")):
                if source.suffix in MOVED_SUFFIXES and "__pycache__" not in source.parts:
                    pairs.append((source, Path(self.build_lib, "peftfast", source.relative_to(ROOT))))
        return pairs

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return  # peftfast/kernels/__init__.py finds the folders in place
        for source, target in self._moved_files():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, *args: Any, **kwargs: Any) -> list[str]:
        outputs = super().get_outputs(*args, **kwargs)
        if getattr(self, "editable_mode", False):
            return outputs
        return [*outputs, *(str(target) for _, target in self._moved_files())]


def wheel_options() -> dict[str, Any]:
    """The libraries need no particular Python: tag their wheel cp311-abi3, the oldest Python that is supported."""
    return {"bdist_wheel": {"py_limited_api": "cp311"}} if requested_backends() else {}


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
    options=wheel_options(),
)
