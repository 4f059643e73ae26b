"""The layers in plain PyTorch, where :func:`.derivatives.by_definition` says so: torch's own operators have every derivative, and a
rule for every transform. Nothing is checked here. Products are in the compute dtype; seeds drop what they drop in the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..reference import lora as definition
from ..reference import nf4 as nf4_definition
from ..reference.philox import dropout
from ..reference.sparse_delta import wide_dtype
from .nf4 import NF4Weight, dequantized


class Term(NamedTuple):
    """What an adapter is here: the fields of Adapter and of Projection that are read."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    lora_bias: Tensor | None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight):
        packed, *quantisation = weight.storage()
        if torch._C._functorch.is_functorch_wrapped_tensor(
            packed
        ):  # a batch of weights, which the operator cannot take
            absmax, code, block_size, shape, *nested = quantisation
            return nf4_definition.nf4_dequantize(packed, absmax, code, block_size, shape, dtype, *nested)
        return dequantized(packed, tuple(quantisation), dtype)
    return weight.to(dtype)


def linear(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    return functional.linear(x.to(dtype), dense(weight, dtype), _cast(bias, dtype)).to(out_dtype)


def adapted(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    terms: Sequence[Any],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: Sequence[float],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """x Wᵀ + b and the terms, objects with the fields of Adapter, each in the rows that name it or in all; a seed for each term."""
    adapters = [
        {
            "lora_a": term.lora_a.to(dtype),
            "lora_b": term.lora_b.to(dtype),
            "scaling": float(term.scaling),
            "lora_bias": _cast(term.lora_bias, dtype),
            "dropout_p": ps[i],
            "seed": None if seeds is None else seeds[i : i + 1],
        }
        for i, term in enumerate(terms)
    ]
    given = (x.to(dtype), dense(weight, dtype), adapters, rows)
    return definition.multi_lora_linear(*given, bias=_cast(bias, dtype)).to(out_dtype)


def dora(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    magnitude: Tensor,
    term: Any,
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """DoRA as PEFT computes it; the gain, a quotient of norms that begins as 1, in float32 or wider."""
    wide, scaling = wide_dtype(dtype), float(term.scaling)
    kept = weight.dtype if isinstance(weight, NF4Weight) else dtype
    norm = definition.weight_norm(dense(weight, kept).to(wide), term.lora_a.to(wide), term.lora_b.to(wide), scaling)
    gain = (magnitude.to(wide) / norm).to(wide)
    rows, own = x.reshape(-1, x.shape[-1]).to(dtype), dense(weight, dtype)
    dropped = dropout(rows, seed, p)
    delta = (dropped @ term.lora_a.to(dtype).T) @ term.lora_b.to(dtype).T
    if term.lora_bias is not None:
        delta = delta + term.lora_bias.to(dtype)
    y = functional.linear(rows, own, _cast(bias, dtype)) + (gain - 1) * functional.linear(dropped, own)
    return (y + gain * (scaling * delta)).to(out_dtype).reshape(*x.shape[:-1], own.shape[0])


def group(
    x: Tensor,
    projections: Sequence[tuple[Tensor | NF4Weight, Tensor | None, Tensor | None]],
    terms: Sequence[Sequence[Any]],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: Sequence[float],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """What :func:`.lora_multi.apply_group` gives; ``seeds`` and ``ps`` are of all terms one after the other."""
    results, begin = [], 0
    for (weight, bias, magnitude), own in zip(projections, terms, strict=True):
        end = begin + len(own)
        of_own = None if seeds is None else seeds[begin:end]
        if magnitude is None:
            y = adapted(x, weight, bias, own, rows, of_own, ps[begin:end], dtype, out_dtype)
        else:
            y = dora(x, weight, bias, magnitude, own[0], of_own, ps[begin], dtype, out_dtype)
        results.append(y)
        begin = end
    return tuple(results)


def sparse(
    x: Tensor,
    weight: Tensor | NF4Weight,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """x (W + Δ)ᵀ + b; each entry on the support is a float32 sum rounded once."""
    base, at, wide = dense(weight, dtype), indices.long(), wide_dtype(dtype)
    flat = base.reshape(-1)
    sums = (flat[at].to(wide) + values.to(wide)).to(dtype)
    return linear(x, flat.index_put((at,), sums).reshape(base.shape), bias, dtype, out_dtype)
