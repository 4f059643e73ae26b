"""Which derivatives the kernels have: gradients, once. What asks for others is refused: torch would answer with a part of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

logger = logging.getLogger("peftfast")
_said: list[bool] = []


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
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            return _of_each(functools.partial(backward, ctx), grads)

    return wrapper


def _of_each(backward: Callable[..., Any], grads: tuple[Any, ...]) -> Any:
    """A backward pass, which under a map over gradients (``torch.vmap``; what came before it, by which torch still makes
    ``is_grads_batched=True`` and vectorised Jacobians) takes one after the other: the kernels have no rules for batches."""
    if any([one is not None and functorch.is_legacy_batchedtensor(one) for one in grads]):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        held = [
            (torch._remove_batch_dim(one, level, 1, 0), 0)  # type: ignore[attr-defined]
            if one is not None and functorch.is_legacy_batchedtensor(one)
            else (one, None)
            for one in grads
        ]
        return _rebatched(_mapped(backward, held), torch._add_batch_dim, level)  # type: ignore[attr-defined]
    if not torch._C._are_functorch_transforms_active():
        return backward(*grads)
    level = max([functorch.maybe_get_level(one) for one in grads if one is not None], default=-1)
    if level < 0:
        return backward(*grads)
    held = [
        (functorch.get_unwrapped(one), functorch.maybe_get_bdim(one))
        if one is not None and functorch.maybe_get_level(one) == level and functorch.is_batchedtensor(one)
        else (one, None)
        for one in grads
    ]
    with temporarily_pop_interpreter_stack():
        found = _mapped(lambda *own: _of_each(backward, own), held)
    return _rebatched(found, functorch._add_batch_dim, level)


def _mapped(backward: Callable[..., Any], held: Sequence[tuple[Any, int | None]]) -> list[Any]:
    """The gradients of each gradient of a batch, side by side in a first dimension. ``held``: tensors, and where their batch is."""
    count = next(one.shape[place] for one, place in held if place is not None)
    found = []
    for i in range(max(count, 1)):
        own = backward(*[one if place is None else _one_of(one, place, i) for one, place in held])
        found.append(own if isinstance(own, tuple) else (own,))
    if not count:
        return [None if one is None else one.new_empty((0, *one.shape)) for one in found[0]]
    return [None if own[0] is None else torch.stack(own) for own in zip(*found, strict=True)]


def _one_of(batch: Any, place: int, index: int) -> Any:
    """Of an empty batch something of its elements' shape."""
    shape = [size for at, size in enumerate(batch.shape) if at != place]
    return batch.select(place, index) if batch.shape[place] else batch.new_zeros(shape)


def _rebatched(found: list[Any], add: Callable[..., Any], level: int) -> tuple[Any, ...]:
    return tuple(None if one is None else add(one, 0, level) for one in found)


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


def by_definition() -> bool:
    """Whether a public function runs its definition in plain PyTorch (:mod:`.plain`) and not the kernels: where :func:`transformed` is
    true, but in a compiler, which traces the kernels' way. 0.4 us (Xeon, torch 2.13, 2026-11-22)."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    if not _said:
        _said.append(True)
        logger.warning(
            "inside of torch.func's transforms, forward-mode differentiation or torch.jit's tracer: plain PyTorch runs, not the kernels"
        )
    return True


def transformed() -> bool:
    """Whether a call is inside what no kernel follows: torch.func's transforms, forward-mode differentiation, torch.jit's tracer."""
    return (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing()  # type: ignore[attr-defined]
    )
