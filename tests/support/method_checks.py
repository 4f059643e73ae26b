"""What every method of ``peftfast.adapt`` is held to: an independent formula in plain torch, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfast
from peftfast.methods.adapting import AdapterHandle
from peftfast.nn import NF4Linear

IN, HIDDEN, OUT, ROWS = 48, 64, 40, 12


class Mlp(nn.Module):
    """Two linear layers that are adapted and a head that is not, called as a transformers model is."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(IN, HIDDEN, dtype=dtype), nn.Linear(HIDDEN, OUT, bias=False, dtype=dtype)
        self.head = nn.Linear(OUT, 3, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 6)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(loss, logits)


class Output:
    def __init__(self, loss: Tensor | None, logits: Tensor) -> None:
        self.loss: Any = loss
        self.logits = logits


def batches(count: int = 5, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(ROWS, IN, generator=generator, dtype=torch.float64).to(dtype),
            "labels": torch.randint(0, 3, (ROWS,), generator=generator),
        }
        for _ in range(count)
    ]


def adapted(
    name: str, *, dtype: torch.dtype = torch.float64, four_bit: bool = False, data: int = 0, **options: Any
) -> AdapterHandle:
    """A method on ``up`` and ``down`` of the small model; torch's seed is set before."""
    model = Mlp(dtype)
    if four_bit:
        model.up, model.down = NF4Linear.from_linear(model.up), NF4Linear.from_linear(model.down)
    torch.manual_seed(2)
    given = {"batches": batches(data, dtype)} if data else {}
    return peftfast.adapt(model, name, target_modules=["up", "down"], **given, **options)


def trained(handle: AdapterHandle) -> dict[str, nn.Parameter]:
    return {name: p for name, p in handle.model.named_parameters() if p.requires_grad}


