"""What the suite sees wherever it interprets a Triton kernel: a result that would depend on the order of a launch's programs, and an
access outside of its tensors."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support import accesses

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
        _copy_kernel[(4,)](x[:100], x[1:], 100, 0, 32, BLOCK=32)


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


@pytest.mark.parametrize("n", [97, 99, 101])
def test_an_access_outside_of_the_tensors(n: int) -> None:
    """Of x the last four elements are not the launch's, of y the first, though their storages hold them."""
    x, y = torch.arange(104.0), torch.zeros(104)
    if n <= 97:
        _copy_kernel[(4,)](x[:97], y[4:], n, 0, 32, BLOCK=32)
        return
    with pytest.raises(InterpreterError, match="load of 4 bytes .* outside of the launch's tensors"):
        _copy_kernel[(4,)](x[:97], y[4:], n, 0, 32, BLOCK=32)
    with pytest.raises(InterpreterError, match="store of 4 bytes .* outside of the launch's tensors"):
        _copy_kernel[(4,)](x, y[:97], n, 0, 32, BLOCK=32)


@triton.jit
def _through_table_kernel(table_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32), bitcast=True)
    y_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < count), mask=offs < count)


def test_an_access_by_a_table_of_addresses() -> None:
    x, y = torch.arange(104.0), torch.zeros(104)
    table = torch.tensor([[x.data_ptr(), y.data_ptr()]])
    _through_table_kernel[(1,)](table, 104, BLOCK=128)
    assert torch.equal(x, y)
    # Far from all that ever was a tensor: what lies just behind x may have been one.
    astray = torch.tensor([[x.data_ptr() + 2**40, y.data_ptr()]])
    with pytest.raises(InterpreterError, match="load of 4 bytes .* outside of the launch's tensors"):
        _through_table_kernel[(1,)](astray, 104, BLOCK=128)


COUNTED = """
#include <stdint.h>
#include <unistd.h>
static int within = 0;
extern "C" uint64_t others_within() {
    const int others = within++;
    usleep(20000);
    --within;
    return others;
}
"""


def test_one_thread_at_a_time_is_told_of(tmp_path: Path) -> None:
    """What is known of memory lies in one map, and threads of a test ask its model's tensors for their addresses."""
    source = tmp_path / "counted.cpp"
    source.write_text(COUNTED)
    others_within = accesses.function(accesses.compiled(source), "others_within")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(others_within())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0, 0, 0]
