"""The LoRA layer: one autograd Function over the passes of ``peftfast.ops.lora``."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..configs import lora as lora_configs
from ..configs import nf4 as nf4_configs
from ..ops import lora_product as fused
from ..ops import replay
from ..ops.backends import FLOAT_DTYPES, undisturbed
from . import plain
from .derivatives import by_definition, once_differentiable, refuse_tangents
from .nf4 import NF4Weight, check_features, check_vector, dequantized
from .nf4_product import adapted_product, base_product, keeps_dense, product_without_gradient
from .nf4_routes import adapted_gradient
from .nf4_routes import add_product as _add_product
from .node import Function
from .precision import autocast_off, autocast_on, compute_dtype_of
from .shapes import as_rows, shaped, unviewed

_PLAIN = (Tensor, torch.nn.Parameter)


def _dense_weight(weight: Tensor, quantisation: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return dequantized(weight, tuple(quantisation), dtype) if quantisation else weight.to(dtype)


def _plain_on_cpu(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is a plain CPU tensor of the compute dtype, and nobody watches operators or asked for a backend. Not under autocast,
    in which a backward pass may run: it would cast the library's products."""
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and x.dtype is dtype
        and dtype in FLOAT_DTYPES
        and type(x) in _PLAIN
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and undisturbed()
    )


def _as_one(x: Tensor, dtype: torch.dtype, rank: int, *factors: torch.dtype | None) -> bool:
    """Whether the passes on x run as one operator of the C++ library. The result is the same, bit for bit; what is saved is the way
    through Python between them. The passes that torch's library takes over are operators of their own, and so are those on
    ``factors``, the adapter's dtypes, that the kernels do not take: other implementations serve them."""
    if rank >= lora_configs.LIBRARY_RANKS and ops.lora_library.takes(x.shape[:-1].numel(), rank, dtype):
        return False
    return _plain_on_cpu(x, dtype) and kernels_take(factors)


