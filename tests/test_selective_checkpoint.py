"""Selective checkpointing keeps what some operators return and gives it again: nothing may have been added to it in place."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import peftfast
import peftfast.functional as F
from peftfast.nn import LoRALinear, NF4Linear, SparseDeltaLinear
from peftfast.ops import backends

from .support.lora_checks import BF16, F32

aten = torch.ops.aten
KEPT = partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default])
on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def check(
    call: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], dtype: torch.dtype = F32, rows: int = 24
) -> None:
    """Values and gradients of a checkpointed call are those of the call itself."""
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    wanted = [x, *(one for one in parameters if one.requires_grad)]
    assert len(wanted) > 1
    region = lambda x: call(x).float().square()  # noqa: E731  # its backward asks for the layer's result
    results = []
    for run in (region, region, lambda x: checkpoint(region, x, use_reentrant=False, context_fn=KEPT)):
        torch.manual_seed(2)
        y = run(x)
        results.append([y, *torch.autograd.grad(y.mean(), wanted)])
    for one, other in zip(results[1], results[2], strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max(), "a checkpointed call differs"


def patched(config: object, dtype: torch.dtype, adapters: Sequence[str] = ("default",)) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(MLP().to(dtype), config)  # type: ignore[arg-type]
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    peftfast.patch(model)
    return model


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_patched_mlp(options: dict, dtype: torch.dtype) -> None:
    model = patched(LoraConfig(r=4, target_modules=["gate", "up", "down"], init_lora_weights=False, **options), dtype)
    check(model, list(model.parameters()), dtype)


def test_two_adapters_at_once() -> None:
    config = LoraConfig(r=4, target_modules=["gate", "up", "down"], init_lora_weights=False)
    model = patched(config, F32, ("default", "other"))
    check(model, list(model.parameters()))


def test_a_patched_shira() -> None:
    model = patched(ShiraConfig(r=1, target_modules=["up", "down"], init_weights=False), F32)
    check(model, list(model.parameters()), rows=8)


@pytest.mark.parametrize("backend", ["cpu", on_triton, "reference"])
@pytest.mark.parametrize("kind", [LoRALinear, NF4Linear, SparseDeltaLinear], ids=lambda one: one.__name__)
def test_a_module(kind: type, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", backend)
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    if kind is SparseDeltaLinear:
        layer = SparseDeltaLinear.from_linear(linear, density=0.02)
        nn.init.normal_(layer.delta_values)
    else:
        base = linear if kind is LoRALinear else NF4Linear.from_linear(linear, block_size=32)
        layer = LoRALinear.from_linear(base, r=4, init_lora_weights=False)
    check(layer, list(layer.parameters()), rows=8 if kind is SparseDeltaLinear else 24)


@pytest.mark.parametrize("backend", ["cpu", on_triton, "reference"])
@pytest.mark.parametrize("rows", [False, True])
def test_several_projections(rows: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    factors = [(draw(4, 32).requires_grad_(), draw(40, 4).requires_grad_()) for _ in range(3)]
    weights = [draw(40, 32) for _ in factors]
    if rows:
        adapters = [F.Adapter(a, b, 2.0) for a, b in factors]
        named = torch.arange(24, dtype=torch.int32) % 4 - 1
        call = lambda x: F.multi_lora_linear(x, weights[0], adapters, named)  # noqa: E731
    else:
        projections = [F.Projection(w, a, b, 2.0) for w, (a, b) in zip(weights, factors, strict=True)]
        call = lambda x: torch.cat(F.lora_linears(x, projections), 1)  # noqa: E731
    check(call, [one for pair in factors for one in pair])


def test_the_modes_are_known_by_name() -> None:
    """If torch calls them otherwise, the package must learn it."""
    assert all(hasattr(checkpoints, name) for name in backends._KEEPERS)
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(backends.results_are_kept())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(call, x, use_reentrant=False, context_fn=KEPT).sum().backward()
    assert seen == [True, True] and not backends.results_are_kept()
