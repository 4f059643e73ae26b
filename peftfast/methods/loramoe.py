"""LoRAMoE: experts that every token weighs softly, of two kinds that a loss holds to their kinds of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapting import Targets
from .registry import Paper, above_zero, at_least_one, register
from .routing import ExpertLinear, Recorded, TaskRuntime, Tasks, router_of


@dataclass(frozen=True)
class Options:
    """experts: how many, in n_types equal groups. r, lora_alpha: of an expert, scaling lora_alpha / r. delta: how much an expert of the
    sample's type is to have more, and others less. balance: weight of the loss."""

    experts: int = 6
    n_types: int = 2
    r: int = 4
    lora_alpha: float = 32.0
    delta: float = 0.1
    balance: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("experts", "n_types", "r"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)
        if self.experts % self.n_types:
            raise ValueError(f"experts: expected a multiple of n_types = {self.n_types}, got {self.experts}")
        if not 0.0 <= self.delta <= 1.0 or self.balance < 0:
            raise ValueError(f"delta, balance: expected [0, 1] and at least 0, got {self.delta!r} and {self.balance!r}")


class LoRAMoELinear(ExpertLinear, Recorded):
    """y = x Wᵀ + b + s Σ_e g_e B_e A_e x, g = softmax(R x), R ``[E, K]``: all experts as one factor with the gates between."""

    def __init__(self, linear: nn.Linear, options: Options, current: Tasks) -> None:
        super().__init__(linear, options.experts, options.r, options.lora_alpha / options.r)
        self.types = options.n_types
        self.__dict__["current"] = current
        self.router = router_of(self, options.experts)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.in_features)
        gates = functional.linear(x.to(self.router.dtype), self.router).softmax(-1)
        if self.recording():
            importance = gates.view(input.shape[0], -1, gates.shape[1]).sum(1)
            ids = self.__dict__["current"].of(input, self.types)
            self.__dict__["record"] = (importance, ids)
        return self.expanded(self.base_layer(x), self.shrunk(x, gates)).reshape(*input.shape[:-1], -1)


def localized(importance: Tensor, ids: Tensor | None, types: int, delta: float) -> Tensor:
    """σ²(Z) / μ(Z) of Z = I ∘ Q, Q ``[samples, E]`` the summed gates, I 1 + δ where the types of expert and sample
    agree, else 1 - δ."""
    samples, experts = importance.shape
    ids = torch.zeros(samples, dtype=torch.int64, device=importance.device) if ids is None else ids
    kind = torch.arange(experts, device=importance.device) * types // experts
    agree = (ids[:, None] == kind).to(importance.dtype)
    z = importance * (1.0 - delta + 2.0 * delta * agree)
    return z.var(unbiased=False) / z.mean()


class LoRAMoERuntime(TaskRuntime):
    """balance times the mean over the layers of :func:`localized`."""

    def __init__(self, layers: list[Recorded], current: Tasks, options: Options) -> None:
        super().__init__(current)
        self.layers, self.options = layers, options

    def loss(self) -> Tensor | None:
        found = [record for layer in self.layers if (record := layer.taken()) is not None]
        if not found or not self.options.balance:
            return None
        given = self.options
        terms = [localized(importance, ids, given.n_types, given.delta) for importance, ids in found]
        return self.options.balance * torch.stack(terms).mean()


@register(
    "loramoe",
    paper=Paper(
        "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
        "Dou et al.",
        2023,
        "2312.09979",
    ),
    formula="y = x W^T + b + (alpha / r) sum_e g_e B_e A_e x, g = softmax(R x); loss + w var(Z) / mean(Z), Z = I * Q",
    options=Options,
    reduces_to="one factor of rank E r with gates between A and B",
    kind="layer",
    fused="the product on a 4-bit base; every token takes every expert, so there are no rows to name: two products of "
    "torch with the gates "
    "between them",
    choices="handle.runtime.tasks(types) says a sample's type, else all are of type 0; experts are of the types in "
    "equal groups in order. The "
    "loss is the mean over the layers with weight 0.01. The paper adapts the FFN's layers: target_modules says so. As in the paper "
    "the variance is divided by the mean, so that the loss "
    "grows with the tokens of a sample; the authors' code divides it by the square of the mean, adds the layers up and has the "
    "weight 0. The router begins at "
    "N(0, 0.02^2), Kaiming-uniform in that code.",
    demo={"experts": 6, "r": 4, "lora_alpha": 8.0},
)
def build(targets: Targets, options: Options) -> TaskRuntime:
    current = Tasks()
    targets.replace(lambda name, linear: LoRAMoELinear(linear, options, current))
    layers = [layer for layer in targets.replacements.values() if isinstance(layer, Recorded)]
    return LoRAMoERuntime(layers, current, options)
