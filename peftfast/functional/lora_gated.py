"""The end of a gated MLP with a LoRA layer, down(act(gate) * up): one autograd Function that keeps gate and up alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import replay
from .derivatives import by_definition, once_differentiable
from .gated_activation import check_gated, gated_activation
from .lora import (
    LoRALinearFunction,
    _as_one,
    _check_arguments,
    _seed_tensor,
    bias_gradients,
    draw_seed,
    input_gradient,
    lora_linear,
)
from .nf4 import NF4Weight
from .node import Function
from .precision import autocast_off, autocast_on, compute_dtype_of
from .shapes import as_rows, unviewed

_FIRST = 3  # arguments before those that LoRALinearFunction takes after x


class _Layer:
    """What LoRALinearFunction keeps of a call, in the place of autograd's own context; its x is h, which needs a gradient where gate or
    up does."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = (needs[0] or needs[1], *needs[_FIRST:])
        self.saved: tuple[Tensor | None, ...] = ()
        self.plan: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass  # the Function around it has done so


class LoRAGatedFunction(torch.autograd.Function):
    """y = h Wᵀ + b + scaling (dropout(h) Aᵀ Bᵀ + lora_bias) with h = act(gate) * up: as :class:`LoRALinearFunction` has it of an x.

    Saved: gate and up, S only where B needs a gradient; neither act(gate) nor h, which the backward forms anew where A or W needs a
    gradient, in the pass that it makes over gate and up anyway.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, *layer: Any) -> Tensor:
        inner = _Layer(ctx.needs_input_grad)
        weight, lora_a, lora_b, bias, lora_bias, seed, p, scaling, dtype, out_dtype, *quantisation = layer
        needs_h, needs_weight, needs_a, needs_b = inner.needs_input_grad[:4]
        plain = (
            out_dtype is dtype and weight.dtype is dtype and (bias is None or bias.dtype is dtype) and not quantisation
        )
        bias_dtypes = tuple(None if one is None else one.dtype for one in (bias, lora_bias))
        factors = (lora_a.dtype, lora_b.dtype, bias_dtypes[1])
        if plain and gate.is_contiguous() and up.is_contiguous() and _as_one(gate, dtype, lora_b.shape[1], *factors):
            y, s = torch.ops.peftfast_cpu.lora_gated_forward.default(
                gate,
                up,
                ops.gated_activation.INDEX[activation],
                weight,
                bias,
                lora_a,
                lora_b,
                lora_bias,
                seed,
                p,
                scaling,
            )
            y = unviewed(y)
            inner.plan = (p, scaling, dtype, lora_b.shape[1], dtype, dtype, lora_a.dtype, (), bias_dtypes)
            own = (weight, lora_a) if needs_h else (None, None)
            saved: tuple[Tensor | None, ...] = (*own, lora_b, s if needs_b else None, seed)
        else:
            h = ops.gated_activation.gated_activation(as_rows(gate), as_rows(up), activation)
            y = LoRALinearFunction.forward(inner, h if gate.dim() == 2 else h.view(gate.shape), *layer)
            saved, inner.saved = inner.saved[1:], ()
        used = needs_h or needs_weight or needs_a
        ctx.save_for_backward(gate if used else None, up if used else None, *saved)
        ctx.activation, ctx.inner = activation, inner
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        inner = ctx.inner
        needs_h, needs_weight, needs_a, needs_b, *needs_biases = inner.needs_input_grad[:6]
        p, scaling, dtype, rank, h_dtype, weight_dtype, a_dtype, _, _ = inner.plan
        same = h_dtype is dtype and weight_dtype is dtype
        saved = ctx.saved_tensors  # once: each question unpacks them anew, which a checkpoint allows a single time
        frozen = not (needs_weight or True in needs_biases)
        if same and frozen and _as_one(dy, dtype, rank, a_dtype, saved[4].dtype):
            gate, up, weight, lora_a, lora_b, s, seed = saved
            if gate is not None:
                found = torch.ops.peftfast_cpu.lora_gated_backward.default(
                    dy.contiguous(),
                    gate.contiguous(),
                    up.contiguous(),
                    ops.gated_activation.INDEX[ctx.activation],
                    weight,
                    lora_a,
                    lora_b,
                    s,
                    seed,
                    p,
                    scaling,
                    needs_h,
                    needs_a,
                    needs_b,
                    a_dtype,
                )
                needed = (needs_h, needs_h, needs_a, needs_b)
                dgate, dup, da, db = (found.pop(0) if one else None for one in needed)
                wanted = ctx.needs_input_grad
                rest = (None,) * (len(wanted) - _FIRST - 3)
                return dgate if wanted[0] else None, dup if wanted[1] else None, None, None, da, db, *rest
        with autocast_off(dy.device.type):
            passes = _replayed_backward if replay.allowed(dy) else _backward
            own = (ctx.activation, inner.plan, inner.needs_input_grad[:6], ctx.needs_input_grad[:2])
            dgate, dup, *grads = passes(dy, *own, *saved)
        return dgate, dup, None, *grads, *(None,) * (len(ctx.needs_input_grad) - _FIRST - 5)


by_library = Function(LoRAGatedFunction)


def _backward(
    dy: Tensor,
    activation: str,
    plan: tuple[Any, ...],
    needs: tuple[bool, ...],
    needs_gate_up: tuple[bool, bool],
    gate: Any,
    up: Any,
    weight: Any,
    lora_a: Any,
    lora_b: Tensor,
    s: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dgate, dup, dweight, da, db, dbias, dlora_bias, by an operator a pass, of what a LoRAGatedFunction saved."""
    needs_h, needs_weight, needs_a, needs_b, needs_bias, needs_lora_bias = needs
    p, scaling, dtype, _, _, weight_dtype, a_dtype, _, _ = plan
    dy = as_rows(dy).to(dtype)
    ds: Any = None
    dgate = dup = h = dweight = da = db = None
    if needs_b:
        ds, db = ops.lora.lora_dy_grads(dy, s, lora_b, scaling, lora_b.dtype)
    elif needs_a or needs_h:
        ds = ops.lora.lora_shrink(dy, lora_b.T, None, 0.0, scaling, dtype)
    if needs_h:
        dh = input_gradient(plan, dy, ds, weight, lora_a, seed, rest).contiguous()
        given = (as_rows(gate), as_rows(up), activation)
        if needs_a or needs_weight:
            dgate, dup = ops.gated_activation.gated_activation_recompute_(dh, *given)
            h = dh
        else:
            dgate, dup = ops.gated_activation.gated_activation_backward(dh, *given)
        dgate = dgate.view(gate.shape) if needs_gate_up[0] else None
        dup = dup.view(gate.shape) if needs_gate_up[1] else None
    elif needs_a or needs_weight:
        h = ops.gated_activation.gated_activation(as_rows(gate), as_rows(up), activation)
    if needs_a:
        da = ops.lora.lora_weight_grad(ds, h, seed, p, 1.0, a_dtype)
    if needs_weight:
        dweight = (dy.T @ h.to(dtype)).to(weight_dtype)  # type: ignore[union-attr]
    dbias, dlora_bias = bias_gradients(plan, needs, dy) if needs_bias or needs_lora_bias else (None, None)
    return dgate, dup, dweight, da, db, dbias, dlora_bias


