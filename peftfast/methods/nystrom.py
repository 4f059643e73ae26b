"""SLoRA, NLoRA and IntTune: a small matrix between B and A, which NLoRA starts by the Nyström method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets, Unsuitable, is_four_bit
from .factored import FactoredLinear, Factors
from .initialised import check_rank, scaling_of
from .lora import LoRAOptions
from .registry import Paper, register

PAPER = Paper(
    "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", "Guo, Chang, Wu", 2025, "2502.14482"
)


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r, lora_alpha, lora_dropout: as in LoRA."""

    r: int = 128
    lora_alpha: float = 128.0


@dataclass(frozen=True)
class NystromOptions(Options):
    """r, lora_alpha, lora_dropout: as in LoRA. inverse: N begins as the pseudo-inverse of W[:r, :r], Nyström's formula; False: as
    W[:r, :r] itself, as in the authors' code."""

    inverse: bool = True


class SLoRALinear(FactoredLinear):
    """y = x (W + s B N A)ᵀ with A ``[r, K]``, N ``[r, r]`` and B ``[N, r]`` trained; A and N Kaiming-uniform, B zero."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear, dropout=options.lora_dropout)
        self.scaling, r = scaling_of(options), options.r
        self.lora_A = self.new_parameter(r, self.in_features)
        self.lora_N = self.new_parameter(r, r)
        self.lora_B = self.new_parameter(self.out_features, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.lora_N, a=math.sqrt(5))

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B @ self.lora_N, self.scaling)


def nystrom(weight: Tensor, r: int, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(A = W[:r], N, B = W[:, :r]): B N A is W's Nyström approximation where N is the pseudo-inverse of W[:r, :r]."""
    block = weight[:r, :r]
    return weight[:r], torch.linalg.pinv(block) if inverse else block, weight[:, :r]


class NLoRALinear(SLoRALinear):
    """A :class:`SLoRALinear` that begins at the Nyström factors, on W less their product."""

    def __init__(self, linear: nn.Linear, options: NystromOptions) -> None:
        super().__init__(linear, options)
        if self.four_bit:
            raise Unsuitable("nlora takes its factors out of the weight, which in 4 bits would be quantised again")
        weight = self.dense_weight()
        with torch.no_grad():
            a, n, b = nystrom(weight, options.r, options.inverse)
            self.lora_A.copy_(a)
            self.lora_N.copy_(n / self.scaling)
            self.lora_B.copy_(b)
            self.replace_weight(weight - self.scaling * (self.lora_B @ self.lora_N) @ self.lora_A)


class IntTuneLinear(FactoredLinear):
    """y = x (W + s B (N - N0) A)ᵀ: A and B of :func:`nystrom` are frozen and N ``[r, r]`` alone is trained; the weight stays as it
    is."""

    frozen_A: Tensor
    frozen_B: Tensor
    initial_N: Tensor

    def __init__(self, linear: nn.Linear, options: NystromOptions) -> None:
        super().__init__(linear, dropout=options.lora_dropout)
        self.scaling = scaling_of(options)
        a, n, b = nystrom(self.dense_weight(), options.r, options.inverse)
        self.register_buffer("frozen_A", a.clone())
        self.register_buffer("frozen_B", b.clone(memory_format=torch.contiguous_format))
        self.register_buffer("initial_N", n / self.scaling)
        self.lora_N = nn.Parameter(self.initial_N.clone())

    def factors(self) -> Factors:
        return Factors(self.frozen_A, self.frozen_B @ (self.lora_N - self.initial_N), self.scaling)


def _replace(targets: Targets, options: Options, layer: Any) -> None:
    def make(name: str, linear: nn.Linear) -> FactoredLinear:
        check_rank(linear, options.r)
        if layer is NLoRALinear and is_four_bit(linear):
            raise Unsuitable("nlora takes its factors out of the weight, which in 4 bits would be quantised again")
        made: FactoredLinear = layer(linear, options)
        return made

    targets.replace(make)


@register(
    "slora",
    paper=PAPER,
    formula="y = x (W + (alpha / r) B N A)^T; A and N Kaiming-uniform, B = 0, all trained",
    options=Options,
    reduces_to="lora with B' = B N; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B' = B N; the product B N is torch's",
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=5e-3,
)
def build_slora(targets: Targets, options: Options) -> None:
    _replace(targets, options, SLoRALinear)


@register(
    "nlora",
    paper=PAPER,
    formula="y = x (W - s B0 N0 A0 + s B N A)^T; A0 = W[:r], B0 = W[:, :r], s N0 = W[:r, :r]^+",
    options=NystromOptions,
    reduces_to="lora with B' = B N",
    kind="initialisation",
    fused="the layer, forward and backward, on B' = B N; the product B N is torch's",
    choices="The weight becomes W less the initial product, so that step 0 is the base's; the authors' code leaves W as it is. N "
    "begins as Nyström's pseudo-inverse; the authors' code takes the block itself (inverse=False).",
    demo={"r": 16, "lora_alpha": 16.0, "inverse": False},
    learning_rate=5e-4,
)
def build_nlora(targets: Targets, options: NystromOptions) -> None:
    _replace(targets, options, NLoRALinear)


@register(
    "inttune",
    paper=PAPER,
    formula="y = x (W + s B0 (N - N0) A0)^T; A0 = W[:r], B0 = W[:, :r] frozen, s N0 = W[:r, :r]^+, N [r, r] trained",
    options=NystromOptions,
    reduces_to="lora with B' = B0 (N - N0); nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B'; the product (r^2 N) is torch's. x is not saved for backward",
    choices="Written as a difference from the start, which is NLoRA's formula with A and B fixed, without touching the weight.",
    demo={"r": 16, "lora_alpha": 16.0, "inverse": False},
    learning_rate=2e-2,
)
def build_inttune(targets: Targets, options: NystromOptions) -> None:
    _replace(targets, options, IntTuneLinear)
