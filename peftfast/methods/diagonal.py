"""SVFit and LoLDU: the weight's own factors, of which a diagonal is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets, Unsuitable
from .factored import FactoredLinear, Factors
from .initialised import check_rank
from .registry import Paper, above_zero, at_least_one, register
from .spectral import truncated_svd


@dataclass(frozen=True)
class SvfitOptions:
    """r: how many singular values of each weight are trained."""

    r: int = 768

    def __post_init__(self) -> None:
        at_least_one("r", self.r)


class SVFitLinear(FactoredLinear):
    """y = x (W + U_r diag(σ - σ0) V_rᵀ)ᵀ with σ ``[r]`` trained, from W's largest singular values σ0."""

    frozen_A: Tensor
    frozen_B: Tensor
    initial: Tensor

    def __init__(self, linear: nn.Linear, options: SvfitOptions) -> None:
        super().__init__(linear)
        u, s, v = truncated_svd(self.dense_weight(), min(options.r, self.in_features, self.out_features))
        self.register_buffer("frozen_B", u)
        self.register_buffer("frozen_A", v)
        self.register_buffer("initial", s)
        self.values = nn.Parameter(s.clone())

    def factors(self) -> Factors:
        return Factors(self.frozen_A, self.frozen_B * (self.values - self.initial))


@register(
    "svfit",
    paper=Paper(
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        "Sun et al.",
        2024,
        "2409.05926",
    ),
    formula="y = x (W_e + U_r diag(sigma) V_r^T)^T, W = W_e + U_r S_r V_r^T; sigma [r] trained, from S_r",
    options=SvfitOptions,
    reduces_to="lora with B' = U_r diag(sigma - S_r); nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B'. x is not saved for backward",
    choices="Written as a difference from the start, which is the same function with the weight as it is. r is at most a "
    "weight's smaller side; its default is chosen here.",
    demo={"r": 128},
    learning_rate=2e-2,
)
def build_svfit(targets: Targets, options: SvfitOptions) -> None:
    targets.replace(lambda name, linear: SVFitLinear(linear, options))


@dataclass(frozen=True)
class LolduOptions:
    """r: length of the trained diagonal. lora_alpha: the trained scaling begins at lora_alpha / r."""

    r: int = 768
    lora_alpha: float = 768.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)


class LoLDULinear(FactoredLinear):
    """y = x (W + P L_r diag(σ z - σ0 z0) U_r)ᵀ of W = P L D U, L and U with a diagonal of ones; z ``[r]``, from D_r, and the
    scaling σ are trained."""

    frozen_A: Tensor
    frozen_B: Tensor
    initial: Tensor

    def __init__(self, linear: nn.Linear, options: LolduOptions) -> None:
        super().__init__(linear)
        r = options.r
        p, lower, upper = torch.linalg.lu(self.dense_weight())
        diagonal = upper.diagonal()[:r]
        if bool((diagonal == 0).any()):
            raise Unsuitable("loldu divides by the diagonal of U, which has a zero: the weight is of low rank")
        scaling = options.lora_alpha / options.r
        self.register_buffer("frozen_B", p @ lower[:, :r])
        self.register_buffer("frozen_A", (upper[:r] / diagonal[:, None]).contiguous())
        self.diagonal = nn.Parameter(diagonal.clone())
        self.sigma = nn.Parameter(diagonal.new_tensor([scaling]))
        self.register_buffer("initial", scaling * diagonal)

    def factors(self) -> Factors:
        return Factors(self.frozen_A, self.frozen_B * (self.sigma * self.diagonal - self.initial))


@register(
    "loldu",
    paper=Paper(
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        "Shi et al.", 2024, "2410.13618",
    ),
    formula="y = x (W - s0 P L_r D_r U_r + s P L_r diag(z) U_r)^T of W = P L D U; z [r], from D_r, and s are trained",
    options=LolduOptions,
    reduces_to="lora with B' = P L_r diag(s z - s0 D_r); nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B'. x is not saved for backward",
    choices="z begins at D_r, the first of the paper's initialisations, and s at lora_alpha / r, 1 by default here. The residual is "
    "written as a difference from the start, which is the same function with the weight as it is. P L_r is kept as one matrix.",
    demo={"r": 128, "lora_alpha": 128.0},
    learning_rate=2e-3,
)  # fmt: skip
def build_loldu(targets: Targets, options: LolduOptions) -> None:
    def make(name: str, linear: nn.Linear) -> LoLDULinear:
        check_rank(linear, options.r)
        return LoLDULinear(linear, options)

    targets.replace(make)
