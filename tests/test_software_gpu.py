"""The GPU in software serves torch, Triton's launcher, csrc/cuda and captured graphs, and refuses what a driver refuses."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.software_gpu import build

PROGRAM = """
import sys
import torch
from peftfast import functional as F
from peftfast.reference import lora as definition
from tests.support.budget import assert_within_budget
from tests.support.software_gpu import launches

torch.manual_seed(0)
x = torch.randn(20, 128, device="cuda", requires_grad=True)
a, b = (torch.randn(size, device="cuda", requires_grad=True) for size in ((4, 128), (48, 4)))
weight = F.nf4_quantize(torch.randn(48, 128, device="cuda"))
dense = F.nf4_dequantize(weight)
for _ in range(3):
    y = F.lora_linear(x, weight, a, b, scaling=2.0)
    found = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
expected = x @ (dense + 2.0 * b @ a).T
for one, other in zip((y, *found), (expected, *torch.autograd.grad(expected, (x, a, b), torch.ones_like(y)))):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
assert launches.counts["_lora_shrink_kernel"] == 3, launches.counts

half = [one.detach().bfloat16() for one in (x, dense, a, b)]
seed = torch.tensor([11], device="cuda")
masked = F.lora_linear(*half, scaling=2.0, dropout_p=0.5, seed=seed)
on_cpu = [one.cpu() for one in half]
composed = definition.lora_linear(*on_cpu, scaling=2.0, dropout_p=0.5, seed=seed.cpu())
exact = definition.lora_linear(*(one.double() for one in on_cpu), scaling=2.0, dropout_p=0.5, seed=seed.cpu())
assert_within_budget("masked", masked.cpu(), composed, exact)

graph, held = torch.cuda.CUDAGraph(), torch.zeros(20, 128, device="cuda")
with torch.no_grad(), torch.cuda.graph(graph):
    captured = F.lora_linear(held, weight, a, b, scaling=2.0)
for scale in (1.0, 3.0):
    held.copy_(x.detach() * scale)
    graph.replay()
    torch.testing.assert_close(captured, expected.detach() * scale, rtol=1e-4, atol=1e-3 * scale)

for rows in (3, 20):  # csrc/cuda, with shared memory that a launch asks for, in blocks of 16 warps and of 12
    few, kept = half[0][:rows].clone(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(kept):
        captured = F.lora_linear(few, weight, *half[2:], scaling=2.0)
    for scale in (1.0, 2.0):
        few.copy_(half[0][:rows] * scale)
        kept.replay()
        on_cpu = [one.cpu() for one in (few, F.nf4_dequantize(weight, dtype=few.dtype), *half[2:])]
        exact = definition.lora_linear(*(one.double() for one in on_cpu), scaling=2.0)
        assert_within_budget(f"{rows} rows", captured.cpu(), definition.lora_linear(*on_cpu, scaling=2.0), exact)

torch.cuda.set_sync_debug_mode("error")
try:
    x.sum().item()
except RuntimeError as error:
    assert "synchroniz" in str(error)
else:
    sys.exit("a wait was not seen")
torch.cuda.set_sync_debug_mode("default")

refused = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(refused):
        x.detach().sum().item()
except RuntimeError as error:
    assert "while a graph is captured" in str(error), error
else:
    sys.exit("a wait was captured")

try:
    held.normal_(generator=torch.Generator())
except RuntimeError as error:
    assert "'cuda' device type for generator" in str(error), error
else:
    sys.exit("a GPU drew by a generator of the CPU")

joined = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(joined):
        torch.cuda.default_stream().wait_event(torch.cuda.current_stream().record_event())
except RuntimeError as error:
    assert "906" in str(error), error
else:
    sys.exit("the default stream joined a capture")

import triton
import triton.language as tl

@triton.jit
def beyond(pointer, OFFSET: tl.constexpr):
    tl.store(pointer + OFFSET + tl.arange(0, 16), 1.0)

beyond[(1,)](held, OFFSET=0)
assert held.flatten()[:16].eq(1).all()
try:
    beyond[(1,)](held, OFFSET=2**28)
except RuntimeError as error:
    assert "719" in str(error), error
else:
    sys.exit("a store beyond the device's memory was made")
print("all of it")
"""


def test_headers_that_are_a_part_are_passed_over(tmp_path, monkeypatch) -> None:
    """As NVIDIA's packages have them beside a torch from PyPI, where no toolkit is installed."""
    (tmp_path / "include").mkdir()
    for name in ("cuda.h", "cuda_runtime.h"):
        (tmp_path / "include" / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="not all of them: set CUDA_HOME"):
        build._headers()
    (tmp_path / "include" / "crt").mkdir()
    (tmp_path / "include" / "crt" / "host_config.h").touch()
    assert build._headers() == tmp_path / "include"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_layer_runs_and_what_a_driver_refuses_is_refused(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    try:
        environment = build.environment()
    except FileNotFoundError as error:  # what does not compile fails
        pytest.skip(str(error))
    environment = {name: value for name, value in environment.items() if not name.startswith("PEFTFAST_")}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all of it" in done.stdout, done.stderr[-4000:]
