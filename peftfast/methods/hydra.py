"""Hydra: a low-rank branch beside the weight and one behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as F
from .adapting import Targets
from .registry import Paper, above_zero, at_least_one, register
from .transformed import TransformedLinear


@dataclass(frozen=True)
class Options:
    """r: rank of each branch. lora_alpha: scaling is lora_alpha / r."""

    r: int = 4
    lora_alpha: float = 4.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)


class HydraLinear(TransformedLinear):
    """y = h + s (B_p A_p x + B_s A_s h), h = W x + b.

    B_s A_s W is of the same kind as B_p A_p, so both are one adapter of rank 2r whose A holds A_s W: that costs r N K, once a step,
    where the other order costs r N a row and keeps h for the backward pass.
    """

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        n, k, r = self.out_features, self.in_features, options.r
        self.scaling = options.lora_alpha / r
        self.parallel_A, self.parallel_B = self.new_parameter(r, k), self.new_parameter(n, r)
        self.sequential_A, self.sequential_B = self.new_parameter(r, n), self.new_parameter(n, r)
        for a in (self.parallel_A, self.sequential_A):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def _branches(self) -> tuple[Tensor, Tensor, Tensor | None]:
        inner = self.sequential_A  # of the adapter's dtype until the model is cast
        a = torch.cat([self.parallel_A, inner @ self.dense_weight().to(inner.dtype)])
        b = torch.cat([self.parallel_B, self.sequential_B], dim=1)
        bias = self.dense_bias()
        return a, b, None if bias is None else self.sequential_B @ (inner @ bias.to(inner.dtype))

    def forward(self, input: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged:
            return base(input)
        a, b, shift = self._branches()
        return F.lora_linear(
            input,
            base.nf4 if self.four_bit else base.weight,
            a,
            b,
            scaling=self.scaling,
            bias=base.bias,
            lora_bias=shift,
            training=self.training,
            compute_dtype=base.compute_dtype if self.four_bit else None,
        )

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        a, b, shift = self._branches()
        bias = self.dense_bias()
        return (
            self.dense_weight() + self.scaling * b @ a,
            None if bias is None or shift is None else bias + self.scaling * shift,
        )


@register(
    "hydra",
    paper=Paper(
        "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", "Kim et al.", 2023, "2309.06922"
    ),
    formula="y = h + (alpha / r) (B_p A_p x + B_s A_s h), h = W x + b; B_p = B_s = 0",
    options=Options,
    reduces_to="lora of rank 2 r with A = [A_p; A_s W]; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer with both branches at once, forward and backward; A_s W (r N K) is torch's",
    choices="Both branches have the same rank and scaling. On a 4-bit base W is decoded once a step for A_s W.",
    demo={"r": 8, "lora_alpha": 8.0},
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: HydraLinear(linear, options))
