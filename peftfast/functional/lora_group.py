"""Several adapters on one x, and DoRA: one autograd Function over the passes of ``peftfast.ops.lora_terms`` and ``lora_dora``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..ops import lora_product as fused
from ..ops import replay
from ..ops.backends import results_are_kept
from .derivatives import once_differentiable
from .nf4 import dequantized
from .node import Function
from .precision import autocast_off

_FIELDS = ("weight", "absmax", "code", "nested_absmax", "nested_code", "nested_offset", "bias", "gain")
_TERM_FIELDS = ("lora_a", "lora_b", "lora_bias")


class Plan(NamedTuple):
    """What a call is beside its tensors. One entry a projection: its terms' numbers, whether it has DoRA's gain, and block_size and
    shape of a 4-bit weight or None; one entry a term: p and scaling."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    counts: tuple[int, ...]
    dora: tuple[bool, ...]
    quantised: tuple[Any, ...]
    ps: tuple[float, ...]
    scalings: tuple[float, ...]


class _Part:
    """One projection of a call: its tensors by name, and those of its terms."""

    def __init__(self, plan: Plan, index: int, tensors: Sequence[Any], ranks: list[int]) -> None:
        self.index = index
        start = index * len(_FIELDS)
        self.given: dict[str, Any] = dict(zip(_FIELDS, tensors[start : start + len(_FIELDS)], strict=True))
        first = sum(plan.counts[:index])
        self.terms = range(first, first + plan.counts[index])
        at = len(plan.counts) * len(_FIELDS)
        self.factors: list[tuple[Any, ...]] = [
            tuple(tensors[at + len(_TERM_FIELDS) * t : at + len(_TERM_FIELDS) * (t + 1)]) for t in self.terms
        ]
        column = sum(ranks[:first])
        self.columns = slice(column, column + sum(ranks[first : first + plan.counts[index]]))
        self.dora = plan.dora[index]
        self.quantised = plan.quantised[index]

    def dense(self, dtype: torch.dtype) -> Tensor:
        given = self.given
        if self.quantised is None:
            return given["weight"].to(dtype)
        block_size, shape = self.quantised
        nested = (given["nested_absmax"], given["nested_code"], given["nested_offset"])
        return dequantized(given["weight"], (given["absmax"], given["code"], block_size, shape, *nested), dtype)


def _alone(seeds: Tensor | None, term: int, p: float) -> Tensor | None:
    return None if seeds is None or p == 0.0 else seeds[term : term + 1]


def _renumbered(rows: Tensor, terms: list[int]) -> Tensor:
    """Rows' terms numbered as ``terms`` lists them, -1 for all others; nothing is copied from the host."""
    found = torch.full_like(rows, -1)
    for number, term in enumerate(terms):
        found.masked_fill_(rows == term, number)
    return found


def _shrink(x: Tensor, a: list[Tensor], rows: Any, seeds: Any, ps: Any, scalings: Any, dtype: torch.dtype) -> Tensor:
    if len(a) == 1 and rows is None:
        return ops.lora.lora_shrink(x, a[0], _alone(seeds, 0, ps[0]), ps[0], scalings[0], dtype)
    return ops.lora_terms.lora_terms_shrink(x, a, rows, seeds, ps, scalings, dtype)


def _expand(
    base: Tensor, s: Tensor, w: list[Tensor], biases: Any, rows: Any, seeds: Any, ps: Any, scalings: Any, dtype: Any
) -> Tensor:
    """In place where the result has base's dtype."""
    anew = base.dtype != dtype or results_are_kept()
    if len(w) == 1 and rows is None:
        seed = _alone(seeds, 0, ps[0])
        alone = (base, s, w[0], biases[0] if biases else None, seed, ps[0], scalings[0])
        if anew:
            return ops.lora.lora_expand(*alone, dtype)
        ops.lora.lora_expand_(*alone)
        return base
    arguments = (base, s, w, biases, rows, seeds, ps, scalings)
    if anew:
        return ops.lora_terms.lora_terms_expand(*arguments, dtype)
    ops.lora_terms.lora_terms_expand_(*arguments)
    return base


