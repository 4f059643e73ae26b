"""LoftQ and EoRA: a 4-bit weight and the adapter that makes up for what quantising lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn import LoRALinear
from .adapting import Targets, Unsuitable, is_four_bit
from .initialised import check_rank, dense_weight, placeholder, quantised_lora, scaling_of
from .lora import LoRAOptions
from .passes import second_moments
from .registry import Paper, at_least_one, register
from .spectral import truncated_svd

SMALLEST_EIGENVALUE = 1e-6  # of the largest


@dataclass(frozen=True)
class LoftqOptions(LoRAOptions):
    """r, lora_alpha, lora_dropout: as in LoRA. loftq_iter: quantisations, each followed by an SVD. block_size, double_quant: of
    NF4."""

    r: int = 16
    loftq_iter: int = 5
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("loftq_iter", self.loftq_iter)


def decoded(weight: Tensor, block_size: int, double_quant: bool) -> Tensor:
    """What ``weight`` is after NF4, float32."""
    return F.nf4_dequantize(F.nf4_quantize(weight.float(), block_size=block_size, double_quant=double_quant))


def _dense_only(linear: nn.Module, name: str) -> None:
    if is_four_bit(linear):
        raise Unsuitable(f"{name} starts from the weight before it is quantised, and this one is in 4 bits")


@register(
    "loftq",
    paper=Paper(
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", "Li et al.", 2023, "2310.08659"
    ),
    formula="y = x (Q + s B A)^T; repeat: Q = NF4(W - s B A), s B A = the rank-r SVD of W - Q, from B A = 0",
    options=LoftqOptions,
    reduces_to="nf4 + lora",
    kind="initialisation",
    fused="quantisation, and the layer, forward and backward",
    peft='LoraConfig(init_lora_weights="loftq")',
    choices="4 bits of NF4; the paper's 2 bits are not served: stored in 4 they would save nothing. B and A share the root of the "
    "singular values and of 1 / s, so that "
    "Q + s B A is nearest W for every alpha; PEFT's leaves s out, which is the same where alpha = r. With one iteration Q is NF4(W) "
    "and files are PEFT's LoRA, whose header names the 4 bits, into which load_adapter brings a dense base; with more they hold Q "
    "too. Step 0 is W but for what Q and rank r leave.",
    exact=False,
    demo={"r": 16, "lora_alpha": 16.0, "loftq_iter": 1},
    learning_rate=1e-3,
)
def build(targets: Targets, options: LoftqOptions) -> None:
    def make(name: str, linear: nn.Linear) -> LoRALinear:
        if targets.restoring and is_four_bit(linear):
            return placeholder(linear, options)
        _dense_only(linear, "loftq")
        check_rank(linear, options.r)
        weight, scaling = dense_weight(linear).float(), scaling_of(options)
        product, start = torch.zeros_like(weight), weight
        for _ in range(options.loftq_iter):
            start = weight - product
            u, s, v = truncated_svd(weight - decoded(start, options.block_size, options.double_quant), options.r)
            product = (u * s) @ v
        root = (s / scaling).sqrt()
        settings = options.block_size, options.double_quant
        own = options.loftq_iter > 1
        return quantised_lora(linear, start, options, root[:, None] * v, u * root, *settings, own=own)

    targets.replace(make)


@dataclass(frozen=True)
class EoraOptions(LoRAOptions):
    """r, lora_alpha, lora_dropout: as in LoRA. block_size, double_quant: of NF4."""

    r: int = 128
    lora_alpha: float = 128.0
    block_size: int = 64
    double_quant: bool = True


def eigenspace_factors(error: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A ``[r, K]``, B ``[N, r]``) of the rank-r matrix nearest ``error`` ``[N, K]`` as inputs see it, whose second moment is
    ``moment``: the SVD of error Q Λ^(1/2), its right side times the inverse, of moment = Q Λ Qᵀ."""
    if not bool(moment.isfinite().all()) or not bool(moment.any()):
        raise Unsuitable("its inputs are zero or not finite")
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=float(values[-1]) * SMALLEST_EIGENVALUE)
    root = values.sqrt()
    u, s, v = truncated_svd(error.double() @ (vectors * root), rank)
    half = s.sqrt()
    return half[:, None] * ((v / root) @ vectors.T), u * half


@register(
    "eora",
    paper=Paper(
        "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
        "Liu et al.",
        2024,
        "2410.21271",
    ),
    formula="y = x (Q + s B A)^T, Q = NF4(W); U S V^T = (W - Q) E L^(1/2) of E[x x^T] = E L E^T; s B A = U_r S_r V_r^T L^(-1/2) E^T",
    options=EoraOptions,
    reduces_to="nf4 + lora",
    kind="initialisation",
    fused="quantisation, and the layer, forward and backward",
    choices="The compression is NF4. Inputs are those of the uncompressed model; the authors' code goes block by block, each behind "
    "the "
    "compensated ones before it. Eigenvalues below 1e-6 of the largest are raised to that, so that few data leave a root that "
    "can be inverted. Files are PEFT's LoRA, whose header names the 4 bits, into which load_adapter brings a dense base. "
    "Step 0 is W but for what Q and rank r leave.",
    exact=False,
    reads_data=True,
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=1e-3,
)
def build_eora(targets: Targets, options: EoraOptions) -> None:
    found = second_moments(targets, "eora: inputs")

    def make(name: str, linear: nn.Linear) -> LoRALinear:
        _dense_only(linear, "eora")
        check_rank(linear, options.r)
        weight = dense_weight(linear).float()
        error = weight - decoded(weight, options.block_size, options.double_quant)
        a, b = eigenspace_factors(error, found[name], options.r)
        settings = options.block_size, options.double_quant
        return quantised_lora(linear, weight, options, a, b / scaling_of(options), *settings, own=False)

    targets.replace(make)
