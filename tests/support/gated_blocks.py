"""Gated MLPs and forwards that are none, a model of them under PEFT, and what a step of it gives."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import peftfast
from peftfast.functional.gated_activation import GatedActivationFunction
from peftfast.functional.lora_gated import LoRAGatedFunction
from tests.support.functions_ran import count
from tests.test_patch import quantised, relative, stir

K, N, ROWS = 64, 128, 34  # more rows than a 4-bit layer decodes its weight for


class MLP(nn.Module):
    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class UpFirst(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        return self.down(up * self.act(self.gate(hidden)))


class ByFunction(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.gate(x), approximate="tanh") * self.up(x)
        y = self.down(h)
        return y


class ByProduct(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.mul(nn.functional.silu(self.gate(x)), self.up(x)))


class Inherited(MLP):
    pass


class Branch(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return self.down(self.up(x))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Flag(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.act if self.training else torch.tanh)(self.gate(x)) * self.up(x))


class Stores(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.act(self.gate(x))
        return self.down(self.last * self.up(x))


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x) * 2.0)


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(self.up(x)))


class Thrown(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class TwoInputs(MLP):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Tanh(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Same(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.gate(x))


class NoGate(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Wrapped(MLP):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) + x


class InPlace(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h *= self.act(self.gate(x))
        return self.down(h)


class Net(nn.Module):
    """x arrives with a graph behind it, as in a model."""

    def __init__(self, kind: type = MLP, act: Any = None, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(act) for _ in range(blocks))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def adapted(
    kind: type = MLP, act: Any = None, four_bit: bool = False, targets: str = "gate up down", **options: Any
) -> Any:
    torch.manual_seed(0)
    net = Net(kind, act)
    if four_bit:
        for block in net.blocks:
            quantised(block)
        net.is_loaded_in_4bit = True
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": targets.split()} | options
    model = peft.get_peft_model(net, peft.LoraConfig(**settings))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return stir(model).train()


def block_of(model: Any, index: int = 0) -> Any:
    return model.base_model.model.blocks[index]


def inputs(seed: int = 5) -> Tensor:
    return torch.randn(2, ROWS, K, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(model: Any, x: Tensor | None = None, seed: int = 7) -> dict[str, Tensor]:
    x = inputs() if x is None else x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().mean().backward()
    after = torch.rand(1)
    return {"y": y.detach(), "x": x.grad, "after": after} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        if expected[name].any():
            assert relative(found[name], expected[name]) < bound, name
        else:
            assert not found[name].any(), name


class Counts:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tails = self.products = 0
        count(monkeypatch, (LoRAGatedFunction, GatedActivationFunction), self._ran)

    def _ran(self, function: Any, y: Any) -> None:
        self.tails += function is LoRAGatedFunction
        self.products += function is GatedActivationFunction

    def during(self, call: Callable[[], Any]) -> tuple[int, int]:
        before = self.tails, self.products
        call()
        return self.tails - before[0], self.products - before[1]


def pair(**options: Any) -> tuple[Any, Any]:
    """Two equal models, the first patched; the second with its layers patched and its MLPs stock, so that masks agree."""
    ours, theirs = adapted(**options), adapted(**options)
    peftfast.patch(ours)
    peftfast.patch(theirs, gated=False)
    return ours, theirs
