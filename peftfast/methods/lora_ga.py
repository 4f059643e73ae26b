"""LoRA-GA: factors from the singular vectors of the first gradient, so that the first steps go where full fine-tuning's would."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn import LoRALinear
from .adapting import Targets, is_four_bit
from .initialised import check_rank, dense_weight, placeholder, residual_lora, scaling_of
from .lora import LoRAOptions
from .passes import weight_gradients
from .registry import Paper, above_zero, one_of, register
from .spectral import truncated_svd

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r, lora_dropout: as in LoRA. lora_alpha, use_rslora: scaling lora_alpha / sqrt(r), the paper's. direction: which singular vectors
    go to A and which to B. scale, stable_gamma: how large they begin. singular_values: B times its singular values, as PEFT has it;
    the paper has both factors orthogonal."""

    r: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = True
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16.0
    singular_values: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("direction", self.direction, DIRECTIONS)
        one_of("scale", self.scale, SCALES)
        above_zero("stable_gamma", self.stable_gamma)


def factors(gradient: Tensor, weight: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(A ``[r, K]``, B ``[N, r]``) from the gradient of a weight ``[N, K]``."""
    r, scaling = options.r, scaling_of(options)
    u, s, v = truncated_svd(gradient, 2 * r)
    every = torch.arange(2 * r)
    to_a, to_b = {
        "ArB2r": (every[:r], every[r:]),
        "A2rBr": (every[r:], every[:r]),
        "ArBr": (every[1::2], every[::2]),
    }.get(options.direction) or (torch.randperm(2 * r)[:r],) * 2
    a, b, values = v[to_a], u[:, to_b], s[to_b]
    b = b * values if options.singular_values else b
    size = 1.0
    if options.scale == "stable":
        size = gradient.shape[0] ** 0.25 / options.stable_gamma**0.5
    elif options.scale == "weight_svd":
        largest = float(values[0]) if options.singular_values else 1.0
        size = float(torch.linalg.matrix_norm(weight, 2)) / max(largest, torch.finfo(torch.float32).tiny)
    elif options.scale == "gd_scale":
        return a / scaling, b / scaling
    # The paper spreads the size over both factors, PEFT gives it to B.
    return (a, b * size) if options.singular_values or options.scale == "weight_svd" else (a * size, b * size)


@register(
    "lora-ga",
    paper=Paper("LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "Wang, Yu, Li", 2024, "2407.05000"),
    formula="y = x (W - s B0 A0 + s B A)^T; dL/dW = U S V^T; A0 = c V[:, :r]^T, B0 = c U[:, r:2r], c = N^(1/4) / gamma^(1/2)",
    options=Options,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward",
    peft='LoraConfig(init_lora_weights="lora_ga")',
    choices="The SVD is exact; gamma is 16, as in PEFT; the gradient is the mean over the batches, in evaluation mode. PEFT's "
    "variant, with singular values on B and A of norm 1, is singular_values=True (and use_rslora=False for its default scaling). "
    "On a 4-bit base the residual is quantised again, and a warning says how far from the base that begins. Files as for pissa.",
    reads_data=True,
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=1e-4,
)
def build(targets: Targets, options: Options) -> None:
    if targets.restoring:
        targets.replace(lambda name, linear: placeholder(linear, options))
        return
    found = weight_gradients(targets, "lora-ga: gradients")
    moved: dict[str, float] = {}

    def make(name: str, linear: nn.Linear) -> LoRALinear:
        check_rank(linear, 2 * options.r)
        weight = dense_weight(linear)
        a, b = factors(found[name], weight, options)
        layer: Any = residual_lora(linear, options, a, b)
        if is_four_bit(linear):
            begun = F.nf4_dequantize(layer.nf4, torch.float32).addmm_(layer.lora_B, layer.lora_A, alpha=layer.scaling)
            moved[name] = float((begun - weight).norm() / weight.norm())
        return layer

    with torch.no_grad():
        targets.replace(make)
    if moved:
        name = max(moved, key=lambda one: moved[one])
        warnings.warn(
            "lora-ga: the residuals of a 4-bit base were quantised again, so that the model does not begin at the base's output: by "
            f"{100 * moved[name]:.1f} % of the weight at most ({name})",
            UserWarning,
            stacklevel=5,
        )
