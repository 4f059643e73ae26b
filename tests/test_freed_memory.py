"""A tensor whose memory was freed, as FSDP and offloading do between its uses, is an error and no read of what is there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfast.kernels import launch as launches
from peftfast.ops import native, replay
from tests.support.forked import forking

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own, which a read of freed memory ends.
EVERY_OPERATOR = """
import torch
from peftfast import ops
from peftfast.cli import checks
from peftfast.ops.dispatch import Operator

modules = [one for one in vars(ops).values() if isinstance(one, type(ops))]
operators = {one.name: one for module in modules for one in vars(module).values() if isinstance(one, Operator)}
PYTHON = {("nf4_quantize", (2,))}  # torch's operators read these before a kernel does
UNREAD = {("sparse_delta_dequantize", (10,))}

def freed(tensor, offset):
    whole = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    one = whole[offset : offset + tensor.numel()].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return one

def places(arguments, path=()):
    for i, one in enumerate(arguments):
        if isinstance(one, torch.Tensor) and one.numel():
            yield (*path, i)
        elif isinstance(one, list):
            yield from places(one, (*path, i))

def changed(arguments, path, change):
    first, *rest = path
    return [one if i != first else changed(one, rest, change) if rest else change(one) for i, one in enumerate(arguments)]

asked = 0
for name, cases in checks.cases("cpu").items():
    operator, arguments = operators[name], checks.arguments_on(cases[0], "cpu")
    if operator.select(*arguments).backend != "cpu":
        continue
    for path in places(arguments):
        for offset in (0, 3):
            if (name, path) in PYTHON | UNREAD:
                continue
            given = changed(checks.arguments_on(cases[0], "cpu"), path, lambda tensor: freed(tensor, offset))
            try:
                operator.overload(*given)
            except RuntimeError as error:
                asked += "bytes of memory" in str(error)
            else:
                raise SystemExit(f"{name} took argument {path} with its memory freed")
print("asked", asked)
"""

LAYERS = """
import torch
from torch import nn
from peftfast import functional as F

def pair(n, k):
    return nn.Parameter(torch.randn(4, k)), nn.Parameter(torch.randn(n, 4))

for freed in ("x", "a", "b"):
    for when in ("forward", "backward"):
        for call in (
            lambda x, w, a, b: F.lora_linear(x, w, a, b),
            lambda x, w, a, b: F.lora_linear(x, w, a, b, dropout_p=0.5),
            lambda x, w, a, b: F.lora_linears(x, [F.Projection(w, a, b)] * 2)[0],
            lambda x, w, a, b: F.multi_lora_linear(x, w, [F.Adapter(a, b), F.Adapter(*pair(24, 32))]),
            lambda x, w, a, b: F.lora_gated_linear(x, x, w, a, b),
        ):
            w, (a, b) = torch.randn(24, 32), pair(24, 32)
            leaf = torch.randn(6, 32, requires_grad=True)
            for _ in range(3):  # the last by a recording
                call(leaf * 1, w, a, b).sum().backward()
            x = leaf * 1
            given = {"x": x, "a": a, "b": b}[freed].untyped_storage()
            try:
                if when == "forward":
                    given.resize_(0)
                y = call(x, w, a, b)
                given.resize_(0)
                y.sum().backward()
            except RuntimeError:
                continue
            raise SystemExit(f"{freed} was taken in the {when} with its memory freed")
print("asked")
"""


@pytest.mark.skipif(not native.cpu_available()[0], reason=native.cpu_available()[1])
def test_no_kernel_reads_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with forking("torch", "peftfast", "peftfast.cli.checks", environment=environment) as forked:
        status, said = forked.run(EVERY_OPERATOR, tmp_path)
        assert status == 0, said or f"ended by signal {-status}"
        assert int(said.split()[-1]) > 100
        status, said = forked.run(LAYERS, tmp_path)
        assert status == 0 and said.split()[-1] == "asked", said or f"ended by signal {-status}"


class Kernel:
    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches += 1

        return launch


@pytest.mark.parametrize("offset", [0, 3])
def test_no_launch_is_made_with_it(offset: int) -> None:
    kernel, whole = Kernel(), torch.zeros(16)
    part = whole[offset : offset + 8]
    launches.launch(kernel, (1,), part, 8, None)
    assert replay.signature([part], []) is not None
    whole.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="argument 0 of a kernel: expected 32 bytes of memory"):
        launches.launch(kernel, (1,), part, 8, None)
    launches.launch(kernel, (1,), part[:0], 8, None)  # of which nothing is read
    assert kernel.launches == 2
    assert replay.signature([part], []) is None  # no recording serves it
