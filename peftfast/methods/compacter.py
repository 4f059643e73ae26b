"""Compacter: a bottleneck behind a layer whose two matrices are sums of Kronecker products of shared and rank-one factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapting import Targets, Unsuitable
from .factored import FactoredLinear
from .registry import Paper, at_least_one, register
from .transformed import Unmergeable


@dataclass(frozen=True)
class Options:
    """r: width of the bottleneck. n: number of Kronecker products, a divisor of r and of the layer's width."""

    r: int = 24
    n: int = 4

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        at_least_one("n", self.n)
        if self.r % self.n:
            raise ValueError(f"r: expected a multiple of n = {self.n}, got {self.r}")


class SharedRule(nn.Module):
    """The small factors A_i ``[n, n, n]`` that all layers share."""

    def __init__(self, n: int, like: Tensor) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n, dtype=like.dtype, device=like.device))
        nn.init.normal_(self.rule, std=1.0 / n)


def kronecker_sum(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Σ_i A_i ⊗ (s_i t_iᵀ) ``[n p, n q]`` of A ``[n, n, n]``, s ``[n, p]``, t ``[n, q]``."""
    n, p, q = rule.shape[0], s.shape[1], t.shape[1]
    return torch.einsum("iab,ip,iq->apbq", rule, s, t).reshape(n * p, n * q)


class CompacterLinear(Unmergeable, FactoredLinear):  # type: ignore[misc]
    """y = h + U gelu(D h + c) + d, h = x Wᵀ + b; D ``[r, N]`` and U ``[N, r]`` by :func:`kronecker_sum`."""

    def __init__(self, linear: nn.Linear, options: Options, shared: SharedRule) -> None:
        super().__init__(linear)
        n, width, r = options.n, self.out_features, options.r
        if width % n:
            raise Unsuitable(f"its width is no multiple of n = {n}")
        self.__dict__["shared"] = shared
        self.down_s, self.down_t = self.new_parameter(n, r // n), self.new_parameter(n, width // n)
        self.up_s, self.up_t = self.new_parameter(n, width // n), self.new_parameter(n, r // n)
        self.down_bias, self.up_bias = self.new_parameter(r), self.new_parameter(width)
        nn.init.normal_(self.down_s)
        nn.init.normal_(self.down_t, std=math.sqrt(n / width))
        nn.init.normal_(self.up_t, std=math.sqrt(n / r))

    def forward(self, input: Tensor) -> Tensor:
        h = self.base_layer(input)
        rule = self.__dict__["shared"].rule
        down, up = kronecker_sum(rule, self.down_s, self.down_t), kronecker_sum(rule, self.up_s, self.up_t)
        inner = functional.gelu(functional.linear(h, down.to(h.dtype), self.down_bias.to(h.dtype)))
        return h + functional.linear(inner, up.to(h.dtype), self.up_bias.to(h.dtype))


@register(
    "compacter",
    paper=Paper(
        "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        "Karimi Mahabadi, Henderson, Ruder",
        2021,
        "2106.04647",
    ),
    formula="y = h + U gelu(D h + c) + d, h = W x + b; D and U each sum_i A_i kron (s_i t_i^T), A_i shared by all layers",
    options=Options,
    reduces_to="two thin products with computed factors behind the frozen layer (nf4 on a 4-bit base)",
    kind="layer",
    fused="the product on a 4-bit base; the bottleneck has a nonlinearity between its two matrices, so it is torch's",
    choices="The adapter stands behind each layer that is chosen (in the paper behind attention's and the FFN's "
    "output layers). One set of "
    "A_i serves D and U of all layers. U's s_i begin at 0, so that step 0 is the base, A_i at "
    "N(0, 1 / n^2) and the other vectors normal by their lengths; in the authors' code A_i begin at N(0, 0.01^2) and all vectors "
    "Glorot-uniform, gelu is its tanh form, and norms "
    "are trained too. It cannot be merged.",
    learning_rate=3e-3,
)
def build(targets: Targets, options: Options) -> None:
    first = next(iter(targets.modules.values()))
    like = FactoredLinear(first)
    shared = SharedRule(options.n, torch.empty(0, dtype=like.adapter_dtype, device=like.weight.device))
    targets.share("compacter", shared)
    targets.replace(lambda name, linear: CompacterLinear(linear, options, shared))
