"""Several LoRA projections of one x on dense bases, each with one adapter: the plain case of :mod:`lora_group`, by a short way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..ops import replay
from .derivatives import once_differentiable
from .lora import _plain_on_cpu, kernels_take
from .lora_group import _expand, _shrink
from .node import Function
from .precision import autocast_off
from .shapes import as_rows, shaped, unviewed


class Projections(NamedTuple):
    """The tensors of a call, one of each for a projection; biases and lora_biases may be empty. All have x's device, weights and biases
    its dtype, A one dtype, and either every A needs a gradient or none, as every B."""

    weights: tuple[Tensor, ...]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    lora_biases: tuple[Tensor, ...]

    def uniform(self) -> bool:
        """Whether this is a case for :class:`LoRAProjectionsFunction`, where weights and biases are frozen: what can change between
        calls on the same tensors is asked here."""
        needs_a, needs_b = self.a[0].requires_grad, self.b[0].requires_grad
        for one in self.a:
            if one.requires_grad is not needs_a:
                return False
        for one in self.b:
            if one.requires_grad is not needs_b:
                return False
        return not any([one.requires_grad for one in (*self.weights, *self.biases, *self.lora_biases)])


def projections_of(
    x_dtype: torch.dtype,
    weights: Sequence[Any],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None],
) -> Projections | None:
    """The tensors where they are a case for :class:`LoRAProjectionsFunction`, as far as that does not change from call to call; else
    None."""
    optional = []
    for vectors in (biases, lora_biases):
        present = [one for one in vectors if one is not None]
        if len(present) not in (0, len(weights)):
            return None
        optional.append(tuple(present))
    if any(not isinstance(one, Tensor) or one.dtype is not x_dtype for one in (*weights, *optional[0])):
        return None
    if len({one.dtype for one in a}) > 1:
        return None
    return Projections(tuple(weights), tuple(a), tuple(b), *optional)


def _as_one(
    x: Tensor, ps: tuple[float, ...], a_dtype: torch.dtype, b: Sequence[Tensor], lora_biases: Sequence[Tensor] = ()
) -> bool:
    """Whether the passes on x run as one operator of the C++ library, as in :func:`lora._as_one`."""
    ranks = [one.shape[1] for one in b]
    taken = ops.lora_library.takes_terms(x.shape[:-1].numel(), ranks, any(ps), x.dtype)
    if taken or not _plain_on_cpu(x, x.dtype):
        return False
    return kernels_take((a_dtype, *[one.dtype for one in b], *[one.dtype for one in lora_biases]))


def _forward(
    x: Tensor,
    seeds: Tensor | None,
    ps: tuple[float, ...],
    scalings: tuple[float, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Every y, and S of all, by an operator a pass."""
    rows = as_rows(x)
    s = _shrink(rows, list(a), None, seeds, ps, (1.0,) * len(ps), x.dtype)
    ys, column = [], 0
    for t, scaling in enumerate(scalings):
        y = functional.linear(rows, weights[t], biases[t] if biases else None)
        own = s[:, column : column + b[t].shape[1]]
        column += b[t].shape[1]
        offset = [lora_biases[t]] if lora_biases else []
        y = _expand(y, own, [b[t]], offset, None, None, (0.0,), (scaling,), y.dtype)
        ys.append(shaped(y, (*x.shape[:-1], b[t].shape[0])))
    return (*ys, s)


_replayed_forward = replay.Replayed(_forward)


