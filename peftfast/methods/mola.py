"""MoLA: top-k routed LoRA experts in each layer, more of them in the higher layers of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from .adapting import Runtime, Targets
from .registry import Paper, above_zero, at_least_one, register
from .routing import BalanceRuntime, ExpertLinear, Recorded, mixture, routed, router_of


@dataclass(frozen=True)
class Options:
    """experts: how many, for equal parts of the model's depth from below. top_k: of which a token takes. r, lora_alpha: of an expert,
    scaling lora_alpha / r. balance: weight of the loss that balances them."""

    experts: tuple[int, ...] = (2, 4, 6, 8)
    top_k: int = 2
    r: int = 8
    lora_alpha: float = 16.0
    balance: float = 1e-2

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts) if isinstance(self.experts, list | tuple) else ())
        if not self.experts:
            raise ValueError("experts: expected a tuple of counts")
        for count in self.experts:
            at_least_one("experts", count)
        for name in ("top_k", "r"):
            at_least_one(name, getattr(self, name))
        if self.top_k > min(self.experts):
            raise ValueError(f"top_k: expected at most the fewest experts, {min(self.experts)}, got {self.top_k}")
        above_zero("lora_alpha", self.lora_alpha)
        if self.balance < 0:
            raise ValueError(f"balance: expected at least 0, got {self.balance!r}")


class MoLALinear(ExpertLinear, Recorded):
    """y = x Wᵀ + b + s Σ_{e of the top k} g_e B_e A_e x, g the softmax of R x over the top k; R ``[E, K]``."""

    def __init__(self, linear: nn.Linear, experts: int, options: Options) -> None:
        super().__init__(linear, experts, options.r, options.lora_alpha / options.r)
        self.top_k = options.top_k
        self.router = router_of(self, experts)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.in_features)
        probabilities, gates, chosen = routed(x, self.router, self.top_k)
        if self.recording():
            self.__dict__["record"] = (probabilities, chosen)
        return mixture(self, x, gates, chosen).reshape(*input.shape[:-1], -1)


def depths(paths: list[str]) -> dict[str, float]:
    """Path -> place in [0, 1) of its layer in the model: by the first number in the path, by order where there is none."""
    numbers = {path: re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in paths}
    if not all(numbers.values()):
        return {path: number / len(paths) for number, path in enumerate(paths)}
    found = {path: int(match[1]) for path, match in numbers.items() if match}
    return {path: number / (max(found.values()) + 1) for path, number in found.items()}


@register(
    "mola",
    paper=Paper("Higher Layers Need More LoRA Experts", "Gao et al.", 2024, "2402.08562"),
    formula="y = x W^T + b + (alpha / r) sum over the top k experts of g_e B_e A_e x; loss + w E sum_e f_e P_e",
    options=Options,
    reduces_to="lora with rows naming adapters, or one factor of all experts with gates between A and B; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="one expert a token, or weights small beside the experts: the several-adapters kernel, forward and "
    "backward; else the experts "
    "are two products of torch, which cost less there than the frozen weight twice",
    choices="f counts all k choices of a token; the loss is the mean over the layers with weight 0.01, where the authors' code adds "
    "them "
    "up. The router begins at N(0, 0.02^2), Kaiming-uniform in that code. Depth is the first number in a "
    "layer's path.",
    demo={"experts": (2, 4, 6, 8), "r": 4, "lora_alpha": 8.0},
)
def build(targets: Targets, options: Options) -> Runtime:
    places = depths(list(targets.modules))

    def make(name: str, linear: nn.Linear) -> MoLALinear:
        return MoLALinear(linear, options.experts[int(places[name] * len(options.experts))], options)

    targets.replace(make)
    layers = [layer for layer in targets.replacements.values() if isinstance(layer, Recorded)]
    return BalanceRuntime(layers, options.balance)
