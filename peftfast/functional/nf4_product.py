"""The linear layer on a 4-bit weight, and the ways that its product with an adapter can take.

A few rows go through one operator that decodes the weight on the way (``peftfast.ops.nf4_linear``). Many rows dequantise into a
buffer that lives during the product and no longer, and multiply by the library, unless ``nf4_routes`` has another way for them. With an
adapter the buffer can take it in: ``configs.nf4.adapter_route`` says when.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..configs import nf4 as configs
from ..configs import nf4_product as product_configs
from . import nf4_routes as routes
from . import plain
from .derivatives import by_definition, refuse_tangents
from .nf4 import NF4Weight, check_features, check_vector, dequantized
from .node import watch
from .precision import autocast_off, cache_signature, compute_dtype_of

# Process-wide, not of a thread: a backward pass runs on threads of autograd's own.
_switches = {"shared": False, "merged": False}
watch(_switches)


@contextlib.contextmanager
def _switched(name: str) -> Iterator[None]:
    before = _switches[name]
    _switches[name] = True
    try:
        yield
    finally:
        _switches[name] = before


def shared_dequantization() -> contextlib.AbstractContextManager[None]:
    """Within the block a 4-bit layer keeps the weight that its forward dequantised for dX, instead of dequantising again.

    Meant for activation checkpointing: the forward that is recomputed and dX then share one dequantisation, two a step instead of
    three. The price is the dense weights of what is recomputed at once, N K elements of the compute dtype a layer: 436 MB for a block
    of Llama-3-8B in bfloat16. Without checkpointing it would be the whole model's dense weights. Forward and backward must both run
    within the block; the switch is the process's.
    """
    return _switched("shared")


def merged_dequantization() -> contextlib.AbstractContextManager[None]:
    """Within the block, where no gradient is recorded and nothing is dropped, an adapter is added to the dequantised weight before
    the product: W̃ + s B A in the compute dtype, then one library product and no pass for the adapter.

    For evaluation and for the first forward of re-entrant checkpointing. It costs 2 N K R operations a call, so it pays for more than
    about N K / (N + K) rows; it rounds W̃ + s B A once more to the compute dtype, so that results differ from the unmerged ones by
    about a rounding of the weight, and changes smaller than that vanish. Therefore opt-in. The switch is the process's.
    """
    return _switched("merged")


def keeps_dense() -> bool:
    return _switches["shared"]


def takes_few_rows(x: Tensor, shape: Any, block_size: int, compute_dtype: torch.dtype) -> bool:
    """Whether this many rows are for the operator that decodes on the way. No rows are left to the library."""
    return 0 < x.shape[0] <= ops.nf4_linear.most_rows(x.device.type, shape[1], block_size, compute_dtype)


def has_a_way_alone(x: Tensor, weight: NF4Weight, ranks: int, compute_dtype: torch.dtype) -> bool:
    """Whether a layer with an adapter of so many ranks on this weight multiplies x ``[..., K]`` otherwise than by the weight
    dequantised for that one product: which is all that a group of layers does."""
    if _switches["shared"] or _switches["merged"]:
        return True
    rows = x.shape[:-1].numel()
    if 0 < rows <= ops.nf4_linear.most_rows(x.device.type, weight.shape[1], weight.block_size, compute_dtype):
        return True
    return routes.chosen(x, rows, weight.storage()[1:], ranks, False, False, compute_dtype).route != "dequantize"


def product_without_gradient(
    x: Tensor,
    weight: NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor | None:
    """y where nothing is dropped and no gradient is recorded: of a few rows past autograd, whose bookkeeping takes as long as a
    quarter of the product; merged as :func:`merged_dequantization` says; None where neither applies."""
    few = takes_few_rows(x, weight.shape, weight.block_size, compute_dtype)
    if not (few and x.shape[0] < routes.FEWEST_ROWS) and not _switches["merged"]:
        packed, *quantisation = weight.storage()
        shrunk = functools.partial(ops.lora.lora_shrink, x, lora_a, None, 0.0, 1.0, compute_dtype)
        rest = (shrunk, lora_b, lora_bias, scaling, compute_dtype, out_dtype)
        if (done := routes.adapted_product(x, packed, tuple(quantisation), bias, *rest)) is not None:
            return done[0]
    if few:
        adapter = (bias, lora_a, lora_b, lora_bias, scaling)
        return ops.nf4_linear.nf4_linear_now(x, *weight.storage(), *adapter, compute_dtype, out_dtype)[0]
    if not _switches["merged"]:
        return None
    packed, *quantisation = weight.storage()
    dense = dequantized(packed, tuple(quantisation), compute_dtype)
    dense.addmm_(lora_b.to(compute_dtype), lora_a.to(compute_dtype), alpha=scaling)
    total = _whole_bias(bias, lora_bias, scaling, compute_dtype)
    return functional.linear(x.to(compute_dtype), dense, total).to(out_dtype)


def base_product(
    x: Tensor, packed: Tensor, quantisation: tuple[Any, ...], bias: Tensor | None, compute_dtype: torch.dtype
) -> Tensor:
    """x W̃ᵀ + bias in the compute dtype, of the weight dequantised whole, or slab by slab as ``configs.nf4.slab_rows`` says."""
    n, k = quantisation[3]
    rows = configs.slab_rows(x.device.type, n, k, compute_dtype.itemsize)
    x, bias = x.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    if rows >= n:
        return functional.linear(x, dequantized(packed, quantisation, compute_dtype), bias)
    slabs = product_configs.ProductConfig("slabs", -(-n // rows))
    return routes.by_parts(x, packed, quantisation, bias, False, slabs)


def _whole_bias(
    bias: Tensor | None, lora_bias: Tensor | None, scaling: float, compute_dtype: torch.dtype
) -> Tensor | None:
    if lora_bias is None:
        return None if bias is None else bias.to(compute_dtype)
    wide = torch.promote_types(compute_dtype, torch.float32)
    added = lora_bias.to(wide) * scaling
    return (added if bias is None else bias.to(wide) + added).to(compute_dtype)


def adapted_product(
    x: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """y and S of a layer with an adapter, where a 4-bit weight has a way of its own; None where it has not, and the adapter's
    product is added by a pass over y."""
    absmax, code, block_size, shape, *nested = quantisation

    def shrunk() -> Tensor:
        return ops.lora.lora_shrink(x, lora_a, seed, p, 1.0, compute_dtype)

    rest = (shrunk, lora_b, lora_bias, scaling, compute_dtype, out_dtype)
    if (done := routes.adapted_product(x, packed, quantisation, bias, *rest)) is not None:
        return done
    if seed is None and takes_few_rows(x, shape, block_size, compute_dtype):
        storage = (packed, absmax, code, block_size, shape, *nested)
        adapter = (bias, lora_a, lora_b, lora_bias, scaling)
        return ops.nf4_linear.nf4_linear_now(x, *storage, *adapter, compute_dtype, out_dtype)
    route = configs.adapter_route(x.device.type, x.dtype != compute_dtype, out_dtype == compute_dtype)
    if route == "concatenate":
        return _concatenated(x, packed, quantisation, lora_a, lora_b, bias, lora_bias, seed, p, scaling, compute_dtype)
    if route == "accumulate":
        s = shrunk()
        dense = dequantized(packed, quantisation, compute_dtype)
        total = _whole_bias(bias, lora_bias, scaling, compute_dtype)
        scaled_b = (lora_b * scaling).to(compute_dtype)
        # The small product is written first, with the bias; the large one adds itself to what it finds.
        y = s @ scaled_b.T if total is None else torch.addmm(total, s, scaled_b.T)
        return y.addmm_(x.to(compute_dtype), dense.T), s
    return None


def _concatenated(
    x: Tensor,
    packed: Tensor,
    quantisation: tuple[Any, ...],
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """[x | S] [W̃ | scaling B]ᵀ in one product. x is being cast anyway, into a wider buffer; the dequantiser writes rows apart."""
    absmax, code, block_size, shape, *nested = quantisation
    n, k = shape
    ranks = lora_a.shape[0]
    width = k + ranks + -(k + ranks) % 8  # rows of 16 bytes, which tensor cores want
    rows = torch.empty((x.shape[0], width), dtype=compute_dtype, device=x.device)
    buffer = torch.empty((n, width), dtype=compute_dtype, device=x.device)
    s = ops.lora.lora_shrink(x, lora_a, seed, p, 1.0, compute_dtype)
    rows[:, :k] = x
    rows[:, k : k + ranks] = s
    rows[:, k + ranks :] = 0
    ops.nf4.nf4_dequantize_out(packed, absmax, code, block_size, shape, *nested, buffer[:, :k])
    buffer[:, k : k + ranks] = lora_b * scaling
    buffer[:, k + ranks :] = 0
    return functional.linear(rows, buffer, _whole_bias(bias, lora_bias, scaling, compute_dtype)), s


@cache_signature
class NF4LinearFunction(torch.autograd.Function):
    """x Wᵀ + b on a 4-bit W; returns y and, without gradient, the dense weight where it is to be kept for dX, else None."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        block_size: int,
        shape: Any,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        nested_offset: Tensor | None,
        compute_dtype: torch.dtype,
        out_dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        quantisation = (absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
        if not keep and (y := routes.product(x, packed, quantisation, bias, compute_dtype)) is not None:
            return y if y.dtype == out_dtype else y.to(out_dtype), None
        if not keep and takes_few_rows(x, shape, block_size, compute_dtype):
            rest = (bias, None, None, None, 1.0, compute_dtype, out_dtype)
            return ops.nf4_linear.nf4_linear_now(x, packed, *quantisation, *rest)[0], None
        if not keep:
            y = base_product(x, packed, quantisation, bias, compute_dtype)
            return y if y.dtype == out_dtype else y.to(out_dtype), None
        weight = dequantized(packed, quantisation, compute_dtype)
        y = functional.linear(x.to(compute_dtype), weight, None if bias is None else bias.to(compute_dtype))
        # Not y.to of its own dtype: torch 2.11's compiler would give zero gradients.
        return y if y.dtype == out_dtype else y.to(out_dtype), weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, bias, packed, absmax, code, block_size, shape, *nested, compute_dtype, _, _ = inputs
        dense = output[1]
        if dense is not None:
            ctx.mark_non_differentiable(dense)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, absmax, code, *nested, dense)
        ctx.block_size, ctx.shape, ctx.compute_dtype = block_size, shape, compute_dtype
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype

    # Of torch's own operations, on dy and what is fixed: it can be differentiated again.
    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 13
        packed, absmax, code, *nested, dense = ctx.saved_tensors
        dx = dbias = None
        with autocast_off(dy.device.type):
            dy = dy.to(ctx.compute_dtype)
            if ctx.needs_input_grad[0]:
                quantisation = (absmax, code, ctx.block_size, ctx.shape, *nested)
                if dense is None:
                    dx = routes.product(dy, packed, quantisation, None, ctx.compute_dtype, transposed=True)
                if dx is None:
                    dense = dequantized(packed, quantisation, ctx.compute_dtype) if dense is None else dense
                    dx = dy @ dense
                dx = dx.to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                wide = torch.float64 if ctx.compute_dtype == torch.float64 else torch.float32
                dbias = dy.sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, dbias, *(None,) * 11


