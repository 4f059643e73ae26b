"""LoRA and its two direct variants, by name: what the other methods are compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import LoRALinear
from .adapting import Targets
from .registry import Paper, above_zero, at_least_one, probability, register


@dataclass(frozen=True)
class LoRAOptions:
    """r: rank. lora_alpha: scaling is lora_alpha / r. lora_dropout: probability."""

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)


def _lora(targets: Targets, options: LoRAOptions, **fixed: Any) -> None:
    given = {**dataclasses.asdict(options), **fixed}

    def make(name: str, linear: nn.Linear) -> LoRALinear:
        return LoRALinear.from_linear(linear, **given)

    targets.replace(make)


@register(
    "lora",
    paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", "Hu et al.", 2021, "2106.09685"),
    formula="y = x (W + (alpha / r) B A)^T; A Kaiming-uniform, B = 0",
    options=LoRAOptions,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward",
    peft="LoraConfig",
    choices="r and alpha as PEFT's users mostly set them; the paper varies r from 1 to 64.",
    demo={"r": 16, "lora_alpha": 16.0},
)
def build(targets: Targets, options: LoRAOptions) -> None:
    _lora(targets, options)


@register(
    "rslora",
    paper=Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "Kalajdzievski", 2023, "2312.03732"),
    formula="y = x (W + (alpha / sqrt(r)) B A)^T",
    options=LoRAOptions,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward",
    peft="LoraConfig(use_rslora=True)",
    demo={"r": 16, "lora_alpha": 8.0},
)
def build_rslora(targets: Targets, options: LoRAOptions) -> None:
    _lora(targets, options, use_rslora=True)


@register(
    "dora",
    paper=Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "Liu et al.", 2024, "2402.09353"),
    formula="y = x (m V / ||V||)^T, V = W + (alpha / r) B A, row by row; m = ||W|| at first",
    options=LoRAOptions,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, its row norms included",
    peft="LoraConfig(use_dora=True)",
    choices="The norm takes part in the graph as a constant, as the paper's section 4.3 and PEFT have it.",
    demo={"r": 16, "lora_alpha": 16.0},
)
def build_dora(targets: Targets, options: LoRAOptions) -> None:
    _lora(targets, options, use_dora=True)
