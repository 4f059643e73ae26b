"""What only the machine code shows: ``python -m tests.support.machine_code tests/support/machine_code/planted.py``."""

import ctypes
from pathlib import Path

import pytest
import torch
import triton

from tests.support.cuda_emulator import build as emulator
from tests.support.machine_code import binaries
from tests.support.machine_code.launch import ORDERS, Order, executed
from tests.support.planted_kernels import _rounded_product_kernel
from tests.test_cuda_emulated import call


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_product_that_runs_into_the_next_step(order: Order) -> None:
    """Its first factor is in registers, which the next step writes: the result depends on when the tensor cores read them. What Triton
    3.9 makes of this kernel is the same, but ptxas gives the next step other registers."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(512, 64, generator=generator), torch.randn(512, 16, generator=generator).bfloat16()
    out = torch.zeros(64, 16)
    with executed(order):
        _rounded_product_kernel[(1,)](x, y, out, 512, K=64, R=16, num_stages=3)
    exact = x.bfloat16().double().T @ y.double()
    error = (out.double() - exact).norm() / exact.norm()
    shows = order.late and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    assert (error > 1e-5) == shows, error


def test_a_runtime_that_is_there_before(tmp_path: Path) -> None:
    """A CUDA build of torch loads the real one so that every library finds it; nvcc's launches find the house's all the same."""
    names = ("cudaLaunchKernel", "__cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGetLastError", "cudaGetDevice")
    source, runtime = tmp_path / "runtime.c", tmp_path / "runtime.so"
    source.write_text("".join(f"int {name}(void) {{ return 35; }}\n" for name in names))
    emulator.run_compiler("-x", "c", "-shared", "-fPIC", source, "-o", runtime)
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    kept = torch.full((3, 33), 0xA5, dtype=torch.uint8)
    call(binaries.build("philox", tmp_path).dropout_mask, torch.tensor([7]), 3, 33, 65536, kept)
    assert (kept == 1).all()
