"""SSF: a scale and a shift of each output feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets
from .registry import Paper, register
from .transformed import TransformedLinear


@dataclass(frozen=True)
class Options:
    """init_std: deviation of the scales about 1 and of the shifts about 0."""

    init_std: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.init_std, bool) or not isinstance(self.init_std, int | float) or not 0 <= self.init_std < 1:
            raise ValueError(f"init_std: expected a deviation in [0, 1), got {self.init_std!r}")


class SSFLinear(TransformedLinear):
    """y = scale ∘ (x Wᵀ + b) + shift, both ``[N]``; merged: W' = diag(scale) W and b' = scale ∘ b + shift."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        self.scale, self.shift = self.new_parameter(self.out_features), self.new_parameter(self.out_features)
        nn.init.normal_(self.scale, mean=1.0, std=options.init_std)
        nn.init.normal_(self.shift, std=options.init_std)

    def forward(self, input: Tensor) -> Tensor:
        y = self.base_layer(input)
        if self.merged:
            return y
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        bias = self.dense_bias()
        return self.scale[:, None] * self.dense_weight(), self.shift if bias is None else self.scale * bias + self.shift


@register(
    "ssf",
    paper=Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", "Lian et al.", 2022, "2210.08823"
    ),
    formula="y = scale * (x W^T + b) + shift, feature by feature",
    options=Options,
    reduces_to="a product of the frozen layer (nf4 on a 4-bit base) and one pass over its output",
    kind="layer",
    fused="the product on a 4-bit base; scale and shift are one addcmul of torch, forward, and are merged away after training",
    choices="On the outputs of the linear layers that are chosen; the paper also puts them behind normalisations and embeddings. "
    "Scales begin at N(1, 0.02^2) and shifts at N(0, 0.02^2): step 0 is the base only with init_std=0.",
    exact=False,
    demo={"init_std": 0.0},
    learning_rate=1e-2,
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: SSFLinear(linear, options))
