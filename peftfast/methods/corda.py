"""CorDA: the weight is taken apart along the directions that its inputs have, from the covariance of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LoRALinear
from .adapting import Targets, Unsuitable
from .initialised import check_rank, dense_weight, placeholder, residual_lora, scaling_of
from .lora import LoRAOptions
from .passes import _check_seen, visit_inputs, wide
from .registry import Paper, one_of, register
from .spectral import truncated_svd

MODES = ("ipm", "kpm")
FIRST_DAMP, INVERSE_ERROR = 0.01, 0.05


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r, lora_alpha, lora_dropout: as in LoRA. corda_method: "ipm", the r largest components, of data of the new task
    (instruction-previewed); "kpm", the r smallest, of data whose knowledge is to be kept (knowledge-preserved)."""

    r: int = 128
    lora_alpha: float = 128.0
    corda_method: str = "ipm"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("corda_method", self.corda_method, MODES)


def covariances(targets: Targets) -> dict[str, Tensor]:
    """Path -> mean over sequences of x xᵀ ``[K, K]``, each sequence over the magnitude of its largest element, as in PEFT."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def visit(name: str, x: Tensor, batch: dict[str, Any]) -> None:
        sequences = wide(x.unsqueeze(0) if x.dim() < 3 else x.reshape(-1, *x.shape[-2:]))
        largest = sequences.amax((1, 2), keepdim=True).abs()
        sequences = sequences / torch.where(largest == 0, torch.ones_like(largest), largest)
        flat = sequences.reshape(-1, x.shape[-1])
        found = flat.T @ flat
        sums[name] = found if name not in sums else sums[name].add_(found)
        counts[name] = counts.get(name, 0) + sequences.shape[0]

    visit_inputs(targets, "corda: covariances", visit)
    _check_seen(targets, sums)
    return {name: total / counts[name] for name, total in sums.items()}


def damped_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(C + d mean(diag C) I, its inverse), d = 0.01 doubled until the inverse is one (‖C C⁻¹ - I‖ < 0.05). Unsuitable: C is zero or not
    finite."""
    if not bool(covariance.isfinite().all()) or not bool(covariance.any()):
        raise Unsuitable("its inputs are zero or not finite")
    unit = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    damp = FIRST_DAMP
    while True:  # ends: the damped matrix comes ever nearer to a multiple of I
        damped = covariance + unit * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < INVERSE_ERROR:
            return damped, inverse
        damp *= 2


@register(
    "corda",
    paper=Paper(
        "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient Fine-tuning",
        "Yang et al.", 2024, "2406.05223",
    ),
    formula="y = x (W - s B0 A0 + s B A)^T; U S V^T = W C, C = E[x x^T]; B0 = U (S / s)^(1/2), A0 = (S / s)^(1/2) V^T C^-1, "
    "the r largest (ipm) or smallest (kpm) components",
    options=Options,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward",
    peft='LoraConfig(init_lora_weights="corda")',
    choices="Each sequence is divided by its largest element before the covariance, and the covariance is damped, as in PEFT. Files as "
    "for pissa. On a 4-bit base the residual is quantised again.",
    reads_data=True,
    demo={"r": 16, "lora_alpha": 16.0},
    learning_rate=5e-4,
)  # fmt: skip
def build(targets: Targets, options: Options) -> None:
    if targets.restoring:
        targets.replace(lambda name, linear: placeholder(linear, options))
        return
    found = covariances(targets)

    def make(name: str, linear: nn.Linear) -> LoRALinear:
        check_rank(linear, options.r)
        damped, inverse = damped_inverse(found[name])
        u, s, v = truncated_svd(dense_weight(linear) @ damped, min(linear.in_features, linear.out_features))
        part = slice(options.r) if options.corda_method == "ipm" else slice(-options.r, None)
        root = (s[part] / scaling_of(options)).sqrt()
        return residual_lora(linear, options, root[:, None] * (v[part] @ inverse), u[:, part] * root)

    targets.replace(make)
