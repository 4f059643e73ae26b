"""What tests.support.sanitized finds: an access past a tensor's end, compiled or in an interpreted kernel, and sums that overflow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cuda_emulator.build import run_compiler
from tests.support.sanitized import build

pytestmark = [pytest.mark.interpreter, pytest.mark.slow]

COMPILED = """
extern "C" float last_of(const float* values, long count) { return values[count]; }
extern "C" int sum_of(int a, int b) { return a + b; }
"""
PLANTED = """
import ctypes

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@pytest.mark.parametrize("n", [13, 14])
def test_interpreted(n):
    _copy_kernel[(1,)](torch.zeros(13), torch.zeros(16), n, BLOCK=16)
    _copy_kernel[(1,)](torch.zeros(16), torch.zeros(13), n, BLOCK=16)


@pytest.mark.parametrize("n", [12, 13])
def test_compiled(n):
    values = torch.zeros(13)
    library = ctypes.CDLL(LIBRARY)
    library.last_of(ctypes.c_void_p(values.data_ptr()), ctypes.c_long(n))


@pytest.mark.parametrize("n", [1, 2**31 - 1])
def test_overflow(n):
    ctypes.CDLL(LIBRARY).sum_of(n, 1)


def test_fresh_memory():
    assert torch.empty(100_000).isnan().all() and torch.empty(100_000, dtype=torch.bfloat16).isnan().all()
"""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    try:
        environment = build.environment()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source, library, folder = tmp_path / "compiled.cpp", tmp_path / "compiled.so", tmp_path / "folder"
    source.write_text(COMPILED)
    run_compiler("-O1", "-fPIC", "-shared", *build.FLAGS.split(), source, "-o", library)
    (tmp_path / "test_planted.py").write_text(PLANTED.replace("LIBRARY", repr(str(library))))
    folder.mkdir()
    named = {name: environment[name].replace(str(build.folder()), str(folder)) for name in environment}
    paths = os.pathsep.join(filter(None, [str(build.ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "tests.support.sanitized.plugin"]
        + [str(tmp_path / "test_planted.py")],
        env={**named, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = {line.split("::")[1].split(" ")[0]: line.split(" ")[0] for line in done.stdout.splitlines() if "::" in line}
    assert said == {
        "test_interpreted[13]": "PASSED",
        "test_interpreted[14]": "FAILED",
        "test_compiled[12]": "PASSED",
        "test_compiled[13]": "FAILED",
        "test_overflow[1]": "PASSED",
        f"test_overflow[{2**31 - 1}]": "FAILED",
        "test_fresh_memory": "PASSED",
    }, done.stdout + done.stderr
    assert "outside of every allocation" in done.stdout
    assert "heap-buffer-overflow" in done.stdout and "signed integer overflow" in done.stdout