def _biases(part: _Part) -> list[Tensor]:
    """None, or one for each term."""
    if all(factors[2] is None for factors in part.factors):
        return []
    like = next(factors[2] for factors in part.factors if factors[2] is not None)
    return [torch.zeros_like(like) if factors[2] is None else factors[2] for factors in part.factors]


def _forward_product(
    part: _Part, x: Tensor, weight: Tensor, s: Tensor, b: list[Tensor], rows: Any, scalings: Any, plan: Plan
) -> Tensor:
    """x Wᵀ + bias with the adapters' products added: by one kernel where a lone adapter's shape is in the GPU's table."""
    bias, dtype = part.given["bias"], plan.dtype
    shape = (weight.shape[0], weight.shape[1])
    if len(b) == 1 and rows is None and fused.chosen(x, shape, True, b[0].shape[1], False, dtype)[0]:
        adapter = (s, b[0], part.factors[0][2], None, 0.0, scalings[0], plan.out_dtype)
        return fused.lora_product(x, weight, bias, *adapter)
    y = functional.linear(x, weight, None if bias is None else bias.to(dtype))
    return _expand(y, s, b, _biases(part), rows, None, (0.0,) * len(b), scalings, plan.out_dtype)


def _forward(
    x: Tensor, rows: Tensor | None, seeds: Tensor | None, plan: Plan, tensors: Sequence[Any]
) -> tuple[Any, ...]:
    """Every y, then every product before DoRA's gain or None, then S, by an operator a pass."""
    dtype, count = plan.dtype, len(plan.ps)
    at = len(plan.counts) * len(_FIELDS)
    a = list(tensors[at :: len(_TERM_FIELDS)])
    ranks = [one.shape[0] for one in a]
    parts = [_Part(plan, i, tensors, ranks) for i in range(len(plan.counts))]
    s = _shrink(x, a, rows, seeds, plan.ps, (1.0,) * count, dtype)
    cast = x.to(dtype)
    results: list[Tensor] = []
    products: list[Tensor | None] = []
    for part in parts:
        given, bias = part.given, part.given["bias"]
        weight = part.dense(dtype)
        own_s, b = s[:, part.columns], [factors[1] for factors in part.factors]
        ps, scalings = (
            plan.ps[part.terms.start : part.terms.stop],
            plan.scalings[part.terms.start : part.terms.stop],
        )
        if not part.dora:
            results.append(_forward_product(part, cast, weight, own_s, b, rows, scalings, plan))
            products.append(None)
            continue
        bias = None if bias is None else bias.to(dtype)
        base, plain = functional.linear(cast, weight, bias), None
        seed = _alone(seeds, part.terms.start, ps[0])
        if seed is not None:
            plain, bias = base, None
            base = functional.linear(ops.lora_dora.lora_dropout_add(None, x, seed, ps[0], dtype), weight)
        y, z = ops.lora_dora.lora_dora_expand(
            base, plain, own_s, b[0], part.factors[0][2], given["gain"], bias, scalings[0], plan.out_dtype
        )
        results.append(y)
        products.append(z)
    return (*results, *products, s)


_replayed_forward = replay.Replayed(_forward)


