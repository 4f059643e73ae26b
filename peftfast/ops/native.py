"""The compiled libraries: where they are, whether they load, and why not.

Each is loaded at the first question about it, once; after that an answer is a dictionary look-up. The operators of two live
in the namespaces ``torch.ops.peftfast_cpu`` and ``torch.ops.peftfast_cuda`` and write into tensors that the caller
allocates. The third is a Python module without kernels, for the torch and the Python that it was built with.
"""

import importlib.machinery
import importlib.util
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger("peftfast")

Verdict = tuple[bool, str]

ISA_VARIABLE = "PEFTFAST_CPU_ISA"
ISAS = ("auto", "avx512_bf16", "avx512", "avx2", "scalar")

AUTOGRAD_INTERFACE = 1  # as csrc/autograd/module.cpp has it: what functional/node.py and the library say to each other

_FOLDER = Path(__file__).resolve().parents[1]
_verdicts: dict[str, Verdict] = {}
_modules: dict[str, ModuleType] = {}
_lock = threading.RLock()


def cpu_available() -> Verdict:
    """Whether ``torch.ops.peftfast_cpu`` can be used, and why not.

    Raises:
        ValueError: PEFTFAST_CPU_ISA names an instruction set that is unknown or that this CPU lacks.
    """
    return _verdicts.get("cpu") or _ask("cpu")


def cuda_available() -> Verdict:
    """Whether ``torch.ops.peftfast_cuda`` can be used, and why not. The library is not touched under a torch without
    CUDA, where it cannot load."""
    return _verdicts.get("cuda") or _ask("cuda")


def autograd_available() -> Verdict:
    """Whether :func:`autograd_module` can be used, and why not: it speaks torch's C++ interface of autograd, which is no part of the
    stable ABI, so it serves the one version of torch that it was built with."""
    return _verdicts.get("autograd") or _ask("autograd")


def autograd_module() -> ModuleType:
    """``peftfast._autograd``, built from csrc/autograd.

    Raises:
        RuntimeError: it is not available.
    """
    ok, reason = autograd_available()
    if not ok:
        raise RuntimeError(f"the autograd library is not available: {reason}")
    return _modules["autograd"]


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use now: ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"scalar"``.

    Raises:
        RuntimeError: the CPU library is not available.
    """
    ok, reason = cpu_available()
    if not ok:
        raise RuntimeError(f"the CPU kernels are not available: {reason}")
    return torch.ops.peftfast_cpu.isa()


def _ask(backend: str) -> Verdict:
    with _lock:  # torch sets the process's flags of dlopen while it loads: two threads at once may leave them set
        if backend not in _verdicts:
            _verdicts[backend] = _load(backend)
        return _verdicts[backend]


def _load_autograd() -> Verdict:
    built = sorted(_FOLDER.glob("_autograd.*.so"))
    # As setup.py names it.
    own = [_FOLDER / f"_autograd.torch-{torch.__version__}{tag}" for tag in importlib.machinery.EXTENSION_SUFFIXES[:1]]
    path = next((path for path in own if path in built), None)
    if path is None:
        there = f"built for another torch or Python: {', '.join(path.name for path in built)}" if built else "not built"
        return False, f"{there} (install with PEFTFAST_BUILD=cpu)"
    try:
        spec = importlib.util.spec_from_file_location("peftfast._autograd", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        reason = f"{path.name} does not load: {error}"
        logger.warning("peftfast: %s", reason)
        return False, reason
    if module.interface != AUTOGRAD_INTERFACE:
        return False, f"{path.name} is of another version of peftfast (install with PEFTFAST_BUILD=cpu)"
    _modules["autograd"] = module
    return True, ""


def _load(backend: str) -> Verdict:
    if backend == "autograd":
        return _load_autograd()
    if backend == "cuda":
        if torch.version.cuda is None:
            return False, f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device"
    path = next(iter(sorted(_FOLDER.glob(f"_{backend}*.so"))), None)
    if path is None:
        return False, f"not built (install with PEFTFAST_BUILD={backend})"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = f"{path.name} does not load: {error}"
        logger.warning("peftfast: %s", reason)
        return False, reason
    if backend == "cpu":
        _choose_isa()
    return _serves_every_gpu(path.name) if backend == "cuda" else (True, "")


def _serves_every_gpu(name: str) -> Verdict:
    """A launch on a GPU for which the library holds no code would be an error at every call."""
    ask = getattr(torch.ops.peftfast_cuda, "architectures", None)
    if ask is None:
        return False, f"{name} is of another version of peftfast (install with PEFTFAST_BUILD=cuda)"
    architectures = ask().split(";")
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not has_code(architectures, capability):
            built = ", ".join(f"sm_{one}" for one in architectures)
            there = f"cuda:{i} is an sm_{capability[0]}{capability[1]}, {torch.cuda.get_device_name(i)}"
            return False, f"{name} is built for {built}, and {there} (install with PEFTFAST_CUDA_ARCHITECTURES)"
    return True, ""


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether what nvcc made for these, machine code of each and PTX of the last, runs on a GPU of this compute capability.

    Machine code serves its own major version from its minor one on, PTX everything later. Of an architecture with an a, such as 90a,
    both serve that one alone, and with an f its own major version.
    """
    for place, name in enumerate(architectures):
        number = int(name.rstrip("af"))
        version = (number // 10, number % 10)
        if name.endswith("a"):
            serves = version == capability
        else:
            serves = version[0] == capability[0] and version <= capability
            serves |= place == len(architectures) - 1 and not name.endswith("f") and version <= capability
        if serves:
            return True
    return False


def _choose_isa() -> None:
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return
    if name not in ISAS:
        raise ValueError(f"{ISA_VARIABLE}: expected one of {', '.join(ISAS)}, got {name!r}")
    try:
        torch.ops.peftfast_cpu.set_isa(name)
    except RuntimeError as error:
        raise ValueError(f"{ISA_VARIABLE}: {name!r} cannot be used here: this CPU does not have it") from error
