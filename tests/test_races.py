"""What the suite sees wherever it interprets a Triton kernel: a launch whose result would depend on the order of its programs."""

import shutil

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, shift, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * step + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift, mask=mask), mask=mask)


@triton.jit
def _again_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, tl.load(y_ptr + BLOCK - 1 - offs))


@triton.jit
def _sum_kernel(x_ptr, y_ptr):
    tl.atomic_add(y_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_programs_that_share_no_byte() -> None:
    x, y = torch.arange(101.0), torch.zeros(100)
    _copy_kernel[(4,)](x, y, 100, 1, 32, BLOCK=32)
    assert torch.equal(y, x[1:])
    _copy_kernel[(4,)](x, x, 100, 0, 32, BLOCK=32)  # in place, each program its own
    _copy_kernel[(4,)](y, x, 100, 0, 32, BLOCK=32)  # another launch's bytes


def test_what_one_program_writes_and_another_reads() -> None:
    x = torch.arange(101.0)
    with pytest.raises(InterpreterError, match="writes what another program of its launch reads"):
        _copy_kernel[(4,)](x, x, 100, 1, 32, BLOCK=32)
    with pytest.raises(InterpreterError, match="reads what another program of its launch writes"):
        _copy_kernel[(4,)](x[1:], x[1:], 100, -1, 32, BLOCK=32)


def test_what_two_programs_write() -> None:
    with pytest.raises(InterpreterError, match="program 1 writes what another program of its launch writes"):
        _copy_kernel[(4,)](torch.zeros(100), torch.zeros(100), 100, 0, 31, BLOCK=32)


def test_what_a_program_reads_after_it_wrote_it() -> None:
    """Thread 0 reads what thread 31 wrote: only a barrier makes it wait."""
    x = torch.arange(32.0)
    _again_kernel[(1,)](x, torch.zeros(32), BLOCK=32, BARRIER=True)
    assert torch.equal(x, torch.arange(31.0, -1, -1))
    with pytest.raises(InterpreterError, match="program 0 reads what it wrote itself, without a barrier"):
        _again_kernel[(1,)](x, torch.zeros(32), BLOCK=32, BARRIER=False)


def test_atomics() -> None:
    with pytest.raises(InterpreterError, match="which program comes first is not known"):
        _sum_kernel[(4,)](torch.zeros(4), torch.zeros(1))
