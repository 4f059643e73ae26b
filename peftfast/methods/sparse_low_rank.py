"""Sparse plus low-rank: DSEE on a pretrained weight, SLTrain in the place of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional import SparsePattern
from ..nn import RoSALinear
from .adapting import Targets, Unsuitable, is_four_bit
from .factored import FactoredLinear
from .registry import Paper, above_zero, at_least_one, probability, register
from .spectral import truncated_svd


@dataclass(frozen=True)
class DSEEOptions:
    """r, lora_alpha: of the low-rank part, scaling lora_alpha / r. active: weights of each layer in the sparse part. sparsity: part of
    the base's smallest weights that is set to 0."""

    r: int = 16
    lora_alpha: float = 16.0
    active: int = 64
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        at_least_one("active", self.active)
        above_zero("lora_alpha", self.lora_alpha)
        probability("sparsity", self.sparsity)


@torch.no_grad()
def residual_support(weight: Tensor, rank: int, active: int) -> SparsePattern:
    """Where W is worst described by its best approximation of a rank: the ``active`` largest entries of the remainder."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, v = truncated_svd(wide, min(rank, *wide.shape))
    remainder = (wide - (u * s) @ v).abs()
    return F.choose_support(wide, min(active, wide.numel()) / wide.numel(), scores=remainder)


@register(
    "dsee",
    paper=Paper(
        "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
        "Chen et al.",
        2021,
        "2111.00160",
    ),
    formula="y = x (M * W + S + (alpha / r) B A)^T, S where W - W_r is largest, M a magnitude mask of the base",
    options=DSEEOptions,
    reduces_to="sparse_delta, and torch's own products for the low-rank part",
    kind="layer",
    fused="the sparse part's gradient of its values; the low-rank part is two products of torch",
    choices="W_r is W's truncated SVD, where the paper decomposes by GreBsmo. The mask M is by magnitude and made at once, "
    "before the training; "
    "its sparsity is 0 unless asked for. The support of S is chosen on the unmasked W.",
    demo={"r": 16, "active": 64},
)
def build_dsee(targets: Targets, options: DSEEOptions) -> None:
    def make(name: str, linear: nn.Linear) -> RoSALinear:
        if is_four_bit(linear):
            raise Unsuitable("its low-rank part takes a dense weight, not one in 4 bits")
        pattern = residual_support(linear.weight, options.r, options.active)
        base = _pruned(linear, options.sparsity) if options.sparsity else linear
        return RoSALinear.from_linear(base, r=options.r, lora_alpha=options.lora_alpha, indices=pattern)

    targets.replace(make)


@torch.no_grad()
def _pruned(linear: nn.Linear, sparsity: float) -> nn.Linear:
    """A copy whose smallest weights are 0; the given layer stays."""
    flat = linear.weight.detach().clone().reshape(-1)
    order = torch.sort(flat.abs().float(), stable=True).indices
    flat[order[: round(sparsity * flat.numel())]] = 0
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    new.weight = nn.Parameter(flat.reshape(linear.weight.shape), requires_grad=False)
    new.register_parameter("bias", linear.bias)
    return new.train(linear.training)


@dataclass(frozen=True)
class SLTrainOptions:
    """r, lora_alpha: of the low-rank part, scaling lora_alpha / r. density: of the sparse part. seed: of its places."""

    r: int = 128
    lora_alpha: float = 32.0
    density: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)
        if not isinstance(self.density, float) or not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a part in (0, 1], got {self.density!r}")


class SLTrainLinear(FactoredLinear):
    """y = x (s B A + S)ᵀ + b: ``lora_A`` ``[r, K]``, ``lora_B`` ``[N, r]`` and ``values`` at the fixed random ``support``
    are the weight;
    that of ``base_layer`` is not used until the layer is merged."""

    support: Tensor

    def __init__(self, linear: nn.Linear, options: SLTrainOptions, generator: torch.Generator) -> None:
        super().__init__(linear)
        self.scaling = options.lora_alpha / options.r
        like = torch.empty((), device=self.weight.device).expand(self.out_features, self.in_features)
        self._pattern = F.choose_support(like.cpu(), options.density, generator=generator).to(self.weight.device)
        self.register_buffer("support", self._pattern.indices)
        self.lora_A = self.new_parameter(options.r, self.in_features)
        self.lora_B = self.new_parameter(self.out_features, options.r)
        self.values = self.new_parameter(self._pattern.count)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.uniform_(self.values, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            out: Tensor = self.base_layer(input)
            return out
        if self._pattern.indices.device != self.support.device:
            self._pattern = self._pattern.to(self.support.device)
        weight = (self.scaling * (self.lora_B @ self.lora_A)).to(input.dtype)
        return F.sparse_delta_linear(input, weight, self._pattern, self.values, self.bias)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        flat = (self.scaling * (self.lora_B @ self.lora_A)).reshape(-1)
        return flat.index_add(0, self.support.long(), self.values).reshape(self.out_features, self.in_features)

    def after_load(self) -> None:
        self._pattern = SparsePattern(self.support, torch.Size((self.out_features, self.in_features)))


@register(
    "sltrain",
    paper=Paper(
        "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        "Han et al.",
        2024,
        "2406.02214",
    ),
    formula="y = x ((alpha / r) B A + S)^T, S on a fixed random support, in the place of W: for pretraining",
    options=SLTrainOptions,
    reduces_to="sparse_delta on the product of two factors",
    kind="layer",
    fused="the sparse part's patch of the weight and its gradient; the product of the factors is torch's",
    choices="W is left unused, as in training from scratch. A is Kaiming-uniform, B zero, S uniform within 1 / sqrt(K).",
    exact=False,
    demo={"r": 128, "lora_alpha": 128.0, "density": 0.05},
)
def build_sltrain(targets: Targets, options: SLTrainOptions) -> None:
    generator = torch.Generator().manual_seed(options.seed)

    def make(name: str, linear: Any) -> SLTrainLinear:
        if is_four_bit(linear):
            raise Unsuitable("its weight is replaced, and must be dense")
        return SLTrainLinear(linear, options, generator)

    targets.replace(make)
