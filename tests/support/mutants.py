"""Planted faults: for every term and gradient one way to get it wrong, which the checks of the real tests must notice.

An operator's mutant wraps each of its implementations; a layer's mutant wraps the operators as the layer calls them, or what its
backward returns. The faults change arguments or results of the true implementation, so that nothing but the fault is wrong.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast import ops
from peftfast.functional import lora as layer
from peftfast.functional import nf4_routes
from peftfast.ops.dispatch import Operator
from peftfast.reference import lora as definition
from peftfast.reference import philox


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``fault(run, *arguments)`` in the place of ``run(*arguments)``, for every implementation of ``operator``."""

    name: str
    operator: Operator
    fault: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.operator.name}: {self.name}"


def plant(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    rows = tuple(
        dataclasses.replace(row, run=functools.partial(mutant.fault, row.run))
        for row in mutant.operator.implementations
    )
    monkeypatch.setattr(mutant.operator, "implementations", rows)


def _other(seed: Tensor | None) -> Tensor | None:
    return None if seed is None else seed + 1


def _inexact(p: float) -> float:
    """What turns the exact scale 65536 / threshold into 1 / (1 - p)."""
    return 1.0 if p in (0.0, 1.0) else 1.0 / (1.0 - p) / philox.keep_scale(p)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _swapped_halves(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask with the high half of each word drawn first."""
    even = -(-columns // 8) * 8
    whole = philox.dropout_mask(seed, rows, even, p).reshape(rows, even // 2, 2)
    return whole.flip(-1).reshape(rows, even)[:, :columns]


def _floor_counters(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask with floor(columns / 8) counters a row, so that a row's tail reuses the next row's."""
    per_row = max(columns // 8, 1)
    q = torch.arange(rows, device=seed.device)[:, None] * per_row + torch.arange(columns, device=seed.device) // 8
    words = philox._words_at(seed, q.reshape(-1), 0, philox.STREAM_DROPOUT)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(rows, columns, 8)
    at = (torch.arange(columns, device=seed.device) % 8).expand(rows, columns)[..., None]
    return draws.gather(2, at)[..., 0] < philox.keep_threshold(p)


def _transposed_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    return philox.dropout_mask(seed, columns, rows, p).T


MASKS = {
    "the halves of a word swapped": _swapped_halves,
    "counters of a row rounded down": _floor_counters,
    "the mask transposed": _transposed_mask,
}


def _with_mask(mask_of: Callable[..., Tensor], position: int) -> Callable[..., Any]:
    """A fault: argument ``position`` masked by another mask beforehand, and the operator's own dropout off. Arguments end in
    ``seed, p, scaling, dtype``."""

    def fault(run: Callable[..., Any], *given: Any) -> Any:
        *tensors, seed, p, scaling, dtype = given
        if seed is None or p == 0.0:
            return run(*given)
        rows, columns = tensors[position].shape
        tensors[position] = _masked(tensors[position], mask_of(seed, rows, columns, p))
        return run(*tensors, None, 0.0, scaling * philox.keep_scale(p), dtype)

    return fault


def _shrink_mutants() -> list[Mutant]:
    def add(name: str, fault: Callable[..., Any]) -> Mutant:
        return Mutant(name, ops.lora.lora_shrink, fault)

    return [
        add("scaling missing", lambda run, x, w, seed, p, s, t: run(x, w, seed, p, 1.0, t)),
        add("scaling twice", lambda run, x, w, seed, p, s, t: run(x, w, seed, p, s * s, t)),
        add("mask missing", lambda run, x, w, seed, p, s, t: run(x, w, None, 0.0, s, t)),
        add("mask of another seed", lambda run, x, w, seed, p, s, t: run(x, w, _other(seed), p, s, t)),
        add("kept values unscaled", lambda run, x, w, seed, p, s, t: run(x, w, seed, p, s / (_scale(seed, p)), t)),
        add("scale 1 / (1 - p)", lambda run, x, w, seed, p, s, t: run(x, w, seed, p, s * _inexact(p), t)),
        add("row shifted", lambda run, x, *rest: run(x.roll(1, 0), *rest)),
        add("last column forgotten", lambda run, x, w, *rest: run(_zeroed(x, (slice(None), -1)), w, *rest)),
        add("last row forgotten", lambda run, x, *rest: run(_zeroed(x, -1), *rest)),
        add("last rank forgotten", lambda run, x, w, *rest: run(x, _zeroed(w, -1), *rest)),
        add("ranks swapped", lambda run, x, w, *rest: run(x, w.flip(0), *rest)),
        *(add(name, _with_mask(mask, 0)) for name, mask in MASKS.items()),
    ]


def _scale(seed: Tensor | None, p: float) -> float:
    return philox.keep_scale(p) if seed is not None and 0.0 < p < 1.0 else 1.0


def _zeroed(tensor: Tensor, index: Any) -> Tensor:
    if tensor.numel() == 0:
        return tensor
    tensor = tensor.clone()
    tensor[index] = 0
    return tensor


def _expand_mutants(operator: Operator) -> list[Mutant]:
    """The faults rewrite the first seven arguments, so that they serve the operator in place and the one that is not."""

    def add(name: str, change: Callable[..., tuple[Any, ...]]) -> Mutant:
        return Mutant(name, operator, lambda run, *given: run(*change(*given[:7]), *given[7:]))

    def forget_base(base: Tensor, *rest: Any) -> tuple[Any, ...]:
        return base.zero_(), *rest

    def double_base(base: Tensor, *rest: Any) -> tuple[Any, ...]:
        return base.mul_(2), *rest

    def shift_base(base: Tensor, *rest: Any) -> tuple[Any, ...]:
        return base.copy_(base.roll(1, 0)), *rest

    def bias_past_dropout(
        base: Tensor, s: Tensor, w: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, scaling: float
    ) -> tuple[Any, ...]:
        if bias is not None:
            base += (bias * scaling).to(base.dtype)
        return base, s, w, None, seed, p, scaling

    def drop_base_too(
        base: Tensor, s: Tensor, w: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, scaling: float
    ) -> tuple[Any, ...]:
        if seed is not None:
            base.copy_(philox.dropout(base, seed, p))
        return base, s, w, bias, seed, p, scaling

    return [
        add("base forgotten", forget_base),
        add("base twice", double_base),
        add("base shifted by a row", shift_base),
        add("base dropped too", drop_base_too),
        add("product forgotten", lambda base, s, w, *rest: (base, s * 0, w, *rest)),
        add("scaling missing", lambda base, s, w, b, seed, p, c: (base, s, w, b, seed, p, 1.0)),
        add("scaling twice", lambda base, s, w, b, seed, p, c: (base, s, w, b, seed, p, c * c)),
        add("bias forgotten", lambda base, s, w, b, *rest: (base, s, w, None, *rest)),
        add("bias unscaled", lambda base, s, w, b, seed, p, c: (base, s, w, _over(b, c), seed, p, c)),
        add("bias past the dropout", bias_past_dropout),
        add("mask missing", lambda base, s, w, b, seed, p, c: (base, s, w, b, None, 0.0, c)),
        add("mask of another seed", lambda base, s, w, b, seed, p, c: (base, s, w, b, _other(seed), p, c)),
        add("kept values unscaled", lambda base, s, w, b, seed, p, c: (base, s, w, b, seed, p, c / _scale(seed, p))),
        add("scale 1 / (1 - p)", lambda base, s, w, b, seed, p, c: (base, s, w, b, seed, p, c * _inexact(p))),
        add("row of s shifted", lambda base, s, *rest: (base, s.roll(1, 0), *rest)),
        add("column of w shifted", lambda base, s, w, *rest: (base, s, w.roll(1, 0), *rest)),
        add("last rank forgotten", lambda base, s, w, *rest: (base, _zeroed(s, (slice(None), -1)), w, *rest)),
        add("last column forgotten", lambda base, s, w, *rest: (base, s, _zeroed(w, -1), *rest)),
    ]


def _over(bias: Tensor | None, scaling: float) -> Tensor | None:
    return None if bias is None else bias / scaling


def _weight_grad_mutants() -> list[Mutant]:
    def add(name: str, fault: Callable[..., Any]) -> Mutant:
        return Mutant(name, ops.lora.lora_weight_grad, fault)

    return [
        add("scaling missing", lambda run, ds, x, seed, p, s, t: run(ds, x, seed, p, 1.0, t)),
        add("scaling twice", lambda run, ds, x, seed, p, s, t: run(ds, x, seed, p, s * s, t)),
        add("mask missing", lambda run, ds, x, seed, p, s, t: run(ds, x, None, 0.0, s, t)),
        add("mask of another seed", lambda run, ds, x, seed, p, s, t: run(ds, x, _other(seed), p, s, t)),
        add("kept values unscaled", lambda run, ds, x, seed, p, s, t: run(ds, x, seed, p, s / _scale(seed, p), t)),
        add("scale 1 / (1 - p)", lambda run, ds, x, seed, p, s, t: run(ds, x, seed, p, s * _inexact(p), t)),
        add("row of ds shifted", lambda run, ds, *rest: run(ds.roll(1, 0), *rest)),
        add("last row forgotten", lambda run, ds, *rest: run(_zeroed(ds, -1), *rest)),
        add("last rank forgotten", lambda run, ds, *rest: run(_zeroed(ds, (slice(None), -1)), *rest)),
        add("last column forgotten", lambda run, ds, x, *rest: run(ds, _zeroed(x, (slice(None), -1)), *rest)),
        add("transposed", lambda run, *given: _transposed(run(*given))),
        *(add(name, _with_mask(mask, 1)) for name, mask in MASKS.items()),
    ]


def _transposed(matrix: Tensor) -> Tensor:
    """The transpose under the shape of the matrix: its elements in the wrong order."""
    return matrix.T.reshape(matrix.shape)


def _dy_grads_mutants() -> list[Mutant]:
    def add(name: str, fault: Callable[..., Any]) -> Mutant:
        return Mutant(name, ops.lora.lora_dy_grads, fault)

    def unscaled(which: int) -> Callable[..., Any]:
        def fault(run: Callable[..., Any], dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: Any) -> Any:
            results = [run(dy, s, b, scaling, dtype), run(dy, s, b, 1.0, dtype)]
            return (results[1][0], results[0][1]) if which == 0 else (results[0][0], results[1][1])

        return fault

    return [
        add("scaling missing in ds", unscaled(0)),
        add("scaling missing in db", unscaled(1)),
        add("scaling twice", lambda run, dy, s, b, c, t: run(dy, s, b, c * c, t)),
        add("row of s shifted", lambda run, dy, s, *rest: run(dy, s.roll(1, 0), *rest)),
        add("b shifted", lambda run, dy, s, b, *rest: run(dy, s, b.roll(1, 0), *rest)),
        add("db transposed", lambda run, *given: (lambda ds, db: (ds, _transposed(db)))(*run(*given))),
        add("ds transposed", lambda run, *given: (lambda ds, db: (_transposed(ds), db))(*run(*given))),
        add("last row forgotten", lambda run, dy, *rest: run(_zeroed(dy, -1), *rest)),
        add("last column forgotten", lambda run, dy, *rest: run(_zeroed(dy, (slice(None), -1)), *rest)),
        add("last rank forgotten", lambda run, dy, s, b, *rest: run(dy, s, _zeroed(b, (slice(None), -1)), *rest)),
    ]


LORA = [
    *_shrink_mutants(),
    *_expand_mutants(ops.lora.lora_expand),
    *_expand_mutants(ops.lora.lora_expand_),
    *_weight_grad_mutants(),
    *_dy_grads_mutants(),
]


def truncated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 narrowed to 16 bits toward zero, as a plain shift does."""
    if dtype == torch.bfloat16:
        return (values.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    nearest = values.to(dtype)
    beyond = nearest.float().abs() > values.abs()
    return torch.where(beyond, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


def _narrowing(operator: Operator, dtype_at: int) -> Mutant:
    """The result computed in float32 and truncated to the dtype asked for."""

    def fault(run: Callable[..., Any], *given: Any) -> Any:
        dtype = given[dtype_at]
        wide = run(*given[:dtype_at], torch.float32, *given[dtype_at + 1 :])
        if dtype == torch.float32:
            return wide
        if isinstance(wide, tuple):
            return wide[0], truncated(wide[1], dtype)
        return truncated(wide, dtype)

    return Mutant("rounded toward zero", operator, fault)


def _narrowing_in_place(run: Callable[..., Any], base: Tensor, *rest: Any) -> None:
    wide = base.float()
    run(wide, *rest)
    base.copy_(wide if base.dtype == torch.float32 else truncated(wide, base.dtype))


ROUNDING = [
    _narrowing(ops.lora.lora_shrink, 5),
    _narrowing(ops.lora.lora_expand, 7),
    Mutant("rounded toward zero", ops.lora.lora_expand_, _narrowing_in_place),
    _narrowing(ops.lora.lora_weight_grad, 5),
    _narrowing(ops.lora.lora_dy_grads, 4),
]


def _nf4_mutants() -> list[Mutant]:
    def add(name: str, change: Callable[..., tuple[Any, ...]]) -> Mutant:
        return Mutant(name, ops.nf4.nf4_dequantize_out, lambda run, *given: run(*change(*given)))

    def maxima(
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        block: int,
        shape: Any,
        maximum: Any,
        table: Any,
        offset: Any,
        out: Tensor,
    ) -> tuple[Any, ...]:
        """The nested scale's product and sum rounded once, as a contracted multiply-add does."""
        if maximum is None:
            return packed, absmax, code, block, shape, maximum, table, offset, out
        each = maximum.repeat_interleave(256)[: absmax.numel()].double()
        once = (table[absmax.long()].double() * each + offset.double()).float()
        return packed, once, code, block, shape, None, None, None, out

    def by_rows(
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        block: int,
        shape: Any,
        maximum: Any,
        table: Any,
        offset: Any,
        out: Tensor,
    ) -> tuple[Any, ...]:
        """Blocks counted from each row's start instead of straddling rows; out of range wraps."""
        count, width = out.numel(), shape[-1]
        at = torch.arange(count, device=out.device)
        wrong = (at // width * -(-width // block) + at % width // block) % absmax.numel()
        if maximum is not None:
            each = maximum.repeat_interleave(256)[: absmax.numel()]
            absmax = table[absmax.long()] * each + offset
        nibbles = torch.stack((packed[:, 0] >> 4, packed[:, 0] & 15), -1).reshape(-1)[:count]
        out.copy_((code[nibbles.long()] * absmax[wrong]).reshape(out.shape))
        return ()

    def truncate(run: Callable[..., Any], *given: Any) -> None:
        wide = torch.empty(given[-1].shape, dtype=torch.float32, device=given[-1].device)
        run(*given[:-1], wide)
        given[-1].copy_(wide if given[-1].dtype == torch.float32 else truncated(wide, given[-1].dtype))

    def twice_rounded(run: Callable[..., Any], *given: Any) -> None:
        narrow = torch.empty(given[-1].shape, dtype=torch.bfloat16, device=given[-1].device)
        run(*given[:-1], narrow)
        given[-1].copy_(narrow)

    def straddling(run: Callable[..., Any], *given: Any) -> None:
        by_rows(*given)

    def without_last(run: Callable[..., Any], *given: Any) -> None:
        run(*given)
        given[-1].view(-1)[-1] = 0

    def with_offset(offset_of: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
        return lambda *given: (*given[:7], None if given[7] is None else offset_of(given[7]), given[8])

    def swap(packed: Tensor, *rest: Any) -> tuple[Any, ...]:
        return packed << 4 | packed >> 4, *rest

    def shift_nested(*given: Any) -> tuple[Any, ...]:
        return *given[:5], None if given[5] is None else given[5].roll(1), *given[6:]

    operator = ops.nf4.nf4_dequantize_out
    return [
        add("nested offset missing", with_offset(lambda offset: offset * 0)),
        add("nested offset negated", with_offset(lambda offset: -offset)),
        add("nested scale contracted", maxima),
        add("nested maxima shifted", shift_nested),
        add("nibbles swapped", swap),
        add("byte shifted", lambda packed, *rest: (packed.roll(1, 0), *rest)),
        add("block shifted", lambda packed, absmax, *rest: (packed, absmax.roll(1), *rest)),
        add("code reversed", lambda packed, absmax, code, *rest: (packed, absmax, code.flip(0), *rest)),
        Mutant("blocks end with rows", operator, straddling),
        Mutant("rounded toward zero", operator, truncate),
        Mutant("through bfloat16", operator, twice_rounded),
        Mutant("last element forgotten", operator, without_last),
    ]


NF4 = _nf4_mutants()


@dataclasses.dataclass(frozen=True)
class LayerMutant:
    """``replacements`` of the operators as the layer calls them (each takes the true one first), or an ``edit`` of what its backward
    returns: dx, dweight, da, db, dbias, dlora_bias, by name."""

    name: str
    replacements: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    edit: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __str__(self) -> str:
        return self.name


_RETURNED = ("dx", "dweight", "da", "db", "dbias", "dlora_bias")


def plant_in_layer(monkeypatch: pytest.MonkeyPatch, mutant: LayerMutant) -> None:
    passes = {
        name: functools.partial(mutant.replacements[name], operator) if name in mutant.replacements else operator
        for name, operator in vars(ops.lora).items()
        if isinstance(operator, Operator)
    }
    for module in (layer, nf4_routes):  # the second adds the adapter's product for both
        monkeypatch.setattr(module, "ops", SimpleNamespace(lora=SimpleNamespace(**passes), nf4=ops.nf4))
    monkeypatch.setattr(layer, "_as_one", lambda *_: False)  # the passes one by one, each of which can be replaced
    if "linear" in mutant.replacements:
        linear = functools.partial(mutant.replacements["linear"], torch.nn.functional.linear)
        monkeypatch.setattr(layer, "functional", SimpleNamespace(linear=linear))
    if mutant.edit is None:
        return
    true, edit = layer.LoRALinearFunction, mutant.edit

    class Edited(true):  # type: ignore[misc, valid-type]
        @staticmethod
        def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
            returned = true.backward(ctx, *given)
            named = {name: g for name, g in zip(_RETURNED, returned, strict=False) if g is not None}
            named = edit(ctx, named)
            return *(named.get(name) for name in _RETURNED), *returned[6:]

    monkeypatch.setattr(layer, "by_library", Edited)


def _both_expands(change: Callable[..., tuple[Any, ...]]) -> dict[str, Callable[..., Any]]:
    def replacement(run: Callable[..., Any], *given: Any) -> Any:
        return run(*change(*given[:7]), *given[7:])

    return {"lora_expand": replacement, "lora_expand_": replacement}


def _forward_only(change: Callable[..., tuple[Any, ...]]) -> dict[str, Callable[..., Any]]:
    """The forward's expand is the one with a scaling; the backward's has 1."""
    return _both_expands(lambda *given: change(*given) if given[6] != 1.0 else given)


def _backward_only(change: Callable[..., tuple[Any, ...]]) -> dict[str, Callable[..., Any]]:
    return _both_expands(lambda *given: change(*given) if given[6] == 1.0 else given)


def _times(name: str, factor: Callable[[Any], float]) -> Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]:
    return lambda ctx, grads: grads | ({name: grads[name] * factor(ctx)} if name in grads else {})


LAYER = [
    LayerMutant("S without mask", {"lora_shrink": lambda run, x, w, seed, p, s, t: run(x, w, None, 0.0, s, t)}),
    LayerMutant("S of another mask", {"lora_shrink": lambda run, x, w, seed, *rest: run(x, w, _other(seed), *rest)}),
    LayerMutant("bias dropped in y", {"linear": lambda run, x, w, b: run(x, w)}),
    LayerMutant("y without base", _forward_only(lambda base, *rest: (base * 0, *rest))),
    LayerMutant("y without adapter", _forward_only(lambda base, s, *rest: (base, s * 0, *rest))),
    LayerMutant("y unscaled", _forward_only(lambda *given: (*given[:6], 1.0))),
    LayerMutant("lora_bias dropped in y", _forward_only(lambda *g: (*g[:3], None, *g[4:]))),
    LayerMutant("lora_bias unscaled in y", _forward_only(lambda *g: (*g[:3], _over(g[3], g[6]), *g[4:]))),
    LayerMutant("y rows shifted", _forward_only(lambda base, s, *rest: (base, s.roll(1, 0), *rest))),
    LayerMutant("dx without mask", _backward_only(lambda *g: (*g[:4], None, 0.0, g[6]))),
    LayerMutant("dx of another mask", _backward_only(lambda *g: (*g[:4], _other(g[4]), *g[5:]))),
    LayerMutant("dx without base", _backward_only(lambda base, *rest: (base.zero_(), *rest))),
    LayerMutant("dx without adapter", _backward_only(lambda base, s, *rest: (base, s * 0, *rest))),
    LayerMutant("dx scaled twice", _backward_only(lambda *g: (*g[:6], 1.5))),
    LayerMutant("dx rows shifted", _backward_only(lambda base, s, *rest: (base, s.roll(1, 0), *rest))),
    LayerMutant("da without mask", {"lora_weight_grad": lambda run, ds, x, seed, p, s, t: run(ds, x, None, 0.0, s, t)}),
    LayerMutant(
        "da of another mask", {"lora_weight_grad": lambda run, ds, x, seed, *rest: run(ds, x, _other(seed), *rest)}
    ),
    LayerMutant("da scaled twice", {"lora_weight_grad": lambda run, ds, x, q, p, s, t: run(ds, x, q, p, 1.5, t)}),
    LayerMutant("da rows shifted", {"lora_weight_grad": lambda run, ds, *rest: run(ds.roll(1, 0), *rest)}),
    LayerMutant("ds and db unscaled", {"lora_dy_grads": lambda run, dy, s, b, c, t: run(dy, s, b, 1.0, t)}),
    LayerMutant(
        "db without the keep scale", edit=_times("db", lambda ctx: 1 / _scale(ctx.saved_tensors[5], ctx.plan[0]))
    ),
    LayerMutant("db transposed", edit=lambda ctx, grads: grads | {"db": _transposed(grads["db"])}),
    LayerMutant("da transposed", edit=lambda ctx, grads: grads | {"da": _transposed(grads["da"])}),
    LayerMutant("dbias scaled", edit=_times("dbias", lambda ctx: ctx.plan[1])),
    LayerMutant("dlora_bias unscaled", edit=_times("dlora_bias", lambda ctx: 1 / ctx.plan[1])),
    LayerMutant("dweight scaled", edit=_times("dweight", lambda ctx: ctx.plan[1])),
    LayerMutant("dx missing", edit=lambda ctx, grads: {**grads, "dx": grads["dx"] * 0}),
]


def composed_apply(*given: Any) -> Tensor:
    """The whole layer as torch calls under the fused one's signature: right in value, and no fusion at all."""
    x, weight, a, b, bias, lora_bias, seed, p, scaling, compute, out, *quantisation = given
    dense = layer._dense_weight(weight, tuple(quantisation), compute)
    cast = [None if t is None else t.to(compute) for t in (x, dense, a, b, bias, lora_bias)]
    y = definition.lora_linear(*cast[:4], bias=cast[4], lora_bias=cast[5], scaling=scaling, dropout_p=p, seed=seed)
    return y.to(out)