class LoRAGroupFunction(torch.autograd.Function):
    """Projections of one matrix x, each with any number of adapters: S of all in one pass over x, all dA in another, dX of all in one
    matrix. ``rows`` restricts each term to the rows that name it. The tensors are those of every projection, then of every term.

    Saved: x only where an A or a W needs a gradient, S only where a B does, DoRA's product before its gain only where the magnitude
    does; no mask, no cast copy, no dense copy of a 4-bit W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor | None, seeds: Tensor | None, plan: Plan, *tensors: Any) -> Any:
        plan = Plan(*plan)
        passes = _replayed_forward if replay.allowed(x) else _forward
        *results, s = passes(x, rows, seeds, plan, tensors)
        results, products = results[: len(plan.counts)], results[len(plan.counts) :]
        LoRAGroupFunction._save(ctx, x, rows, seeds, plan, tensors, s, products)
        return tuple(results)

    @staticmethod
    def _save(ctx: Any, x: Any, rows: Any, seeds: Any, plan: Plan, tensors: Any, s: Any, products: Any) -> None:
        needs = ctx.needs_input_grad[4:]
        at = len(plan.counts) * len(_FIELDS)
        weights, gains = needs[: at : len(_FIELDS)], needs[_FIELDS.index("gain") : at : len(_FIELDS)]
        needs_a, needs_b = needs[at :: len(_TERM_FIELDS)], needs[at + 1 :: len(_TERM_FIELDS)]
        kept: list[Any] = list(tensors)
        for i, dora in enumerate(plan.dora):
            start = i * len(_FIELDS)
            if not ctx.needs_input_grad[0]:
                kept[start : start + 6] = [None] * 6
            kept[start + 6] = None  # bias
            if not dora:
                kept[start + 7] = None
            elif kept[start] is not None:
                # What it is now: PEFT merges DoRA by giving the parameter other data, of which autograd knows nothing.
                kept[start] = kept[start].detach()
        for t in range(len(plan.ps)):
            if not ctx.needs_input_grad[0]:
                kept[at + 3 * t] = None
            kept[at + 3 * t + 2] = None
        z = [product if gain else None for product, gain in zip(products, gains, strict=True)]
        ctx.save_for_backward(
            x if any(needs_a) or any(weights) else None, rows, seeds, s if any(needs_b) else None, *z, *kept
        )
        ctx.plan, ctx.x_dtype = plan, x.dtype
        ctx.ranks = [one.shape[0] for one in tensors[at :: len(_TERM_FIELDS)]]
        ctx.dtypes = [None if one is None else one.dtype for one in tensors]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        live = next((dy for dy in dys if dy is not None), None)
        if live is None:
            return (None,) * len(ctx.needs_input_grad)
        x, rows, seeds, s, *saved = ctx.saved_tensors
        with autocast_off(live.device.type):
            passes = _replayed_backward if replay.allowed(live) else _backward
            settled = (ctx.plan, ctx.ranks, ctx.needs_input_grad, ctx.dtypes, ctx.x_dtype)
            return passes(dys, *settled, x, rows, seeds, s, saved)  # type: ignore[no-any-return]


by_library = Function(LoRAGroupFunction, addressed=True)


def _backward(
    dys: Sequence[Tensor | None],
    plan: Plan,
    ranks: list[int],
    needs: tuple[bool, ...],
    dtypes: list[Any],
    x_dtype: torch.dtype,
    x: Tensor | None,
    rows: Tensor | None,
    seeds: Tensor | None,
    s: Tensor | None,
    saved: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the Function."""
    count = len(plan.counts)
    grads: list[Any] = [None] * len(needs)
    parts = [_Part(plan, i, saved[count:], ranks) for i in range(count)]
    _Backward(plan, ranks, needs, dtypes, x_dtype, x, rows, seeds, s, saved[:count], grads).run(parts, dys)
    return tuple(grads)


_replayed_backward = replay.Replayed(_backward)