def _is_few(x: Tensor, nf4: NF4Weight, dtype: torch.dtype) -> bool:
    if not takes_few_rows(x, nf4.shape, nf4.block_size, dtype):
        return False
    return routes.chosen(x, x.shape[0], nf4.storage()[1:], 0, False, False, dtype).route == "dequantize"


def nf4_linear(
    x: Tensor, nf4: NF4Weight, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """x Wᵀ + b with a 4-bit W; gradients to x and bias.

    Up to ``configs.nf4.FEW_ROWS`` rows are multiplied with the packed bytes as they are decoded; more, with the weight dequantised
    into a buffer of N K elements of the compute dtype that lives during the product, forward and backward
    (:func:`shared_dequantization` keeps it in between), or in another way that ``configs.nf4_product`` has for the shape.

    Args:
        x: ``[..., K]`` floating. nf4: of shape ``(N, K)``. bias: ``[N]``.
        compute_dtype: of the product; autocast's or x's if not given. The result has x's dtype where this is given.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4: expected an NF4Weight, got {type(nf4).__name__}")
    check_features(x, tuple(nf4.shape))
    check_vector("bias", bias, nf4.shape[0], x)
    if nf4.device != x.device:
        raise ValueError(f"nf4: expected on {x.device} beside x, got on {nf4.device}")
    dtype = compute_dtype_of(x, compute_dtype)
    out_dtype = x.dtype if compute_dtype is not None else dtype
    with autocast_off(x.device.type):
        if by_definition():
            return plain.linear(x, nf4, bias, dtype, out_dtype)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        records = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if not records and _is_few(rows, nf4, dtype):
            # Past autograd, whose bookkeeping takes as long as a quarter of the product.
            refuse_tangents(x, bias)
            y, _ = ops.nf4_linear.nf4_linear_now(rows, *nf4.storage(), bias, None, None, None, 1.0, dtype, out_dtype)
        else:
            keep = keeps_dense() and records and x.requires_grad
            y, _ = NF4LinearFunction.apply(rows, bias, *nf4.storage(), dtype, out_dtype, keep)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], nf4.shape[0])
