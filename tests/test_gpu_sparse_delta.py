"""What of the sparse delta only a GPU can run: the CUDA library, both forms of the gradient at a training size, no synchronisation."""

import pytest
import torch

import peftfast.functional as F
from peftfast.functional import sparse_delta as layer
from peftfast.nn import SparseDeltaLinear
from peftfast.ops import native
from peftfast.ops import sparse_delta as ops
from peftfast.optim import SparseAdamW
from peftfast.reference import sparse_delta as definition
from tests.support import sparse_checks as checks
from tests.support.budget import assert_within_budget
from tests.support.lora_checks import BF16, F16, F32

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("asked", ["triton", "cuda"])
def test_operators(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked == "cuda" and not native.cuda_available()[0]:
        pytest.skip(native.cuda_available()[1])
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    for case in (*checks.TELLING, *checks.random_cases(40, seed=5)):
        checks.check_dvalues(case)
        checks.check_blocks(case)
    checks.check_state_bytes()
    for data in range(3):
        for seeded in (False, True):
            checks.check_adamw(data, seeded)
            checks.check_adamw8(data, seeded)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("density", [0.001, 0.02])
def test_gradient_at_a_training_size(dtype: torch.dtype, density: float) -> None:
    """Below the crossover by gathered columns, above it by tiles."""
    n, k, rows = 1024, 2816, 2048
    dy, x = (torch.randn(rows, width, device="cuda").to(dtype) for width in (n, k))
    pattern = F.choose_support(torch.empty((), device="cuda").expand(n, k), density)
    exact = definition.sparse_delta_dvalues(dy.double(), x.double(), pattern.indices, torch.float64)
    composed = definition.sparse_delta_dvalues(dy, x, pattern.indices, F32)
    assert_within_budget("dvalues", layer.dvalues(dy, x, pattern, F32), composed, exact)
    sides = (64, 64) if dtype == F32 else (128, 128)
    tiled = ops.sparse_delta_dvalues_tiled(dy, x, pattern.indices, *pattern.tiles(*sides), *sides, F32)
    assert_within_budget("tiled", tiled, composed, exact)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_training_step_never_waits_for_the_device(tensor: bool) -> None:
    """Not where a schedule changes the rate, as a number or as a tensor, either."""
    rate = torch.tensor(1e-3, device="cuda") if tensor else 1e-3
    base = torch.nn.Linear(512, 256, device="cuda", dtype=BF16)
    made = SparseDeltaLinear.from_linear(base, density=0.01, resident=True)
    optimizer = SparseAdamW([made.delta_values], lr=rate)
    x = torch.randn(64, 512, device="cuda", dtype=BF16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        made(x).square().mean().backward()
        optimizer.step()

    step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        optimizer.param_groups[0]["lr"] *= 0.5
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made.unmerge()
    assert torch.equal(made.weight, base.weight)
