"""LoRA's passes of high rank in bfloat16, which a CPU that multiplies bfloat16 leaves to torch's library."""

from typing import Any

import pytest
import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.configs import lora as configs
from peftfast.ops import lora as ops
from peftfast.ops import lora_library as library
from tests.support.budget import assert_within_budget
from tests.support.lora_checks import BF16, CHECKS, DEVICE, F32, F64, Case

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not library._multiplies_bf16(), reason="this CPU does not multiply bfloat16"
)

HIGH = dict(M=70, K=190, N=141, R=40, seeded=False, bias=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that the library served."""
    names: list[str] = []
    for name in ("shrink", "expand_", "weight_grad", "dy_grads"):
        right = getattr(library, name)

        def spy(*given: Any, name: str = name, right: Any = right) -> Any:
            names.append(name)
            return right(*given)

        monkeypatch.setattr(library, name, spy)
    return names


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("layout", ["plain", "transposed", "wide"])
def test_within_budget(name: str, adapter: torch.dtype, layout: str, seen: list[str]) -> None:
    for data in range(4):
        CHECKS[name](Case(**HIGH, dtypes=(BF16, adapter, BF16), layout=layout, data=data, scaling=0.3))
    if name in ("lora_shrink", "lora_dy_grads"):
        assert seen


def tensors(rows: int, ranks: int, dtype: torch.dtype, adapter: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + ranks)
    shapes = {(rows, 64): dtype, (ranks, 64): adapter, (96, ranks): adapter, (96, 64): dtype, (rows, 96): dtype}
    x, a, b, weight, dy = (
        (torch.randn(shape, generator=generator) / (shape[1] ** 0.5 if shape[0] != rows else 1)).to(kind)
        for shape, kind in shapes.items()
    )
    return x, weight, a, b, dy


def gradients(given: tuple[Tensor, ...], p: float, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """y, dx, da, db of a layer, or of its formula in ``dtype``."""
    x, weight, a, b, dy = given
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
    if dtype is None:
        y = F.lora_linear(leaves[0], weight, leaves[1], leaves[2], scaling=0.3, dropout_p=p, seed=5, **options)
    else:
        y = leaves[0] @ weight.to(dtype).T + 0.3 * (leaves[0] @ leaves[1].T @ leaves[2].T)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_a_layer(adapter: torch.dtype, seen: list[str]) -> None:
    """Its values within the budget, its gradients in their parameters' dtypes; what is masked and float32 sums stay with the
    kernels."""
    given = tensors(80, 48, BF16, adapter)
    actual, composed, exact = gradients(given, 0.0), gradients(given, 0.0, BF16), gradients(given, 0.0, F64)
    assert seen == ["shrink", "expand_", "dy_grads"] + ["weight_grad"] * (adapter == BF16) + ["expand_"]
    for name, *values in zip(("y", "dx", "da", "db"), actual, composed, exact, strict=True):
        assert_within_budget(name, *values)
    assert [t.dtype for t in actual] == [BF16, BF16, adapter, adapter]
    seen.clear()
    gradients(given, 0.25)
    assert seen == ["expand_", "dy_grads"]


def test_float32_gradients_are_not_rounded_to_bfloat16(seen: list[str]) -> None:
    x, _, a, b, dy = tensors(128, 40, BF16, F32)
    s = ops.lora_shrink(x, a, None, 0.0, 1.0, BF16)
    ds, db = ops.lora_dy_grads(dy, s, b, 0.5, F32)
    torch.testing.assert_close(db, 0.5 * dy.float().T @ s.float(), atol=1e-4, rtol=1e-5)
    da = ops.lora_weight_grad(ds, x, None, 0.0, 1.0, F32)
    torch.testing.assert_close(da, ds.float().T @ x.float(), atol=1e-4, rtol=1e-5)
    assert seen == ["shrink", "dy_grads"]


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"ranks": configs.LIBRARY_RANKS}, True),
        ({"ranks": configs.LIBRARY_RANKS - 1}, False),
        ({"rows": configs.LIBRARY_ROWS}, True),
        ({"rows": configs.LIBRARY_ROWS - 1}, False),
        ({"dtype": F32}, False),
        ({"dtype": torch.float16}, False),
    ],
)
def test_where_it_begins(change: dict[str, Any], served: bool, seen: list[str]) -> None:
    options = {"rows": 80, "ranks": 48, "dtype": BF16, **change}
    given = tensors(options["rows"], options["ranks"], options["dtype"], options["dtype"])
    gradients(given, 0.0)
    assert bool(seen) == served
    ok, reason = library.serves(options["rows"], options["ranks"], options["dtype"])
    assert ok == served and bool(reason) != served


def test_bias_and_dropout_stay_with_the_kernel(seen: list[str]) -> None:
    x, _, a, b, dy = tensors(80, 48, BF16, BF16)
    seed = torch.ones(1, dtype=torch.int64)
    s = ops.lora_shrink(x, a, seed, 0.1, 1.0, BF16)
    ops.lora_expand_(dy, s, b, torch.ones(96), None, 0.0, 1.0)
    ops.lora_expand_(dy, s, b, None, seed, 0.1, 1.0)
    ops.lora_weight_grad(s, x, seed, 0.1, 1.0, BF16)
    assert not seen
    ops.lora_shrink(x, a, seed, 0.0, 1.0, BF16)  # nothing is dropped
    assert seen == ["shrink"]


def test_autocast_casts_nothing(seen: list[str]) -> None:
    """The operators' dtypes are those asked for: inside autocast the library's products would be of its dtype."""
    x, _, a, b, dy = tensors(80, 48, BF16, BF16)

    def run() -> list[Tensor]:
        s = ops.lora_shrink(x, a, None, 0.0, 0.3, BF16)
        base = dy.clone()
        ops.lora_expand_(base, s, b, None, None, 0.0, 0.3)
        return [s, base, *ops.lora_dy_grads(dy, s, b, 0.3, BF16), ops.lora_weight_grad(s, x, None, 0.0, 0.3, BF16)]

    expected = run()
    with torch.autocast("cpu", torch.float16):
        found = run()
    assert [t.dtype for t in found] == [BF16] * 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_memory_that_was_never_written_is_not_read() -> None:
    """What the library multiplies by 0 is not added, were it NaN."""
    given = tensors(80, 48, BF16, BF16)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert all(t.isfinite().all() for t in gradients(given, 0.0))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("fault", ["scaling", "rows of w", "last rank"])
def test_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = library._product

    def wrong(left: Tensor, other: Tensor, scaling: float) -> Tensor:
        if fault == "scaling":
            return right(left, other, 1.0)
        if fault == "rows of w":
            return right(left, other.roll(1, 0), scaling)
        out = right(left, other, scaling)
        out[:, -1] = 0
        return out

    monkeypatch.setattr(library, "_product", wrong)
    for name in ("lora_shrink", "lora_dy_grads"):
        with pytest.raises(AssertionError):
            CHECKS[name](Case(**HIGH, dtypes=(BF16, BF16, BF16), scaling=0.3))