class _Backward:
    """The backward of one call; fills ``grads``, one for each argument of the Function."""

    def __init__(
        self,
        plan: Plan,
        ranks: list[int],
        needs: tuple[bool, ...],
        dtypes: list[Any],
        x_dtype: torch.dtype,
        x: Any,
        rows: Any,
        seeds: Any,
        s: Any,
        products: Any,
        grads: list[Any],
    ) -> None:
        self.plan, self.ranks, self.needs, self.dtypes, self.x_dtype = plan, ranks, needs, dtypes, x_dtype
        self.x, self.rows, self.seeds, self.s, self.products, self.grads = x, rows, seeds, s, products, grads
        self.terms_at = len(self.plan.counts) * len(_FIELDS)
        self.dx: Any = None
        self.joined: tuple[list[int], Any] = ([], None)  # terms, and their dS side by side

    def _field(self, part: _Part, name: str) -> int:
        return 4 + part.index * len(_FIELDS) + _FIELDS.index(name)

    def _term_field(self, term: int, name: str) -> int:
        return 4 + self.terms_at + term * len(_TERM_FIELDS) + _TERM_FIELDS.index(name)

    def _wants(self, position: int) -> bool:
        return self.needs[position]

    def _give(self, position: int, grad: Tensor) -> None:
        dtype = self.dtypes[position - 4]
        self.grads[position] = grad if grad.dtype == dtype else grad.to(dtype)

    def run(self, parts: list[_Part], dys: Sequence[Tensor | None]) -> None:
        plan, dtype = self.plan, self.plan.dtype
        all_ds: dict[int, Tensor] = {}
        masked: list[_Part] = []  # whose part of dX is added under the mask of its adapter
        for part, raw in zip(parts, dys, strict=True):
            if raw is None:
                continue
            dy = raw.to(dtype)
            scaled = self._gains(part, dy) if part.dora else None
            terms = list(part.terms)
            wants_a = any(self._wants(self._term_field(t, "lora_a")) for t in terms)
            if wants_a or self.needs[0] or any(self._wants(self._term_field(t, "lora_b")) for t in terms):
                all_ds[part.index] = self._dy_grads(part, dy)
            self._vectors(part, dy)
            own_mask = part.dora and plan.ps[part.terms.start] > 0.0 and self.seeds is not None
            if self.needs[0]:
                self._base_product(part, dy, scaled, own_mask, all_ds.get(part.index))
                if not own_mask:
                    masked.append(part)
            if self._wants(self._field(part, "weight")):
                self._weight(part, dy, scaled, own_mask)
        if self.needs[0]:
            self._expand_dx(masked, all_ds)
        self._factors(parts, all_ds)

    def _gains(self, part: _Part, dy: Tensor) -> Tensor:
        """gain * dy, or under dropout (gain - 1) * dy, and the gain's gradient on the way."""
        gain, p = part.given["gain"], self.plan.ps[part.terms.start]
        factor = gain - 1 if p > 0.0 and self.seeds is not None else gain
        z = self.products[part.index]
        if z is None:
            return (dy * factor).to(dy.dtype)
        scaled, sums = ops.lora_dora.lora_gain_grads(dy, z, factor)
        self._give(self._field(part, "gain"), sums)
        return scaled

    def _dy_grads(self, part: _Part, dy: Tensor) -> Tensor:
        """dS of a projection's terms, and their dB on the way."""
        plan, terms, rows = self.plan, part.terms, self.rows
        scalings = plan.scalings[terms.start : terms.stop]
        b = [factors[1] for factors in part.factors]
        gain = part.given["gain"] if part.dora else None
        if gain is not None:
            b = [b[0] * gain[:, None]]
        wanted = [t for t in terms if self._wants(self._term_field(t, "lora_b"))]
        if not wanted:
            return _shrink(dy, [one.T for one in b], rows, None, (0.0,) * len(b), scalings, dy.dtype)
        s = self.s[:, part.columns]
        target = b[0].dtype if all(one.dtype == b[0].dtype for one in b) else torch.float32
        if len(b) == 1 and rows is None:
            ds, db = ops.lora.lora_dy_grads(dy, s, b[0], scalings[0], target)
            self._give(self._term_field(terms.start, "lora_b"), db if gain is None else db * gain[:, None])
            return ds
        ds, db = ops.lora_terms.lora_terms_dy_grads(dy, s, b, rows, scalings, target)
        own = [self.ranks[t] for t in terms]
        for t, one in zip(terms, db.split([dy.shape[1] * rank for rank in own]), strict=True):
            if t in wanted:
                self._give(self._term_field(t, "lora_b"), one.view(dy.shape[1], self.ranks[t]))
        return ds

    def _vectors(self, part: _Part, dy: Tensor) -> None:
        """Gradients of the base's bias and the adapters'."""
        at_bias = self._field(part, "bias")
        wanted = [t for t in part.terms if self._wants(self._term_field(t, "lora_bias"))]
        if not wanted and not self._wants(at_bias):
            return
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        total: Any = dy.sum(0, dtype=wide) if self._wants(at_bias) or self.rows is None else None
        if self._wants(at_bias):
            self._give(at_bias, total)
        if not wanted:
            return
        if self.rows is not None:
            # A product sums in a fixed order, where index_add would not; this one in parts, and reads dy once.
            names = torch.arange(len(self.ranks), device=dy.device, dtype=self.rows.dtype)
            named = (self.rows[:, None] == names[None, :]).to(dy.dtype)
            totals = ops.lora.lora_weight_grad(named, dy, None, 0.0, 1.0, wide)
        for t in wanted:
            own = total if self.rows is None else totals[t]
            if part.dora:
                own = own * part.given["gain"]
            self._give(self._term_field(t, "lora_bias"), own * self.plan.scalings[t])

    def _base_product(self, part: _Part, dy: Tensor, scaled: Any, own_mask: bool, ds: Any) -> None:
        weight = part.dense(self.plan.dtype)
        left = scaled if part.dora and not own_mask else dy
        # Products of all projections are summed in one matrix: the later ones add to it as they are formed.
        self.dx = left @ weight if self.dx is None else self.dx.addmm_(left, weight)
        if own_mask:
            t = part.terms.start
            product = scaled @ weight
            ops.lora.lora_expand_(product, ds, part.factors[0][0].T, None, None, 0.0, 1.0)
            seed, p = self.seeds[t : t + 1], self.plan.ps[t]
            self.dx = ops.lora_dora.lora_dropout_add(self.dx, product, seed, p, self.dx.dtype)

    def _weight(self, part: _Part, dy: Tensor, scaled: Any, own_mask: bool) -> None:
        dtype = self.plan.dtype
        left = scaled if part.dora and not own_mask else dy
        grad = left.T @ self.x.to(dtype)
        if own_mask:
            t = part.terms.start
            dropped = ops.lora_dora.lora_dropout_add(None, self.x, self.seeds[t : t + 1], self.plan.ps[t], dtype)
            grad = grad.addmm_(scaled.T, dropped)
        self._give(self._field(part, "weight"), grad)

    def _expand_dx(self, parts: list[_Part], all_ds: dict[int, Tensor]) -> None:
        if not parts:
            self.grads[0] = self.dx.to(self.x_dtype)
            return
        terms = [t for part in parts for t in part.terms]
        ds = [all_ds[part.index] for part in parts]
        seeds = self._seeds(terms)
        self.joined = (terms, ds[0] if len(ds) == 1 else torch.cat(ds, 1))
        self.grads[0] = _expand(
            self.dx,
            self.joined[1],
            [factors[0].T for part in parts for factors in part.factors],
            [],
            self.rows,
            seeds,
            [self.plan.ps[t] for t in terms],
            [1.0] * len(terms),
            self.x_dtype,
        )

    def _seeds(self, terms: list[int]) -> Tensor | None:
        if self.seeds is None or not any(self.plan.ps[t] for t in terms):
            return None
        if terms == list(range(terms[0], terms[-1] + 1)):
            return self.seeds[terms[0] : terms[-1] + 1]
        return torch.cat([self.seeds[t : t + 1] for t in terms])

    def _factors(self, parts: list[_Part], all_ds: dict[int, Tensor]) -> None:
        """dA of every term that wants one, in one pass over x."""
        wanted = [
            (t, all_ds[part.index], sum(self.ranks[part.terms.start : t]))
            for part in parts
            if part.index in all_ds
            for t in part.terms
            if self._wants(self._term_field(t, "lora_a"))
        ]
        if not wanted:
            return
        terms = [t for t, _, _ in wanted]
        dtypes = {self.dtypes[self._term_field(t, "lora_a") - 4] for t in terms}
        target = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if terms == self.joined[0]:
            ds = self.joined[1]
        elif len(all_ds) == 1 and len(wanted) == len(self.ranks):
            ds = wanted[0][1]
        else:
            columns = [ds[:, at : at + self.ranks[t]] for t, ds, at in wanted]
            ds = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        ps = [self.plan.ps[t] for t in terms]
        seeds = self._seeds(terms)
        if len(terms) == 1 and self.rows is None:
            t = terms[0]
            da = ops.lora.lora_weight_grad(ds, self.x, _alone(seeds, 0, ps[0]), ps[0], 1.0, target)
            self._give(self._term_field(t, "lora_a"), da)
            return
        ranks = [self.ranks[t] for t in terms]
        rows = self.rows
        if rows is not None and terms != list(range(len(self.ranks))):
            # The terms left are numbered anew.
            rows = _renumbered(rows, terms)
        da = ops.lora_terms.lora_terms_weight_grad(ds, self.x, ranks, rows, seeds, ps, [1.0] * len(terms), target)
        for t, one in zip(terms, da.split(ranks), strict=True):
            self._give(self._term_field(t, "lora_a"), one)
