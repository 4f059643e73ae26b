"""Planted faults of the zeroth order: in the operators for every term, and in the optimiser for every rule of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.optim import in_flight, mezo
from tests.support.mutants import Mutant

_NAMES = (
    *("tensors", "sources", "seeds", "coefficients", "decay", "thresholds", "rounding_seed"),
    *("tensor_ids", "offsets", "rademacher"),
)


def _changed(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """``run`` with some of perturb_'s arguments, by name, put through functions; a change that leaves the lists of one tensor alone
    finds the others."""

    def fault(run: Callable[..., Any], *given: Any) -> Any:
        arguments = dict(zip(_NAMES, given, strict=True))
        for name, change in changes.items():
            if arguments[name] is not None:
                arguments[name] = change(arguments[name])
        return run(*arguments.values())

    return fault


def _last_forgotten(run: Callable[..., Any], *given: Any) -> None:
    tensors, sources = given[0], given[1] or given[0]
    kept = [source.reshape(-1)[-1:].clone() for source in sources]
    run(*given)
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.view(-1)[-1:] = value


def _nearest_first(run: Callable[..., Any], *given: Any) -> None:
    """Rounded after each term in place of once: K passes."""
    tensors, sources, seeds, coefficients, decay, thresholds, rounding_seed, *place = given
    if thresholds is not None:
        return run(*given)
    run(tensors, sources, seeds[:0], coefficients[:0], decay, None, None, *place)
    for k in range(seeds.numel()):
        run(tensors, [], seeds[k : k + 1], coefficients[k : k + 1], None, None, rounding_seed, *place)


def _moved_threshold(run: Callable[..., Any], *given: Any) -> None:
    """The mask told from the moved weight: Sparse MeZO's classic fault."""
    tensors, sources, seeds, coefficients, decay, thresholds, rounding_seed, *place = given
    if thresholds is None:
        return run(*given)
    before = [source.clone() for source in (sources or tensors)]
    run(tensors, sources, seeds, coefficients, decay, None, rounding_seed, *place)
    for i, tensor in enumerate(tensors):
        tensor.copy_(torch.where(tensor.abs().float() <= thresholds[i], tensor, before[i]))


def _shared_counter(run: Callable[..., Any], *given: Any) -> None:
    """A shard's position counted from its own start: right only for a whole tensor."""
    return run(*given[:8], [0] * len(given[8]), given[9])


PERTURB = [
    Mutant("sign of the step", ops.perturb_, _changed(coefficients=lambda c: -c)),
    Mutant("last term dropped", ops.perturb_, _changed(seeds=lambda s: s[:-1], coefficients=lambda c: c[:-1])),
    Mutant("first seed for all terms", ops.perturb_, _changed(seeds=lambda s: s[:1].expand(len(s)).contiguous())),
    Mutant("another seed", ops.perturb_, _changed(seeds=lambda s: s + 1)),
    Mutant("upper half of the seed lost", ops.perturb_, _changed(seeds=lambda s: s & 0xFFFFFFFF)),
    Mutant("coefficients swapped", ops.perturb_, _changed(coefficients=lambda c: c.flip(0))),
    Mutant("decay missing", ops.perturb_, _changed(decay=lambda d: d * 0 + 1)),
    Mutant("decay twice", ops.perturb_, _changed(decay=lambda d: d * d)),
    Mutant("threshold missing", ops.perturb_, _changed(thresholds=lambda t: t * 0 + float("inf"))),
    Mutant("thresholds shifted", ops.perturb_, _changed(thresholds=lambda t: t.roll(1))),
    Mutant("mask of the moved weight", ops.perturb_, _moved_threshold),
    Mutant("draws of another seed", ops.perturb_, _changed(rounding_seed=lambda s: s + 1)),
    Mutant("to nearest", ops.perturb_, lambda run, *g: run(*g[:6], None, *g[7:])),
    Mutant("rounded after each term", ops.perturb_, _nearest_first),
    Mutant("ids shifted", ops.perturb_, _changed(tensor_ids=lambda i: [*i[1:], i[0]])),
    Mutant("offsets ignored", ops.perturb_, _shared_counter),
    Mutant("offsets by one", ops.perturb_, _changed(offsets=lambda o: [one + 1 for one in o])),
    Mutant("the other distribution", ops.perturb_, _changed(rademacher=lambda r: not r)),
    Mutant("last element forgotten", ops.perturb_, _last_forgotten),
    Mutant(
        "source written",
        ops.perturb_,
        lambda run, *g: (run(*g), [s.copy_(t) for s, t in zip(g[1], g[0], strict=False)]) and None,
    ),
]