def stir(handle: AdapterHandle, size: float = 0.05) -> None:
    """Away from the initial values, where a gradient may be zero or a term vanish."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(handle).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter))


class PlainLinear(nn.Module):
    """x W'ᵀ + b where ``weight_of`` composes W' in plain torch from the layer's trained and fixed tensors."""

    def __init__(self, layer: Any, base: Tensor, weight_of: Callable[[Any, Tensor, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.layer = [layer]
        self.weight_of = weight_of
        self.register_buffer("base", base.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        own = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self.names = list(own)
        self.values = nn.ParameterList([p.detach().clone() for p in own.values()])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_of(self.layer[0], self.base, dict(zip(self.names, self.values, strict=True)))
        return nn.functional.linear(x, weight, self.bias)


def plain_model(handle: AdapterHandle, weight_of: Callable[..., Tensor], bases: dict[str, Tensor] | None = None) -> Mlp:
    """The same model with each adapter layer as its formula: ``weight_of(layer, W, trained)`` -> W' ``[N, K]``; it may read the layer's
    fixed tensors, and takes the trained ones from the dictionary only. ``bases``: W by layer, the model's own if not given."""
    original = Mlp(handle.model.head.weight.dtype)
    for name, layer in handle.layers.items():
        base = bases[name] if bases else original.get_submodule(name).weight
        setattr(original, name, PlainLinear(layer, base, weight_of))
    original.head.requires_grad_(False)
    return original


def check_layer_method(
    name: str,
    weight_of: Callable[..., Tensor],
    *,
    count: int,
    exact: bool = True,
    penalty: Callable[[Mlp], Tensor] | None = None,
    data: int = 0,
    tmp_path: Path,
    stirred: float = 0.05,
    tolerance: float = 1e-9,
    **options: Any,
) -> AdapterHandle:
    """Everything at once, in float64: step 0, outputs, gradients, the weights after five AdamW steps, parameter count, merging, files.

    Args:
        weight_of: the paper's W' of a layer in plain torch, see :func:`plain_model`.
        count: trained numbers as the paper counts them, for layers [64, 48] and [40, 64].
        exact: whether step 0 computes what the base computes.
        penalty: of the plain model, what ``handle.loss()`` is to be.
    """
    handle = adapted(name, data=data, **options)
    assert list(handle.layers) == ["up", "down"], handle.skipped
    assert handle.trainable == count, (handle.trainable, count)
    assert not any(p.requires_grad for p in handle.model.head.parameters())
    first = batches(1)[0]
    if exact:
        torch.testing.assert_close(handle.model(**first).logits, Mlp()(**first).logits, rtol=0, atol=1e-10)
    stir(handle, stirred)
    plain = plain_model(handle, weight_of)
    check_steps(handle, plain, penalty, tolerance)
    moved = max(
        float((p.detach() - q.detach()).abs().max())
        for p, q in zip(trained(handle).values(), trained(adapted(name, data=data, **options)).values(), strict=True)
    )
    assert moved > 0.01, "nothing was trained"
    check_merging(handle)
    check_files(handle, tmp_path)
    return handle


def check_steps(
    handle: AdapterHandle, plain: nn.Module, penalty: Callable[[Any], Tensor] | None, tolerance: float, steps: int = 5
) -> None:
    """Outputs, gradients and weights of both models over ``steps`` AdamW steps."""
    values = [p for p in plain.parameters() if p.requires_grad]
    own = [p for p in handle.model.parameters() if p.requires_grad]
    assert [p.shape for p in values] == [p.shape for p in own]
    optimisers = torch.optim.AdamW(own, lr=0.02), torch.optim.AdamW(values, lr=0.02)
    for batch in batches(steps, handle.model.head.weight.dtype):
        fused, formula = handle.model(**batch), plain(**batch)
        torch.testing.assert_close(fused.logits, formula.logits, rtol=tolerance, atol=tolerance)
        (fused.loss + handle.loss()).backward()
        (formula.loss + (0.0 if penalty is None else penalty(plain))).backward()
        for one, other in zip(own, values, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for one, other in zip(own, values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e3 * tolerance, atol=1e3 * tolerance)


def check_merging(handle: AdapterHandle) -> None:
    """merge computes the same as the adapter, and unmerge gives the very weights back."""
    batch = batches(1, next(handle.model.head.parameters()).dtype)[0]
    handle.model.eval()
    before = handle.model(**batch).logits.detach()
    weights = {name: layer.weight.detach().clone() for name, layer in handle.layers.items()}
    handle.merge()
    torch.testing.assert_close(handle.model(**batch).logits, before, rtol=1e-9, atol=1e-9)
    handle.unmerge()
    for name, layer in handle.layers.items():
        assert torch.equal(layer.weight, weights[name])
    assert torch.equal(handle.model(**batch).logits, before)
    handle.model.train()


def check_files(handle: AdapterHandle, folder: Path, *, four_bit: bool = False, tolerance: float = 1e-9) -> nn.Module:
    """Saved and read into a fresh base, the model computes the same."""
    peftfast.save_adapter(handle.model, folder)
    dtype = next(handle.model.head.parameters()).dtype
    fresh = Mlp(dtype)
    if four_bit:
        fresh.up, fresh.down = NF4Linear.from_linear(fresh.up), NF4Linear.from_linear(fresh.down)
    loaded = peftfast.load_adapter(fresh, folder).eval()
    batch = batches(1, dtype)[0]
    expected = copy.copy(handle.model).eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=tolerance, atol=tolerance)
    handle.model.train()
    return loaded


def decoded(layer: Any) -> Tensor:
    """The dense weight of a 4-bit adapter layer."""
    return peftfast.functional.nf4_dequantize(getattr(layer, "base_layer", layer).nf4)


def check_four_bit(
    name: str, folder: Path, weight_of: Callable[..., Tensor], *, tolerance: float = 2e-5, **options: Any
) -> AdapterHandle:
    """On an NF4 base, float32: the formula on the decoded weight, files, and training that moves the loss."""
    handle = adapted(name, dtype=torch.float32, four_bit=True, **options)
    stir(handle)
    bases = {name: decoded(layer) for name, layer in handle.layers.items()}
    plain = plain_model(handle, weight_of, bases)
    check_steps(handle, plain, None, tolerance, steps=2)
    check_files(handle, folder, four_bit=True, tolerance=1e-5)
    return handle
