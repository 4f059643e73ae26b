"""The product of a gated MLP: one autograd Function over ``peftfast.ops.gated_activation``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference import gated_activation as definition
from ..reference.gated_activation import ACTIVATIONS
from .derivatives import by_definition, once_differentiable
from .node import Function
from .shapes import as_rows


class GatedActivationFunction(torch.autograd.Function):
    """h = act(gate) * up on ``[..., N]``. Saved: gate and up; neither act(gate) nor h."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        h = ops.gated_activation.gated_activation(as_rows(gate), as_rows(up), activation)
        return h if gate.dim() == 2 else torch.ops.aten._unsafe_view.default(h, gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None:
            return None, None, None
        gate, up = ctx.saved_tensors
        given = (as_rows(dh), as_rows(gate), as_rows(up), ctx.activation)
        grads = ops.gated_activation.gated_activation_backward(*given)
        dgate, dup = (
            grad.view(gate.shape) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[:2], strict=True)
        )
        return dgate, dup, None


by_library = Function(GatedActivationFunction)


def check_gated(gate: Any, up: Any, activation: Any) -> None:
    """Raises TypeError or ValueError for what :func:`gated_activation` does not take."""
    for name, tensor in (("gate", gate), ("up", up)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        if tensor.dtype.itemsize < 2:
            raise TypeError(f"{name}: expected a floating tensor of at least 16 bits, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")
    if gate.dim() == 0:
        raise ValueError("gate: expected at least one dimension, got a scalar")
    if up.dtype != gate.dtype:
        raise TypeError(f"up: expected {gate.dtype} beside gate, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up: expected shape {tuple(gate.shape)} beside gate, got {tuple(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"up: expected on {gate.device} beside gate, got on {up.device}")
    if not isinstance(activation, str):
        raise TypeError(f"activation: expected a name, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up: the product of a gated MLP (arXiv 2002.05202), SwiGLU with "silu", GeGLU with "gelu", ReGLU with "relu". One pass
    forward and one backward, in float32; act(gate) is rounded to its dtype before the product, as torch's own expression rounds it.
    What is kept for the backward is gate and up, not act(gate).

    Double backward is not supported.

    Args:
        gate, up: ``[..., N]`` of one shape, dtype and device: float32, bfloat16 or float16 (float64 runs on the definition); any
            strides.
        activation: "silu"; "gelu", by erf; "gelu_tanh", its approximation by tanh; "relu".

    Returns:
        ``[..., N]`` in gate's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_gated(gate, up, activation)
    if by_definition():
        return definition.gated_activation(gate, up, activation)
    return by_library.apply(gate, up, activation)  # type: ignore[no-any-return]
