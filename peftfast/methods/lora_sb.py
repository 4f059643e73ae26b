"""LoRA-SB: LoRA-XS whose frozen factors are those of the first step that full fine-tuning would take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapting import Targets
from .factored import FactoredLinear, Factors
from .initialised import check_rank, scaling_of
from .lora import LoRAOptions
from .passes import weight_gradients
from .registry import Paper, above_zero, register
from .spectral import truncated_svd


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r: rank. lora_alpha: scaling lora_alpha / r, which the start takes out again. eta: learning rate of the step that is imitated.
    keep_output: subtract the start, so that step 0 computes what the base does."""

    r: int = 64
    lora_alpha: float = 64.0
    eta: float = 5e-5
    keep_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("eta", self.eta)


class LoRASBLinear(FactoredLinear):
    """y = x (W + s B R A)ᵀ with B, A orthonormal and frozen and R ``[r, r]`` trained; with ``keep_output`` R - R0 in its place."""

    frozen_A: Tensor
    frozen_B: Tensor
    initial: Tensor | None

    def __init__(self, linear: nn.Linear, options: Options, gradient: Tensor | None) -> None:
        super().__init__(linear, dropout=options.lora_dropout)
        self.scaling, r = scaling_of(options), options.r
        dtype = self.adapter_dtype
        if gradient is None:
            u, s, v = torch.zeros(self.out_features, r), torch.zeros(r), torch.zeros(r, self.in_features)
        else:
            u, s, v = truncated_svd(-options.eta * gradient.sign(), r)
        device = self.weight.device
        self.register_buffer("frozen_B", u.to(device, dtype))
        self.register_buffer("frozen_A", v.to(device, dtype))
        self.latent = nn.Parameter(torch.diag(s.to(device, dtype) / self.scaling))
        self.register_buffer("initial", self.latent.detach().clone() if options.keep_output else None)

    def factors(self) -> Factors:
        core = self.latent if self.initial is None else self.latent - self.initial
        return Factors(self.frozen_A, self.frozen_B @ core, self.scaling)


@register(
    "lora-sb",
    paper=Paper(
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        "Ponkshe et al.", 2024, "2411.19557",
    ),
    formula="y = x (W + s B R A)^T; U S V^T = -eta sign(mean dL/dW); B = U_r, A = V_r^T frozen, R0 = S_r / s, R [r, r] trained",
    options=Options,
    reduces_to="lora with B' = B R; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward, on B' = B R; the product (r^2 N) is torch's. x is not saved for backward",
    choices="Step 0 is the base plus the rank-r part of that first step, as in the paper; keep_output=True takes it out. eta is not "
    "fixed by the paper beyond being full fine-tuning's learning rate. The gradient is the mean over the batches, in evaluation mode.",
    exact=False,
    reads_data=True,
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=2e-3,
)  # fmt: skip
def build(targets: Targets, options: Options) -> None:
    found = {} if targets.restoring else weight_gradients(targets, "lora-sb: gradients")

    def make(name: str, linear: nn.Linear) -> LoRASBLinear:
        check_rank(linear, options.r)
        return LoRASBLinear(linear, options, found.get(name))

    targets.replace(make)