def kernels_take(dtypes: Sequence[torch.dtype | None]) -> bool:
    """Whether the kernels read all of these; None is of a tensor that is not there."""
    for dtype in dtypes:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            return False
    return True


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    keep: bool,
    *quantisation: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, S and, with ``keep``, the dense weight, by an operator a pass."""
    rows = as_rows(x)
    shape = (*x.shape[:-1], lora_b.shape[0])
    dense = None
    if quantisation and not keep:
        adapter = (lora_a, lora_b, bias, lora_bias, seed, p, scaling)
        done = adapted_product(rows, weight, quantisation, *adapter, dtype, out_dtype)
        if done is not None:
            return shaped(done[0], shape), done[1], None
    if fused.chosen(rows, (lora_b.shape[0], rows.shape[1]), True, lora_b.shape[1], False, dtype)[0]:
        dense = _dense_weight(weight, quantisation, dtype)
        s = ops.lora.lora_shrink(rows, lora_a, seed, p, 1.0, dtype)
        y = fused.lora_product(rows.to(dtype), dense, bias, s, lora_b, lora_bias, None, 0.0, scaling, out_dtype)
        return shaped(y, shape), s, dense if keep else None
    if quantisation and not keep:
        y = base_product(rows, weight, quantisation, bias, dtype)
    else:
        dense = _dense_weight(weight, quantisation, dtype)
        y = functional.linear(rows.to(dtype), dense, None if bias is None else bias.to(dtype))
    s = ops.lora.lora_shrink(rows, lora_a, seed, p, 1.0, dtype)
    y = _add_product(y, s, lora_b, lora_bias, None, 0.0, scaling, out_dtype)
    return shaped(y, shape), s, dense if keep else None


_replayed_forward = replay.Replayed(_forward)


class LoRALinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b + scaling (dropout(x) Aᵀ Bᵀ + lora_bias) on x ``[..., K]``; ``quantisation`` is NF4Weight.storage()[1:] or nothing.

    Saved: x only where A or W needs a gradient, S only where B does; no mask, no cast copy, no dense copy of a 4-bit W. Forward with
    ctx and not with setup_context, whose binding of the arguments costs as much as a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        seed: Tensor | None,
        p: float,
        scaling: float,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        *quantisation: Any,
    ) -> Tensor:
        kept: tuple[Tensor | None, ...] = ()
        bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        whole = out_dtype is dtype and bias_dtypes[0] in (None, dtype) and x.is_contiguous()
        rank = lora_b.shape[1]
        factors = (lora_a.dtype, lora_b.dtype, bias_dtypes[1])
        if whole and weight.dtype is dtype and not quantisation and _as_one(x, dtype, rank, *factors):
            y, s = torch.ops.peftfast_cpu.lora_layer_forward.default(
                x, weight, bias, lora_a, lora_b, lora_bias, seed, p, scaling
            )
            y = unviewed(y)
        else:
            keep = len(quantisation) > 0 and keeps_dense() and ctx.needs_input_grad[0]
            passes = _replayed_forward if replay.allowed(x) else _forward
            options = (seed, p, scaling, dtype, out_dtype, keep, *quantisation)
            y, s, dense = passes(x, weight, lora_a, lora_b, bias, lora_bias, *options)
            kept = () if dense is None else (dense,)
        needs_x, needs_weight, needs_a, needs_b, needs_bias, needs_lora_bias = ctx.needs_input_grad[:6]
        if quantisation:
            kept = (*(one if needs_x and isinstance(one, Tensor) else None for one in quantisation), *kept)
        ctx.save_for_backward(
            x if needs_a or needs_weight else None,
            weight if needs_x else None,
            lora_a if needs_x else None,
            lora_b,
            s if needs_b else None,
            seed,
            *kept,
        )
        # One attribute: each costs as much as a check.
        ctx.plan = (p, scaling, dtype, rank, x.dtype, weight.dtype, lora_a.dtype, quantisation[2:4], bias_dtypes)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # an optimiser would act on gradients of zeros
            return (None,) * len(ctx.needs_input_grad)
        needs_x, needs_weight, needs_a, needs_b, needs_bias, needs_lora_bias, *rest = ctx.needs_input_grad
        p, scaling, dtype, rank, x_dtype, weight_dtype, a_dtype, _, _ = ctx.plan
        rest = (None,) * len(rest)
        frozen = not (needs_weight or needs_bias or needs_lora_bias)
        saved = ctx.saved_tensors  # once: each question unpacks them anew, which a checkpoint allows a single time
        own = (a_dtype, saved[3].dtype)
        if frozen and x_dtype is dtype and weight_dtype is dtype and _as_one(dy, dtype, rank, *own):
            x, weight, lora_a, lora_b, s, seed = saved
            x = None if x is None else x.contiguous()
            found = torch.ops.peftfast_cpu.lora_layer_backward.default(
                dy.contiguous(), x, weight, lora_a, lora_b, s, seed, p, scaling, needs_x, needs_a, needs_b, a_dtype
            )
            if needs_x and needs_a and needs_b:
                dx, da, db = found
            else:
                dx, da, db = (found.pop(0) if needed else None for needed in (needs_x, needs_a, needs_b))
            return dx, None, da, db, None, None, *rest
        with autocast_off(dy.device.type):
            passes = _replayed_backward if replay.allowed(dy) else _backward
            return *passes(dy, ctx.plan, ctx.needs_input_grad[:6], *saved), *rest


by_library = Function(LoRALinearFunction)


def _backward(
    dy: Tensor,
    plan: tuple[Any, ...],
    needs: tuple[bool, ...],
    x: Any,
    weight: Any,
    lora_a: Any,
    lora_b: Tensor,
    s: Any,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, da, db, dbias, dlora_bias, by an operator a pass, of what a LoRALinearFunction saved."""
    p, scaling, dtype, _, _, weight_dtype, a_dtype, _, _ = plan
    needs_x, needs_weight, needs_a, needs_b, needs_bias, needs_lora_bias = needs
    leading = dy.shape[:-1]
    ds: Any = None
    dx = dweight = da = db = dbias = dlora_bias = None
    dy = as_rows(dy).to(dtype)
    rows: Any = None if x is None else as_rows(x)
    if needs_b:
        ds, db = ops.lora.lora_dy_grads(dy, s, lora_b, scaling, lora_b.dtype)
    elif needs_a or needs_x:
        ds = ops.lora.lora_shrink(dy, lora_b.T, None, 0.0, scaling, dtype)
    if needs_a:
        da = ops.lora.lora_weight_grad(ds, rows, seed, p, 1.0, a_dtype)
    if needs_x:
        dx = input_gradient(plan, dy, ds, weight, lora_a, seed, rest)
        dx = dx if len(leading) == 1 else dx.reshape(*leading, lora_a.shape[1])
    if needs_weight:
        dweight = (dy.T @ rows.to(dtype)).to(weight_dtype)
    if needs_bias or needs_lora_bias:
        dbias, dlora_bias = bias_gradients(plan, needs, dy)
    return dx, dweight, da, db, dbias, dlora_bias


_replayed_backward = replay.Replayed(_backward)


