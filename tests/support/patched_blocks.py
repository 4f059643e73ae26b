"""A model of attention blocks whose ways can be disturbed, patched with and without groups, and what a step of it gives."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfast
from peftfast.functional.lora import LoRALinearFunction
from peftfast.functional.lora_group import LoRAGroupFunction
from peftfast.functional.lora_projections import LoRAProjectionsFunction
from peftfast.integrations import peft_groups
from tests.support.functions_ran import count
from tests.test_patch import K, quantised, relative, stir

GROUPED = (LoRAProjectionsFunction, LoRAGroupFunction)


class Attention(nn.Module):
    """q, k, v of x, or of x and of what it attends to; ``between`` is called with x and q before k is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, 2 * K), nn.Linear(K, 2 * K)
        self.o = nn.Linear(2 * K, K, bias=False)
        self.order = "qkv"
        self.between: Callable[[Tensor, Tensor], Any] = lambda x, q: None
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        found: dict[str, Tensor] = {}
        for i, name in enumerate(self.order):
            source = x if name == "q" or self.other is None else self.other
            found[name] = getattr(self, name)(source)
            if i == 0:
                self.between(x, found[name])
        if "k" not in found:
            return found["q"]
        k, v = found["k"], found.get("v", torch.zeros(()))
        return self.o(torch.tanh(k) * torch.sigmoid(v)) + found["q"]


class Stack(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(blocks))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def adapted(four_bit: bool = False, blocks: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    stack = Stack(blocks)
    if four_bit:
        for block in stack.blocks:
            quantised(block)
        stack.is_loaded_in_4bit = True
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q", "k", "v", "o"]} | options
    model = peft.get_peft_model(stack, peft.LoraConfig(**settings))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return stir(model).train()


def stack_of(model: nn.Module) -> Stack:
    return model.base_model.model


def attention(model: nn.Module, block: int = 0) -> Attention:
    return stack_of(model).blocks[block]


def inputs(rows: int = 33, seed: int = 5) -> Tensor:
    """More rows than those of which a 4-bit layer decodes its weight on the way (configs.nf4.FEW_ROWS), where it runs alone."""
    return torch.randn(2, rows, K, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(model: nn.Module, x: Tensor | None = None, seed: int = 7) -> dict[str, Tensor]:
    """Output and every gradient of one training step."""
    x = inputs() if x is None else x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def patched_pair(four_bit: bool = False, warm: int = 1, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal models, patched, the first with groups that its first forward has shown."""
    grouped, alone = adapted(four_bit, **options), adapted(four_bit, **options)
    peftfast.patch(grouped)
    peftfast.patch(alone, groups=False)
    for _ in range(warm):
        step(grouped)
    return grouped, alone


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        if not expected[name].any():
            assert not found[name].any(), name
            continue
        assert relative(found[name], expected[name]) < bound, name


class Counts:
    """How many times each Function ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {"alone": 0, "together": 0}
        count(monkeypatch, (LoRALinearFunction, *GROUPED), self._ran)

    def _ran(self, function: Any, ys: Any) -> None:
        self.calls["together" if isinstance(ys, tuple) and len(ys) > 1 else "alone"] += 1

    def during(self, call: Callable[[], Any]) -> tuple[int, int]:
        before = dict(self.calls)
        call()
        return self.calls["alone"] - before["alone"], self.calls["together"] - before["together"]


def waiting() -> list[Any]:
    return [one for scope in peft_groups._local.scopes for e in scope.entries.values() for one in e.results.values()]


def groups_in(model: nn.Module) -> list[Any]:
    return [
        g
        for m in model.modules()
        if peft_groups._BLOCK in m.__dict__
        for g in m.__dict__[peft_groups._BLOCK].distinct()
    ]
