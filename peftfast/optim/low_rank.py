"""Directions of low rank, z = U Vᵀ / sqrt(r) (LOZO, arXiv 2410.07698): r (N + K) normals for a weight [N, K], and a linear layer's
move is an adapter's forward, so that its weight is read as it is and no moved one exists."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def serves(parameter: Tensor, rank: int | None) -> bool:
    """Whether a parameter's direction is of low rank: matrices that are larger than it either way. Told by the shape alone, so that a
    replay knows it too."""
    return rank is not None and parameter.dim() == 2 and min(parameter.shape) > rank


def factors(parameter: Tensor, seed: Tensor, tensor_id: int, rank: int, rademacher: bool) -> tuple[Tensor, Tensor]:
    """(U / sqrt(r) ``[N, r]``, V ``[K, r]``), float32: the first r N and the next r K elements of the tensor's direction."""
    rows, columns = parameter.shape
    u = ops.zeroth_order.perturbation(seed, (rows, rank), tensor_id, 0, rademacher, torch.float32)
    v = ops.zeroth_order.perturbation(seed, (columns, rank), tensor_id, rows * rank, rademacher, torch.float32)
    return u * rank**-0.5, v


def move_(weight: Tensor, seed: Tensor, scale: Tensor, tensor_id: int, rank: int, rademacher: bool) -> None:
    """weight += scale z, rounded to nearest once."""
    u, v = factors(weight, seed, tensor_id, rank, rademacher)
    ops.lora.lora_expand_(weight, u * scale, v, None, None, 0.0, 1.0)
    torch.autograd.graph.increment_version(weight)


def update_(weight: Tensor, seeds: Tensor, coefficients: Tensor, tensor_id: int, rank: int, rademacher: bool) -> None:
    """weight += sum of coefficients[k] z(seeds[k]) in one pass over it: the factors of all terms side by side are factors again."""
    pairs = [factors(weight, seeds[k : k + 1], tensor_id, rank, rademacher) for k in range(seeds.numel())]
    left = torch.cat([u * coefficients[k] for k, (u, _) in enumerate(pairs)], dim=1)
    ops.lora.lora_expand_(weight, left, torch.cat([v for _, v in pairs], dim=1), None, None, 0.0, 1.0)
    torch.autograd.graph.increment_version(weight)


def add_to_(y: Tensor, x: Tensor, u: Tensor, v: Tensor, half: int | None = None) -> None:
    """y ``[M, N]`` += (x V) Uᵀ, in place; from row ``half`` on it is taken away."""
    s = ops.lora.lora_shrink(x, v.T.contiguous(), None, 0.0, 1.0, y.dtype)
    if half is not None:
        s[half:].neg_()
    ops.lora.lora_expand_(y, s, u, None, None, 0.0, 1.0)
