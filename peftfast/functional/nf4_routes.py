"""The ways of many rows through a 4-bit weight that ``peftfast.configs.nf4_product`` names, but for the usual one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..configs import nf4_product as configs
from ..ops import nf4_product as fused
from ..ops.backends import results_are_kept
from . import overlap

FEWEST_ROWS = configs.FEWEST_ROWS
PART_MULTIPLE = 64  # rows or columns of a part: tiles of the library's products are whole


def chosen(
    x: Tensor, rows: int, quantisation: tuple[Any, ...], ranks: int, transposed: bool, masked: bool, dtype: torch.dtype
) -> configs.ProductConfig:
    # What a CPU is asked at every call, before anything else.
    if not torch.compiler.is_compiling() and not x.is_cuda and configs.choice() == "measured":
        return fused.USUAL
    _, _, block_size, shape, *nested = quantisation
    return fused.chosen(x, rows, shape, block_size, nested[0] is not None, ranks, transposed, masked, dtype)[0]


def by_parts(
    x: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    bias: Tensor | None,
    transposed: bool,
    config: configs.ProductConfig,
) -> Tensor:
    """x W̃ᵀ + bias, or x W̃, in x's dtype: runs of W̃'s rows, or of its columns, decoded and multiplied one after the other.

    Columns, not rows, for dX: the products of runs of rows would have to be summed, each with a rounding, and a pass over dX each.
    """
    absmax, code, block_size, shape, *nested = quantisation
    n, k = shape
    stored = (packed, absmax, code, block_size, shape, *nested)
    parts = configs.parted(k if transposed else n, config.parts, PART_MULTIPLE)
    y = torch.empty((x.shape[0], k if transposed else n), dtype=x.dtype, device=x.device)
    longest = parts[0][1] - parts[0][0] if parts else 0
    size = longest * (n if transposed else k)
    aside = config.route == "overlapped" and len(parts) > 1
    buffers = [torch.empty(size, dtype=x.dtype, device=x.device) for _ in range(2 if aside else 1)]

    def slab(part: int, buffer: int) -> Tensor:
        length = parts[part][1] - parts[part][0]
        return buffers[buffer][: length * (n if transposed else k)].view((n, length) if transposed else (length, k))

    def decode(part: int, buffer: int) -> None:
        if transposed:
            fused.nf4_dequantize_columns_out(*stored, slab(part, buffer), parts[part][0])
        else:
            ops.nf4.nf4_dequantize_out(*stored, slab(part, buffer), parts[part][0])

    def multiply(part: int, buffer: int) -> None:
        first, last = parts[part]
        weight = slab(part, buffer) if transposed else slab(part, buffer).T
        if bias is None:
            torch.mm(x, weight, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, weight, out=y[:, first:last])

    if aside:
        overlap.overlapped(len(parts), decode, multiply, x.device)
    else:
        for part in range(len(parts)):
            decode(part, 0)
            multiply(part, 0)
    return y


def product(
    x: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor | None:
    """x W̃ᵀ + bias, or x W̃, in the compute dtype; None where the usual way is taken."""
    config = chosen(x, x.shape[0], quantisation, 0, transposed, False, compute_dtype)
    if config.route == "dequantize":
        return None
    x = x.to(compute_dtype)
    if config.route == "fused":
        nothing = (None, None, None, None, 0.0, 1.0)
        return fused.nf4_product(x, packed, *quantisation, transposed, bias, *nothing, compute_dtype)
    return by_parts(x, packed, quantisation, None if bias is None else bias.to(compute_dtype), transposed, config)


def adapted_product(
    x: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    bias: Tensor | None,
    shrink: Callable[[], Tensor],
    lora_b: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """y and S, which ``shrink`` gives, of a layer with an adapter; None where the usual way is taken."""
    config = chosen(x, x.shape[0], quantisation, lora_b.shape[1], False, False, compute_dtype)
    if config.route == "dequantize":
        return None
    s = shrink()
    x = x.to(compute_dtype)
    adapter = (s, lora_b, lora_bias, None, 0.0, scaling, out_dtype)
    if config.route == "fused":
        return fused.nf4_product(x, packed, *quantisation, False, bias, *adapter), s
    y = by_parts(x, packed, quantisation, None if bias is None else bias.to(compute_dtype), False, config)
    return add_product(y, *adapter), s


def adapted_gradient(
    dy: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    ds: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    p: float,
    x_dtype: torch.dtype,
) -> Tensor | None:
    """dX of a layer with an adapter, dy in the compute dtype; None where the usual way is taken."""
    masked = seed is not None and p > 0.0
    config = chosen(dy, dy.shape[0], quantisation, lora_a.shape[0], True, masked, dy.dtype)
    if config.route == "dequantize":
        return None
    adapter = (ds, lora_a.T, None, seed, p, 1.0, x_dtype)
    if config.route == "fused":
        return fused.nf4_product(dy, packed, *quantisation, True, None, *adapter)
    return add_product(by_parts(dy, packed, quantisation, None, True, config), *adapter)


def add_product(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """expand in place where the result has base's dtype, else into a new tensor of ``dtype`` in the same single pass."""
    if base.dtype != dtype or results_are_kept():
        return ops.lora.lora_expand(base, s, w, bias, seed, p, scaling, dtype)
    ops.lora.lora_expand_(base, s, w, bias, seed, p, scaling)
    return base
