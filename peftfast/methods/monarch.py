"""MoRe: a Monarch matrix, two block-diagonals with permutations between them, beside the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .adapting import Targets, Unsuitable
from .factored import FactoredLinear, Factors
from .registry import Paper, at_least_one, register


@dataclass(frozen=True)
class Options:
    """n_blocks: blocks of each factor. r: rank of a block; the matrix has rank n_blocks r and r (N + K) numbers."""

    n_blocks: int = 4
    r: int = 8

    def __post_init__(self) -> None:
        at_least_one("n_blocks", self.n_blocks)
        at_least_one("r", self.r)


class MonarchLinear(FactoredLinear):
    """W' = W + P₁ L P₂ R, R ``[n, r, K / n]`` and L ``[n, N / n, r]`` by blocks.

    Row j n + l of P₂ R goes to block l of L as its input j, and output s of block l is feature s n + l. With their zeros the factors
    are A ``[n r, K]`` and B ``[N, n r]``: LoRA's kernels at rank n r, which up to 16 or so cost what rank 1 costs, in place of four
    small products and three permutations.
    """

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        n = options.n_blocks
        if self.in_features % n or self.out_features % n:
            raise Unsuitable(f"its sides are no multiples of n_blocks = {n}")
        self.monarch_R = self.new_parameter(n, options.r, self.in_features // n)
        self.monarch_L = self.new_parameter(n, self.out_features // n, options.r)
        nn.init.kaiming_uniform_(self.monarch_R, a=math.sqrt(5))

    def factors(self) -> Factors:
        n, r, _ = self.monarch_R.shape
        blocks = torch.eye(n, dtype=self.monarch_R.dtype, device=self.monarch_R.device)
        a = torch.einsum("kqp,kj->kqjp", self.monarch_R, blocks).reshape(n * r, self.in_features)
        b = torch.einsum("lsr,lm->slrm", self.monarch_L, blocks).reshape(self.out_features, n * r)
        return Factors(a, b)


@register(
    "monarch",
    paper=Paper("MoRe Fine-Tuning with 10x Fewer Parameters", "Tan et al.", 2024, "2408.17383"),
    formula="y = x (W + P1 L P2 R)^T, L and R block-diagonal with n blocks of rank r, P the permutations of Monarch matrices; L = 0",
    options=Options,
    reduces_to="lora of rank n r with structured A and B; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on the factors with their zeros",
    choices="Scaling 1. The matrix class is Dao et al.'s (Monarch: Expressive Structured Matrices, 2022); the "
    "permutations are those of "
    "its butterfly product.",
    demo={"n_blocks": 4, "r": 8},
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: MonarchLinear(linear, options))