class LoRAProjectionsFunction(torch.autograd.Function):
    """y of each projection of x ``[..., K]``. ``seeds`` ``[T]`` is None where nothing is dropped. ``factors`` are plain's a, then its
    b, once more: autograd sees arguments alone, and each costs it time, which is why the frozen tensors come in ``plain``.

    Saved: x only where the A need gradients, S only where the B do; one for all projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seeds: Tensor | None,
        ps: tuple[float, ...],
        scalings: tuple[float, ...],
        plain: Projections,
        *factors: Any,
    ) -> Any:
        count = len(ps)
        weights, _, _, biases, lora_biases = plain
        a, b = factors[:count], factors[count:]
        if x.is_contiguous() and _as_one(x, ps, a[0].dtype, b, lora_biases):
            *ys, s = torch.ops.peftfast_cpu.lora_group_forward.default(
                x, weights, biases, a, b, lora_biases, seeds, ps, scalings
            )
            ys = [unviewed(y) for y in ys]
        else:
            passes = _replayed_forward if replay.allowed(x) else _forward
            *ys, s = passes(x, seeds, ps, scalings, weights, biases, lora_biases, a, b)
        needs = ctx.needs_input_grad
        needs_x, needs_a, needs_b = ctx.needs = (needs[0], needs[5], needs[5 + count])
        own_weights = (*a, *weights) if needs_x else ()
        ctx.save_for_backward(x if needs_a else None, s if needs_b else None, seeds, *b, *own_weights)
        ctx.ps, ctx.scalings = ps, scalings
        ctx.dtype, ctx.a_dtype = x.dtype, a[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, s, seeds, *saved = ctx.saved_tensors
        count = len(dys)
        b, a, weights = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needs_x, needs_a, needs_b = ctx.needs
        nothing = (None,) * count
        # Not `None in dys`, which compares every tensor with None, at 15 us each.
        served = all([dy is not None and dy.dtype is ctx.dtype for dy in dys])
        if served and _as_one(dys[0], ctx.ps, ctx.a_dtype, b):  # type: ignore[arg-type]
            dys = tuple([dy.contiguous() for dy in dys])  # type: ignore[union-attr]
            dx = _base_gradient(dys, weights) if needs_x else None
            found = torch.ops.peftfast_cpu.lora_group_backward.default(
                dys,
                dx,
                None if x is None else x.contiguous(),
                a,
                b,
                s,
                seeds,
                ctx.ps,
                ctx.scalings,
                needs_a,
                needs_b,
                ctx.a_dtype,
            )
            da = found[:count] if needs_a else nothing
            db = found[-count:] if needs_b else nothing
            return (dx, None, None, None, None, *da, *db)
        live = [t for t, dy in enumerate(dys) if dy is not None]
        if not live:
            return (None,) * (5 + 2 * count)
        with autocast_off(dys[live[0]].device.type):  # type: ignore[union-attr]
            passes = _replayed_backward if replay.allowed(dys[live[0]]) else _backward
            options = (ctx.needs, ctx.ps, ctx.scalings, ctx.dtype, ctx.a_dtype)
            dx, *factors = passes(dys, x, s, seeds, a, b, weights, *options)
        return (dx, None, None, None, None, *factors)


by_library = Function(LoRAProjectionsFunction, addressed=True)


def _base_gradient(dys: Any, weights: Any) -> Tensor:
    """The sum of dy W: each product adds itself to what it finds."""
    dx = dys[0] @ weights[0]
    flat = dx if dx.dim() == 2 else dx.view(-1, dx.shape[-1])
    for t in range(1, len(weights)):
        dy = dys[t]
        flat.addmm_(dy if dy.dim() == 2 else dy.view(-1, dy.shape[-1]), weights[t])
    return dx


def _backward(
    dys: Sequence[Tensor | None],
    x: Any,
    s: Any,
    seeds: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    ps: tuple[float, ...],
    scalings: tuple[float, ...],
    dtype: torch.dtype,
    a_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """dx, every dA and every dB by an operator a pass, of the projections whose result was used."""
    count = len(dys)
    needs_x, needs_a, needs_b = needs
    leading = next(dy for dy in dys if dy is not None).shape[:-1]
    flat = {t: as_rows(dy).to(dtype) for t, dy in enumerate(dys) if dy is not None}
    all_da: list[Any] = [None] * count
    all_db: list[Any] = [None] * count
    parts, dx = [], None
    for t, dy in flat.items():
        if needs_b:
            column = sum(one.shape[1] for one in b[:t])
            own = s[:, column : column + b[t].shape[1]]
            ds, all_db[t] = ops.lora.lora_dy_grads(dy, own, b[t], scalings[t], b[t].dtype)
        else:
            ds = ops.lora.lora_shrink(dy, b[t].T, None, 0.0, scalings[t], dtype)
        parts.append(ds)
    ds = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    live, ones = list(flat), [1.0] * len(flat)
    own_ps = [ps[t] for t in live]
    own_seeds = None
    if seeds is not None:
        own_seeds = seeds if len(live) == count else torch.cat([seeds[t : t + 1] for t in live])
    if needs_a:
        ranks = [b[t].shape[1] for t in live]
        da = ops.lora_terms.lora_terms_weight_grad(ds, as_rows(x), ranks, None, own_seeds, own_ps, ones, a_dtype)
        for t, one in zip(live, da.split(ranks), strict=True):
            all_da[t] = one
    if needs_x:
        dx = _base_gradient([flat[t] for t in live], [weights[t] for t in live])
        dx = _expand(dx, ds, [a[t].T for t in live], [], None, own_seeds, own_ps, ones, dtype)
        dx = shaped(dx, (*leading, weights[0].shape[1]))
    return (dx, *all_da, *all_db)


_replayed_backward = replay.Replayed(_backward)
