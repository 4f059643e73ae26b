"""Checks of methods whose layers share parameters, route, or are no weight: the formula is of a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.methods.adapting import AdapterHandle
from peftfast.nn import NF4Linear

from .method_checks import Mlp, adapted, batches, check_files, decoded, stir, trained

SHARED = "peftfast_shared."


class FormulaLinear(nn.Module):
    """The frozen W and b, and ``forward_of(layer, x, own, shared)``; own and shared hold the trained tensors by their names."""

    def __init__(self, layer: Any, base: Tensor, forward_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.adapter, self.forward_of = [layer], forward_of
        self.register_buffer("weight", base.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.own: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_of(self, x, self.own, self.shared)


def formula_model(handle: AdapterHandle, forward_of: Callable[..., Tensor]) -> tuple[Mlp, dict[str, nn.Parameter]]:
    """The small model with formulas in the place of layers, and its trained tensors by the adapted model's names."""
    values = {name: nn.Parameter(p.detach().clone()) for name, p in trained(handle).items()}
    plain = Mlp(handle.model.head.weight.dtype).requires_grad_(False)
    shared = {name.removeprefix(SHARED): p for name, p in values.items() if name.startswith(SHARED)}
    for path, layer in handle.layers.items():
        four_bit = isinstance(getattr(layer, "base_layer", None), NF4Linear)
        formula = FormulaLinear(layer, decoded(layer) if four_bit else plain.get_submodule(path).weight, forward_of)
        formula.own = {name.removeprefix(path + "."): p for name, p in values.items() if name.startswith(path + ".")}
        formula.shared = shared
        setattr(plain, path, formula)
    return plain, values


def compare_steps(
    handle: AdapterHandle,
    plain: nn.Module,
    values: dict[str, nn.Parameter],
    penalty: Callable[[Any], Tensor] | None,
    tolerance: float,
    steps: int = 5,
) -> None:
    """Outputs, gradients and weights of both models over ``steps`` AdamW steps; in float32 with a larger eps, since the first step is
    else the gradient's sign, which roundings decide where the gradient is nothing."""
    own = trained(handle)
    assert list(own) == list(values)
    eps = 1e-3 if handle.model.head.weight.dtype == torch.float32 else 1e-8
    optimisers = [torch.optim.AdamW(one, lr=0.02, eps=eps) for one in (own.values(), values.values())]
    for batch in batches(steps, handle.model.head.weight.dtype):
        fused, formula = handle.model(**batch), plain(**batch)
        torch.testing.assert_close(fused.logits, formula.logits, rtol=tolerance, atol=tolerance)
        (fused.loss + handle.loss()).backward()
        (formula.loss + (0.0 if penalty is None else penalty(plain))).backward()
        for name, one in own.items():
            other = values[name].grad
            if other is None:
                assert one.grad is None or not one.grad.any(), name
                continue
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other, rtol=10 * tolerance, atol=10 * tolerance)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for name, one in own.items():
        torch.testing.assert_close(one, values[name], rtol=1e3 * tolerance, atol=1e3 * tolerance)


def check_shared(
    name: str,
    forward_of: Callable[..., Tensor],
    *,
    count: int,
    tmp_path: Path,
    exact: bool = True,
    four_bit: bool = False,
    penalty: Callable[[Any], Tensor] | None = None,
    files: bool = True,
    prepare: Callable[[AdapterHandle], None] | None = None,
    **options: Any,
) -> AdapterHandle:
    """As ``check_layer_method``: step 0, count, outputs, gradients, the weights after five steps, and the files; merging is not."""
    dtype = torch.float32 if four_bit else torch.float64
    handle = adapted(name, dtype=dtype, four_bit=four_bit, **options)
    assert list(handle.layers) == ["up", "down"], handle.skipped
    assert handle.trainable == count, (handle.trainable, count)
    if prepare is not None:
        prepare(handle)
    if exact and not four_bit:
        first = batches(1)[0]
        torch.testing.assert_close(handle.model(**first).logits, Mlp()(**first).logits, rtol=0, atol=1e-10)
        handle.loss()
    stir(handle)
    before = [p.detach().clone() for p in trained(handle).values()]
    plain, values = formula_model(handle, forward_of)
    compare_steps(handle, plain, values, penalty, 2e-5 if four_bit else 1e-9, steps=2 if four_bit else 5)
    assert any(
        float((p - q).detach().abs().max()) > 0.01 for p, q in zip(trained(handle).values(), before, strict=True)
    )
    if files:
        check_files(handle, tmp_path, four_bit=four_bit, tolerance=1e-5 if four_bit else 1e-9)
    return handle
