"""Planted faults in the operators of several adapters and of DoRA, and in the Function over them: each is noticed by the checks that
the real tests run; the same planting without a fault is not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.functional import lora_group, lora_multi
from tests.support import group_checks, terms_checks
from tests.support.terms_checks import CHECKS, OPERATORS

Fault = Callable[..., Any]


def changed(**changes: Callable[[Any], Any]) -> Fault:
    """The true implementation with some of its arguments, by position as "a0", "a1", ..., changed on the way in."""

    def fault(run: Callable[..., Any], *given: Any) -> Any:
        return run(*(changes[f"a{i}"](one) if f"a{i}" in changes else one for i, one in enumerate(given)))

    return fault


def nothing(_: Any) -> None:
    return None


def rolled(value: Any) -> Any:
    return None if value is None else value.roll(1, 0)


def other(seeds: Tensor | None) -> Tensor | None:
    return None if seeds is None else seeds + 1


def ones(scalings: list[float]) -> list[float]:
    return [1.0] * len(scalings)


def last_zeroed(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors[:-1], torch.zeros_like(tensors[-1])]


def spoiled(tensor: Tensor) -> Tensor:
    return tensor.zero_()


def _terms_faults(rows: int) -> dict[str, Fault]:
    """Of arguments ``rows``, ``seeds``, ``ps``, ``scalings`` that begin at a position."""
    return {
        "rows ignored": changed(**{f"a{rows}": nothing}),
        "rows shifted": changed(**{f"a{rows}": rolled}),
        "mask missing": changed(**{f"a{rows + 1}": nothing}),
        "masks of other seeds": changed(**{f"a{rows + 1}": other}),
        "masks of each other": changed(**{f"a{rows + 1}": rolled}),
        "probabilities of each other": changed(**{f"a{rows + 2}": lambda ps: ps[::-1]}),
        "scaling missing": changed(**{f"a{rows + 3}": ones}),
        "scalings of each other": changed(**{f"a{rows + 3}": lambda values: values[::-1]}),
    }


_EXPAND = _terms_faults(4) | {
    "base forgotten": changed(a0=spoiled),
    "s shifted by a row": changed(a1=lambda s: s.roll(1, 0)),
    "s shifted by a column": changed(a1=lambda s: s.roll(1, 1)),
    "last term forgotten": changed(a2=last_zeroed),
    "biases forgotten": changed(a3=lambda biases: []),
    "last bias forgotten": changed(a3=lambda biases: last_zeroed(biases) if biases else []),
}
FAULTS: dict[str, dict[str, Fault]] = {
    "lora_terms_shrink": _terms_faults(2)
    | {
        "row shifted": changed(a0=lambda x: x.roll(1, 0)),
        "last term forgotten": changed(a1=last_zeroed),
    },
    "lora_terms_expand": _EXPAND,
    "lora_terms_expand_": _EXPAND,
    "lora_terms_weight_grad": _terms_faults(3)
    | {
        "row shifted": changed(a0=lambda ds: ds.roll(1, 0)),
        "column shifted": changed(a0=lambda ds: ds.roll(1, 1)),
    },
    "lora_terms_dy_grads": {
        "rows ignored": changed(a3=nothing),
        "rows shifted": changed(a3=rolled),
        "scaling missing": changed(a4=ones),
        "last term forgotten": changed(a2=last_zeroed),
        "s shifted": changed(a1=lambda s: s.roll(1, 0)),
        "dB transposed": lambda run, dy, s, b, *rest: (lambda ds, db: (ds, db.flip(0)))(*run(dy, s, b, *rest)),
    },
    "lora_dora_expand": {
        "plain forgotten": changed(a1=nothing),
        "lora_bias forgotten": changed(a4=nothing),
        "gain forgotten": changed(a5=torch.ones_like),
        "bias forgotten": changed(a6=nothing),
        "scaling missing": changed(a7=lambda _: 1.0),
        "z without the adapter": lambda run, base, *rest: (run(base, *rest)[0], base.clone()),
        "z with the bias": lambda run, *given: (
            lambda y, z: (y, z if given[6] is None else (z + given[6].to(z.dtype)))
        )(*run(*given)),
        "the gain on all of base": lambda run, *given: run(*given[:6], None, *given[7:]),
        "z scaled": lambda run, base, *rest: (lambda y, z: (y, y.to(z.dtype)))(*run(base, *rest)),
        "bias scaled": lambda run, *given: run(
            *given[:6], None if given[6] is None else given[6] * given[5], *given[7:]
        ),
    },
    "lora_gain_grads": {
        "factor forgotten": changed(a2=torch.ones_like),
        "z shifted": changed(a1=lambda z: z.roll(1, 0)),
        "last row forgotten": lambda run, dy, z, factor: (run(dy, z, factor)[0], run(dy[:-1], z[:-1], factor)[1]),
        "sum scaled": lambda run, dy, z, factor: (lambda out, sums: (out, sums * factor))(*run(dy, z, factor)),
    },
    "lora_dropout_add": {
        "base forgotten": changed(a0=nothing),
        "mask missing": changed(a3=lambda _: 0.0),
        "another mask": changed(a2=lambda seed: seed + 1),
        "base dropped too": lambda run, base, x, *rest: run(None, x if base is None else x + base.to(x.dtype), *rest),
    },
}
TELLING = (*terms_checks.TELLING, terms_checks.TermsCase(M=33, K=67, N=67, ps=(0.5, 0.1, 0.0), rows=True, data=7))


def check_operator(name: str) -> None:
    for case in TELLING:
        CHECKS[name](case)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault) -> None:
    operator = OPERATORS[name]
    rows = tuple(dataclasses.replace(row, run=functools.partial(fault, row.run)) for row in operator.implementations)
    monkeypatch.setattr(operator, "implementations", rows)


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_operator(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, name, FAULTS[name][fault])
    with pytest.raises(AssertionError, match="over the budget|not finite"):
        check_operator(name)


@pytest.mark.parametrize("name", OPERATORS)
def test_planting_itself_breaks_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, name, lambda run, *given: run(*given))
    check_operator(name)


true = lora_group._Backward


def _gain_of_one(self: Any, part: Any, dy: Tensor) -> Tensor:
    given = part.given
    part.given = given | {"gain": None if given["gain"] is None else torch.ones_like(given["gain"])}
    try:
        return true_dy_grads(self, part, dy)
    finally:
        part.given = given


true_dy_grads, true_base_product, true_seeds = true._dy_grads, true._base_product, true._seeds


def _last_product_only(self: Any, *given: Any) -> None:
    self.dx = None
    true_base_product(self, *given)


def _without_adapter(self: Any, parts: Any, all_ds: Any) -> None:
    self.grads[0] = self.dx.to(self.x_dtype)


def _reversed(self: Any, terms: list[int]) -> Tensor | None:
    seeds = true_seeds(self, terms)
    return None if seeds is None else seeds.flip(0)


def _first_order(self: Any, part: Any, dy: Tensor, scaled: Any, own_mask: bool, ds: Any) -> None:
    """The second product of DoRA under dropout left out."""
    true_base_product(self, part, dy, scaled if scaled is None or not own_mask else scaled * 0, own_mask, ds)


def _unscaled(self: Any, part: Any, dy: Tensor) -> Tensor:
    true_gains(self, part, dy)
    return dy


true_gains = true._gains
GROUP: dict[str, tuple[Any, str, Any]] = {
    "dX without the gain": (true, "_gains", _unscaled),
    "dS and dB without the gain": (true, "_dy_grads", _gain_of_one),
    "no gradients of biases": (true, "_vectors", lambda *_: None),
    "dX of the last product alone": (true, "_base_product", _last_product_only),
    "dX without DoRA's second product": (true, "_base_product", _first_order),
    "dX without adapters": (true, "_expand_dx", _without_adapter),
    "dA missing": (true, "_factors", lambda *_: None),
    "masks of each other": (true, "_seeds", _reversed),
    "y without biases": (lora_group, "_biases", lambda part: []),
    "norm of W alone": (
        lora_multi,
        "row_gain",
        functools.partial(lambda run, weight, a, b, scaling, *rest: run(weight, a, b, 0.0, *rest), lora_multi.row_gain),
    ),
}


def check_groups() -> None:
    for case in group_checks.TELLING:
        group_checks.check_group(case)


@pytest.mark.parametrize("fault", GROUP)
def test_group(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*GROUP[fault])
    with pytest.raises(AssertionError):
        check_groups()


def test_groups_are_sound() -> None:
    check_groups()
