"""LoRA-XS: a trained r x r matrix between frozen factors from the weight's SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .adapting import Targets
from .factored import FactoredLinear, Factors
from .lora import LoRAOptions
from .registry import Paper, register
from .spectral import truncated_svd


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r: rank. lora_alpha: scaling is lora_alpha / r. lora_dropout: probability. init_std: deviation of R."""

    r: int = 16
    init_std: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init_std, bool) or not isinstance(self.init_std, int | float) or self.init_std < 0:
            raise ValueError(f"init_std: expected a deviation of at least 0, got {self.init_std!r}")


class LoRAXSLinear(FactoredLinear):
    """y = x (W + s U_r Σ_r R V_rᵀ)ᵀ; R ``[r, r]`` is trained. B R is what is computed, so that x is not kept for the backward pass."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear, dropout=options.lora_dropout)
        rank = min(options.r, linear.in_features, linear.out_features)
        self.scaling = options.lora_alpha / options.r
        u, s, v = truncated_svd(self.dense_weight(), rank)
        self.register_buffer("frozen_B", u * s)
        self.register_buffer("frozen_A", v)
        self.latent = self.new_parameter(rank, rank)
        nn.init.normal_(self.latent, std=options.init_std)

    frozen_A: torch.Tensor
    frozen_B: torch.Tensor

    def factors(self) -> Factors:
        return Factors(self.frozen_A, self.frozen_B @ self.latent, self.scaling)


@register(
    "lora-xs",
    paper=Paper(
        "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "Bałazy et al.", 2024, "2405.17604"
    ),
    formula="y = x (W + (alpha / r) B R A)^T, B = U_r S_r and A = V_r^T of W's SVD frozen, R [r, r] trained",
    options=Options,
    reduces_to="lora with B' = B R; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B' = B R; the product B R (r^2 N) is torch's. x is not saved for backward",
    choices="Where the weight is smaller than r the rank is its smaller side. Files hold the frozen factors too, since an SVD's signs "
    "are the library's. R is normal with deviation 1e-5, as in the paper, so that step 0 differs from the base by that much.",
    exact=False,
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=1e-2,
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: LoRAXSLinear(linear, options))
