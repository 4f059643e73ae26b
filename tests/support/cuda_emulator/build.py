"""csrc/cuda compiled for the CPU: launches become calls of the emulator."""

import ctypes
import faulthandler
import os
import re
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
FUNCTIONS = {
    "lora": ("lora_shrink",),
    "philox": ("dropout_mask",),
    "nf4": ("nf4_dequantize", "nf4_quantize", "nf4_nest", "nf4_linear"),
    "zeroth_order": ("zo_apply",),
    "sparse": ("sparse_delta_dvalues", "sparse_adamw"),
}
_LAUNCH = re.compile(r"(\w+(?:<[^;<>]*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)


def translated(source: str) -> str:
    """CUDA C++ without its launch syntax."""
    return _LAUNCH.sub(r"emulated::launch(\2, [&] { \1(\3); });", source)


def run_compiler(*arguments: str | Path) -> None:
    """Raises FileNotFoundError where there is no C++ compiler, RuntimeError with what it says."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def _compile(sources: list[Path], target: Path, level: int = 1, races: bool = False) -> Path:
    # A misaligned wide access or an index past an array of known size traps.
    checks = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    if races:  # the compiler calls races.cpp before each access
        checks += ["-DEMULATED_RACES", *(["-fsanitize=thread"] if target.suffix == ".o" else [])]
    flags = ["-std=c++17", f"-O{level}", "-ffp-contract=off", "-fPIC", "-w", *checks, f"-I{HERE}", f"-I{CSRC}"]
    kind = ["-c"] if target.suffix == ".o" else ["-shared"]
    run_compiler(*flags, *kind, *sources, "-o", target)
    return target


def _watcher(folder: Path) -> Path:
    """races.cpp as a library's object, once for a folder; it is not shown its own accesses."""
    target = folder / "races.o"
    if not target.exists():
        run_compiler(
            "-std=c++17", "-O1", "-fPIC", "-w", "-DEMULATED_RACES", f"-I{HERE}", "-c", HERE / "races.cpp", "-o", target
        )
    return target


def build(
    family: str, folder: Path, edit: tuple[str, str] | None = None, base: Path | None = None, races: bool = False
) -> ctypes.CDLL:
    """A library of the family's launch functions under the names of its harness.

    Args:
        edit: a text in the sources and what replaces it; the source is compiled unoptimised, since a fault shows at once and compiling
            is what takes the time. base: the folder of a build without, whose other objects are taken. races: a launch ends the process
            where what it gives depends on which thread comes first, or on shared memory that nobody wrote.

    Raises:
        RuntimeError: what the compiler says. ValueError: the text to edit is in no source.
    """
    texts = {path.stem: path.read_text() for path in sorted((CSRC / "cuda").glob(f"{family}*.cu"))}
    edited = {stem for stem, text in texts.items() if edit is not None and edit[0] in text}
    if edit is not None and not edited:
        raise ValueError(f"no source has {edit[0]!r}")
    objects = []
    for stem, text in texts.items():
        if base is not None and stem not in edited:
            objects.append(base / f"{stem}.o")
            continue
        source = folder / f"{stem}.cpp"
        text = text.replace(*edit) if edit is not None and stem in edited else text
        source.write_text(translated(text).replace('#include "../', '#include "'))
        objects.append(_compile([source], folder / f"{stem}.o", 0 if stem in edited else 1, races))
    harness = (
        base / "harness.o" if base is not None else _compile([HERE / f"{family}.cpp"], folder / "harness.o", 1, races)
    )
    library = folder / f"{family}.so"
    _compile([*objects, harness, *([_watcher(folder if base is None else base)] if races else [])], library, 1, races)
    loaded = ctypes.CDLL(str(library))
    for name in FUNCTIONS[family]:
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def fails_apart(check: Callable[[], None], *errors: type[Exception]) -> bool:
    """Whether ``check`` raises one of ``errors``, or is killed, in a process of its own: a kernel with a fault in it may write
    anywhere, which the process that runs the tests would not survive, or only until its memory is given back.

    Raises:
        RuntimeError: it ended in another way, which it has printed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            torch.set_num_threads(1)  # the threads of this pool stay behind
            check()
            status = 0
        except errors:
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 1:
        raise RuntimeError("another error than expected: see what is printed")
    return status != 0
