"""L4Q: a learned quantisation step, with the LoRA product inside the weight that is quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets
from .composed import ComposedLinear
from .lora import LoRAOptions
from .registry import Paper, at_least_one, register


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r: rank. lora_alpha: scaling is lora_alpha / r. bits: of a weight, 2 to 8. group_size: weights of a row with one step."""

    r: int = 4
    lora_alpha: float = 4.0
    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("group_size", self.group_size)
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise ValueError(f"bits: expected 2 to 8, got {self.bits!r}")
        if self.lora_dropout:
            raise ValueError("lora_dropout: the product is inside the quantised weight; expected 0")


class L4QLinear(ComposedLinear):
    """y = x W̃ᵀ, W̃ = step · clip(round((W + s B A - offset) / step)) + offset, a step and an offset ``[N, K / g, 1]`` to a group.

    The rounding passes gradients through, so that within the range d W̃ / d step = round(v) - v with v the quotient and
    d W̃ / d offset = 0, outside it the bound and 1 (LSQ's and LSQ+'s rules), and A and B get theirs from what is within.
    """

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        rank = options.r
        self.scaling = options.lora_alpha / rank
        self.bits = options.bits
        self.lowest, self.highest = -(2 ** (options.bits - 1)), 2 ** (options.bits - 1) - 1
        self.group = options.group_size if self.in_features % options.group_size == 0 else self.in_features
        self.lora_A = self.new_parameter(rank, self.in_features)
        self.lora_B = self.new_parameter(self.out_features, rank)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        groups = self.dense_weight().reshape(self.out_features, -1, self.group)
        least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = torch.maximum(least.neg() / -self.lowest, most / self.highest)
        self.step = nn.Parameter(step.clamp_min(torch.finfo(step.dtype).tiny))
        self.offset = nn.Parameter(torch.zeros_like(step))

    def codes(self) -> Tensor:
        """The integers ``[N, K / g, g]`` of the quantised weight, as floating numbers with the graph of their
        straight-through rounding."""
        weight = self.dense_weight()  # of float32 beside adapters that were cast with the model
        whole = torch.addmm(weight, self.lora_B.to(weight.dtype), self.lora_A.to(weight.dtype), alpha=self.scaling)
        groups = whole.reshape(self.out_features, -1, self.group)
        clipped = ((groups - self.offset) / self.step).clamp(self.lowest, self.highest)
        return clipped + (clipped.round() - clipped).detach()

    def composed(self) -> Tensor:
        return (self.codes() * self.step + self.offset).reshape(self.out_features, self.in_features)


@register(
    "l4q",
    paper=Paper(
        "L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models",
        "Jeon et al.",
        2024,
        "2402.04902",
    ),
    formula="y = x W~^T, W~ = q clip(round((W + (alpha / r) B A - b) / q)) + b; A, B, q and b trained, q and b a group of weights",
    options=Options,
    reduces_to="torch's product with a computed weight",
    kind="layer",
    fused="nothing: the quantised weight is composed by torch at each forward, the product is torch's",
    choices="The first step is the least that clips nothing, the larger of -min W / 2^(bits-1) and max W / (2^(bits-1) - 1); the first "
    "offset 0. No scale on the gradient of the step. Where the group does not divide K, a row is one group. merge puts the quantised "
    "weight's values into the weight; its integers are layer.codes().",
    exact=False,
    demo={"r": 16, "lora_alpha": 16.0},
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: L4QLinear(linear, options))
