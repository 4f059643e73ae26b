"""A fault that only the machine code shows: ``python -m tests.support.machine_code tests/support/machine_code/planted.py``."""

import re
import subprocess

import pytest
import torch
from triton import knobs

from tests.support.machine_code.launch import ORDERS, Order, executed
from tests.support.planted_kernels import _rounded_product_kernel


def _ptxas() -> tuple[int, ...]:
    said = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", said)[0]))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_product_that_runs_into_the_next_step(order: Order) -> None:
    """Its first factor is in registers, which the next step writes: the result depends on when the tensor cores read them. From 13.3 on
    ptxas takes other registers."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(512, 64, generator=generator), torch.randn(512, 16, generator=generator).bfloat16()
    out = torch.zeros(64, 16)
    with executed(order):
        _rounded_product_kernel[(1,)](x, y, out, 512, K=64, R=16, num_stages=3)
    exact = x.bfloat16().double().T @ y.double()
    error = (out.double() - exact).norm() / exact.norm()
    assert (error < 1e-5) == (not order.late or _ptxas() >= (13, 3)), error
