"""LoRA (Hu et al., arXiv 2106.09685) as the passes that the fused layer is made of.

Dimensions: M rows of x, K input features, N output features, R the rank. Each function is the definition of the operator of the
same name in ``peftfast.ops.lora``; :func:`lora_linear` is the whole layer, differentiable by autograd, and what the passes and
their backward are checked against. Every product is computed in the dtype of its arguments.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .philox import dropout


def lora_shrink(x: Tensor, w: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling * dropout(x) wᵀ with x ``[M, K]`` and w ``[R, K]`` -> ``[M, R]`` of ``dtype``, which is the compute dtype."""
    return (dropout(x.to(dtype), seed, p) @ w.to(dtype).T) * scaling


def lora_expand(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """base + dropout(scaling * (s wᵀ + bias)) with base ``[M, N]``, s ``[M, R]``, w ``[N, R]`` -> ``[M, N]`` of ``dtype``."""
    delta = s @ w.to(s.dtype).T
    if bias is not None:
        delta = delta + bias.to(s.dtype)
    return base.to(dtype) + dropout(delta * scaling, seed, p).to(dtype)


def lora_weight_grad(
    ds: Tensor, x: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    """scaling * dsᵀ dropout(x) with ds ``[M, R]`` and x ``[M, K]`` -> ``[R, K]`` of ``dtype``; the product in ds's dtype."""
    return ((ds.T @ dropout(x.to(ds.dtype), seed, p)) * scaling).to(dtype)


def lora_dy_grads(dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the backward needs of dy ``[M, N]``: ds = scaling * dy b ``[M, R]`` in dy's dtype and db = scaling * dyᵀ s ``[N, R]`` of
    ``dtype``."""
    return (dy @ b.to(dy.dtype)) * scaling, ((dy.T @ s.to(dy.dtype)) * scaling).to(dtype)


def weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Row norms ``[N]`` of W + scaling * B A, detached, as DoRA divides by (Liu et al., arXiv 2402.09353, section 4.3)."""
    return torch.linalg.vector_norm((weight + scaling * (lora_b @ lora_a)).detach(), dim=1)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + scaling * (dropout(x) Aᵀ Bᵀ + lora_bias), and with ``magnitude`` PEFT's DoRA.

    Args:
        x: ``[..., K]``. weight: ``[N, K]``. lora_a: ``[R, K]``. lora_b: ``[N, R]``. bias, lora_bias, magnitude: ``[N]``.
        seed: one int64 element; the mask is that of x flattened to ``[M, K]``.

    DoRA, with g = magnitude / norm and x̂ = dropout(x): the base term is x Wᵀ + b + (g - 1) x̂ Wᵀ, where x̂ = x without dropout,
    and the adapter's product is multiplied by g.
    """
    rows = x.reshape(-1, x.shape[-1])
    dropped = dropout(rows, seed, dropout_p)
    y = functional.linear(rows, weight, bias)
    delta = (dropped @ lora_a.T) @ lora_b.T
    if lora_bias is not None:
        delta = delta + lora_bias
    if magnitude is not None:
        gain = magnitude / weight_norm(weight, lora_a, lora_b, scaling).to(magnitude.dtype)
        y = y + (gain - 1) * functional.linear(dropped, weight)
        delta = gain * delta
    return (y + scaling * delta).reshape(*x.shape[:-1], weight.shape[0])
