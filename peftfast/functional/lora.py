"""The LoRA layer: one autograd Function over the passes of ``peftfast.ops.lora``."""

from __future__ import annotations

import logging
import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ops
from ..reference import lora as definition
from .nf4 import NF4Weight, check_features, check_vector, dequantized, nf4_dequantize
from .nf4_product import adapted_product, base_product, keeps_dense, product_without_gradient
from .precision import autocast_off, autocast_on, cache_signature, compute_dtype_of

logger = logging.getLogger("peftfast")

_DENSE = (None,) * 7  # what a dense weight has in the place of NF4Weight.storage()[1:]
_reported: set[str] = set()


def _dense_weight(weight: Tensor, quantisation: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if quantisation[0] is None else dequantized(weight, quantisation, dtype)


def _add_product(
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
    if base.dtype != dtype:
        return ops.lora.lora_expand(base, s, w, bias, seed, p, scaling, dtype)
    ops.lora.lora_expand_(base, s, w, bias, seed, p, scaling)
    return base


@cache_signature
class LoRALinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b + scaling (dropout(x) Aᵀ Bᵀ + lora_bias) on a matrix x; returns y and S, the latter without gradient.

    Saved: x only where A or W needs a gradient, S only where B does; no mask, no cast copy, no dense copy of a 4-bit W.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        seed: Tensor | None,
        p: float,
        scaling: float,
        compute_dtype: torch.dtype,
        out_dtype: torch.dtype,
        absmax: Tensor | None,
        code: Tensor | None,
        block_size: int | None,
        shape: Any,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        nested_offset: Tensor | None,
        keep: bool = False,
    ) -> tuple[Tensor, ...]:
        quantisation = (absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
        if absmax is not None and not keep:
            adapter = (lora_a, lora_b, bias, lora_bias, seed, p, scaling)
            done = adapted_product(x, weight, quantisation, *adapter, compute_dtype, out_dtype)
            if done is not None:
                return done
        dense = weight
        if absmax is not None and not keep:
            y = base_product(x, weight, quantisation, bias, compute_dtype)
        else:
            dense = _dense_weight(weight, quantisation, compute_dtype)
            y = functional.linear(x.to(compute_dtype), dense, None if bias is None else bias.to(compute_dtype))
        s = ops.lora.lora_shrink(x, lora_a, seed, p, 1.0, compute_dtype)
        y = _add_product(y, s, lora_b, lora_bias, None, 0.0, scaling, out_dtype)
        return (y, s, dense) if keep else (y, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, lora_a, lora_b, bias, lora_bias, seed, p, scaling, compute_dtype, _, *quantisation = inputs[:18]
        absmax, code, block_size, shape, *nested = quantisation
        needs_x, needs_weight, needs_a, needs_b = ctx.needs_input_grad[:4]
        s, *kept = output[1:]
        ctx.mark_non_differentiable(s, *kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if needs_a or needs_weight else None,
            weight if needs_x else None,
            lora_a if needs_x else None,
            lora_b,
            s if needs_b else None,
            seed,
            *((absmax, code, *nested) if needs_x else (None,) * 5),
            *kept,
        )
        ctx.p, ctx.scaling, ctx.compute_dtype = p, scaling, compute_dtype
        ctx.block_size, ctx.shape = block_size, shape
        ctx.x_dtype, ctx.a_dtype, ctx.weight_dtype = x.dtype, lora_a.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.lora_bias_dtype = None if lora_bias is None else lora_bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: under checkpointing each access would unpack again
        x, weight, lora_a, lora_b, s, seed, absmax, code, *nested = saved[:11]
        kept = saved[11:]
        needs_x, needs_weight, needs_a, needs_b, needs_bias, needs_lora_bias = ctx.needs_input_grad[:6]
        dtype, p = ctx.compute_dtype, ctx.p
        ds: Any = None
        dx = dweight = da = db = dbias = dlora_bias = None
        with autocast_off(dy.device.type):
            dy = dy.to(dtype)
            if needs_b:
                ds, db = ops.lora.lora_dy_grads(dy, s, lora_b, ctx.scaling, lora_b.dtype)
            elif needs_a or needs_x:
                ds = ops.lora.lora_shrink(dy, lora_b.T, None, 0.0, ctx.scaling, dtype)
            if needs_a:
                da = ops.lora.lora_weight_grad(ds, x, seed, p, 1.0, ctx.a_dtype)
            if needs_x:
                quantisation = (absmax, code, ctx.block_size, ctx.shape, *nested)
                dx = dy @ (kept[0] if kept else _dense_weight(weight, quantisation, dtype))
                dx = _add_product(dx, ds, lora_a.T, None, seed, p, 1.0, ctx.x_dtype)
            if needs_weight:
                dweight = (dy.T @ x.to(dtype)).to(ctx.weight_dtype)
            if needs_bias or needs_lora_bias:
                total = dy.sum(0, dtype=torch.float32 if dtype != torch.float64 else dtype)
                dbias = total.to(ctx.bias_dtype) if needs_bias else None
                dlora_bias = (total * ctx.scaling).to(ctx.lora_bias_dtype) if needs_lora_bias else None
        return dx, dweight, da, db, dbias, dlora_bias, *(None,) * (len(ctx.needs_input_grad) - 6)


def draw_seed(x: Tensor) -> Tensor:
    """A dropout seed: one int64 on x's device from torch's generator, so that torch.manual_seed and checkpointing rule it.
    No host synchronisation; safe in a CUDA graph."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _seed_tensor(seed: Tensor | int, x: Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 element, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.to(x.device)
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}") from None
    return torch.full((1,), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)


def _check_factor(name: str, value: Tensor, rows: int | None, columns: int | None, x: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dim() != 2 or rows not in (None, value.shape[0]) or columns not in (None, value.shape[1]):
        expected = f"({'R' if rows is None else rows}, {'R' if columns is None else columns})"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} beside x, got on {value.device}")


def _check_arguments(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    magnitude: Tensor | None,
    dropout_p: float,
    scaling: float,
    dtype: torch.dtype,
    cast_weight: bool,
) -> None:
    if not isinstance(weight, NF4Weight) and not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor or an NF4Weight, got {type(weight).__name__}")
    check_features(x, tuple(weight.shape))
    n, k = weight.shape
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(
            f"weight: expected a floating tensor, got {weight.dtype}; a 4-bit weight is passed as an NF4Weight "
            "(NF4Weight.from_bitsandbytes)"
        )
    if isinstance(weight, Tensor) and weight.dtype != dtype and not cast_weight:
        raise TypeError(f"weight: expected {dtype} beside x and autocast as they are, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected on {x.device} beside x, got on {weight.device}")
    _check_factor("lora_a", lora_a, None, k, x)
    _check_factor("lora_b", lora_b, n, lora_a.shape[0], x)
    for name, vector in (("bias", bias), ("lora_bias", lora_bias), ("magnitude", magnitude)):
        check_vector(name, vector, n, x)
    for name, number in (("dropout_p", dropout_p), ("scaling", scaling)):
        if not isinstance(number, numbers.Real):
            raise TypeError(f"{name}: expected a Python number, got {type(number).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def _composed(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    magnitude: Tensor,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """DoRA, which has no fused form yet, by the definition; said once in the log."""
    if "dora" not in _reported:
        _reported.add("dora")
        logger.warning("lora_linear with magnitude (DoRA) runs on reference: no fused form yet")
    dense = nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight
    cast: list[Any] = [None if t is None else t.to(dtype) for t in (dense, lora_a, lora_b, bias, lora_bias, magnitude)]
    return definition.lora_linear(
        x.to(dtype), cast[0], cast[1], cast[2], bias=cast[3], lora_bias=cast[4], magnitude=cast[5], **options
    )


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + b + scaling (dropout(x) Aᵀ Bᵀ + lora_bias): LoRA (arXiv 2106.09685) on a dense or a 4-bit weight (QLoRA, 2305.14314).

    lora_a and lora_b are any tensors, parameters or computed; each gradient comes back in its own tensor's dtype. Double backward is
    not supported.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16 (float64 runs on the definition); any strides.
        weight: ``[N, K]`` in the compute dtype, or an :class:`NF4Weight` of that shape.
        lora_a, lora_b: ``[R, K]`` and ``[N, R]``, floating, of any dtype.
        scaling: a Python number.
        bias, lora_bias: ``[N]``.
        magnitude: ``[N]``: DoRA (arXiv 2402.09353) as PEFT computes it; by the definition, not fused.
        dropout_p: probability that an element of x is dropped before A, in training. The exact keep rate is
            round(65536 (1 - p)) / 65536.
        seed: of the mask: an int, or one int64 element on x's device, which costs no synchronisation. Drawn from torch's generator
            if not given.
        compute_dtype: a quantised layer's own. If not given: autocast's where autocast is on, else x's.

    Returns:
        ``[..., N]``, in x's dtype where ``compute_dtype`` is given, else in the compute dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    dtype = compute_dtype_of(x, compute_dtype) if isinstance(x, Tensor) else torch.float32
    cast_weight = compute_dtype is not None or (isinstance(x, Tensor) and autocast_on(x.device.type))
    _check_arguments(x, weight, lora_a, lora_b, bias, lora_bias, magnitude, dropout_p, scaling, dtype, cast_weight)
    p = float(dropout_p) if training else 0.0
    with autocast_off(x.device.type):
        seed_tensor = None if p == 0.0 else draw_seed(x) if seed is None else _seed_tensor(seed, x)
        out_dtype = x.dtype if compute_dtype is not None else dtype
        if magnitude is not None:
            y = _composed(
                x,
                weight,
                lora_a,
                lora_b,
                bias,
                lora_bias,
                magnitude,
                dtype,
                scaling=scaling,
                dropout_p=p,
                seed=seed_tensor,
            )
            return y.to(out_dtype)
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(weight, NF4Weight) and p == 0.0 and not torch.is_grad_enabled():
            adapter = (lora_a, lora_b, bias, lora_bias, float(scaling))
            done = product_without_gradient(rows, weight, *adapter, dtype, out_dtype)
            if done is not None:
                return done.reshape(*x.shape[:-1], weight.shape[0])
        base, *quantisation = weight.storage() if isinstance(weight, NF4Weight) else (weight, *_DENSE)
        keep = (
            (True,)
            if quantisation[0] is not None and keeps_dense() and torch.is_grad_enabled() and x.requires_grad
            else ()
        )
        y, *_ = LoRALinearFunction.apply(
            rows,
            base,
            lora_a,
            lora_b,
            bias,
            lora_bias,
            seed_tensor,
            p,
            float(scaling),
            dtype,
            out_dtype,
            *quantisation,
            *keep,
        )
        return y.reshape(*x.shape[:-1], weight.shape[0])
