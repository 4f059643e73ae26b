"""The error gate: a row's error against float64 within 2 * (error of the same formula by torch's operators + one rounding).

``python -m benchmarks.verify`` runs the gate alone, with run's options, and times nothing.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layers import dropout_seed
from .registry import Case, Inputs, Op, Provider, Results

FACTOR = 2


@dataclass(frozen=True)
class Check:
    """The result that comes closest to its budget, or is furthest over it. ``error`` and ``budget`` are relative to its largest exact
    value; ``dropout`` is the rate at which it was checked."""

    result: str
    error: float
    budget: float
    dropout: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


class Gate:
    """The exact and the composed results of one problem, computed once for all its providers."""

    def __init__(self, op: Op, case: Case, inputs: Inputs) -> None:
        self._op, self._case, self._inputs = op, case, inputs
        self._known: dict[tuple[str, float, bool], tuple[Results, Results]] = {}

    def _variant(self, provider: Provider) -> tuple[Case, Inputs]:
        case, inputs = self._case, self._inputs
        if provider.own_mask or provider.computes != "whole":
            case = dataclasses.replace(case, dropout=0.0)
        if "seed" in inputs and case.dropout:
            inputs = {**inputs, "seed": dropout_seed(case)}
        if provider.own_mask and self._op.still is not None:
            inputs = self._op.still(inputs)
        return case, inputs

    def _expected(self, case: Case, inputs: Inputs, provider: Provider) -> tuple[Results, Results]:
        computes = provider.computes
        key = (computes, case.dropout, provider.own_mask)
        if key not in self._known:
            exact = self._op.formula(case, inputs, computes, torch.float64)
            self._known[key] = exact, self._op.formula(case, inputs, computes, case.torch_dtype)
        return self._known[key]

    def check(self, provider: Provider, forward_only: bool) -> Check:
        """Run ``provider`` once and compare every result, gradients too unless ``forward_only``, with the exact one."""
        case, inputs = self._variant(provider)
        exact, composed = self._expected(case, inputs, provider)
        with provider.active():
            work = provider.build(case, inputs)
            results = work.forward()
            if work.leaves and not forward_only:
                results = {**results, **work.backward(results)}
        worst: Check | None = None
        for name, value in results.items():
            found = self._compare(name, value.detach(), exact[name], composed[name], case)
            if worst is None or found.error * worst.budget > worst.error * found.budget or not found.error < torch.inf:
                worst = found
        assert worst is not None
        return worst

    def _compare(
        self, name: str, value: torch.Tensor, exact: torch.Tensor, composed: torch.Tensor, case: Case
    ) -> Check:
        if value.shape != exact.shape:
            return Check(
                f"{name}: shape {tuple(value.shape)}, expected {tuple(exact.shape)}", torch.inf, 0.0, case.dropout
            )
        largest = exact.abs().max().item() or 1.0
        error = (value.double() - exact).abs().max().item()
        composed_error = (composed.double() - exact).abs().max().item()
        rounding = torch.finfo(case.torch_dtype).eps / 2 * largest
        error = error if error == error else torch.inf  # NaN
        return Check(name, error / largest, FACTOR * (composed_error + rounding) / largest, case.dropout)


def main(argv: Sequence[str] | None = None) -> int:
    from . import run

    given = sys.argv[1:] if argv is None else argv
    return run.main([*given, "--verify-only"], run.parser("verify", __doc__))


if __name__ == "__main__":
    sys.exit(main())
