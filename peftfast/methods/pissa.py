"""PiSSA and OLoRA: adapters that begin as the principal part of the weight, the weight as the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn import LoRALinear
from .adapting import Targets
from .initialised import check_rank, dense_weight, residual_lora, scaling_of
from .lora import LoRAOptions
from .registry import Paper, at_least_one, register
from .spectral import truncated_svd


@dataclass(frozen=True)
class PissaOptions(LoRAOptions):
    """r: rank. lora_alpha: scaling is lora_alpha / r; the paper's is r. niter: subspace iterations of a randomised SVD; None: the exact
    one."""

    r: int = 128
    lora_alpha: float = 128.0
    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None:
            at_least_one("niter", self.niter)


@register(
    "pissa",
    paper=Paper(
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        "Meng et al.",
        2024,
        "2404.02948",
    ),
    formula="y = x (W - s B0 A0 + s B A)^T, s = alpha / r; B0 = U_r (S_r / s)^(1/2), A0 = (S_r / s)^(1/2) V_r^T of W's SVD",
    options=PissaOptions,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward",
    peft='LoraConfig(init_lora_weights="pissa")',
    choices="Files are the adapter B A - B0 A0 of rank 2r on the untouched base, which stock PEFT loads as LoRA. In 16 bits step 0 "
    "is the base's but for the residual's rounding, as in PEFT. On a 4-bit base (QPiSSA) the residual is quantised again, so that "
    "step 0 is the base's but for that rounding, and the files hold the 4-bit weight.",
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=5e-4,
)
def build(targets: Targets, options: PissaOptions) -> None:
    def make(name: str, linear: nn.Linear) -> LoRALinear:
        check_rank(linear, options.r)
        weight = dense_weight(linear)
        if options.niter is None:
            u, s, v = truncated_svd(weight, options.r)
        else:
            u, s, v = torch.svd_lowrank(weight, options.r, niter=options.niter)
            v = v.T
        root = (s / scaling_of(options)).sqrt()
        return residual_lora(linear, options, root[:, None] * v, u * root)

    targets.replace(make)


@dataclass(frozen=True)
class OloraOptions(LoRAOptions):
    """r: rank. lora_alpha: scaling is lora_alpha / r."""

    r: int = 32
    lora_alpha: float = 16.0


@register(
    "olora",
    paper=Paper("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", "Büyükakyüz", 2024, "2406.01775"),
    formula="y = x (W - s B0 A0 + s B A)^T, s = alpha / r; B0 = Q[:, :r], A0 = R[:r] of W = Q R",
    options=OloraOptions,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward",
    peft='LoraConfig(init_lora_weights="olora")',
    choices="Files as for pissa. On a 4-bit base the residual is quantised again.",
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=5e-4,
)
def build_olora(targets: Targets, options: OloraOptions) -> None:
    def make(name: str, linear: nn.Linear) -> LoRALinear:
        check_rank(linear, options.r)
        q, r = torch.linalg.qr(dense_weight(linear))
        return residual_lora(linear, options, r[: options.r], q[:, : options.r])

    targets.replace(make)
