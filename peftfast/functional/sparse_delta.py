"""A linear layer on a frozen weight and a sparse delta: one autograd Function over the operators of ``peftfast.ops.sparse_delta``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..configs import sparse_delta as configs
from ..ops.backends import (
    FLOAT_DTYPES,
    constant_when_compiled,
    cuda_device,
    dtype_name,
    results_are_kept,
    takes_triton,
    triton_available,
)
from ..reference import sparse_delta as definition
from . import plain
from .derivatives import by_definition, once_differentiable, refuse_tangents
from .nf4 import NF4Weight, check_features, check_vector
from .precision import autocast_off, autocast_on, compute_dtype_of
from .sparse_pattern import SparsePattern, check_indices, trusted

Observer = Callable[[Tensor, Tensor], None]
_DENSE = (None,) * 7


def patched(
    weight: Tensor, quantisation: tuple[Any, ...], pattern: SparsePattern, values: Tensor, dtype: torch.dtype
) -> Tensor:
    """W + Δ in ``dtype``, a new tensor: a dense weight is copied, a 4-bit one decoded, and patched in the same pass."""
    values, indices = values.to(definition.wide_dtype(dtype)).contiguous(), pattern.indices
    if quantisation[0] is not None:
        absmax, code, block_size, shape, *nested = quantisation
        starts, run = None, 0
        if weight.is_cuda and triton_available()[0] and dtype in FLOAT_DTYPES and pattern.count <= 2**31 - 1:
            run = ops.sparse_dequantize.run_length(weight.device, dtype, block_size, nested[0] is not None)
            starts = pattern.runs(run)
        given = (weight, absmax, code, block_size, shape, *nested, indices, values, starts, run, dtype)
        return ops.sparse_dequantize.sparse_delta_dequantize(*given)
    if weight.dtype == dtype and weight.is_contiguous():
        return ops.sparse_delta.sparse_delta_patch(weight, indices, values)
    else:
        dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        dense.copy_(weight)
    ops.sparse_delta.sparse_delta_patch_(dense, indices, values)
    return dense


def apart_rows(device_type: str, pattern: SparsePattern, block_size: int | None, compute_dtype: torch.dtype) -> int:
    """Up to how many rows of x a weight (``block_size``: of one in 4 bits) is neither copied nor decoded for the delta in the forward,
    which is a product of its own."""
    if compute_dtype not in FLOAT_DTYPES or not ops.sparse_delta.product_is_fused(device_type):
        return 0
    rows = configs.apart_rows(device_type, pattern.density)
    if block_size is None:
        return rows
    return min(rows, ops.nf4_linear.most_rows(device_type, pattern.shape[1], block_size, compute_dtype))


def _product_apart(
    x: Tensor,
    weight: Tensor,
    quantisation: tuple[Any, ...],
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    x = x.to(compute_dtype)
    if quantisation[0] is not None:
        # The base's sums in float32, the delta's added to them, and one rounding at the end.
        adapter = (bias, None, None, None, 1.0)
        y, _ = ops.nf4_linear.nf4_linear_now(x, weight, *quantisation, *adapter, compute_dtype, torch.float32)
    else:
        y = functional.linear(x, weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    if results_are_kept():
        y = y.clone()
    ops.sparse_delta.sparse_delta_product_(y, x, indices, values.to(torch.float32).contiguous())
    return y if y.dtype == compute_dtype else y.to(compute_dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b; on a GPU the sums of 16-bit operands come out in float32 as they were formed."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _taken(matrix: Tensor, numbers: slice | Tensor) -> Tensor:
    """Columns of a matrix: a view where they lie side by side."""
    return matrix[:, numbers] if isinstance(numbers, slice) else matrix.index_select(1, numbers)


def _slab_dvalues(dy: Tensor, x: Tensor, pattern: SparsePattern, sliced: bool, dtype: torch.dtype) -> Tensor:
    """The gradient of a structured support by dense products, of all blocks in one launch. ``sliced``: x holds the columns alone that
    the pattern takes."""
    if pattern.structure == "blocks":
        table = pattern.blocks(sliced)
        return ops.sparse_delta.sparse_delta_blocks(dy, x, table, pattern.block_size, pattern.count, dtype)
    taken = pattern.taken()
    if pattern.structure == "rows":
        return _wide_product(_taken(dy, taken).T, x).reshape(-1).to(dtype)
    return _wide_product(dy.T, x if sliced else _taken(x, taken)).reshape(-1).to(dtype)


@constant_when_compiled  # which cannot follow the reading of a GPU's table
def _tile_sides(index: int, dtype: str, density: float) -> tuple[int, int] | None:
    """The tiles by which a GPU forms the gradient of a support of this density; None where it gathers columns."""
    device = cuda_device(index)
    if not (triton_available()[0] and device.tensor_cores) or density < configs.crossover(dtype, device):
        return None
    return configs.tile_sides(dtype, device)


def dvalues(dy: Tensor, x: Tensor, pattern: SparsePattern, dtype: torch.dtype) -> Tensor:
    """The entries of dyᵀ x on a pattern's support, of ``dtype``, without a dense dyᵀ x; dy ``[M, N]``, x ``[M, K]`` of one dtype.

    On a GPU by gathered columns below the crossover density, by tiles above it (in a compiled call where an eager one has sorted the
    support by tiles); slabs by dense products.
    """
    if pattern.structure is not None:
        return _slab_dvalues(dy, x, pattern, False, dtype)
    if dy.is_cuda and takes_triton(dy, x)[0] and pattern.count <= 2**31 - 1:
        sides = _tile_sides(dy.get_device(), dtype_name(dy.dtype), pattern.density)
        if sides is not None and (not torch.compiler.is_compiling() or pattern.has_tiles(*sides)):
            tiles = pattern.tiles(*sides)
            return ops.sparse_delta.sparse_delta_dvalues_tiled(dy, x, pattern.indices, *tiles, *sides, dtype)
    return ops.sparse_delta.sparse_delta_dvalues(dy, x, pattern.indices, dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    pattern: SparsePattern,
    resident: bool,
    observer: Observer | None,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
    absmax: Tensor | None,
    code: Tensor | None,
    block_size: int | None,
    shape: Any,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
) -> Tensor:
    quantisation = (absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    if not resident and 0 < x.shape[0] <= apart_rows(x.device.type, pattern, block_size, compute_dtype):
        y = _product_apart(x, weight, quantisation, indices, values, bias, compute_dtype)
    else:
        dense = weight.to(compute_dtype) if resident else patched(weight, quantisation, pattern, values, compute_dtype)
        y = functional.linear(x.to(compute_dtype), dense, None if bias is None else bias.to(compute_dtype))
    # Not `.to` where nothing changes: torch 2.11's compiler gives a Function whose result is such a call gradients of zero.
    return y if y.dtype == out_dtype else y.to(out_dtype)


class SparseDeltaLinearFunction(torch.autograd.Function):
    """x (W + Δ)ᵀ + b on a matrix x. Saved: x only where Δ or W needs a gradient (of a support of columns or blocks those columns of x
    alone that it takes); W itself, never the patched weight, which is made again in the backward.

    ``resident``: W holds the delta already, so that both products are plain ones. ``observer`` is handed dy and x in the backward.
    """

    # ctx in the forward: setup_context binds the arguments by signature, which takes as long as a row's product.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        x, weight, values, bias, indices, pattern, resident, observer, compute_dtype, _, *quantisation = inputs
        absmax, code, block_size, shape, *nested = quantisation
        needs_x, needs_weight, needs_values = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)
        ctx.sliced = pattern.structure in ("columns", "blocks") and not needs_weight and observer is None
        kept = x if needs_values or needs_weight else None
        if kept is not None and ctx.sliced:
            taken = _taken(x, pattern.taken())
            # A view would keep all of x: side by side or not, these columns are copied. Of blocks that take them all, nothing is.
            ctx.sliced = taken.shape != x.shape
            kept = taken.clone() if ctx.sliced else x
        ctx.save_for_backward(
            kept,
            weight if needs_x else None,
            values if needs_x and not resident else None,
            indices,
            *((absmax, code, *nested) if needs_x else (None,) * 5),
        )
        ctx.pattern, ctx.resident, ctx.observer, ctx.compute_dtype = pattern, resident, observer, compute_dtype
        ctx.block_size, ctx.shape = block_size, shape
        ctx.x_dtype, ctx.weight_dtype, ctx.values_dtype = x.dtype, weight.dtype, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 17
        x, weight, values, indices, absmax, code, *nested = ctx.saved_tensors
        needs_x, needs_weight, needs_values, needs_bias = ctx.needs_input_grad[:4]
        dtype, pattern = ctx.compute_dtype, ctx.pattern
        dx = dweight = dv = dbias = None
        with autocast_off(dy.device.type):
            dy = dy.to(dtype)
            if needs_x:
                if ctx.resident:
                    dense = weight.to(dtype)
                else:
                    quantisation = (absmax, code, ctx.block_size, ctx.shape, *nested)
                    dense = patched(weight, quantisation, pattern, values, dtype)
                dx = (dy @ dense).to(ctx.x_dtype)
                del dense
            if needs_values or needs_weight:
                x = x.to(dtype)
            if needs_values:
                if pattern.structure is not None:
                    dv = _slab_dvalues(dy, x, pattern, ctx.sliced, ctx.values_dtype)
                else:
                    dv = dvalues(dy, x, pattern, ctx.values_dtype)
                if ctx.observer is not None:
                    ctx.observer(dy, x)
            if needs_weight:
                dweight = (dy.T @ x).to(ctx.weight_dtype)
            if needs_bias:
                dbias = dy.sum(0, dtype=definition.wide_dtype(dtype)).to(ctx.bias_dtype)
        return dx, dweight, dv, dbias, *(None,) * 13


def check_arguments(
    x: Tensor,
    weight: Tensor | NF4Weight,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    cast_weight: bool,
) -> None:
    if not isinstance(weight, Tensor | NF4Weight):
        raise TypeError(f"weight: expected a tensor or an NF4Weight, got {type(weight).__name__}")
    check_features(x, tuple(weight.shape))
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(
                f"weight: expected a floating tensor, got {weight.dtype}; a 4-bit weight is passed as an NF4Weight"
            )
        if weight.dtype != dtype and not cast_weight:
            raise TypeError(f"weight: expected {dtype} beside x and autocast as they are, got {weight.dtype}")
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(f"x, compute_dtype: expected a product in {FLOAT_DTYPES} or torch.float64, got {dtype}")
    for name, tensor in (("weight", weight), ("values", values)):
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of {tensor.layout}")
    if tuple(pattern.shape) != tuple(weight.shape):
        raise ValueError(
            f"pattern: expected one of shape {tuple(weight.shape)} as weight's, got {tuple(pattern.shape)}"
        )
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values: expected a floating tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if tuple(values.shape) != (pattern.count,):
        raise ValueError(f"values: expected shape ({pattern.count},) as the pattern's, got {tuple(values.shape)}")
    for name, device in (("weight", weight.device), ("pattern", pattern.device), ("values", values.device)):
        if device != x.device:
            raise ValueError(f"{name}: expected on {x.device} beside x, got on {device}")
    check_vector("bias", bias, weight.shape[0], x)


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    pattern: SparsePattern | Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (W + Δ)ᵀ + b with Δ on a sparse support, on a dense or a 4-bit W (SpIEL, arXiv 2401.16405; SHiRA, 2406.13175).

    Each entry of W + Δ is the float32 sum rounded once to the compute dtype. But of few rows (on a CPU up to 32) W is
    neither copied nor decoded for the delta: x Δᵀ is added in float32 to x Wᵀ, of a 4-bit W to its float32 sums, where the support is
    small (``configs.sparse_delta.apart_rows``). The result is then nearer to x (W + Δ)ᵀ than by a rounded W + Δ. W is never written.
    The gradient of ``values`` is formed on the support alone, in float32. Double backward is not supported.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16 (float64 runs on the definition); any strides.
        weight: ``[N, K]`` in the compute dtype, or an :class:`NF4Weight` of that shape, which stays packed.
        pattern: a :class:`SparsePattern`, or its indices, which are then validated at every call: a pass over them, and on a GPU a
            host synchronisation.
        values: ``[S]`` floating, in the order of the indices; its gradient comes back in its dtype.
        bias: ``[N]``.
        compute_dtype: of the product; autocast's or x's if not given. The result has x's dtype where this is given.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(pattern, SparsePattern):
        if not isinstance(pattern, Tensor):
            raise TypeError(f"pattern: expected a SparsePattern or a tensor of indices, got {type(pattern).__name__}")
        if not hasattr(weight, "shape") or len(weight.shape) != 2:
            raise ValueError(f"weight: expected shape (N, K), got {tuple(getattr(weight, 'shape', ()))}")
        check_indices(pattern, weight.shape)
        pattern = trusted(pattern, torch.Size(weight.shape))
    dtype = compute_dtype_of(x, compute_dtype) if isinstance(x, Tensor) else torch.float32
    cast_weight = compute_dtype is not None or (isinstance(x, Tensor) and autocast_on(x.device.type))
    check_arguments(x, weight, pattern, values, bias, dtype, cast_weight)
    return apply(x, weight, pattern, values, bias, dtype, x.dtype if compute_dtype is not None else dtype)


def apply(
    x: Tensor,
    weight: Tensor | NF4Weight,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    resident: bool = False,
    observer: Observer | None = None,
) -> Tensor:
    """The layer without its checks, and with what only a module can ask for: a resident delta, an observer of the backward."""
    if not resident and by_definition():  # whose gradients no observer is shown
        with autocast_off(x.device.type):
            return plain.sparse(x, weight, pattern.indices, values, bias, dtype, out_dtype)
    base, *quantisation = weight.storage() if isinstance(weight, NF4Weight) else (weight, *_DENSE)
    with autocast_off(x.device.type):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        # Past autograd where nothing is recorded: its bookkeeping takes as long as a few rows' product.
        records = torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or base.requires_grad or (bias is not None and bias.requires_grad)
        )
        if not records:
            refuse_tangents(x, values, base, bias)
        call = SparseDeltaLinearFunction.apply if records else _forward
        y = call(
            rows, base, values, bias, pattern.indices, pattern, resident, observer, dtype, out_dtype, *quantisation
        )
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])
