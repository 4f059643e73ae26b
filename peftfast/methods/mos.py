"""MoS: each layer's A and B put together from shards of pools that the layers of its kind share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets, Unsuitable
from .factored import FactoredLinear, Factors
from .registry import Paper, above_zero, at_least_one, register


@dataclass(frozen=True)
class Options:
    """r: rank of a layer. budget: the rank of LoRA whose count of trained numbers this has. shards: of each vector of A and B.
    private: of the r vectors, how many are a layer's own. lora_alpha: scaling is lora_alpha / r. seed: of the choice of shards."""

    r: int = 8
    budget: int = 2
    shards: int = 4
    private: int = 1
    lora_alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("r", "budget", "shards"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)
        if (
            isinstance(self.private, bool)
            or not isinstance(self.private, int)
            or not 0 <= self.private <= min(self.r, self.budget)
        ):
            raise ValueError(
                f"private: expected 0 to {min(self.r, self.budget)}, at most r and budget, got {self.private!r}"
            )


class Pools(nn.Module):
    """Shards of A ``[budget L l, K / l]`` and of B ``[budget L l, N / l]`` for the L layers of a kind; the first
    private L l are private."""

    def __init__(self, layer: FactoredLinear, layers: int, options: Options) -> None:
        super().__init__()
        count, shards = options.budget * layers * options.shards, options.shards
        self.pool_A = layer.new_parameter(count, layer.in_features // shards)
        self.pool_B = layer.new_parameter(count, layer.out_features // shards)
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(self.pool_A, -bound, bound)


class MoSLinear(FactoredLinear):
    """y = x (W + s B A)ᵀ, row i of A the shards A_pool[index_A[i]] side by side, column i of B those of index_B[i]."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, linear: nn.Module, options: Options) -> None:
        super().__init__(linear)
        if self.in_features % options.shards or self.out_features % options.shards:
            raise Unsuitable(f"its sides are no multiples of shards = {options.shards}")
        self.scaling = options.lora_alpha / options.r
        for name in ("index_A", "index_B"):
            self.register_buffer(
                name, torch.zeros(options.r, options.shards, dtype=torch.int64, device=self.weight.device)
            )

    def factors(self) -> Factors:
        pools, r = self.__dict__["pools"], self.index_A.shape[0]
        return Factors(
            pools.pool_A[self.index_A].reshape(r, -1), pools.pool_B[self.index_B].reshape(r, -1).T, self.scaling
        )


def _indices(number: int, layers: int, options: Options, generator: torch.Generator) -> Tensor:
    """``[r, l]``: the layer's own private shards, and distinct public ones while there are enough."""
    own = options.private * options.shards
    mine = torch.arange(number * own, (number + 1) * own)
    public = (options.budget - options.private) * layers * options.shards
    need = (options.r - options.private) * options.shards
    start = own * layers
    if need and not public:
        raise ValueError("private: expected less than budget where r is more than private: nothing is left to share")
    rounds = [torch.randperm(public, generator=generator) for _ in range(-(-need // public))] if need else []
    chosen = torch.cat([mine, *(start + one for one in rounds)])[: own + need]
    return chosen.view(options.r, options.shards)


@register(
    "mos",
    paper=Paper(
        "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        "Wang et al.",
        2024,
        "2410.00938",
    ),
    formula="y = x (W + (alpha / r) B A)^T, A and B of r vectors, each l shards taken from pools that the layers of a kind share",
    options=Options,
    reduces_to="lora with gathered A and B; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward; the gathering (r (N + K)) and its adding up in the pools are torch's",
    choices="Layers are of one kind when their paths differ only in numbers and their weights have one shape. The "
    "shards are drawn once, A's "
    "and B's apart, the private ones in order; public shards recur within a layer only when there are too few. Pools "
    "of A are uniform as a "
    "linear layer's weight, those of B zero.",
    demo={"r": 16, "budget": 4, "shards": 4, "private": 2},
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: MoSLinear(linear, options))
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for path, layer in targets.replacements.items():
        kind = (re.sub(r"\d+", "#", path), layer.out_features, layer.in_features)
        kinds.setdefault(kind, []).append(path)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(options.seed)
    for number, paths in enumerate(kinds.values()):
        layers = [targets.replacements[path] for path in paths]
        pools = Pools(layers[0], len(layers), options)  # type: ignore[arg-type]
        targets.share(f"pools_{number}", pools)
        for place, layer in enumerate(layers):
            layer.__dict__["pools"] = pools
            for index in (layer.index_A, layer.index_B):
                index.copy_(_indices(place, len(layers), options, generator))  # type: ignore[operator, arg-type]
