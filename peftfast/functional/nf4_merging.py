"""An adapter put into a 4-bit weight: into 4 bits again, or into a dense matrix."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .nf4 import NF4Weight, nest, nf4_dequantize

# Elements of a float32 slab: 64 MB, the most that merging takes beside its result.
_SLAB = 16 * 2**20


def _check(nf4: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4: expected an NF4Weight, got {type(nf4).__name__}")
    if len(nf4.shape) != 2:
        raise ValueError(f"nf4: expected a weight of shape (N, K), got {tuple(nf4.shape)}")
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating tensor, got {getattr(factor, 'dtype', type(factor).__name__)}"
            )
        if factor.device != nf4.device:
            raise ValueError(f"{name}: expected on {nf4.device} beside nf4, got on {factor.device}")
    n, k = nf4.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: expected shape (R, {k}), got {tuple(lora_a.shape)}")
    if tuple(lora_b.shape) != (n, lora_a.shape[0]):
        raise ValueError(f"lora_b: expected shape {(n, lora_a.shape[0])}, got {tuple(lora_b.shape)}")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: expected {lora_a.dtype} as lora_a is, got {lora_b.dtype}")
    if not isinstance(scaling, numbers.Real):
        raise TypeError(f"scaling: expected a Python number, got {type(scaling).__name__}")


def _merged_rows(nf4: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, first: int, rows: int) -> Tensor:
    """Rows of W̃ + (B A) scaling: W̃ in the weight's own dtype, the product in the adapters', the sum in the wider, as PEFT has it."""
    dense = torch.empty((rows, nf4.shape[1]), dtype=nf4.dtype, device=nf4.device)
    nf4_dequantize(nf4, out=dense, first_row=first)
    return dense + (lora_b[first : first + rows] @ lora_a) * scaling


@torch.no_grad()
def nf4_merge(nf4: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> NF4Weight:
    """W̃ + scaling B A quantised anew, on the weight's device, with its block size, type and nesting.

    The bytes are those of PEFT's own merge into a 4-bit layer, which goes by way of the CPU. The weight is taken in slabs of rows, so
    that beside the result at most 64 MB of float32 and as much in ``nf4.dtype`` live (one block of rows, where that is more). What
    is given stays as it is: keep it, and putting it back restores its bytes.

    Args:
        nf4: of shape ``(N, K)``. lora_a: ``[R, K]``. lora_b: ``[N, R]``, of lora_a's dtype. scaling: a Python number.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    merged: Any = merged_weight(nf4, lora_a, lora_b, scaling)
    return merged


def merged_weight(
    nf4: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, finite: bool = False
) -> NF4Weight | None:
    """:func:`nf4_merge`; None where the sum has to be ``finite``, which costs a synchronisation a slab, and is not."""
    _check(nf4, lora_a, lora_b, scaling)
    n, k = nf4.shape
    # Slabs begin where a block and a byte begin.
    step = nf4.block_size // _greatest_divisor(nf4.block_size, k)
    rows = max(step, _SLAB // max(k, 1) // step * step)
    packed, absmax = [], []
    for first in range(0, n, rows):
        slab = _merged_rows(nf4, lora_a, lora_b, scaling, first, min(rows, n - first))
        if finite and not bool(slab.isfinite().all()):
            return None
        slab_packed, slab_absmax = ops.nf4.nf4_quantize(slab, nf4.block_size, nf4.code)
        packed.append(slab_packed)
        absmax.append(slab_absmax)
    maxima = torch.cat(absmax) if len(absmax) > 1 else absmax[0]
    nested: dict[str, Any] = {}
    if nf4.nested:
        maxima, nested = nest(maxima)
    bytes_ = torch.cat(packed) if len(packed) > 1 else packed[0]
    return NF4Weight(bytes_, maxima, nf4.code, nf4.block_size, nf4.shape, nf4.dtype, nf4.quant_type, **nested)


def _greatest_divisor(block_size: int, k: int) -> int:
    """Of a power of two and k: what both share."""
    return min(block_size, k & -k)


@torch.no_grad()
def nf4_merge_dense(
    nf4: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """W̃ + scaling B A as a dense ``[N, K]`` matrix in ``dtype`` (``nf4.dtype`` if not given), summed before it is rounded.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check(nf4, lora_a, lora_b, scaling)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
    n, k = nf4.shape
    merged = torch.empty((n, k), dtype=dtype or nf4.dtype, device=nf4.device)
    rows = max(1, _SLAB // max(k, 1))
    for first in range(0, n, rows):
        count = min(rows, n - first)
        merged[first : first + count] = _merged_rows(nf4, lora_a, lora_b, scaling, first, count)
    return merged
