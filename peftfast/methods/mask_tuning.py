"""Mask tuning: a binary mask over frozen weights is what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets
from .composed import ComposedLinear
from .registry import Paper, above_zero, register


@dataclass(frozen=True)
class Options:
    """threshold: a weight stays where its score is above it. initial_score: of all weights at first."""

    threshold: float = 5e-3
    initial_score: float = 1e-2

    def __post_init__(self) -> None:
        above_zero("threshold", self.threshold)
        if not self.threshold < self.initial_score < float("inf"):
            raise ValueError(
                f"initial_score: expected above the threshold {self.threshold}, got {self.initial_score!r}"
            )


class MaskedLinear(ComposedLinear):
    """y = x (m ∘ W)ᵀ, m = 1 where ``scores`` ``[N, K]`` is above the threshold; the gradient of m is that of the scores."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        self.threshold = options.threshold
        self.scores = nn.Parameter(torch.full_like(self.dense_weight(), options.initial_score))

    def mask(self) -> Tensor:
        """bool ``[N, K]``."""
        return self.scores.detach() > self.threshold

    def composed(self) -> Tensor:
        hard = self.mask().to(self.scores.dtype)
        return self.dense_weight() * (self.scores + (hard - self.scores).detach())


@torch.no_grad()
def regularise_(
    parameters: Sequence[nn.Parameter],
    general: Mapping[nn.Parameter, Tensor] | Sequence[Tensor],
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Gradient dropout: each gradient entry g stays with the probability (1 + sign(g) (g + h) / (|g| + |h|)) / 2, h the gradient of the
    same mask with respect to a loss of general knowledge (the divergence from the frozen model's predictions), else becomes 0.

    Args:
        parameters: mask scores that have a ``grad``. general: h for each.
        generator: of the choice, on the CPU.

    Raises:
        ValueError: a gradient is missing or has another shape.
    """
    others = [general[p] for p in parameters] if isinstance(general, Mapping) else list(general)
    if len(others) != len(parameters):
        raise ValueError(f"general: expected {len(parameters)} gradients, got {len(others)}")
    for parameter, other in zip(parameters, others, strict=True):
        if parameter.grad is None or parameter.grad.shape != other.shape:
            raise ValueError("parameters: expected each to have a gradient of the general one's shape")
    for parameter, other in zip(parameters, others, strict=True):
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        total = (gradient.abs() + other.abs()).clamp_min(torch.finfo(gradient.dtype).tiny)
        purity = 0.5 * (1 + gradient.sign() * (gradient + other) / total)
        draw = torch.rand(gradient.shape, generator=generator, dtype=torch.float32).to(gradient)
        gradient.mul_((draw < purity).to(gradient.dtype))


@register(
    "mask-tuning",
    paper=Paper(
        "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
        "Zheng et al.",
        2023,
        "2307.15049",
    ),
    formula="y = x (m * W)^T, m = 1 where the trained score is above the threshold, else 0; gradients pass straight through "
    "to the score",
    options=Options,
    reduces_to="torch's product with a masked weight",
    kind="layer",
    fused="nothing: the mask is put on by torch at each forward",
    choices="All chosen layers have a mask; the paper takes the attention's. The regularised form's gradient dropout needs "
    "gradients of a "
    "second loss and is mask_tuning.regularise_, to be called before the optimiser's step. Files hold the scores, so that training "
    "can go on; the mask is a bit of each.",
    learning_rate=1e-3,
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: MaskedLinear(linear, options))
