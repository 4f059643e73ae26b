"""Builds the libraries of the software GPU and says in which environment a process finds them."""

import hashlib
import os
import sysconfig
import tempfile
from pathlib import Path

import torch

from tests.support.cuda_emulator import build as emulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CUDA_LIBRARY = "peftfast_cuda_emulated.so"
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py has it


def _headers() -> Path:
    """CUDA's own headers: the toolkit's, or those of NVIDIA's packages, which torch brings without what a compiler includes first."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for folder in (Path(home, "include"), *sorted(packages.glob("cu*/include"))):
        if all((folder / name).is_file() for name in ("cuda.h", "cuda_runtime.h", "crt/host_config.h")):
            return folder
    raise FileNotFoundError("CUDA's headers were not found, or not all of them: set CUDA_HOME")


def _emulated(folder: Path, cuda: Path, torch_includes: list[str], torch_library: Path) -> None:
    """csrc/cuda for the CPU, a launch submitted to its stream, behind the bindings that a GPU has."""
    objects = []
    own, csrc = emulator.HERE, emulator.CSRC
    for source in sorted((csrc / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.cpp"
        # By value: a captured graph does it again when the call has long returned.
        text = emulator.translated(source.read_text()).replace("[&] {", "[=] {").replace('#include "../', '#include "')
        target.write_text(text)
        objects.append(target.with_suffix(".o"))
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w", f"-I{HERE / 'submitted'}", f"-I{own}"]
        emulator.run_compiler(*flags, f"-I{csrc}", "-c", target, "-o", objects[-1])
    for source in sorted((csrc / "bind").glob("*_cuda.cpp")):
        objects.append(folder / f"bind_{source.stem}.o")
        flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-DUSE_CUDA", _STABLE_ABI, f"-I{csrc}", *torch_includes]
        flags.append('-DPEFTFAST_CUDA_ARCHITECTURES="90a"')
        emulator.run_compiler(*flags, f"-I{cuda}", "-c", source, "-o", objects[-1])
    libraries = [f"-L{torch_library}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", f"-L{folder}", "-l:libcuda.so.1"]
    emulator.run_compiler("-shared", *objects, "-o", folder / CUDA_LIBRARY, *libraries)


def build() -> Path:
    """The folder of the libraries, made once for these sources and this torch.

    Raises:
        FileNotFoundError: no C++ compiler, or none of CUDA's headers.
        RuntimeError: no CUDA build of torch, or what the compiler says.
    """
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    parts = [*HERE.rglob("*.cpp"), *HERE.rglob("*.h"), *emulator.HERE.rglob("*.h"), *(emulator.CSRC).rglob("*.*")]
    texts = b"".join(path.read_bytes() for path in sorted(parts) if path.is_file())
    name = hashlib.sha256(texts + torch.__version__.encode() + sysconfig.get_platform().encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"peftfast-software-gpu-{name}")
    if (folder / "done").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    cuda, package = _headers(), Path(torch.__file__).parent
    includes = [f"-isystem{package / 'include'}", f"-isystem{package / 'include/torch/csrc/api/include'}"]
    includes.append(f"-I{sysconfig.get_path('include')}")
    shared = ["-O1", "-fPIC", "-shared", "-w", f"-I{cuda}"]
    driver = folder / "libcuda.so.1"
    emulator.run_compiler("-std=c++17", *shared, HERE / "runtime.cpp", "-o", driver, "-Wl,-soname,libcuda.so.1", "-ldl")
    libraries = [
        f"-L{package / 'lib'}",
        *(f"-l{one}" for one in "torch_cpu torch_cuda torch_python c10 c10_cuda".split()),
    ]
    operators = folder / f"software_gpu_operators{sysconfig.get_config_var('EXT_SUFFIX')}"
    emulator.run_compiler("-std=c++20", *shared, *includes, HERE / "operators.cpp", "-o", operators, *libraries, driver)
    _emulated(folder, cuda, includes, package / "lib")
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(driver.name)
    (folder / "done").touch()
    return folder


def environment() -> dict[str, str]:
    """Of a process, and all that it starts, which has the GPU."""
    folder = build()
    paths = [str(HERE / "boot"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SOFTWARE_GPU": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),  # what is half compiled stays apart
    }
