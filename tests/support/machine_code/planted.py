"""A fault that only the machine code shows: ``python -m tests.support.machine_code tests/support/machine_code/planted.py``."""

import pytest
import torch
import triton

from tests.support.machine_code.launch import ORDERS, Order, executed
from tests.support.planted_kernels import _rounded_product_kernel


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
