"""Builds the CPU's libraries with the sanitizers, and says in which environment a process runs beside them."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
_CHECKED = "-fsanitize=address,undefined"
FLAGS = f"{_CHECKED} -fsanitize-recover=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -g1"


def _runtime(name: str) -> str:
    """Path of one of the compiler's own libraries. Raises FileNotFoundError where it has none."""
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        raise FileNotFoundError(f"{compiler} has no {name}")
    return str(path.resolve())


def folder() -> Path:
    """Where what is built for these sources and this torch lies."""
    parts = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    texts = b"".join(path.read_bytes() for path in sorted(parts))
    name = hashlib.sha256(texts + f"{FLAGS}{torch.__version__}{sys.version}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"peftfast-sanitized-{name}")


def build() -> None:
    """The libraries of PEFTFAST_BUILD=cpu: eight minutes of two cores.

    Raises:
        RuntimeError: what the compiler says.
    """
    libraries, made = folder() / "libraries", folder() / "made"
    if libraries.is_dir():
        return
    variables = {"PEFTFAST_BUILD": "cpu", "CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": _CHECKED}
    places = ["--build-temp", str(folder() / "objects"), "--build-lib", str(made)]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    (made / "peftfast").rename(libraries)


def environment() -> dict[str, str]:
    """Of a process whose memory is the sanitizer's."""
    address = "detect_leaks=0:halt_on_error=0:alloc_dealloc_mismatch=0:redzone=256"
    address += ":max_malloc_fill_size=2147483647:malloc_fill_byte=255"  # NaN in every floating-point type
    return {
        **os.environ,
        # libstdc++ too, or its exceptions are not the ones that the sanitizer takes over.
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": f"{address}:log_path={folder() / 'address'}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PEFTFAST_SANITIZED": str(folder()),
    }