def _linear(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """x_plus, x_minus, weight, bias_plus, bias_minus, seed, eps, threshold, tensor_id, rademacher."""
    return lambda run, *given: run(*change(*given))


LINEAR = [
    Mutant("signs exchanged", linear_ops.zo_linear, _linear(lambda *g: (*g[:6], -g[6], *g[7:]))),
    Mutant("eps doubled", linear_ops.zo_linear, _linear(lambda *g: (*g[:6], g[6] * 2, *g[7:]))),
    Mutant("one side for both", linear_ops.zo_linear, lambda run, *g: (run(*g)[0], run(g[1], g[1], *g[2:])[0])),
    Mutant("inputs exchanged", linear_ops.zo_linear, _linear(lambda a, b, *rest: (b, a, *rest))),
    Mutant("biases exchanged", linear_ops.zo_linear, _linear(lambda a, b, w, p, m, *rest: (a, b, w, m, p, *rest))),
    Mutant("bias dropped", linear_ops.zo_linear, _linear(lambda a, b, w, p, m, *rest: (a, b, w, None, None, *rest))),
    Mutant("another seed", linear_ops.zo_linear, _linear(lambda *g: (*g[:5], g[5] + 1, *g[6:]))),
    Mutant("another tensor", linear_ops.zo_linear, _linear(lambda *g: (*g[:8], g[8] + 1, g[9]))),
    Mutant("threshold dropped", linear_ops.zo_linear, _linear(lambda *g: (*g[:7], None, *g[8:]))),
    Mutant("the other distribution", linear_ops.zo_linear, _linear(lambda *g: (*g[:9], not g[9]))),
    Mutant("nothing moved", linear_ops.zo_linear, _linear(lambda *g: (*g[:6], g[6] * 0, *g[7:]))),
]


def _nf4(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """``run`` with some of zo_nf4_linear's arguments, by place, put through functions; None stays None."""
    places = {
        "packed": 2,
        "absmax": 3,
        "seed": 12,
        "eps": 13,
        "threshold": 14,
        "id": 15,
        "rademacher": 16,
        "scales": 17,
    }

    def fault(run: Callable[..., Any], *given: Any) -> Any:
        arguments = list(given)
        for name, change in changes.items():
            if arguments[places[name]] is not None:
                arguments[places[name]] = change(arguments[places[name]])
        return run(*arguments)

    return fault


def _nested_scales_kept(run: Callable[..., Any], *given: Any) -> Any:
    """The weight moved where its scales were asked for; the other way round nested ones cannot be."""
    return run(*given[:17], False)


NF4_LINEAR = [
    Mutant("signs exchanged", linear_ops.zo_nf4_linear, _nf4(eps=lambda e: -e)),
    Mutant("eps doubled", linear_ops.zo_nf4_linear, _nf4(eps=lambda e: e * 2)),
    Mutant("nothing moved", linear_ops.zo_nf4_linear, _nf4(eps=lambda e: e * 0)),
    Mutant("another seed", linear_ops.zo_nf4_linear, _nf4(seed=lambda s: s + 1)),
    Mutant("another tensor", linear_ops.zo_nf4_linear, _nf4(id=lambda i: i + 1)),
    Mutant("threshold dropped", linear_ops.zo_nf4_linear, _nf4(threshold=lambda t: t + float("inf"))),
    Mutant("the other distribution", linear_ops.zo_nf4_linear, _nf4(rademacher=lambda r: not r)),
    Mutant("the weight for its scales", linear_ops.zo_nf4_linear, _nested_scales_kept),
    Mutant("nibbles exchanged", linear_ops.zo_nf4_linear, _nf4(packed=lambda p: p << 4 | p >> 4)),
    Mutant("maxima shifted", linear_ops.zo_nf4_linear, _nf4(absmax=lambda a: a.roll(1))),
    Mutant("inputs exchanged", linear_ops.zo_nf4_linear, _linear(lambda a, b, *rest: (b, a, *rest))),
    Mutant("biases exchanged", linear_ops.zo_nf4_linear, _linear(lambda *g: (*g[:10], g[11], g[10], *g[12:]))),
    Mutant("bias dropped", linear_ops.zo_nf4_linear, _linear(lambda *g: (*g[:10], None, None, *g[12:]))),
    Mutant("one side for both", linear_ops.zo_nf4_linear, lambda run, *g: (run(*g)[0], run(g[1], g[1], *g[2:])[0])),
]


@dataclasses.dataclass(frozen=True)
class StepMutant:
    """A fault in the optimiser: ``replacement(true, *arguments)`` in the place of an attribute of ``owner``."""

    name: str
    owner: Any
    attribute: str
    replacement: Callable[..., Any]

    def __str__(self) -> str:
        return self.name


def plant_in_step(monkeypatch: pytest.MonkeyPatch, mutant: StepMutant) -> None:
    true = getattr(mutant.owner, mutant.attribute)

    def planted(*given: Any, **named: Any) -> Any:
        return mutant.replacement(true, *given, **named)

    monkeypatch.setattr(mutant.owner, mutant.attribute, planted)


def _scaled(factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def replacement(true: Any, *given: Any) -> tuple[Tensor, Tensor]:
        scalars, ok = true(*given)
        return scalars * factor, ok

    return replacement


def _update(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    return lambda true, self, *given: true(self, *change(*given))


def _without_decay(true: Any, self: Any, *given: Any) -> Any:
    kept = [group["weight_decay"] for group in self.param_groups]
    for group in self.param_groups:
        group["weight_decay"] = 0.0
    try:
        return true(self, *given)
    finally:
        for group, value in zip(self.param_groups, kept, strict=True):
            group["weight_decay"] = value


def _one_sign(true: Any, self: Any, closures: Any, seed: Any, scale: Any, *rest: Any, **named: Any) -> Any:
    return true(self, closures, seed, scale.abs(), *rest, **named)


def _unmoved(true: Any, self: Any, layout: Any, *rest: Any) -> None:
    """Parameters that are copied are left where they are."""


STEP = [
    StepMutant("ascends", mezo.MeZO, "_projected", _scaled(-1.0)),
    StepMutant("the two of 2 eps forgotten", mezo.MeZO, "_projected", _scaled(2.0)),
    StepMutant("both sides plus", mezo.MeZO, "_evaluate", _one_sign),
    StepMutant("z of the update is another", mezo.MeZO, "_update", _update(lambda s, *rest: (s + 1, *rest))),
    StepMutant("lr twice", mezo.MeZO, "_update", _update(lambda s, g, ok, lrs, r: (s, g, ok, [x * x for x in lrs], r))),
    StepMutant("no weight decay", mezo.MeZO, "_update", _without_decay),
    StepMutant("copied tensors stay", mezo.MeZO, "_move_copies", _unmoved),
    StepMutant(
        "ids of the filtered list", in_flight.Direction, "moved", lambda true, self, ps, ids: true(self, ps, [0 for _ in ids])
    ),
]  # fmt: skip
