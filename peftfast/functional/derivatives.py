"""Which derivatives the kernels have: gradients, once. What asks for others is refused: torch would answer with a part of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of a Function's backward: no graph of it can be recorded, and where one is asked for it raises.

    torch's own decorator raises later, and only for a second derivative that runs through dy: one that runs through what the forward
    saved (dx is a function of the adapter, dA of x) is left out without a word, as ``torch.autograd.grad`` leaves out every one.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        # A compiler traces the backward in either mode, and refuses a second derivative by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: peftfast's kernels are once_differentiable and have no gradients of gradients; take them from "
                "torch's own operators (peftfast.unpatch(model) gives a model's own forward back)"
            )
        with torch.no_grad():
            return backward(ctx, *grads)

    return wrapper


def refuse_tangents(*tensors: Any) -> None:
    """For a way past autograd's Functions, which ask this themselves: no tangent of forward-mode differentiation is lost there.

    Raises:
        NotImplementedError: one of the tensors has a tangent.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "peftfast's kernels have no forward-mode derivative (torch.autograd.forward_ad, jvp)"
            )


def transformed() -> bool:
    """Whether a call is inside what no kernel follows: torch.func's transforms, forward-mode differentiation, torch.jit's tracer."""
    return (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing()  # type: ignore[attr-defined]
    )