_replayed_backward = replay.Replayed(_backward)


def lora_gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    activation: str = "silu",
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`lora_linear` of h = act(gate) * up: the end of a SwiGLU or GeGLU MLP (arXiv 2002.05202) with a LoRA adapter on its last
    layer. Neither act(gate) nor h is kept for the backward, which forms h anew from gate and up: two ``[M, K]`` less than by the layers
    one after the other.

    DoRA and several adapters: ``lora_linear(gated_activation(gate, up), ...)``, which keeps h. Double backward is not supported.

    Args:
        gate, up, activation: as :func:`gated_activation` takes them, ``[..., K]``.
        weight, lora_a, lora_b, scaling, bias, lora_bias, dropout_p, seed, training, compute_dtype: as :func:`lora_linear` takes them
            beside an x of gate's dtype.

    Returns:
        ``[..., N]``, in gate's dtype where ``compute_dtype`` is given, else in the compute dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_gated(gate, up, activation)
    dtype = compute_dtype_of(gate, compute_dtype)
    cast_weight = compute_dtype is not None or autocast_on(gate.device.type)
    if isinstance(weight, (Tensor, NF4Weight)) and len(weight.shape) == 2 and gate.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"gate: expected [..., {weight.shape[1]}] for a weight of {tuple(weight.shape)}, got {tuple(gate.shape)}"
        )
    options = (dropout_p, scaling, seed, dtype, cast_weight)
    _check_arguments(gate, weight, lora_a, lora_b, bias, lora_bias, None, *options)
    if not torch.is_grad_enabled() or by_definition():
        return lora_linear(
            gated_activation(gate, up, activation),
            weight,
            lora_a,
            lora_b,
            scaling=scaling,
            bias=bias,
            lora_bias=lora_bias,
            dropout_p=dropout_p,
            seed=seed,
            training=training,
            compute_dtype=compute_dtype,
        )
    p = float(dropout_p) if training else 0.0
    seed_tensor = None if p == 0.0 else draw_seed(gate) if seed is None else _seed_tensor(seed, gate)
    out_dtype = gate.dtype if compute_dtype is not None else dtype
    layer = (lora_a, lora_b, bias, lora_bias, seed_tensor, p, float(scaling), dtype, out_dtype)
    return apply_gated(gate, up, activation, weight, *layer)


def apply_gated(gate: Tensor, up: Tensor, activation: str, weight: Tensor | NF4Weight, *layer: Any) -> Tensor:
    """The Function on LoRALinearFunction's arguments after the weight. Nothing is checked."""
    base, *quantisation = weight.storage() if isinstance(weight, NF4Weight) else (weight,)
    with autocast_off(gate.device.type):
        return by_library.apply(gate, up, activation, base, *layer, *quantisation)  # type: ignore[no-any-return]