def input_gradient(
    plan: tuple[Any, ...],
    dy: Tensor,
    ds: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    rest: Sequence[Any],
) -> Tensor:
    """dx ``[M, K]`` in x's dtype; ``rest`` is what is saved behind the seed: NF4Weight.storage()[1:] and perhaps the dense weight."""
    kept = rest[7] if len(rest) > 7 else None  # the dense weight, after NF4Weight.storage()[1:]
    p, _, dtype, _, x_dtype, _, _, stored, _ = plan
    # Slices, not assignments: torch 2.11's compiler hands these out as a tuple.
    quantisation = (*rest[:2], *stored, *rest[4:7]) if stored else ()
    if quantisation and kept is None:
        dx = adapted_gradient(dy, weight, quantisation, ds, lora_a, seed, p, x_dtype)
        if dx is not None:
            return dx
    dense = _dense_weight(weight, quantisation, dtype) if kept is None else kept
    masked = seed is not None and p > 0.0
    if fused.chosen(dy, (dense.shape[1], dense.shape[0]), False, lora_a.shape[0], masked, dtype)[0]:
        return fused.lora_product(dy, dense.T, None, ds, lora_a.T, None, seed, p, 1.0, x_dtype)
    if quantisation and nf4_configs.gradient_route(dy.device.type, masked, x_dtype != dtype) == "accumulate":
        return (ds @ lora_a.to(dtype)).addmm_(dy, dense)
    return _add_product(dy @ dense, ds, lora_a.T, None, seed, p, 1.0, x_dtype)


def bias_gradients(plan: tuple[Any, ...], needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dbias and dlora_bias, where they are needed."""
    needs_bias, needs_lora_bias = needs[4:6]
    _, scaling, dtype, *_, bias_dtypes = plan
    total = dy.sum(0, dtype=torch.float32 if dtype != torch.float64 else dtype)
    dbias = total.to(bias_dtypes[0]) if needs_bias else None
    return dbias, (total * scaling).to(bias_dtypes[1]) if needs_lora_bias else None


def draw_seed(x: Tensor, count: int = 1) -> Tensor:
    """Dropout seeds: ``count`` int64 on x's device from torch's generator, so that torch.manual_seed and checkpointing rule them.
    No host synchronisation; safe in a CUDA graph."""
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=x.device)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 element, got {seed.dtype} of shape {tuple(seed.shape)}")
        return
    try:
        operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}") from None


def _seed_tensor(seed: Tensor | int, x: Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(x.device)
    value = operator.index(seed)
    return torch.full((1,), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)


def _check_factor(name: str, value: Tensor, rows: int | None, columns: int | None, x: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
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
    seed: Tensor | int | None,
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
    if isinstance(weight, Tensor) and weight.layout is not torch.strided:
        raise TypeError(f"weight: expected a dense tensor, got {weight.layout}")
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
    if seed is not None:
        _check_seed(seed)


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
        magnitude: ``[N]``: DoRA (arXiv 2402.09353) as PEFT computes it; with dropout it takes a second product with W.
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
    options = (dropout_p, scaling, seed, dtype, cast_weight)
    _check_arguments(x, weight, lora_a, lora_b, bias, lora_bias, magnitude, *options)
    p = float(dropout_p) if training else 0.0
    with autocast_off(x.device.type):
        seed_tensor = None if p == 0.0 else draw_seed(x) if seed is None else _seed_tensor(seed, x)
        out_dtype = x.dtype if compute_dtype is not None else dtype
        if magnitude is not None:
            from .lora_multi import Projection, apply_group  # below this module: it checks with this one's checks

            own = Projection(weight, lora_a, lora_b, scaling, lora_bias=lora_bias, dropout_p=p, seed=seed_tensor)
            return apply_group(x, [(weight, bias, magnitude)], [(own,)], None, training, dtype, out_dtype)[0]
        if by_definition():
            term = plain.Term(lora_a, lora_b, scaling, lora_bias)
            return plain.adapted(x, weight, bias, [term], None, seed_tensor, [p], dtype, out_dtype)
        if isinstance(weight, NF4Weight) and p == 0.0 and not torch.is_grad_enabled():
            rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            refuse_tangents(x, lora_a, lora_b, bias, lora_bias)
            adapter = (lora_a, lora_b, bias, lora_bias, float(scaling))
            y = product_without_gradient(rows, weight, *adapter, dtype, out_dtype)
            if y is not None:
                return y.reshape(*x.shape[:-1], weight.shape[0])
        base, *quantisation = weight.storage() if isinstance(weight, NF4Weight) else (weight,)
        return by_library.apply(  # type: ignore[no-any-return]
            x, base, lora_a, lora_b, bias, lora_bias, seed_tensor, p, float(scaling), dtype, out_dtype, *quantisation
        )
