"""Every planted fault of the zeroth order is noticed by the checks that the real tests run; planting nothing is not."""

import copy

import pytest
import torch
from torch import nn

from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.optim import MeZO, mezo
from peftfast.optim.mezo import SEED_STEP
from tests.support import zo_checks, zo_mutants
from tests.support.mezo_checks import LABELS, TOKENS, closure_of, net, reference_step, z_of
from tests.support.mutants import Mutant, plant


def check_perturb() -> None:
    for case in zo_checks.TELLING:
        zo_checks.check_perturb(case)
    zo_checks.check_perturb(zo_checks.ZoCase((700, 9), torch.bfloat16, threshold=False, offsets=(0, 3)))


def check_linear() -> None:
    for case in zo_checks.LINEAR_TELLING:
        zo_checks.check_linear(case)


def check_nf4_linear() -> None:
    for case in zo_checks.NF4_LINEAR_TELLING:
        zo_checks.check_nf4_linear(case)


def check_step() -> None:
    """Three steps against the formula in float64, with a tensor that must be copied (a tied weight) among those in flight."""
    model = net(tied=True)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=5, weight_decay=0.5)
    mine = [p.detach().clone().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    wide = copy.deepcopy(model).double()

    def loss(values: list[torch.Tensor]) -> torch.Tensor:
        outputs = torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (TOKENS,))
        return nn.functional.cross_entropy(outputs, LABELS)

    assert optimizer.copied == []
    for step in range(3):
        z = [d.double() for d in z_of(model, (5 + step * SEED_STEP) % 2**64)]
        reference_step(mine, loss, z, 1e-2, 1e-2, 0.5)
        optimizer.step(closure_of(model))
    assert optimizer.copied == ["embedding.weight"]
    for p, right in zip(model.parameters(), mine, strict=True):
        assert torch.allclose(p.detach().double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mutant", zo_mutants.PERTURB, ids=str)
def test_perturb(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_perturb()


@pytest.mark.parametrize("mutant", zo_mutants.LINEAR, ids=str)
def test_linear(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_linear()


@pytest.mark.parametrize("mutant", zo_mutants.NF4_LINEAR, ids=str)
def test_nf4_linear(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_nf4_linear()


@pytest.mark.parametrize("mutant", zo_mutants.STEP, ids=str)
def test_step(mutant: zo_mutants.StepMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    zo_mutants.plant_in_step(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_step()


def test_planting_itself_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def through(run, *given, **named):  # type: ignore[no-untyped-def]
        return run(*given, **named)

    for operator in (ops.perturb_, linear_ops.zo_linear, linear_ops.zo_nf4_linear):
        plant(monkeypatch, Mutant("none", operator, through))
    for name in ("_projected", "_update", "_evaluate", "_move_copies"):
        zo_mutants.plant_in_step(monkeypatch, zo_mutants.StepMutant("none", mezo.MeZO, name, through))
    check_perturb()
    check_linear()
    check_nf4_linear()
    check_step()
