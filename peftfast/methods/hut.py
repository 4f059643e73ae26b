"""HUT: the weight times a low-rank transformation, element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets
from .registry import Paper, at_least_one, register
from .transformed import TransformedLinear


@dataclass(frozen=True)
class Options:
    """r: rank of the transformation."""

    r: int = 8

    def __post_init__(self) -> None:
        at_least_one("r", self.r)


class HUTLinear(TransformedLinear):
    """W' = W ∘ (1 + M_A M_B), M_A ``[N, r]``, M_B ``[r, K]``."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        self.hut_A = self.new_parameter(self.out_features, options.r)
        self.hut_B = self.new_parameter(options.r, self.in_features)
        nn.init.kaiming_uniform_(self.hut_B, a=math.sqrt(5))

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        weight = self.dense_weight()
        return torch.addcmul(weight, weight, self.hut_A @ self.hut_B), self.dense_bias()


@register(
    "hut",
    paper=Paper(
        "HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation",
        "Zhang, Zhou, Chen",
        2024,
        "2409.13501",
    ),
    formula="y = x W'^T + b, W' = W * (1 + M_A M_B) element by element; M_A = 0",
    options=Options,
    reduces_to="a product with a weight that is computed",
    kind="layer",
    fused="nothing but the decoding of a 4-bit base: an element-wise product with the weight is no low-rank term, so W' is formed by "
    "torch, and its gradient is dense",
    choices="The transformation is written as 1 + M_A M_B with M_A = 0 and M_B Kaiming-uniform, so that step 0 is the "
    "base; biases stay frozen. Settled from the paper's abstract; its equations were not at hand.",
    demo={"r": 16},
    learning_rate=5e-3,
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: HUTLinear(linear, options))
